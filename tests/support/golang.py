"""Finds a Go toolchain that is new enough, and builds with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

_PLACES = ("/usr/local/go/bin/go", "/usr/lib/go/bin/go", "/usr/lib/go-*/bin/go")


def find_go(wanted: tuple[int, int]) -> tuple[str, str]:
    """Return the newest Go on this machine, or "" and why there is none that will do."""
    found: list[tuple[tuple[int, int], str]] = []
    candidates = [shutil.which("go"), *(str(path) for place in _PLACES for path in Path("/").glob(place[1:]))]
    for candidate in filter(None, candidates):
        words = subprocess.run([candidate, "version"], capture_output=True, text=True, check=False).stdout
        if version := re.search(r"go(\d+)\.(\d+)", words):
            found.append(((int(version[1]), int(version[2])), candidate))
    if not found:
        return "", "there is no Go toolchain"
    newest, program = max(found)
    if newest < wanted:
        return "", f"Go is {newest[0]}.{newest[1]}, and {wanted[0]}.{wanted[1]} or newer is needed"
    return program, ""


def needed_by(module: Path) -> tuple[int, int]:
    """Return the Go version that a go.mod asks for."""
    version = re.search(r"^go (\d+)\.(\d+)", module.read_text(), re.MULTILINE)
    assert version is not None
    return int(version[1]), int(version[2])


def build(program: str, source: Path, target: Path, package: str = ".") -> None:
    """Build a static program; its modules come from the Go module proxy, checked against go.sum."""
    command = [program, "build", "-mod=readonly", "-trimpath", "-ldflags=-s -w", "-o", str(target), package]
    environment = {**os.environ, "CGO_ENABLED": "0"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
