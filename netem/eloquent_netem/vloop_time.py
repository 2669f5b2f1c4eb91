"""The virtual loop's time: when it jumps, when it stands still, and when there is no way on."""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import selectors
import threading
from collections import ChainMap, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, TypeVarTuple, Unpack

from eloquent_netem.errors import NetemError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

Events = list[tuple[selectors.SelectorKey, int]]

TICK_S = 1e-6
"""A timer fires this much after the instant at which it is set, or later. Code may rely on a clock
that moves: aioquic sets its loss timer anew for the same instant when rounding tells it that it
is not due yet."""

MAX_ROUNDS = 1_000_000
"Rounds of the loop at one instant; code that polls with `sleep(0)` would make them for ever."

LIMIT_S = 86_400.0
CLEANUP_S = 3_600.0
"Virtual time that is left for cleaning up when the limit has been reached."

THREAD_LIMIT_S = 60.0
"Real time; a thread that needs longer seems to wait for something that needs virtual time."

GRACE_S = 5.0
"Real time in which a thread that the loop did not start may wake it, before it is a deadlock."


THREAD_PREFIX = "virtual-loop"

VIRTUAL_FD = 1 << 30
"The least number that stands for a virtual socket where a file descriptor is meant."


class DeadlockError(NetemError):
    """Tasks wait, and nothing is left that could happen."""


class LivelockError(NetemError):
    """Code runs without end at one instant of virtual time."""


class TimeLimitError(NetemError):
    """The run did not end within its virtual time."""


class StalledThreadError(NetemError):
    """A thread does not come to its end while virtual time stands still."""


class EventSource(Protocol):
    """What makes things happen besides the loop's own timers: the network."""

    def next_time(self) -> float | None:
        """Return when something happens next, in seconds, or None."""

    def poll(self, now: float) -> None:
        """Let happen what is due by `now`."""


class _Selector(selectors.DefaultSelector):
    """Where the loop would wait for sockets, it asks `wait` instead; seconds, None: for ever.

    Virtual sockets can be registered by their numbers; `readiness` tells what they are ready for.
    """

    wait: Callable[[float | None], Events]
    readiness: Callable[[int, int], int]

    def __init__(self) -> None:
        super().__init__()
        self._virtual: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if not _is_virtual(fileobj):
            return super().register(fileobj, events, data)
        key = self._virtual[fileobj] = selectors.SelectorKey(fileobj, fileobj, events, data)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if not _is_virtual(fileobj):
            return super().modify(fileobj, events, data)
        return self.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._virtual.pop(fileobj) if _is_virtual(fileobj) else super().unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        real = super().get_map()
        return ChainMap(self._virtual, real) if self._virtual else real  # type: ignore[arg-type]

    def select(self, timeout: float | None = None) -> Events:
        return self.wait(timeout)

    def really_select(self, timeout: float) -> Events:
        """Wait, in real time, for a thread or a signal that wakes the loop."""
        return super().select(timeout)

    def ready(self) -> Events:
        """Return the virtual sockets that are ready, in the order in which they registered."""
        found = [(key, self.readiness(key.fd, key.events)) for key in self._virtual.values()]
        return [(key, events) for key, events in found if events]


def _is_virtual(fileobj: Any) -> bool:
    return isinstance(fileobj, int) and fileobj >= VIRTUAL_FD


class TimeLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose time is virtual and begins at 0."""

    def __init__(self, source: EventSource, limit_s: float) -> None:
        self._source = source
        self._now = 0.0
        self._limit_s = limit_s
        self._rounds = 0
        self._jobs: deque[tuple[concurrent.futures.Future[Any], asyncio.Future[Any]]] = deque()
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None
        self._is_stalled = False
        self._really = _Selector()
        self._really.wait = self._wait
        self._really.readiness = self.readiness
        super().__init__(self._really)

    def readiness(self, number: int, events: int) -> int:
        """Return for which of these `selectors` events a virtual socket is ready: here is none."""
        return 0

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """See `asyncio.loop.call_at`; it is called `TICK_S` from now at the earliest."""
        return super().call_at(max(when, self._now + TICK_S), callback, *args, context=context)

    def _wait(self, timeout_s: float | None) -> Events:
        """Wait as the loop says: 0 s if anything is ready, up to its next timer, or for ever."""
        next_time = self._source.next_time()
        if next_time is not None and next_time <= self._now:
            self._source.poll(self._now)
            self._count_round()
            return self._really.ready()
        ready = self._really.ready()
        if ready or timeout_s == 0:
            self._count_round()
            return ready
        if self._jobs:
            return self._wait_for_thread()
        times = [] if timeout_s is None else [self._now + timeout_s]
        if next_time is not None:
            times.append(next_time)
        if not times:
            return self._wait_for_others()
        self._go_to(min(times))
        self._source.poll(self._now)
        return self._really.really_select(0) + self._really.ready()

    def _go_to(self, time_s: float) -> None:
        if time_s > self._limit_s:
            limit_s, self._limit_s = self._limit_s, time_s + CLEANUP_S
            raise TimeLimitError(
                f"Not done after {limit_s:g} s of virtual time; pending: {self._pending()}. End "
                "what runs for ever, or raise limit_s."
            )
        if time_s > self._now:
            self._now = time_s
            self._rounds = 0

    def _count_round(self) -> None:
        self._rounds = 0 if self._jobs else self._rounds + 1
        if self._rounds > MAX_ROUNDS:
            self._rounds = 0
            raise LivelockError(
                f"At {self._now:.6f} s the loop went round {MAX_ROUNDS} times and time did not "
                f"move; pending: {self._pending()}. Code that polls must sleep for longer than 0."
            )

    def _wait_for_others(self) -> Events:
        others = [
            thread
            for thread in threading.enumerate()
            if thread is not threading.current_thread()
            and not thread.name.startswith(THREAD_PREFIX)
        ]
        woken = self._really.really_select(GRACE_S if others else 0)
        if not woken:
            raise DeadlockError(
                f"At {self._now:.6f} s nothing is left to happen: no timer, no packet on its way, "
                f"no thread. Pending: {self._pending()}."
            )
        return woken

    def _pending(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=by_age)
        return ", ".join(_described(task) for task in tasks) or "no task"

    # Threads: they run for real, and virtual time stands still meanwhile.

    def run_in_executor(
        self,
        executor: concurrent.futures.Executor | None,
        func: Callable[[Unpack[Ts]], T],
        *args: *Ts,
    ) -> asyncio.Future[T]:
        """See `asyncio.loop.run_in_executor`; it takes no virtual time."""
        if executor is None:
            if self._executor is None:
                self._executor = concurrent.futures.ThreadPoolExecutor(
                    thread_name_prefix=THREAD_PREFIX
                )
            executor = self._executor
        job = executor.submit(func, *args)
        result: asyncio.Future[T] = self.create_future()
        self._jobs.append((job, result))
        job.add_done_callback(self._wake)
        return result

    def set_default_executor(  # type: ignore[override]
        self, executor: concurrent.futures.ThreadPoolExecutor
    ) -> None:
        """See `asyncio.loop.set_default_executor`."""
        self._executor = executor

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """See `asyncio.loop.shutdown_default_executor`; `timeout` has no effect."""
        if self._executor is not None:
            self._executor.shutdown(wait=not self._is_stalled)
            self._executor = None

    def _wake(self, _: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.call_soon_threadsafe(lambda: None)

    def _wait_for_thread(self) -> Events:
        job, result = self._jobs[0]
        if result.cancelled():
            job.cancel()
            self._jobs.popleft()
            return []
        if not job.done():
            woken = self._really.really_select(THREAD_LIMIT_S)
            if not woken:
                self._jobs.popleft()
                self._is_stalled = True
                raise StalledThreadError(
                    f"A thread runs for more than {THREAD_LIMIT_S:g} s at {self._now:.6f} s of "
                    f"virtual time, which stands still meanwhile; pending: {self._pending()}. A "
                    "thread must not wait for anything that needs virtual time."
                )
            return woken
        self._jobs.popleft()
        if job.cancelled():
            result.cancel()
        elif (error := job.exception()) is not None:
            result.set_exception(error)
        else:
            result.set_result(job.result())
        return []


def by_age(task: asyncio.Task[Any]) -> tuple[int, str]:
    """Return a key that sorts tasks by age as far as they have asyncio's names ("Task-12")."""
    return len(task.get_name()), task.get_name()


def _described(task: asyncio.Task[Any]) -> str:
    name = getattr(task.get_coro(), "__qualname__", repr(task.get_coro()))
    stack = task.get_stack(limit=1)
    where = f" at {Path(stack[0].f_code.co_filename).name}:{stack[0].f_lineno}" if stack else ""
    return f"{task.get_name()} ({name}{where})"
