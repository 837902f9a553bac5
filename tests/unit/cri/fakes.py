"""Working stand-ins for what the CRI services call: pods, images and the runtime's condition."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from vmruntime.errors import AlreadyExists, FailedPrecondition, NotFound
from vmruntime.model.container import Container, ContainerSpec, ContainerState
from vmruntime.model.image import Image, ImageConfig, ImageUse, Layer, Pruned, RegistryAuth
from vmruntime.model.resources import LinuxResources
from vmruntime.model.sandbox import NetworkInterface, PodNetwork, Sandbox, SandboxKind, SandboxSpec, SandboxState
from vmruntime.model.stats import ContainerUsage, GuestUsage, HostUsage, InterfaceUsage, SandboxUsage
from vmruntime.model.streams import AttachSpec, ExecSpec, PortForwardSpec
from vmruntime.pods.interface import ExecResult, PodEvent

IMAGE_ID = "sha256:" + "ab" * 32


class FakeClock:
    """Moves one second at each look."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000_000_000

    def now_ns(self) -> int:
        self.now += 1_000_000_000
        return self.now

    def monotonic(self) -> float:
        return self.now / 1e9


class FakePods:
    """Pods in memory, with the states and errors of the real ones. `fail` makes the next use case raise."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self._ids = iter(range(1, 10_000))
        self.by_id: dict[str, Sandbox] = {}
        self.containers_by_id: dict[str, Container] = {}
        self.calls: list[tuple[object, ...]] = []
        self.fail: BaseException | None = None
        self.exec_result = ExecResult(stdout=b"out", stderr=b"err", exit_code=3)
        self.usage_by_id: dict[str, ContainerUsage] = {}
        self.queue: asyncio.Queue[PodEvent | BaseException] = asyncio.Queue()
        self.listening = asyncio.Event()
        self.listeners = 0

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure

    def _new_id(self) -> str:
        # Digits first, so that prefixes tell ids apart.
        return f"{next(self._ids):04d}" + "a" * 60

    async def run_sandbox(self, spec: SandboxSpec) -> str:
        self._note("run_sandbox", spec)
        if any(one.spec.metadata.key == spec.metadata.key for one in self.by_id.values()):
            raise AlreadyExists("config.metadata: the name is taken", remedy="remove the other one")
        nic = NetworkInterface(
            name="eth0", mac="02:00:00:00:00:01", mtu=1500, addresses=["10.1.0.2/24", "fd00::2/64"], tap="tap0"
        )
        sandbox = Sandbox(
            id=self._new_id(),
            spec=spec,
            state=SandboxState.READY,
            created_at=self._clock.now_ns(),
            network=PodNetwork(netns="/run/netns/x", interfaces=[nic]),
            kernel="6.12.0",
            phases={"network": 12.5, "boot": 300.0},
        )
        self.by_id[sandbox.id] = sandbox
        return sandbox.id

    async def stop_sandbox(self, sandbox_id: str) -> None:
        self._note("stop_sandbox", sandbox_id)
        if sandbox_id in self.by_id:
            stopped = msgspec.structs.replace(self.by_id[sandbox_id], state=SandboxState.NOTREADY, reason="stopped")
            self.by_id[sandbox_id] = stopped

    async def remove_sandbox(self, sandbox_id: str) -> None:
        self._note("remove_sandbox", sandbox_id)
        self.by_id.pop(sandbox_id, None)

    def sandbox(self, sandbox_id: str) -> Sandbox:
        if sandbox_id not in self.by_id:
            raise NotFound(f"no sandbox {sandbox_id!r}")
        return self.by_id[sandbox_id]

    def sandboxes(self) -> list[Sandbox]:
        return list(reversed(self.by_id.values()))

    def facts(self, sandbox_id: str) -> dict[str, str | int | bool]:
        return {}

    async def check_network(self, sandbox_id: str) -> str:
        self._note("check_network", sandbox_id)
        return "as it was made"

    async def create_container(self, sandbox_id: str, spec: ContainerSpec) -> str:
        self._note("create_container", sandbox_id, spec)
        container = Container(
            id=self._new_id(),
            sandbox_id=sandbox_id,
            spec=spec,
            state=ContainerState.CREATED,
            created_at=self._clock.now_ns(),
            image_id=IMAGE_ID,
            image_ref="docker.io/library/busybox@sha256:" + "cd" * 32,
        )
        self.containers_by_id[container.id] = container
        return container.id

    def change(self, container_id: str, **values: object) -> None:
        self.containers_by_id[container_id] = msgspec.structs.replace(self.containers_by_id[container_id], **values)

    async def start_container(self, container_id: str) -> None:
        self._note("start_container", container_id)
        if self.container(container_id).state is not ContainerState.CREATED:
            raise FailedPrecondition("the container is not in state created")
        self.change(container_id, state=ContainerState.RUNNING, started_at=self._clock.now_ns(), pid=42)

    async def stop_container(self, container_id: str, timeout: float) -> None:
        self._note("stop_container", container_id, timeout)
        if container_id in self.containers_by_id:
            self.change(
                container_id,
                state=ContainerState.EXITED,
                finished_at=self._clock.now_ns(),
                exit_code=137,
                reason="Error",
                message="killed",
            )

    async def remove_container(self, container_id: str) -> None:
        self._note("remove_container", container_id)
        self.containers_by_id.pop(container_id, None)

    def container(self, container_id: str) -> Container:
        if container_id not in self.containers_by_id:
            raise NotFound(f"no container {container_id!r}")
        return self.containers_by_id[container_id]

    def containers(self) -> list[Container]:
        return list(reversed(self.containers_by_id.values()))

    async def exec_sync(self, container_id: str, argv: list[str], timeout: float) -> ExecResult:
        self._note("exec_sync", container_id, argv, timeout)
        self.container(container_id)
        return self.exec_result

    async def reopen_log(self, container_id: str) -> None:
        self._note("reopen_log", container_id)
        if self.container(container_id).state is not ContainerState.RUNNING:
            raise FailedPrecondition("the container is not running")

    async def sandbox_usage(self, sandbox_ids: list[str]) -> list[SandboxUsage]:
        self._note("sandbox_usage", sandbox_ids)
        guest = GuestUsage(time=1, interfaces=[InterfaceUsage(name="lo"), InterfaceUsage(name="eth0", rx_bytes=7)])
        return [SandboxUsage(id=one, time=2, host=HostUsage(cpu_ns=3), guest=guest) for one in sandbox_ids]

    async def update_container(self, container_id: str, resources: LinuxResources) -> None:
        self._note("update_container", container_id, resources)
        self.container(container_id)

    async def update_sandbox(
        self, sandbox_id: str, overhead: LinuxResources | None, resources: LinuxResources | None
    ) -> None:
        self._note("update_sandbox", sandbox_id, overhead, resources)
        self.sandbox(sandbox_id)

    async def usage(self, container_ids: list[str]) -> list[ContainerUsage]:
        self._note("usage", container_ids)
        return [self.usage_by_id[one] for one in container_ids if one in self.usage_by_id]

    async def events(self) -> AsyncIterator[PodEvent]:
        self.listeners += 1
        self.listening.set()
        try:
            while True:
                event = await self.queue.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.listeners -= 1


class FakeFsUsage:
    mountpoint = Path("/var/lib/vmruntime/layers")
    used_bytes = 4096
    used_inodes = 7


def make_image(name: str = "docker.io/library/busybox:1", user: str = "", image_id: str = IMAGE_ID) -> Image:
    return Image(
        id=image_id,
        repo_tags=[name],
        repo_digests=["docker.io/library/busybox@sha256:" + "cd" * 32],
        layers=[Layer(diff_id="sha256:" + "ef" * 32, size=1000)],
        config=ImageConfig(entrypoint=["/bin/sh"], user=user, env=["A=b"]),
        size=1000,
        created_at=1,
    )


class FakeImages:
    """Images in memory; pulling anything succeeds."""

    def __init__(self) -> None:
        self.found: list[Image] = []
        self.pulled: list[tuple[str, RegistryAuth | None]] = []
        self.for_vms: list[str] = []
        self.translated: set[str] = set()
        self.pruned: list[tuple[float, bool]] = []
        self.fail: BaseException | None = None

    async def pull(self, reference: str, auth: RegistryAuth | None, *, for_vm: bool = False) -> Image:
        self.pulled.append((reference, auth))
        if for_vm:
            self.for_vms.append(reference)
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure
        image = make_image(reference)
        self.found.append(image)
        return image

    async def vm_name(self, reference: str) -> str:
        return f"virtlet.cloud/{reference}" if reference in self.translated else reference

    def status(self, reference: str) -> Image | None:
        for image in self.found:
            if reference in (image.id, *image.repo_tags, *image.repo_digests):
                return image
        return None

    def list(self) -> list[Image]:
        return [*self.found]

    async def remove(self, reference: str) -> None:
        image = self.status(reference)
        if image is None:
            raise NotFound(f"no image {reference!r}")
        self.found.remove(image)

    def uses(self) -> Sequence[ImageUse]:
        return [ImageUse(image=image, in_use=number == 0) for number, image in enumerate(self.found)]

    async def prune(self, unused_seconds: float, *, dry_run: bool) -> Pruned:
        self.pruned.append((unused_seconds, dry_run))
        return Pruned(images=[*self.found], freed_bytes=7)

    def fs_usage(self) -> FakeFsUsage:
        return FakeFsUsage()


class FakeMachines:
    """Machines of which it is remembered what was done to them. `fail` makes the next call raise."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.fail: Exception | None = None

    def _do(self, what: str, sandbox_id: str) -> None:
        if self.fail is not None:
            fail, self.fail = self.fail, None
            raise fail
        self.done.append((what, sandbox_id))

    async def pause(self, sandbox_id: str) -> None:
        self._do("pause", sandbox_id)

    async def resume(self, sandbox_id: str) -> None:
        self._do("resume", sandbox_id)

    async def reset(self, sandbox_id: str) -> None:
        self._do("reset", sandbox_id)


class FakeStreams:
    """Gives out URLs and keeps what they are for."""

    def __init__(self) -> None:
        self.asked: list[ExecSpec | AttachSpec | PortForwardSpec] = []

    def exec_url(self, spec: ExecSpec) -> str:
        return self._url(spec)

    def attach_url(self, spec: AttachSpec) -> str:
        return self._url(spec)

    def port_forward_url(self, spec: PortForwardSpec) -> str:
        return self._url(spec)

    def _url(self, spec: ExecSpec | AttachSpec | PortForwardSpec) -> str:
        self.asked.append(spec)
        return f"http://127.0.0.1:1/{len(self.asked)}"


class FakeNodeNetwork:
    """Takes note of pod CIDRs. `fail` makes the next call raise."""

    def __init__(self) -> None:
        self.told: list[list[str]] = []
        self.fail: BaseException | None = None

    async def use_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        if self.fail is not None:
            raise self.fail
        self.told.append(list(cidrs))


class FakeConditions:
    def __init__(self) -> None:
        self.runtime = (True, "", "")
        self.network = (False, "NetworkPluginNotReady", "no CNI configuration in /etc/cni/net.d")

    async def runtime_ready(self) -> tuple[bool, str, str]:
        return self.runtime

    def user_namespaces(self, kind: SandboxKind) -> bool:
        return kind is SandboxKind.CONTAINER

    async def network_ready(self) -> tuple[bool, str, str]:
        return self.network

    def info(self) -> dict[str, str]:
        return {"accelerator": '"kvm"'}
