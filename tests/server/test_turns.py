"""The hub: turns that outlive their readers. The store is real, the readers write down all."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from hub_readers import BODY, DEADLINE_S, Notes, Script, names

from eloquent.core.events import End, Failure, TextDelta
from eloquent.core.wire import Request
from eloquent.errors import RequestError
from eloquent_server.store import StoreFullError, TokenStore
from eloquent_server.store_sqlite import StoreDatabase
from eloquent_server.store_writer import Write
from eloquent_server.turns import Turn, TurnHandler, TurnHub


@asynccontextmanager
async def hub_with(
    handler: TurnHandler, path: Path | None = None, *, grace_s: float = 60.0
) -> AsyncIterator[TurnHub]:
    hub = TurnHub(handler, TokenStore.open(path), grace_s=grace_s)
    try:
        yield hub
    finally:
        await hub.close()


async def test_an_answer_is_read_whole_and_leaves_the_memory() -> None:
    script = Script("to ", "be")
    async with hub_with(script) as hub:
        reader = Notes(*names())
        hub.on_request(reader)
        script.go()
        *deltas, end = await reader.finished()
        assert deltas == [TextDelta("to "), TextDelta("be")]
        assert isinstance(end, End)
        assert (end.finish_reason, end.completion_tokens) == ("stop", 2)
        hub.on_gone(reader)
        assert (hub.generating, hub.readers) == (0, 0)


async def test_the_same_request_twice_is_generated_once() -> None:
    script = Script("once")
    async with hub_with(script) as hub:
        turn_id, secret = names()
        first, second = Notes(turn_id, secret), Notes(turn_id, secret, is_owner=False)
        hub.on_request(first)
        hub.on_request(second)
        script.go()
        await asyncio.gather(first.finished(), second.finished())
        assert first.text == second.text == "once"
        late = Notes(turn_id, secret)
        hub.on_gone(first)
        hub.on_gone(second)
        hub.on_request(late)  # brought back from the store
        await late.finished()
        assert late.text == "once"
        assert script.asked == 1


async def test_a_reader_that_comes_back_gets_the_rest_and_nothing_twice() -> None:
    script = Script("one ", "two ", "three")
    async with hub_with(script) as hub:
        turn_id, secret = names()
        first = Notes(turn_id, secret)
        hub.on_request(first)
        script.go(1)
        await first.until(lambda: first.text == "one ")
        hub.on_gone(first)
        script.go()
        second = Notes(turn_id, secret, body=b"", offset=first.offset)
        hub.on_request(second)
        await second.finished()
        assert second.text == "two three"
        assert script.asked == 1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"secret": bytes(16)}, "unknown_turn"),
        ({"turn_id": bytes(16)}, "unknown_turn"),
        ({"body": b'{"messages": [1]}'}, "turn_conflict"),
        ({"offset": 1000}, "bad_offset"),
        ({"turn_id": bytes(16), "body": BODY, "offset": 6}, "unknown_turn"),
    ],
    ids=["secret", "id", "body", "offset", "id of a lost turn"],
)
@pytest.mark.parametrize("is_running", [True, False], ids=["running", "stored"])
async def test_who_may_not_read_is_told_why(
    change: dict[str, bytes | int], code: str, is_running: bool
) -> None:
    script = Script("word")
    async with hub_with(script) as hub:
        turn_id, secret = names()
        owner = Notes(turn_id, secret)
        hub.on_request(owner)
        if not is_running:
            script.go()
            await owner.finished()
            hub.on_gone(owner)
        options = {"turn_id": turn_id, "secret": secret, "body": b"", **change}
        other = Notes(**options)  # type: ignore[arg-type]
        hub.on_request(other)
        await other.finished()
        assert other.rejected is not None
        assert other.rejected[0] == code
        assert owner.rejected is None
        await asyncio.sleep(0)
        assert script.asked == 1


async def test_only_the_owner_s_cancel_stops_the_generation() -> None:
    script = Script("so far", " and on")
    async with hub_with(script) as hub:
        turn_id, secret = names()
        owner, guest = Notes(turn_id, secret), Notes(turn_id, secret, body=b"", is_owner=False)
        hub.on_request(owner)
        hub.on_request(guest)
        script.go(1)
        await guest.until(lambda: guest.text == "so far")
        leaving = Notes(turn_id, secret, body=b"", is_owner=False)
        hub.on_request(leaving)
        hub.on_cancel(leaving)
        hub.on_gone(leaving)
        assert hub.generating == 1
        hub.on_cancel(owner)
        hub.on_gone(owner)
        end = (await guest.finished())[-1]
        assert isinstance(end, End)
        assert end.finish_reason == "cancelled"
        await asyncio.wait_for(script.ended.wait(), DEADLINE_S)
        assert hub.generating == 0


@pytest.mark.parametrize("is_gone", [False, True])
async def test_a_cancel_that_comes_with_the_request_is_not_missed(is_gone: bool) -> None:
    script = Script("never said")
    async with hub_with(script) as hub:
        turn_id, secret = names()
        owner = Notes(turn_id, secret)
        hub.on_request(owner)
        hub.on_cancel(owner)
        if is_gone:
            hub.on_gone(owner)
        late = Notes(turn_id, secret, body=b"", is_owner=False)
        hub.on_request(late)
        end = (await late.finished())[-1]
        assert isinstance(end, End)
        assert (late.text, end.finish_reason) == ("", "cancelled")
        assert hub.generating == 0


async def test_who_does_not_know_the_secret_cannot_cancel_a_turn_that_is_looked_up() -> None:
    script = Script("said")
    async with hub_with(script) as hub:
        turn_id, secret = names()
        owner, stranger = Notes(turn_id, secret), Notes(turn_id, names()[1], body=b"")
        hub.on_request(owner)
        hub.on_request(stranger)
        hub.on_cancel(stranger)
        hub.on_gone(stranger)
        script.go()
        end = (await owner.finished())[-1]
        assert isinstance(end, End)
        assert (owner.text, end.finish_reason) == ("said", "stop")


async def test_an_owner_that_comes_back_takes_the_place_of_its_old_reader() -> None:
    script = Script("a", "b")
    async with hub_with(script) as hub:
        turn_id, secret = names()
        old = Notes(turn_id, secret)
        hub.on_request(old)
        script.go(1)
        await old.until(lambda: old.text == "a")
        new = Notes(turn_id, secret, body=b"", offset=old.offset)
        hub.on_request(new)
        assert old.rejected is not None
        assert old.rejected[0] == "replaced"
        hub.on_gone(old)
        script.go()
        await new.finished()
        assert new.text == "b"


async def test_a_turn_that_nobody_reads_is_given_up_after_the_grace_time() -> None:
    script = Script("unheard")
    async with hub_with(script, grace_s=0.01) as hub:
        turn_id, secret = names()
        reader = Notes(turn_id, secret)
        hub.on_request(reader)
        script.go(1)
        await reader.until(lambda: reader.text == "unheard")
        hub.on_gone(reader)
        await asyncio.wait_for(script.ended.wait(), DEADLINE_S)
        late = Notes(turn_id, secret, body=b"")
        hub.on_request(late)
        end = (await late.finished())[-1]
        assert isinstance(end, End)
        assert (late.text, end.finish_reason) == ("unheard", "cancelled")


async def test_a_reader_within_the_grace_time_keeps_the_turn_alive() -> None:
    script = Script("still ", "here")
    async with hub_with(script, grace_s=0.05) as hub:
        turn_id, secret = names()
        reader = Notes(turn_id, secret)
        hub.on_request(reader)
        hub.on_gone(reader)
        back = Notes(turn_id, secret, body=b"")
        hub.on_request(back)
        await asyncio.sleep(0.1)
        script.go()
        await back.finished()
        assert back.text == "still here"


async def fail_at_once(turn: Turn) -> None:
    raise ZeroDivisionError("a fault")


async def fail_later(turn: Turn) -> None:
    turn.append(TextDelta("half"))
    raise ZeroDivisionError("a fault")


async def forget_to_close(turn: Turn) -> None:
    turn.append(TextDelta("half"))


async def decline(turn: Turn) -> None:
    turn.reject(RequestError("unknown_model", "No such model."))


async def test_a_fault_before_the_first_event_declines_and_frees_the_id() -> None:
    async with hub_with(fail_at_once) as hub:
        for _ in range(2):
            reader = Notes(bytes(16), bytes(16))
            hub.on_request(reader)
            await reader.finished()
            assert reader.rejected is not None
            assert reader.rejected[0] == "internal_error"


@pytest.mark.parametrize("handler", [fail_later, forget_to_close])
async def test_a_fault_in_mid_answer_is_in_the_log_for_later_readers_too(
    handler: TurnHandler,
) -> None:
    async with hub_with(handler) as hub:
        turn_id, secret = names()
        for _ in range(2):
            reader = Notes(turn_id, secret)
            hub.on_request(reader)
            text, failure, end = await reader.finished()
            assert text == TextDelta("half")
            assert isinstance(failure, Failure)
            assert failure.code == "internal_error"
            assert isinstance(end, End)
            assert end.finish_reason == "error"
            hub.on_gone(reader)


async def test_a_declined_turn_may_be_asked_again() -> None:
    async with hub_with(decline) as hub:
        for _ in range(2):
            reader = Notes(bytes(16), bytes(16))
            hub.on_request(reader)
            await reader.finished()
            assert reader.rejected == ("unknown_model", "No such model.")
        assert hub.generating == 0


async def test_readers_of_a_stopping_server_are_told_and_new_ones_declined() -> None:
    script = Script("so far")
    async with hub_with(script) as hub:
        reader = Notes(*names())
        hub.on_request(reader)
        script.go(1)
        await reader.until(lambda: reader.text == "so far")
        await hub.close()
        *_, failure, end = await reader.finished()
        assert isinstance(failure, Failure)
        assert (failure.code, end.finish_reason) == ("unavailable", "error")  # type: ignore[union-attr]
        late = Notes(*names())
        hub.on_request(late)
        assert late.rejected is not None
        assert late.rejected[0] == "unavailable"


async def test_a_turn_outlives_its_server(tmp_path: Path) -> None:
    path = tmp_path / "turns.sqlite"
    turn_id, secret = names()
    script = Script("kept ", "for ", "later")
    async with hub_with(script, path) as hub:
        reader = Notes(turn_id, secret)
        hub.on_request(reader)
        script.go()
        await reader.finished()
    async with hub_with(Script(), path) as hub:
        for offset in (0, reader.offset // 2 and 7, reader.offset):
            again = Notes(turn_id, secret, body=b"", offset=offset)
            hub.on_request(again)
            if offset < reader.offset:
                await again.finished()
                assert again.text == "kept for later"[len("kept ") if offset else 0 :]
            else:
                await asyncio.sleep(0)
                assert again.rejected is None
            hub.on_gone(again)


async def test_a_turn_cut_off_with_its_server_ends_with_what_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "turns.sqlite"
    turn_id, secret = names()
    script = Script("stored ", "never said")
    store = TokenStore.open(path)
    hub = TurnHub(script, store)
    reader = Notes(turn_id, secret)
    hub.on_request(reader)
    script.go(1)
    await reader.until(lambda: reader.text == "stored ")
    await store.close()  # as if the process had gone: nothing is written any more
    script.go()
    await asyncio.wait_for(script.ended.wait(), DEADLINE_S)
    other = Script("anew")
    other.go()
    async with hub_with(other, path) as restarted:
        again = Notes(turn_id, secret, body=b"", offset=reader.offset)
        restarted.on_request(again)
        failure, end = await again.finished()
        assert isinstance(failure, Failure)
        assert isinstance(end, End)
        assert (failure.code, end.finish_reason) == ("interrupted", "error")
        assert other.asked == 0


@pytest.mark.parametrize("has_go_on", [False, True])
async def test_a_turn_cut_off_before_its_first_word_is_generated_by_the_next_server(
    tmp_path: Path, has_go_on: bool
) -> None:
    path = tmp_path / "turns.sqlite"
    turn_id, secret = names()
    script = Script("never said")
    store = TokenStore.open(path)
    hub = TurnHub(script, store)
    reader = Notes(turn_id, secret)
    hub.on_request(reader)
    await reader.news.wait()
    await store.close()  # as if the process had gone
    other = Script("said")
    other.go()
    restarted = TurnHub(other, TokenStore.open(path), go_on=script if has_go_on else None)
    restarted.recover()
    again = Notes(turn_id, secret, body=b"")
    restarted.on_request(again)
    await again.finished()
    assert (again.text, again.rejected, other.asked) == ("said", None, 1)
    await restarted.close()
    script.go()
    await asyncio.wait_for(script.ended.wait(), DEADLINE_S)


async def test_a_turn_goes_on_after_a_server_that_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "turns.sqlite"
    turn_id, secret = names()
    script = Script("stored ", "never said")
    hub = TurnHub(script, TokenStore.open(path), go_on=script)
    reader = Notes(turn_id, secret)
    hub.on_request(reader)
    script.go(1)
    await reader.until(lambda: reader.text == "stored ")
    await hub.close(is_restart=True)
    assert reader.rejected is None
    rest = Script("and the rest")
    rest.go()
    restarted = TurnHub(Script(), TokenStore.open(path), go_on=rest)
    restarted.recover()
    again = Notes(turn_id, secret, body=b"", offset=reader.offset)
    restarted.on_request(again)
    await again.finished()
    assert again.text == "and the rest"
    await restarted.close()


async def test_what_cannot_be_stored_is_not_sent(tmp_path: Path) -> None:
    script = Script("x" * 200)
    store = TokenStore.open(tmp_path / "t", max_turn_bytes=100)
    hub = TurnHub(script, store)
    reader = Notes(*names())
    hub.on_request(reader)
    script.go()
    await reader.finished()
    assert reader.rejected is not None
    assert reader.rejected[0] == "not_stored"
    assert str(tmp_path) not in reader.rejected[1]  # where it is kept is not the reader's business
    assert (reader.text, hub.open, store.turns) == ("", 0, 0)
    await hub.close()


async def test_an_answer_of_which_a_part_could_not_be_stored_is_not_ended_but_given_up() -> None:
    script = Script("said ", "never said", "nor this")
    store = TokenStore.open(None)
    hub = TurnHub(script, store)
    turn_id, secret = names()
    reader = Notes(turn_id, secret)
    hub.on_request(reader)
    script.go(1)
    await reader.until(lambda: reader.text == "said ")
    record = store.find("local", turn_id)
    assert record is not None
    record.failure = StoreFullError("as a commit that failed has it set")
    script.go()
    await reader.finished()
    assert reader.rejected is not None
    assert (reader.rejected[0], hub.open) == ("not_stored", 0)
    await hub.close()


@pytest.mark.parametrize(
    ("turn_bytes", "all_bytes", "advice"), [(100, 1000, "shorter"), (1000, 100, "whoever runs it")]
)
async def test_an_answer_for_which_there_is_no_more_room_ends_with_what_there_is_of_it(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    turn_bytes: int,
    all_bytes: int,
    advice: str,
) -> None:
    path = tmp_path / "turns.sqlite"
    script = Script("said ", "x" * 200, "never said")
    store = TokenStore.open(path, max_turn_bytes=turn_bytes, max_bytes=all_bytes)
    hub = TurnHub(script, store)
    reader = Notes(*names())
    hub.on_request(reader)
    script.go()
    text, failure, end = await reader.finished()
    assert text == TextDelta("said ")
    assert isinstance(failure, Failure)
    assert (failure.code, advice in failure.message) == ("not_stored", True)
    assert isinstance(end, End)
    assert end.finish_reason == "error"
    await asyncio.wait_for(script.ended.wait(), DEADLINE_S)
    assert (hub.generating, hub.open) == (0, 1)
    await hub.close()
    assert [record.message for record in caplog.records if "ends early" not in record.message] == []

    # It does not stay open: its time to live runs, and no later start goes on with it.
    store = TokenStore.open(path)
    assert (store.turns, store.unfinished()) == (1, [])
    await store.close()


async def test_a_turn_that_cannot_be_read_is_not_asked_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "turns.sqlite"
    turn_id, secret = names()
    script = Script("said")
    async with hub_with(script, path) as hub:
        reader = Notes(turn_id, secret)
        hub.on_request(reader)
        script.go()
        await reader.finished()
    with closing(sqlite3.connect(path)) as file:
        ((log,),) = file.execute("SELECT data FROM chunk")
        file.execute("UPDATE chunk SET data = ?", (log.replace(b"said", b"paid"),))
        file.commit()
    async with hub_with(script, path) as hub:
        again = Notes(turn_id, secret, body=b"")
        hub.on_request(again)
        await again.finished()
        assert again.rejected is not None
        assert again.rejected[0] == "internal_error"  # clients take `unavailable` for a moment's


async def test_a_turn_that_is_deleted_is_cancelled_and_never_generated_again() -> None:
    script = Script("to ", "be")
    turn_id, secret = names()
    async with hub_with(script) as hub:
        reader = Notes(turn_id, secret)
        hub.on_request(reader)
        script.go(1)
        await reader.until(lambda: reader.text == "to ")
        with pytest.raises(RequestError, match="no such turn"):
            await hub.delete(Request(turn_id, b"", names()[1]))
        await hub.delete(Request(turn_id, b"", secret))
        assert reader.rejected is not None
        await asyncio.wait_for(script.ended.wait(), DEADLINE_S)
        again = Notes(turn_id, secret)
        hub.on_request(again)
        await again.finished()
        assert again.rejected is not None
        assert again.rejected[0] == "unknown_turn"
        with pytest.raises(RequestError, match="no such turn"):
            await hub.delete(Request(turn_id, b"", secret))
    assert script.asked == 1


async def test_a_turn_that_has_ended_is_deleted_from_the_store() -> None:
    script = Script("to ")
    turn_id, secret = names()
    async with hub_with(script) as hub:
        reader = Notes(turn_id, secret)
        hub.on_request(reader)
        script.go()
        await reader.finished()
        hub.on_gone(reader)
        await hub.delete(Request(turn_id, b"", secret))
        later = Notes(turn_id, secret, body=b"")
        hub.on_request(later)
        await later.finished()
        assert later.rejected is not None


def make_read_only(store: TokenStore, is_on: bool) -> None:
    """Have SQLite itself refuse to write from now on, or no longer."""

    def run(database: StoreDatabase) -> None:
        database._connection.execute(f"PRAGMA query_only = {is_on:d}")

    store._writer.put(Write(run))


async def test_a_turn_that_could_not_be_deleted_is_deleted_when_that_is_asked_again(
    tmp_path: Path,
) -> None:
    script = Script("to ")
    turn_id, secret = names()
    store = TokenStore.open(tmp_path / "turns.sqlite")
    hub = TurnHub(script, store)
    reader = Notes(turn_id, secret)
    hub.on_request(reader)
    script.go()
    await reader.finished()
    make_read_only(store, True)
    with pytest.raises(RequestError, match="still there") as raised:
        await hub.delete(Request(turn_id, b"", secret))
    assert raised.value.code == "unavailable"
    assert str(tmp_path) not in raised.value.message
    make_read_only(store, False)
    await hub.delete(Request(turn_id, b"", secret))
    later = Notes(turn_id, secret, body=b"")
    hub.on_request(later)
    await later.finished()
    assert later.rejected is not None
    assert later.rejected[0] == "unknown_turn"
    await hub.close()


async def test_a_reader_can_ask_what_its_turn_asked_and_who_waits_before_it() -> None:
    script = Script("to ", "be")
    async with hub_with(script) as hub:
        readers = [Notes(*names(), body=b"%d" % number) for number in range(3)]
        for reader in readers:
            hub.on_request(reader)
            await reader.news.wait()
        assert [hub.waiting_before(reader) for reader in readers] == [0, 1, 2]
        assert hub.body_of(readers[1]) == b"1"
        script.go(1)
        await asyncio.sleep(0)
        await readers[0].until(lambda: readers[0].text == "to ")
        assert [hub.waiting_before(reader) for reader in readers] == [0, 0, 1]
        assert hub.body_of(Notes(*names())) == b""
