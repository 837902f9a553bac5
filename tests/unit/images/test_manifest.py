from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmruntime.errors import NotFound
from vmruntime.images.manifest import BadImage, Index, Manifest, choose, parse_config, parse_manifest
from vmruntime.images.platform import Platform

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
AMD64 = Platform("amd64")
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


def blob(digest: str = A, media_type: str = GZIP, **extra: Any) -> dict[str, Any]:
    return {"digest": digest, "size": 3, "mediaType": media_type, **extra}


def image(**changes: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "config": blob(), "layers": [blob()], **changes}).encode()


def config(**changes: Any) -> bytes:
    rootfs = {"type": "layers", "diff_ids": [A]}
    return json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs, **changes}).encode()


def test_image() -> None:
    found = parse_manifest(image(), "app")
    assert isinstance(found, Manifest)
    assert [layer.digest for layer in found.layers] == [A]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "malformed"),
        (b"[]", "malformed"),
        (b"\xff\xfe", "malformed"),
        (b"[" * 100_000, "malformed"),
        (b"{}", "no layers"),
        (b'{"schemaVersion": 3}', "schemaVersion 3"),
        (b'{"schemaVersion": 1, "fsLayers": [{"blobSum": "x"}]}', "schema 1"),
        (image(manifests=[]), "index and an image"),
        (image(config=blob("sha256:../../etc")), "not a SHA-256 digest"),
        (image(layers=[blob("md5:x")]), "not a SHA-256 digest"),
        (image(layers=[blob() | {"size": -1}]), "-1 bytes"),
        (image(layers=[blob() | {"size": "3"}]), "malformed"),
        (image(layers=[blob()] * 501), "501 layers"),
        (image(layers=[blob(urls=["https://elsewhere.example"])]), "does not let"),
        (image(layers=[blob(media_type="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")]), "does not let"),
        (image(layers=[blob(media_type="application/vnd.oci.image.layer.nondistributable.v1.tar")]), "does not let"),
        (image(layers=[blob(media_type=GZIP + "+encrypted")]), "encrypted"),
        (image(layers=[blob(media_type="application/wasm")]), "unknown type"),
    ],
)
def test_refused(data: bytes, why: str) -> None:
    with pytest.raises(BadImage, match=why):
        parse_manifest(data, "app")


def index(*platforms: tuple[str, str, str]) -> Index:
    entries = [
        blob(digest=f"sha256:{number:064x}", platform={"os": os, "architecture": architecture, "variant": variant})
        for number, (os, architecture, variant) in enumerate(platforms)
    ]
    found = parse_manifest(json.dumps({"schemaVersion": 2, "manifests": [*entries, blob()]}).encode(), "app")
    assert isinstance(found, Index)
    return found


def test_choice_by_platform_and_variant() -> None:
    offered = index(("windows", "amd64", ""), ("linux", "arm", "v6"), ("linux", "arm", "v7"), ("linux", "amd64", ""))
    assert choose(offered, AMD64, "app") is offered.manifests[3]
    assert choose(offered, Platform("arm", ("v7", "v6")), "app") is offered.manifests[2]
    assert choose(offered, Platform("arm", ("v6",)), "app") is offered.manifests[1]
    with pytest.raises(NotFound, match="no image for linux/s390x; it has: linux/amd64, linux/arm, windows/amd64"):
        choose(offered, Platform("s390x"), "app")


def test_config() -> None:
    raw: dict[str, Any] = {
        "Env": ["A=b"],
        "Cmd": None,
        "Entrypoint": ["/e"],
        "Volumes": {"/b": {}, "/a": {}},
        "Labels": None,
    }
    content = parse_config(config(config=raw, history=[{"x": 1}]), "app", AMD64, 1)
    assert content.diff_ids == [A]
    assert content.config.env == ["A=b"]
    assert content.config.cmd == []
    assert content.config.volumes == ["/a", "/b"]
    assert parse_config(config(config=None), "app", AMD64, 1).config.user == ""
    assert parse_config(config(rootfs={"type": "layers", "diff_ids": None}), "app", AMD64, 0).diff_ids == []


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"null", "malformed"),
        (config(os="windows"), "windows/amd64"),
        (config(architecture="arm64"), "linux/arm64; this host runs linux/amd64"),
        (b"{}", r"\(none\)/\(none\)"),
        (config(rootfs={"diff_ids": [A, B]}), "1 layers but .* 2 diff_ids"),
        (config(rootfs={"diff_ids": ["x"]}), "diff_id"),
        (config(config={"Cmd": "sh"}), "malformed"),
        (config(config={"Env": ["A=\0"]}), "NUL"),
    ],
)
def test_config_refused(data: bytes, why: str) -> None:
    with pytest.raises(BadImage, match=why):
        parse_config(data, "app", AMD64, 1)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["layers", "config", "manifests", "digest", "x"]), inner)
    ),
    max_leaves=20,
)


@given(_json)
def test_any_json_is_read_or_refused(value: object) -> None:
    data = json.dumps(value).encode()
    for read in (lambda: parse_manifest(data, "app"), lambda: parse_config(data, "app", AMD64, 1)):
        try:
            read()
        except BadImage:
            continue
