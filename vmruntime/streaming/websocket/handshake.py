"""The opening handshake and the choice of a subprotocol (RFC 6455, 4.2)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence

from wsproto.utilities import generate_accept_token

VERSION = "13"


def offered(values: Iterable[str]) -> list[str]:
    """Return the subprotocols of all Sec-WebSocket-Protocol headers, in the client's order."""
    return [name for value in values for part in value.split(",") if (name := part.strip())]


def choose(client: Sequence[str], server: Sequence[str]) -> str | None:
    """Return the first of the client's subprotocols that the server speaks; "" when the client names none."""
    if not client:
        return ""
    return next((name for name in client if name in server), None)


def accept_token(key: str) -> str | None:
    """Return the answer to a Sec-WebSocket-Key, or None when it is not 16 bytes in base64."""
    try:
        if len(base64.b64decode(key, validate=True)) != 16:
            return None
    except (binascii.Error, ValueError):
        return None
    return generate_accept_token(key.encode()).decode()
