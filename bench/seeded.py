"""Lists and states of many pods. No VM runs: the records are in the store, as a daemon finds them after a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path

from bench.bed import timed
from bench.records import Record, record
from tests.support.daemon import Daemon
from vmruntime.generated import cri_pb2 as cri
from vmruntime.model.container import Container, ContainerMetadata, ContainerSpec, ContainerState
from vmruntime.model.sandbox import Sandbox, SandboxMetadata, SandboxSpec, SandboxState
from vmruntime.store.database import Database
from vmruntime.store.records import PodRecords

PODS = 200
ROUNDS = 200


def listing_with_200_pods(base: Path) -> list[Record]:
    """Return p50 and p99 of ListPodSandbox and PodSandboxStatus, with two containers in each pod."""
    daemon = Daemon(base)
    daemon.root.mkdir(parents=True, exist_ok=True)
    asyncio.run(_seed(daemon.root / "vmruntime.db"))
    daemon.start()
    try:
        lists = [timed(daemon.runtime.ListPodSandbox, cri.ListPodSandboxRequest())[0] for _ in range(ROUNDS)]
        states = []
        for number in range(ROUNDS):
            request = cri.PodSandboxStatusRequest(pod_sandbox_id=_identifier("a", number % PODS))
            states.append(timed(daemon.runtime.PodSandboxStatus, request)[0])
        found = len(daemon.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items)
    finally:
        daemon.end()
    extra = {"pods": found, "containers": 2 * found}
    return [record("list_200_pods", "ms", lists, extra=extra), record("status_200_pods", "ms", states, extra=extra)]


async def _seed(path: Path) -> None:
    database = await Database.open(path)
    records = PodRecords(database)
    for number in range(PODS):
        metadata = SandboxMetadata(name=f"pod-{number}", uid=str(number), namespace="bench")
        labels = {"app": "bench", "number": str(number)}
        sandbox = Sandbox(
            id=_identifier("a", number),
            spec=SandboxSpec(metadata=metadata, labels=labels),
            state=SandboxState.NOTREADY,
            created_at=number + 1,
            reason="seeded",
        )
        await records.put_sandbox(sandbox)
        for which in ("b", "c"):
            spec = ContainerSpec(metadata=ContainerMetadata(name=which), image="image", labels=labels)
            container = Container(
                id=_identifier(which, number),
                sandbox_id=sandbox.id,
                spec=spec,
                state=ContainerState.EXITED,
                created_at=number + 1,
            )
            await records.put_container(container)
    await database.close()


def _identifier(letter: str, number: int) -> str:
    return f"{letter}{number:063x}"
