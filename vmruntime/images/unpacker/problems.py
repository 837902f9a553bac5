"""What is wrong with a layer."""

from __future__ import annotations


class BadLayer(Exception):
    """Raised when a layer is corrupt or asks for what must not be; the message goes on behind "layer sha256:… "."""


class TooLarge(Exception):
    """Raised when a layer is larger than allowed; the message goes on behind "layer sha256:… "."""


def shown(name: bytes) -> str:
    """Return a name of the tar for messages: it may be anything, of any length."""
    return repr(name[:100].decode(errors="backslashreplace")) + ("…" if len(name) > 100 else "")
