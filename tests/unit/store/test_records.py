"""The store: transactions, migrations, uniqueness."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit

import msgspec
import pytest

from vmruntime.errors import AlreadyExists, FailedPrecondition, ResourceExhausted
from vmruntime.model.container import Container, ContainerMetadata, ContainerSpec, ContainerState
from vmruntime.model.ledger import Resource, ResourceKind
from vmruntime.model.sandbox import Sandbox, SandboxMetadata, SandboxSpec, SandboxState
from vmruntime.store import database as module
from vmruntime.store.database import Database
from vmruntime.store.records import Facts, Ledger, PodRecords

FULL = 2


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


async def test_what_is_written_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str) -> None:
    monkeypatch.setattr(module, "SYNCHRONOUS", durability)
    opened = await Database.open(tmp_path / "db")
    assert await opened.read(lambda connection: connection.execute("PRAGMA synchronous").fetchone()) == (FULL,)
    await opened.close()


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


async def test_what_one_owner_has_nobody_else_can_claim(database: Database) -> None:
    ledger = Ledger(database)
    mine = Resource(owner="one", kind=ResourceKind.MACHINE, key="uuid", data={"driver": "qemu"})
    await ledger.claim(mine)
    await ledger.claim(mine)
    with pytest.raises(AlreadyExists, match="the machine uuid is of one"):
        await ledger.claim(Resource(owner="two", kind=ResourceKind.MACHINE, key="uuid"))
    assert await ledger.all() == [mine]
    await ledger.forget(mine)
    await ledger.claim(Resource(owner="two", kind=ResourceKind.MACHINE, key="uuid"))


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


ROOM = 256 * 1024


@pytest.fixture
async def roomy(tmp_path: Path) -> AsyncIterator[Database]:
    database = await Database.open(tmp_path / "roomy.db", ROOM)
    yield database
    await database.close()


def sizes(directory: Path) -> list[int]:
    return [(directory / f"roomy.db{suffix}").stat().st_size for suffix in ("", "-wal", "-shm")]


async def test_changes_and_ends_need_no_more_of_the_disk(roomy: Database, tmp_path: Path) -> None:
    records = PodRecords(roomy)
    before = sizes(tmp_path)
    for number in range(40):
        await records.put_sandbox(sandbox(str(number), f"web-{number}"))
    for change in range(25):
        for number in range(40):
            stopped = msgspec.structs.replace(sandbox(str(number), f"web-{number}"), reason=f"{change:01000d}")
            await records.put_sandbox(stopped)
    for number in range(40):
        await records.delete_sandbox(str(number))
    assert sizes(tmp_path) == before
    assert await records.load() == ([], [])


async def test_what_is_new_does_not_get_the_last_of_the_disk(roomy: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    records, ledger = PodRecords(roomy), Ledger(roomy)
    await records.put_sandbox(sandbox("here"))
    thing = Resource(owner="s", kind=ResourceKind.DIRECTORY, key="/x")
    await ledger.record(thing)
    monkeypatch.setattr(module, "_free_bytes", lambda path: 2 * ROOM)
    new = msgspec.structs.replace(sandbox("new", "other"), state=SandboxState.CREATING)
    for begin in (lambda: records.put_sandbox(new), lambda: ledger.record(thing), lambda: ledger.allocate_cid("s")):
        with pytest.raises(ResourceExhausted, match=r"no space left for the store .*/roomy.db \(free space there\)"):
            await begin()
    await records.put_sandbox(msgspec.structs.replace(sandbox("here"), state=SandboxState.NOTREADY))
    await ledger.forget(thing)
    await records.delete_sandbox("here")
    assert await records.load() == ([], [])
    assert await ledger.all() == []


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file of this process can grow beyond 200 KiB, much as if the disk were full."""
    soft, hard = getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (200 * 1024, hard))
    try:
        yield
    finally:
        setrlimit(RLIMIT_FSIZE, (soft, hard))


async def test_room_on_a_full_disk(tmp_path: Path) -> None:
    """A store that cannot have its room is a store all the same; one that was killed while it made it, too."""
    first = await Database.open(tmp_path / "db")
    await PodRecords(first).put_sandbox(sandbox("s"))
    await first.write(lambda connection: connection.execute("CREATE TABLE room (data BLOB NOT NULL)"))
    await first.close()
    with small_files():
        second = await Database.open(tmp_path / "db", ROOM)
    assert await PodRecords(second).load() == ([sandbox("s")], [])
    await second.close()
    third = await Database.open(tmp_path / "db", ROOM)
    tables = await third.read(lambda connection: connection.execute("SELECT name FROM sqlite_schema").fetchall())
    assert ("room",) not in tables
    await third.close()
