from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmruntime.cli.podspec import RunOptions, base_name, pod_config
from vmruntime.cli.quantities import Memory, Publish, User
from vmruntime.cli.render import ago, printable, size, timestamp
from vmruntime.cli.resolv import parse

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("text", "amount"),
    [("1", 1), ("256M", 2**28), ("256m", 2**28), ("256Mi", 2**28), ("256MiB", 2**28), ("0.5g", 2**29), ("2T", 2**41)],
)
def test_memory(text: str, amount: int) -> None:
    assert Memory().parse(text) == amount


@pytest.mark.parametrize("text", ["", "M", "0", "-1", "1X", "1e3", "0x10", "nan", "1 000"])
def test_bad_memory(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Memory().parse(text)


@pytest.mark.parametrize("text", ["80", "a:b", "0:1", "1:65536", "::1:1:2", "1:2/", "1:2:3:4", "x:1:2"])
def test_bad_port(text: str) -> None:
    if text == "1:2/":
        assert Publish().parse(text).container_port == 2
        return
    with pytest.raises(ValueError):  # noqa: PT011
        Publish().parse(text)


def test_user() -> None:
    assert User().parse("nobody:5").run_as_username == "nobody"
    assert not User().parse("nobody").HasField("run_as_group")
    assert User().parse("0").HasField("run_as_user")


@given(st.text(max_size=80))
def test_any_image_gives_a_usable_name(reference: str) -> None:
    name = base_name(reference)
    assert 1 <= len(name) <= 63
    config = pod_config(RunOptions(image=reference), Path("/logs"))
    assert config.metadata.name.startswith(name[:50])


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("busybox", "busybox"),
        ("registry.example:5000/a/My_App:1.2@sha256:0", "my-app"),
        ("oci:/srv/images/web:latest", "web"),
        ("::", "container"),
    ],
)
def test_base_name(reference: str, name: str) -> None:
    assert base_name(reference) == name


def test_shown_values() -> None:
    assert ago(0, 1 * SECOND) == "1 second ago"
    assert ago(0, 119 * SECOND) == "1 minute ago"
    assert ago(0, 3 * 3600 * SECOND) == "3 hours ago"
    assert ago(0, 8 * 86400 * SECOND) == "1 week ago"
    assert ago(0, 800 * 86400 * SECOND) == "2 years ago"
    assert ago(5, 0) == "0 seconds ago"
    assert (size(0), size(999), size(1000), size(5 * 2**20), size(3 * 2**40)) == (
        "0 B", "999 B", "1.0 KiB", "5.0 MiB", "3.0 TiB",
    )  # fmt: skip
    assert timestamp(0) is None
    assert timestamp(1_767_323_045_000_000_006) == "2026-01-02T03:04:05.000000006Z"
    assert printable("a\x1b\n\x7fb") == "a���b"


def test_resolv_conf() -> None:
    text = (
        "# comment\nnameserver 127.0.0.53\nnameserver 10.0.0.1\nnameserver fe80::1%eth0\nnameserver 2001:db8::1\n"
        "search a b\nsearch c\noptions ndots:2\noptions edns0\nnameserver 1.1.1.1\nnameserver 2.2.2.2\nnameserver\n"
    )
    config = parse(text)
    assert list(config.servers) == ["10.0.0.1", "2001:db8::1", "1.1.1.1"]
    assert list(config.searches) == ["c"]
    assert list(config.options) == ["ndots:2", "edns0"]
