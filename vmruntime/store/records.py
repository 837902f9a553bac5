"""Sandboxes, containers and owned resources in the store."""

from __future__ import annotations

import sqlite3
from typing import Any

import msgspec

from vmruntime.errors import AlreadyExists
from vmruntime.model.container import Container, ContainerState
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import Sandbox, SandboxState
from vmruntime.store.database import Database

_encode = msgspec.json.encode


class PodRecords:
    """The rows of pods: every change of a sandbox or container is written before it is told to anyone."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> tuple[list[Sandbox], list[Container]]:
        """Return everything, in no particular order."""

        def query(connection: sqlite3.Connection) -> tuple[list[Sandbox], list[Container]]:
            sandboxes = connection.execute("SELECT record FROM sandboxes").fetchall()
            containers = connection.execute("SELECT record FROM containers").fetchall()
            return [_decode(row[0], Sandbox) for row in sandboxes], [_decode(row[0], Container) for row in containers]

        return await self._database.read(query)

    async def put_sandbox(self, sandbox: Sandbox) -> None:
        """Insert or replace one sandbox.

        Raises:
            AlreadyExists: Another sandbox has its name.
        """

        def change(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO sandboxes (id, name_key, record) VALUES (?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                (sandbox.id, sandbox.spec.metadata.key, _encode(sandbox)),
            )

        try:
            await self._database.write(change, adds=sandbox.state is SandboxState.CREATING)
        except sqlite3.IntegrityError:
            raise AlreadyExists(f"the sandbox name {sandbox.spec.metadata.key} is taken") from None

    async def put_container(self, container: Container) -> None:
        """Insert or replace one container."""

        def change(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO containers (id, sandbox_id, record) VALUES (?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET record = excluded.record",
                (container.id, container.sandbox_id, _encode(container)),
            )

        await self._database.write(change, adds=container.state is ContainerState.CREATING)

    async def delete_sandbox(self, sandbox_id: str) -> None:
        """Delete one sandbox and its containers; success when it is gone already."""
        await self._database.write(lambda c: c.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,)))

    async def delete_container(self, container_id: str) -> None:
        """Delete one container; success when it is gone already."""
        await self._database.write(lambda c: c.execute("DELETE FROM containers WHERE id = ?", (container_id,)))


class Ledger:
    """What vmruntime owns on the host: recorded before it is made, forgotten after it is released."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, resource: Resource) -> None:
        """Write down a resource that is about to be made; the same kind and key replaces."""
        await self._database.write(lambda connection: _put(connection, resource), adds=True)

    async def claim(self, resource: Resource) -> None:
        """Write down a resource that is about to be made and that nobody else may have.

        Raises:
            AlreadyExists: Another owner has it; the message names that one.
        """

        def change(connection: sqlite3.Connection) -> str:
            row = connection.execute(
                "SELECT owner FROM resources WHERE kind = ? AND key = ?", (resource.kind.value, resource.key)
            ).fetchone()
            if row is not None and row[0] != resource.owner:
                return str(row[0])
            _put(connection, resource)
            return ""

        if other := await self._database.write(change, adds=True):
            raise AlreadyExists(f"the {resource.kind.value} {resource.key} is of {other[:13]}")

    async def forget(self, resource: Resource) -> None:
        """Strike out a resource that is released."""
        await self._database.write(
            lambda c: c.execute("DELETE FROM resources WHERE kind = ? AND key = ?", (resource.kind.value, resource.key))
        )

    async def owned_by(self, owner: str) -> list[Resource]:
        """Return what a sandbox owns, newest first: the order in which it is to be released."""
        return await self._select("WHERE owner = ?", owner)

    async def all(self) -> list[Resource]:
        """Return everything owned, newest first."""
        return await self._select("")

    async def allocate_cid(self, owner: str) -> int:
        """Reserve a vsock context id nobody else of this daemon has (vsock(7): 0-2 are reserved).

        Starts at 4096, clear of ids that people and tools pick by hand.
        """

        def change(connection: sqlite3.Connection) -> int:
            rows = connection.execute("SELECT CAST(key AS INTEGER) FROM resources WHERE kind = 'cid'")
            taken = {row[0] for row in rows}
            cid = next(n for n in range(4096, 2**31) if n not in taken)
            resource = Resource(owner=owner, kind=ResourceKind.CID, key=str(cid))
            connection.execute(
                "INSERT INTO resources (kind, key, owner, record) VALUES ('cid', ?, ?, ?)",
                (str(cid), owner, _encode(resource)),
            )
            return cid

        return await self._database.write(change, adds=True)

    async def _select(self, where: str, *parameters: str) -> list[Resource]:
        sql = f"SELECT record FROM resources {where} ORDER BY seq DESC"
        rows = await self._database.read(lambda c: c.execute(sql, parameters).fetchall())
        return [_decode(row[0], Resource) for row in rows]


class Facts:
    """Small things worth remembering, such as a proven accelerator."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, name: str) -> bytes | None:
        """Return what was stored under a name."""
        row = await self._database.read(
            lambda c: c.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        )
        return None if row is None else bytes(row[0])

    async def put(self, name: str, value: bytes) -> None:
        """Store a value under a name."""
        await self._database.write(
            lambda c: c.execute("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)", (name, value))
        )


def _put(connection: sqlite3.Connection, resource: Resource) -> None:
    connection.execute(
        "INSERT INTO resources (kind, key, owner, record) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (kind, key) DO UPDATE SET owner = excluded.owner, record = excluded.record",
        (resource.kind.value, resource.key, resource.owner, _encode(resource)),
    )


def _decode(data: bytes, type_: type[Any]) -> Any:
    return msgspec.json.decode(data, type=type_)
