"""The leak's tool: text, classifiers, and what padding does to them."""

import json
import math
import random
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eloquent.core.padding import SIZES
from eloquent.errors import ConfigurationError
from eloquent_netem.lab.leak_commands import leak as leak_command
from eloquent_netem.lab.leak_run import Listening, Sighting, overhear
from eloquent_netem.lab.leak_text import Tokenizer, load_topics, make_answer
from eloquent_netem.packet import IP_UDP_HEADER_BYTES

np = pytest.importorskip("numpy")
leak = pytest.importorskip("eloquent_netem.lab.leak")
attack = pytest.importorskip("eloquent_netem.lab.leak_attack")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(load_topics().values(), random.Random(0))


def test_tokens_join_to_the_text_and_are_as_long_as_a_models(tokenizer: Tokenizer) -> None:
    """Means of SmolLM2's vocabulary on this text: 2.3 (finance) to 5.3 (law) characters."""
    means = {}
    for name, topic in load_topics().items():
        answer = make_answer(topic, tokenizer, 2000, random.Random(1))
        assert len(answer) == 2000
        assert "<" not in "".join(answer), "a slot was not filled"
        means[name] = fmean(map(len, answer))
    rounded = {name: round(mean) for name, mean in means.items()}
    assert list(rounded) == ["medicine", "law", "cooking", "programming", "travel", "finance"]
    assert list(rounded.values()) == [5, 5, 4, 4, 4, 2]


@settings(deadline=None)
@given(st.text("abc XYZ0129.,:\n", max_size=60))
def test_any_text_is_cut_without_loss(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(tokenizer.tokens(text)) == text


SCORES = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12).filter(
    lambda rows: 0 < sum(positive for _, positive in rows) < len(rows)
)


@settings(deadline=None)
@given(SCORES)
def test_auroc_is_the_share_of_pairs_put_right(rows: list[tuple[int, bool]]) -> None:
    pairs = [
        (high > low) + 0.5 * (high == low)
        for high, is_positive in rows
        if is_positive
        for low, is_other in rows
        if not is_other
    ]
    scores, positive = np.array([s for s, _ in rows], float), np.array([p for _, p in rows])
    assert math.isclose(attack.auroc(scores, positive), fmean(pairs), abs_tol=1e-12)


def test_auprc_of_known_orders() -> None:
    positive = np.array([True, True, False, False])
    assert attack.auprc(np.array([4.0, 3.0, 2.0, 1.0]), positive) == 1.0
    assert attack.auprc(np.array([1.0, 2.0, 3.0, 4.0]), positive) == fmean([1 / 3, 2 / 4])
    assert attack.auprc(np.zeros(4), positive) == fmean([1 / 3, 2 / 4]), "ties must not help"


def sighting(sizes: list[int]) -> Sighting:
    return Sighting(tuple(index / 30 for index in range(len(sizes))), tuple(sizes))


@pytest.mark.parametrize("name", list(attack.ATTACKS))
def test_an_attack_finds_what_differs_and_nothing_where_nothing_does(name: str) -> None:
    rng = random.Random(0)
    labels = [0, 1, 2] * 30
    told = [sighting([80 + label * 8 + rng.randint(-8, 8) for _ in range(60)]) for label in labels]
    alike = [sighting([80 + rng.randint(-8, 8) for _ in range(60)]) for _ in labels]
    verdicts = {
        kind: next(v for v in attack.judge(seen, labels, seed=0) if v.attack == name)
        for kind, seen in (("told", told), ("alike", alike))
    }
    assert verdicts["told"].auroc > 0.95
    assert verdicts["told"].accuracy > 0.8
    assert abs(verdicts["alike"].auroc - 0.5) < 0.15
    assert verdicts["alike"].auroc_low <= verdicts["alike"].auroc <= verdicts["alike"].auroc_high


def test_an_attack_hears_the_order_of_sizes() -> None:
    """The same sizes in another order: histograms alone cannot tell them apart."""
    rng = random.Random(0)
    labels = [0, 1] * 20
    orders = ([100, 100, 140, 140] * 15, [100, 140] * 30)
    seen = [sighting([size + rng.randint(0, 2) for size in orders[label]]) for label in labels]
    assert max(v.auroc for v in attack.judge(seen, labels, seed=0)) > 0.95


def test_too_few_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="5 answers"):
        attack.judge([sighting([80])] * 8, [0, 1] * 4, seed=0)


def overheard(texts: list[str], *, padding: bool) -> Sighting:
    listening = Listening(rtt_s=0.05, loss=0.0, tokens_per_s=30, padding=padding)
    return overhear(texts, listening, 0)


def test_bare_packets_tell_the_lengths_of_tokens_and_padded_ones_do_not() -> None:
    short, long = ["a"] * 60, ["a" * 7] * 60
    assert overheard(short, padding=False).sizes != overheard(long, padding=False).sizes
    padded = [overheard(texts, padding=True) for texts in (short, long)]
    assert padded[0].times_s == padded[1].times_s
    # In the last packet the stream's confirmation has the log's length, as one byte or as two.
    assert padded[0].sizes[:-1] == padded[1].sizes[:-1]
    with_tokens = [size for size in padded[0].sizes if size > SIZES[0]]
    assert with_tokens.count(SIZES[0] + IP_UDP_HEADER_BYTES) >= 58


def test_padding_takes_the_topic_away(tokenizer: Tokenizer) -> None:
    """On a few answers: enough to see that bare packets tell, and that padded ones do not."""
    leaks = leak.measure([0.05], loss=0.0, tokens_per_s=30, answers=5, workers=2)
    bare, padded = leaks
    assert not bare.listening.padding
    assert bare.best.auroc > 0.8
    assert padded.best.auroc < 0.7
    assert padded.length_auroc > 0.9, "the number of packets stays"
    assert padded.sizes < bare.sizes / 3
    table = leak.render(leaks)
    assert "30 answers of 6 topics" in table
    assert f"{padded.best.auroc:.3f}" in table
    rows = json.loads(json.dumps(leak.to_json(leaks, ["lab", "leak"])))["rows"]
    assert [row["listening"]["padding"] for row in rows] == [False, True]


@pytest.mark.parametrize(
    "options", [{"seeds": 4}, {"loss": 1.0}, {"rate": 0.0}, {"rtt_ms": ()}, {"rtt_ms": (-1.0,)}]
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        leak_command(**options)  # type: ignore[arg-type]


def test_a_file_that_cannot_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no-such-folder"):
        leak_command(json=tmp_path / "no-such-folder" / "leak.json")


def test_padding_leaves_full_packets_as_they_are() -> None:
    """A long text comes in full packets: its last one is padded, and none becomes too large."""
    texts = ["x" * 5000, "y" * 300, "z"]
    bare, padded = (overheard(texts, padding=padding) for padding in (False, True))
    assert max(bare.sizes) == max(padded.sizes) == 1200 + IP_UDP_HEADER_BYTES
    assert len(padded.sizes) <= len(bare.sizes) + 3
    assert sum(padded.sizes) > sum(bare.sizes)
