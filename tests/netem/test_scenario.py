"""Scenario files: what is refused and how it is said, and what the links made of them do."""

import contextlib
import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eloquent_netem import scenario_parts as parts
from eloquent_netem.digest import LOAD_GAP_S, Passage, digest, passages
from eloquent_netem.errors import NetemError
from eloquent_netem.link import Link, stage_rng
from eloquent_netem.loss import PacketClockedLossWarning, handover_spans
from eloquent_netem.packet import Packet
from eloquent_netem.scenario import (
    LIBRARY,
    Scenario,
    library_names,
    load_scenario,
    parse_scenario,
)
from eloquent_netem.scenario_schema import ScenarioError, schema
from eloquent_netem.scenario_words import describe

LOSSY = 'loss = { kind = "bursts", loss = 0.2, burst_ms = 50 }\n'

RATE = '[down]\nrate = { kind = "fixed", mbit_s = 5 }\n'


def down(content: str, head: str = "length_s = 10\n") -> Scenario:
    return parse_scenario(f"{head}[down]\n{content}")


def down_passages(content: str, head: str = "length_s = 10\n", seed: int = 1) -> list[Passage]:
    found = passages(down(content, head), seed)
    return [passage for passage in found if passage.direction == "down"]


def lost(content: str, head: str = "length_s = 10\n", seed: int = 1) -> list[bool]:
    return [not passage.arrived_s for passage in down_passages(content, head, seed)]


# Each error names file, key and reason.


@pytest.mark.parametrize(
    ("content", "key", "reason"),
    [
        ("lenght_s = 3", "lenght_s", "no such key here; did you mean 'length_s'?"),
        ("[down]\ndelay = 3", "down.delay", "did you mean 'delay_ms'?"),
        ("[down]\nzzz = 3", "down.zzz", "there is delay_ms, jitter_ms, reorder"),
        ("up = 3", "up", "must be a table, not 3"),
        ("seed = true", "seed", "must be a whole number, not true"),
        ("seed = -1", "seed", "must be at least 0, not -1"),
        ("seed = 1.5", "seed", "must be a whole number, not 1.5"),
        (f"seed = 1{'0' * 30}", "seed", "must be a number of 64 bits"),
        (f"length_s = 1{'0' * 400}", "length_s", "must be a number of 64 bits"),
        ("length_s = 0", "length_s", "must be at least 0.1, not 0"),
        ("length_s = nan", "length_s", "must be a finite number, not nan"),
        ('length_s = "3"', "length_s", "must be a number, not '3'"),
        ("length_s = 1979-05-27", "length_s", "must be a number, not 1979-05-27"),
        ('description = ""', "description", "must be a text in quotation marks, not ''"),
        ("[down]\nreorder = 1", "down.reorder", "must be true or false, not 1"),
        ("[down]\nduplicate = 2", "down.duplicate", "must be at most 1, not 2"),
        ("[down]\nloss = 0.1", "down.loss", "must be a table, not 0.1"),
        ("[down]\nloss = {}", "down.loss.kind", "is missing; it is one of none, independent"),
        ('[up]\nloss = {kind="burst"}', "up.loss.kind", "no 'burst'; did you mean 'bursts'?"),
        ("[up]\nloss = {kind=3}", "up.loss.kind", "must be a text in quotation marks, not 3"),
        ('[up]\nloss = {kind="independent"}', "up.loss.probability", "this key is missing"),
        (
            '[up]\nloss = {kind="independent", probability=1}',
            "up.loss.probability",
            "must be below 1, not 1",
        ),
        (
            '[up]\nloss = {kind="bursts", loss=0.9, burst_ms=1}',
            "up.loss",
            "make the bursts longer or the loss smaller",
        ),
        (
            '[up]\nloss = {kind="drop-list", indices=[1, -1]}',
            "up.loss.indices[1]",
            "must be at least 0, not -1",
        ),
        ('[up]\nrate = {kind="fixed", mbit_s=0}', "up.rate.mbit_s", "must be at least 0.001"),
        ('[up]\nrate = {kind="trace", file="no.up"}', "up.rate", "no.up"),
        ('[up]\nrate = {kind="steps", steps=[]}', "up.rate.steps", "names no step"),
        ('[up]\nrate = {kind="steps", steps=[[1, 2]]}', "up.rate.steps[0]", "must be from 0 on"),
        ('[up]\nrate = {kind="steps", steps=[[0]]}', "up.rate.steps[0]", "must be [from, value]"),
        (
            '[up]\nrate = {kind="steps", steps=[[0, 1], [0, 2]]}',
            "up.rate.steps[1]",
            "must start after the step in front of it",
        ),
        (
            '[up]\nrate = {kind="steps", steps=[[0, 1], [1, 0]]}',
            "up.rate.steps[1]",
            "must be at least 0.001, not 0",
        ),
        (
            '[up]\nqueue = {kind="codel"}',
            "up.queue",
            "never fills while the rate is unlimited; give up.rate",
        ),
        (
            '[up]\nrate = {kind="fixed", mbit_s=1}\nqueue = {kind="drop-tail"}',
            "up.queue",
            "must have a limit; give packets or bytes",
        ),
        (
            '[up]\nrate = {kind="fixed", mbit_s=1}\nqueue = {kind="dualpi2", scheduler="fifo"}',
            "up.queue.scheduler",
            "there is no 'fifo'; there is wrr, time-shifted",
        ),
        ("outages = 3", "outages", "must be a list, not 3"),
        (
            '[[outages]]\nkind="spans"\nspans_s=[[1, 2], [1.5, 3]]\neffect="drop"',
            "outages[0].spans_s[1]",
            "starts before the span in front of it ends",
        ),
        (
            '[[outages]]\nkind="spans"\nspans_s=[[2, 1]]\neffect="drop"',
            "outages[0].spans_s[0]",
            "must end after it starts",
        ),
        (
            '[[outages]]\nkind="spans"\nspans_s=[[1]]\neffect="drop"',
            "outages[0].spans_s[0]",
            "must be [from, to] in seconds",
        ),
        (
            '[[outages]]\nkind="spans"\nspans_s=[]\neffect="drop"',
            "outages[0].spans_s",
            "names no span",
        ),
        (
            '[[up.outages]]\nkind="spans"\nspans_s=[[1, 61]]\neffect="hold"',
            "up.outages[0].spans_s",
            "ends at 61 s, after the scenario's length_s (60 s)",
        ),
        (
            '[[up.outages]]\nkind="spans"\nspans_s=[[1, 2]]\neffect="wait"',
            "up.outages[0].effect",
            "there is no 'wait'; there is drop, hold",
        ),
        (
            '[[outages]]\nkind="handovers"\nevery_s=1\nlasting_ms=1000\neffect="drop"',
            "outages[0].lasting_ms",
            "must be below every_s (1000 ms), not 1000",
        ),
        ('[[cross]]\nkind="bbr"\ndirection="up"', "cross[0].kind", "there is no 'bbr'"),
        ('[[cross]]\nkind="cubic"', "cross[0].direction", "this key is missing"),
        (
            '[[cross]]\nkind="cubic"\ndirection="sideways"',
            "cross[0].direction",
            "there is no 'sideways'; there is up, down",
        ),
        (
            '[[cross]]\nkind="cubic"\ndirection="up"',
            "cross[0]",
            "would fill an unlimited rate; give up.rate",
        ),
        (
            f'{RATE}[[cross]]\nkind="web"\ndirection="down"\nstart_s=60',
            "cross[0].start_s",
            "length_s",
        ),
        (
            f'{RATE}delay_ms=9\n[[cross]]\nkind="web"\ndirection="down"\nrtt_ms=8',
            "cross[0].rtt_ms",
            "must be at least down.delay_ms (9 ms)",
        ),
        (
            f'{RATE}[[cross]]\nkind="web"\ndirection="down"',
            "cross[0].rtt_ms",
            "is missing, and the path's delays are 0",
        ),
    ],
)
def test_an_error_names_file_key_and_reason(content: str, key: str, reason: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(content, file="my/file.toml")
    text = str(caught.value)
    assert text.startswith(f"my/file.toml: {key}: ")
    assert reason in text
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize(
    "content", ["length_s = ", "length_s = 1\nlength_s = 2", "a = " + "[" * 100_000]
)
def test_what_is_not_toml_is_said_to_be_so(content: str) -> None:
    with pytest.raises(ScenarioError, match=r"^a\.toml: is not TOML: "):
        parse_scenario(content, file="a.toml")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    for path, reason in (
        (tmp_path / "none.toml", "No such file"),
        (folder, "Is a directory"),
        (binary, "not UTF-8"),
    ):
        with pytest.raises(ScenarioError, match=reason) as caught:
            load_scenario(str(path))
        assert str(path) in str(caught.value)


def test_an_unknown_name_suggests_what_may_be_meant() -> None:
    with pytest.raises(ScenarioError, match=r"no scenario 'trian'; did you mean 'train'\?"):
        load_scenario("trian")
    with pytest.raises(ScenarioError, match=r"`eloquent netem list` names them all"):
        load_scenario("zzzzzz")


def test_a_missing_or_broken_trace_is_an_error_of_its_key(tmp_path: Path) -> None:
    (tmp_path / "bad.down").write_text("1\nnonsense\n")
    for name in ("none.down", "bad.down"):
        file = tmp_path / "scenario.toml"
        file.write_text(f'[down]\nrate = {{ kind = "trace", file = "{name}" }}\n')
        with pytest.raises(ScenarioError) as caught:
            load_scenario(file)
        assert str(caught.value).startswith(f"{file}: down.rate: ")
        assert name in str(caught.value)


NO_CLOCK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"How fast the machine is decides no test."

scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["bursts", "drop", "hold", "up", "fixed", "codel", "spans", "cubic"]),
)
names = st.sampled_from(
    [
        "kind",
        "up",
        "down",
        "loss",
        "rate",
        "queue",
        "outages",
        "cross",
        "length_s",
        "delay_ms",
        "spans_s",
        "effect",
        "mbit_s",
        "x",
    ]
)
tables = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=5),
    max_leaves=20,
)


@NO_CLOCK
@given(st.dictionaries(names, tables, max_size=6))
def test_no_table_makes_any_other_error(table: dict[str, object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tomllib.loads", lambda _content: table)
        with contextlib.suppress(ScenarioError):
            parse_scenario("")


@NO_CLOCK
@given(st.text(max_size=60))
def test_no_text_makes_any_other_error(content: str) -> None:
    with contextlib.suppress(ScenarioError):
        parse_scenario(content)


# What the links do.


def test_the_digest_depends_on_the_seed_and_on_nothing_else() -> None:
    scenario = down(LOSSY + "jitter_ms = 3\n")
    assert digest(scenario, 1) == digest(scenario, 1)
    assert len({digest(scenario, seed) for seed in range(5)}) == 5


def test_the_scenario_s_own_seed_is_used_unless_another_is_given() -> None:
    first, second = (down(LOSSY, f"length_s = 10\nseed = {seed}\n") for seed in (3, 4))
    assert digest(first) == digest(first, 3) == digest(second, 3)
    assert digest(first) != digest(second)


def test_the_two_directions_lose_different_packets() -> None:
    found = passages(parse_scenario(f"length_s = 10\n[up]\n{LOSSY}[down]\n{LOSSY}"), 1)
    up, other = (
        [not passage.arrived_s for passage in found if passage.direction == direction]
        for direction in ("up", "down")
    )
    assert up != other


@pytest.mark.parametrize(
    "stage",
    [
        "jitter_ms = 20\n",
        "jitter_ms = 20\nreorder = true\n",
        "duplicate = 0.5\n",
        "delay_ms = 80\n",
        'rate = { kind = "fixed", mbit_s = 5 }\n',
        'rate = { kind = "fixed", mbit_s = 5 }\nqueue = { kind = "dualpi2" }\n',
        'rate = { kind = "fixed", mbit_s = 5 }\nqueue = { kind = "codel" }\n',
    ],
)
@pytest.mark.parametrize("loss", [LOSSY, 'loss = { kind = "independent", probability = 0.2 }\n'])
def test_another_stage_changes_no_loss_decision(stage: str, loss: str) -> None:
    plain = lost(loss)
    assert 100 < sum(plain) < 1000
    assert lost(loss + stage) == plain


def test_an_outage_changes_no_loss_decision_outside_it() -> None:
    outage = '[[down.outages]]\nkind = "spans"\nspans_s = [[2, 3]]\neffect = "drop"\n'
    plain, with_outage = lost(LOSSY), lost(LOSSY + outage)
    start, stop = round(2 / LOAD_GAP_S), round(3 / LOAD_GAP_S)
    assert all(with_outage[start:stop])
    assert with_outage[:start] + with_outage[stop:] == plain[:start] + plain[stop:]


def test_another_outage_does_not_move_the_ones_before_it() -> None:
    first = '[[outages]]\nkind = "handovers"\nevery_s = 2\nlasting_ms = 100\neffect = "drop"\n'
    second = first.replace("every_s = 2", "every_s = 3")
    alone, both = lost("", f"length_s = 10\n{first}"), lost("", f"length_s = 10\n{first}{second}")
    assert all(later for earlier, later in zip(alone, both, strict=True) if earlier)
    assert sum(both) > sum(alone)


def test_what_is_held_arrives_after_the_outage_and_what_is_dropped_never() -> None:
    spans = '[[down.outages]]\nkind = "spans"\nspans_s = [[2, 3]]\n'
    held = down_passages(f'delay_ms = 10\n{spans}effect = "hold"\n')
    assert all(passage.arrived_s for passage in held)
    assert {passage.arrived_s[0] for passage in held if 2 <= passage.sent_s < 3} == {3.01}
    dropped = down_passages(f'delay_ms = 10\n{spans}effect = "drop"\n')
    assert [2 <= passage.sent_s < 3 for passage in dropped] == [
        not passage.arrived_s for passage in dropped
    ]


def test_an_outage_of_both_directions_is_at_the_same_instants() -> None:
    head = 'length_s = 30\n[[outages]]\nkind = "handovers"\nevery_s = 2\n'
    found = passages(parse_scenario(f'{head}lasting_ms = 200\neffect = "drop"\n'), 5)
    up, other = (
        [passage.sent_s for passage in found if passage.direction == name and not passage.arrived_s]
        for name in ("up", "down")
    )
    assert up == other
    rng = stage_rng(5, "both", "outages-0")
    spans = handover_spans(every_s=2, lasting_s=0.2, length_s=30, rng=rng)
    assert all(any(start <= time < stop for start, stop in spans) for time in up)


def test_every_key_of_a_direction_reaches_the_link() -> None:
    # 100 bytes at 0.08 Mbit/s take 10 ms: twice the gap, so every other packet finds no room.
    slow = down_passages(
        'delay_ms = 10\nrate = { kind = "fixed", mbit_s = 0.08 }\n'
        'queue = { kind = "drop-tail", packets = 1 }\n'
    )
    assert slow[0].arrived_s == (pytest.approx(0.02),)
    assert sum(not passage.arrived_s for passage in slow) == pytest.approx(1000, abs=2)
    by_bytes = lost(
        'rate = { kind = "fixed", mbit_s = 0.08 }\nqueue = { kind = "drop-tail", bytes = 1599 }\n'
    )
    # It holds 15 packets of 100 bytes beside the one in service.
    assert by_bytes.index(True) == pytest.approx(31, abs=1)
    twice = down_passages("delay_ms = 10\nduplicate = 1\n")
    assert {len(passage.arrived_s) for passage in twice} == {2}
    assert [
        index
        for index, is_lost in enumerate(lost('loss = { kind = "drop-list", indices = [3, 5] }\n'))
        if is_lost
    ] == [3, 5]
    jitter = down_passages("delay_ms = 10\njitter_ms = 40\nreorder = true\n")
    delays = [passage.arrived_s[0] - passage.sent_s for passage in jitter]
    assert min(delays) >= 0.01 - 1e-9
    assert 0.04 < max(delays) < 0.05 + 1e-9
    order = [passage.arrived_s[0] for passage in jitter]
    assert order != sorted(order)


BUSY = (
    "length_s = 6\n{head}[down]\ndelay_ms = 10\n{rate}{queue}"
    '[[cross]]\nkind = "{kind}"\ndirection = "down"\n{cross}'
)
FIXED = 'rate = { kind = "fixed", mbit_s = 2 }\n'


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("cubic", {}, {"cross": "ecn = true\n"}),
        ("cubic", {}, {"cross": "count = 2\n"}),
        ("cubic", {}, {"cross": "rtt_ms = 90\n"}),
        ("cubic", {}, {"cross": "start_s = 1\n"}),
        ("bursts", {"cross": "mbit_s = 9\n"}, {"cross": "mbit_s = 8\n"}),
        ("bursts", {"cross": "mbit_s = 9\n"}, {"cross": "mbit_s = 9\nburst_ms = 50\n"}),
        ("bursts", {"cross": "mbit_s = 9\n"}, {"cross": "mbit_s = 9\npause_ms = 300\n"}),
        ("cubic", {}, {"queue": 'queue = { kind = "dualpi2", packets = 9 }\n'}),
        ("cubic", {}, {"queue": 'queue = { kind = "dualpi2", scheduler = "time-shifted" }\n'}),
        *(
            ("cubic", {"queue": 'queue = { kind = "codel", ecn = false }\n'}, {"queue": queue})
            for queue in (
                'queue = { kind = "codel", packets = 5 }\n',
                'queue = { kind = "codel", target_ms = 50 }\n',
                'queue = { kind = "codel", interval_ms = 20 }\n',
                'queue = { kind = "codel", ecn = true }\n',
            )
        ),
        *(
            ("cubic", {"rate": 'rate = { kind = "cellular", mean_mbit_s = 2 }\n'}, {"rate": rate})
            for rate in (
                'rate = { kind = "cellular", mean_mbit_s = 3 }\n',
                'rate = { kind = "cellular", mean_mbit_s = 2, stall_share = 0.2 }\n',
                'rate = { kind = "cellular", mean_mbit_s = 2, stall_ms = 900 }\n',
            )
        ),
    ],
)
def test_every_key_makes_a_difference(
    kind: str, before: dict[str, str], after: dict[str, str]
) -> None:
    plain = {
        "head": "seed = 2\n",
        "kind": kind,
        "rate": FIXED,
        "queue": 'queue = { kind = "dualpi2" }\n',
        "cross": "",
        **before,
    }
    first, second = (
        digest(parse_scenario(BUSY.format_map(values))) for values in (plain, {**plain, **after})
    )
    assert first != second


def test_a_trace_is_found_beside_the_scenario_file(tmp_path: Path) -> None:
    (tmp_path / "one.down").write_text("100\n")
    file = tmp_path / "scenario.toml"
    file.write_text('length_s = 1\n[down]\nrate = { kind = "trace", file = "one.down" }\n')
    link = load_scenario(file).links()[1]
    link.send(0.0, Packet(b"", 1500))
    assert arrivals(link) == [pytest.approx(0.1)]


def test_loss_and_outages_run_on_the_clock_of_the_run() -> None:
    outage = '[[down.outages]]\nkind = "spans"\nspans_s = [[2, 3]]\neffect = "drop"\n'
    link = down(outage).links(origin_s=100.0)[1]
    for time in (2.5, 101.9, 102.0, 102.9, 103.0):
        link.send(time, Packet(b"", 100))
    assert link.packets_lost == 2


def arrivals(link: Link) -> list[float]:
    times = []
    while (time := link.next_time()) is not None:
        times += [time] * len(link.poll(time))
    return times


CROSS = (
    '[[cross]]\nkind = "cubic"\ndirection = "down"\nstart_s = 2\ncount = 2\n',
    '[[cross]]\nkind = "bursts"\ndirection = "down"\nmbit_s = 50\nstart_s = 2\n',
    '[[cross]]\nkind = "web"\ndirection = "down"\nstart_s = 2\n',
    '[[cross]]\nkind = "prague"\ndirection = "down"\nstart_s = 2\n',
)


@pytest.mark.parametrize("cross", CROSS)
def test_cross_traffic_fills_the_queue_of_its_direction_from_its_start_on(cross: str) -> None:
    scenario = parse_scenario(
        "length_s = 6\n[up]\ndelay_ms = 10\n"
        '[down]\ndelay_ms = 10\nrate = { kind = "fixed", mbit_s = 5 }\n' + cross
    )
    found = passages(scenario, 1)
    alone = 0.01 + 100 * 8 / 5e6
    for passage in found:
        if passage.direction == "up":
            assert passage.arrived_s == (pytest.approx(passage.sent_s + 0.01),)
        elif passage.sent_s < 2:
            assert passage.arrived_s == (pytest.approx(passage.sent_s + alone),)
    late = [p.arrived_s[0] - p.sent_s for p in found if p.direction == "down" and p.arrived_s]
    assert max(late) > alone + 0.02


def test_cross_traffic_is_numbered_and_keeps_its_random_stream() -> None:
    scenario = parse_scenario(f"{RATE}delay_ms = 10\n{CROSS[0]}{CROSS[2]}")
    first, second, web = scenario.cross_flows(*scenario.links(), seed=4)
    assert [flow.flow for flow in (first, second, web)] == [1, 2, 3]
    later = scenario.cross_flows(*scenario.links(), seed=4, origin_s=100.0)
    assert later[0].next_time() == pytest.approx(102.0)


def test_a_flow_heeds_its_own_packets_only() -> None:
    scenario = parse_scenario(f"{RATE}delay_ms = 10\n{CROSS[1]}{CROSS[1]}")
    first, second = scenario.cross_flows(*scenario.links())
    for flow in (first, second):
        flow.act(5.0)
        flow.on_delivered(5.0, Packet(bytes(8), 1500, flow=2))
    assert (first.delivered_bytes, second.delivered_bytes) == (0, 1500)


@pytest.mark.parametrize("cross", CROSS)
def test_cross_traffic_changes_no_loss_by_bursts(cross: str) -> None:
    rate = (
        'rate = { kind = "fixed", mbit_s = 20 }\nqueue = { kind = "drop-tail", packets = 100000 }\n'
    )
    head = "length_s = 6\n"
    plain = parse_scenario(f"{head}[down]\ndelay_ms = 10\n{rate}{LOSSY}")
    busy = parse_scenario(f"{head}[down]\ndelay_ms = 10\n{rate}{LOSSY}{cross}")
    assert [not passage.arrived_s for passage in passages(plain, 2)] == [
        not passage.arrived_s for passage in passages(busy, 2)
    ]


def test_loss_per_packet_comes_with_a_warning() -> None:
    content = 'loss = { kind = "packet-bursts", loss = 0.1, burst_packets = 5 }\n'
    scenario = down(content)  # reading it does not warn, running it does
    assert "down.loss" in scenario.warnings()[0]
    assert not down(LOSSY).warnings()
    with pytest.warns(PacketClockedLossWarning):
        scenario.links()


# The library, and the page about it.

PAGE = Path(__file__).parents[2] / "docs" / "netem.md"


@pytest.mark.parametrize("name", library_names())
def test_a_scenario_of_the_library_is_described_and_says_where_its_figures_are_from(
    name: str,
) -> None:
    scenario = load_scenario(name)
    assert scenario.description
    assert not scenario.warnings()
    assert name in describe(scenario)
    assert (LIBRARY / f"{name}.toml").read_text().startswith("# ")
    assert f"`{name}`" in PAGE.read_text()


@pytest.mark.parametrize("name", library_names())
def test_a_scenario_of_the_library_has_one_digest_for_each_seed(name: str) -> None:
    scenario = dataclasses.replace(load_scenario(name), length_s=8.0)
    first = digest(scenario, 3)
    assert digest(scenario, 3) == first
    # Where nothing is random, the seed cannot matter.
    assert (digest(scenario, 4) != first) == (name not in {"clean", "outage-3s"})


def test_the_library_has_what_the_page_promises() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \|", PAGE.read_text().split("## The library")[1], re.M)
    assert tuple(sorted(listed)) == library_names()


def section(title: str) -> str:
    (found,) = (
        part
        for part in re.split(r"^##+ ", PAGE.read_text(), flags=re.M)
        if part.startswith(title + "\n")
    )
    return found


def test_every_key_and_every_kind_is_documented() -> None:
    for title, form in (
        ("The file as a whole", Scenario),
        ("A direction: `[up]`, `[down]`", parts.DirectionSpec),
    ):
        for key in schema(form):
            assert f"`{key}`" in section(title), key
    for title, kinds in (
        ("`loss`", parts.LOSSES),
        ("`outages`", parts.OUTAGES),
        ("`rate`", parts.RATES),
        ("`queue`", parts.QUEUES),
        ("`cross`", parts.CROSS),
    ):
        rows = re.findall(r"^\| `([\w-]+)` \|(.*)$", section(title), re.M)
        assert [kind for kind, _ in rows] == list(kinds)
        common = section(title).split("| kind |")[0]
        for kind, row in rows:
            for key in schema(kinds[kind]):
                assert f"`{key}`" in row + common, (kind, key)


def test_the_page_s_example_is_a_scenario() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    scenario = parse_scenario(example)
    assert scenario.outages
    assert scenario.cross
    assert "DualPI2" in describe(scenario)


def test_its_errors_are_netem_s() -> None:
    assert issubclass(ScenarioError, NetemError)
