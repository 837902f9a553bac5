"""QEMU's command line."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec

from vmruntime.hypervisor.devices import ARCHITECTURES
from vmruntime.hypervisor.interface import Accelerator, Disk, GuestMemory, KernelBoot, VmSpec
from vmruntime.hypervisor.qemu.argv import Descriptors, qemu_argv
from vmruntime.hypervisor.qemu.blockdev import OpenDisk, node_name
from vmruntime.hypervisor.qemu.machine_argv import PORTS
from vmruntime.model.resources import VmSize

SPEC = VmSpec(
    id="a" * 64,
    size=VmSize(vcpus=2, memory_mib=300),
    boot=KernelBoot(
        kernel=Path("/guest/vmlinuz"), initramfs=Path("/guest/initramfs.img"), arguments="vmruntime.log=debug"
    ),
    directory=Path("/run/x"),
    cid=4096,
    disks=[Disk(path=Path("/scratch"), serial="scratch", readonly=False)],
)


def argv(*, native: bool, accelerator: Accelerator = Accelerator.TCG) -> list[str]:
    descriptors = Descriptors(qmp=3, console=4, vsock=5, vsock_native=native, disks=[OpenDisk(fd=6)])
    return qemu_argv("qemu", ARCHITECTURES["x86_64"], accelerator, SPEC, descriptors)


def after(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(arguments) if name == option]


def test_vhost_user_vsock_needs_shared_memory() -> None:
    arguments = argv(native=False)
    assert after(arguments, "-object") == ["memory-backend-memfd,id=ram,size=300M,share=on"]
    assert "vhost-user-vsock-pci,chardev=vsock" in after(arguments, "-device")
    assert "socket,id=vsock,fd=5" in after(arguments, "-chardev")


def test_memory_is_merged_with_others_only_where_it_may() -> None:
    for memory, merged, backend in (
        (None, "off", "memory-backend-memfd,id=ram,size=300M,share=on"),
        (GuestMemory(fd=9), "off", "memory-backend-file,id=ram,size=300M,mem-path=/proc/self/fd/9,share=on"),
        (
            GuestMemory(fd=9, private=True),
            "off",
            "memory-backend-file,id=ram,size=300M,mem-path=/proc/self/fd/9,share=off",
        ),
        (
            GuestMemory(fd=9, private=True, mergeable=True),
            "on",
            "memory-backend-file,id=ram,size=300M,mem-path=/proc/self/fd/9,share=off",
        ),
    ):
        spec = msgspec.structs.replace(SPEC, memory=memory, cid=0, disks=[])
        descriptors = Descriptors(qmp=3, console=4, vsock=None, vsock_native=False, disks=[], memory=9)
        arguments = qemu_argv("qemu", ARCHITECTURES["x86_64"], Accelerator.TCG, spec, descriptors)
        assert after(arguments, "-machine")[0].endswith(f"mem-merge={merged}")
        assert after(arguments, "-object") == [backend]


def test_native_vsock_takes_a_descriptor() -> None:
    arguments = argv(native=True, accelerator=Accelerator.KVM)
    assert "vhost-vsock-pci,guest-cid=4096,vhostfd=5" in after(arguments, "-device")
    assert after(arguments, "-accel") == ["kvm"]
    assert after(arguments, "-cpu") == ["host"]


def test_no_path_but_the_guest_is_opened() -> None:
    text = " ".join(argv(native=False))
    assert "/scratch" not in text
    assert "/dev/fdset/0" in text
    assert after(argv(native=False), "-add-fd") == ["fd=6,set=0,opaque=scratch"]


def test_sandboxed_and_bare() -> None:
    arguments = argv(native=False)
    assert after(arguments, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(arguments)
    assert sum(value.startswith("pcie-root-port") for value in after(arguments, "-device")) == PORTS
    assert after(arguments, "-append")[0].endswith("vmruntime.log=debug")


def test_node_names_fit_qemus_limit() -> None:
    assert len(node_name("f" * 36)) <= 31
