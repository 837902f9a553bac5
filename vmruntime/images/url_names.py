"""What an image is called here that came from a URL rather than by a name."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import unquote, urlsplit

from vmruntime.errors import InvalidArgument
from vmruntime.images.endpoint import SCHEMES, check_url, redacted
from vmruntime.images.reference import DEFAULT_TAG, Reference

DOMAIN = "localhost"
"""No registry's: what people give to images that were made on this machine."""

PATH_LIMIT = 200
_SEPARATORS = re.compile(r"[^a-z0-9]+")


def is_url(reference: str) -> bool:
    """Whether a reference is the URL of a disk image; no image's name has such a beginning."""
    return reference.partition("://")[0] in SCHEMES and "://" in reference


def name_of(url: str) -> Reference:
    """Return the name of the image at a URL: the same for the same URL.

    A file's is localhost/FILE:latest. From elsewhere it is localhost/HOST/PATH with a tag that no other URL has: the name
    has neither the scheme nor the query, and small letters only.

    Raises:
        InvalidArgument: It is no URL that can be fetched.
    """
    parts = urlsplit(check_url(url))
    path = unquote(parts.path)
    if parts.scheme == "file":
        return Reference(DOMAIN, _path([path.rpartition("/")[2]]), DEFAULT_TAG)
    # Without user and password, which a hash in a list of images would help to guess.
    tag = f"url-{hashlib.sha256(redacted(url).encode()).hexdigest()[:12]}"
    return Reference(DOMAIN, _path([parts.hostname or "", *path.split("/")]), tag)


def known_as(reference: str) -> str:
    """Return the name under which an image is found: a URL's; anything else, a malformed URL too, is its own."""
    if not is_url(reference):
        return reference
    try:
        return str(name_of(reference))
    except InvalidArgument:
        return reference


def _path(parts: list[str]) -> str:
    components = [component for part in parts if (component := _component(part))]
    return "/".join(components)[:PATH_LIMIT].rstrip("/._-") or "disk"


def _component(text: str) -> str:
    """Return a text as the grammar of references has components."""

    def separator(found: re.Match[str]) -> str:
        return found[0] if found[0] in (".", "_", "-") else "-"

    return _SEPARATORS.sub(separator, text.lower()).strip("._-")
