from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from vmruntime.errors import InvalidArgument, Unimplemented
from vmruntime.images.auth import auth_file, secrets_of
from vmruntime.model.image import RegistryAuth


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def entries(auth: RegistryAuth | None, domain: str = "r.example") -> Any:
    return json.loads(auth_file(auth, domain))["auths"]


def test_nothing_gives_an_empty_file() -> None:
    assert entries(None) == {}
    assert entries(RegistryAuth()) == {}
    assert entries(RegistryAuth(server_address="r.example")) == {}


def test_user_and_password() -> None:
    assert entries(RegistryAuth(username="u", password="p:q")) == {"r.example": {"auth": b64("u:p:q")}}


def test_encoded() -> None:
    assert entries(RegistryAuth(auth=b64("u:p"))) == {"r.example": {"auth": b64("u:p")}}
    assert entries(RegistryAuth(auth=b64("u:p\0\0"))) == {"r.example": {"auth": b64("u:p")}}


def test_identity_token() -> None:
    expected = {"r.example": {"auth": b64("<token>:"), "identitytoken": "t"}}
    assert entries(RegistryAuth(identity_token="t")) == expected


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("other.example:5000", "other.example:5000"),
        ("https://Other.example/v2/", "other.example"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("user@other.example", "other.example"),
    ],
)
def test_shown_to_the_server_they_are_for(address: str, host: str) -> None:
    assert list(entries(RegistryAuth(username="u", password="p", server_address=address))) == [host]


@pytest.mark.parametrize("encoded", ["sec=ret", "s3cr3t!", b64("nocolon"), base64.b64encode(b"\xff\xfe:x").decode()])
def test_bad_encoding_is_refused_without_showing_it(encoded: str) -> None:
    with pytest.raises(InvalidArgument, match="auth") as caught:
        auth_file(RegistryAuth(auth=encoded), "r.example")
    assert encoded not in str(caught.value)
    assert caught.value.__cause__ is None


def test_registry_token_is_refused_without_showing_it() -> None:
    with pytest.raises(Unimplemented, match="registry_token") as caught:
        auth_file(RegistryAuth(registry_token="t0ken"), "r.example")
    assert "t0ken" not in str(caught.value)


def test_colon_in_user_name() -> None:
    with pytest.raises(InvalidArgument, match="username"):
        auth_file(RegistryAuth(username="a:b", password="p"), "r.example")


def test_secrets() -> None:
    auth = RegistryAuth(username="u", password="p", auth="a", identity_token="i", registry_token="r")
    assert secrets_of(auth) == ["p", "a", "i", "r"]
    assert secrets_of(None) == []
    assert "p" not in repr(auth).removeprefix("RegistryAuth")
