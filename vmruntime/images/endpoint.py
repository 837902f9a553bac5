"""Where a disk image is, and how it is fetched from there."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import urlsplit

import msgspec

from vmruntime.errors import InvalidArgument
from vmruntime.images.disk_header import DiskFormat

MAX_REDIRECTS = 9
"""Virtlet's default, and net/http's of Go."""

SCHEMES = ("http", "https", "file")
_USER = re.compile(r"(?<=://)[^/?#@]*@")
_DIGITS = {"sha256": 64, "sha512": 128}


class Checksum(msgspec.Struct, frozen=True):
    """A digest: algorithm and lower-case hexadecimal digits."""

    algorithm: str
    digits: str

    @classmethod
    def parse(cls, text: str) -> Checksum:
        """Read "sha256:…" or "sha512:…".

        Raises:
            InvalidArgument: It is neither.
        """
        algorithm, _, digits = text.partition(":")
        if re.fullmatch(r"[0-9a-fA-F]+", digits) is None or _DIGITS.get(algorithm) != len(digits):
            raise InvalidArgument(
                f"{text[:150]!r} is not a checksum", remedy="give sha256: and 64, or sha512: and 128 hexadecimal digits"
            )
        return cls(algorithm, digits.lower())

    def hasher(self) -> hashlib._Hash:
        """Return what computes it."""
        return hashlib.new(self.algorithm, usedforsecurity=True)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.digits}"


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """How a server is authenticated, and we to it.

    Attributes:
        authorities: PEM certificates that are trusted besides the system's.
        client: PEM chain and key; empty: none.
        server_name: The name its certificate is for, when that is not the URL's host.
        insecure: Whatever certificate it has will do.
    """

    authorities: str = ""
    client: str = ""
    server_name: str = ""
    insecure: bool = False

    def __repr__(self) -> str:  # the key is a secret
        return f"Tls(server_name={self.server_name!r}, insecure={self.insecure})"


class Transport(msgspec.Struct, frozen=True, kw_only=True):
    """How to speak to a server.

    Attributes:
        timeout: Seconds for the whole download; 0: as long as bytes arrive.
        proxy: URL; empty: as the daemon's environment says.
    """

    timeout: float = 0.0
    max_redirects: int = MAX_REDIRECTS
    proxy: str = ""
    tls: Tls = Tls()


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A disk image's place.

    Attributes:
        url: http, https or file; may have a user and a password.
        format: What it has to be; None: whatever its header says.
    """

    url: str
    checksum: Checksum | None = None
    format: DiskFormat | None = None
    transport: Transport = Transport()

    def __repr__(self) -> str:
        return f"Endpoint({redacted(self.url)!r})"


def redacted(text: str) -> str:
    """Return a text without users and passwords of URLs, fit for messages."""
    return _USER.sub("", text)


def check_url(url: str) -> str:
    """Return a URL that can be fetched.

    Raises:
        InvalidArgument: It is none; the message says why.
    """
    shown = redacted(url)[:200]
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidArgument(f"{shown!r} is not a URL: {error}") from None
    why = ""
    if not url.isascii() or not url.isprintable() or any(c in url for c in ' "\\<>^`{|}'):
        why = "has a character that URLs do not have"
    elif parts.scheme not in SCHEMES:
        why = f"has not one of the schemes {', '.join(SCHEMES)}"
    elif parts.scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path.startswith("/")):
        why = "is not the URL of a local file, such as file:///srv/disk.qcow2"
    elif parts.scheme != "file" and (not parts.hostname or port == 0):
        why = "names no host"
    elif parts.fragment:
        why = "has a fragment, which no server sees"
    if why:
        raise InvalidArgument(f"{shown!r} {why}", remedy="such as https://images.example/debian.qcow2")
    return url
