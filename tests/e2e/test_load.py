"""Many pods, at once and one after the other: everything is answered, and the daemon takes no more than before.

Most of it without VMs, which two cores could not run so many of: the whole daemon but for the hypervisor and the network.
`make bench` measures the same with VMs. Bounds are generous: they are there for what grows with every pod.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from tests.support.daemon import container_config, sandbox_config
from tests.support.load import Figures, MeasuredDaemon, measured_daemon, runtime_of
from vmruntime.generated import cri_pb2 as cri

pytestmark = pytest.mark.vm

CALLERS = 100
AT_ONCE = 20
LIVES, WARM_UP = 200, 40
LIVES_OF_VMS, WARM_UP_OF_VMS = 10, 3
PATIENCE = 300.0
SETTLE_SECONDS = 20.0

MORE_DESCRIPTORS = 8
MORE_THREADS = 8
MORE_TASKS = 12
MORE_RSS_MIB = 16.0

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def fake(base: Path) -> Iterator[MeasuredDaemon]:
    with measured_daemon(base / "load", fake=True) as node:
        yield node


def pull(node: MeasuredDaemon, reference: str) -> str:
    request = cri.PullImageRequest(image=cri.ImageSpec(image=reference))
    return str(node.daemon.images.PullImage(request).image_ref)


async def life(runtime: Any, node: MeasuredDaemon, image: str, name: str) -> None:
    """Run a pod with a container, use it, and remove it."""
    config = sandbox_config(name, node.daemon.base)
    pod = (await runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config))).pod_sandbox_id
    container = await start(runtime, pod, config, image)
    answer = await runtime.ExecSync(cri.ExecSyncRequest(container_id=container, cmd=["/bin/echo", name], timeout=60))
    assert answer.stdout == f"{name}\n".encode()
    await runtime.StopContainer(cri.StopContainerRequest(container_id=container, timeout=0))
    status = (await runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=container))).status
    assert (status.state, status.exit_code) == (cri.CONTAINER_EXITED, 137)
    await runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
    await runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))


async def start(runtime: Any, pod: str, config: Any, image: str) -> str:
    request = cri.CreateContainerRequest(
        pod_sandbox_id=pod,
        config=container_config("main", image, ["/bin/sh", "-c", "echo started; sleep 1000"]),
        sandbox_config=config,
    )
    container = str((await runtime.CreateContainer(request)).container_id)
    await runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    return container


def no_more_than(node: MeasuredDaemon, before: Figures, record: Record) -> None:
    """Check the daemon's figures, once what is on its way out has had time to go."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while not _within(after := node.figures(), before) and time.monotonic() < deadline:
        time.sleep(0.2)
    record("figures", f"{_shown(before)} before, {_shown(after)} after")
    assert _within(after, before), f"{_shown(before)} before, {_shown(after)} after"


def _within(after: Figures, before: Figures) -> bool:
    return (
        after.descriptors <= before.descriptors + MORE_DESCRIPTORS
        and after.threads <= before.threads + MORE_THREADS
        and after.tasks <= before.tasks + MORE_TASKS
        and after.rss_mib <= before.rss_mib + MORE_RSS_MIB
    )


def _shown(figures: Figures) -> str:
    return ", ".join(f"{value:g} {name}" for name, value in msgspec.structs.asdict(figures).items())


def test_a_hundred_callers_while_pods_come_and_go(fake: MeasuredDaemon, busybox: str, record_property: Record) -> None:
    """Every call is answered, lists show whole pods only, and what is listed has the same status a moment later."""
    image = pull(fake, busybox)

    async def run() -> int:
        async with runtime_of(fake.daemon) as runtime:
            done = asyncio.Event()
            async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
                callers = [group.create_task(call_on(runtime, done, number)) for number in range(CALLERS)]
                coming = [group.create_task(life(runtime, fake, image, f"come{number}")) for number in range(3)]
                for number in range(10):
                    await life(runtime, fake, image, f"go{number}")
                await asyncio.wait(coming)
                done.set()
            return sum(caller.result() for caller in callers)

    asyncio.run(run())  # warmed up: the channel's threads, caches
    before = fake.figures()
    calls = asyncio.run(run())
    record_property("calls", calls)
    assert calls > CALLERS
    no_more_than(fake, before, record_property)


async def lives(node: MeasuredDaemon, image: str, name: str, count: int) -> None:
    """Make so many pods, one after the other."""
    async with runtime_of(node.daemon) as runtime, asyncio.timeout(PATIENCE):
        for number in range(count):
            await life(runtime, node, image, f"{name}{number}")


async def call_on(runtime: Any, done: asyncio.Event, number: int) -> int:
    """List and ask until it is over; return how many calls were answered."""
    answered = 0
    while not done.is_set():
        pods = (await runtime.ListPodSandbox(cri.ListPodSandboxRequest())).items
        containers = (await runtime.ListContainers(cri.ListContainersRequest())).containers
        answered += 2
        assert {one.state for one in pods} <= {cri.SANDBOX_READY, cri.SANDBOX_NOTREADY}
        for pod in pods[number % 3 :: 3]:
            answered += await asked(runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod.id)))
        for one in containers[number % 3 :: 3]:
            answered += await asked(runtime.ContainerStatus(cri.ContainerStatusRequest(container_id=one.id)))
    return answered


async def asked(call: Any) -> int:
    """Await a status; what was listed may be gone by now, and nothing else may be wrong."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND, error
    return 1


def test_twenty_pods_at_once(fake: MeasuredDaemon, busybox: str, record_property: Record) -> None:
    image = pull(fake, busybox)

    async def run() -> None:
        async with runtime_of(fake.daemon) as runtime, asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            for number in range(AT_ONCE):
                group.create_task(life(runtime, fake, image, f"once{number}"))

    asyncio.run(run())
    before = fake.figures()
    asyncio.run(run())
    no_more_than(fake, before, record_property)


def test_two_hundred_pods_one_after_the_other(fake: MeasuredDaemon, busybox: str, record_property: Record) -> None:
    image = pull(fake, busybox)

    asyncio.run(lives(fake, image, "one", WARM_UP))
    before = fake.figures()
    asyncio.run(lives(fake, image, "one", LIVES - WARM_UP))
    no_more_than(fake, before, record_property)


def test_ten_vms_one_after_the_other(base: Path, busybox: str, record_property: Record) -> None:
    with measured_daemon(base / "vms") as node:
        image = pull(node, busybox)
        asyncio.run(lives(node, image, "vm", WARM_UP_OF_VMS))
        before = node.figures()
        asyncio.run(lives(node, image, "vm", LIVES_OF_VMS - WARM_UP_OF_VMS))
        no_more_than(node, before, record_property)
