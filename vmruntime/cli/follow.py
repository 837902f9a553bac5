"""Following a container to its end: what it writes and how it exits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import click

from vmruntime.cli.client import Client
from vmruntime.cli.crilog import LogFile, Printer
from vmruntime.errors import Unavailable
from vmruntime.generated import cri_pb2

LOG_INTERVAL = 0.02
STATUS_INTERVAL = 0.1

EXIT_SECONDS = 30.0

RESTART_PATIENCE = 60.0
"""Seconds a daemon may be away, as it is while it is upgraded; its pods go on meanwhile."""


def printer(*, timestamps: bool = False) -> Printer:
    """Return a printer on the present stdout and stderr."""
    return Printer(sys.stdout.buffer, sys.stderr.buffer, timestamps=timestamps)


def status_of(client: Client, container_id: str, *, timeout: float | None = None) -> cri_pb2.ContainerStatus:
    """Return a container's status."""
    request = cri_pb2.ContainerStatusRequest(container_id=container_id)
    return client.call(client.runtime.ContainerStatus, request, timeout=timeout).status


def status_after_streams(client: Client, container_id: str) -> cri_pb2.ContainerStatus:
    """Return the status of a container whose streams have ended: as a rule, and so waited for, it has exited too."""
    deadline = time.monotonic() + EXIT_SECONDS
    while (status := status_of(client, container_id)).state != cri_pb2.CONTAINER_EXITED:
        if time.monotonic() > deadline:
            break
        time.sleep(STATUS_INTERVAL)
    return status


class Follower:
    """Prints a container's log file as it grows, until the container has exited."""

    def __init__(self, client: Client, container_id: str, log: LogFile, to: Printer) -> None:
        self._client = client
        self._id = container_id
        self._log = log
        self._printer = to
        self._away_since: float | None = None

    def pump(self) -> bool:
        """Print what is new; return whether anything was."""
        entries = self._log.read()
        self._printer.write(entries)
        return bool(entries)

    def until_exit(self, tick: Callable[[], None] = lambda: None) -> cri_pb2.ContainerStatus:
        """Print until the container has exited and its log is read to the end, and return its last status.

        Args:
            tick: Called at every turn; what it raises ends this.

        Raises:
            NotFound: The container was removed.
            Unavailable: The daemon stayed away.
        """
        asked = float("-inf")
        while True:
            tick()
            if self.pump():
                continue
            if time.monotonic() - asked >= STATUS_INTERVAL:
                status = self._status()
                asked = time.monotonic()
                if status is not None and status.state == cri_pb2.CONTAINER_EXITED:
                    # The daemon tells of the exit after the last line is in the file.
                    while self.pump():
                        pass
                    return status
            time.sleep(LOG_INTERVAL)

    def _status(self) -> cri_pb2.ContainerStatus | None:
        try:
            status = status_of(self._client, self._id, timeout=10)
        except Unavailable as error:
            now = time.monotonic()
            if self._away_since is None:
                self._away_since = now
                click.echo(f"vmruntime: waiting for the daemon: {error.message}", err=True)
            if now - self._away_since > RESTART_PATIENCE:
                raise
            return None
        self._away_since = None
        return status


def report_malformed(log: LogFile) -> None:
    """Say on stderr that lines were left out, if any were."""
    if log.malformed:
        click.echo(f"vmruntime: left out {log.malformed} lines that are not in CRI's log format", err=True)
