"""Records of live connections, for training and for the evaluation of predictions.

What a policy does with its packets, and what their receiver says of them, becomes a `Flow` of at
most `PACKETS_A_FLOW` packets. The queue that a packet did not go into is not known, nor is the
router's state.

A flow has no text, no names, no addresses and no time of day: times begin at its first packet, and
delays at its least, so that nothing is left of how the two clocks are set. It does have when each
packet left and how large it was, from which much can be told of an answer's tokens.

Arrivals are what a peer says. Those that cannot be are left out, and a peer of which several are is
not recorded any more. What can be may be a lie all the same: whoever trains on live records learns
from strangers.
"""

import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eloquent.errors import ConfigurationError
from eloquent.quic.ecn import Ecn
from eloquent.quic.marking import Marking, MarkingPolicy, SentPacket
from eloquent.swiftqueue.dataset import SPLITS, Manifest, file_digest
from eloquent.swiftqueue.feedback import FeedbackCheck
from eloquent.swiftqueue.queues import queue_of
from eloquent.swiftqueue.records import Flow, Queue

MANIFEST = "manifest.json"
FAMILY = "live"
PACKETS_A_FLOW = 8192
"Some minutes of an answer."
LATE_PACKETS = 512
"A flow that is full waits for what became of its last packets, for so many more."
LEAST_PACKETS = 50
"A shorter flow teaches nothing."
MAX_FLOWS = 4096
"A folder is full then; at 39 bytes a packet, uncompressed, that is 1.3 GB at most."

UNKNOWN, ARRIVED, LOST = -1, 0, 1

Sink = Callable[[Flow], None]


class RecordedMarking:
    """The `Marking` of an endpoint, whose packets become flows that `sink` is given.

    `sink` is called while packets are sent and received: it should do its work elsewhere.
    """

    def __init__(self, marking: Marking, sink: Sink) -> None:
        self._marking = marking
        self._sink = sink

    def policy(self) -> MarkingPolicy:
        """See `Marking`."""
        return _RecordedPolicy(self._marking.policy(), self._sink)

    def settle(self, now: float) -> None:
        """See `Marking`."""
        self._marking.settle(now)


class _RecordedPolicy:
    """A policy, and a record of its packets whose arrival the peer is to tell."""

    def __init__(self, policy: MarkingPolicy, sink: Sink) -> None:
        self._policy = policy
        self._sink = sink
        self._check: FeedbackCheck | None = FeedbackCheck()
        "None: nothing that the peer says is believed any more."
        self._acked_s: dict[int, float] = {}
        self._record = _Record()

    @property
    def wants_times(self) -> bool:
        return self._policy.wants_times

    def wants_copy(self, now: float) -> bool:
        return self._policy.wants_copy(now)

    def next_codepoint(self, now: float, size: int, *, is_copy: bool) -> Ecn:
        return self._policy.next_codepoint(now, size, is_copy=is_copy)

    def on_sent(self, packet: SentPacket) -> None:
        self._policy.on_sent(packet)
        if not packet.is_timed or self._check is None:
            return
        self._record.on_sent(packet)
        if len(self._record) == PACKETS_A_FLOW + LATE_PACKETS:
            self._acked_s.clear()
            self._emit(self._record.take(PACKETS_A_FLOW))

    def on_acked(self, now: float, packet: SentPacket) -> None:
        self._policy.on_acked(now, packet)
        if packet.number in self._record:
            self._acked_s.setdefault(packet.number, now)

    def on_arrival(self, now: float, packet: SentPacket, arrived_s: float) -> None:
        self._policy.on_arrival(now, packet, arrived_s)
        if self._check is None or packet.number not in self._record:
            return
        heard_s = min(now, self._acked_s.pop(packet.number, now))
        if not self._check.fault(now, packet, heard_s, arrived_s):
            self._record.learn(packet.number, now, ARRIVED, arrived_s - packet.sent_s)
        elif self._check.is_out(now):
            self._check = None
            self._record = _Record()

    def on_lost(self, now: float, packet: SentPacket) -> None:
        self._policy.on_lost(now, packet)
        self._record.learn(packet.number, now, LOST, np.nan)

    def close(self) -> None:
        self._policy.close()
        self._emit(self._record.take(len(self._record)))

    def _emit(self, flow: Flow) -> None:
        if np.count_nonzero(np.isfinite(flow.known_s)) >= LEAST_PACKETS:
            self._sink(flow)


class _Record:
    """A flow that grows: some 30 bytes a packet."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        "By packet number, of those that are not known to have arrived."
        self._sent_s = array("d")
        self._size = array("i")
        self._queue = array("b")
        self._known_s = array("d")
        self._delay_s = array("d")
        self._fate = array("b")

    def __len__(self) -> int:
        return len(self._sent_s)

    def __contains__(self, number: int) -> bool:
        return number in self._rows

    def on_sent(self, packet: SentPacket) -> None:
        self._rows[packet.number] = len(self._sent_s)
        self._sent_s.append(packet.sent_s)
        self._size.append(packet.size)
        self._queue.append(queue_of(packet))
        self._known_s.append(np.inf)
        self._delay_s.append(np.nan)
        self._fate.append(UNKNOWN)

    def learn(self, number: int, now: float, fate: int, delay_s: float) -> None:
        """Take note of a fate; a packet that was taken for lost may arrive after all."""
        row = self._rows.get(number)
        if row is None or self._fate[row] == fate:
            return
        if fate == ARRIVED:
            del self._rows[number]
        self._known_s[row], self._fate[row], self._delay_s[row] = now, fate, delay_s

    def take(self, count: int) -> Flow:
        """Return the first packets as a flow, and forget them."""
        flow = self._flow(count)
        for column in (
            *(self._sent_s, self._size, self._queue),
            *(self._known_s, self._delay_s, self._fate),
        ):
            del column[:count]
        self._rows = {number: row - count for number, row in self._rows.items() if row >= count}
        return flow

    def _flow(self, count: int) -> Flow:
        sent_s = np.array(self._sent_s[:count], np.float64)
        begin_s = sent_s[0] if count else 0.0
        own_s = np.array(self._delay_s[:count], np.float64)
        arrived = np.isfinite(own_s)
        # Two clocks may be years apart, which a float32 does not hold.
        own_s -= own_s[arrived].min() if arrived.any() else 0.0
        queue = np.array(self._queue[:count], np.int8)
        rows = np.arange(count)
        delay_s = np.full((count, len(Queue)), np.nan, np.float32)
        delay_s[rows, queue] = own_s
        lost = np.full((count, len(Queue)), UNKNOWN, np.int8)
        lost[rows, queue] = self._fate[:count]
        return Flow(
            sent_s=sent_s - begin_s,
            size=np.array(self._size[:count], np.int32),
            queue=queue,
            known_s=np.array(self._known_s[:count], np.float64) - begin_s,
            delay_s=delay_s,
            lost=lost,
            state_s=np.full((count, len(Queue)), np.nan, np.float32),
        )


class FlowFolder:
    """A folder that flows of live connections are written to, with its manifest.

    It may hold what `eloquent swiftqueue collect` wrote. One process writes to it at a time.
    """

    def __init__(self, path: Path, split: str) -> None:
        """Make the folder if need be; flows go into `split`, all of them.

        Raises:
            ConfigurationError: it cannot be used.
        """
        if split not in SPLITS:
            raise ConfigurationError(
                f"There is no split {split!r} for records: choose from {', '.join(SPLITS)}."
            )
        self._path = path
        self._split = split
        self._manifest = path / MANIFEST
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(path, error) from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise ConfigurationError(f"Records cannot be written to {path}: no permission.")
        live = []
        if self._manifest.exists():
            entries = Manifest.load(path).entries
            live = [entry for entry in entries if entry.family == FAMILY]
        if any(entry.split != split for entry in live):
            raise ConfigurationError(
                f"The live records in {path} are for {live[0].split}: those for {split} need a "
                "folder of their own, since a model may not be judged by what it has seen."
            )
        self._flows = len(live)

    @property
    def is_full(self) -> bool:
        """Whether it takes no more flows."""
        return self._flows >= MAX_FLOWS

    def add(self, flow: Flow) -> None:
        """Write a flow and its line in the manifest; readable for the owner alone.

        Raises:
            OSError: it cannot be written.
            ValueError: the manifest is damaged.
        """
        if self.is_full:
            return
        half_done = self._path / "live.part.npz"
        _private(half_done)
        flow.save(half_done)
        digest = file_digest(half_done)
        name = f"{FAMILY}-{digest[:16]}.npz"
        half_done.replace(self._path / name)
        told: dict[str, Any] = {"meta": {}, "flows": []}
        if self._manifest.exists():
            told = json.loads(self._manifest.read_bytes())
        row = {
            "file": name,
            "family": FAMILY,
            "split": self._split,
            "digest": digest,
            "packets": len(flow.sent_s),
            "c_share": float(np.mean(flow.queue == Queue.C)),
            "reported_share": float(np.mean(np.isfinite(flow.known_s))),
        }
        told["flows"] = [one for one in told["flows"] if one["file"] != name] + [row]
        new = self._manifest.with_suffix(".part")
        _private(new)
        new.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        new.replace(self._manifest)
        self._flows += 1


def _private(path: Path) -> None:
    """Make an empty file for the owner alone."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))


def _unusable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"Records cannot be written to {path}: {error.strerror}. Choose another folder."
    )
