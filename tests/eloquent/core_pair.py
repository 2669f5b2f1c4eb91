"""A sender and a receiver over an imagined QUIC path, in virtual time.

The path between them is two functions, one for each direction, that give each packet its fate.
The transport imitates what QUIC tells a sender: each packet is acknowledged when it comes, and
declared lost when three later ones or a later one and 9/8 round trips have been acknowledged; when
nothing is acknowledged, probes go out (RFC 9002).
"""

from collections.abc import Callable, Collection, Sequence
from heapq import heappop, heappush
from itertools import count

from eloquent.core.events import End, Event, TextDelta
from eloquent.core.log import TokenLog
from eloquent.core.path import UNKNOWN_COPIES, Path
from eloquent.core.receiver import Receiver
from eloquent.core.schemes import scheme as find_scheme
from eloquent.core.wire import (
    Bundle,
    Ended,
    Report,
    decode_frame,
    encode_bundle,
    encode_report,
)

Fate = Callable[[int, float], Sequence[float]]
"""Takes a packet's index and the time; gives the extra delay of each copy that arrives.

Downwards the index is the bundle's number, and -1 for a probe; upwards it counts acknowledgements
and reports together.
"""

TURN = 3
PACKET_THRESHOLD = 3
TIME_THRESHOLD = 9 / 8
NEXT_PACKET_S = 0.001
"Where a sender found no room in a packet, the next is offered after this time."

MAX_PROBE_GAP_S = 2.0

MAX_STEPS = 100_000


def clean(index: int, now: float) -> Sequence[float]:
    return (0.0,)


def drop(*indices: int) -> Fate:
    return lambda index, now: () if index in indices else (0.0,)


def outage(start_s: float, stop_s: float) -> Fate:
    return lambda index, now: () if start_s <= now < stop_s else (0.0,)


class CorePair:
    """One turn; tokens are given as (time of generation, text) and the log closes after them."""

    def __init__(
        self,
        scheme: str,
        tokens: Sequence[tuple[float, str]],
        *,
        rtt_s: float = 0.1,
        down: Fate = clean,
        up: Fate = clean,
        unseen: Collection[int] = (),
        misjudged: Collection[int] = (),
        room: Callable[[int], int] = lambda packet: 1200,
        lossy: bool = False,
    ) -> None:
        """`unseen` bundles are acknowledged and never reach the application, `misjudged` ones
        arrive and are declared lost; `room` is that of each packet offered to the sender.
        """  # noqa: D205
        self.rtt_s = rtt_s
        self.log = TokenLog()
        self.path = Path(srtt_s=rtt_s)
        for _ in range(UNKNOWN_COPIES):
            self.path.note_copy()
        if lossy:
            self.path.on_loss_elsewhere()
        self.sender = find_scheme(scheme)(TURN, self.log, self.path)
        self.receiver = Receiver(TURN)
        self.now = 0.0
        self.bundles: list[tuple[float, Bundle]] = []
        self.reports: list[tuple[float, Report]] = []
        self.events: list[Event] = []
        self.rendered_s: list[float] = []
        self._down = down
        self._up = up
        self._unseen = unseen
        self._misjudged = misjudged
        self._room = room
        self._offers = 0
        self._no_packet_before = float("-inf")
        self._up_packets = 0
        self._happenings: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._outstanding: dict[int, tuple[float, int]] = {}
        self._next_packet = 0
        self._largest_acked = -1
        self._received: set[int] = set()
        self._probes = 0
        for index, (time, text) in enumerate(tokens):
            self._at(time, lambda text=text, index=index: self._generate(text, index))
        self._tokens = [text for _, text in tokens]

    @property
    def starts(self) -> list[int]:
        """Where in the log each bundle started."""
        return [bundle.offset for _, bundle in self.bundles]

    @property
    def sent_s(self) -> list[float]:
        """When each bundle left."""
        return [time for time, _ in self.bundles]

    @property
    def bytes_sent(self) -> int:
        return sum(len(encode_bundle(bundle)) for _, bundle in self.bundles)

    def run(self, *, until_s: float | None = None, limit_s: float = 120.0) -> None:
        """Go on until nothing is left to happen, or up to `until_s`."""
        for _ in range(MAX_STEPS):
            time = self._next_time()
            if time is None or (until_s is not None and max(time, self.now) > until_s):
                if until_s is not None:
                    self.now = until_s
                return
            self.now = max(self.now, time)
            assert self.now <= limit_s, f"not done after {limit_s} s of virtual time"
            while self._happenings and self._happenings[0][0] <= self.now:
                heappop(self._happenings)[2]()
            self._send_report()
            self._send_bundles()
        raise AssertionError(f"no end after {MAX_STEPS} steps, at {self.now} s")

    def check_delivery(self) -> None:
        """The whole log came out, in order and once, and both ends know it."""
        *deltas, end = self.events
        assert [delta.text for delta in deltas if isinstance(delta, TextDelta)] == self._tokens
        assert len(deltas) == len(self._tokens)
        assert isinstance(end, End)
        assert end == self.log.end
        assert self.receiver.is_complete
        assert self.receiver.contiguous == self.log.length
        assert self.sender.is_complete

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heappush(self._happenings, (time, next(self._order), action))

    def _next_time(self) -> float | None:
        times = [self._happenings[0][0]] if self._happenings else []
        if (report_at := self.receiver.next_time()) is not None:
            times.append(report_at)
        if (bundle_at := self.sender.next_time()) is not None:
            times.append(max(bundle_at, self._no_packet_before))
        return min(times, default=None)

    def _generate(self, text: str, index: int) -> None:
        self.log.append(TextDelta(text))
        if index + 1 == len(self._tokens):
            end = self.log.close("stop", model="m", prompt_tokens=1, completion_tokens=index + 1)
            self.receiver.on_ended(Ended(end.length, end.digest))
        self.sender.log_grew(self.now)

    def _send_bundles(self) -> None:
        while (time := self.sender.next_time()) is not None and (
            max(time, self._no_packet_before) <= self.now
        ):
            room = self._room(self._offers)
            self._offers += 1
            bundle = self.sender.next_bundle(self.now, room)
            if bundle is None:
                self._no_packet_before = self.now + NEXT_PACKET_S
                return
            payload = encode_bundle(bundle)
            assert len(payload) <= room
            stop = bundle.offset + len(bundle.data)
            assert bundle.data == self.log.read(bundle.offset, stop)
            assert decode_frame(payload) == bundle
            self.bundles.append((self.now, bundle))
            self._send_packet(bundle)

    def _send_packet(self, bundle: Bundle | None) -> None:
        number = -1 if bundle is None else bundle.number
        packet = self._next_packet
        self._next_packet += 1
        self._outstanding[packet] = (self.now, number)
        for extra_s in self._down(number, self.now):
            self._at(
                self.now + self.rtt_s / 2 + extra_s, lambda: self._packet_arrives(packet, bundle)
            )
        self._set_waiting()
        self._set_probe_timer()

    def _packet_arrives(self, packet: int, bundle: Bundle | None) -> None:
        if (
            bundle is not None
            and packet not in self._received
            and bundle.number not in self._unseen
        ):
            events = self.receiver.on_bundle(bundle, self.now)
            self.events += events
            self.rendered_s += [self.now] * len(events)
        self._received.add(packet)
        acked = frozenset(self._received)
        self._go_up(lambda: self._ack_arrives(acked))

    def _go_up(self, arrive: Callable[[], None]) -> bool:
        index = self._up_packets
        self._up_packets += 1
        fates = self._up(index, self.now)
        for extra_s in fates:
            self._at(self.now + self.rtt_s / 2 + extra_s, arrive)
        return bool(fates)

    def _ack_arrives(self, acked: frozenset[int]) -> None:
        for packet in sorted(acked & self._outstanding.keys()):
            _, number = self._outstanding.pop(packet)
            self._probes = 0
            if number in self._misjudged:
                self.sender.on_lost(number)
            elif number >= 0:
                self.sender.on_acked(number)
        self._largest_acked = max(self._largest_acked, *acked)
        self._detect_losses()
        self._set_waiting()
        self._set_probe_timer()

    def _detect_losses(self) -> None:
        for packet, (sent_s, number) in sorted(self._outstanding.items()):
            if packet > self._largest_acked:
                break
            lost_at = sent_s + TIME_THRESHOLD * self.rtt_s
            if packet <= self._largest_acked - PACKET_THRESHOLD or lost_at <= self.now:
                del self._outstanding[packet]
                if number >= 0:
                    self.sender.on_lost(number)
            else:
                self._at(lost_at, self._detect_losses)

    def _set_waiting(self) -> None:
        newer = (
            sent for packet, (sent, _) in self._outstanding.items() if packet > self._largest_acked
        )
        self.path.waiting_since = min(newer, default=None)

    def _set_probe_timer(self) -> None:
        if self._outstanding:
            newest = next(reversed(self._outstanding))
            probe_s = 3 * self.rtt_s
            delay_s = min(probe_s * 2**self._probes, max(probe_s, MAX_PROBE_GAP_S))
            self._at(self._outstanding[newest][0] + delay_s, lambda: self._probe(newest))

    def _probe(self, newest: int) -> None:
        if self._outstanding and next(reversed(self._outstanding)) == newest:
            self._probes += 1
            self._send_packet(None)

    def _send_report(self) -> None:
        report = self.receiver.next_report(self.now)
        if report is None:
            return
        assert decode_frame(encode_report(report)) == report
        self.reports.append((self.now, report))
        if not self._go_up(lambda: self.sender.on_report(report)) and self.receiver.is_complete:
            # As the client does: the last report must come through.
            self._at(self.now + 2 * self.rtt_s, self.receiver.report_again)
