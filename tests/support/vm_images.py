"""VM images for tests, built from their recipes when they are not there yet."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "vm-images"


def small() -> Path:
    """Return the small image, which boots in seconds: see images/vm/small/build.sh."""
    return _built("small.qcow2", "images/vm/small/build.sh")


def debian() -> Path:
    """Return the Debian cloud image: see images/vm/debian/build.sh."""
    return _built("debian.qcow2", "images/vm/debian/build.sh")


def containerdisk(name: str) -> Path:
    """Return an image, "small" or "debian", as an OCI archive with the file in /disk."""
    {"small": small, "debian": debian}[name]()
    return _built(f"{name}.containerdisk.tar", "images/vm/containerdisk.sh", name)


def _built(file: str, *command: str) -> Path:
    """Run a recipe, one at a time; it keeps what is up to date."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([str(ROOT / command[0]), *command[1:]], stdin=subprocess.DEVNULL, capture_output=True)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return OUT / file
