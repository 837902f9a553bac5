from __future__ import annotations

import pytest

from vmruntime.errors import (
    Code,
    FailedPrecondition,
    Internal,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    VmruntimeError,
)
from vmruntime.images.skopeo_errors import RegistryUnavailable, SignatureValidationFailed, redact, translate


def fatal(message: str) -> str:
    quoted = message.replace("\\", "\\\\").replace('"', '\\"')
    return f'time="2026-01-01T00:00:00Z" level=warning msg="x"\ntime="…" level=fatal msg="{quoted}"\n'


# The texts are those of skopeo 1.9 and of the registries and libraries behind it.
@pytest.mark.parametrize(
    ("text", "kind", "start"),
    [
        ("reading manifest 1 in r.example/app: manifest unknown: manifest unknown", NotFound, "pulling"),
        ("reading manifest 1 in r.example/app: name unknown: repository name not known to registry", NotFound, ""),
        ("reading manifest 1 in r.example/app: unauthorized: authentication required", PermissionDenied, "pulling"),
        (
            "reading manifest 1 in docker.io/x/y: errors: denied: requested access to the resource is denied",
            PermissionDenied,
            "pulling",
        ),
        (
            "Source image rejected: Running image docker://r.example/app:1 is rejected by policy.",
            SignatureValidationFailed,
            "SignatureValidationFailed: ",
        ),
        (
            "Source image rejected: A signature was required, but no signature exists",
            SignatureValidationFailed,
            "SignatureValidationFailed: ",
        ),
        (
            'pinging container registry r: Get "https://r/v2/": dial tcp 127.0.0.1:1: connect: connection refused',
            RegistryUnavailable,
            "RegistryUnavailable: ",
        ),
        (
            'Get "https://r/v2/": dial tcp: lookup r on 10.0.0.53:53: no such host',
            RegistryUnavailable,
            "RegistryUnavailable: ",
        ),
        (
            'Get "https://r/v2/": x509: certificate signed by unknown authority',
            RegistryUnavailable,
            "RegistryUnavailable: ",
        ),
        (
            'Get "https://r/v2/": http: server gave HTTP response to HTTPS client',
            RegistryUnavailable,
            "RegistryUnavailable: ",
        ),
        ("received unexpected HTTP status: 503 Service Unavailable", RegistryUnavailable, "RegistryUnavailable: "),
        ("toomanyrequests: You have reached your pull rate limit.", RegistryUnavailable, "RegistryUnavailable: "),
        (
            "writing blob: storing blob to file: happened during read: Digest did not match, expected a, got b",
            FailedPrecondition,
            "the image is corrupt: ",
        ),
        ("writing blob: write /x: no space left on device", ResourceExhausted, "pulling r.example/app:1 into /work"),
        (
            'Error parsing image name "docker://b.example/a:1": registry b.example is blocked in /etc/r.conf or /x',
            PermissionDenied,
            "pulling",
        ),
        ('Error loading trust policy: invalid policy in "p.json": unexpected end', FailedPrecondition, "pulling"),
        ("Error loading trust policy: open p.json: no such file or directory", FailedPrecondition, "pulling"),
        ('loading registries configuration "r.conf": toml: line 1: unexpected EOF', FailedPrecondition, "pulling"),
        ("initializing source docker://a: parsing /etc/r.d/x.yaml: error converting", FailedPrecondition, "pulling"),
        ("something else altogether", Internal, "pulling"),
    ],
)
def test_translation(text: str, kind: type[VmruntimeError], start: str) -> None:
    error = translate(fatal(text), "r.example/app:1", where="/work")
    assert type(error) is kind
    assert str(error).startswith(start)
    assert "r.example/app:1" in str(error)
    assert text[:40] in str(error)


def test_secrets_and_signed_urls_are_blotted_out() -> None:
    text = 'Get "https://u:pw@cdn.example/blob?X-Signature=abc&y=1": EOF with hunter2'
    assert redact(text, ["hunter2"]) == 'Get "https://…@cdn.example/blob?…": EOF with …'
    error = translate(fatal(text), "app", ["hunter2"])
    assert "hunter2" not in str(error)
    assert "X-Signature" not in str(error)


GPGME = (
    'Source image rejected: Invalid GPG signature: gpgme.Signature{Summary:128, Fingerprint:"A334", '
    "Status:gpgme.Error{err:0x%x}, Timestamp:time.Date(2026, time.November, 24, 21, 11, 44, 0, time.Local), "
    "PKATrust:0x0, ValidityReason:error(nil), HashAlgo:10}"
)


def test_a_signature_that_was_not_accepted() -> None:
    assert str(translate(fatal(GPGME % 9), "app")).startswith(
        "SignatureValidationFailed: pulling app: Source image rejected: "
        "it is signed by the key A334, which the policy does not name (the signature policy"
    )
    assert "its signature by the key A334 is not valid (GnuPG's error 0x8)" in str(translate(fatal(GPGME % 8), "app"))


def test_no_message() -> None:
    assert "no message" in str(translate("", "app"))
    assert "panic: x" in str(translate("panic: x", "app"))


def test_what_kubelet_looks_for_has_the_code_it_takes_off() -> None:
    refused = translate(fatal("Source image rejected: x"), "app")
    gone = translate(fatal("dial tcp 127.0.0.1:1: connect: connection refused"), "app")
    assert (refused.code, gone.code) == (Code.UNKNOWN, Code.UNKNOWN)
