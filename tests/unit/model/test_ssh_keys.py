"""Public SSH keys."""

from __future__ import annotations

import base64

import pytest

from vmruntime.errors import InvalidArgument
from vmruntime.model import ssh_keys


def key(kind: str = "ssh-ed25519", said: str = "") -> str:
    name = (said or kind).encode()
    return f"{kind} {base64.b64encode(len(name).to_bytes(4, 'big') + name + bytes(36)).decode()}"


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "sk-ssh-ed25519@openssh.com"])
def test_keys_of_every_type(kind: str) -> None:
    lines = [key(kind), f"{key(kind)} me@host", f'from="10.0.0.0/8",no-pty {key(kind)} with options']
    assert ssh_keys.parse("x", "\n".join(["# mine", "", *(f"  {line} " for line in lines)])) == lines
    assert ssh_keys.parse("x", "") == []


@pytest.mark.parametrize("line", ["ssh-rsa AAAA... me", "ssh-ed25519", key("ssh-rsa", "ssh-ed25519"), "key1", key() + "\x07",
                                  "ssh-rsa AAAAB3NzaC1yc2E", "ssh-rsa !!!!"])  # fmt: skip
def test_what_is_no_key(line: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^keys: line 2: .* is not a public SSH key \(give lines such as"):
        ssh_keys.parse("keys", f"{key()}\n{line}\n")


def test_a_private_key_is_not_repeated() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        ssh_keys.parse("keys", "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n-----END OPENSSH PRIVATE KEY-----\n")
    assert "c2VjcmV0" not in str(refusal.value)
    assert "line 1 begins a private key" in str(refusal.value)
