"""Where a process's memory is said to be."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from bench.processes import Memory, by_program, memory_of, pod_memory, shim_memory

MIB = 1024 * 1024
PLACE = 8


@pytest.mark.root  # what a mapped file takes is root's to ask
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
    assert after.guest_file - before.guest_file == pytest.approx(PLACE, abs=0.1)
    assert after.code - before.code == pytest.approx(PLACE, abs=0.1)
    assert after.total - after.guest == after.beside_guest
    assert after.total - before.total >= 2 * PLACE - 1


def test_a_pod_without_processes_takes_nothing() -> None:
    assert pod_memory("0" * 64).total == 0


@pytest.mark.root
def test_a_guest_counts_whole_from_when_its_memory_is_made(tmp_path: Path) -> None:
    descriptor = os.memfd_create("guest")
    os.write(descriptor, bytes(PLACE * MIB))
    with mmap.mmap(descriptor, PLACE * MIB):
        found = memory_of({os.getpid(): "qemu"})
    os.close(descriptor)
    assert (found.guest, found.guest_file) == (0, PLACE)


def test_a_shim_counts_with_all_that_runs_below_it() -> None:
    pod = uuid.uuid4().hex
    script = "import subprocess; subprocess.run(['/bin/sleep', '60'])"
    with subprocess.Popen([sys.executable, "-c", script, "a-shim", pod]) as shim:
        try:
            end = time.monotonic() + 10
            while len(found := shim_memory(pod).by_program) < 2 and time.monotonic() < end:
                time.sleep(0.05)
        finally:
            for child in Path(f"/proc/{shim.pid}/task/{shim.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            shim.kill()
    assert set(found) == {os.path.basename(sys.executable), "sleep"}
    assert min(found.values()) > 0


def test_programs_of_several_pods() -> None:
    pods = [Memory(by_program={"qemu": one, "dnsmasq": 1.0}, guest=0.0, code=0.0) for one in (10.0, 20.0, 30.0)]
    assert by_program(pods) == {"qemu_mib": 20.0, "dnsmasq_mib": 1.0}
