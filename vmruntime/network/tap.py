"""A tap beside a CNI interface, joined so that the guest's NIC takes the interface's place.

Frames that arrive at the CNI interface are redirected to the tap before the namespace's own network stack sees them, and
back (tc-mirred(8)); so the guest may use the same MAC and IP. The interface keeps its addresses, which CHECK looks for.

A tap ends with its last descriptor, or stays in the namespace until that goes (persistent): then one VM after the
other can open it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

from vmruntime.aio.process import last_lines, run
from vmruntime.errors import Code
from vmruntime.model.sandbox import NetworkInterface
from vmruntime.network import netns
from vmruntime.network.errors import NetworkError

TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB  # linux/if_tun.h
TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000

QUIET = {"accept_ra": "0", "autoconf": "0", "router_solicitations": "0", "dad_transmits": "0"}
"""Settings of IPv6 under which the namespace says nothing of its own with the guest's MAC."""


VNET_HDR_SIZE = 10  # of struct virtio_net_hdr: what a new tap has

ROOT_TABLE = 0x800
"""u32's name for the first table of rules of an interface; every rule is in it, so each has a handle we know."""

REDIRECT = 0x800
"""Number of the rule that redirects. Those with a smaller one come first."""


class TapHandle:
    """An open tap. Ours until close(), then the VM's; see `persistent` for how long the tap itself exists."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd

    def close(self) -> None:
        """Close our descriptor; once is enough, twice does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


async def open_tap(namespace: Path, nic: NetworkInterface, *, persistent: bool = False) -> TapHandle:
    """Open the tap `nic.tap`, with the interface's MTU and joined to it; it is made if it is not there.

    Args:
        namespace: The pod's network namespace.
        nic: The interface beside which the tap is.
        persistent: It stays when nobody has it open any more.

    Raises:
        NetworkError: Somebody has it open (FAILED_PRECONDITION), or the kernel refuses.
    """
    # Here rather than in the thread's result, which a cancelled caller does not get.
    handle = TapHandle(nic.name, -1)

    def make() -> None:
        handle.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        request = struct.pack("16sH22x", nic.tap.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
        fcntl.ioctl(handle.fd, TUNSETIFF, request)
        if persistent:
            fcntl.ioctl(handle.fd, TUNSETPERSIST, 1)
            # What the last VM had agreed on with its guest.
            fcntl.ioctl(handle.fd, TUNSETOFFLOAD, 0)
            fcntl.ioctl(handle.fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HDR_SIZE))
        for interface, settings in ((nic.tap, {"disable_ipv6": "1"}), (nic.name, QUIET)):
            directory = Path("/proc/sys/net/ipv6/conf") / interface
            for setting, value in settings.items() if directory.exists() else ():
                (directory / setting).write_text(value)

    try:
        await _make(namespace, nic, make)
        await batch(["ip", "-n", namespace.name, "-batch", "-"], f"link set {nic.tap} mtu {nic.mtu} up\n")
        rules = _redirect(nic.name, nic.tap) + _redirect(nic.tap, nic.name)
        await batch(["tc", "-n", namespace.name, "-batch", "-"], rules)
    except BaseException:
        handle.close()
        raise
    return handle


async def _make(namespace: Path, nic: NetworkInterface, make: Callable[[], None]) -> None:
    try:
        await netns.inside(namespace, make)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise NetworkError(
                f"the tap {nic.tap} of the pod's interface {nic.name} is in use: another VM has it open",
                code=Code.FAILED_PRECONDITION,
            ) from error
        raise NetworkError(f"a tap cannot be made: {error.strerror}", remedy="modprobe tun") from error


def tap_name(index: int) -> str:
    """Return the name of the tap beside the interface with this index in the pod: short, and another one for each."""
    return f"vmrt-tap{index}"


def rule(interface: str, number: int, match_and_action: str) -> str:
    """Return the line for tc-batch that makes or replaces the rule with this number for what arrives at an interface.

    All are u32's, because some kernels have no matchall classifier, and in one table: among tables, handles depend on
    the order in which they were made.
    """
    handle = f"{ROOT_TABLE:x}::{number:x}"
    return f"filter replace dev {interface} parent ffff: protocol all prio 1 handle {handle} u32 {match_and_action}\n"


def _redirect(source: str, target: str) -> str:
    # Replaced, not added: they are there when a persistent tap is opened again, or lead to one that is gone.
    return f"qdisc replace dev {source} ingress\n" + rule(
        source, REDIRECT, f"match u8 0 0 action mirred egress redirect dev {target}"
    )


async def batch(argv: list[str], commands: str) -> None:
    """Run lines of commands by ip(8) or tc(8).

    Raises:
        NetworkError: One failed, with the program's words; those before it are done.
    """
    done = await run(argv, input=commands.encode())
    if done.returncode != 0:
        raise NetworkError(f"{argv[0]} refused: {last_lines(done.stderr)}")
