"""One SQLite file, one thread, migrations by user_version."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vmruntime.aio.threads import SerialThread
from vmruntime.errors import FailedPrecondition, Internal, ResourceExhausted, VmruntimeError
from vmruntime.store.schema import MIGRATIONS

T = TypeVar("T")


class Database:
    """The store's connection. WAL with synchronous=FULL: what `write` returned survives a power cut."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = SerialThread("store")
        self._connection: sqlite3.Connection | None = None

    @classmethod
    async def open(cls, path: Path) -> Database:
        """Open the file, creating it (mode 0600) and bringing its tables up to date.

        Raises:
            FailedPrecondition: The file was written by a newer vmruntime, or is not a database.
        """
        database = cls(path)
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

    async def write(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Run `change` as one transaction: all of it or nothing.

        Raises:
            ResourceExhausted: The disk is full.
            Internal: SQLite refused for another reason.
        """

        def transaction(connection: sqlite3.Connection) -> T:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                return change(connection)

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
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            self._migrate(connection)
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

    def _translate(self, error: sqlite3.Error) -> VmruntimeError:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL if hasattr(error, "sqlite_errorcode") else False:
            return ResourceExhausted(f"no space left for the store {self._path}", remedy="free space there")
        if isinstance(error, sqlite3.DatabaseError) and "not a database" in str(error):
            return FailedPrecondition(f"{self._path} is not a vmruntime store", remedy="move the file away")
        return Internal(f"the store {self._path} failed: {error}")
