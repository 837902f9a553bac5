"""Annotations of image pods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.model.test_ssh_keys import key
from vmruntime.cri.translate import image_pod
from vmruntime.cri.translate.image_pod import image_pod_from_annotations
from vmruntime.errors import InvalidArgument
from vmruntime.model.image_pod import (
    CpuCache,
    CpuFeature,
    CpuModel,
    CpuSetting,
    CpuTopology,
    DataSource,
    DiskDriver,
    Encoding,
    Firmware,
    ImagePod,
    SeedFormat,
    SourceKind,
)

CONFIGMAP = DataSource(kind=SourceKind.CONFIGMAP, name="vm-data")
SECRET = DataSource(kind=SourceKind.SECRET, name="keys", key="mine")
CPU = """
Mode: custom
Match: exact
Model: {Fallback: allow, Value: core2duo, VendorID: GenuineIntel}
Topology: {Sockets: 1, Cores: 2, Threads: 2}
Cache: {Level: 3, Mode: emulate}
Features:
- {Policy: require, Name: vmx}
"""
SETTING = CpuSetting(
    mode="custom",
    match="exact",
    model=CpuModel(value="core2duo", fallback="allow", vendor_id="GenuineIntel"),
    topology=CpuTopology(sockets=1, cores=2, threads=2),
    cache=CpuCache(mode="emulate", level=3),
    features=[CpuFeature(name="vmx", policy="require")],
)

# Virtlet's name, ours, the value, what comes of it.
SAME: list[tuple[str, str, str, dict[str, Any]]] = [
    ("VCPUCount", "vcpus", "4", {"vcpus": 4}),
    ("CPUModel", "cpu-model", "host-model", {"host_cpu": True}),
    ("CPUModel", "cpu-model", "", {"host_cpu": False}),
    ("LibvirtCPUSetting", "libvirt-cpu", CPU, {"cpu": SETTING}),
    ("DiskDriver", "disk-driver", "virtio", {"disk_driver": DiskDriver.VIRTIO}),
    ("DiskDriver", "disk-driver", "", {"disk_driver": DiskDriver.SCSI}),
    ("RootVolumeSize", "root-volume-size", "1Gi", {"root_volume_size": 2**30}),
    ("SystemUUID", "system-uuid", "53008994-44C0-4017-ad44-9c49758083da",
     {"system_uuid": "53008994-44c0-4017-ad44-9c49758083da"}),
    ("SSHKeys", "ssh-keys", f"{key()} a\n\n{key()} b\n", {"ssh_keys": [f"{key()} a", f"{key()} b"]}),
    ("SSHKeySource", "ssh-key-source", "secret/keys/mine", {"ssh_key_source": SECRET}),
    ("SSHKeySource", "ssh-key-source", "configmap/vm-data", {"ssh_key_source": CONFIGMAP}),
    ("CloudInitImageType", "cloud-init-image-type", "ConfigDrive", {"seed_format": SeedFormat.CONFIGDRIVE}),
    ("CloudInitMetaData", "cloud-init-meta-data", "instance-id: foobar", {"meta_data": {"instance-id": "foobar"}}),
    ("CloudInitUserData", "cloud-init-user-data", '{"users": [{"name": "x"}]}', {"user_data": {"users": [{"name": "x"}]}}),
    ("CloudInitUserDataOverwrite", "cloud-init-user-data-overwrite", "true", {"user_data_overwrite": True}),
    ("CloudInitUserDataOverwrite", "cloud-init-user-data-overwrite", "false", {"user_data_overwrite": False}),
    ("CloudInitUserDataScript", "cloud-init-user-data-script", "#!/bin/sh\n", {"user_data_script": "#!/bin/sh\n"}),
    ("CloudInitUserDataSource", "cloud-init-user-data-source", "configmap/vm-data", {"user_data_source": CONFIGMAP}),
    ("CloudInitUserDataSourceEncoding", "cloud-init-user-data-source-encoding", "base64",
     {"user_data_encoding": Encoding.BASE64}),
    ("FilesFromDataSource", "files-from-data-source", "configmap/vm-data", {"files_source": CONFIGMAP}),
    ("ForceDHCPNetworkConfig", "force-dhcp-network-config", "true", {"force_dhcp": True}),
    ("Chown9pfsMounts", "chown-mounts", "true", {"chown_mounts": True}),
]  # fmt: skip


def refusal(annotations: Mapping[str, str]) -> str:
    with pytest.raises(InvalidArgument) as caught:
        image_pod_from_annotations(annotations)
    return str(caught.value)


def test_nothing_asked_for() -> None:
    assert image_pod_from_annotations({"kubernetes.io/target-runtime": "virtlet.cloud", "x": "y"}) == ImagePod()


@pytest.mark.parametrize(("virtlet", "ours", "value", "expected"), SAME)
def test_both_names_and_their_agreement(virtlet: str, ours: str, value: str, expected: dict[str, Any]) -> None:
    pod = ImagePod(**expected)
    theirs, mine = {f"Virtlet{virtlet}": value}, {f"vmruntime.io/{ours}": value}
    assert image_pod_from_annotations(theirs) == pod
    assert image_pod_from_annotations(mine) == pod
    assert image_pod_from_annotations(theirs | mine) == pod
    # The store keeps it as JSON.
    assert msgspec.json.decode(msgspec.json.encode(pod), type=ImagePod) == pod


def test_every_setting_is_tried_and_told_of() -> None:
    tried = {(virtlet, ours) for virtlet, ours, _, _ in SAME} | {
        ("CloudInitUserDataSourceKey", "cloud-init-user-data-source-key")
    }
    assert tried == {(one.virtlet, one.ours) for one in image_pod._SETTINGS if one.virtlet}
    assert image_pod.__doc__ is not None
    for name in (name for one in image_pod._SETTINGS for name in (one.ours, one.virtlet)):
        assert name in image_pod.__doc__


def test_only_ours() -> None:
    pod = image_pod_from_annotations(
        {"vmruntime.io/firmware": "uefi", "vmruntime.io/tpm": "true", "vmruntime.io/vnc": "true"}
    )
    assert pod == ImagePod(firmware=Firmware.UEFI, tpm=True, vnc=True)


@pytest.mark.parametrize("value", ["0", "-1", "+0"])
def test_virtlet_counts_nothing_as_the_default(value: str) -> None:
    assert image_pod_from_annotations({"VirtletVCPUCount": value}).vcpus == 0
    assert "is less than 1" in refusal({"vmruntime.io/vcpus": value})


@pytest.mark.parametrize("value", ["True", "yes", "1", ""])
def test_virtlet_takes_everything_but_true_as_false(value: str) -> None:
    assert image_pod_from_annotations({"VirtletForceDHCPNetworkConfig": value}) == ImagePod()
    assert "is neither true nor false" in refusal({"vmruntime.io/force-dhcp-network-config": value})


def test_the_key_of_a_source() -> None:
    pod = image_pod_from_annotations(
        {
            "VirtletCloudInitUserDataSource": "configmap/vm-data",
            "vmruntime.io/cloud-init-user-data-source-key": "user-data",
        }
    )
    assert pod.user_data_source == DataSource(kind=SourceKind.CONFIGMAP, name="vm-data", key="user-data")
    assert "'user-data' is a key of nothing" in refusal({"VirtletCloudInitUserDataSourceKey": "user-data"})


def test_names_that_disagree() -> None:
    text = refusal({"VirtletVCPUCount": "2", "vmruntime.io/vcpus": "4"})
    assert text == (
        "annotation vmruntime.io/vcpus: '4' differs from annotation VirtletVCPUCount: '2', which means the same setting"
        " (keep one of them)"
    )
    # Written otherwise, meant the same.
    agreeing = {"VirtletRootVolumeSize": "1024Mi", "vmruntime.io/root-volume-size": "1Gi"}
    assert image_pod_from_annotations(agreeing).root_volume_size == 2**30
    secret = refusal(
        {"VirtletCloudInitUserData": "password: s3cret\nx: y", "vmruntime.io/cloud-init-user-data": "a: b"}
    )
    assert "s3cret" not in secret
    assert "a text of 21 characters" in secret


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("VirtletVCPUCount", "256", "'256' is more than 255"),
        ("VirtletVCPUCount", "two", "'two' is not a number"),
        ("VirtletVCPUCount", "9" * 30, "is not a number"),
        ("VirtletCPUModel", "qemu64", "'qemu64' is not a CPU model that can be chosen"),
        ("VirtletLibvirtCPUSetting", "Mode: fast", "mode: invalid enum value 'fast'"),
        ("VirtletLibvirtCPUSetting", "Modle: {}", "object contains unknown field `modle`"),
        ("VirtletLibvirtCPUSetting", "Numa: {Cell: []}", "Numa cannot be chosen"),
        ("VirtletLibvirtCPUSetting", "Model: {Value: '<x/>'}", "'<x/>' is not the name of a CPU"),
        ("VirtletLibvirtCPUSetting", "{", "did not find expected node content"),
        ("VirtletDiskDriver", "ducttape", """'ducttape' is not known (use "scsi" or "virtio")"""),
        ("VirtletRootVolumeSize", "1GB", "'1GB' is not a quantity (give bytes as a quantity, such as 10Gi)"),
        ("VirtletRootVolumeSize", "100m", "'100m' is not a number of bytes"),
        ("VirtletRootVolumeSize", "-1Gi", "'-1Gi' is not a number of bytes"),
        ("VirtletRootVolumeSize", "9E999", "is not a number of bytes"),
        ("VirtletSystemUUID", "53008994", "'53008994' is not a UUID"),
        ("VirtletSSHKeys", "ssh-rsa AAAA", "line 1: 'ssh-rsa AAAA' is not a public SSH key"),
        ("VirtletSSHKeySource", "secret", "'secret' does not name a ConfigMap or Secret"),
        ("VirtletSSHKeySource", "pod/x", "has the kind 'pod', which is not known"),
        ("VirtletSSHKeySource", "secret/X", "has the name 'X', which no object can have"),
        ("VirtletSSHKeySource", "secret/x/a b", "is not a key of a ConfigMap or Secret"),
        ("VirtletSSHKeySource", "secret/x/", "is not a key of a ConfigMap or Secret"),
        ("VirtletCloudInitUserDataSource", "secret/x/y", "does not name a ConfigMap or Secret"),
        ("VirtletFilesFromDataSource", "secret/", "has the name '', which no object can have"),
        ("VirtletCloudInitImageType", "ducttape", """'ducttape' is not known (use "nocloud" or "configdrive")"""),
        ("VirtletCloudInitMetaData", "{", "did not find expected node content"),
        ("VirtletCloudInitUserData", "- a", "is a list, not a mapping (lines of key: value)"),
        ("VirtletCloudInitUserData", "#!/bin/sh\necho", "a script belongs into cloud-init-user-data-script"),
        ("VirtletCloudInitUserDataSourceEncoding", "hex", """'hex' is not known (use "plain" or "base64")"""),
        ("vmruntime.io/firmware", "openbios", """'openbios' is not known (use "bios" or "uefi")"""),
    ],
)  # fmt: skip
def test_what_cannot_be_used(name: str, value: str, words: str) -> None:
    text = refusal({name: value})
    assert text.startswith(f"annotation {name}: ")
    assert words in text
    assert text.endswith(")"), "no remedy"


def test_topology_and_number_of_cpus() -> None:
    assert image_pod_from_annotations({"VirtletVCPUCount": "4", "VirtletLibvirtCPUSetting": CPU}).vcpus == 4
    assert "its topology has 4 CPUs, but annotation VirtletVCPUCount asks for 2" in refusal(
        {"VirtletVCPUCount": "2", "VirtletLibvirtCPUSetting": CPU}
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [("VirtletVCPUcount", "VirtletVCPUCount"), ("vmruntime.io/cpus", "vmruntime.io/vcpus"),
     ("vmruntime.io/ssh-key", "vmruntime.io/ssh-keys"), ("VirtletConfigMapAsFiles", "VirtletFilesFromDataSource")],
)  # fmt: skip
def test_misspelt_names(name: str, meant: str) -> None:
    assert f"annotation {name}: '1' is for nothing: there is no such annotation (did you mean {meant}?)" in refusal(
        {name: "1"}
    )


def test_names_of_others() -> None:
    others = {
        "vmruntime.io/kind": "image",
        "vmruntime.io/created-by": "me",
        "vmruntime.io/elephants": "1",
        "VirtletX": "1",
    }
    assert image_pod_from_annotations(others) == ImagePod()


def test_all_problems_are_told_at_once() -> None:
    text = refusal(
        {
            "VirtletVCPUCount": "many",
            "vmruntime.io/disk-driver": "ide",
            "VirtletSystemUUID": "1",
            "vmruntime.io/system-uuid": "2",
            "VirtletRootVolumeSiz": "1Gi",
            "VirtletCloudInitUserDataSourceKey": "k",
        }
    )
    problems = text.split("; annotation ")
    assert len(problems) == 6
    for words in (
        "'many' is not",
        "'ide' is not",
        "'1' is not a UUID",
        "'2' is not a UUID",
        "did you mean",
        "a key of nothing",
    ):
        assert sum(words in problem for problem in problems) == 1
    assert all(problem.endswith(")") for problem in problems)


@given(
    st.dictionaries(
        st.sampled_from([name for one in image_pod._SETTINGS for name, _ in one.names()]),
        st.text(max_size=30)
        | st.sampled_from(["true", "1", "secret/a", "configmap/a/b", "a: 1", "Mode: custom", "{a: {b: [1]}}", "1Gi"]),
    )
)
def test_whatever_is_given_is_used_or_refused(annotations: dict[str, str]) -> None:
    try:
        pod = image_pod_from_annotations(annotations)
    except InvalidArgument as error:
        assert any(name in error.message for name in annotations)
    else:
        assert msgspec.json.decode(msgspec.json.encode(pod), type=ImagePod) == pod
