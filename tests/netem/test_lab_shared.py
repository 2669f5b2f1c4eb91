"""Several flows over one link: each gets its own, and the index says how fairly."""

import random

import pytest

from eloquent_netem.cross import CubicFlow
from eloquent_netem.lab.answer import START_S, AnswerRun, LabPath
from eloquent_netem.lab.cases import Job, Results
from eloquent_netem.lab.fairness import (
    ALONE,
    OURS,
    TCP,
    Bottleneck,
    BulkCase,
    CrowdCase,
    fairness_jobs,
    fairness_report,
    jain,
)
from eloquent_netem.lab.shared import Alarms, Flow, SharedLink, TcpTokens, WatchedQueue
from eloquent_netem.lab.sources import ConstantRate
from eloquent_netem.link import Link
from eloquent_netem.packet import Packet
from eloquent_netem.rate import FixedRate
from eloquent_netem.sim import simulate


def slow_link(limit_bytes: int = 100_000) -> Link:
    return Link(
        delay_s=0.05,
        seed=0,
        name="down",
        rate=FixedRate(1e6),
        queue=WatchedQueue(limit_bytes),
    )


def test_each_port_gets_its_own_packets_in_order() -> None:
    shared = SharedLink(slow_link())
    ports = [shared.port(flow) for flow in (0, 1)]
    heard: list[int] = []
    shared.listen(lambda now, packet: heard.append(packet.flow))
    for index in range(6):
        ports[index % 2].send(START_S, Packet(bytes([index]), 1000 + index % 2))
    while (time := shared.next_time()) is not None:
        shared.act(time)
    assert [port.next_time() is not None for port in ports] == [True, True]
    assert [[packet.data[0] for packet in port.poll(9.0)] for port in ports] == [
        [0, 2, 4],
        [1, 3, 5],
    ]
    assert [port.next_time() for port in ports] == [None, None]
    assert shared.delivered_bytes == {0: 3000, 1: 3003}
    assert [port.bytes_sent for port in ports] == [3000, 3003]
    assert heard == [0, 1, 0, 1, 0, 1]


def test_a_queue_says_how_full_it_is() -> None:
    queue = WatchedQueue(4000)
    for _ in range(4):
        queue.enqueue(0.0, Packet(b"", 1500))
    assert queue.share == 0.75
    assert queue.drops == 2


def test_alarms_ring_once_in_order() -> None:
    rung: list[str] = []
    alarms = Alarms([(2.0, lambda: rung.append("b")), (1.0, lambda: rung.append("a"))])
    assert alarms.next_time() == 1.0
    alarms.act(2.0)
    assert rung == ["a", "b"]
    assert alarms.next_time() is None


def test_two_answers_and_a_bulk_flow_share_a_link_and_each_answer_is_whole() -> None:
    shared = SharedLink(slow_link())
    flows, answers = [], []
    for flow in range(2):
        port = shared.port(flow)
        up = Link(delay_s=0.05, seed=0, name=f"up-{flow}")
        path = LabPath(up=up, down=port, base_delay_s=0.05, passes_from=lambda now: now)
        answer = AnswerRun(path, OURS, ConstantRate(30, 60).plan(0))
        start_s = START_S + flow / 7
        flows.append(Flow((answer, *answer.pair.actors), port, start_s, answer.pair.connect))
        answers.append(answer)
    rng = random.Random(0)
    bulk = CubicFlow(9, shared.link.send, 0.1, rng, forward_s=0.05, start_s=START_S + 1)
    shared.listen(bulk.on_delivered)
    simulate(
        (shared, *flows, bulk),
        until=lambda: all(answer.is_done for answer in answers),
        start_s=START_S,
        limit_s=60,
    )
    for answer in answers:
        assert answer.answer().data_packets > 0  # raises if the text is not whole
    assert bulk.delivered_bytes > 100_000


def test_tokens_over_tcp_flow_at_their_rate() -> None:
    shared = SharedLink(slow_link())
    port = shared.port(0)
    up = Link(delay_s=0.05, seed=0, name="up")
    tokens = TcpTokens(up=up, down=port, flow=0, tokens_per_s=30, token_bytes=12)
    flow = Flow((tokens, *tokens.pair.actors), port, START_S, tokens.begin)
    alarms = Alarms([(START_S + 11, lambda: None)])
    simulate((shared, flow, alarms), until=lambda: not alarms.next_time(), start_s=1, limit_s=20)
    assert port.packets_sent == pytest.approx(300 + 30, abs=10)


@pytest.mark.parametrize(
    ("shares", "index"), [([1, 1, 1, 1], 1.0), ([1, 0, 0, 0], 0.25), ([3, 1], 0.8), ([0, 0], 0.0)]
)
def test_jains_index(shares: list[float], index: float) -> None:
    assert jain(shares) == pytest.approx(index)


def test_a_bulk_flow_fills_what_the_tokens_leave() -> None:
    found = BulkCase(1.0).run(TCP, 1)
    assert 0.9 < found["bulk_mbit_per_s"] < 1.0
    assert found["flow_packets_per_s"] == pytest.approx(30, rel=0.1)
    alone = BulkCase(1.0).run(ALONE, 1)
    assert alone["bulk_mbit_per_s"] == 0
    assert alone["queue_drops_per_s"] == 0


def test_the_buffer_is_one_bandwidth_delay_product() -> None:
    queue = Bottleneck(1e6, 0).queue
    assert sum(queue.enqueue(0.0, Packet(b"", 500)) for _ in range(30)) == 25


def test_the_flows_are_judged() -> None:
    results = Results()
    bulk = {OURS: 0.90, TCP: 0.96, ALONE: 0.0}
    for job in fairness_jobs(range(2)):
        if isinstance(job.case, CrowdCase):
            found = dict.fromkeys(("utilisation", "queue_share_p95", "jain"), 0.94)
            rest = (
                "queue_share_mean",
                "queue_share_max",
                "drops_per_s",
                "delay_p50_s",
                "delay_p99_s",
            )
            found |= dict.fromkeys(rest, 0.5) | {"tokens_per_bundle": 2, "flows_without_tokens": 0}
        else:
            found = {
                "bulk_mbit_per_s": bulk[job.scheme],
                "flow_bytes_per_s": 4000,
                "flow_packets_per_s": 34 if job.scheme == OURS else 30,
                "queue_drops_per_s": 1,
            }
        results.figures[Job(job.case, job.scheme, job.seed)] = found
    report = fairness_report(results)
    missed = {finding.what for finding in report.findings if not finding.is_met}
    assert missed == {
        "bulk flow beside ours, over beside TCP's",
        "our packet rate, with over without a bulk flow",
    }
