"""libvirt's <cpu> element in the words of QEMU's command line."""

from __future__ import annotations

import re

from vmruntime.errors import FailedPrecondition, InvalidArgument
from vmruntime.hypervisor.devices import Architecture
from vmruntime.hypervisor.interface import Accelerator
from vmruntime.model.image_pod import CpuSetting
from vmruntime.model.resources import VmSize

REMEDY = 'leave it out, or let libvirt run the VM: hypervisor.image_pods = "libvirt"'
POLICIES = {"": "on", "force": "on", "require": "on", "optional": "on", "disable": "off", "forbid": "off"}
"""A feature that the processor lacks is left out by QEMU with a warning, whatever the policy."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def cpu_argument(setting: CpuSetting | None, architecture: Architecture, accelerator: Accelerator) -> str:
    """Return the argument of -cpu; no setting, or one with neither mode nor model: what is usual here.

    Raises:
        FailedPrecondition: QEMU's command line cannot say it; the message names the field.
        InvalidArgument: A name cannot be one.
    """
    usual = architecture.cpu[accelerator.value]
    if setting is None:
        return usual
    _refuse_unsayable(setting)
    model = setting.model
    parts = [_base(setting, usual, accelerator)]
    if setting.migratable:
        if parts[0].partition(",")[0] not in ("host", "max"):
            raise InvalidArgument.field(
                "cpu.migratable", setting.migratable, "is for the modes host-passthrough and maximum"
            )
        parts.append(f"migratable={setting.migratable}")
    if model is not None and model.vendor_id:
        parts.append(f"vendor={_name('cpu.model.vendorid', model.vendor_id)}")
    parts += [f"{_name('cpu.features.name', feature.name)}={POLICIES[feature.policy]}" for feature in setting.features]
    return ",".join(parts)


def smp_argument(size: VmSize, setting: CpuSetting | None = None) -> str:
    """Return the argument of -smp; a topology says how many processors there can be at most.

    Raises:
        InvalidArgument: The topology has not room for the VM's processors.
    """
    most = max(size.vcpus, size.max_vcpus)
    topology = None if setting is None else setting.topology
    if topology is None:
        return f"cpus={size.vcpus},maxcpus={most}"
    if topology.vcpus < size.vcpus:
        raise InvalidArgument.field(
            "cpu.topology", topology.vcpus, f"processors are fewer than the VM's {size.vcpus}", remedy="make it larger"
        )
    shape = {name: getattr(topology, name) or 1 for name in ("sockets", "dies", "cores", "threads")}
    return f"cpus={size.vcpus},maxcpus={topology.vcpus}," + ",".join(f"{name}={n}" for name, n in shape.items())


def _base(setting: CpuSetting, usual: str, accelerator: Accelerator) -> str:
    named = setting.model.value if setting.model is not None else ""
    if setting.mode == "maximum":
        return "max"
    if setting.mode == "host-passthrough":
        if accelerator is not Accelerator.KVM:
            raise FailedPrecondition(
                "cpu.mode: 'host-passthrough' needs KVM, and guests are emulated here", remedy="choose 'maximum'"
            )
        return "host"
    if setting.mode == "host-model":
        return usual
    if named:
        return _name("cpu.model.value", named)
    if setting.mode == "custom":
        raise InvalidArgument.field("cpu.model.value", named, "is no CPU model", remedy="name one, or another mode")
    return usual


def _refuse_unsayable(setting: CpuSetting) -> None:
    unsayable = (
        ("cpu.match", setting.match, setting.match in ("minimum", "strict")),
        ("cpu.check", setting.check, setting.check in ("partial", "full")),
        ("cpu.vendor", setting.vendor, bool(setting.vendor)),
        ("cpu.cache", setting.cache and setting.cache.mode, setting.cache is not None),
    )
    for field, value, refused in unsayable:
        if refused:
            raise FailedPrecondition(f"{field}: {value!r} cannot be said to QEMU directly", remedy=REMEDY)


def _name(field: str, value: str) -> str:
    if not NAME.fullmatch(value):
        raise InvalidArgument.field(field, value, "is no name: letters, digits, - . _")
    return value
