"""The links of a run, in the router's process: cross traffic, and notes of every packet."""

import array
import atexit
import math
import multiprocessing
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Self

from eloquent_netem.capture import Captured, Fate
from eloquent_netem.cross import CrossFlow
from eloquent_netem.lab.rows import Place
from eloquent_netem.link import Link
from eloquent_netem.packet import Packet
from eloquent_netem.realtime import MakeLinks
from eloquent_netem.run import CapturedLink

PROMPT_S = 0.003
"A program that takes longer than this was waiting for something."

KINDS = (("up", Fate.SENT), ("down", Fate.SENT), ("down", Fate.DELIVERED))
"What is noted; a note is the index here, the time and the size."


class PacketNotes:
    """An `Observer` whose notes are in `file` when its process has ended.

    If whoever is to read them is gone by then, so is the file's folder.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._notes = array.array("d")
        atexit.register(self._save)  # The process was made for these links and ends with them.

    def observe(self, now: float, direction: str, packet: Packet, fate: Fate) -> None:
        """See `eloquent_netem.capture.Observer`."""
        kind = (direction, fate)
        if kind in KINDS:
            self._notes.extend((KINDS.index(kind), now, packet.size))

    def _save(self) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            shutil.rmtree(self._file.parent)
        else:
            self._file.write_bytes(self._notes.tobytes())


def noted_links(links: MakeLinks, file: Path) -> tuple[Link, Link]:
    """Return the links with `PacketNotes` of them; called in the router's process."""
    up, down = links()
    observers = [PacketNotes(file).observe]
    return (
        CapturedLink(up, Captured(up, "up", observers)),
        CapturedLink(down, Captured(down, "down", observers)),
    )


def cross_traffic(
    place: Place, seed: int, origin_s: float, up: Link, down: Link
) -> Sequence[CrossFlow]:
    """Return the cross traffic, which has been there since the scenario's beginning, `origin_s`."""
    flows = place.scenario.cross_flows(up, down, seed, origin_s)
    parts: list[Link | CrossFlow] = [up, down, *flows]
    while (due := min(_times(parts), default=math.inf)) <= 0:
        for packet in (*up.poll(due), *down.poll(due)):
            for flow in flows:
                flow.on_delivered(due, packet)
        for flow in flows:
            if min(_times((flow,)), default=math.inf) <= due:
                flow.act(due)
    return flows


def _times(parts: Iterable[Link | CrossFlow]) -> Iterator[float]:
    return (time for part in parts if (time := part.next_time()) is not None)


@dataclass(frozen=True, slots=True)
class Packets:
    """What went over the links; times in seconds."""

    up: Sequence[tuple[float, int]]
    down: Sequence[tuple[float, int]]
    "When packets were sent, and their sizes in bytes, IP header included."
    down_out_s: Sequence[float]
    "When packets came out at the client's end."

    @classmethod
    def read(cls, file: Path, started_s: float) -> Self:
        """Read what `PacketNotes` left, of links whose clock was started at `started_s`."""
        notes = array.array("d", file.read_bytes())
        found: list[list[tuple[float, int]]] = [[] for _ in KINDS]
        for kind, time_s, size in zip(notes[0::3], notes[1::3], notes[2::3], strict=True):
            found[int(kind)].append((started_s + time_s, int(size)))
        up, down, out = found
        return cls(up, down, [time_s for time_s, _ in out])

    def programs_s(self, generated_s: Sequence[float], rendered_s: Sequence[float]) -> float:
        """Return how long the programs at both ends take for a token that need not wait.

        From its generation to the next packet down the link, and from a packet out of the link to
        the rendering that follows: medians of both, of those times that are prompt. The reader
        would wait for it on a loss-free path too.
        """
        sent_s = [time_s for time_s, _ in self.down]
        server_s = [
            sent_s[index] - time_s
            for time_s in generated_s
            if (index := bisect_left(sent_s, time_s)) < len(sent_s)
        ]
        client_s = [
            time_s - self.down_out_s[index - 1]
            for time_s in rendered_s
            if (index := bisect_right(self.down_out_s, time_s)) > 0
        ]
        return _prompt_median(server_s) + _prompt_median(client_s)


def sizes(packets: Sequence[tuple[float, int]], start_s: float, stop_s: float) -> list[int]:
    """Return the sizes of the packets that were sent from `start_s` to `stop_s`."""
    return [size for time_s, size in packets if start_s <= time_s <= stop_s]


def _prompt_median(times_s: Sequence[float]) -> float:
    prompt = [time_s for time_s in times_s if time_s <= PROMPT_S]
    return median(prompt) if prompt else 0.0
