"""What one flow's policy did and was told, and what the link did with its packets, put together.

The policy's packets and the link's are the same ones in the same order; that is checked, packet by
packet.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eloquent.core.padding import SIZES
from eloquent.errors import EloquentError
from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import Marking, MarkingPolicy, SentPacket
from eloquent.swiftqueue.queues import queue_of
from eloquent.swiftqueue.records import Flow
from eloquent_netem.capture import Captured, Fate
from eloquent_netem.dualpi2_watch import Passage
from eloquent_netem.lab.shared import Port
from eloquent_netem.link import Link
from eloquent_netem.packet import IP_UDP_HEADER_BYTES, SUBJECT, Packet
from eloquent_netem.run import CapturedLink


class MatchError(EloquentError):
    """The packets of the policy and those of the link are not the same: a fault of the lab."""


class Noted(NamedTuple):
    """A packet as the policy knows it."""

    packet: SentPacket
    is_copy: bool
    "It left at the same instant as the packet before it, whose bundle it repeats."

    @property
    def is_bundle(self) -> bool:
        """Whether it carries tokens: those are padded, and bare acknowledgements are smaller."""
        return self.packet.size >= SIZES[0]


class Recorder:
    """The `Marking` of one connection: another one, whose packets and news it notes.

    `offset_s` is what the peer's clock is ahead of ours.
    """

    def __init__(self, marking: Marking, *, offset_s: float = 0.0) -> None:
        self._marking = marking
        self.offset_s = offset_s
        self.packets: list[Noted] = []
        self.arrival_known_s: dict[int, float] = {}
        "By packet number: when its arrival was reported."
        self.loss_known_s: dict[int, float] = {}
        "When it was taken for lost."

    def policy(self) -> MarkingPolicy:
        """See `Marking`."""
        return _RecordedPolicy(self._marking.policy(), self)

    def settle(self, now: float) -> None:
        """See `Marking`."""
        self._marking.settle(now)


class _RecordedPolicy:
    def __init__(self, policy: MarkingPolicy, recorder: Recorder) -> None:
        self._policy = policy
        self._recorder = recorder
        self._is_copy = False

    @property
    def wants_times(self) -> bool:
        return self._policy.wants_times

    def wants_copy(self, now: float) -> bool:
        return self._policy.wants_copy(now)

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        self._is_copy = is_copy
        return self._policy.next_codepoint(now, size, is_copy=is_copy)

    def on_sent(self, packet: SentPacket) -> None:
        packets = self._recorder.packets
        is_copy = self._is_copy and bool(packets) and packet.sent_s == packets[-1].packet.sent_s
        packets.append(Noted(packet, is_copy))
        self._policy.on_sent(packet)

    def on_acked(self, now: float, packet: SentPacket) -> None:
        self._policy.on_acked(now, packet)

    def on_arrival(self, now: float, packet: SentPacket, arrived_s: float) -> None:
        self._recorder.arrival_known_s.setdefault(packet.number, now)
        self._policy.on_arrival(now, packet, arrived_s + self._recorder.offset_s)

    def on_lost(self, now: float, packet: SentPacket) -> None:
        self._recorder.loss_known_s.setdefault(packet.number, now)
        self._policy.on_lost(now, packet)

    def close(self) -> None:
        self._policy.close()


class LinkTap:
    """Notes what enters and leaves one flow's port of the downlink; `link` is the port, watched."""

    def __init__(self, port: Port, flow: int = SUBJECT) -> None:
        self.port = port
        self.link: Link = CapturedLink(port, Captured(port, "down", [self._observe]))
        self.entered: list[tuple[float, Packet]] = []
        "When, and what; kept for the whole run, so that their ids stay theirs."
        self._flow = flow
        self._arrived_s: dict[int, float] = {}

    def on_delivered(self, now: float, packet: Packet) -> None:
        """Take note of a packet, anybody's, that came out of the shared link."""
        if packet.flow == self._flow:
            self._arrived_s.setdefault(id(packet), now)

    def arrived_s(self, packet: Packet) -> float:
        """Return when it came out, or NaN."""
        return self._arrived_s.get(id(packet), float("nan"))

    def _observe(self, now: float, direction: str, packet: Packet, fate: Fate) -> None:
        if fate is Fate.SENT:
            self.entered.append((now, packet))


def matched(
    noted: Sequence[Noted], entered: Sequence[tuple[float, Packet]]
) -> list[tuple[Noted, Packet]]:
    """Return each of the policy's packets with the link's.

    The link has a few more before them: the policy is asked once the handshake is confirmed.

    Raises:
        MatchError: they differ in number, time or size.
    """
    tail = entered[len(entered) - len(noted) :]
    for (sent, _), (now, packet) in zip(noted, tail, strict=True):
        if now != sent.sent_s or packet.size != sent.size + IP_UDP_HEADER_BYTES:
            raise MatchError(
                f"Packet {sent.number}, {sent.size} bytes at {sent.sent_s:.6f} s, is on the link a "
                f"packet of {packet.size} bytes at {now:.6f} s: the records cannot be trusted. "
                "Please report it."
            )
    return [(one, packet) for one, (_, packet) in zip(noted, tail, strict=True)]


def record(
    recorder: Recorder,
    noted: Sequence[Noted],
    arrived_s: NDArray[np.float64],
    passages: Sequence[Passage | None],
) -> Flow:
    """Return the record of a flow, by the receiver's clock; None: the link did not watch a packet.

    What a packet would have met in the other queue is what it met in its own, but for the wait.
    """
    sent_s = np.array([one.packet.sent_s for one in noted], np.float64)
    queue = np.array([queue_of(one.packet) for one in noted], np.int8)
    rows = np.arange(len(noted))
    unknown = (math.nan, math.nan)
    wait_s = np.array([unknown if one is None else one.wait_s for one in passages]).reshape(-1, 2)
    foretold_s = np.array([unknown if one is None else one.foretold_s for one in passages]).reshape(
        -1, 2
    )
    own_s = arrived_s - sent_s
    beside_s = own_s - wait_s[rows, queue]
    known = np.isfinite(beside_s)
    usual_s = float(np.median(beside_s[known])) if known.any() else math.nan
    beside_s = np.where(known, beside_s, usual_s) + recorder.offset_s
    delay_s = np.where(np.isinf(wait_s), math.nan, wait_s) + beside_s[:, None]
    delay_s[rows, queue] = own_s + recorder.offset_s
    lost = np.where(np.isnan(delay_s), -1, 0)
    lost[np.isinf(wait_s)] = 1
    # What is lost on entering the link has no passage; what has not come by now will not come.
    lost[rows, queue] = np.isnan(own_s)
    known_s = [
        (recorder.loss_known_s if is_lost else recorder.arrival_known_s).get(
            one.packet.number, math.inf
        )
        for one, is_lost in zip(noted, np.isnan(own_s), strict=True)
    ]
    return Flow(
        sent_s=sent_s,
        size=np.array([one.packet.size for one in noted], np.int32),
        queue=queue,
        known_s=np.array(known_s, np.float64),
        delay_s=delay_s.astype(np.float32),
        lost=lost.astype(np.int8),
        state_s=(foretold_s + beside_s[:, None]).astype(np.float32),
    )
