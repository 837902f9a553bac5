"""The peer of a sandbox's start: QEMU alone, booting the same kernel and initramfs with the same devices.

The clock runs from the start of QEMU to the agent's line on the console, which says that it listens. The vsock helper
is started before, and nothing else of vmruntime is in the way: no daemon, no store, no CNI, no set-up.
"""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from vmruntime.hypervisor.devices import host_architecture
from vmruntime.hypervisor.interface import Accelerator, Disk, KernelBoot, VmSpec, VsockTransport
from vmruntime.hypervisor.qemu.argv import Descriptors, qemu_argv
from vmruntime.hypervisor.qemu.blockdev import OpenDisk
from vmruntime.hypervisor.qemu.driver import find_qemu
from vmruntime.hypervisor.vsock import choose_transport, find_program, helper_argv
from vmruntime.model.resources import VmSize

READY = b"vmruntime-agent: ready"
DEADLINE = 60.0


def boot_once(guest: Path, size: VmSize, accelerator: Accelerator) -> float:
    """Boot and end one VM; return seconds to the agent's line."""
    with tempfile.TemporaryDirectory(prefix="raw-", dir="/tmp") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        scratch = directory / "scratch.img"
        subprocess.run(["truncate", "-s", "10G", str(scratch)], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(scratch)], check=True)
        disk = stack.enter_context(scratch.open("r+b"))
        qmp, console = _listen(stack, directory / "qmp"), _listen(stack, directory / "console")
        vsock, native = _vsock(stack, directory)
        spec = VmSpec(
            id="raw" * 8,
            size=size,
            boot=KernelBoot(kernel=guest / "vmlinuz", initramfs=guest / "initramfs.img"),
            directory=directory,
            cid=4_000_000,
            disks=[Disk(path=scratch, serial="scratch", readonly=False)],
        )
        descriptors = Descriptors(
            qmp=qmp.fileno(),
            console=console.fileno(),
            vsock=vsock,
            vsock_native=native,
            disks=[OpenDisk(fd=disk.fileno())],
        )
        architecture = host_architecture()
        argv = qemu_argv(find_qemu("", architecture), architecture, accelerator, spec, descriptors)
        reader = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        began = time.monotonic()
        qemu = subprocess.Popen(argv, pass_fds=descriptors.all(), stdout=subprocess.DEVNULL)
        try:
            reader.connect(str(directory / "console"))
            _wait_for_line(reader)
            return time.monotonic() - began
        finally:
            qemu.kill()
            qemu.wait()


def _wait_for_line(reader: socket.socket) -> None:
    seen = b""
    end = time.monotonic() + DEADLINE
    while READY not in seen:
        if not select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError(f"the raw boot did not finish within {DEADLINE:g} s: {seen[-500:]!r}")
        data = reader.recv(65536)
        if not data:
            raise RuntimeError(f"QEMU ended: {seen[-500:]!r}")
        seen += data


def _listen(stack: contextlib.ExitStack, path: Path) -> socket.socket:
    server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    server.bind(str(path))
    server.listen(1)
    return server


def _vsock(stack: contextlib.ExitStack, directory: Path) -> tuple[int, bool]:
    if choose_transport("auto", "") is VsockTransport.NATIVE:
        return stack.enter_context(open("/dev/vhost-vsock", "r+b", buffering=0)).fileno(), True
    backend = directory / "backend"
    argv = helper_argv(find_program(""), 4_000_000, backend, directory / "hybrid")
    helper = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(helper.wait)
    stack.callback(helper.kill)
    connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    end = time.monotonic() + 10
    while True:
        try:
            connection.connect(str(backend))
            return connection.fileno(), False
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > end:
                raise
            time.sleep(0.005)
