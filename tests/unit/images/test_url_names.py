from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmruntime.errors import InvalidArgument
from vmruntime.images import reference as references
from vmruntime.images.url_names import is_url, known_as, name_of


@pytest.mark.parametrize(
    ("url", "repository"),
    [
        ("file:///srv/Debian%2012.qcow2", "localhost/debian-12.qcow2"),
        ("file:///srv/__.._", "localhost/disk"),
        ("https://Images.example:8443/a//b_c/D--e.qcow2?x=1", "localhost/images.example/a/b_c/d-e.qcow2"),
        ("http://[::1]/x", "localhost/1/x"),
        ("https://me:secret@x.example/y", "localhost/x.example/y"),
    ],
)
def test_names(url: str, repository: str) -> None:
    assert name_of(url).repository == repository


def test_urls_that_differ_have_names_that_differ() -> None:
    urls = ["http://x/y", "https://x/y", "https://x/Y", "https://x/y?z", "https://x:1/y"]
    assert len({str(name_of(url)) for url in urls}) == len(urls)
    assert name_of(urls[0]) == name_of(urls[0])


@given(st.text(st.characters(codec="ascii", exclude_characters=' "\\<>^`{|}#?', min_codepoint=33), max_size=300))
def test_every_name_is_a_reference(path: str) -> None:
    for url in (f"https://x.example/{path}", f"file:///{path}"):
        try:
            name = name_of(url)
        except InvalidArgument:
            continue
        assert references.parse(str(name)) == name


def test_what_is_a_url() -> None:
    assert [is_url(text) for text in ("file:///x", "http://x", "https://x", "https:x", "x://y", "docker.io/x")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert known_as("busybox:1") == "busybox:1"
    assert known_as("https:///") == "https:///"
    assert known_as("file:///x") == "localhost/x:latest"
