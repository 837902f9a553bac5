"""Ways to the guest's vsock: the kernel's vhost-vsock, or the vhost-device-vsock program."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import struct
from pathlib import Path

import structlog

from vmruntime.aio.detached import DetachedProcess
from vmruntime.errors import DeadlineExceeded, FailedPrecondition
from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.interface import VsockTransport

log = structlog.get_logger(__name__)

VHOST_VSOCK = Path("/dev/vhost-vsock")
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60  # linux/vhost.h
PROGRAM = "vhost-device-vsock"
PROGRAM_DIRECTORIES = (Path("/usr/local/libexec/vmruntime"), Path("/usr/libexec/vmruntime"))
HELPER_TIMEOUT = 10.0
ANSWER_TIMEOUT = 15.0
QUEUES_TIMEOUT, QUEUES_INTERVAL = 2.0, 0.005
DOORBELLS = 2
"""Of the queues to and from the guest."""

NOBODYS_PORT = 9
"""The guest refuses it, and the helper passes that on."""


def choose_transport(wanted: str, program: str) -> VsockTransport:
    """Return how VMs get their vsock on this host.

    Args:
        wanted: The setting hypervisor.vsock: auto, native or vhost-user.
        program: The setting hypervisor.vhost_device_vsock.

    Raises:
        FailedPrecondition: The host has neither, or not the one asked for.
    """
    if wanted in ("auto", "native") and native_works():
        return VsockTransport.NATIVE
    if wanted == "native":
        raise FailedPrecondition(
            f"hypervisor.vsock is 'native' but {VHOST_VSOCK} does not work", remedy="modprobe vhost_vsock"
        )
    find_program(program)
    return VsockTransport.VHOST_USER


def native_works() -> bool:
    """Whether the kernel's vhost-vsock device opens and takes a context id."""
    try:
        fd = os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.ioctl(fd, VHOST_VSOCK_SET_GUEST_CID, struct.pack("Q", 0x7FFF_FFF0))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def find_program(configured: str) -> str:
    """Return the path of vhost-device-vsock.

    Raises:
        FailedPrecondition: It is nowhere to be found.
    """
    if configured:
        if os.access(configured, os.X_OK):
            return configured
        raise FailedPrecondition(f"hypervisor.vhost_device_vsock: {configured!r} cannot be executed")
    for directory in PROGRAM_DIRECTORIES:
        if os.access(directory / PROGRAM, os.X_OK):
            return str(directory / PROGRAM)
    found = shutil.which(PROGRAM)
    if found is None:
        raise FailedPrecondition(
            f"neither {VHOST_VSOCK} nor the program {PROGRAM} is here, so the host cannot talk to guests",
            remedy="modprobe vhost_vsock, or run make setup, which installs the program",
        )
    return found


def find_vsock(transport: VsockTransport, configured: str) -> str:
    """Return the path of vhost-device-vsock where guests are reached by it, else nothing; see find_program()."""
    return find_program(configured) if transport is VsockTransport.VHOST_USER else ""


def helper_directory(directory: Path) -> Path:
    """Return the one directory of a VM that its unprivileged helpers may write."""
    return directory / "helpers"


def hybrid_socket(directory: Path) -> Path:
    """Return where vhost-device-vsock listens for connections to the guest."""
    return helper_directory(directory) / "vsock.sock"


def helper_argv(program: str, cid: int, backend: Path, hybrid: Path) -> list[str]:
    """Return the arguments of vhost-device-vsock for one VM.

    Args:
        program: Path of the program.
        cid: The guest's context id.
        backend: Socket that QEMU connects to (vhost-user).
        hybrid: Socket that the host connects to ("CONNECT port").
    """
    return [program, "--guest-cid", str(cid), "--socket", str(backend), "--uds-path", str(hybrid)]


async def connect_backend(helper: DetachedProcess, backend: Path, log: Path) -> socket.socket:
    """Connect to a helper that was just started, waiting until it listens.

    Raises:
        HypervisorError: It ended instead, with its last words.
        DeadlineExceeded: It did not listen within 10 s.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + HELPER_TIMEOUT
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(str(backend))  # a unix socket connects or fails at once
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
        except BaseException:
            connection.close()
            raise
        if not helper.alive:
            raise HypervisorError(f"{PROGRAM} ended at its start: {tail_of(log)}")
        if loop.time() > deadline:
            raise DeadlineExceeded(f"{PROGRAM} did not listen on {backend} within {HELPER_TIMEOUT:g} s")
        await asyncio.sleep(0.003)


class Plugged:
    """The vsock of a guest that comes back, from the moment when it was plugged in.

    vhost-device-vsock 0.3 ends its work for good when a connection comes before it has set up its queues: the first error
    ends the event loop of vhost-user-backend. QEMU does not wait until it has, and the guest does not know. The
    queue to the guest is set up when the descriptor of the next one's doorbell (an eventfd) is there, since messages are
    taken one after the other.
    """

    def __init__(self, helper: int) -> None:
        """Take the pid of vhost-device-vsock, of a guest that does not run yet."""
        self._helper = helper
        self._before = _eventfds(helper)

    async def usable(self) -> None:
        """Wait until a connection can be made, once the guest has said that it has a vsock; not for ever."""
        if not self._before:  # another program, or one that has ended
            return
        try:
            async with asyncio.timeout(QUEUES_TIMEOUT):
                while await asyncio.to_thread(_eventfds, self._helper) < self._before + DOORBELLS:  # noqa: ASYNC110
                    await asyncio.sleep(QUEUES_INTERVAL)  # nothing tells
        except TimeoutError:
            log.warning("vhost-device-vsock has not been seen to set up its queues", pid=self._helper)


def _eventfds(pid: int) -> int:
    """Return how many eventfds a process has; none once it has ended."""
    count = 0
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                count += "[eventfd]" in os.readlink(f"/proc/{pid}/fd/{fd}")
    return count


async def vsock_answers(hybrid: Path) -> bool:
    """Return whether a VM's helper still serves connections to the guest, be it by refusing them.

    Args:
        hybrid: What hybrid_socket() returned.
    """
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            reader, writer = await asyncio.open_unix_connection(hybrid)
            try:
                writer.write(f"CONNECT {NOBODYS_PORT}\n".encode())
                await reader.read(1)
            finally:
                writer.close()
    except ConnectionResetError:
        return True
    except OSError:  # TimeoutError among them
        return False
    return True


def tail_of(log: Path, limit: int = 600) -> str:
    """Return the end of a helper's log, for an error message."""
    try:
        text = log.read_text(errors="replace").strip()
    except FileNotFoundError:
        return "it said nothing"
    return text[-limit:] or "it said nothing"
