"""How large a pod's VM is."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import msgspec

from vmruntime.config.settings import GuestSettings
from vmruntime.errors import InvalidArgument
from vmruntime.model.resources import LinuxResources, VmSize
from vmruntime.model.sandbox import SandboxSpec

MIB = 1024 * 1024
SMALLEST_MIB = 96
"""Below this the guest's kernel and agent leave containers nothing (measured; see docs/architecture.md)."""

LARGEST_VCPUS = 255
HOST_OVERHEAD_MIB = 64
"""What QEMU, vhost-device-vsock and virtiofsd take besides the guest's memory (make bench ONLY=pss_idle_pod)."""

SMALLEST_OVERHEAD_MIB = 32
MOST_PLUGGED_VCPUS = 16
"""Each possible processor costs every guest some memory, plugged in or not."""


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
    vcpus = _vcpus(spec, settings)
    if memory_mib > host_memory_mib:
        raise InvalidArgument.field(
            "linux.resources.memory_limit_in_bytes",
            (spec.resources or LinuxResources()).memory_limit,
            f"needs a VM of {memory_mib} MiB, more than this host's {host_memory_mib} MiB",
            remedy=f"ask for at most {max(0, host_memory_mib - settings.overhead_memory_mib)} MiB",
        )
    return _sized(vcpus, memory_mib, host_memory_mib)


def _sized(vcpus: int, memory_mib: int, host_memory_mib: int) -> VmSize:
    """Return a VM that may grow to what the host has."""
    return VmSize(
        vcpus=vcpus,
        memory_mib=memory_mib,
        max_vcpus=max(vcpus, min(MOST_PLUGGED_VCPUS, os.cpu_count() or 1)),
        max_memory_mib=host_memory_mib,
    )


def usual_size(settings: GuestSettings, host_memory_mib: int) -> VmSize:
    """Return the VM for a pod without limits."""
    return _sized(settings.default_vcpus, settings.default_memory_mib, host_memory_mib)


def size_for(
    spec: SandboxSpec, containers: Sequence[LinuxResources], settings: GuestSettings, host_memory_mib: int
) -> VmSize:
    """Return the VM that a pod needs with these containers, for clients that give a pod no resources of its own.

    Args:
        spec: See vm_size.
        containers: Limits of its containers; those without any count as the default.
        settings: See vm_size.
        host_memory_mib: See vm_size.

    Raises:
        InvalidArgument: The host could never hold it.
    """
    given = spec.resources or LinuxResources()
    limits = [one.memory_limit for one in containers]
    memory = sum(limits) if limits and all(limit > 0 for limit in limits) else max(limits, default=0)
    quota = sum(one.cpu_quota * 100_000 // one.cpu_period for one in containers if one.cpu_quota > 0 < one.cpu_period)
    own = given.cpu_quota * 100_000 // given.cpu_period if given.cpu_quota > 0 < given.cpu_period else 0
    needed = LinuxResources(memory_limit=max(given.memory_limit, memory), cpu_quota=max(own, quota), cpu_period=100_000)
    largest = vm_size(msgspec.structs.replace(spec, resources=needed), settings, host_memory_mib)
    usual = vm_size(spec, settings, host_memory_mib)
    return msgspec.structs.replace(
        largest, vcpus=max(largest.vcpus, usual.vcpus), memory_mib=max(largest.memory_mib, usual.memory_mib)
    )


def image_size_for(
    spec: SandboxSpec, containers: Sequence[LinuxResources], vcpus: int, settings: GuestSettings, host_memory_mib: int
) -> VmSize:
    """Return the VM of an image pod: the limits are its own, and what QEMU takes besides is the pod's overhead.

    Args:
        spec: See vm_size.
        containers: See size_for.
        vcpus: As an annotation asks for; 0: as many as the CPU limits say.
        settings: Defaults for pods without limits.
        host_memory_mib: See vm_size.

    Raises:
        InvalidArgument: The host could never hold it.
    """
    own = msgspec.structs.replace(settings, overhead_memory_mib=0, default_memory_mib=settings.image_memory_mib)
    size = size_for(msgspec.structs.replace(spec, overhead=None), containers, own, host_memory_mib)
    if not vcpus:
        return size
    return msgspec.structs.replace(size, vcpus=vcpus, max_vcpus=max(vcpus, size.max_vcpus))


def _memory_mib(spec: SandboxSpec, settings: GuestSettings) -> int:
    limit = spec.resources.memory_limit if spec.resources else 0
    if limit <= 0:
        return settings.default_memory_mib
    declared = spec.overhead.memory_limit if spec.overhead else 0
    # A declared overhead covers QEMU as well, which is not the guest's memory.
    guest_share = max(SMALLEST_OVERHEAD_MIB, math.ceil(declared / MIB) - HOST_OVERHEAD_MIB)
    overhead = guest_share if declared > 0 else settings.overhead_memory_mib
    return max(SMALLEST_MIB, math.ceil(limit / MIB) + overhead)


def _vcpus(spec: SandboxSpec, settings: GuestSettings) -> int:
    resources = spec.resources
    if resources is None or resources.cpu_quota <= 0 or resources.cpu_period <= 0:
        return settings.default_vcpus
    return max(1, min(LARGEST_VCPUS, math.ceil(resources.cpu_quota / resources.cpu_period)))
