"""What goes wrong between this server and a streaming client."""

from __future__ import annotations


class StreamingError(Exception):
    """The root of these errors; none of them leaves this package."""


class ProtocolError(StreamingError):
    """Raised when the peer broke the protocol; the connection is of no use any more."""


class ClientGone(StreamingError):
    """Raised when the client's connection has ended."""


class TimedOut(StreamingError):
    """Raised when the client did not open its streams in time, or was idle for too long."""
