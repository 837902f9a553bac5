"""What flows between a client and a process: bytes, terminal sizes, and what was asked for."""

from __future__ import annotations

import msgspec


class TerminalSize(msgspec.Struct, frozen=True, kw_only=True):
    """A terminal's size in characters."""

    columns: int
    rows: int


class OutputChunk(msgspec.Struct, frozen=True):
    """Bytes a process wrote, without regard to lines."""

    stderr: bool
    data: bytes


class ExecSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A command to run in a running container, and which of its streams the client wants.

    Attributes:
        timeout: Seconds after which it is killed; 0: none.
    """

    container_id: str
    argv: list[str]
    tty: bool = False
    stdin: bool = False
    stdout: bool = True
    stderr: bool = True
    timeout: float = 0.0


class ExecEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended.

    Attributes:
        error: Why it could not start; empty when it did.
    """

    exit_code: int
    timed_out: bool = False
    error: str = ""


class AttachSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which streams of a container the client wants to join."""

    container_id: str
    tty: bool = False
    stdin: bool = False
    stdout: bool = True
    stderr: bool = True


class PortForwardSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox whose ports a client wants; `ports` are those named beforehand, which SPDY clients do not."""

    sandbox_id: str
    ports: list[int] = []
