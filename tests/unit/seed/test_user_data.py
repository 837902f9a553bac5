"""cloud-init's user-data."""

from __future__ import annotations

import base64
import subprocess
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.seed.test_merge import MAPPINGS
from tests.unit.seed.test_network import CALICO
from vmruntime import yamltext
from vmruntime.errors import InvalidArgument
from vmruntime.model.image_pod import DataSource, Encoding, ImagePod, SourceKind
from vmruntime.seed.merge import merge
from vmruntime.seed.network import route_commands
from vmruntime.seed.request import SeedDevice, SeedFile, SeedMount, SeedRequest
from vmruntime.seed.user_data import environment, user_data

SOURCE = DataSource(kind=SourceKind.CONFIGMAP, name="vm")
DISK = SeedDevice(path="/dev/testpvc", source="/dev/disk/by-id/virtio-pvc")
SHARE = SeedMount(source="volumes", path="/mnt/data", fstype="virtiofs", options="rw,nofail")


def request(pod: ImagePod | None = None, **members: Any) -> SeedRequest:
    return SeedRequest(instance_id="vm.default", hostname="vm", image_pod=pod or ImagePod(), **members)


def config(asked: SeedRequest) -> dict[str, Any]:
    text, vendor = user_data(asked)
    assert text.startswith("#cloud-config\n")
    assert vendor == ""
    return yaml.safe_load(text) or {}


def test_nothing() -> None:
    assert user_data(request()) == ("#cloud-config\n", "")


def test_annotation_and_source() -> None:
    content = {"users": b"- name: from-source", "locale": b"C"}
    given = {"users": [{"name": "given"}], "locale": "pl_PL"}
    pod = ImagePod(user_data=given, user_data_source=SOURCE)
    assert config(request(pod, user_data=content)) == {
        "users": [{"name": "from-source"}, {"name": "given"}], "locale": "pl_PL",
    }  # fmt: skip
    pod = ImagePod(user_data=given, user_data_source=SOURCE, user_data_overwrite=True)
    assert config(request(pod, user_data=content)) == given
    only_source = ImagePod(user_data_source=SOURCE, user_data_overwrite=True)
    assert config(request(only_source, user_data=content)) == {"users": [{"name": "from-source"}], "locale": "C"}


@settings(deadline=None)  # which a busy machine misses
@given(MAPPINGS, MAPPINGS, st.booleans())
def test_any_two_documents(source: dict[str, Any], given: dict[str, Any], overwrite: bool) -> None:
    pod = ImagePod(user_data=given, user_data_source=SOURCE, user_data_overwrite=overwrite)
    content = {name: yamltext.dump(value).encode() for name, value in source.items()}
    assert config(request(pod, user_data=content)) == (given if overwrite else merge(source, given))


def test_scripts() -> None:
    key = DataSource(kind=SourceKind.CONFIGMAP, name="vm", key="s")
    encoded = {"s": base64.b64encode(b"#!/bin/sh\necho source\n")}
    from_source = ImagePod(user_data_source=key, user_data_encoding=Encoding.BASE64, user_data={"a": 1})
    assert user_data(request(from_source, user_data=encoded)) == ("#!/bin/sh\necho source\n", "")
    both = ImagePod(user_data_script="#!/bin/sh\n", user_data_source=key)
    assert user_data(request(both, user_data=encoded)) == ("#!/bin/sh\n", "")


def test_a_script_with_files_and_mounts() -> None:
    pod = ImagePod(user_data_script="#!/bin/sh\n@virtlet-mount-script@\necho done\n", user_data={"never": "used"})
    file = SeedFile(path="/etc/x", content=b"x")
    script, vendor = user_data(request(pod, mounts=[SHARE], devices=[DISK], injected=[file], envs=[("A", "1")]))
    assert "@virtlet-mount-script@" not in script
    assert "ln -sfn /dev/disk/by-id/virtio-pvc /dev/testpvc" in script
    assert "mount -t virtiofs -o rw,nofail volumes /mnt/data" in script
    assert subprocess.run(["sh", "-n"], input=script.encode(), check=False).returncode == 0
    assert vendor.startswith("#cloud-config\n")
    told = yaml.safe_load(vendor)
    assert "never" not in told
    assert [entry["path"] for entry in told["write_files"]] == [
        "/etc/x", "/etc/cloud/symlink-devs.sh", "/etc/cloud/mount-volumes.sh", "/etc/cloud/environment",
    ]  # fmt: skip


def test_routes() -> None:
    found = config(request(ImagePod(user_data={"bootcmd": ["echo mine"]}), network=CALICO))
    assert found == {"bootcmd": [*route_commands(CALICO), "echo mine"]}
    assert config(request(ImagePod(force_dhcp=True), network=CALICO)) == {}
    script, vendor = user_data(request(ImagePod(user_data_script="#!/bin/sh"), network=CALICO))
    assert (script, yaml.safe_load(vendor)) == ("#!/bin/sh", {"bootcmd": route_commands(CALICO)})


def test_mounts() -> None:
    given = {"mounts": [["/dev/testpvc", "/mnt"], ["/dev/vdz", "/z"], "odd"], "runcmd": ["echo mine"]}
    found = config(request(ImagePod(user_data=given), mounts=[SHARE], devices=[DISK]))
    assert found["mounts"] == [
        ["/dev/disk/by-id/virtio-pvc", "/mnt"], ["/dev/vdz", "/z"], "odd",
        ["volumes", "/mnt/data", "virtiofs", "rw,nofail", "0", "0"],
    ]  # fmt: skip
    assert found["runcmd"] == [
        ["/etc/cloud/symlink-devs.sh"],
        ["ln", "-sf", "/etc/cloud/symlink-devs.sh", "/var/lib/cloud/scripts/per-boot/"],
        "echo mine",
    ]
    scripts = {entry["path"]: entry for entry in found["write_files"]}
    for script in scripts.values():
        assert script["permissions"] == "0755"
        assert subprocess.run(["sh", "-n"], input=script["content"].encode(), check=False).returncode == 0


def test_the_scripts_do_what_they_say(tmp_path: Any) -> None:
    device = SeedDevice(path=f"{tmp_path}/dev/my disk", source=f"{tmp_path}/vdb")
    (tmp_path / "vdb").write_text("disk")
    found = config(request(devices=[device]))
    for _ in range(2):
        subprocess.run(["sh", "-e"], input=found["write_files"][0]["content"].encode(), check=True)
    assert (tmp_path / "dev" / "my disk").read_text() == "disk"


def test_files() -> None:
    files = [
        SeedFile(path="/etc//foo/a.conf", content=b"\xff\0"),
        SeedFile(path="/etc/secret", content=b"s", mode=0o600),
        SeedFile(path="/mnt/data/under", content=b"u"),
        SeedFile(path="/mnt/database", content=b"b"),
    ]
    pod = ImagePod(user_data={"write_files": [{"path": "/mine"}]}, files_source=SOURCE)
    content = {"x": b"from source", "x_path": b"/etc/x", "x_encoding": b"plain"}
    found = config(request(pod, injected=files, files=content, mounts=[SHARE]))["write_files"]
    assert found[0] == {"path": "/mine"}
    written = {entry["path"]: entry for entry in found[1:6]}
    assert {path: base64.b64decode(entry["content"]) for path, entry in written.items()} == {
        "/etc/foo/a.conf": b"\xff\0", "/etc/secret": b"s", "/mnt/data/under": b"u", "/mnt/database": b"b", "/etc/x": b"from source",
    }  # fmt: skip
    assert written["/etc/secret"]["permissions"] == "0600"
    assert written["/etc/x"]["permissions"] == "0644"
    assert [path for path, entry in written.items() if entry.get("defer")] == ["/mnt/data/under"]


def test_the_environment(tmp_path: Any) -> None:
    envs = [("A", "plain"), ("EMPTY", ""), ("SPACE", "a b"), ("QUOTE", 'it\'s "$HOME"'), ("LINES", "a\nb")]
    text = environment(envs)
    assert text.startswith("A=plain\nEMPTY=\nSPACE='a b'\n")
    path = tmp_path / "environment"
    path.write_text(text)
    done = subprocess.run(
        ["sh", "-c", f'. {path}; printf \'%s|\' "$A" "$EMPTY" "$SPACE" "$QUOTE" "$LINES"'],
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout.decode() == "".join(f"{value}|" for _, value in envs)
    assert config(request(envs=envs))["write_files"] == [
        {"path": "/etc/cloud/environment", "content": text, "permissions": "0644"}
    ]
    with pytest.raises(InvalidArgument, match="envs: 'A B' is not the name of a variable"):
        environment([("A B", "x")])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (
            {"image_pod": ImagePod(user_data={"mounts": "x"}), "mounts": [SHARE]},
            "user-data: mounts is a text, not a list",
        ),
        (
            {"image_pod": ImagePod(user_data={"write_files": {}}), "envs": [("A", "")]},
            "write_files is a mapping, not a list",
        ),
        ({"image_pod": ImagePod(user_data={"runcmd": 1}), "devices": [DISK]}, "runcmd is a number, not a list"),
        (
            {"mounts": [SeedMount(source="v", path="/a b")]},
            "contains a space, which cloud-init cannot write into fstab",
        ),
        ({"mounts": [SeedMount(source="a b", path="/a")]}, "mount /a: source: 'a b' cannot be written into fstab"),
        ({"mounts": [SeedMount(source="v", path="/")]}, "is the root directory"),
        ({"devices": [SeedDevice(path="sdb", source="/dev/x")]}, "device: 'sdb' is not an absolute path"),
        ({"injected": [SeedFile(path="etc", content=b"")]}, "file: 'etc' is not an absolute path"),
    ],
)
def test_what_cannot_be_used(members: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        user_data(SeedRequest(instance_id="x", hostname="x", **members))
    assert words in str(refusal.value)
