"""The command line against a test's daemon, at a terminal of its own if need be."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl

import pytest

from tests.support.daemon import Daemon


def argv(daemon: Daemon, *arguments: object) -> list[str]:
    command = [sys.executable, "-m", "vmruntime.cli.main", "--config", str(daemon.config)]
    return [*command, *(str(argument) for argument in arguments)]


def vmruntime(daemon: Daemon, *arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(argv(daemon, *arguments), input=stdin, capture_output=True, timeout=120, check=False)


class Screen:
    """A command at a terminal of its own."""

    def __init__(self, command: list[str], columns: int, rows: int) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(columns, rows)
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self.text = b""

    def resize(self, columns: int, rows: int) -> None:
        ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self._ours, text)

    def wait_for(self, pattern: bytes) -> None:
        """Read until a pattern shows up in what came since the last one."""
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, self.text
            if select.select([self._ours], [], [], 1)[0]:
                try:
                    self.text += os.read(self._ours, 65536)
                except OSError:  # EIO: nobody has the terminal open any more
                    pytest.fail(f"the command has ended; it wrote {self.text!r}")
        self.text = self.text[found.end() :]

    def end(self) -> int:
        """Return the command's exit status."""
        return self.process.wait(60)

    def close(self) -> None:
        """End the command if it has not ended."""
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@contextlib.contextmanager
def at_a_terminal(command: list[str], columns: int, rows: int) -> Iterator[Screen]:
    """Run a command at a terminal of its own while the block runs."""
    with contextlib.closing(Screen(command, columns, rows)) as screen:
        yield screen
