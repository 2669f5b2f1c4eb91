"""The lab runs an answer over the TCP model and measures it as it does the others."""

import pytest

from eloquent_netem.lab.answer import TCP_SCHEMES
from eloquent_netem.lab.stalls import Cell, run_cell
from eloquent_netem.link import Link
from eloquent_netem.tcp import TcpError
from eloquent_netem.tcp.connection import TcpConnection
from eloquent_netem.tcp.tokens import send_tokens


@pytest.mark.parametrize("scheme", TCP_SCHEMES)
def test_a_clean_path_delays_nothing(scheme: str) -> None:
    run = run_cell(Cell(rtt_s=0.1, tokens_per_s=30, tokens=100), scheme, 1)
    assert run.measures.stall_ratio == pytest.approx(0, abs=1e-9)
    assert run.downlink_packets == 100
    assert run.downlink_bytes == 100 * (52 + 12)


def test_loss_stalls_it_and_a_seed_repeats() -> None:
    cell = Cell(rtt_s=0.1, tokens_per_s=30, loss=0.05)
    run = run_cell(cell, "tcp", 1)
    assert run.measures.stall_ratio > 0.05
    assert run == run_cell(cell, "tcp", 1)
    assert run.measures != run_cell(cell, "tcp", 2).measures


def test_an_outage_begins_with_the_first_token() -> None:
    cell = Cell(rtt_s=0.1, tokens_per_s=30, outages_s=((0.0, 1.0),))
    assert run_cell(cell, "tcp", 1).measures.delay_max_s > 0.95


def test_what_arrives_is_compared_with_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TcpConnection.read
    monkeypatch.setattr(TcpConnection, "read", lambda self: real(self).replace(b"7", b"8"))
    links = {name: Link(delay_s=0.01, seed=1, name=name) for name in ("up", "down")}
    with pytest.raises(TcpError, match="is not what was sent"):
        send_tokens(**links, tokens=10, interval_s=0.02, token_bytes=12)
