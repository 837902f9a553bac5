"""What AppArmor and SELinux mean for containers of each kind, and paths of /proc in a user namespace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.model.container import ContainerMetadata, ContainerSpec, SecurityContext, SecurityProfile
from vmruntime.model.image import ImageConfig
from vmruntime.model.sandbox import (
    IdMapping,
    Namespaces,
    SandboxKind,
    SandboxMetadata,
    SandboxSpec,
    UserNamespace,
)
from vmruntime.pods.oci import lsm
from vmruntime.pods.oci.spec import MASKED_PATHS, READONLY_PATHS, build_oci_spec

MINE = SecurityContext(apparmor=SecurityProfile(kind="localhost", path="mine"))
LABELLED = SecurityContext(selinux_given=True)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host with neither; files of it appear in the directory."""
    monkeypatch.setattr(lsm, "APPARMOR_ENABLED", tmp_path / "enabled")
    monkeypatch.setattr(lsm, "APPARMOR_PROFILES", tmp_path / "profiles")
    monkeypatch.setattr(lsm, "SELINUX", tmp_path / "enforce")
    return tmp_path


def labelled(security: SecurityContext, kind: SandboxKind) -> dict[str, Any]:
    process: dict[str, Any] = {}
    lsm.label(process, security, kind)
    return process


def test_a_loaded_profile_is_applied_on_the_host(host: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"apparmor.localhost_ref: 'mine' is not a loaded .*apparmor_parser"):
        labelled(MINE, SandboxKind.HOST)
    (host / "enabled").write_text("Y\n")
    (host / "profiles").write_text("other (enforce)\nmine (complain)\n")
    assert labelled(MINE, SandboxKind.HOST) == {"apparmorProfile": "mine"}
    (host / "enabled").write_text("N\n")
    with pytest.raises(FailedPrecondition):
        labelled(MINE, SandboxKind.HOST)


def test_a_profile_in_a_vm_is_refused(host: Path) -> None:
    with pytest.raises(InvalidArgument, match="'mine' cannot be applied: the guest"):
        labelled(MINE, SandboxKind.CONTAINER)
    for security in (
        SecurityContext(apparmor=SecurityProfile(kind="runtime/default")),
        SecurityContext(privileged=True, apparmor=MINE.apparmor),
    ):
        assert labelled(security, SandboxKind.CONTAINER) == {}


def test_labels_are_refused_where_they_would_matter(host: Path) -> None:
    assert labelled(LABELLED, SandboxKind.HOST) == {}
    (host / "enforce").write_text("1")
    assert labelled(LABELLED, SandboxKind.CONTAINER) == {}
    with pytest.raises(FailedPrecondition, match="selinux_options"):
        labelled(LABELLED, SandboxKind.HOST)


def test_nothing_is_masked_in_a_user_namespace_unless_asked_for() -> None:
    ids = IdMapping(container_id=0, host_id=1000, length=10)
    user = Namespaces(user_namespace=UserNamespace(uids=ids, gids=ids))
    metadata = SandboxMetadata(name="a", uid="b", namespace="c")

    def paths(namespaces: Namespaces, **security: Any) -> tuple[list[str], list[str]]:
        container = ContainerSpec(
            metadata=ContainerMetadata(name="c"),
            image="i",
            command=["x"],
            annotations={"a": "b", "run.oci.handler": "wasm"},
            security=SecurityContext(**security),
        )
        sandbox = SandboxSpec(metadata=metadata, namespaces=namespaces)
        spec = build_oci_spec(container, ImageConfig(), sandbox, load_profile=lambda path: b"")
        assert spec["annotations"] == {"a": "b"}
        return spec["linux"]["maskedPaths"], spec["linux"]["readonlyPaths"]

    assert paths(Namespaces()) == (list(MASKED_PATHS), list(READONLY_PATHS))
    assert paths(user) == ([], [])
    assert paths(user, masked_paths=["/m"], readonly_paths=["/r"]) == (["/m"], ["/r"])
    assert paths(Namespaces(), privileged=True) == ([], [])
