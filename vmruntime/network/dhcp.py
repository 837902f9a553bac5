"""DHCP for the guests of image pods: a dnsmasq(8) in the pod's namespace, which only the guest can reach.

All that a guest sends is redirected to the CNI interface, but for requests to DHCP servers: a rule before that one leaves
them to the namespace's own stack, on the tap, where dnsmasq listens. They never reach the node, so no server of its
network answers a guest, and dnsmasq hears nobody else. Its address on the tap is link-local and known to no interface
but that.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from vmruntime.aio.detached import PATH, DetachedProcess, ProcessIdentity, drop_privileges
from vmruntime.aio.pipeline import in_thread
from vmruntime.aio.process import last_lines
from vmruntime.errors import FailedPrecondition
from vmruntime.model.sandbox import Dns, PodNetwork
from vmruntime.network import netns
from vmruntime.network.dhcp_options import Lease, dnsmasq_arguments, leases
from vmruntime.network.errors import NetworkError
from vmruntime.network.rtnetlink import Key, Rtnetlink

PROGRAM = "dnsmasq"
ROLE = "dhcp"
LOG_NAME = "dhcp.log"

PASS_DHCP = 1
"""Number of the rule that keeps a guest's requests to DHCP servers from the redirection."""

SERVER_PORT = 67
DHCP_REQUESTS = [
    Key(-4, 0x0800, 0xFFFF),  # the frame is of IPv4 (of the Ethernet header, the last half of the last four bytes)
    Key(8, socket.IPPROTO_UDP << 16, 0xFF << 16),
    Key(20, SERVER_PORT, 0xFFFF),  # the destination's port, when the IP header has no options
]
CAPABILITIES = (
    "net_admin",
    "net_bind_service",
)  # dnsmasq does not start without the first, though it has no use for it

SETTINGS = {"forwarding": "0", "accept_local": "1"}
"""Of IPv4 on the tap. A guest that has its address sends from it, and the namespace's CNI interface has it too."""

START_TIMEOUT = 20.0
POLL = 0.01

Record = Callable[[str, ProcessIdentity], Awaitable[None]]


async def start_dhcp(
    network: PodNetwork, dns: Dns, hostname: str, directory: Path, record: Record, user: str
) -> DetachedProcess | None:
    """Start the server of a pod whose taps are there, and wait until it listens.

    It goes on until the caller ends it, also without a VM; a second one must not be started beside it.

    Args:
        network: As CNI made it.
        dns: As the pod wants it; CNI's stand in for what it leaves out.
        hostname: The guest's; empty: it is told none.
        directory: Of the pod; gets dhcp.log, with what keeps dnsmasq from starting.
        record: Awaited with "dhcp" and the process before it becomes dnsmasq.
        user: Account to run as.

    Returns:
        The server, or None when the pod has no IPv4 address and so nothing to ask for.

    Raises:
        InvalidArgument: A name or server cannot be told by DHCP; nothing was started.
        FailedPrecondition: dnsmasq is not installed, or there is no such account.
        NetworkError: The kernel refuses, or dnsmasq does.
    """
    arguments = dnsmasq_arguments(network, dns, hostname)
    if not arguments:
        return None
    namespace = Path(network.netns)
    if await in_thread(lambda: shutil.which(PROGRAM, path=PATH)) is None:
        raise FailedPrecondition(f"the program {PROGRAM!r} is not installed", remedy="install dnsmasq-base")
    await _listen_on_taps(namespace, leases(network))
    log = directory / LOG_NAME
    process = await DetachedProcess.spawn(
        ["nsenter", f"--net={namespace}", "--", *drop_privileges(user, CAPABILITIES), PROGRAM, *arguments],
        record=lambda identity: record(ROLE, identity),
        log=log,
    )
    try:
        await _until_listening(process, log)
    except BaseException:
        await process.end()
        raise
    return process


async def _listen_on_taps(namespace: Path, given: list[Lease]) -> None:
    """Give each tap the server's address and let requests to it pass; doing it again changes nothing."""

    def set_up() -> None:
        with Rtnetlink() as kernel:
            for lease in given:
                for setting, value in SETTINGS.items():
                    (Path("/proc/sys/net/ipv4/conf") / lease.nic.tap / setting).write_text(value)
                tap = socket.if_nametoindex(lease.nic.tap)
                kernel.set_address(tap, str(lease.server))
                # To a guest that has its address an answer is sent there, and its answer to ARP would be redirected.
                kernel.set_neighbour(tap, str(lease.address.ip), lease.nic.mac)
                kernel.set_rule(tap, PASS_DHCP, DHCP_REQUESTS)

    try:
        await netns.inside(namespace, set_up)
    except OSError as error:
        raise NetworkError(f"DHCP cannot be set up in {namespace}: {error.strerror}: {error.filename}") from error


async def _until_listening(process: DetachedProcess, log: Path) -> None:
    """Wait until dnsmasq has a socket at the server's port.

    Raises:
        NetworkError: The process has ended, or takes too long.
    """
    try:
        async with asyncio.timeout(START_TIMEOUT):
            while process.alive:
                if await in_thread(lambda: _listens(process)):
                    return
                await asyncio.sleep(POLL)
    except TimeoutError:
        raise NetworkError(f"dnsmasq does not listen after {START_TIMEOUT:g} s; see {log}") from None
    words = last_lines(log.read_text(errors="replace"))
    raise NetworkError(f"dnsmasq ended at its start: {words}")


def _listens(process: DetachedProcess) -> bool:
    if process.name != PROGRAM:
        return False  # it is not in the namespace yet: the host's sockets would be looked at
    try:
        lines = Path(f"/proc/{process.identity.pid}/net/udp").read_text().splitlines()[1:]
    except OSError:
        return False
    return any(line.split()[1].endswith(f":{SERVER_PORT:04X}") for line in lines)
