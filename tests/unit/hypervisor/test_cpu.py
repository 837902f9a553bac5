"""libvirt's <cpu> element, said to QEMU."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.hypervisor.devices import ARCHITECTURES
from vmruntime.hypervisor.interface import Accelerator
from vmruntime.hypervisor.qemu.cpu import cpu_argument, smp_argument
from vmruntime.model.image_pod import CpuSetting
from vmruntime.model.resources import VmSize

KVM, TCG = Accelerator.KVM, Accelerator.TCG


def argument(setting: dict[str, Any] | None, accelerator: Accelerator = KVM) -> str:
    cpu = None if setting is None else msgspec.convert(setting, CpuSetting)
    return cpu_argument(cpu, ARCHITECTURES["x86_64"], accelerator)


@pytest.mark.parametrize(
    ("setting", "accelerator", "expected"),
    [
        (None, KVM, "host"),
        (None, TCG, "max,la57=off"),
        ({}, KVM, "host"),
        ({"mode": "host-passthrough", "migratable": "off"}, KVM, "host,migratable=off"),
        ({"mode": "host-model"}, KVM, "host"),
        ({"mode": "maximum"}, TCG, "max"),
        ({"model": {"value": "Haswell-noTSX", "vendorid": "GenuineIntel"}}, KVM, "Haswell-noTSX,vendor=GenuineIntel"),
        (
            {
                "mode": "custom",
                "match": "exact",
                "model": {"value": "qemu64", "fallback": "forbid"},
                "features": [
                    {"name": "vmx", "policy": "require"},
                    {"name": "aes"},
                    {"name": "svm", "policy": "disable"},
                    {"name": "sse4.2", "policy": "forbid"},
                    {"name": "x2apic", "policy": "force"},
                ],
            },
            TCG,
            "qemu64,vmx=on,aes=on,svm=off,sse4.2=off,x2apic=on",
        ),
    ],
)
def test_what_can_be_said(setting: dict[str, Any] | None, accelerator: Accelerator, expected: str) -> None:
    assert argument(setting, accelerator) == expected


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"match": "strict"}, "cpu.match: 'strict'"),
        ({"check": "full"}, "cpu.check: 'full'"),
        ({"vendor": "Intel"}, "cpu.vendor: 'Intel'"),
        ({"cache": {"mode": "emulate"}}, "cpu.cache: 'emulate'"),
    ],
)
def test_what_cannot_be_said_names_the_field_and_a_way_out(setting: dict[str, Any], field: str) -> None:
    with pytest.raises(FailedPrecondition, match=field) as raised:
        argument(setting)
    assert "libvirt" in raised.value.remedy


def test_the_hosts_processor_is_not_there_when_it_is_emulated() -> None:
    with pytest.raises(FailedPrecondition, match="needs KVM"):
        argument({"mode": "host-passthrough"}, TCG)


@pytest.mark.parametrize(
    "setting",
    [
        {"mode": "custom"},
        {"model": {"value": "qemu64,foo=on"}},
        {"features": [{"name": "a,b"}]},
        {"model": {"value": "qemu64"}, "migratable": "on"},
    ],
)
def test_what_is_no_setting(setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"cpu\."):
        argument(setting)


def test_a_topology_says_how_many_processors_there_can_be() -> None:
    size = VmSize(vcpus=2, memory_mib=1, max_vcpus=16)
    setting = msgspec.convert({"topology": {"sockets": 2, "cores": 2}}, CpuSetting)
    assert smp_argument(size) == "cpus=2,maxcpus=16"
    assert smp_argument(size, setting) == "cpus=2,maxcpus=4,sockets=2,dies=1,cores=2,threads=1"
    with pytest.raises(InvalidArgument, match=r"cpu\.topology: 4 processors are fewer than the VM's 5"):
        smp_argument(VmSize(vcpus=5, memory_mib=1), setting)
