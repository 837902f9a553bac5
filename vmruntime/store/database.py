"""One SQLite file, one thread, migrations by user_version."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

from vmruntime import tracing
from vmruntime.aio.threads import SerialThread
from vmruntime.errors import FailedPrecondition, Internal, ResourceExhausted, VmruntimeError
from vmruntime.store.schema import MIGRATIONS

log = structlog.get_logger(__name__)

T = TypeVar("T")

SYNCHRONOUS = "FULL"
"""SQLite's word for when it waits for the disk."""

_PAGE = 4096
_MARGIN = 4
"""Additions are refused when the disk has less left than this many times the room that the store keeps for itself."""


class Database:
    """The store's connection. WAL with synchronous=FULL: what `write` returned survives a power cut.

    With room of its own, records can be changed and deleted on a disk that is full, or pods could not be removed, which is
    what frees it: the file has free pages and its log is as long as it ever gets, so that neither has to grow. That
    file systems which never write in place (Btrfs, ZFS) need space for every write all the same, cannot be helped.
    """

    def __init__(self, path: Path, room: int = 0) -> None:
        self._path = path
        self._room = room
        self._thread = SerialThread("store")
        self._connection: sqlite3.Connection | None = None

    @classmethod
    async def open(cls, path: Path, room: int = 0) -> Database:
        """Open the file, creating it (mode 0600) and bringing its tables up to date.

        Args:
            path: The file.
            room: Bytes that it keeps for changes when the disk is full; 0: none.

        Raises:
            FailedPrecondition: The file was written by a newer vmruntime, or is not a database.
        """
        database = cls(path, room)
        try:
            await database._thread.run(database._open)
        except BaseException:
            database._thread.close()
            raise
        return database

    async def close(self) -> None:
        """Close the connection; the write-ahead log is folded in."""

        def close() -> None:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

        await self._thread.run(close)
        self._thread.close()

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Run `query` in the store's thread."""
        return await self._thread.run(lambda: self._guard(query))

    async def write(self, change: Callable[[sqlite3.Connection], T], *, adds: bool = False) -> T:
        """Run `change` as one transaction: all of it or nothing.

        Args:
            change: What to do.
            adds: It is the beginning of something new, and not to have the room that is kept for the end of what is there.

        Raises:
            ResourceExhausted: The disk is full.
            Internal: SQLite refused for another reason.
        """

        def transaction(connection: sqlite3.Connection) -> T:
            if adds:
                self._check_space()
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                return change(connection)

        with tracing.span("store.write"):
            return await self._thread.run(lambda: self._guard(transaction))

    def _guard(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._connection is None:
            raise Internal("the store is closed")
        try:
            return work(self._connection)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise self._translate(error) from error

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch(mode=0o600)
        try:
            connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
            connection.execute("PRAGMA foreign_keys = ON")
            self._migrate(connection)
            if self._room:
                self._make_room(connection)
        except sqlite3.Error as error:
            raise self._translate(error) from error
        self._connection = connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise FailedPrecondition(
                f"{self._path} was written by a newer vmruntime (schema {version}, known {len(MIGRATIONS)})",
                remedy="upgrade vmruntime, or move the file away to start empty",
            )
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            # One transaction a migration: a power cut leaves the old schema or the new one.
            connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")

    def _make_room(self, connection: sqlite3.Connection) -> None:
        # Folded in long before it would have to grow.
        connection.execute(f"PRAGMA wal_autocheckpoint = {self._room // _PAGE // 2}")
        try:
            connection.execute("DROP TABLE IF EXISTS room")  # of a daemon that was killed in between
            connection.execute("CREATE TABLE room (data BLOB NOT NULL)")
            connection.execute("INSERT INTO room VALUES (zeroblob(?))", (self._room,))
            connection.execute("PRAGMA wal_checkpoint(RESTART)")
            connection.execute("DROP TABLE room")
        except sqlite3.OperationalError as error:
            log.warning("the store has no room of its own", file=str(self._path), error=str(error))

    def _check_space(self) -> None:
        if self._room and _free_bytes(self._path) < _MARGIN * self._room:
            raise self._no_space()

    def _no_space(self) -> ResourceExhausted:
        return ResourceExhausted(f"no space left for the store {self._path}", remedy="free space there")

    def _translate(self, error: sqlite3.Error) -> VmruntimeError:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL if hasattr(error, "sqlite_errorcode") else False:
            return self._no_space()
        if isinstance(error, sqlite3.DatabaseError) and "not a database" in str(error):
            return FailedPrecondition(f"{self._path} is not a vmruntime store", remedy="move the file away")
        return Internal(f"the store {self._path} failed: {error}")


def _free_bytes(path: Path) -> int:
    """Return what root can still write to a path's file system."""
    facts = os.statvfs(path)
    return facts.f_bfree * facts.f_frsize
