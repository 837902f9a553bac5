"""Stand-ins for what pods need of the host: images and networks in memory, a clock of the test's own."""

from __future__ import annotations

import os
import types
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmruntime.aio.faults import Faults
from vmruntime.aio.process import Completed
from vmruntime.errors import FailedPrecondition
from vmruntime.model.image import DiskImage, Image, ImageConfig, Layer
from vmruntime.model.sandbox import Dns, NetworkInterface, NetworkRoute, PodNetwork, Sandbox, SandboxKind
from vmruntime.network.errors import NetworkError
from vmruntime.network.tap import SpareTap

NOW = 1_700_000_000 * 10**9


class FakeClock:
    """Moves a millisecond at each look, so that no two things happen at once."""

    def __init__(self) -> None:
        self.now = NOW

    def now_ns(self) -> int:
        self.now += 1_000_000
        return self.now

    def monotonic(self) -> float:
        return self.now / 1e9


class FakeTap:
    """An open descriptor where a tap would be."""

    def __init__(self) -> None:
        self.fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FakeSpareTap(SpareTap):
    """The same, with a MAC."""

    def make(self) -> None:
        self.fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


class FakeNetwork:
    """Addresses in memory; implements pods.ports.Network and daemon.parts.PodNetworks.

    Attributes:
        attached: The sandboxes that have an address.
        taps: Every tap that was ever handed out.
        spares: Every spare one.
        pod_cidrs: What kubelet told last.
    """

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.attached: dict[str, str] = {}
        self.taps: list[FakeTap] = []
        self.spares: list[FakeSpareTap] = []
        self.pod_cidrs: list[str] = []
        self._last = 1

    async def ready(self) -> tuple[bool, str]:
        return True, ""

    async def use_pod_cidrs(self, cidrs: Sequence[str]) -> None:
        await self.faults.at("network.use_pod_cidrs")
        self.pod_cidrs = list(cidrs)

    async def spare_tap(self) -> FakeSpareTap:
        await self.faults.at("network.spare_tap")
        spare = FakeSpareTap()
        spare.make()
        self.spares.append(spare)
        return spare

    async def add(self, sandbox: Sandbox, spare: SpareTap | None = None) -> tuple[PodNetwork, list[FakeTap]]:
        await self.faults.at("network.add")
        if sandbox.id in self.attached:
            raise NetworkError(f"{sandbox.id} has an address already")
        self._last += 1
        address = f"10.88.{self._last // 256}.{self._last % 256}"
        self.attached[sandbox.id] = address
        try:
            await self.faults.at("network.add done")
        except BaseException:
            del self.attached[sandbox.id]  # like the real one: a failed ADD cleans up after itself
            raise
        nic = NetworkInterface(
            name="eth0", mac="02:00:00:00:00:01", mtu=1450, addresses=[f"{address}/16"], tap="tap_eth0"
        )
        routes = [NetworkRoute(destination="0.0.0.0/0", gateway="10.88.0.1", interface="eth0")]
        network = PodNetwork(netns="/run/netns/fake", interfaces=[nic], routes=routes, dns=Dns(servers=["10.88.0.1"]))
        if sandbox.spec.kind is SandboxKind.IMAGE:
            return network, []
        if spare is not None and sandbox.spec.kind is SandboxKind.CONTAINER:
            nic = msgspec.structs.replace(nic, device_mac=spare.mac)
            return msgspec.structs.replace(network, interfaces=[nic]), []
        self.taps.append(FakeTap())
        return network, self.taps[-1:]

    async def open_taps(self, sandbox: Sandbox) -> list[FakeTap]:
        await self.faults.at("network.open_taps")
        if sandbox.network is None or sandbox.id not in self.attached:
            raise NetworkError(f"the network of pod {sandbox.id[:13]} is gone")
        opened = [FakeTap() for _ in sandbox.network.interfaces]
        self.taps += opened
        return opened

    async def teardown(self, sandbox_id: str) -> None:
        await self.faults.at("network.teardown")
        self.attached.pop(sandbox_id, None)

    async def check(self, sandbox_id: str) -> bool:
        await self.faults.at("network.check")
        return sandbox_id in self.attached

    async def collect(self, keep: Collection[str]) -> None:
        await self.faults.at("network.collect")
        for sandbox_id in self.attached.keys() - set(keep):
            del self.attached[sandbox_id]


def make_image(name: str, layers: Iterable[str], **config: object) -> Image:
    """Return an image of layers told by one letter each."""
    found = [Layer(diff_id="sha256:" + letter * 64, size=4096) for letter in layers]
    return Image(
        id="sha256:" + name.encode().hex().ljust(64, "0")[:64],
        repo_tags=[f"docker.io/library/{name}:1"],
        repo_digests=[f"docker.io/library/{name}@sha256:" + "d" * 64],
        layers=found,
        config=ImageConfig(**config),  # type: ignore[arg-type]
        size=4096 * len(found),
        created_at=NOW,
    )


class FakeImages:
    """Images whose layers are small files; implements pods.ports.Images.

    Attributes:
        touched: Ids of images that were used, in order.
        sweeps: How often unused layers were looked for.
    """

    def __init__(self, directory: Path, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.images: list[Image] = []
        self.touched: list[str] = []
        self.sweeps = 0
        self._directory = directory

    def add(self, image: Image) -> Image:
        self.images.append(image)
        for layer in image.layers:
            self.layer_path(layer).write_bytes(b"\0" * 4096)
        return image

    def status(self, reference: str) -> Image | None:
        for image in self.images:
            if reference in (image.id, *image.repo_tags, *image.repo_digests):
                return image
        return None

    def layer_path(self, layer: Layer) -> Path:
        return self._directory / f"{layer.serial}.erofs"

    async def vm_disk(self, image: Image) -> tuple[Path, DiskImage]:
        await self.faults.at("images.vm_disk")
        if image.disk is None:
            raise FailedPrecondition(f"{image.id}: has nothing in /disk/")
        path = self._directory / f"{image.disk.digest.removeprefix('sha256:')}.{image.disk.format}"
        path.write_bytes(b"\0" * image.disk.file_size)
        return path, image.disk

    async def touch(self, image_ids: Iterable[str]) -> None:
        await self.faults.at("images.touch")
        self.touched += image_ids

    async def sweep(self) -> None:
        await self.faults.at("images.sweep")
        self.sweeps += 1


def without_qemu_img(patch: pytest.MonkeyPatch) -> None:
    """Make pods' disks empty files, which no guest of the fake hypervisor reads: a program each would take longer."""

    async def create(argv: Sequence[str], **options: Any) -> Completed:
        Path(argv[-2]).touch()
        return Completed(tuple(argv), 0, b"", "")

    patch.setattr("vmruntime.images.overlay.process", types.SimpleNamespace(run=create))
