"""Public SSH keys, as lines of authorized_keys(5)."""

from __future__ import annotations

import base64
import binascii
import itertools
import re

from vmruntime.errors import InvalidArgument

LINE_LIMIT = 16 * 1024  # an RSA key of 16384 bits has 2.8 KB
_TYPE = re.compile(r"(?:sk-)?(?:ssh|ecdsa)-[a-z0-9.@-]+")
_REMEDY = "give lines such as ssh-ed25519 AAAA… user@host, as in a .pub file"


def parse(name: str, text: str) -> list[str]:
    """Return the keys of a text, a line each; empty lines and comments are left out.

    A key that sshd would not take is an error here: the guest would start and let nobody in.

    Args:
        name: What holds the text, for messages.
        text: The content of an authorized_keys file.

    Raises:
        InvalidArgument: A line is no public key.
    """
    keys = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if "PRIVATE KEY" in line:
            # Its text is not shown: it is a secret.
            raise InvalidArgument(
                f"{name}: line {number} begins a private key", remedy="give the public one, from the .pub file"
            )
        if line and not line.startswith("#"):
            if not _valid(line):
                shown = line if len(line) <= 60 else f"{line[:40]}… ({len(line)} characters)"
                raise InvalidArgument(f"{name}: line {number}: {shown!r} is not a public SSH key", remedy=_REMEDY)
            keys.append(line)
    return keys


def _valid(line: str) -> bool:
    """Whether a line has, behind options perhaps, a key type and then a key of this type (RFC 4253, section 6.6)."""
    words = line.split()
    if len(line) > LINE_LIMIT or not line.isprintable():
        return False
    return any(_TYPE.fullmatch(kind) and _type_of(blob) == kind for kind, blob in itertools.pairwise(words))


def _type_of(blob: str) -> str:
    try:
        data = base64.b64decode(blob, validate=True)
    except (binascii.Error, ValueError):
        return ""
    length = int.from_bytes(data[:4], "big")
    return data[4 : 4 + length].decode("ascii", errors="replace") if len(data) > 4 + length else ""
