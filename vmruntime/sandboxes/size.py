"""How large a pod's VM is."""

from __future__ import annotations

import math

from vmruntime.config.settings import GuestSettings
from vmruntime.errors import InvalidArgument
from vmruntime.model.resources import LinuxResources, VmSize
from vmruntime.model.sandbox import SandboxSpec

MIB = 1024 * 1024
SMALLEST_MIB = 96
"""Below this the guest's kernel and agent leave containers nothing (measured; see docs/architecture.md)."""

LARGEST_VCPUS = 255


def vm_size(spec: SandboxSpec, settings: GuestSettings, host_memory_mib: int) -> VmSize:
    """Return the VM for a pod: its containers' limits plus what the guest itself needs.

    Args:
        spec: resources are the pod's sums as kubelet knows them; overhead is the RuntimeClass's.
        settings: Defaults for pods without limits, and the guest's own need when no overhead is declared.
        host_memory_mib: Memory of the host.

    Raises:
        InvalidArgument: The host could never hold it.
    """
    memory_mib = _memory_mib(spec, settings)
    if memory_mib > host_memory_mib:
        raise InvalidArgument.field(
            "linux.resources.memory_limit_in_bytes",
            (spec.resources or LinuxResources()).memory_limit,
            f"needs a VM of {memory_mib} MiB, more than this host's {host_memory_mib} MiB",
            remedy=f"ask for at most {max(0, host_memory_mib - settings.overhead_memory_mib)} MiB",
        )
    return VmSize(vcpus=_vcpus(spec, settings), memory_mib=memory_mib)


def _memory_mib(spec: SandboxSpec, settings: GuestSettings) -> int:
    limit = spec.resources.memory_limit if spec.resources else 0
    if limit <= 0:
        return settings.default_memory_mib
    declared = spec.overhead.memory_limit if spec.overhead else 0
    overhead = math.ceil(declared / MIB) if declared > 0 else settings.overhead_memory_mib
    return max(SMALLEST_MIB, math.ceil(limit / MIB) + overhead)


def _vcpus(spec: SandboxSpec, settings: GuestSettings) -> int:
    resources = spec.resources
    if resources is None or resources.cpu_quota <= 0 or resources.cpu_period <= 0:
        return settings.default_vcpus
    return max(1, min(LARGEST_VCPUS, math.ceil(resources.cpu_quota / resources.cpu_period)))
