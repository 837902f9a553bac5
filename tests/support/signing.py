"""Images signed with keys that were made for the test: GnuPG, and a lookaside directory for the signatures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.registry import Registry


@dataclasses.dataclass(frozen=True)
class Keyring:
    """A GnuPG home.

    Attributes:
        keys: Fingerprint by the name it was made for.
    """

    home: Path
    keys: dict[str, str]

    def public(self, name: str, path: Path) -> Path:
        """Write a public key to a file and return the file."""
        path.write_bytes(gpg(self.home, "--export", self.keys[name]))
        return path


@contextlib.contextmanager
def keyring(*names: str) -> Iterator[Keyring]:
    """Yield a keyring with a new key for each name; its agent is ended."""
    with tempfile.TemporaryDirectory(prefix="gpg-", dir="/tmp") as directory:  # short: the agent's socket is below it
        home = Path(directory)
        keys = {}
        try:
            for name in names:
                user = f"{name} <{name}@example>"
                gpg(home, "--passphrase", "", "--quick-gen-key", user, "rsa2048", "sign", "never")
                listing = gpg(home, "--with-colons", "--list-keys", f"={user}").decode()
                keys[name] = next(line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr:"))
            yield Keyring(home, keys)
        finally:
            subprocess.run(["gpgconf", "--homedir", directory, "--kill", "all"], check=True)


def gpg(home: Path, *arguments: str) -> bytes:
    argv = ["gpg", "--homedir", str(home), "--batch", "--quiet", *arguments]
    return subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout


class Lookaside:
    """Where a registry's signatures are kept: a directory, told by a containers-registries.d(5) directory.

    Attributes:
        registries_d: For images.registries_d and skopeo.
    """

    def __init__(self, root: Path, registry: Registry) -> None:
        self._registry = registry
        signatures = root / "signatures"
        signatures.mkdir(parents=True)
        self.registries_d = root / "registries.d"
        self.registries_d.mkdir()
        place = {"lookaside": f"file://{signatures}", "lookaside-staging": f"file://{signatures}"}
        text = json.dumps({"docker": {registry.address: place}})  # JSON is YAML
        (self.registries_d / "test.yaml").write_text(text)

    def push(self, layout: Path, name: str, keys: Keyring, signer: str) -> None:
        """Copy the image of an OCI layout to the registry, under name:tag, signed for this name."""
        argv = ["skopeo", "--insecure-policy", "--registries.d", str(self.registries_d), "copy", "--quiet"]
        argv += ["--dest-tls-verify=false", "--sign-by", keys.keys[signer]]
        target = f"docker://{self._registry.address}/{name}"
        environment = {**os.environ, "GNUPGHOME": str(keys.home)}
        subprocess.run([*argv, f"oci:{layout}:image", target], check=True, env=environment)


def signed_only(path: Path, registry: Registry, key: Path, domain: str = "registry.example") -> Path:
    """Write a containers-policy.json(5) that takes images of one domain signed by one key, and no others.

    Signatures are for the name under which the image was pushed, so names of the domain are matched with those.
    """
    requirement: dict[str, Any] = {
        "type": "signedBy",
        "keyType": "GPGKeys",
        "keyPath": str(key),
        "signedIdentity": {"type": "remapIdentity", "prefix": domain, "signedPrefix": registry.address},
    }
    policy = {"default": [{"type": "reject"}], "transports": {"docker": {domain: [requirement]}}}
    path.write_text(json.dumps(policy))
    return path
