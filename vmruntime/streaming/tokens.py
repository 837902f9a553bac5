"""One-use tokens: whoever has the URL may do the one thing it was made for, once and soon."""

from __future__ import annotations

import collections
import secrets

from vmruntime.clock import Clock
from vmruntime.errors import ResourceExhausted
from vmruntime.model.streams import AttachSpec, ExecSpec, PortForwardSpec

LIFETIME = 60.0
"""Seconds a token can be used."""

IN_FLIGHT = 1000
"""Tokens that are neither used nor expired."""

_BYTES = 16

Request = ExecSpec | AttachSpec | PortForwardSpec


class Tokens:
    """What was asked for over CRI and not fetched yet."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: collections.OrderedDict[str, tuple[float, Request]] = collections.OrderedDict()

    def issue(self, request: Request) -> str:
        """Return a token for a request.

        Raises:
            ResourceExhausted: Too many are waiting.
        """
        self._expire()
        if len(self._waiting) >= IN_FLIGHT:
            raise ResourceExhausted(
                f"{IN_FLIGHT} streaming URLs have been handed out and not used yet",
                remedy=f"try again; they expire after {LIFETIME:g} s",
            )
        token = secrets.token_urlsafe(_BYTES)
        self._waiting[token] = (self._clock.monotonic() + LIFETIME, request)
        return token

    def redeem(self, token: str) -> Request | None:
        """Return what a token stands for and forget it; None when it is unknown, used or expired."""
        self._expire()
        found = self._waiting.pop(token, None)
        return found[1] if found is not None else None

    def _expire(self) -> None:
        now = self._clock.monotonic()
        while self._waiting:
            token, (until, _) = next(iter(self._waiting.items()))
            if until > now:
                return
            del self._waiting[token]
