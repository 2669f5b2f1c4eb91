"""The token store and the process's end: killed in mid-write, and two processes on one file."""

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from eloquent_server.store import StoreLockedError, TokenStore, TurnState

TURNS = 5
DEADLINE_S = 30.0
"Ends a hang; decides nothing."

# Appends to every turn without end, as fast as the store takes it, and says on standard output
# what was reported as stored: the turn, and how many of its chunks. Turn 0 is ended in between.
WRITER = """
import asyncio, sys
from pathlib import Path
from eloquent_server import store_sqlite
from eloquent_server.store import TokenStore
from test_store_crash import TURNS, BODY, HASH, chunk, turn_id

store_sqlite.CHECKPOINT_BYTES = 50 << 10  # so that it is often killed in one of these, too

async def main():
    store = TokenStore.open(Path(sys.argv[1]))
    print("open", flush=True)
    records = [store.create("local", turn_id(turn), HASH, BODY, HASH) for turn in range(TURNS)]
    lengths = [0] * TURNS
    def report(turn, count, error):
        assert error is None, error
        print(turn, count, flush=True)
    for number in range(1_000_000):
        for turn, record in enumerate(records):
            if turn == 0 and number >= 10:
                if number == 10:
                    store.close_turn(record, lengths[0], b"", on_stored=lambda _: report(0, 10, _))
                continue
            data = chunk(turn, number)
            store.append(
                record, lengths[turn], data, continuation=b"%d" % number,
                on_stored=lambda error, turn=turn, count=number + 1: report(turn, count, error),
            )
            lengths[turn] += len(data)
        await asyncio.sleep(0.0005)

asyncio.run(main())
"""
HOLDER = """
import sys
from pathlib import Path
from eloquent_server.store import TokenStore
store = TokenStore.open(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""
BODY = b"a request's body"
HASH = hashlib.sha256(BODY).digest()


def turn_id(turn: int) -> bytes:
    return bytes([turn]) * 16


def chunk(turn: int, number: int) -> bytes:
    return b"%d:%d;" % (turn, number)


@contextmanager
def child(script: str, path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run a script on a store; it has the store open when this yields, and is killed after."""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            yield process
        finally:
            process.kill()


def open_and_end(path: Path) -> "subprocess.CompletedProcess[str]":
    """Run a process that opens a store and ends at once, without closing it."""
    return subprocess.run(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )


def kill_in_mid_write(path: Path, reports: int) -> dict[int, int]:
    """Kill a writer after so many reports; return how many chunks of each turn it reported."""
    stored: dict[int, int] = dict.fromkeys(range(TURNS), 0)
    with child(WRITER, path) as process:
        assert process.stdout is not None
        for number, line in enumerate(process.stdout):
            # The pipe may end in the middle of a line.
            if line.endswith("\n"):
                turn, count = map(int, line.split())
                stored[turn] = count
            if number == reports:
                process.kill()
    return stored


@pytest.mark.parametrize("reports", [0, 1, 30, 300, 1000, 3000])
def test_what_was_reported_stored_survives_kill_9(tmp_path: Path, reports: int) -> None:
    path = tmp_path / "tokens.db"
    stored = kill_in_mid_write(path, reports)
    assert sum(stored.values()) > 0

    async def check() -> None:
        store = TokenStore.open(path)
        for turn, count in stored.items():
            found = await store.load("local", turn_id(turn))
            assert found is not None
            chunks = found.log.count(b";")
            assert chunks >= count
            assert found.log == b"".join(chunk(turn, number) for number in range(chunks))
            if found.state is TurnState.OPEN:
                # Committed together with the text, so neither is ahead of the other.
                assert found.continuations == tuple(b"%d" % number for number in range(chunks))
                assert found.body == BODY
                store.append(found.record, len(found.log), b"and on")
        assert len(store.unfinished()) >= TURNS - 1
        for record in store.unfinished():
            found = await store.load("local", record.turn_id)
            assert found is not None
            assert found.log.endswith(b"and on")
        await store.close()

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


async def test_a_file_has_one_process(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    with child(HOLDER, path), pytest.raises(StoreLockedError, match="another process"):
        TokenStore.open(path)
    store = TokenStore.open(path)  # a killed owner leaves no lock behind
    await store.close()


async def test_a_file_has_one_owner_in_a_process_too(tmp_path: Path) -> None:
    path = tmp_path / "tokens.db"
    store = TokenStore.open(path)
    for _ in range(2):  # a refused attempt does not take the lock away
        with pytest.raises(StoreLockedError, match="one owner"):
            TokenStore.open(path)
    assert "StoreLockedError" in open_and_end(path).stderr
    await store.close()
    assert open_and_end(path).returncode == 0


def test_a_program_that_forgets_to_close_ends_all_the_same(tmp_path: Path) -> None:
    done = open_and_end(tmp_path / "tokens.db")
    assert (done.returncode, done.stdout, done.stderr) == (0, "open\n", "")
