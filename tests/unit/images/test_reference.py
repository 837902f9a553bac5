from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmruntime.errors import InvalidArgument
from vmruntime.images.reference import Reference, id_prefix, parse

D = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1", "docker.io/library/busybox:1"),
        ("user/app", "docker.io/user/app:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/library/busybox:1", "docker.io/library/busybox:1"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("app:5000", "docker.io/library/app:5000"),
        ("registry.example:5000/a/b__c/d-e.f--g:V1.2_x-", "registry.example:5000/a/b__c/d-e.f--g:V1.2_x-"),
        ("HOST/app", "HOST/app:latest"),
        ("[2001:db8::1]:5000/app:1", "[2001:db8::1]:5000/app:1"),
        (f"busybox@{D}", f"docker.io/library/busybox@{D}"),
        (f"busybox:1@{D}", f"docker.io/library/busybox@{D}"),
        ("a" * 63, f"docker.io/library/{'a' * 63}:latest"),
        (f"host.example/{'a' * 64}", f"host.example/{'a' * 64}:latest"),
    ],
)
def test_full_name(text: str, full: str) -> None:
    assert str(parse(text)) == full


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/app",
        "app/",
        "a//b",
        "Busybox",
        "host.example/App",
        "app:",
        "app:-x",
        "app:" + "t" * 129,
        "app\n",
        "app:1\n",
        "app@",
        "app@sha256:abc",
        "app@md5:" + "a" * 32,
        f"app@{D}\n",
        f"app@{D.upper()}",
        "a" * 64,
        "-a",
        "a..b",
        "a___b",
        "a_-b",
        "host.example",
        "host.example/",
        "-host.example/app",
        "host.example:port/app",
        "https://host.example/app",
        "app --help",
        "--help",
        "äpp",
        "app:\u0661",
        "x.y/" + "a" * 255,
    ],
)
def test_refused_and_named(text: str) -> None:
    if text == "host.example":  # without a slash it is a repository of docker.io
        assert str(parse(text)) == "docker.io/library/host.example:latest"
        return
    with pytest.raises(InvalidArgument, match="image reference") as caught:
        parse(text)
    assert repr(text) in str(caught.value)


_component = st.from_regex(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)?", fullmatch=True).filter(lambda text: len(text) < 30)


@given(
    st.sampled_from(["docker.io", "localhost", "r.example:5000", "[::1]:5"]),
    st.lists(_component, min_size=2, max_size=4),
    st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
)
def test_full_names_are_fixed_points(domain: str, path: list[str], tag: str) -> None:
    reference = Reference(domain, "/".join(path), tag)
    assert parse(str(reference)) == reference
    pinned = parse(reference.with_digest(D))
    assert parse(str(pinned)) == pinned
    assert pinned.repository == reference.repository


@given(st.text())
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        reference = parse(text)
    except InvalidArgument:
        return
    assert parse(str(reference)) == reference
    assert not str(reference).startswith("-")
    assert not any(character.isspace() for character in str(reference))


def test_ids() -> None:
    assert id_prefix("a" * 64) == D
    assert id_prefix(D) == D
    assert id_prefix("abc123") == "sha256:abc123"
    assert id_prefix("ab") is None
    assert id_prefix("busybox") is None
    assert id_prefix("a" * 65) is None
