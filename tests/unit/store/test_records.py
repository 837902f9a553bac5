"""The store: transactions, migrations, uniqueness."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vmruntime.errors import AlreadyExists, FailedPrecondition
from vmruntime.model.container import Container, ContainerMetadata, ContainerSpec, ContainerState
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import Sandbox, SandboxMetadata, SandboxSpec, SandboxState
from vmruntime.store.database import Database
from vmruntime.store.records import Facts, Ledger, PodRecords


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = await Database.open(tmp_path / "vmruntime.db")
    yield database
    await database.close()


def sandbox(identifier: str, name: str = "web") -> Sandbox:
    metadata = SandboxMetadata(name=name, uid="u", namespace="default")
    return Sandbox(id=identifier, spec=SandboxSpec(metadata=metadata), state=SandboxState.READY, created_at=5)


async def test_records_come_back_after_a_restart(tmp_path: Path) -> None:
    container = Container(
        id="c",
        sandbox_id="s",
        spec=ContainerSpec(metadata=ContainerMetadata(name="app"), image="i", envs=[("A", "ü")]),
        state=ContainerState.RUNNING,
        created_at=7,
    )
    first = await Database.open(tmp_path / "db")
    await PodRecords(first).put_sandbox(sandbox("s"))
    await PodRecords(first).put_container(container)
    await first.close()
    second = await Database.open(tmp_path / "db")
    assert await PodRecords(second).load() == ([sandbox("s")], [container])
    await PodRecords(second).delete_sandbox("s")
    assert await PodRecords(second).load() == ([], [])
    await second.close()
    assert (tmp_path / "db").stat().st_mode & 0o777 == 0o600


async def test_a_name_is_taken_once(database: Database) -> None:
    records = PodRecords(database)
    await records.put_sandbox(sandbox("one"))
    with pytest.raises(AlreadyExists, match="web_default_u_0"):
        await records.put_sandbox(sandbox("two"))


async def test_the_ledger_gives_newest_first(database: Database) -> None:
    ledger = Ledger(database)
    made = [Resource(owner="s", kind=ResourceKind.DIRECTORY, key=f"/{n}") for n in range(3)]
    for resource in made:
        await ledger.record(resource)
    assert await ledger.owned_by("s") == made[::-1]
    await ledger.forget(made[1])
    assert await ledger.all() == [made[2], made[0]]


async def test_context_ids_are_unique_and_reused(database: Database) -> None:
    ledger = Ledger(database)
    assert [await ledger.allocate_cid("s") for _ in range(3)] == [4096, 4097, 4098]
    await ledger.forget(Resource(owner="s", kind=ResourceKind.CID, key="4097"))
    assert await ledger.allocate_cid("t") == 4097


async def test_facts(database: Database) -> None:
    facts = Facts(database)
    assert await facts.get("a") is None
    await facts.put("a", b"1")
    await facts.put("a", b"2")
    assert await facts.get("a") == b"2"


async def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "db")
    connection.execute("PRAGMA user_version = 999")
    connection.close()
    with pytest.raises(FailedPrecondition, match="newer vmruntime"):
        await Database.open(tmp_path / "db")


async def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(FailedPrecondition, match="not a vmruntime store"):
        await Database.open(tmp_path / "db")
