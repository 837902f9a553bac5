"""A tap beside a CNI interface, joined so that the guest's NIC takes the interface's place.

Frames that arrive at the CNI interface are redirected to the tap before the namespace's own network stack sees them, and
back (tc-mirred(8)); so the guest may use the same MAC and IP.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec

from vmruntime.aio.process import last_lines, run
from vmruntime.network import netns
from vmruntime.network.errors import NetworkError

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


class TapHandle:
    """An open tap. It exists as long as a descriptor of it does: ours until close(), then the VM's."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd

    def close(self) -> None:
        """Close our descriptor; once is enough, twice does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Link(msgspec.Struct, frozen=True):
    """What ip-link(8) says of an interface."""

    ifname: str
    address: str
    mtu: int


async def link(namespace: Path, name: str) -> Link:
    """Return an interface's MAC and MTU."""
    done = await run(["ip", "-n", namespace.name, "-j", "link", "show", "dev", name])
    if done.returncode != 0:
        raise NetworkError(f"the pod has no interface {name!r} though CNI says so: {last_lines(done.stderr)}")
    return msgspec.json.decode(done.stdout, type=list[Link])[0]


async def open_tap(namespace: Path, nic: Link) -> TapHandle:
    """Make a tap with the interface's MTU and join the two."""
    name = tap_name(nic.ifname)

    # Here rather than in the thread's result, which a cancelled caller does not get.
    handle = TapHandle(nic.ifname, -1)

    def make() -> None:
        handle.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(handle.fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        # The namespace must not speak for itself with the guest's MAC: no neighbour discovery, no autoconfiguration.
        for interface in (name, nic.ifname):
            setting = Path(f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6")
            if setting.exists():
                setting.write_text("1")

    try:
        await _make(namespace, make)
        await _batch(["ip", "-n", namespace.name, "-batch", "-"], f"link set {name} mtu {nic.mtu} up\n")
        await _batch(
            ["tc", "-n", namespace.name, "-batch", "-"], _redirect(nic.ifname, name) + _redirect(name, nic.ifname)
        )
    except BaseException:
        handle.close()
        raise
    return handle


async def _make(namespace: Path, make: Callable[[], None]) -> None:
    try:
        await netns.inside(namespace, make)
    except OSError as error:
        raise NetworkError(f"a tap cannot be made: {error.strerror}", remedy="modprobe tun") from error


def tap_name(interface: str) -> str:
    """Return the tap's name; interface names have at most 15 characters."""
    return f"tap_{interface}"[:15]


def _redirect(source: str, target: str) -> str:
    # u32 with an empty match, because some kernels have no matchall classifier.
    return (
        f"qdisc add dev {source} ingress\n"
        f"filter add dev {source} parent ffff: protocol all u32 match u8 0 0 action mirred egress redirect dev {target}\n"
    )


async def _batch(argv: list[str], commands: str) -> None:
    done = await run(argv, input=commands.encode())
    if done.returncode != 0:
        raise NetworkError(f"{argv[0]} refused: {last_lines(done.stderr)}")
