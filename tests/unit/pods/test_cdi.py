"""CDI files: what is one, which devices they have, and what these change of a container."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmruntime.daemon.cdi import load_cdi_specs
from vmruntime.errors import FailedPrecondition, NotFound
from vmruntime.model.container import (
    Container,
    ContainerEdits,
    ContainerMetadata,
    ContainerSpec,
    ContainerState,
    Mount,
    SecurityContext,
)
from vmruntime.pods.oci.cdi import VERSIONS, CdiSpecs, parse, resolve

FULL: dict[str, Any] = {
    "cdiVersion": "1.0.0",
    "kind": "vendor.com/gpu",
    "annotations": {"a": "b"},
    "containerEdits": {"env": ["ALL=1"], "mounts": [{"hostPath": "/lib/x.so", "containerPath": "/lib/x.so"}]},
    "devices": [
        {
            "name": "gpu0",
            "annotations": {"c": "d"},
            "containerEdits": {
                "env": ["GPU=0", "EMPTY="],
                "deviceNodes": [
                    {"path": "/dev/gpu0"},
                    {
                        "path": "/dev/ctl",
                        "hostPath": "/dev/gpuctl",
                        "type": "u",
                        "major": 240,
                        "minor": 1,
                        "fileMode": 432,
                        "permissions": "rw",
                        "uid": 3,
                        "gid": 4,
                    },
                ],
                "mounts": [
                    {
                        "hostPath": "/run/gpu",
                        "containerPath": "/run/gpu",
                        "type": "bind",
                        "options": ["ro", "nosuid", "rslave", "bind"],
                    }
                ],
                "hooks": [{"hookName": "createContainer", "path": "/bin/hook", "args": ["hook", "x"], "timeout": 3}],
                "additionalGIDs": [0, 44],
            },
        },
        {"name": "1", "containerEdits": {"env": ["GPU=1"]}},
    ],
}


def found(*documents: dict[str, Any], priorities: tuple[int, ...] = ()) -> CdiSpecs:
    specs = [
        parse(json.dumps(document).encode(), f"/cdi/{i}.json", priorities[i] if priorities else 0)
        for i, document in enumerate(documents)
    ]
    return CdiSpecs(specs=specs, directories=["/cdi"])


def changed(**changes: Any) -> dict[str, Any]:
    return {**FULL, **changes}


def with_edits(**edits: Any) -> dict[str, Any]:
    return changed(containerEdits=edits)


def test_everything_a_device_says_is_taken_in_order() -> None:
    edits = resolve(["vendor.com/gpu=gpu0", "vendor.com/gpu=1", "vendor.com/gpu=gpu0"], found(FULL))
    assert edits.envs == [("ALL", "1"), ("GPU", "0"), ("EMPTY", ""), ("GPU", "1")]
    plain, explicit = edits.devices
    assert (plain.container_path, plain.host_path, plain.permissions, plain.users) == (
        "/dev/gpu0", "/dev/gpu0", "rwm", True,
    )  # fmt: skip
    assert (explicit.host_path, explicit.type, explicit.major, explicit.minor) == ("/dev/gpuctl", "c", 240, 1)
    assert (explicit.mode, explicit.uid, explicit.gid, explicit.permissions) == (0o660, 3, 4, "rw")
    library, directory = edits.mounts
    assert (library.readonly, library.propagation, library.must_exist) == (False, "private", True)
    assert (directory.readonly, directory.propagation, directory.options) == (True, "rslave", ["nosuid"])
    assert edits.groups == [44]
    hook = {"path": "/bin/hook", "args": ["hook", "x"], "timeout": 3}
    assert edits.hooks == {"createContainer": [hook]}


def test_edits_are_added_to_what_cri_asked_for() -> None:
    spec = ContainerSpec(
        metadata=ContainerMetadata(name="a"),
        image="i",
        envs=[("GPU", "none")],
        mounts=[Mount(container_path="/m", host_path="/m")],
        security=SecurityContext(supplemental_groups=[44, 5]),
    )
    edits = resolve(["vendor.com/gpu=gpu0"], found(FULL))
    container = Container(id="c", sandbox_id="s", spec=spec, state=ContainerState.CREATING, created_at=1, edits=edits)
    assert container.edited.envs == [("GPU", "none"), ("ALL", "1"), ("GPU", "0"), ("EMPTY", "")]
    assert [mount.container_path for mount in container.edited.mounts] == ["/m", "/lib/x.so", "/run/gpu"]
    assert container.edited.security.supplemental_groups == [44, 5]
    assert msgspec.json.decode(msgspec.json.encode(container), type=Container) == container


def test_yaml_and_every_version() -> None:
    text = b"cdiVersion: 0.6.0\nkind: v/c\ndevices:\n- name: '0'\n  containerEdits:\n    env: [A=b]\n"
    specs = CdiSpecs(specs=[parse(text, "/x.yaml")])
    assert resolve(["v/c=0"], specs) == ContainerEdits(envs=[("A", "b")])
    for version in VERSIONS:
        found(changed(cdiVersion=version))


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        (changed(cdiVersion="0.2.0"), "cdiVersion: '0.2.0' is not one of 0.3.0"),
        (changed(cdiVersion=1), "cdiVersion: expected"),
        (changed(kind="gpu"), "kind: 'gpu' is not vendor/class"),
        (changed(kind="-v/gpu"), "kind"),
        (changed(devices=[]), "devices: there is none"),
        (changed(devices=[{"name": "a b"}]), r"devices\[0\].name: 'a b'"),
        (changed(devices=[{"name": "a"}, {"name": "a"}]), r"devices\[1\].name: 'a' is there twice"),
        (changed(device=[]), "unknown field `device`"),
        (with_edits(env=["A"]), r"containerEdits.env\[0\]: is not NAME=value"),
        (with_edits(deviceNodes=[{"path": "dev/x"}]), r"deviceNodes\[0\].path"),
        (with_edits(deviceNodes=[{"path": "/dev/x", "hostPath": "/a/../b"}]), r"deviceNodes\[0\].hostPath"),
        (with_edits(deviceNodes=[{"path": "/dev/x", "permissions": "x"}]), "permissions: 'x'"),
        (with_edits(deviceNodes=[{"path": "/dev/x", "type": "z"}]), r"deviceNodes\[0\].type"),
        (with_edits(deviceNodes=[{"path": "/dev/x", "uid": -1}]), r"uid: -1"),
        (with_edits(deviceNodes=[{"path": "/dev/x", "major": 2**33}]), "major"),
        (with_edits(mounts=[{"hostPath": "/a", "containerPath": "b"}]), r"mounts\[0\].containerPath"),
        (with_edits(mounts=[{"hostPath": "/a", "containerPath": "/b", "type": "nfs"}]), "type: 'nfs'"),
        (with_edits(mounts=[{"hostPath": "/a", "containerPath": "/b", "options": ["size=1"]}]), "options: 'size=1'"),
        (with_edits(hooks=[{"hookName": "never", "path": "/a"}]), "hookName"),
        (with_edits(hooks=[{"hookName": "prestart", "path": "a"}]), r"hooks\[0\].path"),
        (with_edits(hooks=[{"hookName": "prestart", "path": "/a", "timeout": 0}]), "timeout: 0"),
        (with_edits(additionalGIDs=[-2]), r"additionalGIDs\[0\]: -2"),
        (with_edits(netDevices=[]), "unknown field `netDevices`"),
    ],
)
def test_what_is_no_cdi_file_is_named(document: dict[str, Any], complaint: str) -> None:
    with pytest.raises(FailedPrecondition, match=complaint) as caught:
        found(document)
    assert str(caught.value).startswith("/cdi/0.json: ")


def test_intel_rdt_is_refused_for_the_device_that_asks() -> None:
    specs = found(changed(devices=[{"name": "a", "containerEdits": {"intelRdt": {"closID": "x"}}}, {"name": "b"}]))
    assert resolve(["vendor.com/gpu=b"], specs).envs == [("ALL", "1")]
    with pytest.raises(
        FailedPrecondition, match=r"CDI_devices\[0\].name: 'vendor.com/gpu=a' asks for intelRdt .*0.json"
    ):
        resolve(["vendor.com/gpu=a"], specs)


def test_the_later_directory_has_precedence() -> None:
    low, high = (changed(devices=[{"name": "x", "containerEdits": {"env": [f"FROM={i}"]}}]) for i in range(2))
    assert resolve(["vendor.com/gpu=x"], found(low, high, priorities=(0, 1))).envs[-1] == ("FROM", "1")
    assert resolve(["vendor.com/gpu=x"], found(low, high, priorities=(1, 0))).envs[-1] == ("FROM", "0")
    with pytest.raises(FailedPrecondition, match=r"in two CDI files .*: /cdi/0.json and /cdi/1.json"):
        resolve(["vendor.com/gpu=x"], found(low, high))


def test_directories(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for directory in (first, second):
        directory.mkdir()
    (first / "v.json").write_text(json.dumps(FULL))
    (second / "v.yaml").write_text("cdiVersion: 0.5.0\nkind: vendor.com/gpu\ndevices: [{name: gpu0}]\n")
    (second / "readme.txt").write_text("not one")
    (second / "bad.yaml").write_text("cdiVersion: 0.5.0\nkind: [")
    (second / "open.json").write_text(json.dumps(FULL))
    (second / "open.json").chmod(0o666)
    specs = load_cdi_specs([str(first), str(tmp_path / "none"), str(second)])
    assert [(Path(spec.path).name, spec.priority) for spec in specs.specs] == [("v.json", 0), ("v.yaml", 2)]
    assert resolve(["vendor.com/gpu=gpu0"], specs) == ContainerEdits()
    assert resolve(["vendor.com/gpu=1"], specs).envs == [("ALL", "1"), ("GPU", "1")]
    with pytest.raises(NotFound) as caught:
        resolve(["vendor.com/gpu=2"], specs)
    for words in (
        "config.CDI_devices[0].name: 'vendor.com/gpu=2'",
        str(second),
        "bad.yaml",
        "written by others than its owner",
    ):
        assert words in str(caught.value)
    with pytest.raises(NotFound, match="any directory"):
        resolve(["vendor.com/gpu=2"], CdiSpecs())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(["env", "deviceNodes", "mounts", "hooks", "additionalGIDs", "intelRdt", "x"])
NODES = st.fixed_dictionaries(
    {"path": st.sampled_from(["/dev/a", "b", ""])},
    optional={
        "type": st.sampled_from(["b", "c", "u", "p", "q"]),
        "major": st.integers(),
        "permissions": st.text(max_size=3),
    },
)
EDITS = st.dictionaries(
    KEYS, JSON | st.lists(NODES, max_size=2) | st.lists(st.text(max_size=6), max_size=2), max_size=4
)


@settings(deadline=None)
@given(
    document=st.fixed_dictionaries(
        {"cdiVersion": st.sampled_from([*VERSIONS, "9"]), "kind": st.sampled_from(["v/c", "v", "v/c/"])},
        optional={
            "devices": JSON
            | st.lists(
                st.fixed_dictionaries({"name": st.sampled_from(["a", "0", "-"])}, optional={"containerEdits": EDITS}),
                max_size=2,
            ),
            "containerEdits": EDITS,
        },
    )
)
def test_any_document_is_read_or_refused(document: Any) -> None:
    text = json.dumps(document).encode()
    outcomes: list[ContainerEdits | None] = []
    for path in ("/f.json", "/f.yaml"):
        try:
            spec = parse(text, path)
            outcomes.append(resolve([f"v/c={one.name}" for one in spec.content.devices], CdiSpecs(specs=[spec])))
        except FailedPrecondition as error:
            outcomes.append(None)
            assert str(error).startswith((path, "config.CDI_devices"))
    # YAML reads what JSON reads; a few characters are refused by one alone.
    if None not in outcomes:
        assert outcomes[0] == outcomes[1]


@settings(deadline=None)
@given(text=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_text_is_refused(text: bytes) -> None:
    for path in ("/f.json", "/f.yaml"):
        with pytest.raises(FailedPrecondition, match=path):
            parse(text, path)
