"""How fast a container reads: its image's layers, and a directory of the host."""

from __future__ import annotations

import asyncio
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.bed import APPLETS, Bed, Node
from bench.records import Record, beside, percentile, record
from tests.support import registry
from vmruntime.generated import cri_pb2 as cri
from vmruntime.streaming.client import open_spdy

ROUNDS = 7
REPEAT = 3  # reads in a row: the guest's clock counts in hundredths of a second
MIB = 1024 * 1024
LAYER_MIB = 64
FILE_MIB = 16
CHUNK = 64 * 1024


def guest_read(bed: Bed) -> list[Record]:
    """Read a file of an EROFS layer in the guest, beside the disk that the layer is."""
    node = bed.node()
    big = registry.files({"big": os.urandom(LAYER_MIB * MIB)})
    layout = registry.build_image(bed.base / "read", [_tools(), big])
    image = node.pull(f"oci:{layout}:image")
    layer = node.daemon.root / "layers" / f"{big.diff_id.removeprefix('sha256:')}.erofs"
    rates: dict[str, list[float]] = {"/disk": [], "/disk iflag=direct": [], "/big": []}
    with node.pod(privileged=True) as pod:
        container = node.run(pod, "read", ["sleep", "3600"], privileged=True, image=image)
        node.exec(container, f"mknod /disk b {_device(node, container, layer)}")
        for number in range(ROUNDS + 1):
            for source, found in rates.items():
                rate = _read(node, container, source, LAYER_MIB)
                if number:  # the first round brings the file into the host's page cache
                    found.append(rate)
    node.remove_image(image)
    raw, direct, values = rates.values()
    words = "the virtio disk under the layer, read as a device through the guest's page cache"
    more = beside("the same device past the guest's page cache (O_DIRECT)", values, direct)
    extra = {"beside": [more], "mib_a_round": LAYER_MIB}
    return [record("guest_read", "MiB/s", values, peer=words, peer_values=raw, extra=extra)]


def virtiofs_read(bed: Bed) -> list[Record]:
    """Read a file of a mounted directory of the host, beside copying it into the pod's disk and reading it there."""
    node = bed.node()
    volume = bed.base / "shared"
    volume.mkdir()
    data = os.urandom(FILE_MIB * MIB)
    (volume / "file").write_bytes(data)
    mounts = [cri.Mount(container_path="/volume", host_path=str(volume))]
    values, peer_values, copies, reads = [], [], [], []
    with node.pod(privileged=True) as pod:
        container = node.run(pod, "read", ["sleep", "3600"], privileged=True, mounts=mounts)
        for number in range(ROUNDS + 1):
            seconds = asyncio.run(_copy_in(node, container, data))
            copied = FILE_MIB / seconds
            read = _read(node, container, "/copy", FILE_MIB)
            shared = _read(node, container, "/volume/file", FILE_MIB)
            node.exec(container, "rm /copy")
            if number:
                values.append(shared)
                peer_values.append(1 / (1 / copied + 1 / read))
                copies.append(copied)
                reads.append(read)
    words = "the same bytes copied through Exec into the pod's disk, then read there"
    extra = {
        "mib_a_round": FILE_MIB,
        "copy_mib_s": round(percentile(copies, 50), 1),
        "read_of_copy_mib_s": round(percentile(reads, 50), 1),
    }
    return [record("virtiofs_read", "MiB/s", values, peer=words, peer_values=peer_values, extra=extra)]


def _tools() -> registry.BuiltLayer:
    """Return a layer with BusyBox."""

    def members() -> Iterator[tuple[tarfile.TarInfo, bytes]]:
        program, content = registry.member("bin/busybox", Path("/bin/busybox").read_bytes())
        program.mode = 0o755
        yield program, content
        for applet in APPLETS:
            yield registry.member(f"bin/{applet}", type=tarfile.SYMTYPE, linkname="busybox")

    return registry.layer(list(members()))


def _device(node: Node, container: str, layer: Path) -> str:
    """Return "MAJOR MINOR" of the guest's disk that is a layer: the one of its size."""
    sectors = layer.stat().st_size // 512
    script = f'for d in /sys/block/*; do if [ "$(cat $d/size)" = {sectors} ]; then cat $d/dev; fi; done'
    found = node.exec(container, script).split()
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} disks of the guest have {sectors} sectors")
    return found[0].replace(":", " ")


def _read(node: Node, container: str, source: str, mib: int) -> float:
    """Return MiB a second of reads in the guest, its page cache empty each time.

    Args:
        node: Whose container it is.
        container: A privileged one.
        source: What dd(1) reads, and options of dd.
        mib: How much.
    """
    read = f"echo 3 > /proc/sys/vm/drop_caches; dd of=/dev/null bs=1M count={mib} if={source} 2>&1"
    script = f"cat /proc/uptime; for i in {' '.join('x' * REPEAT)}; do {read}; done; cat /proc/uptime"
    before, *lines, after = node.exec(container, script).splitlines()
    if lines.count(f"{mib}+0 records in") != REPEAT:
        raise RuntimeError(f"dd if={source}: {' '.join(lines)}")
    return REPEAT * mib / max(float(after.split()[0]) - float(before.split()[0]), 0.01)


async def _copy_in(node: Node, container: str, data: bytes) -> float:
    """Write a file of the container through CRI's Exec; return seconds until it is on the pod's disk."""
    request = cri.ExecRequest(container_id=container, cmd=["dd", "of=/copy", "bs=64k", "conv=fsync"], stdin=True)
    url, began = node.runtime.Exec(request).url, time.monotonic()
    async with open_spdy(url, ["v4.channel.k8s.io"]) as (session, _):
        error = await session.open({"streamType": "error"})
        stdin = await session.open({"streamType": "stdin"})
        for offset in range(0, len(data), CHUNK):
            await stdin.write(data[offset : offset + CHUNK])
        await stdin.close_write()
        while await error.read():
            pass
    return time.monotonic() - began
