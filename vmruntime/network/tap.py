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
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from vmruntime.aio.pipeline import in_thread
from vmruntime.errors import Code
from vmruntime.model.sandbox import NetworkInterface
from vmruntime.network import netns
from vmruntime.network.errors import NetworkError
from vmruntime.network.rtnetlink import Rtnetlink

TAP_PREFIX = "vmrt-tap"
"""Of the name of every tap of ours; no interface of CNI's may have it."""

TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB  # linux/if_tun.h
TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000

QUIET = {"accept_ra": "0", "autoconf": "0", "router_solicitations": "0", "dad_transmits": "0"}
"""Settings of IPv6 under which the namespace says nothing of its own with the guest's MAC."""


VNET_HDR_SIZE = 10  # of struct virtio_net_hdr: what a new tap has

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


SPARE_MAC = "02:76:6d:72:74:00"
"""The same for all: a frozen guest that is brought back for many pods has one NIC. Locally administered."""


class SpareTap:
    """A tap that a VM can have before its pod has a network: alone and down in a namespace without a name.

    The pod gets that namespace, rather than the tap another one: the kernel lets a moved interface wait for tens of
    milliseconds. Both end with the last descriptor of the tap.

    Attributes:
        fd: The tap's descriptor.
        mac: What the VM's NIC is plugged in with. It is down until it gets the MAC address that CNI has chosen.
        namespace: Descriptor of the namespace.
        index: The tap's in the namespace.
    """

    def __init__(self) -> None:
        self.fd = -1
        self.namespace = -1
        self.index = 0
        self.mac = SPARE_MAC

    def make(self) -> None:
        """Make namespace and tap; for a thread, once. On failure, close() closes what there is.

        Raises:
            NetworkError: The kernel refuses.
        """
        self.namespace = netns.new()
        name = tap_name(0)
        with netns.entered(self.namespace):
            self.fd = _open(name)
            self.index = _index(name)

    def close(self) -> None:
        """Close our descriptors; twice does no harm. A VM that got the tap keeps it."""
        for fd in (self.fd, self.namespace):
            if fd >= 0:
                os.close(fd)
        self.fd = self.namespace = -1


async def spare_tap() -> SpareTap:
    """Make a spare tap.

    Raises:
        NetworkError: The kernel refuses.
    """
    spare = SpareTap()
    try:
        await in_thread(spare.make)
    except BaseException:
        spare.close()
        raise
    return spare


def open_tap(kernel: Rtnetlink, nic: NetworkInterface, *, persistent: bool = False) -> TapHandle:
    """Open the tap `nic.tap`, with the interface's MTU and joined to it; it is made if it is not there.

    Args:
        kernel: Of the pod's namespace, in which the thread is.
        nic: The interface beside which the tap is.
        persistent: It stays when nobody has it open any more.

    Raises:
        NetworkError: Somebody has it open (FAILED_PRECONDITION), or the kernel refuses.
    """
    handle = TapHandle(nic.name, _open(nic.tap, beside=nic.name))
    try:
        if persistent:
            _keep(handle.fd)
        join_tap(kernel, nic, _index(nic.tap))
    except BaseException:
        handle.close()
        raise
    return handle


def join_tap(kernel: Rtnetlink, nic: NetworkInterface, index: int) -> None:
    """Give the tap with this index its name and MTU, bring it up, and lead all frames between it and the interface.

    Raises:
        NetworkError: The kernel refuses.
    """
    kernel.set_link(index, name=nic.tap)
    _set_ipv6(nic.tap, {"disable_ipv6": "1"})
    _set_ipv6(nic.name, QUIET)
    kernel.set_link(index, mtu=nic.mtu, up=True)
    beside = _index(nic.name)
    for source, target in ((beside, index), (index, beside)):
        # Replaced, not added: they are there when a persistent tap is opened again, or lead to one that is gone.
        kernel.set_ingress(source)
        kernel.set_rule(source, REDIRECT, [], target)


def tap_name(index: int) -> str:
    """Return the name of the tap beside the interface with this index in the pod: short, and another one for each."""
    return f"{TAP_PREFIX}{index}"


def _open(name: str, beside: str = "") -> int:
    """Open a tap of the thread's namespace; it is made if it is not there."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise NetworkError(
                f"the tap {name} of the pod's interface {beside} is in use: another VM has it open",
                code=Code.FAILED_PRECONDITION,
            ) from error
        raise NetworkError(f"a tap cannot be made: {error.strerror}", remedy="modprobe tun") from error
    return fd


def _keep(fd: int) -> None:
    """Have a tap stay without its descriptor, and forget what the last VM had agreed on with its guest."""
    try:
        fcntl.ioctl(fd, TUNSETPERSIST, 1)
        fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HDR_SIZE))
    except OSError as error:
        raise NetworkError(f"a tap cannot be kept: {error.strerror}") from error


def _set_ipv6(interface: str, settings: Mapping[str, str]) -> None:
    """Write settings of an interface, if the kernel has IPv6."""
    directory = Path("/proc/sys/net/ipv6/conf") / interface
    try:
        for setting, value in settings.items() if directory.exists() else ():
            (directory / setting).write_text(value)
    except OSError as error:
        raise NetworkError(f"IPv6 of the interface {interface} cannot be set up: {error.strerror}") from error


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise NetworkError(f"the pod has no interface {name} any more") from error
