"""ECN through the real endpoints: on loopback, and in virtual time through DualPI2."""

import asyncio
import datetime
import random
from collections.abc import Sequence

import pytest

from eloquent.core.events import End, Event, TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.receiver import Receiver
from eloquent.core.wire import Request
from eloquent.errors import EloquentError
from eloquent.link import Link
from eloquent.quic.certificate import make_certificate
from eloquent.quic.connect import connect
from eloquent.quic.ecn import Ecn, EcnState
from eloquent.quic.listen import Listener, listen
from eloquent.quic.marking import EachAlone, Marking, all_l
from eloquent.serving import Reader
from eloquent.url import ServerUrl
from eloquent_netem.dualpi2 import DualPi2
from eloquent_netem.link import Link as NetemLink
from eloquent_netem.packet import Packet
from eloquent_netem.rate import FixedRate
from eloquent_netem.vloop import VirtualNetwork, run
from tests.eloquent.marking_world import Noting, Settling

DEADLINE_S = 30.0
"Ends a hang; decides nothing."

TOKENS = 40
# Old enough for the virtual clock's readers, and accepted by its pin alone.
CERTIFICATE = make_certificate("server", datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))


class Service:
    """Answers every request with tokens, one every `gap_s`."""

    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self._tasks: set[asyncio.Task[None]] = set()

    def on_request(self, reader: Reader) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(reader))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def on_cancel(self, reader: Reader) -> None:
        raise AssertionError("nobody cancels here")

    def on_gone(self, reader: Reader) -> None:
        pass

    async def _answer(self, reader: Reader) -> None:
        log = TokenLog()
        reader.accept(log)
        for index in range(TOKENS):
            log.append(TextDelta(f"{index} "))
            reader.log_grew()
            await asyncio.sleep(self._gap_s)
        log.close("stop", model="m", prompt_tokens=1, completion_tokens=TOKENS)
        reader.log_grew()


class User:
    """Collects what comes over a link."""

    def __init__(self) -> None:
        self.text = ""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_progress(self, link: Link, turn: int, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, TextDelta):
                self.text += event.text
            elif isinstance(event, End):
                self.ended.set_result(None)

    def on_early(self, link: "Link") -> None:
        raise AssertionError("nothing is sent early here")

    def on_turn_failed(self, link: Link, turn: int, error: EloquentError) -> None:
        self.ended.set_exception(error)

    def on_link_ended(self, link: Link, error: EloquentError) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


async def answer(listener: Listener, host: str) -> set[EcnState | None]:
    """Read one answer; return what the server's connections found out about their paths."""
    user = User()
    link = await connect(ServerUrl(host, listener.port, CERTIFICATE.pin), user)
    try:
        link.open_turn(Request(bytes(16), b"{}"), Receiver())
        await asyncio.wait_for(user.ended, DEADLINE_S)
        assert user.text == "".join(f"{index} " for index in range(TOKENS))
        return {peer.connection.quic.ecn_state for peer in listener._peers}
    finally:
        await link.close()


@pytest.mark.parametrize(
    ("marking", "state"),
    [(EachAlone(all_l), EcnState.CAPABLE), (None, None)],
    ids=["l4s", "off"],
)
async def test_marks_get_through_real_sockets(
    marking: Marking | None, state: EcnState | None
) -> None:
    listener = await listen(
        "127.0.0.1",
        0,
        certificate=CERTIFICATE,
        service=Service(0.001),
        marking=marking,
    )
    try:
        assert await answer(listener, "127.0.0.1") == {state}
    finally:
        await listener.close()


async def test_the_listener_settles_after_packets_came_and_lets_go_of_policies() -> None:
    policy = Noting()
    marking = Settling(policy)
    listener = await listen(
        "127.0.0.1", 0, certificate=CERTIFICATE, service=Service(0.001), marking=marking
    )
    assert await answer(listener, "127.0.0.1") == {EcnState.CAPABLE}
    assert policy.closed == 0
    await listener.close()
    assert policy.closed == 1
    assert policy.arrivals
    assert {now for now, _, _ in policy.arrivals} != set(marking.settled_s)  # They come later:
    assert marking.settled_s[-1] >= policy.arrivals[-1][0]
    assert len(marking.settled_s) <= len(policy.sent) + len(policy.arrivals) + 20


async def test_a_burst_of_datagrams_is_settled_once() -> None:
    marking = Settling(Noting())
    listener = await listen(
        "127.0.0.1", 0, certificate=CERTIFICATE, service=Service(0.001), marking=marking
    )
    try:
        assert await answer(listener, "127.0.0.1") == {EcnState.CAPABLE}
        (peer,) = listener._peers
        settled = len(marking.settled_s)
        for _ in range(10):
            stray = b"\x40" + peer.connection.quic.host_cid + bytes(30)
            listener.datagram_received(stray, ("127.0.0.1", 1), Ecn.NOT_ECT)
        assert len(marking.settled_s) == settled
        await asyncio.sleep(0)
        assert len(marking.settled_s) == settled + 1
    finally:
        await listener.close()


def test_in_virtual_time_the_l_queue_gets_the_tokens() -> None:
    queue = DualPi2(rng=random.Random(1), bits_per_s=1e6)
    classic: list[int] = []

    class Down(NetemLink):
        def poll(self, now: float) -> list[Packet]:
            packets = super().poll(now)
            classic.extend(packet.size for packet in packets if packet.ecn == 0)
            return packets

    network = VirtualNetwork.between(
        NetemLink(delay_s=0.02, seed=1, name="up"),
        Down(delay_s=0.02, seed=1, name="down", rate=FixedRate(1e6), queue=queue),
    )

    async def main() -> set[EcnState | None]:
        with network.on("server"):
            listener = await listen(
                "0.0.0.0",
                443,
                certificate=CERTIFICATE,
                service=Service(0.03),
                marking=EachAlone(all_l),
            )
        states = await answer(listener, "server")
        await listener.close()
        return states

    assert run(main(), network) == {EcnState.CAPABLE}
    # The handshake, and what little comes between the test's end and the first acknowledgement.
    assert len(classic) < 20
