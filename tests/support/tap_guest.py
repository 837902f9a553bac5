"""A guest's network without a guest: another network namespace whose interface is behind a pod's tap."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import struct
import subprocess
import threading
from collections.abc import Iterator

from vmruntime.model.sandbox import NetworkInterface
from vmruntime.network.tap import IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUNSETIFF

FRAME_LIMIT = 1 << 17


class TapGuest:
    """What a VM's guest would have: the kernel's network stack behind the NIC.

    Attributes:
        namespace: Name of its network namespace, in which the interface `name` has the pod's MAC and MTU.
    """

    def __init__(self, namespace: str, name: str) -> None:
        self.namespace = namespace
        self.name = name

    def run(self, *command: str, check: bool = True, timeout: float = 30.0) -> str:
        """Run a program in the guest's network and return its output."""
        argv = ["ip", "netns", "exec", self.namespace, *command]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def popen(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a program in the guest's network."""
        return subprocess.Popen(["ip", "netns", "exec", self.namespace, *command], stdin=subprocess.PIPE)

    def configure(self, nic: NetworkInterface, gateway: str) -> None:
        """Set the pod's addresses and a default route, as an agent would."""
        for address in nic.addresses:
            self.run("ip", "addr", "add", address, "dev", self.name)
        self.run("ip", "route", "add", "default", "via", gateway, "dev", self.name, "onlink")


@contextlib.contextmanager
def tap_guest(nic: NetworkInterface, tap: int) -> Iterator[TapGuest]:
    """Yield a guest behind an open tap, which is the caller's still and can be closed at once."""
    token = secrets.token_hex(3)
    namespace, temporary = f"vmrt-guest-{token}", f"vmrtg{token}"
    with contextlib.ExitStack() as undo:
        outer = os.dup(tap)
        undo.callback(os.close, outer)
        inner = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        undo.callback(os.close, inner)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(inner, TUNSETIFF, struct.pack("16sH22x", temporary.encode(), flags))
        _ip("netns", "add", namespace)
        undo.callback(_ip, "netns", "delete", namespace)
        _ip("link", "set", temporary, "netns", namespace, "name", nic.name)
        _ip("-n", namespace, "link", "set", nic.name, "address", nic.mac, "mtu", str(nic.mtu), "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        undo.enter_context(_relay(inner, outer))
        yield TapGuest(namespace, nic.name)


@contextlib.contextmanager
def _relay(one: int, other: int) -> Iterator[None]:
    """Carry frames between two taps, virtio-net headers and all."""
    ended, end = os.pipe()

    def carry() -> None:
        while True:
            readable = select.select([one, other, ended], [], [])[0]
            if ended in readable:
                return
            for source, target in ((one, other), (other, one)):
                if source in readable:
                    with contextlib.suppress(OSError):  # a full queue, or an interface that is down: frames get lost
                        os.write(target, os.read(source, FRAME_LIMIT))

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield
    finally:
        os.write(end, b"x")
        thread.join()
        os.close(ended)
        os.close(end)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
