"""A libvirtd of a test's own: its configuration, state and socket are below one directory, and it ends with the test."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 30.0
LOCK = Path(tempfile.gettempdir()) / "vmruntime-tests-libvirtd.lock"
# libvirt has these paths built in; the daemon sees directories of the test there, in a mount namespace of its own.
PLACES = {
    "etc": Path("/etc/libvirt"),
    "run": Path("/run/libvirt"),
    "lib": Path("/var/lib/libvirt"),
    "cache": Path("/var/cache/libvirt"),
    "log": Path("/var/log/libvirt"),
}
QEMU_CONF = """\
# libvirt tries QEMU with the right to open /dev/kvm; where others have not, it would try again at each step.
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""


class Libvirtd:
    """The daemon.

    Attributes:
        uri: Where it listens.
        log: Its messages.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._socket = base / "sock" / "libvirt-sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"qemu+unix:///system?socket={self._socket}"
        self.log = base / "libvirtd.log"
        for name in (*PLACES, "sock"):
            (base / name).mkdir(parents=True)
        (base / "etc" / "qemu.conf").write_text(QEMU_CONF)
        (base / "libvirtd.conf").write_text(
            f'unix_sock_dir = "{base / "sock"}"\n'
            'auth_unix_rw = "none"\nauth_unix_ro = "none"\n'
            f'log_outputs = "3:file:{self.log}"\n'
            'host_uuid = "5f2f9f0a-6d0e-4f52-9d5e-3b1f4f7a9c11"\n'
        )

    @property
    def runs(self) -> bool:
        """Whether it runs."""
        return self._process is not None

    def start(self) -> None:
        """Start it; returns when it answers."""
        mounts = "".join(f"mount --bind {self._base / name} {place} && " for name, place in PLACES.items())
        daemon = f"exec libvirtd --config {self._base / 'libvirtd.conf'} --pid-file {self._base / 'libvirtd.pid'}"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", mounts + daemon], stdout=log, stderr=log
            )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"libvirtd does not listen: {self.log.read_text()}"
            time.sleep(0.02)

    def kill(self) -> None:
        """End it at once; its VMs go on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it as a service manager does; its VMs go on."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            finally:
                self.kill()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.connect(str(self._socket))
            return True
        return False


@contextlib.contextmanager
def libvirtd(base: Path) -> Iterator[Libvirtd]:
    """Yield a running libvirtd with everything below `base`, a directory that QEMU can pass through."""
    # One at a time: to remove an empty directory takes away what another daemon has mounted there.
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = [place for place in PLACES.values() if not place.exists()]
        for place in made:
            place.mkdir()
        daemon = Libvirtd(base)
        try:
            daemon.start()
            yield daemon
        finally:
            daemon.stop()
            for place in made:
                place.rmdir()
