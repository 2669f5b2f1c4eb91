"""The virtual loop: time jumps, threads are waited for, and there is no hanging."""

import asyncio
import concurrent.futures
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from virtual_hosts import (
    SERVER_IP,
    UP_S,
    Inbox,
    network_with,
    now,
    opened,
    virtually,
)

from eloquent_netem import vloop_time
from eloquent_netem.vloop import (
    DeadlockError,
    LivelockError,
    NotVirtualError,
    StalledThreadError,
    TimeLimitError,
    run,
)

# Time.


def test_an_hour_s_sleep_takes_an_hour_of_virtual_time() -> None:
    async def main() -> float:
        assert now() == 0
        await asyncio.sleep(3600)
        return now()

    assert virtually(main()) == 3600


def test_timers_fire_in_order_and_at_their_times() -> None:
    async def main() -> list[tuple[str, float]]:
        seen = []

        async def tick(name: str, delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            seen.append((name, now()))

        await asyncio.gather(tick("late", 2.5), tick("early", 0.25), tick("middle", 1))
        return seen

    assert virtually(main()) == [("early", 0.25), ("middle", 1.0), ("late", 2.5)]


def test_a_timeout_ends_what_takes_longer() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7):
                await asyncio.sleep(8)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 3)
        async with asyncio.timeout(7):
            await asyncio.sleep(6)
        return now()

    assert virtually(main()) == 16


def test_queues_hand_over_at_the_sender_s_time() -> None:
    async def main() -> list[tuple[int, float]]:
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)

        async def produce() -> None:
            for number in range(4):
                await asyncio.sleep(0.5)
                await queue.put(number)

        task = asyncio.create_task(produce())
        items = [(await queue.get(), now()) for _ in range(4)]
        await task
        return items

    assert virtually(main()) == [(0, 0.5), (1, 1.0), (2, 1.5), (3, 2.0)]


def test_a_timer_set_for_now_lets_time_move() -> None:
    # aioquic relies on it: see TICK_S.
    async def main() -> float:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        asked = loop.time()

        def again() -> None:
            if loop.time() > asked:
                done.set_result(loop.time())
            else:
                loop.call_at(asked, again)

        loop.call_at(asked, again)
        return await done

    assert 0 < virtually(main()) < 1e-5


def test_running_ends_with_main_and_cancels_the_rest_oldest_first() -> None:
    cancelled = []

    async def wait(number: int) -> None:
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise

    async def main() -> tuple[str, list[asyncio.Task[None]]]:
        # Their names, which asyncio counts up, tell their age; here not so their addresses.
        tasks = [
            asyncio.create_task(wait(number), name=f"Task-{number}")
            for number in reversed(range(90, 110))
        ]
        await asyncio.sleep(1)
        return "done", tasks

    assert virtually(main())[0] == "done"
    assert cancelled == list(range(90, 110))


def test_an_exception_of_main_comes_out() -> None:
    async def main() -> None:
        await asyncio.sleep(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        virtually(main())


def test_asynchronous_generators_are_finalised() -> None:
    closed = []

    async def count() -> Any:
        try:
            while True:
                yield 1
        finally:
            await asyncio.sleep(1)
            closed.append(True)

    generator = count()

    async def main() -> None:
        await anext(generator)

    virtually(main())
    assert closed == [True]


# No way on.


def test_a_deadlock_names_the_tasks_that_wait() -> None:
    async def patience() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await asyncio.sleep(5)
        await asyncio.create_task(patience(), name="patient")

    with pytest.raises(DeadlockError, match=r"At 5\.000000 s .*patient \(.*patience at test_vloop"):
        virtually(main())


def test_a_packet_on_its_way_is_no_deadlock() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        _, inbox = await loop.create_datagram_endpoint(Inbox, local_addr=(SERVER_IP, 9))
        transport, _ = await opened(Inbox, remote_addr=(SERVER_IP, 9))
        transport.sendto(b"x")
        return (await inbox.next())[0]

    assert virtually(main()) == UP_S


def test_a_run_without_end_is_ended() -> None:
    async def main() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(1)

    with pytest.raises(TimeLimitError, match=r"after 100 s.*main at test_vloop"):
        run(main(), network_with(), limit_s=100)


def test_polling_without_sleep_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vloop_time, "MAX_ROUNDS", 1000)

    async def main() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    with pytest.raises(LivelockError, match=r"1000 times.*main at test_vloop"):
        virtually(main())


def test_the_first_error_stays_the_first_when_cleaning_up_fails() -> None:
    async def main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raised.append(True)
            await asyncio.Event().wait()

    raised: list[bool] = []
    with pytest.raises(DeadlockError) as caught:
        virtually(main())
    assert raised == [True]
    assert "cleaning up failed" in caught.value.__notes__[0]


# Threads.


def test_threads_take_no_virtual_time() -> None:
    async def main() -> tuple[int, float]:
        ticks = []

        async def tick() -> None:
            await asyncio.sleep(0.001)
            ticks.append(now())

        ticking = asyncio.create_task(tick())
        release = threading.Event()
        work = asyncio.create_task(asyncio.to_thread(lambda: release.wait(30) and 42))
        for _ in range(10):
            await asyncio.sleep(0)
        assert now() == 0
        threading.Timer(0.02, release.set).start()
        result = await work
        assert ticks == []
        await ticking
        return int(result), now()

    assert virtually(main()) == (42, 0.001)


def test_threads_results_come_in_the_order_of_their_start() -> None:
    async def main() -> list[int]:
        order = []
        second_is_done = threading.Event()

        def first() -> None:
            second_is_done.wait(30)

        async def note(number: int, func: Callable[[], None]) -> None:
            await asyncio.to_thread(func)
            order.append(number)

        await asyncio.gather(note(1, first), note(2, second_is_done.set))
        return order

    assert virtually(main()) == [1, 2]


def test_an_exception_of_a_thread_comes_out() -> None:
    def fail() -> None:
        raise KeyError("in the thread")

    async def main() -> None:
        await asyncio.to_thread(fail)

    with pytest.raises(KeyError, match="in the thread"):
        virtually(main())


def test_an_executor_of_one_s_own_works() -> None:
    async def main() -> int:
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            return await asyncio.get_running_loop().run_in_executor(executor, pow, 2, 10)

    assert virtually(main()) == 1024


def test_a_thread_may_call_into_the_loop() -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()
        reached = loop.create_future()

        def call() -> str:
            loop.call_soon_threadsafe(reached.set_result, "reached")
            return asyncio.run_coroutine_threadsafe(answer(), loop).result(30)

        async def answer() -> str:
            return "answered"

        answered = await asyncio.to_thread(call)
        return f"{await reached}, {answered}"

    assert virtually(main()) == "reached, answered"


def test_a_thread_that_the_loop_did_not_start_may_wake_it() -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()
        result = loop.create_future()
        thread = threading.Thread(
            target=lambda: loop.call_soon_threadsafe(result.set_result, "woken")
        )
        loop.call_soon(thread.start)
        try:
            return await result
        finally:
            thread.join()

    assert virtually(main()) == "woken"


def test_a_thread_that_waits_for_virtual_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vloop_time, "THREAD_LIMIT_S", 0.05)
    release = threading.Event()

    async def main() -> None:
        work = asyncio.create_task(asyncio.to_thread(release.wait, 30))
        await asyncio.sleep(1)
        release.set()
        await work

    with pytest.raises(StalledThreadError, match="main at test_vloop"):
        virtually(main())
    release.set()


# What there is not.


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: asyncio.open_unix_connection("/nowhere"),
        lambda: asyncio.create_subprocess_exec("true"),
        lambda: asyncio.create_subprocess_shell("true"),
    ],
)
def test_the_real_world_is_refused(attempt: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    async def main() -> None:
        await attempt()

    with pytest.raises(NotVirtualError, match=r"cannot be had in virtual time.* Use|Run"):
        virtually(main())


def test_real_files_are_refused() -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        with left, right:
            loop = asyncio.get_running_loop()
            with pytest.raises(NotVirtualError, match="real"):
                loop.add_reader(left, print)
            with pytest.raises(NotVirtualError, match="real"):
                await loop.sock_recv(left, 1)
            with pytest.raises(NotVirtualError, match="real TCP socket"):
                await loop.create_connection(asyncio.Protocol, sock=left)
            with pytest.raises(NotVirtualError, match="real TCP socket"):
                await loop.create_server(asyncio.Protocol, sock=right)

    virtually(main())
