"""Certificates for tests: an authority, a server's and a client's, made by openssl(1)."""

from __future__ import annotations

import dataclasses
import ssl
import subprocess
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Certificates:
    """PEM texts, and the directory with the same as files NAME.pem and NAME.key."""

    directory: Path

    def pem(self, name: str) -> str:
        return (self.directory / f"{name}.pem").read_text()

    def key(self, name: str) -> str:
        return (self.directory / f"{name}.key").read_text()

    def server(self, name: str = "server", *, clients: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        if clients:
            context.load_verify_locations(self.directory / "ca.pem")
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def make(directory: Path) -> Certificates:
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    _openssl(directory, "req", "-x509", *new, "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.pem")
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE"]
    for name, alternative in (("server", "IP:127.0.0.1"), ("other", "DNS:images.example"), ("client", "DNS:client")):
        names = ["-subj", f"/CN={name}", "-addext", f"subjectAltName={alternative}"]
        _openssl(directory, "req", "-x509", *new, *signed, *names, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    _openssl(directory, "pkey", "-in", "client.key", "-aes128", "-passout", "pass:x", "-out", "locked.key")
    return Certificates(directory)


def _openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)
