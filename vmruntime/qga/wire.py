"""The bytes on the channel, without I/O: a JSON document a line, and 0xFF where a reader has to begin anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vmruntime.qga.errors import QgaError, QgaLied, QgaUnsupported

SENTINEL = b"\xff"
TEXT_LIMIT = 500
_UNKNOWN = ("CommandNotFound", "CommandDisabled")


def encode(command: str, arguments: Mapping[str, Any]) -> bytes:
    """Return a command as the agent reads it."""
    document: dict[str, Any] = {"execute": command}
    if arguments:
        document["arguments"] = arguments
    return msgspec.json.encode(document) + b"\n"


class Lines:
    """Cuts what arrives into lines; holds no more than the longest that is allowed."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._seen = 0  # bytes of the buffer known to have no newline

    def feed(self, data: bytes) -> None:
        """Take bytes."""
        self._buffer += data

    def next(self, limit: int) -> bytes | None:
        """Return the next line without its end; None: there is none yet.

        Raises:
            QgaLied: It is longer than `limit` bytes.
        """
        end = self._buffer.find(b"\n", self._seen)
        if (len(self._buffer) if end < 0 else end) > limit:
            raise QgaLied(f"an answer is longer than {limit} bytes")
        if end < 0:
            self._seen = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._seen = 0
        return line

    def skip(self) -> bool:
        """Forget everything up to the last sentinel; False: there is none, and everything is forgotten."""
        place = self._buffer.rfind(SENTINEL)
        del self._buffer[: place + 1 if place >= 0 else len(self._buffer)]
        self._seen = 0
        return place >= 0


def result(command: str, line: bytes) -> Any:
    """Return what an answer holds.

    Raises:
        QgaError, QgaUnsupported: The agent refused.
        QgaLied: It is no answer.
    """
    try:
        document = msgspec.json.decode(line.strip())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise QgaLied(f"the answer to {command} is not JSON") from None
    if isinstance(document, dict) and "return" in document:
        return document["return"]
    if isinstance(document, dict) and isinstance(document.get("error"), dict):
        raise _refusal(command, document["error"])
    raise QgaLied(f"the answer to {command} is neither a result nor an error")


def shown(text: object) -> str:
    """Return what a guest says fit to be shown: printable, in one line, and short."""
    printable = "".join(c if c.isprintable() else " " for c in str(text)[:TEXT_LIMIT])
    return " ".join(printable.split())


def _refusal(command: str, error: Mapping[str, Any]) -> QgaError:
    words = shown(error.get("desc", "")) or "it does not say why"
    # Before 8.0 a command that is switched off was a GenericError.
    if error.get("class") in _UNKNOWN or "has been disabled" in words:
        return QgaUnsupported(command)
    return QgaError(f"the QEMU guest agent refuses {command}: {words}")
