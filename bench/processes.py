"""What a pod's processes take of the host's memory, from proc(5)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from bench.records import percentile

_MAPPING = re.compile(r"([0-9a-f]+-[0-9a-f]+) (\S+) \S+ \S+ \S+\s*(.*)")
_LARGE = 32 * 1024 * 1024
"""No program has a file as large as this mapped writable, other than a guest's memory."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Proportional set size of processes, in MiB.

    Attributes:
        by_program: All of it, by the name of the program.
        guest: Of that, what is the guest's memory: a memfd or another file that QEMU has mapped.
        code: Of that, what may be written and executed: the code that QEMU has translated, where it emulates processors.
        guest_file: What the files of the guest's memory take, where they are shared with helpers: pages count from when
            they are made, not from when a process first touches them.
    """

    by_program: dict[str, float]
    guest: float
    code: float
    guest_file: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.by_program.values())

    @property
    def beside_guest(self) -> float:
        """What is not the guest's memory."""
        return self.total - self.guest


def pod_memory(pod: str) -> Memory:
    """Return what the processes of a pod, by its id, take."""
    return memory_of(dict(_processes_of(pod)))


def shim_memory(pod: str) -> Memory:
    """Return what the processes of a pod of containerd take: its shim, and all that runs below it."""
    shims = {pid: program for pid, program, line in _all_processes() if b"-shim" in line and pod.encode() in line}
    return memory_of(dict(_with_children(shims)))


def memory_of(processes: Mapping[int, str]) -> Memory:
    """Return what processes take, given by pid and program."""
    taken: dict[str, float] = {}
    guest = code = 0.0
    files: dict[tuple[int, int], float] = {}
    for pid, program in processes.items():
        taken[program] = taken.get(program, 0.0) + field(pid, "smaps_rollup", "Pss:") / 1024
        for one in _mappings(pid):
            if one.of_guest:
                guest += one.pss / 1024
                if "s" in one.permissions:
                    file = os.stat(f"/proc/{pid}/map_files/{one.place}")
                    files[file.st_dev, file.st_ino] = file.st_blocks * 512 / 1024**2
            code += one.pss / 1024 if one.permissions.startswith("rwx") else 0.0
    return Memory(by_program=taken, guest=guest, code=code, guest_file=sum(files.values()))


def by_program(pods: Sequence[Memory]) -> dict[str, float]:
    """Return the median of each program over pods, in MiB."""
    programs = dict.fromkeys(program for pod in pods for program in pod.by_program)
    return {
        f"{program}_mib": round(percentile([pod.by_program.get(program, 0.0) for pod in pods], 50), 1)
        for program in programs
    }


def field(pid: int, file: str, name: str) -> float:
    """Return a value in KiB of /proc/PID/FILE."""
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(name):
            return float(line.split()[1])
    raise KeyError(name)


def _processes_of(pod: str) -> Iterator[tuple[int, str]]:
    """Iterate over pids and programs of those in the pod's cgroup."""
    for pid, program, _ in _all_processes():
        with contextlib.suppress(OSError):
            if pod in Path(f"/proc/{pid}/cgroup").read_text():
                yield pid, program


def _with_children(processes: Mapping[int, str]) -> Iterator[tuple[int, str]]:
    """Iterate over pids and programs of processes and of all below them."""
    yield from processes.items()
    everybody = {pid: program for pid, program, _ in _all_processes()}
    for pid in processes:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            below = [int(child) for child in (thread / "children").read_text().split()]
            yield from _with_children({child: everybody[child] for child in below if child in everybody})


def _all_processes() -> Iterator[tuple[int, str, bytes]]:
    """Iterate over pids, programs and command lines; kernel threads have none."""
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (directory / "cmdline").read_bytes()
            if line:
                yield int(directory.name), os.path.basename(line.split(b"\0", 1)[0].decode(errors="replace")), line


class _Mapping(msgspec.Struct, frozen=True):
    place: str
    permissions: str
    name: str
    pss: float

    @property
    def of_guest(self) -> bool:
        """Whether it is a guest's memory."""
        if self.name.startswith("/memfd:"):
            return True
        first, last = (int(one, 16) for one in self.place.split("-"))
        return self.name.startswith("/") and "w" in self.permissions and last - first >= _LARGE


def _mappings(pid: int) -> Iterator[_Mapping]:
    """Iterate over a process's mappings, proportional set size in KiB."""
    place = permissions = name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if (found := _MAPPING.fullmatch(line)) is not None:
            place, permissions, name = found[1], found[2], found[3]
        elif line.startswith("Pss:"):
            yield _Mapping(place, permissions, name, float(line.split()[1]))
