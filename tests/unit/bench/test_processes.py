"""Where a process's memory is said to be."""

from __future__ import annotations

import mmap
import os

import pytest

from bench.processes import Memory, by_program, memory_of, pod_memory

MIB = 1024 * 1024
PLACE = 8


def test_guest_memory_and_translated_code_are_told_from_the_rest() -> None:
    before = memory_of({os.getpid(): "qemu"})
    descriptor = os.memfd_create("guest")
    os.truncate(descriptor, PLACE * MIB)
    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    with (
        mmap.mmap(descriptor, PLACE * MIB) as guest,
        mmap.mmap(-1, PLACE * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=everything) as code,
    ):
        os.close(descriptor)
        guest.write(bytes([1]) * PLACE * MIB)
        code.write(bytes([1]) * PLACE * MIB)
        after = memory_of({os.getpid(): "qemu"})
    assert after.guest - before.guest == pytest.approx(PLACE, abs=0.1)
    assert after.code - before.code == pytest.approx(PLACE, abs=0.1)
    assert after.total - after.guest == after.beside_guest
    assert after.total - before.total >= 2 * PLACE - 1


def test_a_pod_without_processes_takes_nothing() -> None:
    assert pod_memory("0" * 64).total == 0


def test_programs_of_several_pods() -> None:
    pods = [Memory(by_program={"qemu": one, "dnsmasq": 1.0}, guest=0.0, code=0.0) for one in (10.0, 20.0, 30.0)]
    assert by_program(pods) == {"qemu_mib": 20.0, "dnsmasq_mib": 1.0}
