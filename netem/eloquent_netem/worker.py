"""A process of its own for a driver: SCHED_FIFO and an interpreter lock that nobody shares."""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

from eloquent_netem.errors import NetemError
from eloquent_netem.realtime import Driver

ANSWER_WITHIN_S = 60.0
"Ends a hang; a process that lives answers within milliseconds, and starts within a second."

ReadyT_co = TypeVar("ReadyT_co", covariant=True)
StatsT_co = TypeVar("StatsT_co", covariant=True)
ReadyT = TypeVar("ReadyT")
StatsT = TypeVar("StatsT")


class WorkerError(NetemError):
    """The process with the links is gone, or does not answer."""


class Work(Protocol[ReadyT_co, StatsT_co]):
    """What runs in the process."""

    @property
    def driver(self) -> Driver:
        """The driver that runs until the work is done."""

    def ready(self) -> ReadyT_co:
        """Return what those outside need to know."""

    def stats(self) -> StatsT_co:
        """Return what has been done so far."""

    def close(self) -> None:
        """Give back everything."""


class Worker(Generic[ReadyT, StatsT]):
    """A process that does one `Work`, seen from outside.

    `make` is called there and must be picklable: a function of a module, or `functools.partial`
    of one; as always with multiprocessing, a script that starts one does so under
    `if __name__ == "__main__":`. The process ends with `close`, on SIGTERM, and when the process
    that started it is gone, however that came about: then its end of the pipe is closed. SIGINT
    it leaves to the one who started it.
    """

    def __init__(self, make: Callable[[], Work[ReadyT, StatsT]], *, real_time: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, make, real_time), daemon=True)
        self._last_stats: StatsT | None = None
        try:
            with _without_sigint():
                self._process.start()
            theirs.close()
            self.ready: ReadyT = self._receive()
        except BaseException:
            theirs.close()
            self.abandon()
            raise

    @property
    def pid(self) -> int | None:
        """The process's id."""
        return self._process.pid

    def start(self) -> None:
        """Start the scenario's clock; it runs when this returns."""
        self._request("start")

    def stats(self) -> StatsT:
        """Return what has been done so far; after `close`, in the whole run."""
        return self._request("stats") if self._last_stats is None else self._last_stats

    def close(self) -> StatsT:
        """End the process; return its last statistics.

        Raises:
            WorkerError: it had ended before, or does not answer.
        """
        if self._last_stats is None:
            try:
                self._last_stats = self._request("stop")
            finally:
                self.abandon()
        return self._last_stats

    def abandon(self) -> None:
        """End the process without asking anything of it; it gives back what it has."""
        self._pipe.close()
        if self._process.pid is None:
            return
        self._process.join(ANSWER_WITHIN_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _request(self, what: str) -> StatsT:
        try:
            self._pipe.send(what)
        except OSError as error:
            raise self._gone() from error
        answer: StatsT = self._receive()
        return answer

    def _receive(self) -> Any:
        try:
            if not self._pipe.poll(ANSWER_WITHIN_S):
                raise WorkerError(
                    f"The process with the links has not answered for {ANSWER_WITHIN_S:.0f} s; "
                    "is the machine overloaded? Run it again."
                )
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if isinstance(answer, NetemError):
            raise answer
        return answer

    def _gone(self) -> WorkerError:
        self._process.join(1)
        return WorkerError(
            f"The process with the links ended before its time (exit code "
            f"{self._process.exitcode}), so the run is void; what it wrote to stderr says why."
        )


@contextlib.contextmanager
def _without_sigint() -> Iterator[None]:
    """Let a process that is started here wait with Ctrl-C until it can ignore it.

    It inherits this thread's mask; without, it would die with a traceback while it loads.
    """
    resource_tracker.ensure_running()  # Starting a process starts this one, which resets the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, make: Callable[[], Work[object, object]], real_time: bool) -> None:
    """Be the process."""
    # What a terminal, timeout(1) or a supervisor sends to the whole group is for the one who
    # started us: it asks us for the last figures and ends us.
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    signal.signal(signal.SIGTERM, _exit)
    try:
        work = make()
    except NetemError as error:
        pipe.send(error)
        return
    with contextlib.suppress(BrokenPipeError):  # Whoever started us may be gone.
        try:
            pipe.send(work.ready())
            work.driver.watch(pipe.fileno(), lambda: _answer(pipe, work))
            gc.freeze()  # What was loaded so far need not be searched again and again.
            work.driver.run(real_time=real_time)
            last_stats = work.stats()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            work.close()
        # Only now, and only if nothing failed: who gets this knows that all went well.
        pipe.send(last_stats)


def _answer(pipe: Connection, work: Work[object, object]) -> None:
    try:
        request = pipe.recv()
    except (EOFError, ConnectionResetError):
        request = "stop"
    if request == "stop":
        work.driver.stop()  # The answer comes when all is closed.
        return
    if request == "start":
        work.driver.start()
    pipe.send(work.stats())


def _exit(_number: int, _frame: FrameType | None) -> None:
    sys.exit(1)
