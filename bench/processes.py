"""What a pod's processes take of the host's memory, from proc(5)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from bench.records import percentile

_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ \S+\s*(.*)")


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Proportional set size of processes, in MiB.

    Attributes:
        by_program: All of it, by the name of the program.
        guest: Of that, what is the guest's memory: a memfd that QEMU shares with its helpers.
        code: Of that, what may be written and executed: the code that QEMU has translated, where it emulates processors.
    """

    by_program: dict[str, float]
    guest: float
    code: float

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


def memory_of(processes: Mapping[int, str]) -> Memory:
    """Return what processes take, given by pid and program."""
    taken: dict[str, float] = {}
    guest = code = 0.0
    for pid, program in processes.items():
        taken[program] = taken.get(program, 0.0) + field(pid, "smaps_rollup", "Pss:") / 1024
        for permissions, name, pss in _mappings(pid):
            guest += pss / 1024 if name.startswith("/memfd:") else 0.0
            code += pss / 1024 if permissions.startswith("rwx") else 0.0
    return Memory(by_program=taken, guest=guest, code=code)


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
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if pod in (directory / "cgroup").read_text():
                program = (directory / "cmdline").read_bytes().split(b"\0", 1)[0].decode(errors="replace")
                yield int(directory.name), os.path.basename(program)


def _mappings(pid: int) -> Iterator[tuple[str, str, float]]:
    """Iterate over permissions, name and proportional set size, in KiB, of a process's mappings."""
    permissions = name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if (found := _MAPPING.fullmatch(line)) is not None:
            permissions, name = found[1], found[2]
        elif line.startswith("Pss:"):
            yield permissions, name, float(line.split()[1])
