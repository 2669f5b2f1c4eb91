"""The library's scenarios are pinned: who quotes a digest must be able to find it again.

Where one changes on purpose, so do the figures that were made with it: say so in the changelog.
"""

import pytest

from eloquent_netem.digest import digest
from eloquent_netem.scenario import library_names, load_scenario

DIGESTS = {
    "3g": "cbbc1d28322e032ebee76d4eaa6f0d03656935c8621d0b271cb6688ab1c3b4ef",
    "bursts-150ms": "70c33f09b5b7b4fadc51089eac8795204b8e5301c979ebcc21cb8c21c72a189b",
    "clean": "053ddea6814a6d11eb5a9d512cd36e7741c664b420f6b4f36bcff26cbe8b3a13",
    "congested-l4s": "a6fe9e2a87357cc532115ba2172606dea2477394f6cf58a97332c719a0dc57cc",
    "handover": "0fc8592702659a5ddbd33ee116ed2110c03da84c01d1f0354dd4e7db8d27e220",
    "lossy-10": "13c36dca297b3234331ea089051b6ef7edf5f38e4592eb847a22f26e01b91beb",
    "lossy-5": "9c2baed664bc6184cc8e5703ee65314163ad1c8be1ab243e149a60628b69a25b",
    "lte-drive": "d2dfb69e0cd652afac84bb4cd1b6defaf750f6a0a1d7cbfb484a6054179106f2",
    "outage-3s": "27158a63de15cd4209f409a75c891c5991b5fde5fb8d2ae6ecea472d6fbb4e81",
    "plane": "9661e25bc98c9ec8bd5076d95ee3f5a18a0414ccac391ba1815ebd821abcf2ce",
    "satellite": "3b6ecf211051000992c7fa227186d56a87f0a57fa5afa929a208482743c388a1",
    "train": "5ea7c87db1fc34d86a78404880becee47ece5295ce1cc3a792b6affdef09081b",
    "wifi-far": "36cbe3bdb8c0e4ed9b5f58a261e0023251e5e587df34d0617ef4a693272d29ae",
}
"With each scenario's own seed and length."


@pytest.mark.parametrize("name", library_names())
def test_a_scenario_of_the_library_is_what_it_was(name: str) -> None:
    assert digest(load_scenario(name)) == DIGESTS[name]


def test_no_digest_is_left_of_a_scenario_that_is_gone() -> None:
    assert set(DIGESTS) == set(library_names())
