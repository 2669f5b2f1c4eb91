"""Files that cannot be used, and disks that fail: said clearly, and never taken for stored."""

import asyncio
import hashlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tools import needs_tool

from eloquent_server.store import (
    StoreClosedError,
    StoreError,
    StoreFullError,
    TokenStore,
    TurnRecord,
)
from eloquent_server.store_sqlite import APPLICATION_ID, SCHEMA_VERSION, StoreDatabase
from eloquent_server.store_writer import Write

HASH = hashlib.sha256(b"").digest()
DEADLINE_S = 20.0
"Ends a hang; decides nothing."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.db"


def create(store: TokenStore, number: int) -> TurnRecord:
    return store.create("local", bytes([number]) * 16, HASH, b"body", HASH)


async def stored(call: Callable[..., None], *arguments: object) -> StoreError | None:
    outcome: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()
    call(*arguments, on_stored=outcome.set_result)
    return await asyncio.wait_for(outcome, DEADLINE_S)


async def pragma(store: TokenStore, text: str) -> None:
    """Have SQLite itself fail from now on, or no longer; the real errors, without a real disk."""
    done: asyncio.Future[StoreError | None] = asyncio.get_running_loop().create_future()

    def run(database: StoreDatabase) -> None:
        database._connection.execute(f"PRAGMA {text}")

    store._writer.put(Write(run, None, asyncio.get_running_loop(), done.set_result))
    assert await done is None


async def test_a_full_disk_ends_the_turns_that_were_being_stored(path: Path) -> None:
    store = TokenStore.open(path)
    record, idle = create(store, 1), create(store, 2)
    assert await stored(store.append, record, 0, b"stored") is None
    await pragma(store, "max_page_count = 1")
    outcomes: list[StoreError | None] = []
    fresh = create(store, 3)
    store.append(record, 6, bytes(20_000), on_stored=outcomes.append)
    store.append(record, 20_006, b"x", on_stored=outcomes.append)
    error = await stored(store.append, fresh, 0, b"x")
    assert outcomes == [error, error]
    assert isinstance(error, StoreError)
    assert "is full" in str(error)
    assert "Free some" in str(error)
    for call in (store.append, store.close_turn):
        with pytest.raises(StoreError, match="is full"):
            call(record, 20_007, b"y")

    # There is room again: other turns go on, and what failed left nothing half done.
    await pragma(store, "max_page_count = 1000000")
    assert store.find("local", fresh.turn_id) is None
    assert store.size == record.size + idle.size
    assert await stored(store.append, create(store, 3), 0, b"again") is None
    assert await stored(store.append, idle, 0, b"idle") is None
    found = await store.load("local", record.turn_id)
    assert found is not None
    assert found.log == b"stored"
    await store.close()
    store = TokenStore.open(path)
    assert [(turn.turn_id[0], turn.length) for turn in store.unfinished()] == [
        (1, 6),
        (2, 4),
        (3, 5),
    ]
    await store.close()


async def test_a_turn_that_failed_can_be_deleted(path: Path) -> None:
    store = TokenStore.open(path)
    record = create(store, 1)
    assert await stored(store.append, record, 0, b"text") is None
    await pragma(store, "query_only = 1")
    error = await stored(store.append, record, 4, b"more")
    assert "cannot be written" in str(error)
    with pytest.raises(StoreError, match="cannot be written"):
        await store.delete("local", record.turn_id)
    await pragma(store, "query_only = 0")
    assert await store.delete("local", record.turn_id)
    await store.close()
    store = TokenStore.open(path)
    assert store.unfinished() == []
    await store.close()


async def test_a_turn_whose_deletion_failed_is_still_there_and_deleted_when_asked_again(
    path: Path,
) -> None:
    store = TokenStore.open(path)
    record = create(store, 1)
    assert await stored(store.close_turn, record, 0, b"text") is None
    size = store.size
    await pragma(store, "query_only = 1")
    with pytest.raises(StoreError, match="cannot be written"):
        await store.delete("local", record.turn_id)
    await pragma(store, "query_only = 0")
    found = await store.load("local", record.turn_id)
    assert found is not None
    assert (found.log, found.record.secret_hash, store.size) == (b"text", HASH, size)
    assert await store.delete("local", record.turn_id)
    assert (await store.load("local", record.turn_id), store.size) == (None, 0)
    await store.close()
    store = TokenStore.open(path)
    assert await store.load("local", record.turn_id) is None
    await store.close()


async def test_a_tombstone_that_could_not_be_removed_is_not_in_the_way(path: Path) -> None:
    times = iter([0.0] * 4)
    store = TokenStore.open(path, tombstone_ttl_s=1.0, now=lambda: next(times, 2.0))
    assert await store.delete("local", create(store, 1).turn_id)
    await pragma(store, "query_only = 1")
    store.expire()
    await store._read(lambda _: None)  # or both would be one transaction
    await pragma(store, "query_only = 0")
    assert await stored(store.append, create(store, 1), 0, b"anew") is None
    await store.close()


async def test_reading_what_could_not_be_stored_says_so(path: Path) -> None:
    store = TokenStore.open(path)
    await pragma(store, "query_only = 1")
    record = create(store, 1)
    with pytest.raises(StoreError, match="cannot be written"):
        await store.load("local", record.turn_id)
    await store.close()


async def test_a_fault_of_our_own_is_reported_and_the_thread_lives(path: Path) -> None:
    store = TokenStore.open(path)
    record = create(store, 1)
    error = await stored(store.append, record, 0, "not bytes, but what sqlite3 refuses: \udc80")
    assert "has a fault" in str(error)
    assert await stored(store.append, create(store, 2), 0, b"fine") is None
    await store.close()


def test_a_disk_that_refuses_to_write(path: Path) -> None:
    script = """
import asyncio, resource, sys
from pathlib import Path
from eloquent_server.store import TokenStore
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
async def main():
    store = TokenStore.open(Path(sys.argv[1]))
    record = store.create("local", bytes(16), bytes(32), b"body", bytes(32))
    outcomes = []
    for number in range(200):
        try:
            store.append(record, 1000 * number, bytes(1000), on_stored=outcomes.append)
        except Exception as error:
            print(type(error).__name__, error)
            break
        await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    print(outcomes.index(None), [error for error in outcomes if error][0])
    await store.close()
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith("StoreError The disk of")
    assert second.startswith("0 The disk of")


SMALL_DISK = """
import asyncio, errno, os, sys
from pathlib import Path
from eloquent_server.store import StoreError, TokenStore
disk = Path(sys.argv[1])
log, filler = disk / "tokens.db-wal", disk / "filler"

async def stored(call, *arguments):
    outcome = asyncio.get_running_loop().create_future()
    try:
        call(*arguments, on_stored=outcome.set_result)
    except StoreError as error:
        return error
    return await outcome

def create(store, number):
    return store.create("local", bytes([number]) * 16, bytes(32), b"body", bytes(32))

async def main():
    store = TokenStore.open(disk / "tokens.db")
    first, longest = create(store, 1), 0
    for number in range(3000):
        assert await stored(store.append, first, 10 * number, b"0123456789") is None
        longest = max(longest, log.stat().st_size)
    print(longest)
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError as error:
            assert error.errno == errno.ENOSPC
    second = create(store, 2)
    outcome, number = None, 0
    while outcome is None:  # the log's last page may still have room
        outcome = await stored(store.append, second, 10_000 * number, bytes(10_000))
        number += 1
    print(outcome)
    print(await stored(store.append, second, 10_000 * number, b"and on"))
    filler.unlink()
    third = create(store, 3)
    assert await stored(store.close_turn, third, 0, b"there is room") is None
    assert await stored(store.append, first, 30_000, b"so it goes on") is None
    await store.close()
    store = TokenStore.open(disk / "tokens.db")
    for number in (1, 3):
        print((await store.load("local", bytes([number]) * 16)).log[-13:].decode())
    await store.close()
asyncio.run(main())
"""
DISK_BYTES = 3 << 20


async def test_a_store_says_when_it_takes_no_turns(path: Path) -> None:
    store = TokenStore.open(path)
    await pragma(store, "max_page_count = 1")
    with pytest.raises(StoreError, match="is full"):
        await store.check()
    await pragma(store, "max_page_count = 1000000")
    await store.check()
    create(store, 1)
    size = store.size
    await store.close()
    with pytest.raises(StoreClosedError, match="shutting down"):
        await store.check()
    again = TokenStore.open(path, max_bytes=size)
    with pytest.raises(StoreFullError, match="as they expire"):
        await again.check()
    assert len(again.unfinished()) == 1
    await again.close()


@needs_tool("unshare")
def test_a_small_disk_is_enough_and_one_that_was_full_is_used_again(tmp_path: Path) -> None:
    mounting = f'mount -t tmpfs -o size={DISK_BYTES} none "$0" && exec "$@"'
    entry = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    words = ["sh", "-c", mounting, str(tmp_path)]
    tried = subprocess.run(
        [*entry, *words, "true"], capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    if tried.returncode and os.environ.get("CI") != "true":
        pytest.skip(f"needs a file system of its own: {tried.stderr.strip()}")
    done = subprocess.run(
        [*entry, *words, sys.executable, "-c", SMALL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    longest, first, second, *logs = done.stdout.splitlines()
    assert int(longest) < DISK_BYTES / 2
    assert first.startswith("The disk of")
    assert "is full" in first
    assert second.startswith("The disk of")
    assert logs == ["so it goes on", "there is room"]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path.write_bytes(b"not a database" * 1000), "is damaged"),
        (lambda path: path.mkdir(), "cannot be opened"),
    ],
    ids=["another file", "a directory"],
)
def test_what_cannot_be_a_store(
    path: Path, prepare: Callable[[Path], object], message: str
) -> None:
    prepare(path)
    with pytest.raises(StoreError, match=message):
        TokenStore.open(path)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="a directory of its own"):
        TokenStore.open(tmp_path / "file" / "tokens.db")


def test_another_programs_database_is_left_as_it_is(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE notes (text)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        TokenStore.open(path)
    assert path.read_bytes() == before


def test_a_newer_releases_store_is_left_as_it_is(path: Path) -> None:
    StoreDatabase(path, durable=False).close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"newer release \(schema 2; this one knows 1\)"):
        TokenStore.open(path)
    assert path.read_bytes() == before


def test_a_start_that_was_cut_off_is_made_good(path: Path) -> None:
    path.touch()
    StoreDatabase(path, durable=False).close()
    StoreDatabase(path, durable=True).close()


async def test_a_damaged_file_is_named(path: Path) -> None:
    store = TokenStore.open(path)
    record = create(store, 1)
    for number in range(200):
        store.append(record, 1000 * number, bytes([65 + number % 26]) * 1000)
    await store.close()
    damage(path)
    with pytest.raises(StoreError, match=r"is damaged .* ends in -wal"):
        await _load_all(path)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8 * 1024 : 100 * 1024] = b"\x55" * (92 * 1024)
    path.write_bytes(data)


async def _load_all(path: Path) -> None:
    store = TokenStore.open(path)
    try:
        for record in store.unfinished():
            await store.load(record.principal, record.turn_id)
    finally:
        await store.close()
