"""The lab runs an answer over the TCP model and measures it as it does the others."""

import pytest

from eloquent_netem.lab.answer import TCP_SCHEMES, send_answer
from eloquent_netem.lab.cells import Cell, cell_path
from eloquent_netem.lab.measures import measure_stalls
from eloquent_netem.lab.places import synthetic
from eloquent_netem.lab.simulated import SimDriver
from eloquent_netem.lab.sources import ConstantRate
from eloquent_netem.link import Link
from eloquent_netem.tcp import TcpError
from eloquent_netem.tcp.connection import TcpConnection
from eloquent_netem.tcp.tokens import even_tokens, send_tokens


@pytest.mark.parametrize("scheme", TCP_SCHEMES)
def test_a_clean_path_delays_nothing(scheme: str) -> None:
    arrivals = SimDriver().run(synthetic(rtt_ms=100, loss=0), scheme, 1, ConstantRate(30, 100))
    assert [
        rendered - generated
        for generated, rendered in zip(arrivals.generated_s, arrivals.rendered_s, strict=True)
    ] == pytest.approx([0.05] * 100)
    assert arrivals.downlink_packets == 100
    assert arrivals.downlink_bytes == 100 * (52 + 12)


def test_tokens_of_any_size_and_time_arrive() -> None:
    plan = [(0.0, b"a"), (0.0, b"bcd"), (0.5, b"e" * 3000), (0.6, b"f")]
    links = {name: Link(delay_s=0.01, seed=1, name=name) for name in ("up", "down")}
    times = send_tokens(**links, plan=plan)
    first_s = times.generated_s[0]
    assert [time - first_s for time in times.generated_s] == pytest.approx([0, 0, 0.5, 0.6])
    assert [time - first_s for time in times.rendered_s] == pytest.approx([0.01, 0.01, 0.51, 0.61])


def test_loss_stalls_it_and_a_seed_repeats() -> None:
    where = synthetic(rtt_ms=100, loss=0.05)
    first, again, other = (
        SimDriver().run(where, "tcp", seed, ConstantRate(30, 400)) for seed in (1, 1, 2)
    )
    measures = measure_stalls(first.generated_s, first.rendered_s, first.base_delay_s)
    assert measures.stall_ratio > 0.05
    assert first == again
    assert first != other


def test_an_outage_begins_with_the_first_token() -> None:
    cell = Cell(rtt_s=0.1, tokens_per_s=30, outages_s=((0.0, 1.0),))
    answer = send_answer(cell_path(cell, 1), "tcp", cell.plan)
    assert answer.rendered_s[0] - answer.generated_s[0] > 1.0


def test_what_arrives_is_compared_with_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TcpConnection.read
    monkeypatch.setattr(TcpConnection, "read", lambda self: real(self).replace(b"7", b"8"))
    links = {name: Link(delay_s=0.01, seed=1, name=name) for name in ("up", "down")}
    with pytest.raises(TcpError, match="is not what was sent"):
        send_tokens(**links, plan=even_tokens(10, interval_s=0.02, token_bytes=12))
