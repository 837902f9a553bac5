"""Aliases of short names, and pins."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.images import reference as references
from vmruntime.images.pinned import Pins
from vmruntime.images.shortnames import ShortNames, read_aliases

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("busybox", "busybox"),
        ("team/app:1", "team/app"),
        (f"app@{DIGEST}", "app"),
        ("r.example/app", None),
        ("localhost/app", None),
        ("host:5000/app", None),
    ],
)
def test_which_names_are_short(text: str, name: str | None) -> None:
    assert references.short_name(text) == name


async def test_aliases_keep_tag_and_digest(tmp_path: Path) -> None:
    conf = tmp_path / "r.conf"
    conf.write_text('[aliases]\n"app" = "r.example:5000/team/app"\n"team/app" = "docker.io/other"\n')
    names = ShortNames(str(conf), tmp_path / "none")
    assert str(names.resolve("app")) == "docker.io/library/app:latest"
    await names.refresh()
    assert str(names.resolve("app")) == "r.example:5000/team/app:latest"
    assert str(names.resolve("app:2")) == "r.example:5000/team/app:2"
    assert str(names.resolve(f"app:2@{DIGEST}")) == f"r.example:5000/team/app@{DIGEST}"
    assert str(names.resolve("team/app")) == "docker.io/library/other:latest"
    assert str(names.resolve("docker.io/library/app")) == "docker.io/library/app:latest"
    conf.write_text("[aliases")
    with pytest.raises(FailedPrecondition, match=rf"^{conf}: cannot be read"):
        await names.refresh()
    assert str(names.resolve("app")) == "r.example:5000/team/app:latest"


def test_later_files_override(tmp_path: Path) -> None:
    conf, drop_ins = tmp_path / "r.conf", tmp_path / "d"
    drop_ins.mkdir()
    conf.write_text('[aliases]\n"a" = "one.example/a"\n"b" = "one.example/b"\n')
    (drop_ins / "2.conf").write_text('[aliases]\n"a" = "three.example/a"\n"b" = ""\n')
    (drop_ins / "1.conf").write_text('[aliases]\n"a" = "two.example/a"\n')
    (drop_ins / "3.toml").write_text("this is not read")
    assert {name: str(to) for name, to in read_aliases(conf, drop_ins).items()} == {"a": "three.example/a:latest"}
    assert read_aliases(tmp_path / "absent", tmp_path / "absent") == {}


@pytest.mark.parametrize(
    "line",
    ['"a:1" = "r.example/a"', '"r.example/a" = "r.example/b"', '"a" = "b"', '"a" = "r.example/a:1"', '"a" = 3',
     f'"a" = "r.example/a@{DIGEST}"', '"a" = "r.example/Not A Name"'],
)  # fmt: skip
def test_what_is_no_alias(tmp_path: Path, line: str) -> None:
    conf = tmp_path / "r.conf"
    conf.write_text(f"[aliases]\n{line}\n")
    with pytest.raises(FailedPrecondition, match=rf"^{conf}: aliases: "):
        read_aliases(conf, tmp_path / "none")
    conf.write_text("aliases = 3\n")
    with pytest.raises(FailedPrecondition, match="is not a table"):
        read_aliases(conf, tmp_path / "none")


def test_pins() -> None:
    pins = Pins(["busybox", f"r.example/a@{DIGEST}", "r.example/infra/*", "*/pause:3.*"], references.parse)
    for name in (
        "docker.io/library/busybox:latest",
        f"r.example/a@{DIGEST}",
        "r.example/infra/deep/er:1",
        "k8s.example/pause:3.9",
    ):
        assert pins.cover(["other.example/x:1", name]), name
    for name in (
        "docker.io/library/busybox:1",
        "r.example/infrastructure:1",
        "k8s.example/pause:399",
        "xr.example/infra/a:1",
    ):
        assert not pins.cover([name]), name
    with pytest.raises(InvalidArgument, match="Not A Name"):
        Pins(["Not A Name"], references.parse)
