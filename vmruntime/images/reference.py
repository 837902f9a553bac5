"""Image references, per the grammar of the distribution project (reference/reference.go) and docker.io's defaults."""

from __future__ import annotations

import dataclasses
import re

from vmruntime.errors import InvalidArgument

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
NAME_LIMIT = 255

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])"
_DOMAIN = re.compile(rf"{_HOST}(?::[0-9]+)?")
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{64}")
_ID_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{3,64})")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A name that leaves nothing to defaults.

    Attributes:
        domain: Registry host, with a port when one was given: docker.io, registry.example:5000.
        path: Repository in the registry: library/busybox.
        tag: Empty when there is a digest: the digest alone decides, as in every other runtime.
        digest: "sha256:…", or empty.
    """

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def repository(self) -> str:
        """The name without tag and digest."""
        return f"{self.domain}/{self.path}"

    def __str__(self) -> str:
        return f"{self.repository}@{self.digest}" if self.digest else f"{self.repository}:{self.tag}"

    def with_digest(self, digest: str) -> str:
        """Return the repository's name for one content."""
        return f"{self.repository}@{digest}"


def parse(text: str) -> Reference:
    """Read a reference as people write it: `busybox` is docker.io/library/busybox:latest.

    Raises:
        InvalidArgument: It does not follow the grammar; the message names it and the part at fault.
    """
    name, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _invalid(text, f"has the digest {digest!r}, which is not sha256: and 64 hexadecimal digits")
    name, tag = _split_tag(name)
    if tag is not None and not _TAG.fullmatch(tag):
        raise _invalid(text, f"has the tag {tag!r}; a tag is 1 to 128 letters, digits, '_', '.' or '-'")
    domain, path = _split_domain(name)
    _check_name(text, domain, path)
    return Reference(domain, path, "" if digest else tag or DEFAULT_TAG, digest)


def short_name(text: str) -> str | None:
    """Return the repository of a name that says no registry, as it is written: `busybox` for `busybox:1.36`."""
    name, _ = _split_tag(text.partition("@")[0])
    return None if _names_host(name) else name


def is_digest(text: str) -> bool:
    """Tell whether a text is a SHA-256 digest in its one accepted form."""
    return _DIGEST.fullmatch(text) is not None


def id_prefix(text: str) -> str | None:
    """Return the "sha256:…" beginning that a full or short image id stands for; None when it is no id."""
    match = _ID_PREFIX.fullmatch(text)
    return f"sha256:{match[1]}" if match else None


def _split_tag(name: str) -> tuple[str, str | None]:
    """A colon after the last slash starts the tag; one before it belongs to the port."""
    head, colon, tail = name.rpartition(":")
    if not colon or "/" in tail:
        return name, None
    return head, tail


def _names_host(name: str) -> bool:
    """The first component is a domain when no repository begins so: with a dot, a colon, a capital, or localhost."""
    first, slash, _ = name.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost" or first != first.lower())


def _split_domain(name: str) -> tuple[str, str]:
    first, _, rest = name.partition("/")
    domain, path = (first, rest) if _names_host(name) else (DEFAULT_DOMAIN, name)
    if domain == "index.docker.io":
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = f"library/{path}"
    return domain, path


def _check_name(text: str, domain: str, path: str) -> None:
    if not _DOMAIN.fullmatch(domain):
        raise _invalid(text, f"has the registry {domain!r}, which is not a host name with an optional port")
    repository = path.removeprefix("library/")
    if not repository:
        raise _invalid(text, "has no repository name")
    if not _PATH.fullmatch(path):
        raise _invalid(
            text,
            f"has the repository {repository!r}; its parts are lowercase letters and digits, "
            "separated by one '.', one or two '_' or any number of '-'",
        )
    if domain == DEFAULT_DOMAIN and _ID.fullmatch(repository):
        raise _invalid(text, "looks like an image id, which cannot be a repository name")
    if len(domain) + 1 + len(path) > NAME_LIMIT:
        raise _invalid(text, f"has a name longer than {NAME_LIMIT} characters")


def _invalid(text: str, why: str) -> InvalidArgument:
    shown = text if len(text) <= 300 else text[:300] + "…"
    return InvalidArgument.field("image reference", shown, why)
