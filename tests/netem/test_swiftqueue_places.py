"""The networks that SwiftQueue learns from and is judged on: what is drawn, split and fixed."""

import hashlib
from itertools import pairwise
from pathlib import Path

import pytest

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.swiftqueue_places import (
    BESIDE,
    CONGESTED,
    CONGESTED_RECORDINGS,
    CROWDED,
    FAMILIES,
    OTHER_RECORDINGS,
    OTHERS,
    RATE_MBIT_S,
    RTT_MS,
    TEST,
    TRAIN,
    VALIDATION,
    congested_places,
    family_place,
    named_place,
    other_places,
    recorded_place,
    traced_place,
)
from eloquent_netem.scenario import LIBRARY
from eloquent_netem.scenario_parts import (
    BurstsSpec,
    DualPi2Spec,
    FixedRateSpec,
    SteppedRateSpec,
    TraceRateSpec,
)

LISTED = (*CONGESTED, *OTHERS, CROWDED)

SEEDS = range(12)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_seed_of_a_family_is_another_network_and_always_the_same(family: str) -> None:
    places = [family_place(family, seed) for seed in SEEDS]
    assert len({repr(place.scenario.down) + repr(place.scenario.cross) for place in places}) == len(
        SEEDS
    )
    assert places == [family_place(family, seed) for seed in SEEDS]
    assert [place.scenario.seed for place in places] == list(SEEDS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_family_s_networks_are_within_its_bounds(family: str, seed: int) -> None:
    check(family_place(family, seed))


@pytest.mark.parametrize("place", LISTED, ids=lambda place: place.name)
def test_the_lists_networks_are_within_the_bounds(place: Place) -> None:
    check(place)


def check(place: Place) -> None:
    scenario = place.scenario
    scenario.check(scenario.place)
    up, down = scenario.links(1)
    scenario.cross_flows(up, down, 1)
    assert isinstance(scenario.down.queue, DualPi2Spec)
    assert scenario.up.rate == FixedRateSpec(mbit_s=20)
    assert RTT_MS[0] <= 1000 * place.rtt_s <= RTT_MS[1]
    rate = scenario.down.rate
    if isinstance(rate, FixedRateSpec):
        assert RATE_MBIT_S[0] <= rate.mbit_s <= RATE_MBIT_S[1]
    elif isinstance(rate, SteppedRateSpec):
        times = [from_s for from_s, _ in rate.steps]
        assert times[0] == 0
        assert all(earlier < later for earlier, later in pairwise(times))
        assert 70 < times[-1] < 100
        assert min(mbit_s for _, mbit_s in rate.steps) >= 0.4
        assert max(mbit_s for _, mbit_s in rate.steps) <= RATE_MBIT_S[1]


def test_bursts_are_more_than_the_link_carries() -> None:
    for family in ("bursts", "cubic-bursts", "bursts-web", "bursts-prague"):
        for seed in SEEDS:
            scenario = family_place(family, seed).scenario
            [bursts] = [spec for spec in scenario.cross if isinstance(spec, BurstsSpec)]
            assert isinstance(scenario.down.rate, FixedRateSpec)
            assert 1.19 <= bursts.mbit_s / scenario.down.rate.mbit_s <= 4.01
            assert 50 <= bursts.burst_ms <= 300
            assert 500 <= bursts.pause_ms <= 3000


def test_drops_leave_a_tenth_to_a_half_for_0_2_to_3_s() -> None:
    for seed in SEEDS:
        rate = family_place("prague-drops", seed).scenario.down.rate
        assert isinstance(rate, SteppedRateSpec)
        best = rate.steps[0][1]
        assert all(mbit_s == best for _, mbit_s in rate.steps[::2])
        for (from_s, mbit_s), (to_s, _) in zip(rate.steps[1::2], rate.steps[2::2], strict=False):
            assert 0.099 <= mbit_s / best <= 0.501
            assert 0.199 <= to_s - from_s <= 3.001


def test_the_split_is_by_family() -> None:
    assert {
        name: [one.name for one in FAMILIES.values() if one.split == name] for name in SPLIT
    } == (SPLIT)
    assert sum(map(len, SPLIT.values())) == len(FAMILIES)


SPLIT = {
    TRAIN: [
        "bursts",
        "prague-drops",
        "prague-web",
        "cubic",
        "cubic-bursts",
        "web",
        "cellular",
        "idle",
    ],
    VALIDATION: ["mixed", "bursts-web"],
    TEST: ["bursts-prague", "wifi", "flash"],
}
"Fixed before training: whoever changes it has to train anew, and to say so."


def test_the_lists_are_what_they_were_before_training() -> None:
    told = "\n".join(map(repr, (*LISTED, CONGESTED_RECORDINGS, OTHER_RECORDINGS, BESIDE)))
    digest = hashlib.sha256(told.encode()).hexdigest()
    assert digest == "2001ca7ce734a387cc3294e4456bc70766a164918abf6e2202dc49680f937b32"


def test_names_of_places_are_unlike() -> None:
    names = [place.name for place in LISTED]
    assert len({name.split()[0] for name in names}) == len(names)


def test_a_place_is_found_by_its_name() -> None:
    for place in LISTED:
        assert named_place(place.name) is place
        assert named_place(place.name.split()[0]) is place
    assert named_place("prague-drops-7") == family_place("prague-drops", 7)
    assert named_place("congested-l4s").name == "congested-l4s"
    assert named_place(str(LIBRARY / "train.toml")).name == "train"
    for name in ("wifi-x", "nothing", "wifi"):
        with pytest.raises(ConfigurationError, match="FAMILY-SEED of bursts,"):
            named_place(name)


def test_a_recording_has_cross_traffic_and_its_own_uplink_if_there_is_one(tmp_path: Path) -> None:
    for name in ("some.down", "some.up"):
        (tmp_path / name).write_text("1\n3\n")
    for beside, kinds in BESIDE.items():
        place = traced_place(tmp_path / "some.down", tmp_path / "some.up", beside)
        assert place.name == f"some, {beside}"
        assert place.scenario.up.rate == TraceRateSpec(file=str(tmp_path / "some.up"))
        assert place.scenario.cross == kinds
        assert recorded_place(tmp_path, "some", beside) == place
        place.scenario.check(place.scenario.place)
        place.scenario.links(1)
    assert traced_place(tmp_path / "some.down").scenario.up.rate == FixedRateSpec(mbit_s=20)


def test_the_lists_have_recordings_where_there_is_a_folder(tmp_path: Path) -> None:
    for places, fixed, recordings in (
        (congested_places, CONGESTED, CONGESTED_RECORDINGS),
        (other_places, OTHERS, OTHER_RECORDINGS),
    ):
        assert places(None) == fixed
        found = places(tmp_path)
        assert found[: len(fixed)] == fixed
        assert [place.name for place in found[len(fixed) :]] == [
            f"{name}, {beside}" for name, beside in recordings
        ]
