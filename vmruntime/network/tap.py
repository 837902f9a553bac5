"""A tap beside a CNI interface, joined so that the guest's NIC takes the interface's place.

Frames that arrive at the CNI interface are redirected to the tap before the namespace's own network stack sees them, and
back (tc-mirred(8)); so the guest may use the same MAC and IP. The interface keeps its addresses, which CHECK looks for.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

from vmruntime.aio.process import last_lines, run
from vmruntime.network import netns
from vmruntime.network.errors import NetworkError
from vmruntime.network.survey import Nic

TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000

QUIET = {"accept_ra": "0", "autoconf": "0", "router_solicitations": "0", "dad_transmits": "0"}
"""Settings of IPv6 under which the namespace says nothing of its own with the guest's MAC."""


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


async def open_tap(namespace: Path, nic: Nic) -> TapHandle:
    """Make a tap with the interface's MTU and join the two."""
    name = tap_name(nic)

    # Here rather than in the thread's result, which a cancelled caller does not get.
    handle = TapHandle(nic.name, -1)

    def make() -> None:
        handle.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(handle.fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        for interface, settings in ((name, {"disable_ipv6": "1"}), (nic.name, QUIET)):
            directory = Path("/proc/sys/net/ipv6/conf") / interface
            for setting, value in settings.items() if directory.exists() else ():
                (directory / setting).write_text(value)

    try:
        await _make(namespace, make)
        await _batch(["ip", "-n", namespace.name, "-batch", "-"], f"link set {name} mtu {nic.mtu} up\n")
        await _batch(["tc", "-n", namespace.name, "-batch", "-"], _redirect(nic.name, name) + _redirect(name, nic.name))
    except BaseException:
        handle.close()
        raise
    return handle


async def _make(namespace: Path, make: Callable[[], None]) -> None:
    try:
        await netns.inside(namespace, make)
    except OSError as error:
        raise NetworkError(f"a tap cannot be made: {error.strerror}", remedy="modprobe tun") from error


def tap_name(nic: Nic) -> str:
    """Return the name of the tap beside an interface: short, and another one for each."""
    return f"vmrt-tap{nic.index}"


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
