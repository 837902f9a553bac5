"""What a machine gets by QMP while it is held at its start."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from vmruntime.hypervisor.libvirt.domain import CONSOLE, VSOCK_PORT
from vmruntime.hypervisor.libvirt.monitor import Monitor

AGENT_PORT = "org.qemu.guest_agent.0"


async def plug_console(monitor: Monitor, directory: Path, *, logged: bool) -> None:
    """Put the serial port on DIRECTORY/console.sock, ours alone, in place of the socket that libvirt made.

    Args:
        monitor: QEMU's.
        directory: The VM's.
        logged: What the guest writes is added to DIRECTORY/console.log. By libvirt's own log it would go through virtlogd,
            which cuts the file.
    """
    with contextlib.ExitStack() as stack:
        backend = await _listening(monitor, directory / "console.sock", stack)
        if logged:
            fd = os.open(directory / "console.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            answer = await monitor.execute_with_fd("add-fd", {}, fd)
            backend["data"] |= {"logfile": f"/dev/fdset/{answer['fdset-id']}", "logappend": True}
        await monitor.execute("chardev-change", {"id": CONSOLE, "backend": backend})


async def plug_agent(monitor: Monitor, directory: Path) -> None:
    """Add the guest agent's port, behind DIRECTORY/qga.sock; of one that libvirt makes it takes the only place."""
    with contextlib.ExitStack() as stack:
        backend = await _listening(monitor, directory / "qga.sock", stack)
        await monitor.execute("chardev-add", {"id": "qga", "backend": backend})
    device = {
        "driver": "virtserialport",
        "id": "agent",
        "bus": "virtio-serial0.0",
        "chardev": "qga",
        "name": AGENT_PORT,
    }
    await monitor.execute("device_add", device)


async def plug_vsock(monitor: Monitor, backend_fd: int) -> None:
    """Add the vsock device that vhost-device-vsock serves."""
    await monitor.execute_with_fd("getfd", {"fdname": "vsock"}, backend_fd)
    address = {"type": "fd", "data": {"str": "vsock"}}
    await monitor.execute(
        "chardev-add", {"id": "vsock", "backend": {"type": "socket", "data": {"addr": address, "server": False}}}
    )
    device = {"driver": "vhost-user-vsock-pci", "id": "vsock", "chardev": "vsock", "bus": VSOCK_PORT}
    await monitor.execute("device_add", device)


async def _listening(monitor: Monitor, path: Path, stack: contextlib.ExitStack) -> dict[str, dict[str, object]]:
    """Return the chardev backend of a socket that only root can connect to; it is bound before QEMU has it."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    stack.callback(server.close)
    path.unlink(missing_ok=True)
    server.bind(str(path))
    path.chmod(0o600)
    server.listen(4)
    name = path.name.partition(".")[0]
    await monitor.execute_with_fd("getfd", {"fdname": name}, server.fileno())
    data = {"addr": {"type": "fd", "data": {"str": name}}, "server": True, "wait": False}
    return {"type": "socket", "data": data}  # type: ignore[dict-item]
