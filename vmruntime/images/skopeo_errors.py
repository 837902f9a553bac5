"""What skopeo's last words mean, as an error a person can act on."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vmruntime.aio.process import last_lines
from vmruntime.errors import (
    Code,
    FailedPrecondition,
    Internal,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    VmruntimeError,
)


class SignatureValidationFailed(PermissionDenied):
    """Raised when the signature policy does not accept an image.

    kubelet looks for the name at the beginning of the error (k8s.io/cri-api pkg/errors), and takes the gRPC code off
    an error only where that is UNKNOWN (its cri-client, PullImage); with any other, the text would begin with the code.
    """

    code = Code.UNKNOWN

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"SignatureValidationFailed: {message}", remedy=remedy)


class RegistryUnavailable(Unavailable):
    """Raised when a registry cannot be reached or does not go on; see SignatureValidationFailed for code and text."""

    code = Code.UNKNOWN

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(f"RegistryUnavailable: {message}", remedy=remedy)


_FATAL = re.compile(r'level=fatal msg="((?:[^"\\]|\\.)*)"')
_URL_QUERY = re.compile(r"(https?://[^\s\"'?]+)\?[^\s\"']*")
# How skopeo shows a signature that GnuPG did not accept; the rest of it is of no use to people.
_GPG_SIGNATURE = re.compile(r'Invalid GPG signature: gpgme\.Signature\{.*?Fingerprint:"(\w*)".*?err:0x(\w+)\}.*\}')
_GPG_NO_KEY = 9  # GPG_ERR_NO_PUBKEY (libgpg-error)
_URL_USER = re.compile(r"(https?://)[^\s/@\"']+@")

# The first that matches decides, so the specific come before the general: a policy's refusal quotes the
# registry, a TLS failure is reported inside "pinging container registry".
_RULES: tuple[tuple[re.Pattern[str], type[VmruntimeError], str, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind, lead, remedy)
    for pattern, kind, lead, remedy in (
        (
            r"loading (?:trust policy|registries configuration)|parsing \S+\.yaml:",
            FailedPrecondition,
            "",
            "correct that file: containers-policy.json(5), containers-registries.conf(5), containers-registries.d(5)",
        ),
        (
            r"registry \S+ is blocked in",
            PermissionDenied,
            "",
            "an administrator of this host has blocked it (containers-registries.conf(5))",
        ),
        (
            r"source image rejected|signature.*(?:required|invalid)|isn't properly signed|reject.* by policy",
            SignatureValidationFailed,
            "",
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
            "the image is corrupt: ",
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
            RegistryUnavailable,
            "",
            "install the registry's CA below /etc/containers/certs.d, or mark it insecure in registries.conf",
        ),
        (
            r"toomanyrequests|too many requests|\b429\b",
            RegistryUnavailable,
            "",
            "the registry limits requests; wait, or pull with credentials",
        ),
        (
            r"connection refused|no such host|i/o timeout|timeout|timed out|no route to host|network is unreachable"
            r"|connection reset|unexpected eof|\bEOF\b|server misbehaving|temporary failure in name resolution"
            r"|\b5\d\d\b|received unexpected http status",
            RegistryUnavailable,
            "",
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
    for pattern, kind, lead, remedy in _RULES:
        if pattern.search(cause):
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
    return _GPG_SIGNATURE.sub(_signature, last_lines(text)) or "no message"


def _signature(found: re.Match[str]) -> str:
    if int(found[2], 16) == _GPG_NO_KEY:
        return f"it is signed by the key {found[1]}, which the policy does not name"
    return f"its signature by the key {found[1]} is not valid (GnuPG's error 0x{found[2]})"
