"""Live connections become flows: what the ends and the link know of them agrees, and no more."""

import asyncio
import datetime
import json
import logging
import random
import stat
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eloquent.core.events import TextDelta
from eloquent.core.wire import ARRIVAL_UNIT_S
from eloquent.errors import ConfigurationError
from eloquent.quic.certificate import make_certificate
from eloquent.quic.connect import connect
from eloquent.quic.listen import listen
from eloquent.quic.marking import EachAlone, Marking, MarkingPolicy, SentPacket
from eloquent.session.session import Session
from eloquent.swiftqueue import inference, live
from eloquent.swiftqueue.dataset import Manifest, replay
from eloquent.swiftqueue.live import (
    LATE_PACKETS,
    LEAST_PACKETS,
    PACKETS_A_FLOW,
    FlowFolder,
    RecordedMarking,
)
from eloquent.swiftqueue.queues import queue_of
from eloquent.swiftqueue.records import Flow, Queue
from eloquent.swiftqueue.serving import SwiftQueue
from eloquent.swiftqueue.simple_policies import ProbingMarking, ShareMarking
from eloquent.swiftqueue.training import Options, train
from eloquent.url import ServerUrl
from eloquent_netem.lab.swiftqueue_flow import FlowRun, run_flow
from eloquent_netem.lab.swiftqueue_knowledge import knowledge_of
from eloquent_netem.lab.swiftqueue_measures import tally
from eloquent_netem.lab.swiftqueue_prediction import fit_baseline, ours_forecasts
from eloquent_server.store import TokenStore
from eloquent_server.swiftqueue_records import RecordWriter, marking_with
from eloquent_server.turns import Turn, TurnHub
from tests.eloquent.marking_world import MarkingWorld, Noting, Queues
from tests.eloquent.swiftqueue_flows import made_data
from tests.eloquent.swiftqueue_line import Line
from tests.eloquent.test_swiftqueue_inference import FULL, random_model
from tests.eloquent.test_swiftqueue_training import SMALL
from tests.loopback import DEADLINE_S, HOST
from tests.swiftqueue_light import light, random_weights


class Kept:
    """A `Marking` that keeps its policies, to close them."""

    def __init__(self, marking: Marking) -> None:
        self._marking = marking
        self.policies: list[MarkingPolicy] = []

    def policy(self) -> MarkingPolicy:
        self.policies.append(self._marking.policy())
        return self.policies[-1]

    def settle(self, now: float) -> None:
        self._marking.settle(now)


def mixed() -> MarkingPolicy:
    return ShareMarking(0.3, random.Random(1), wants_times=True)


def recorded(seed: int, offset_s: float = 0.0) -> tuple[Flow, FlowRun]:
    """An answer over the light bottleneck: as its server records it, and as the lab does."""
    flows: list[Flow] = []
    marking = Kept(RecordedMarking(EachAlone(mixed), flows.append))
    run = run_flow(light(), marking, seed=seed, tokens_per_s=60.0, offset_s=offset_s)
    marking.policies[0].close()
    marking.policies[0].close()
    assert len(flows) == 1
    return flows[0], run


def lined(flows: list[Flow], policy: MarkingPolicy | None = None, **options: Any) -> Line:
    marking = RecordedMarking(EachAlone(lambda: policy or mixed()), flows.append)
    return Line(marking.policy(), **options)


@pytest.mark.parametrize("offset_s", [0.0, -7.5, 40_000.0])
def test_a_live_record_is_the_labs_but_for_what_only_an_emulator_knows(offset_s: float) -> None:
    flow, run = recorded(1, offset_s)
    truth = run.flow
    count = len(flow.sent_s)
    assert count > 300
    # The first of the lab's asked for no time: the path was not yet seen to carry marks.
    begin_s = truth.sent_s[-count]
    assert flow.sent_s == pytest.approx(truth.sent_s[-count:] - begin_s, abs=1e-9)
    assert (flow.size == truth.size[-count:]).all()
    assert (flow.queue == truth.queue[-count:]).all()
    assert set(flow.queue.tolist()) == {Queue.L, Queue.C}
    rows, own = np.arange(count), flow.queue
    found_s, wants_s = flow.delay_s[rows, own], truth.delay_s[-count:][rows, own]
    known = np.isfinite(found_s)
    assert known.mean() > 0.9
    difference_s = (wants_s - found_s)[known]
    tolerance_s = ARRIVAL_UNIT_S if abs(offset_s) < 100 else 0.01  # float32 holds no more there.
    assert np.ptp(difference_s) < 1.5 * tolerance_s
    assert flow.known_s[known] == pytest.approx(truth.known_s[-count:][known] - begin_s, abs=1e-9)
    assert np.nanmin(flow.delay_s) == 0
    assert np.isnan(flow.state_s).all()
    assert np.isnan(flow.delay_s[rows, 1 - own]).all()
    assert (flow.lost[rows, 1 - own] == -1).all()


def test_a_lost_packet_is_lost_and_one_without_news_is_unknown() -> None:
    flows: list[Flow] = []

    def waits(now: float, queue: Queue) -> float | None:
        return None if 1 < now < 1.5 else 0.001

    def tells(now: float, packet: SentPacket, arrived_s: float) -> float | None:
        return None if 2 < packet.sent_s < 2.5 else arrived_s

    line = lined(flows, waits=waits, tells=tells)
    line.run(4.0)
    line.policy.close()
    (flow,) = flows
    rows = np.arange(len(flow.sent_s))
    lost = flow.lost[rows, flow.queue]
    is_lost, is_silent = (
        (low < flow.sent_s) & (flow.sent_s < high) for low, high in ((1, 1.5), (2, 2.5))
    )
    assert (lost[is_lost] == 1).all()
    assert np.isfinite(flow.known_s[is_lost]).all()
    assert (lost[is_silent] == -1).all()
    assert np.isinf(flow.known_s[is_silent]).all()
    assert np.isnan(flow.delay_s[is_lost | is_silent]).all()
    early = ~is_lost & ~is_silent & (flow.sent_s < 3.5)
    assert (lost[early] == 0).all()


def test_what_was_taken_for_lost_and_arrives_has_arrived() -> None:
    flows: list[Flow] = []
    policy = RecordedMarking(EachAlone(mixed), flows.append).policy()
    for number in range(LEAST_PACKETS):
        now = number * 0.02
        ecn = policy.next_codepoint(now, 300, is_copy=False)
        packet = SentPacket(number, now, 300, ecn, is_timed=True)
        policy.on_sent(packet)
        policy.on_lost(now + 0.01, packet)
        policy.on_arrival(now + 0.05, packet, now + 0.03)
        policy.on_arrival(now + 0.06, packet, now + 0.04)
    policy.close()
    (flow,) = flows
    assert (flow.lost[np.arange(LEAST_PACKETS), flow.queue] == 0).all()
    assert flow.known_s == pytest.approx(flow.sent_s + 0.05)


def test_bare_acknowledgements_and_short_connections_are_not_recorded() -> None:
    flows: list[Flow] = []
    line = lined(flows)
    line.run(0.033 * (LEAST_PACKETS - 1))
    untimed = SentPacket(9999, line.now, 40, line.policy.next_codepoint(9.0, 40, is_copy=False))
    line.policy.on_sent(untimed)
    line.policy.on_acked(line.now, untimed)
    line.policy.close()
    assert flows == []


def test_a_long_connection_is_several_flows_and_each_knows_its_last_packets() -> None:
    flows: list[Flow] = []
    line = lined(flows, gap_s=0.01)
    line.run(0.01 * (PACKETS_A_FLOW + LATE_PACKETS - 1) - 0.005)
    assert flows == []
    line.run(0.01 * (2 * PACKETS_A_FLOW + 100) - 0.005)
    line.policy.close()
    assert [len(flow.sent_s) for flow in flows] == [PACKETS_A_FLOW, PACKETS_A_FLOW + 100]
    assert np.isfinite(flows[0].known_s).all()
    assert flows[1].sent_s[0] == 0
    assert np.isfinite(flows[1].known_s).mean() > 0.99


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0, float("inf")])
def test_a_peer_whose_clock_cannot_be_believed_is_not_recorded(ahead_s: float) -> None:
    flows: list[Flow] = []

    def tells(now: float, packet: SentPacket, arrived_s: float) -> float:
        return arrived_s + (ahead_s if now > 3 else 0.0)

    line = lined(flows, tells=tells)
    line.run(8.0)
    line.policy.close()
    assert flows == []


def test_the_policy_is_asked_and_told_as_without_a_record() -> None:
    """Two worlds, one with a record: nothing on the wire differs, nor what the policy hears."""
    noted = [Noting(wants_copy=lambda count: count % 7 == 0) for _ in range(2)]
    flows: list[Flow] = []
    shells = [noted[0], RecordedMarking(EachAlone(lambda: noted[1]), flows.append).policy()]
    worlds = [MarkingWorld(shell, down=Queues()) for shell in shells]
    for world in worlds:
        world.talk(100)
        world.close()
    for name in ("sent", "acked", "arrivals", "lost", "is_copy", "asked_copies"):
        assert getattr(noted[0], name) == getattr(noted[1], name), name
    for shell in shells:
        shell.close()
    assert noted[1].closed == noted[0].closed
    (flow,) = flows
    timed = [packet for packet in noted[1].sent if packet.is_timed]
    assert flow.size.tolist() == [packet.size for packet in timed]
    assert flow.queue.tolist() == [queue_of(packet) for packet in timed]


# The folder.


def some_flow(seed: int = 1) -> Flow:
    return recorded(seed)[0]


def test_what_is_written_is_private_and_says_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "live"
    flow = some_flow()
    FlowFolder(folder, "test").add(flow)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = sorted(folder.iterdir())
    assert len(files) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    (row,) = json.loads((folder / "manifest.json").read_text())["flows"]
    assert set(row) == {
        *("file", "family", "split", "digest", "packets", "c_share", "reported_share"),
    }
    with np.load(folder / row["file"]) as columns:
        assert set(columns.files) == {one.name for one in fields(Flow)}
    (entry,) = Manifest.load(folder).of("test")
    for one in fields(Flow):
        found, wants = getattr(entry.load(), one.name), getattr(flow, one.name)
        np.testing.assert_array_equal(found, wants)
        assert found.dtype == wants.dtype


def test_the_same_flow_is_written_once(tmp_path: Path) -> None:
    folder, flow = FlowFolder(tmp_path, "test"), some_flow()
    folder.add(flow)
    folder.add(flow)
    assert len(Manifest.load(tmp_path).entries) == 1


def test_a_folder_is_full_some_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MAX_FLOWS", 2)
    flows = [some_flow(seed) for seed in (1, 2, 3)]
    folder = FlowFolder(tmp_path, "test")
    for flow in flows:
        folder.add(flow)
    assert len(Manifest.load(tmp_path).entries) == 2
    again = FlowFolder(tmp_path, "test")
    assert again.is_full


def test_live_flows_of_one_folder_are_for_one_thing(tmp_path: Path) -> None:
    FlowFolder(tmp_path, "test").add(some_flow())
    with pytest.raises(ConfigurationError, match="are for test: those for train need a folder"):
        FlowFolder(tmp_path, "train")
    with pytest.raises(ConfigurationError, match="There is no split 'all'"):
        FlowFolder(tmp_path, "all")


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="Records cannot be written"):
        FlowFolder(tmp_path / "file" / "live", "test")


# Their readers.


def test_training_takes_live_flows_in_beside_collected_ones(tmp_path: Path) -> None:
    data = made_data(tmp_path, {"train": 1, "validation": 1})
    FlowFolder(data, "train").add(some_flow())
    families = {entry.family: entry.split for entry in Manifest.load(data).entries}
    assert families["live"] == "train"
    report = train(
        Options(
            data=data,
            out=data / "out" / "weights.safetensors",
            cache=data / "cache",
            steps=4,
            batch=4,
            variants=1,
            evaluate_every=2,
            shape=SMALL,
        )
    )
    assert report.flows == {"train": 2, "validation": 1}
    assert np.isfinite([row["train_loss"] for row in report.curves]).all()
    assert np.isfinite(report.validation["loss"])


def test_the_evaluation_judges_live_flows_by_their_own_queue(tmp_path: Path) -> None:
    FlowFolder(tmp_path, "test").add(some_flow())
    flow = Manifest.load(tmp_path).entries[0].load()
    known = knowledge_of(flow)
    model = random_model(FULL, np.random.default_rng(1))
    ours, _ = ours_forecasts(model, [known])
    last = fit_baseline("last-value", [known], [known], seed=1)
    for forecasts in (ours[0], last.predict(known)):
        found = tally(known, forecasts)
        total_ms, packets = found["mae_ms"]
        assert packets > 300
        assert np.isfinite(total_ms)
        assert found["other_mae_ms"][1] == 0
    assert np.isfinite(replay(flow).events).all()


# The server.


async def test_over_loopback_an_answers_packets_are_in_the_folder_when_the_server_is_closed(
    tmp_path: Path,
) -> None:
    certificate = make_certificate(HOST, datetime.datetime.now(datetime.UTC))
    writer = RecordWriter(FlowFolder(tmp_path / "live", "test"))
    marking = RecordedMarking(EachAlone(ProbingMarking), writer.write)
    words = [f"{index} " for index in range(150)]

    async def handle(turn: Turn) -> None:
        for word in words:
            turn.append(TextDelta(word))
            await asyncio.sleep(0.002)
        turn.close("stop", model="told", prompt_tokens=1, completion_tokens=len(words))

    hub = TurnHub(handle, TokenStore.open(None))
    listener = await listen(HOST, 0, certificate=certificate, service=hub, marking=marking)
    session = Session(ServerUrl(HOST, listener.port, certificate.pin), connector=connect)
    try:
        async with asyncio.timeout(DEADLINE_S):
            events = [event async for event in session.ask(b"{}")]
    finally:
        await session.close()
        await hub.close()
        await listener.close()
        await writer.close()
    assert "".join(getattr(event, "text", "") for event in events) == "".join(words)
    (entry,) = Manifest.load(tmp_path / "live").of("test")
    flow = entry.load()
    assert len(flow.sent_s) >= LEAST_PACKETS
    assert np.isfinite(flow.known_s).sum() >= LEAST_PACKETS
    assert np.nanmax(flow.delay_s) < DEADLINE_S


async def test_a_broken_disk_is_said_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = FlowFolder(tmp_path / "live", "test")
    (tmp_path / "live").rmdir()
    writer = RecordWriter(folder)
    flow = some_flow()
    with caplog.at_level(logging.WARNING):
        writer.write(flow)
        writer.write(flow)
        await writer.close()
    assert len(caplog.records) == 1
    assert "not complete" in caplog.text


@pytest.mark.parametrize("options", [{"has_tuning": True}, {"records": Path("live")}])
def test_options_that_need_swiftqueue_are_refused_without(options: dict[str, Any]) -> None:
    plain = partial(marking_with, "l4s", split="test")
    with pytest.raises(ConfigurationError, match="go with --ecn swiftqueue"):
        plain(**({"has_tuning": False, "records": None} | options))
    marks, writer = plain(has_tuning=False, records=None)
    assert marks is not None
    assert writer is None


async def test_options_of_serve_reach_the_policies_and_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "SHIPPED", random_weights(tmp_path))
    records = tmp_path / "live"
    marks, writer = marking_with("swiftqueue", has_tuning=True, records=records, split="train")
    assert marks is not None
    assert writer is not None
    line = Line(marks.policy())
    for step in range(1, 60):
        line.run(step * 0.05)
        marks.settle(line.now)
    line.policy.close()
    await writer.close()
    (entry,) = Manifest.load(records).of("train")
    assert entry.about["packets"] == len(line.left)
    plain, nobody = marking_with("swiftqueue", has_tuning=False, records=None, split="test")
    assert nobody is None
    assert isinstance(plain, SwiftQueue)
    assert plain._forecaster.open().tuning is None
    tuned, _ = marking_with("swiftqueue", has_tuning=True, records=None, split="test")
    assert isinstance(tuned, SwiftQueue)
    assert tuned._forecaster.open().tuning is not None
