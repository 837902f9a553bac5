"""libvirt's event loop, in a thread of its own.

libvirt has one event loop a process; connections keep themselves alive and deliver events by it, and the driver inside the
process (qemu:///embed) works by it. It runs from the first holder to the last.
"""

from __future__ import annotations

import threading

import structlog

from vmruntime.hypervisor.libvirt.binding import libvirt

log = structlog.get_logger(__name__)


class EventLoop:
    """Runs while somebody holds it. Its methods are called in any thread and block for a moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._registered = False
        self._stop = False
        self._thread: threading.Thread | None = None

    def hold(self) -> None:
        """Keep it running; before the first connection is opened."""
        with self._lock:
            self._holders += 1
            if self._holders > 1:
                return
            if not self._registered:
                libvirt.virEventRegisterDefaultImpl()
                self._registered = True
            self._stop = False
            self._thread = threading.Thread(target=self._run, name="libvirt-events", daemon=True)
            self._thread.start()

    def release(self) -> None:
        """Let go; the last one waits until it has ended."""
        with self._lock:
            self._holders -= 1
            if self._holders or self._thread is None:
                return
            libvirt.virEventAddTimeout(0, self._end, None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._stop:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError as error:
                log.error("libvirt's event loop failed", error=str(error))

    def _end(self, timer: int, opaque: object) -> None:
        self._stop = True
        libvirt.virEventRemoveTimeout(timer)


LOOP = EventLoop()
"""The process's."""
