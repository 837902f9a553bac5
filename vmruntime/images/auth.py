"""Credentials of a pull, as the file skopeo reads (containers-auth.json(5))."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import urlsplit

import msgspec

from vmruntime.errors import InvalidArgument, Unimplemented
from vmruntime.images.reference import DEFAULT_DOMAIN
from vmruntime.model.image import RegistryAuth

_HUB_HOSTS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io", "registry.docker.io"})
# The user name registries expect beside an identity token (docker/cli writes the same).
_TOKEN_USER = "<token>"


def auth_file(auth: RegistryAuth | None, domain: str) -> bytes:
    """Return the authentication file for pulling from one registry.

    Without credentials the file is empty rather than absent, so that credentials an administrator left on the
    host are never lent to a pod. Credentials are shown to one host alone: the one they are meant for, or, when
    they do not say, the one the image's name has; not to mirrors, and not to where registries.conf moves a name.

    Args:
        auth: As CRI's AuthConfig has them.
        domain: Host and port in the image's name.

    Raises:
        InvalidArgument: `auth` is not base64 of user:password, or a user name cannot be written down.
        Unimplemented: A registry token, which skopeo takes only on its command line for all to see.
    """
    entry = _entry(auth) if auth is not None else {}
    host = _host(auth.server_address if auth is not None else "") or domain
    return msgspec.json.encode({"auths": {host: entry} if entry else {}})


def secrets_of(auth: RegistryAuth | None) -> list[str]:
    """Return every text that must not appear in a message."""
    if auth is None:
        return []
    return [text for text in (auth.password, auth.auth, auth.identity_token, auth.registry_token) if text]


def _entry(auth: RegistryAuth) -> dict[str, str]:
    if auth.registry_token:
        raise Unimplemented(
            "registry_token: a registry's bearer token cannot be passed on without showing it on a command line",
            remedy="use a user name and password, or an identity token",
        )
    user, password = (auth.username, auth.password) if auth.username else _decode(auth.auth)
    if auth.identity_token:
        return {"auth": _encode(user or _TOKEN_USER, ""), "identitytoken": auth.identity_token}
    return {"auth": _encode(user, password)} if user or password else {}


def _decode(encoded: str) -> tuple[str, str]:
    """Split CRI's `auth`; nothing of it may appear in the error."""
    if not encoded:
        return "", ""
    try:
        text = base64.b64decode(encoded, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise InvalidArgument("auth: it is not base64 of user:password") from None
    user, colon, password = text.rstrip("\0").partition(":")
    if not colon:
        raise InvalidArgument("auth: there is no colon between user and password")
    return user, password


def _encode(user: str, password: str) -> str:
    if ":" in user:
        raise InvalidArgument("username: it contains a colon, which separates user and password")
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _host(server_address: str) -> str:
    """A server address is a host or a URL ("https://index.docker.io/v1/"); empty means any."""
    url = server_address if "://" in server_address else f"https://{server_address}"
    try:
        host = urlsplit(url).netloc.rpartition("@")[2].lower()
    except ValueError:
        raise InvalidArgument("server_address: it is neither a host nor a URL") from None
    return DEFAULT_DOMAIN if host in _HUB_HOSTS else host
