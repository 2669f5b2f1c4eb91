"""Answers through the TUN router: every scheme, what fails a run, and what is left of it."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import pytest

from eloquent.errors import ConfigurationError
from eloquent_netem.lab.measures import DeliveryError
from eloquent_netem.lab.places import synthetic
from eloquent_netem.lab.rows import Place
from eloquent_netem.lab.sources import ConstantRate, LiveModel, Token
from eloquent_netem.lab.tun_driver import KINDS, RefusedError, TunDriver, check_congestion
from eloquent_netem.lab.tun_links import Packets, cross_traffic, sizes
from eloquent_netem.lab.tun_run import TunRunError
from eloquent_netem.lab.tun_tls import chunk, listening_socket, text_of
from eloquent_netem.scenario import load_scenario, parse_scenario
from tests.netem.test_tun import needs_ip, network

DEADLINE_S = 180.0
"Ends a hang; decides nothing."

TUN = TunDriver(lateness_bound_s=math.inf)
"Figures do not matter here, so a busy machine does not either."

CLEAN = synthetic(rtt_ms=20, loss=0)
SHORT = ConstantRate(tokens_per_s=100, tokens=10)

OF_EACH_KIND = ("eloquent", "tcp-sse", "tcp-websocket")

MARK = "ELOQUENT_TEST_MARK"


@pytest.fixture(scope="module")
def namespaces() -> None:
    """Skip where there can be no namespaces, by saying why; with `CI=true` that fails."""
    with network():
        pass


TestT = TypeVar("TestT", bound=Callable[..., None])


def needs_namespaces(test: TestT) -> TestT:
    marked: TestT = needs_ip(pytest.mark.usefixtures("namespaces")(test))
    return marked


@needs_namespaces
@pytest.mark.parametrize("scheme", KINDS)
def test_an_answer_arrives_whole_and_its_figures_are_possible(scheme: str) -> None:
    found = TUN.run(CLEAN, scheme, 1, SHORT)
    assert len(found.generated_s) == len(found.rendered_s) == 10
    generated_s, rendered_s = found.generated_s, found.rendered_s
    for made, seen in zip(generated_s, rendered_s, strict=True):
        assert seen >= made + CLEAN.base_delay_s
    # It took a handshake and half a round trip to ask, at least.
    assert generated_s[0] >= found.requested_s + 1.5 * CLEAN.rtt_s
    assert generated_s[-1] >= generated_s[0] + 0.09
    assert found.origin_s == found.requested_s
    assert found.base_delay_s == CLEAN.base_delay_s + found.programs_s
    assert 0 < found.programs_s < 0.006
    assert found.downlink_packets >= 1
    assert found.downlink_bytes > 20 * found.downlink_packets + 100
    assert found.uplink_bytes > 0
    assert found.lateness_p50_us is not None
    assert found.lateness_p99_us is not None
    assert found.lateness_p50_us <= found.lateness_p99_us


@needs_namespaces
def test_without_root_it_is_the_same() -> None:
    found = replace(TUN, rootless=True).run(CLEAN, "tcp-sse", 1, SHORT)
    assert len(found.rendered_s) == 10


@needs_namespaces
@pytest.mark.parametrize("scheme", OF_EACH_KIND)
def test_the_scenarios_clock_runs_where_the_answer_begins(scheme: str) -> None:
    scenario = parse_scenario(
        "up = { delay_ms = 10 }\n"
        "[down]\ndelay_ms = 10\n"
        "[[down.outages]]\nkind = 'spans'\nspans_s = [[20.3, 21.3]]\neffect = 'drop'\n"
    )
    place = Place(name="outage", scenario=scenario, begins_s=20.0)
    found = TUN.run(place, scheme, 1, ConstantRate(tokens_per_s=40, tokens=60))
    made_s = [time_s - found.origin_s for time_s in found.generated_s]
    seen_s = [time_s - found.origin_s for time_s in found.rendered_s]
    within = [index for index, time_s in enumerate(made_s) if 20.301 < time_s < 21.299]
    assert within
    assert min(seen_s[index] for index in within) > 21.309
    assert made_s[0] > 20.03  # a handshake, and the way of the request


@dataclass(frozen=True)
class Forgetful:
    """Generates a token that its server does not send: it has no text."""

    name = "forgetful"

    def plan(self, seed: int) -> tuple[Token, ...]:
        return Token(0.0, "one "), Token(0.01, ""), Token(0.02, "three")


@needs_namespaces
@pytest.mark.parametrize("scheme", OF_EACH_KIND)
def test_a_scheme_that_drops_a_token_fails_the_run(scheme: str) -> None:
    with pytest.raises(DeliveryError, match="From token 1 on"):
        TUN.run(CLEAN, scheme, 1, Forgetful())  # type: ignore[arg-type]


@needs_namespaces
@pytest.mark.parametrize("scheme", OF_EACH_KIND)
def test_a_live_model_answers_while_the_run_goes_on(scheme: str) -> None:
    found = TUN.run(CLEAN, scheme, 1, LiveModel(prompt="one two three four", model="echo"))
    assert len(found.generated_s) >= 4


@needs_namespaces
def test_a_live_model_that_does_not_exist_fails_the_run() -> None:
    with pytest.raises(TunRunError, match="server's program in its namespace failed"):
        TUN.run(CLEAN, "eloquent", 1, LiveModel(model="no-such-model"))


@needs_namespaces
@pytest.mark.parametrize("scheme", OF_EACH_KIND)
def test_a_live_model_that_fails_ends_the_run_at_once_and_says_why(scheme: str) -> None:
    with pytest.raises(TunRunError, match=r"server's program .*BadRequestError"):
        TUN.run(CLEAN, scheme, 1, LiveModel(prompt="", model="echo", max_tokens=-1))


@needs_namespaces
def test_a_run_that_was_too_late_is_repeated_and_then_refused() -> None:
    driver = TunDriver(lateness_bound_s=0.0, tries=2)
    with pytest.raises(RefusedError, match=r"Refused 2 times.*0\.00 ms is the bound"):
        driver.run(CLEAN, "retransmit", 1, SHORT)


@needs_namespaces
def test_the_machine_can_be_checked_before_the_work() -> None:
    TUN.check()
    meta = TUN.meta()
    assert meta["scheduling"] in ("SCHED_FIFO", "SCHED_OTHER")
    assert "cubic" in str(meta["tcp"])
    with pytest.raises(ConfigurationError, match="tcp_available_congestion_control"):
        TunDriver(congestion="carrier-pigeon").check()


def test_an_unknown_congestion_control_is_refused_and_reno_is_not() -> None:
    check_congestion("reno")
    with pytest.raises(ConfigurationError, match="'carrier-pigeon'"):
        check_congestion("carrier-pigeon")


def test_accepted_connections_have_the_listeners_congestion_control() -> None:
    with listening_socket("127.0.0.1", "reno", port=0) as listener:
        listener.setblocking(True)
        with socket.create_connection(listener.getsockname()) as client:
            accepted, _ = listener.accept()
            with accepted:
                name = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
                assert name.rstrip(b"\0") == b"reno"
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert client.fileno() >= 0


def test_chunks_are_openais_and_as_large_as_those_of_servers() -> None:
    text = "\u201cTrain\u201d\n"
    data = chunk(text)
    assert text_of(data) == text
    assert json.loads(data)["object"] == "chat.completion.chunk"
    assert 200 <= len(chunk("token ")) <= 260
    assert json.loads(chunk("", is_last=True))["choices"][0]["finish_reason"] == "stop"


def test_cross_traffic_has_been_there_since_the_scenarios_beginning() -> None:
    place = Place(name="busy", scenario=load_scenario("congested-l4s"))
    up, down = place.scenario.links(1, -10.0)
    flows = cross_traffic(place, 1, -10.0, up, down)
    # Nothing else was there, so the bottleneck has carried what it can, or nearly.
    assert down.bytes_sent * 8 > 0.7 * 20e6 * 10
    times = [time for each in (*flows, up, down) if (time := each.next_time()) is not None]
    assert 0 < min(times) < 0.1


def test_what_programs_took_is_told_from_what_the_network_took() -> None:
    # Packets leave 0.4 ms after each token, one at 0.02 only when there was room; one is lost.
    packets = Packets(
        up=[(0.5, 60)],
        down=[(0.0004, 100), (0.0104, 100), (0.0290, 100), (0.0304, 150)],
        down_out_s=[0.0504, 0.0790, 0.0804],
    )
    programs_s = packets.programs_s(
        generated_s=[0.0, 0.01, 0.02, 0.03], rendered_s=[0.0510, 0.0796, 0.0796, 0.0810]
    )
    assert programs_s == pytest.approx(0.0004 + 0.0006)
    assert sizes(packets.down, 0.0104, 0.0290) == [100, 100]
    assert packets.programs_s([1.0], [2.0]) == 0.0


@needs_namespaces
@pytest.mark.parametrize(
    ("number", "tokens"), [(signal.SIGINT, 60), (signal.SIGTERM, 1500), (signal.SIGKILL, 1500)]
)
def test_nothing_is_left_of_a_comparison_that_is_ended(
    number: signal.Signals, tokens: int, tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    arguments = ["lab", "stalls", "--driver", "tun", "--schemes", "eloquent", "tcp-sse"]
    arguments += ["--seeds", "1", "--rtt-ms", "20", "--loss", "0", "--tokens", str(tokens)]
    arguments += ["--workers", "2", "--cache", str(tmp_path / "cache.jsonl")]
    with subprocess.Popen(
        [sys.executable, "-m", "eloquent", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, MARK: mark, "TMPDIR": str(temporary)},
        start_new_session=True,
    ) as comparing:
        try:
            await_processes(mark, least=2, word="tun_ends")
            comparing.send_signal(number)
            comparing.wait(DEADLINE_S)
            await_processes(mark, most=0)
            assert list(temporary.iterdir()) == []
        finally:
            for pid in processes_of(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def await_processes(mark: str, *, least: int = 0, most: float = math.inf, word: str = "") -> None:
    """Wait until so many processes have the mark, and `word` in their command line."""
    deadline_s = time.monotonic() + DEADLINE_S
    while len(found := processes_of(mark, word)) < least or (
        most is not None and len(found) > most
    ):
        assert time.monotonic() < deadline_s, f"{len(found)} processes are there"
        time.sleep(0.05)


def processes_of(mark: str, word: str = "") -> list[int]:
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        # Processes end while we look, and others' are hidden from us.
        with contextlib.suppress(OSError):
            if (
                entry.name.isdecimal()
                and wanted in (entry / "environ").read_bytes().split(b"\0")
                and word.encode() in (entry / "cmdline").read_bytes()
            ):
                found.append(int(entry.name))
    return found
