"""Leases, in virtual time: renewed while they can be, and given up before they can be another's."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from eloquent_netem.vloop import VirtualNetwork, run
from eloquent_server.lease import RENEW_TURNS, Leases
from eloquent_server.store_types import StoreAwayError, TurnRecord, TurnState

LENGTH_S = 6.0


class Store:
    """Grants leases, and knows until when; it can be away, slow, or give a turn to another."""

    def __init__(self) -> None:
        self.until_s: dict[TurnRecord, float] = {}
        self.is_away = False
        self.delay_s = 0.0
        self.taken: set[TurnRecord] = set()
        self.asked: list[int] = []

    def grant(self, record: TurnRecord) -> None:
        self.until_s[record] = asyncio.get_running_loop().time() + LENGTH_S

    async def renew(self, records: Sequence[TurnRecord]) -> list[bool]:
        self.asked.append(len(records))
        await asyncio.sleep(self.delay_s)
        if self.is_away:
            raise StoreAwayError("away")
        for record in records:
            self.grant(record)
        return [record not in self.taken for record in records]


class Bench:
    """Leases on a store; what is lost is written down with the time that was left."""

    def __init__(self) -> None:
        self.store = Store()
        self.lost: list[tuple[TurnRecord, float]] = []
        self.leases = Leases(LENGTH_S, self.store.renew, self._on_lost)

    def take(self, number: int = 0) -> TurnRecord:
        record = TurnRecord(
            row=0,
            principal="local",
            turn_id=number.to_bytes(16),
            secret_hash=bytes(32),
            body_hash=bytes(32),
            state=TurnState.OPEN,
            created_s=0.0,
            updated_s=0.0,
        )
        asked_s = asyncio.get_running_loop().time()
        self.store.grant(record)
        self.leases.take(record, asked_s)
        return record

    def _on_lost(self, record: TurnRecord) -> None:
        left_s = self.store.until_s[record] - asyncio.get_running_loop().time()
        self.lost.append((record, left_s))


def virtually(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        bench = Bench()
        try:
            await test(bench)
        finally:
            await bench.leases.close()

    run(main(), VirtualNetwork())


def test_a_lease_is_kept_while_it_is_renewed() -> None:
    async def test(bench: Bench) -> None:
        record = bench.take()
        for _ in range(100):
            await asyncio.sleep(LENGTH_S)
            assert bench.store.until_s[record] > asyncio.get_running_loop().time()
        assert bench.lost == []
        assert bench.leases.of(*record.key) is record

    virtually(test)


def test_a_lease_that_cannot_be_renewed_is_given_up_while_it_still_runs() -> None:
    async def test(bench: Bench) -> None:
        first = bench.take()
        await asyncio.sleep(LENGTH_S / 2)
        bench.store.is_away = True
        second = bench.take(1)
        await asyncio.sleep(2 * LENGTH_S)
        assert [record for record, _ in bench.lost] == [first, second]
        assert all(0 < left_s <= 0.1 * LENGTH_S + 1e-6 for _, left_s in bench.lost)
        assert bench.leases.held == []

    virtually(test)


def test_an_answer_that_is_late_does_not_lengthen_a_lease_beyond_the_store_s() -> None:
    async def test(bench: Bench) -> None:
        bench.store.delay_s = 0.8 * LENGTH_S
        bench.take()
        await asyncio.sleep(LENGTH_S)
        assert len(bench.lost) == 1  # the answer came after the time was over
        assert bench.lost[0][1] > 0

    virtually(test)


def test_a_lease_that_is_another_s_by_now_is_lost_at_the_next_renewal() -> None:
    async def test(bench: Bench) -> None:
        kept, taken = bench.take(), bench.take(1)
        bench.store.taken.add(taken)
        await asyncio.sleep(LENGTH_S)
        assert [record for record, _ in bench.lost] == [taken]
        assert bench.leases.held == [kept]

    virtually(test)


def test_a_store_that_comes_back_in_time_is_no_loss() -> None:
    async def test(bench: Bench) -> None:
        bench.take()
        for _ in range(20):
            bench.store.is_away = True
            await asyncio.sleep(LENGTH_S / 2)
            bench.store.is_away = False
            await asyncio.sleep(LENGTH_S / 2)
        assert bench.lost == []

    virtually(test)


def test_a_lease_that_was_dropped_is_not_lost_and_not_renewed() -> None:
    async def test(bench: Bench) -> None:
        record = bench.take()
        assert bench.leases.drop(record)
        assert not bench.leases.drop(record)
        bench.leases.lose(record)
        await asyncio.sleep(3 * LENGTH_S)
        assert (bench.lost, bench.store.asked) == ([], [])

    virtually(test)


def test_a_new_lease_on_a_turn_takes_the_old_one_s_place() -> None:
    async def test(bench: Bench) -> None:
        old, new = bench.take(), bench.take()
        bench.leases.lose(old)
        assert not bench.leases.drop(old)
        assert bench.leases.of(*new.key) is new
        assert bench.leases.held == [new]
        assert [record for record, _ in bench.lost] == [old]
        await asyncio.sleep(0)

    virtually(test)


@pytest.mark.parametrize("turns", [1, RENEW_TURNS, 2 * RENEW_TURNS + 1])
def test_many_leases_are_renewed_by_few_calls(turns: int) -> None:
    async def test(bench: Bench) -> None:
        for number in range(turns):
            bench.take(number)
        await asyncio.sleep(LENGTH_S / 3 + 0.01)
        assert sum(bench.store.asked) == turns
        assert len(bench.store.asked) == -(-turns // RENEW_TURNS)

    virtually(test)
