"""Whole seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.model.test_ssh_keys import key
from tests.unit.seed.iso9660 import volumes
from tests.unit.seed.test_network import CLUSTER, DUAL
from vmruntime.errors import ResourceExhausted
from vmruntime.model.image_pod import DataSource, ImagePod, SeedFormat, SourceKind
from vmruntime.seed.build import build_seed, seed_files
from vmruntime.seed.network import network_config, network_data, route_commands
from vmruntime.seed.request import SeedFile, SeedRequest

CONFIGDRIVE = SeedFormat.CONFIGDRIVE


def request(pod: ImagePod | None = None, **members: Any) -> SeedRequest:
    asked = {"network": DUAL, "dns": CLUSTER, "image_pod": pod or ImagePod(), **members}
    return SeedRequest(instance_id="vm.default", hostname="vm", **asked)


def test_nocloud(tmp_path: Path) -> None:
    build_seed(request(ImagePod(ssh_keys=[key()], user_data={"a": 1})), tmp_path / "seed.iso")
    for volume in volumes((tmp_path / "seed.iso").read_bytes()):
        assert volume.label == "cidata"
        assert volume.files.keys() == {"meta-data", "user-data", "network-config"}
        told = yaml.safe_load(volume.files["meta-data"])
        assert told == json.loads(volume.files["meta-data"])
        assert told == {"instance-id": "vm.default", "local-hostname": "vm", "public-keys": [key()]}
        assert yaml.safe_load(volume.files["user-data"]) == {"a": 1, "bootcmd": route_commands(DUAL)}
        assert yaml.safe_load(volume.files["network-config"]) == network_config(DUAL, CLUSTER)


def test_configdrive(tmp_path: Path) -> None:
    pod = ImagePod(
        seed_format=CONFIGDRIVE, ssh_keys=[key("ssh-rsa"), key()], meta_data={"instance-id": "mine", "meta": {"x": 1}}
    )
    with open(tmp_path / "seed.iso", "wb") as file:
        build_seed(request(pod), file.fileno())
    for volume in volumes((tmp_path / "seed.iso").read_bytes()):
        assert volume.label == "config-2"
        names = {name.removeprefix("openstack/latest/"): content for name, content in volume.files.items()}
        assert names.keys() == {"meta_data.json", "user_data", "network_data.json"}
        assert json.loads(names["meta_data.json"]) == {
            "instance-id": "mine",
            "uuid": "mine",
            "local-hostname": "vm",
            "hostname": "vm",
            "public-keys": [key("ssh-rsa"), key()],
            "public_keys": {"key-0": key("ssh-rsa"), "key-1": key()},
            "meta": {"x": 1},
        }
        assert yaml.safe_load(names["user_data"]) == {"bootcmd": route_commands(DUAL)}
        assert json.loads(names["network_data.json"]) == network_data(DUAL, CLUSTER)


def test_vendor_data_beside_a_script() -> None:
    script = ImagePod(user_data_script="#!/bin/sh\n")
    files = seed_files(request(script, envs=[("A", "1")]))
    assert files["user-data"] == b"#!/bin/sh\n"
    assert yaml.safe_load(files["vendor-data"]).keys() == {"bootcmd", "write_files"}
    drive = ImagePod(user_data_script="#!/bin/sh\n", seed_format=CONFIGDRIVE)
    vendor = json.loads(seed_files(request(drive, envs=[("A", "1")]))["openstack/latest/vendor_data.json"])
    assert vendor == {"cloud-init": files["vendor-data"].decode()}


@pytest.mark.parametrize("seed_format", list(SeedFormat))
def test_dhcp(seed_format: SeedFormat) -> None:
    for asked in (
        request(ImagePod(force_dhcp=True, seed_format=seed_format)),
        request(ImagePod(seed_format=seed_format), network=None),
    ):
        assert not [name for name in seed_files(asked) if "network" in name]


def test_ssh_keys_of_source_and_annotation() -> None:
    source = DataSource(kind=SourceKind.SECRET, name="s")
    content = {"authorized_keys": f"{key()} source\n{key()} both\n".encode()}
    mine = [f"{key()} both", f"{key()} mine"]

    def public(**members: Any) -> list[str]:
        pod = ImagePod(ssh_key_source=source, **members)
        found: list[str] = json.loads(seed_files(request(pod, ssh_keys=content))["meta-data"])["public-keys"]
        return [line.rsplit(" ", 1)[1] for line in found]

    assert public(ssh_keys=mine) == ["source", "both", "mine"]
    assert public(ssh_keys=mine, user_data_overwrite=True) == ["both", "mine"]
    assert public(user_data_overwrite=True) == ["source", "both"]


def test_too_much(tmp_path: Path) -> None:
    big = SeedFile(path="/x", content=bytes(200_000))
    with pytest.raises(ResourceExhausted, match="bytes; 100000 are possible"):
        build_seed(request(injected=[big]), tmp_path / "seed.iso", limit=100_000)
    assert list(tmp_path.iterdir()) == []
