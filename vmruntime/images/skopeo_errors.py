"""What skopeo's last words mean, as an error a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vmruntime.aio.process import last_lines
from vmruntime.errors import (
    FailedPrecondition,
    Internal,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    VmruntimeError,
)

# Prefixes kubelet looks for in the text of a CRI error (k8s.io/cri-api pkg/errors).
SIGNATURE_VALIDATION_FAILED = "SignatureValidationFailed"
REGISTRY_UNAVAILABLE = "RegistryUnavailable"

_FATAL = re.compile(r'level=fatal msg="((?:[^"\\]|\\.)*)"')
_URL_QUERY = re.compile(r"(https?://[^\s\"'?]+)\?[^\s\"']*")
_URL_USER = re.compile(r"(https?://)[^\s/@\"']+@")

# The first that matches decides, so the specific come before the general: a policy's refusal quotes the
# registry, a TLS failure is reported inside "pinging container registry".
_RULES: tuple[tuple[re.Pattern[str], type[VmruntimeError], str, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind, prefix, remedy)
    for pattern, kind, prefix, remedy in (
        (
            r"source image rejected|signature.*(?:required|invalid)|isn't properly signed|reject.* by policy",
            PermissionDenied,
            SIGNATURE_VALIDATION_FAILED,
            "the signature policy (containers-policy.json) does not accept the image",
        ),
        (
            r"no space left on device|disk quota exceeded",
            ResourceExhausted,
            "",
            "free space there, or remove unused images",
        ),
        (
            r"digest (?:did not match|mismatch)|does not match (?:the )?(?:expected )?digest|blob size mismatch"
            r"|size mismatch|manifest does not match provided manifest digest",
            FailedPrecondition,
            "the image is corrupt",
            "push the image again, or check the mirror it came from",
        ),
        (
            r"manifest unknown|name unknown|repository name not known|blob unknown|\b404\b|not found: manifest"
            r"|no image with (?:name|reference)|no descriptor found|file .* not found in archive|no such file or dir",
            NotFound,
            "",
            "",
        ),
        (
            r"unauthorized|authentication required|access to the resource is denied|denied:|\b40[13]\b"
            r"|invalid username/password|unable to retrieve auth token",
            PermissionDenied,
            "",
            "check the pull secret, and that it covers this repository",
        ),
        (r"no image found in (?:manifest list|image index) for", NotFound, "", ""),
        (
            r"x509|certificate|tls:|server gave HTTP response to HTTPS",
            Unavailable,
            REGISTRY_UNAVAILABLE,
            "install the registry's CA below /etc/containers/certs.d, or mark it insecure in registries.conf",
        ),
        (
            r"toomanyrequests|too many requests|\b429\b",
            Unavailable,
            REGISTRY_UNAVAILABLE,
            "the registry limits requests; wait, or pull with credentials",
        ),
        (
            r"connection refused|no such host|i/o timeout|timeout|timed out|no route to host|network is unreachable"
            r"|connection reset|unexpected eof|\bEOF\b|server misbehaving|temporary failure in name resolution"
            r"|\b5\d\d\b|received unexpected http status",
            Unavailable,
            REGISTRY_UNAVAILABLE,
            "check the registry's address, its state and the network",
        ),
    )
)


def translate(stderr: str, name: str, secrets: Iterable[str] = (), where: str = "") -> VmruntimeError:
    """Return the error for a failed skopeo.

    Args:
        stderr: What it wrote.
        name: The reference or archive it worked on.
        secrets: Texts to blot out.
        where: The directory it wrote to, for a full disk.
    """
    cause = redact(_cause(stderr), secrets)
    for pattern, kind, prefix, remedy in _RULES:
        if pattern.search(cause):
            lead = f"{prefix}: " if prefix else ""
            place = f" into {where}" if kind is ResourceExhausted and where else ""
            return kind(f"{lead}pulling {name}{place}: {cause}", remedy=remedy)
    return Internal(f"pulling {name}: skopeo failed: {cause}")


def redact(text: str, secrets: Iterable[str]) -> str:
    """Blot out secrets, the queries of URLs (signed redirects) and user names in URLs."""
    for secret in secrets:
        text = text.replace(secret, "…")
    return _URL_USER.sub(r"\1…@", _URL_QUERY.sub(r"\1?…", text))


def _cause(stderr: str) -> str:
    """Return the message of the last fatal log line, else the end of all of it."""
    found = _FATAL.findall(stderr)
    text = re.sub(r"\\(.)", r"\1", found[-1]) if found else stderr
    return last_lines(text) or "no message"
