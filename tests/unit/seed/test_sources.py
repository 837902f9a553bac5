"""ConfigMaps and Secrets that annotations name."""

from __future__ import annotations

import base64

import pytest

from tests.unit.model.test_ssh_keys import key
from vmruntime.errors import InvalidArgument, NotFound, VmruntimeError
from vmruntime.model.image_pod import DataSource, Encoding, SourceKind
from vmruntime.seed import sources
from vmruntime.seed.request import SeedFile, SourceContent

CONFIGMAP = DataSource(kind=SourceKind.CONFIGMAP, name="vm")
SECRET = DataSource(kind=SourceKind.SECRET, name="vm")


def with_key(key: str) -> DataSource:
    return DataSource(kind=SourceKind.CONFIGMAP, name="vm", key=key)


def test_keys() -> None:
    content = {"authorized_keys": f"# mine\n{key()} a\n".encode(), "other": f"{key()} b".encode()}
    assert sources.keys(CONFIGMAP, content) == [f"{key()} a"]
    assert sources.keys(with_key("other"), content) == [f"{key()} b"]
    with pytest.raises(
        NotFound, match=r"configmap/vm/x has no key 'x' \(add it, or name one that it has: authorized_keys, other"
    ):
        sources.keys(with_key("x"), content)
    with pytest.raises(InvalidArgument, match="^configmap/vm, key 'authorized_keys': line 1: "):
        sources.keys(CONFIGMAP, {"authorized_keys": b"nonsense"})


def test_cloud_config() -> None:
    content = {"users": b"- name: cloudy\n", "hostname": b"vm", "package_update": b"true", "empty": b""}
    assert sources.cloud_config(CONFIGMAP, content) == {
        "users": [{"name": "cloudy"}], "hostname": "vm", "package_update": True, "empty": None,
    }  # fmt: skip
    with pytest.raises(InvalidArgument, match="^configmap/vm, key 'users': line 1, column "):
        sources.cloud_config(CONFIGMAP, {"users": b"a: b: c"})
    with pytest.raises(InvalidArgument, match="key 'x': is not UTF-8 text at byte 1"):
        sources.cloud_config(CONFIGMAP, {"x": b"a\xff"})


def test_a_document() -> None:
    script = "#!/bin/sh\necho ☃\n"
    assert sources.document(with_key("s"), {"s": script.encode()}, Encoding.PLAIN) == script
    assert sources.document(with_key("s"), {"s": base64.encodebytes(script.encode())}, Encoding.BASE64) == script
    with pytest.raises(InvalidArgument, match="key 's': is not base64"):
        sources.document(with_key("s"), {"s": b"#!/bin/sh"}, Encoding.BASE64)
    with pytest.raises(InvalidArgument, match="is not UTF-8 text"):
        sources.document(with_key("s"), {"s": base64.b64encode(b"\xff")}, Encoding.BASE64)
    with pytest.raises(NotFound, match="has no key 's'"):
        sources.document(with_key("s"), {}, Encoding.PLAIN)


def test_files() -> None:
    content = {
        "locale": b'LANG="pl_PL.UTF-8"\n', "locale_path": b"/etc/locale.conf\n", "locale_encoding": b"plain\n",
        "host": base64.b64encode(b"multi off\n"), "host_path": b"/etc//host.conf",
        "blob": b"\xff\0", "blob_path": b"/opt/blob", "blob_encoding": b"plain",
    }  # fmt: skip
    expected = [
        ("/opt/blob", b"\xff\0"),
        ("/etc/host.conf", b"multi off\n"),
        ("/etc/locale.conf", b'LANG="pl_PL.UTF-8"\n'),
    ]
    assert sources.files(CONFIGMAP, content) == [SeedFile(path=path, content=data) for path, data in expected]
    assert {file.mode for file in sources.files(SECRET, content)} == {0o600}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": b""}, "key 'a': there is no key 'a_path' (a file is two keys"),
        ({"a_path": b"/x"}, "key 'a_path': there is no key 'a' that it belongs to"),
        ({"a": b"", "a_path": b"x"}, "key 'a_path': 'x' is not an absolute path"),
        ({"a": b"", "a_path": b"/x/../../etc/shadow"}, "contains '..'"),
        ({"a": b"", "a_path": b"/"}, "is the root directory"),
        ({"a": b"", "a_path": b"/x\x01"}, "has a control character"),
        ({"a": b"", "a_path": b"/x", "a_encoding": b"hex"}, "key 'a_encoding': 'hex' is not known"),
        (
            {"a": b"LANG=C", "a_path": b"/x"},
            "key 'a': is not base64 (encode it, or say that its encoding is \"plain\")",
        ),
    ],
)
def test_files_that_cannot_be(content: SourceContent, words: str) -> None:
    with pytest.raises(VmruntimeError) as refusal:
        sources.files(CONFIGMAP, content)
    assert str(refusal.value).startswith("configmap/vm, key ")
    assert words in str(refusal.value)
