"""The DNS servers a pod made by hand gets: the host's, as far as a pod can reach them."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from vmruntime.generated import cri_pb2

# Where systemd-resolved keeps the servers behind its loopback stub.
_FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
_SERVERS_READ = 3  # resolv.conf(5): MAXNS


def host_dns(files: tuple[Path, ...] = _FILES) -> cri_pb2.DNSConfig | None:
    """Return the first file's settings that name a server outside loopback; None: there is none."""
    for file in files:
        try:
            config = parse(file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if config.servers:
            return config
    return None


def parse(text: str) -> cri_pb2.DNSConfig:
    """Return what a resolv.conf(5) says, without servers on loopback: in a pod that is the pod itself."""
    servers: list[str] = []
    searches: list[str] = []
    options: list[str] = []
    for line in text.splitlines():
        if line.startswith(("#", ";")):
            continue
        match line.split():
            case ["nameserver", server, *_] if _reachable(server):
                servers.append(server)
            case ["search" | "domain", *names]:
                searches = names
            case ["options", *words]:
                options += words
    return cri_pb2.DNSConfig(servers=servers[:_SERVERS_READ], searches=searches, options=options)


def _reachable(server: str) -> bool:
    try:
        # A zone ("%eth0") names an interface of the host.
        return "%" not in server and not ipaddress.ip_address(server).is_loopback
    except ValueError:
        return False
