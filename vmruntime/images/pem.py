"""Certificates and keys as transport profiles have them: PEM text, authorities and client certificates mixed."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Sequence

from vmruntime.errors import InvalidArgument

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_KEY = re.compile(r"-----BEGIN ((?:[A-Z]+ )?PRIVATE KEY)-----.*?-----END \1-----", re.DOTALL)


def classify(cert: str, key: str) -> tuple[str, str]:
    """Return an entry's authorities, and its client chain with the key; either may be empty.

    Virtlet's rule: a certificate that says of itself that it is an authority is trusted; one with a key is our own.

    Raises:
        InvalidArgument: It holds no certificate, a certificate or key cannot be read, they do not belong together, or
            a certificate is of no use.
    """
    certificates = _CERTIFICATE.findall(cert)
    if not certificates:
        raise InvalidArgument("cert has no certificate", remedy="-----BEGIN CERTIFICATE----- begins one")
    keys = [found.group(0) for found in _KEY.finditer(f"{key}\n{cert}")]
    if key.strip() and not keys:
        raise InvalidArgument("key has no private key", remedy="-----BEGIN PRIVATE KEY----- begins one")
    if "ENCRYPTED" in "".join(keys):
        raise InvalidArgument(
            "key is encrypted, and nobody could type its passphrase", remedy="decrypt it: openssl pkey"
        )
    authorities = [certificate for certificate in certificates if _is_authority(certificate)]
    if not keys:
        if len(authorities) < len(certificates):
            raise InvalidArgument(
                "cert has a certificate that is no authority (CA:TRUE) and has no key",
                remedy="add its key, or take it out",
            )
        return _joined(authorities), ""
    chain = _joined([*certificates, keys[0]])
    _check_chain(chain)
    # An authority in a chain with a key is trusted as well.
    return _joined(authorities), chain


def _is_authority(certificate: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=certificate)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument(f"cert has a certificate that cannot be read: {_reason(error)}") from None
    return context.cert_store_stats()["x509_ca"] > 0


def _check_chain(chain: str) -> None:
    """Let OpenSSL read the chain as curl will; from memory, so that the key is in no file."""
    descriptor = os.memfd_create("client-certificate", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, chain.encode())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument(f"cert and key cannot be used together: {_reason(error)}") from None
    finally:
        os.close(descriptor)


def _joined(blocks: Sequence[str]) -> str:
    return "".join(f"{block}\n" for block in blocks)


def _reason(error: Exception) -> str:
    return (getattr(error, "reason", "") or str(error)).lower().replace("_", " ")
