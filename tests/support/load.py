"""A daemon's own figures, before and after it has worked, and clients that call it many times at once."""

from __future__ import annotations

import contextlib
import socket
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tests.support import leaks
from tests.support.daemon import Daemon, running_daemon
from vmruntime.generated import cri_pb2_grpc

QUIET = '[log]\nlevel = "warning"\n'


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What a daemon takes at one moment."""

    descriptors: int
    threads: int
    tasks: int
    rss_mib: float


class MeasuredDaemon:
    """A daemon with its metrics.

    Attributes:
        daemon: Itself.
        port: Of its metrics.
    """

    def __init__(self, daemon: Daemon, port: int) -> None:
        self.daemon = daemon
        self.port = port

    def metrics(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """Return every sample by name and labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
        return found

    def figures(self) -> Figures:
        """Return what it takes now."""
        status = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{self.daemon.pid}/status").read_text().splitlines()
            if ":" in line
        )
        return Figures(
            descriptors=len(leaks.open_descriptors(self.daemon.pid)),
            threads=int(status["Threads"]),
            tasks=int(self.metrics()["vmruntime_tasks"][()]),
            rss_mib=round(int(status["VmRSS"].split()[0]) / 1024, 1),
        )


@contextlib.contextmanager
def measured_daemon(base: Path, *, fake: bool = False, extra: str = "") -> Iterator[MeasuredDaemon]:
    """Yield a daemon with metrics; with `fake`, one without VMs. At its end nothing of it may be left."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    metrics = f'{QUIET}[metrics]\naddress = "127.0.0.1"\nport = {port}\n{extra}'
    module = "tests.support.fake_daemon" if fake else "vmruntime.daemon"
    with running_daemon(base, metrics, module=module) as daemon:
        yield MeasuredDaemon(daemon, port)


@contextlib.asynccontextmanager
async def runtime_of(daemon: Daemon) -> AsyncIterator[Any]:
    """Yield a stub for many calls at once."""
    async with grpc.aio.insecure_channel(f"unix:{daemon.socket}") as channel:
        yield cri_pb2_grpc.RuntimeServiceStub(channel)
