"""The token store's file: its schema, and every statement that is run on it.

Used by one thread, the store's writer. Times are wall-clock seconds that the caller passes in.
"""

import logging
import os
import shutil
import sqlite3
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eloquent_server.store_types import StoreError, StoreLockedError, TurnRecord, TurnState

SCHEMA_VERSION = 1
APPLICATION_ID = 0x456C6F71
"Marks the file as ours (sqlite.org/fileformat2.html section 1.3.17); reads as `Eloq`."

PAGE_BYTES = 1024
"""A commit writes a page for each turn that grew by a few tokens, so pages are small."""
CHECKPOINT_BYTES = 16 << 20
"""The write-ahead log is copied into the file when it has so many bytes. That waits for the disk
and delays a commit, so it is done far less than once in a hundred commits; a page that was written
many times is copied once."""
FREE_SHARE = 0.5
"""It is copied earlier when it has this share of what is free on the disk: that may need as much
again, and a log that has filled the disk cannot be emptied any more."""

TRIED_BYTES = 8 * PAGE_BYTES

logger = logging.getLogger(__name__)

# Appending writes one row of `chunk` and nothing else. The body has a table of its own, so that
# ending a turn frees it without rewriting the row. `length` and `size` are set at the end; of open
# turns they are summed up when the file is opened.
_SCHEMA = """
CREATE TABLE turn (
    id INTEGER PRIMARY KEY,
    principal TEXT NOT NULL,
    turn_id BLOB NOT NULL,
    state INTEGER NOT NULL,
    secret_hash BLOB NOT NULL,
    body_hash BLOB NOT NULL,
    created_s REAL NOT NULL,
    updated_s REAL NOT NULL,
    length INTEGER NOT NULL,
    size INTEGER NOT NULL,
    UNIQUE (principal, turn_id)
);
CREATE TABLE body (turn INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE chunk (
    turn INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    stored_s REAL NOT NULL,
    data BLOB NOT NULL,
    continuation BLOB,
    PRIMARY KEY (turn, sequence)
) WITHOUT ROWID;
"""

_RECORDS = """
SELECT turn.id, principal, turn_id, secret_hash, body_hash, state, created_s,
    coalesce(max(stored_s), updated_s),
    length + coalesce(sum(length(data)), 0),
    size + coalesce(sum(length(data) + coalesce(length(continuation), 0)), 0),
    count(sequence)
FROM turn LEFT JOIN chunk ON chunk.turn = turn.id AND turn.state = 0
GROUP BY turn.id
"""


class StoreDatabase:
    """One open store file, locked against all others."""

    def __init__(self, path: Path | None, *, durable: bool) -> None:
        """Open or make the file; None is a private one that is gone with the process.

        Raises:
            StoreError: the file cannot be made, read or written, is not a token store, or was
                written by a newer release.
            StoreLockedError: another process has it.
        """
        self._name = "the private token store" if path is None else str(path)
        self._log_path = None if path is None else path.with_name(path.name + "-wal")
        if path is not None:
            _make_private(path)
        with self._errors():
            # "" is SQLite's name for a temporary file that no other process can see.
            self._connection = sqlite3.connect(
                "" if path is None else path, timeout=0.0, isolation_level=None
            )
        try:
            with self._errors():
                self._set_up(is_file=path is not None, durable=durable)
        except BaseException:
            self._connection.close()
            raise

    def _set_up(self, *, is_file: bool, durable: bool) -> None:
        run = self._connection.execute
        # Kept from the first statement to the last; in this mode SQLite needs no -shm file either.
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA secure_delete = ON")
        run(f"PRAGMA page_size = {PAGE_BYTES}")
        run("BEGIN EXCLUSIVE")
        self._check_or_make_schema()
        run("COMMIT")
        if is_file:
            (mode,) = run("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise StoreError(
                    f"{self._name} lies where SQLite cannot keep a write-ahead log (it offers "
                    f"{mode!r}), so tokens would not survive a crash. Put it on a local disk."
                )
            run("PRAGMA wal_autocheckpoint = 0")  # see `_checkpoint_if_due`
        run(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        if durable and sys.platform == "darwin":
            run("PRAGMA fullfsync = ON")

    def _check_or_make_schema(self) -> None:
        run = self._connection.execute
        (version,) = run("PRAGMA user_version").fetchone()
        (application,) = run("PRAGMA application_id").fetchone()
        (tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables and not application:
            for statement in _SCHEMA.split(";"):
                run(statement)
            run(f"PRAGMA application_id = {APPLICATION_ID}")
            run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif application != APPLICATION_ID:
            raise StoreError(
                f"{self._name} is an SQLite database of another program, and was left as it is. "
                "Name another file for the token store."
            )
        elif version > SCHEMA_VERSION:
            raise StoreError(
                f"{self._name} was written by a newer release (schema {version}; this one knows "
                f"{SCHEMA_VERSION}), and was left as it is. Use that release, or another file."
            )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what is done inside, all of it or nothing.

        Raises:
            StoreError: it could not be stored; nothing of it is.
        """
        with self._errors():
            try:
                self._connection.execute("BEGIN")
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite itself has rolled back after some errors, a full disk among them.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                self._checkpoint_if_due()
                raise
        self._checkpoint_if_due()

    def _checkpoint_if_due(self) -> None:
        """Copy the write-ahead log into the file, and empty it, if it is long."""
        if self._log_path is None:
            return
        try:
            size = self._log_path.stat().st_size
            free = shutil.disk_usage(self._log_path.parent).free
            if size and size >= min(CHECKPOINT_BYTES, FREE_SHARE * free):
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except (OSError, sqlite3.Error) as error:
            # What was committed is safe in the log; the next commit tries again.
            logger.debug("%s: its write-ahead log stays as it is (%s)", self._name, error)

    def try_room(self) -> None:
        """Write a body that is no turn's, and remove it."""
        self._connection.execute("INSERT INTO body VALUES (0, zeroblob(?))", (TRIED_BYTES,))
        self._connection.execute("DELETE FROM body WHERE turn = 0")

    def create(self, record: TurnRecord, body: bytes) -> None:
        """Add a turn; it takes the place of one with its id that should have been forgotten."""
        self._connection.execute(
            "INSERT OR REPLACE INTO turn VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, ?)",
            (
                record.row,
                record.principal,
                record.turn_id,
                TurnState.OPEN,
                record.secret_hash,
                record.body_hash,
                record.created_s,
                record.created_s,
                len(body),
            ),
        )
        self._connection.execute("INSERT INTO body VALUES (?, ?)", (record.row, body))

    def append(
        self,
        row: int,
        sequence: int,
        offset: int,
        *,
        stored_s: float,
        data: bytes,
        continuation: bytes | None,
    ) -> None:
        """Add a chunk to a turn's log."""
        self._connection.execute(
            "INSERT INTO chunk VALUES (?, ?, ?, ?, ?, ?)",
            (row, sequence, offset, stored_s, data, continuation),
        )

    def end(self, row: int, length: int, size: int, ended_s: float) -> None:
        """Mark a turn as ended, and drop what only going on with it needs.

        Its log becomes one chunk: a row for each of its tokens takes some five times as much.
        """
        run = self._connection.execute
        run(
            "UPDATE turn SET state = ?, length = ?, size = ?, updated_s = ? WHERE id = ?",
            (TurnState.ENDED, length, size, ended_s, row),
        )
        run("DELETE FROM body WHERE turn = ?", (row,))
        log = self._log_of(self._chunks(row))
        run("DELETE FROM chunk WHERE turn = ?", (row,))
        self.append(row, 1, 0, stored_s=ended_s, data=log, continuation=None)

    def entomb(self, row: int, buried_s: float) -> None:
        """Leave only a turn's id."""
        run = self._connection.execute
        run("DELETE FROM chunk WHERE turn = ?", (row,))
        run("DELETE FROM body WHERE turn = ?", (row,))
        run(
            "UPDATE turn SET state = ?, secret_hash = x'', body_hash = x'', length = 0, size = 0, "
            "updated_s = ? WHERE id = ?",
            (TurnState.TOMBSTONE, buried_s, row),
        )

    def forget(self, row: int) -> None:
        """Remove a turn, its id too."""
        run = self._connection.execute
        run("DELETE FROM chunk WHERE turn = ?", (row,))
        run("DELETE FROM body WHERE turn = ?", (row,))
        run("DELETE FROM turn WHERE id = ?", (row,))

    def load(self, row: int) -> tuple[TurnState, bytes, bytes, tuple[bytes, ...]] | None:
        """Return a turn's state, log, body and continuations; None if it is not in the file.

        Raises:
            StoreError: the file cannot be read, or its chunks do not make up a log.
        """
        with self._errors():
            run = self._connection.execute
            found = run("SELECT state FROM turn WHERE id = ?", (row,)).fetchone()
            if found is None:
                return None
            body = run("SELECT body FROM body WHERE turn = ?", (row,)).fetchone()
            chunks = self._chunks(row).fetchall()
        log = self._log_of(chunks)
        continuations = tuple(item for _, _, item in chunks if item is not None)
        return TurnState(found[0]), log, b"" if body is None else body[0], continuations

    def records(self) -> list[TurnRecord]:
        """Return every turn in the file."""
        with self._errors():
            return [_record(columns) for columns in self._connection.execute(_RECORDS)]

    def close(self) -> None:
        """Release the file."""
        with self._errors():
            self._connection.close()

    def _chunks(self, row: int) -> sqlite3.Cursor:
        """Return the offset, data and continuation of each of a turn's appends, in order."""
        return self._connection.execute(
            "SELECT offset, data, continuation FROM chunk WHERE turn = ? ORDER BY sequence", (row,)
        )

    def _log_of(self, chunks: Iterable[tuple[int, bytes, bytes | None]]) -> bytes:
        """Return what the chunks of a turn make up."""
        log = bytearray()
        for offset, data, _ in chunks:
            if offset != len(log):
                raise StoreError(_CORRUPT.format(name=self._name, reason="a log has a gap"))
            log += data
        return bytes(log)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _store_error(self._name, error) from error


def _record(columns: tuple[Any, ...]) -> TurnRecord:
    row, principal, turn_id, secret_hash, body_hash, state, created_s, updated_s, *counts = columns
    length, size, chunks = counts
    return TurnRecord(
        row=row,
        principal=principal,
        turn_id=turn_id,
        secret_hash=secret_hash,
        body_hash=body_hash,
        state=TurnState(state),
        created_s=created_s,
        updated_s=updated_s,
        length=length,
        size=size,
        chunks=chunks,
    )


_CORRUPT = (
    "{name} is damaged ({reason}), so its turns cannot be trusted. Move it away together with the "
    "file of the same name that ends in -wal, and start again: the server makes a new one."
)
_ADVICE = {
    sqlite3.SQLITE_FULL: "The disk of {name} is full ({reason}): nothing more is stored until "
    "there is room. Free some, or put the store on another disk.",
    sqlite3.SQLITE_READONLY: "{name} cannot be written ({reason}). Give the server's user the "
    "right to write the file and its directory, and see that its file system is not read-only.",
    sqlite3.SQLITE_CANTOPEN: "{name} cannot be opened ({reason}). It must be a file in a directory "
    "that the server's user can write.",
    sqlite3.SQLITE_CORRUPT: _CORRUPT,
    sqlite3.SQLITE_NOTADB: _CORRUPT,
    sqlite3.SQLITE_IOERR: "The disk of {name} failed ({reason}): nothing more is stored. Look at "
    "the system's log, and put the store on a disk that works.",
}


def _store_error(name: str, error: sqlite3.Error) -> StoreError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreLockedError(
            f"{name} is in use by another process, and a token store has one owner. Stop that "
            "process, or give this server a store of its own."
        )
    advice = _ADVICE.get(code, "{name} failed ({reason}). Start again with another store file.")
    return StoreError(advice.format(name=name, reason=error))


def _make_private(path: Path) -> None:
    """Make the file, readable by its owner only; an existing one becomes so.

    SQLite gives the -wal file the same rights. An existing file is never opened here: closing it
    would end the locks that this process has on it (`fcntl`'s rules).
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            if path.is_file() and stat.S_IMODE(path.stat().st_mode) != 0o600:
                path.chmod(0o600)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be made private to the server's user ({error.strerror}). Give that "
            "user a directory of its own for the token store."
        ) from error
