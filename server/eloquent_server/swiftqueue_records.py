"""Live records of `--ecn swiftqueue`, written by a thread of their own."""

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from eloquent.errors import ConfigurationError
from eloquent.quic.marking import Marking, marking

if TYPE_CHECKING:
    from eloquent.swiftqueue.live import FlowFolder
    from eloquent.swiftqueue.records import Flow

SWIFTQUEUE = "swiftqueue"
MAX_WAITING = 64
"Flows that wait for the disk; what comes then is left out."

logger = logging.getLogger(__name__)


class RecordWriter:
    """Writes flows into a folder, off the event loop; a full or broken disk ends no answer."""

    def __init__(self, folder: "FlowFolder") -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="swiftqueue-records")
        self._room = threading.Semaphore(MAX_WAITING)
        self._has_told = False

    def write(self, flow: "Flow") -> None:
        """Have a flow written soon."""
        if self._folder.is_full:
            self._tell("the folder is full")
        elif not self._room.acquire(blocking=False):
            self._tell("the disk is too slow")
        else:
            self._thread.submit(self._add, flow)

    async def close(self) -> None:
        """Wait until all is written."""
        await asyncio.to_thread(self._thread.shutdown)

    def _add(self, flow: "Flow") -> None:
        try:
            self._folder.add(flow)
        except (OSError, ValueError, KeyError) as error:
            self._tell(f"a flow cannot be written ({error!r})")
        finally:
            self._room.release()

    def _tell(self, why: str) -> None:
        if not self._has_told:
            self._has_told = True
            logger.warning("SwiftQueue's records are not complete: %s.", why)


def marking_with(
    name: str, *, has_tuning: bool, records: Path | None, split: str
) -> tuple[Marking | None, RecordWriter | None]:
    """Return what marks an endpoint's packets, by the name that `--ecn` has, and who records them.

    Raises:
        ConfigurationError: the options do not go together, or something is missing.
    """
    if name != SWIFTQUEUE:
        if has_tuning or records is not None:
            raise ConfigurationError(
                "--swiftqueue-tuning and --swiftqueue-records go with --ecn swiftqueue: nothing "
                "else foretells delays, or is told of them."
            )
        return marking(name), None
    from eloquent.swiftqueue.serving import make

    marks = make(has_tuning=has_tuning)
    if records is None:
        return marks, None
    from eloquent.swiftqueue.live import FlowFolder, RecordedMarking

    writer = RecordWriter(FlowFolder(records, split))
    return RecordedMarking(marks, writer.write), writer
