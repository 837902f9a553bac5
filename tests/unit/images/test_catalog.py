from __future__ import annotations

import pytest

from vmruntime.errors import InvalidArgument
from vmruntime.images.catalog import Catalog
from vmruntime.model.image import Image, ImageConfig, Layer

D = "sha256:" + "d" * 64


def image(start: str, *tags: str, digests: tuple[str, ...] = (), created_at: int = 1) -> Image:
    return Image(
        id="sha256:" + start.ljust(64, "0"),
        repo_tags=list(tags),
        repo_digests=list(digests),
        layers=[Layer(diff_id=D, size=1)],
        config=ImageConfig(),
        size=1,
        created_at=created_at,
    )


def test_find() -> None:
    one = image("abc1", "docker.io/library/busybox:latest", digests=(f"docker.io/library/busybox@{D}",))
    two = image("abc2", "r.example/abc:1")
    catalog = Catalog([one, two])
    for text in ("busybox", f"busybox@{D}", f"busybox:other@{D}", one.id, one.id[7:], "abc1", "sha256:abc1"):
        assert catalog.find(text) is one
    for text in ("busybox:1", "other", "abc3", "f" * 64, f"r.example/abc@{D}", "Not A Name", "a@sha256:1", "::", "ab"):
        assert catalog.find(text) is None
    with pytest.raises(InvalidArgument, match="2 images"):
        catalog.find("abc")


def test_a_name_wins_over_an_id() -> None:
    named, other = image("1", "docker.io/library/abc:latest"), image("abc")
    assert Catalog([named, other]).find("abc") is named


def test_names_add_up_and_move() -> None:
    old = image("1", "r.example/a:1", "r.example/a:2", created_at=5)
    catalog = Catalog([old])
    more = catalog.with_image(image("1", "r.example/a:3", created_at=9))
    assert [(each.repo_tags, each.created_at) for each in more] == [
        (["r.example/a:1", "r.example/a:2", "r.example/a:3"], 5)
    ]
    catalog.put(more)
    new = image("2", "r.example/a:2", created_at=10)
    changed = catalog.with_image(new)
    assert [each.id for each in changed] == [old.id, new.id]
    catalog.put(changed)
    assert catalog.find("r.example/a:2") is new
    kept = catalog.find("r.example/a:1")
    assert kept is not None
    assert kept.repo_tags == ["r.example/a:1", "r.example/a:3"]
    assert [each.id for each in catalog.all()] == [old.id, new.id]
    catalog.drop([new.id, "sha256:absent"])
    assert catalog.find("r.example/a:2") is None
    assert catalog.layers_in_use() == {D}
