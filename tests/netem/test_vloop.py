"""The virtual loop: time jumps, datagrams take their paths, and there is no hanging."""

import asyncio
import concurrent.futures
import errno
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from eloquent_netem import vloop_time
from eloquent_netem.link import Link
from eloquent_netem.loss import DropList
from eloquent_netem.packet import Ecn, Packet
from eloquent_netem.queues import DropTail
from eloquent_netem.vloop import (
    DeadlockError,
    LivelockError,
    NetworkSetupError,
    NotVirtualError,
    StalledThreadError,
    TimeLimitError,
    VirtualNetwork,
    run,
)

T = TypeVar("T")

CLIENT_IP = "192.0.2.1"
SERVER_IP = "198.51.100.1"
UP_S = 0.03
DOWN_S = 0.05


def network_with(**options: Any) -> VirtualNetwork:
    """Return client and server; the options are of the link to the server."""
    return VirtualNetwork.between(
        Link(delay_s=UP_S, seed=1, name="up", **options),
        Link(delay_s=DOWN_S, seed=1, name="down"),
    )


def virtually(main: Coroutine[Any, Any, T]) -> T:
    return run(main, network_with())


def now() -> float:
    return asyncio.get_running_loop().time()


class Inbox(asyncio.DatagramProtocol):
    """Keeps what comes, with the time at which it came."""

    def __init__(self) -> None:
        self.items: list[tuple[float, Any, Any]] = []
        self.came = asyncio.Event()
        self.transport: asyncio.DatagramTransport | None = None
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._keep(data, addr)

    def error_received(self, exc: Exception) -> None:
        self._keep(exc, None)

    def _keep(self, item: Any, addr: Any) -> None:
        self.items.append((now(), item, addr))
        self.came.set()

    async def next(self) -> tuple[float, Any, Any]:
        while not self.items:
            self.came.clear()
            await self.came.wait()
        return self.items.pop(0)


class Echo(Inbox):
    """Sends back what comes."""

    def datagram_received(self, data: bytes, addr: Any) -> None:
        super().datagram_received(data, addr)
        assert self.transport is not None
        self.transport.sendto(data, addr)


P = TypeVar("P", bound=Inbox)


async def opened(make: Callable[[], P], **options: Any) -> tuple[asyncio.DatagramTransport, P]:
    return await asyncio.get_running_loop().create_datagram_endpoint(make, **options)


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


# Datagrams.


def test_a_datagram_takes_the_link_s_time_each_way() -> None:
    network = network_with()

    async def main() -> None:
        with network.on("server"):
            await opened(Echo, local_addr=("0.0.0.0", 7))
        await asyncio.sleep(1)
        transport, inbox = await opened(Inbox, remote_addr=("server", 7))
        assert transport.get_extra_info("peername") == (SERVER_IP, 7)
        assert transport.get_extra_info("sockname") == (CLIENT_IP, 49152)
        transport.sendto(b"hello")
        assert await inbox.next() == (1 + UP_S + DOWN_S, b"hello", (SERVER_IP, 7))

    run(main(), network)


def test_an_unconnected_socket_sends_where_it_is_told() -> None:
    network = network_with()

    async def main() -> None:
        with network.on("server"):
            await opened(Echo, local_addr=("0.0.0.0", 7))
            await opened(Echo, local_addr=("server", 8))
        transport, inbox = await opened(Inbox, local_addr=("0.0.0.0", 0))
        transport.sendto(b"to 8", (SERVER_IP, 8))
        transport.sendto(b"to 7", (SERVER_IP, 7))
        assert [(await inbox.next())[1:] for _ in range(2)] == [
            (b"to 8", (SERVER_IP, 8)),
            (b"to 7", (SERVER_IP, 7)),
        ]
        with pytest.raises(ValueError, match="needs an address"):
            transport.sendto(b"whither?")

    run(main(), network)


def test_a_lost_datagram_does_not_come() -> None:
    network = network_with(loss=DropList([0]))

    async def main() -> None:
        _, inbox = await opened(Inbox, local_addr=(SERVER_IP, 7))
        transport, _ = await opened(Inbox, remote_addr=(SERVER_IP, 7))
        transport.sendto(b"lost")
        transport.sendto(b"found")
        assert (await inbox.next())[1] == b"found"
        await asyncio.sleep(1)
        assert inbox.items == []

    run(main(), network)


def test_a_connected_socket_hears_its_peer_only() -> None:
    network = network_with()

    async def main() -> None:
        _, peer = await opened(Inbox, local_addr=(SERVER_IP, 7))
        other, _ = await opened(Inbox, local_addr=(SERVER_IP, 8))
        transport, inbox = await opened(Inbox, remote_addr=(SERVER_IP, 7))
        transport.sendto(b"here I am", (SERVER_IP, 7))
        *_, address = await peer.next()
        other.sendto(b"hey", address)
        await asyncio.sleep(1)
        assert inbox.items == []
        with pytest.raises(ValueError, match="Invalid address"):
            transport.sendto(b"elsewhere", (SERVER_IP, 8))

    run(main(), network)


def test_a_connected_socket_learns_that_nobody_listens() -> None:
    async def main() -> None:
        transport, inbox = await opened(Inbox, remote_addr=("server", 7))
        transport.sendto(b"anybody?")
        time, error, _ = await inbox.next()
        assert isinstance(error, ConnectionRefusedError)
        assert time == UP_S + DOWN_S

    virtually(main())


def test_an_unconnected_socket_does_not_learn_that_nobody_listens() -> None:
    async def main() -> None:
        transport, inbox = await opened(Inbox, local_addr=("0.0.0.0", 0))
        transport.sendto(b"anybody?", ("198.51.100.1", 7))
        await asyncio.sleep(10)
        assert inbox.items == []

    virtually(main())


def test_loopback_takes_no_time_and_no_link() -> None:
    network = network_with(loss=DropList(range(100)))

    async def main() -> None:
        for host, other in (("client", "server"), ("server", "client")):
            with network.on(host):
                echo, _ = await opened(Echo, local_addr=("127.0.0.1", 7))
                transport, inbox = await opened(Inbox, remote_addr=("localhost", 7))
                transport.sendto(b"hello")
                assert await inbox.next() == (0.0, b"hello", ("127.0.0.1", 7))
                echo.close()
                await asyncio.sleep(0)
                transport.sendto(b"anybody?")
                assert isinstance((await inbox.next())[1], ConnectionRefusedError)
            with network.on(other):
                await opened(Inbox, local_addr=("127.0.0.1", 8))
        assert now() == 0

    run(main(), network)


def test_a_host_reaches_itself_by_its_own_address() -> None:
    async def main() -> None:
        await opened(Echo, local_addr=("0.0.0.0", 7))
        transport, inbox = await opened(Inbox, local_addr=("0.0.0.0", 0))
        transport.sendto(b"me", (CLIENT_IP, 7))
        assert await inbox.next() == (0.0, b"me", (CLIENT_IP, 7))

    virtually(main())


def test_what_a_socket_starts_runs_on_its_host() -> None:
    network = network_with()

    class Server(Inbox):
        def datagram_received(self, data: bytes, addr: Any) -> None:
            self.task = asyncio.ensure_future(self.ask_a_neighbour(addr))

        async def ask_a_neighbour(self, addr: Any) -> None:
            transport, inbox = await opened(Inbox, remote_addr=("localhost", 8))
            transport.sendto(b"neighbour?")
            answer = (await inbox.next())[1]
            assert self.transport is not None
            self.transport.sendto(answer, addr)

    async def main() -> None:
        with network.on("server"):
            await opened(Server, local_addr=("0.0.0.0", 7))
            await opened(Echo, local_addr=("127.0.0.1", 8))
        transport, inbox = await opened(Inbox, remote_addr=("server", 7))
        transport.sendto(b"hello")
        assert (await inbox.next())[1] == b"neighbour?"

    run(main(), network)


def test_a_dual_stack_socket_speaks_of_ipv4_in_ipv6_form() -> None:
    if not socket.has_ipv6:
        pytest.skip("needs IPv6 sockets, which this Python lacks")
    network = network_with()
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    except OSError as error:
        pytest.skip(f"needs IPv6 sockets: {error}")
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, 1)
    sock.bind(("::", 0, 0, 0))

    async def main() -> None:
        with network.on("server"):
            echo, echoed = await opened(Echo, local_addr=("::", 7))
        transport, inbox = await opened(Inbox, sock=sock)
        assert transport.get_extra_info("sockname") == ("::", 49152, 0, 0)
        transport.sendto(b"hello", (f"::ffff:{SERVER_IP}", 7, 0, 0))
        *_, address = await inbox.next()
        assert address == (f"::ffff:{SERVER_IP}", 7, 0, 0)
        assert (await echoed.next())[2] == (f"::ffff:{CLIENT_IP}", 49152, 0, 0)
        assert echo.get_extra_info("ecn") is Ecn.ECT_1
        transport.close()

    run(main(), network)
    assert sock.fileno() == -1


def test_the_ecn_field_goes_the_way_and_may_be_marked() -> None:
    class Marking(DropTail):
        def enqueue(self, now: float, packet: Packet) -> bool:
            packet.ecn = Ecn.CE if packet.ecn is Ecn.ECT_1 else packet.ecn
            return super().enqueue(now, packet)

    network = network_with(queue=Marking())

    async def main() -> None:
        server, inbox = await opened(Inbox, local_addr=(SERVER_IP, 7))
        transport, _ = await opened(Inbox, remote_addr=(SERVER_IP, 7))
        marks = []
        for ecn in (Ecn.NOT_ECT, Ecn.ECT_0, Ecn.ECT_1):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_IP, socket.IP_TOS, ecn)
            transport.sendto(b"x")
            await inbox.next()
            marks.append(server.get_extra_info("ecn"))
        assert marks == [Ecn.NOT_ECT, Ecn.ECT_0, Ecn.CE]

    run(main(), network)


def test_a_closed_socket_gives_its_port_back_and_hears_nothing() -> None:
    async def main() -> None:
        first, inbox = await opened(Inbox, local_addr=(SERVER_IP, 7))
        with pytest.raises(OSError, match="in use") as caught:
            await opened(Inbox, local_addr=(SERVER_IP, 7))
        assert caught.value.errno == errno.EADDRINUSE
        transport, _ = await opened(Inbox, remote_addr=(SERVER_IP, 7))
        transport.sendto(b"x")
        await asyncio.sleep(UP_S / 2)
        first.close()
        assert first.is_closing()
        await asyncio.sleep(1)
        assert (inbox.items, inbox.is_lost) == ([], True)
        first.sendto(b"from the grave", (CLIENT_IP, 1))
        await opened(Inbox, local_addr=(SERVER_IP, 7))

    virtually(main())


def test_ports_that_nobody_chose_are_alike_in_every_run() -> None:
    async def main() -> list[int]:
        return [
            (await opened(Inbox, local_addr=("0.0.0.0", 0)))[0].get_extra_info("sockname")[1]
            for _ in range(3)
        ]

    assert virtually(main()) == virtually(main()) == [49152, 49153, 49154]


@pytest.mark.parametrize(
    ("address", "code"),
    [("203.0.113.9", errno.ENETUNREACH), ("::", errno.ENETUNREACH)],
)
def test_there_is_no_route_to_who_is_not_there(address: str, code: int) -> None:
    async def main() -> None:
        with pytest.raises(OSError) as caught:  # noqa: PT011  (its errno is checked)
            await opened(Inbox, remote_addr=(address, 7))
        assert caught.value.errno == code
        transport, inbox = await opened(Inbox, local_addr=("0.0.0.0", 0))
        transport.sendto(b"x", (address, 7))
        assert (await inbox.next())[1].errno == code

    virtually(main())


def test_an_address_of_another_host_cannot_be_bound() -> None:
    network = network_with()

    async def main() -> None:
        with network.on("client"), pytest.raises(OSError) as caught:  # noqa: PT011
            await opened(Inbox, local_addr=(SERVER_IP, 7))
        assert caught.value.errno == errno.EADDRNOTAVAIL

    run(main(), network)


def test_a_datagram_that_is_too_large_is_an_error() -> None:
    async def main() -> None:
        transport, inbox = await opened(Inbox, remote_addr=(SERVER_IP, 7))
        transport.sendto(bytes(65508))
        assert (await inbox.next())[1].errno == errno.EMSGSIZE

    virtually(main())


def test_names_are_the_network_s() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        kind = socket.SOCK_DGRAM
        assert await loop.getaddrinfo("server", 80, type=kind) == [
            (socket.AF_INET, kind, socket.IPPROTO_UDP, "", (SERVER_IP, 80))
        ]
        assert len(await loop.getaddrinfo(b"client", "80")) == 2
        mapped = await loop.getaddrinfo("server", 80, family=socket.AF_INET6)
        assert mapped[0][4] == (f"::ffff:{SERVER_IP}", 80, 0, 0)
        anywhere = await loop.getaddrinfo(None, 80, flags=socket.AI_PASSIVE)
        assert anywhere[0][4] == ("0.0.0.0", 80)
        assert await loop.getnameinfo((SERVER_IP, 80)) == ("server", "80")
        with pytest.raises(socket.gaierror, match=r"example\.com"):
            await loop.getaddrinfo("example.com", 80)
        with pytest.raises(socket.gaierror, match="https"):
            await loop.getaddrinfo("server", "https")

    virtually(main())


# What there is not.


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: asyncio.open_connection("server", 80),
        lambda: asyncio.start_server(lambda reader, writer: None, "server", 80),
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

    virtually(main())


def test_a_network_runs_once() -> None:
    network = network_with()

    async def main() -> None:
        await asyncio.sleep(0)

    run(main(), network)
    with pytest.raises(NetworkSetupError, match="new network"):
        run(main(), network)


def test_a_network_is_set_up_with_care() -> None:
    network = network_with()
    for name, ip in (("server", "192.0.2.7"), ("third", SERVER_IP), ("fourth", "127.0.0.1")):
        with pytest.raises(NetworkSetupError, match="of its own"):
            network.add_host(name, ip)
    with pytest.raises(NetworkSetupError, match="no IPv4 address"):
        network.add_host("fifth", "2001:db8::1")
    link = Link(delay_s=0, seed=1, name="x")
    with pytest.raises(NetworkSetupError, match="cannot be joined"):
        network.add_path("server", "client", link, link)
    with pytest.raises(NetworkSetupError, match=r"client, server"), network.on("nobody"):
        pass


def test_three_hosts_have_paths_of_their_own() -> None:
    network = network_with()
    network.add_host("upstream", "203.0.113.1")
    network.add_path(
        "server",
        "upstream",
        Link(delay_s=1, seed=1, name="a"),
        Link(delay_s=2, seed=1, name="b"),
    )

    async def main() -> None:
        await opened(Echo, local_addr=("203.0.113.1", 7))
        with network.on("server"):
            transport, inbox = await opened(Inbox, remote_addr=("upstream", 7))
        transport.sendto(b"far")
        assert (await inbox.next())[:2] == (3.0, b"far")
        with pytest.raises(OSError, match="unreachable"):
            await opened(Inbox, remote_addr=("upstream", 7))

    run(main(), network)
