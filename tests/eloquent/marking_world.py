"""A server whose packets a policy marks, a reader, and links that note what enters and leaves."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from eloquent.core.events import End, TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.schemes import EloquentSender, SenderFactory
from eloquent.core.turns import TurnProgress, TurnRequested
from eloquent.core.wire import Bundle, decode_frame
from eloquent.quic._aioquic import Datagram
from eloquent.quic.connection import Connected, ConnectionEnded, ConnectionEvent
from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import MarkingPolicy, SentPacket
from eloquent_netem.lab.pair import QuicPair
from eloquent_netem.link import Link
from eloquent_netem.packet import Ecn as NetemEcn
from eloquent_netem.packet import Packet
from eloquent_netem.sim import Actor, simulate
from tests.eloquent.ecn_pair import Alarm

START_S = 5.0
"When the client connects: its clock begins there, so it is off by this."

IP_UDP_BYTES = 28


def all_in_l(count: int, is_copy: bool) -> Ecn:
    return Ecn.ECT_1


def copies_in_c(count: int, is_copy: bool) -> Ecn:
    return Ecn.NOT_ECT if is_copy else Ecn.ECT_1


def by_turns(count: int, is_copy: bool) -> Ecn:
    return Ecn(count % 2)


def never(count: int) -> bool:
    return False


class Noting:
    """A `MarkingPolicy` that decides by count, and notes all that it is told."""

    def __init__(
        self,
        codepoint: Callable[[int, bool], Ecn] = all_in_l,
        *,
        wants_times: bool = True,
        wants_copy: Callable[[int], bool] = never,
    ) -> None:
        self._codepoint = codepoint
        self._wants_times = wants_times
        self._wants_copy = wants_copy
        self.closed = 0
        self.asked_copies: list[float] = []
        self.is_copy: list[bool] = []
        self.sent: list[SentPacket] = []
        self.acked: list[tuple[float, SentPacket]] = []
        self.arrivals: list[tuple[float, SentPacket, float]] = []
        self.lost: list[tuple[float, SentPacket]] = []

    @property
    def wants_times(self) -> bool:
        return self._wants_times

    def wants_copy(self, now: float) -> bool:
        self.asked_copies.append(now)
        return self._wants_copy(len(self.asked_copies))

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        self.is_copy.append(is_copy)
        return self._codepoint(len(self.is_copy), is_copy)

    def on_sent(self, packet: SentPacket) -> None:
        self.sent.append(packet)

    def on_acked(self, now: float, packet: SentPacket) -> None:
        self.acked.append((now, packet))

    def on_arrival(self, now: float, packet: SentPacket, arrived_s: float) -> None:
        self.arrivals.append((now, packet, arrived_s))

    def on_lost(self, now: float, packet: SentPacket) -> None:
        self.lost.append((now, packet))

    def close(self) -> None:
        self.closed += 1

    @property
    def copies(self) -> list[SentPacket]:
        """The packets that the connection called copies."""
        return [sent for sent, is_copy in zip(self.sent, self.is_copy, strict=True) if is_copy]


class Settling:
    """A `Marking` with one policy, which notes when it is settled."""

    def __init__(self, policy: MarkingPolicy) -> None:
        self._policy = policy
        self.settled_s: list[float] = []

    def policy(self) -> MarkingPolicy:
        return self._policy

    def settle(self, now: float) -> None:
        self.settled_s.append(now)


class Queues(Link):
    """Two queues of steady length, by the mark; `rewrite` changes the marks of what comes out."""

    def __init__(
        self,
        *,
        l_s: float = 0.02,
        c_s: float = 0.02,
        rewrite: Callable[[NetemEcn], NetemEcn] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(delay_s=0.0, seed=0, name="down", reorders=True, **options)
        self._delays_s = (c_s, l_s)
        self._rewrite = rewrite
        self.entered: list[tuple[float, Packet]] = []
        self.left_s: dict[int, float] = {}
        "By the packet's identity."

    def send(self, now: float, packet: Packet) -> None:
        self.entered.append((now, packet))
        self._delay_s = self._delays_s[packet.ecn]
        super().send(now, packet)

    def poll(self, now: float) -> list[Packet]:
        packets = super().poll(now)
        for packet in packets:
            self.left_s.setdefault(id(packet), now)
            if self._rewrite is not None:
                packet.ecn = self._rewrite(packet.ecn)
        return packets


class Left(NamedTuple):
    """A packet of the server as it was made."""

    at_s: float
    bundle: Bundle
    is_copy: bool


class MarkingWorld:
    """Turns are accepted as they come; `say` appends to a turn's log."""

    def __init__(
        self,
        policy: MarkingPolicy | None,
        *,
        down: Link | None = None,
        up: Link | None = None,
        make_sender: SenderFactory = EloquentSender,
        turns: int = 1,
        has_datagrams: bool = True,
    ) -> None:
        self.policy = policy
        self.marking = None if policy is None else Settling(policy)
        self.down = Queues() if down is None else down
        self.up = Link(delay_s=0.02, seed=0, name="up") if up is None else up
        self.logs: dict[int, TokenLog] = {}
        self.left: list[Left] = []
        self.texts: dict[int, str] = {}
        self.ended: set[int] = set()
        self.broken: list[ConnectionEnded] = []
        self._is_connected = False
        self.pair = QuicPair(
            up=self.up,
            down=self.down,
            make_sender=make_sender,
            on_client_event=self._on_client_event,
            on_server_event=self._on_server_event,
            marking=self.marking,
            has_datagrams=has_datagrams,
        )
        next_datagram = self.pair.server.next_datagram

        def noted(now: float, room: int) -> Datagram | None:
            made = next_datagram(now, room)
            if made is not None:
                bundle = decode_frame(made.payload)
                assert isinstance(bundle, Bundle)
                self.left.append(Left(now, bundle, made.is_copy))
            return made

        self.pair.server.next_datagram = noted  # type: ignore[method-assign]
        self.now = START_S
        self.pair.connect(self.now)
        self.until(lambda: self._is_connected)
        for _ in range(turns):
            self.pair.request(b"{}", self.now)
        self.until(lambda: len(self.logs) == turns)

    def until(self, reached: Callable[[], bool], others: Iterable[Actor] = ()) -> None:
        self.now = simulate(
            (*others, *self.pair.actors), until=reached, start_s=self.now, limit_s=self.now + 120
        )

    def wait(self, seconds: float) -> None:
        alarm = Alarm(self.now + seconds)
        self.until(lambda: alarm.rang, (alarm,))

    def say(self, turn: int, text: str) -> None:
        self.logs[turn].append(TextDelta(text))
        self.pair.log_grew(turn, self.now)

    def talk(self, count: int, gap_s: float = 0.03) -> None:
        """Append `count` tokens to every turn, one each `gap_s`."""
        for index in range(count):
            for turn in self.logs:
                self.say(turn, f"{index} ")
            self.wait(gap_s)

    def close(self) -> None:
        """End all logs, and wait until the readers have everything."""
        for turn, log in self.logs.items():
            log.close("stop", model="m", prompt_tokens=1, completion_tokens=1)
            self.pair.log_grew(turn, self.now)
        self.until(lambda: self.ended == self.logs.keys())
        self.wait(1.0)

    def arrived_s(self, packet: SentPacket) -> float | None:
        """Return when a packet came out of the link, by its own record; None: it was lost."""
        assert isinstance(self.down, Queues)
        assert isinstance(self.policy, Noting)
        offset = len(self.down.entered) - len(self.policy.sent)
        entered_s, entry = self.down.entered[offset + self.policy.sent.index(packet)]
        assert (entered_s, entry.size) == (packet.sent_s, packet.size + IP_UDP_BYTES)
        return self.down.left_s.get(id(entry))

    def _on_client_event(self, event: ConnectionEvent, now: float) -> None:
        if isinstance(event, Connected):
            self._is_connected = True
        elif isinstance(event, ConnectionEnded):
            self.broken.append(event)
        elif isinstance(event, TurnProgress):
            for item in event.events:
                if isinstance(item, TextDelta):
                    self.texts[event.turn] = self.texts.get(event.turn, "") + item.text
                elif isinstance(item, End):
                    self.ended.add(event.turn)

    def _on_server_event(self, event: ConnectionEvent, now: float) -> None:
        if isinstance(event, TurnRequested):
            self.logs[event.turn] = TokenLog()
            self.pair.accept(event.turn, self.logs[event.turn])
