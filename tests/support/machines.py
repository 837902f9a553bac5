"""Guests for machines that boot from their disk: one that is a single sector, and the shell of the small VM image.

Each exists for real (an image to boot) and for the fake hypervisor (an object that does the same).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
import subprocess
from pathlib import Path

from vmruntime.aio.tasks import TaskScope
from vmruntime.hypervisor.fake_machine import FakeMachine
from vmruntime.hypervisor.interface import Disk, FirmwareBoot

SECTOR_UP = "sector: up"
SMALL_UP = "small: up"
UEFI_UP = "UEFI Interactive Shell"
UEFI_NIC = "Vendor 1AF4 Device 1041"
SOURCE = Path(__file__).parent / "bootsector.S"
PATIENCE = 60.0
AGAIN_SECONDS = 3.0
"""A shell throws away what was typed before it has set up its terminal."""

DISKS = (
    "for d in /sys/block/sd* /sys/block/vd* /sys/block/sr*; do [ ! -e $d ] ||"
    " echo size $(cat $d/size) $(cat $d/serial $d/device/vpd_pg80 2>/dev/null | tr -cd a-z0-9-); done"
)
"""Prints a line "size SECTORS SERIAL" for each disk."""

ADDRESSES = "cat /sys/class/net/eth*/address"
MEMORY = "grep MemTotal: /proc/meminfo"
PROCESSORS = "ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l"
OEM_STRINGS = "cat /sys/firmware/dmi/entries/11-*/raw"
HELLO = "mount -t virtiofs share /mnt && cat /mnt/hello"


def make_sector(path: Path) -> None:
    """Make a disk with the guest that is a single sector (bootsector.S)."""
    built = path.with_suffix(".o")
    subprocess.run(["as", "--32", "-o", built, SOURCE], check=True)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", path, built], check=True)
    built.unlink()
    with path.open("r+b") as file:
        file.truncate(1 << 20)


async def type_at(directory: Path, text: str) -> bytes:
    """Type something on a machine's serial console, and return the first that is said after it."""
    reader, writer = await asyncio.open_unix_connection(directory / "console.sock")
    try:
        writer.write(text.encode())
        await writer.drain()
        async with asyncio.timeout(PATIENCE):
            return await reader.read(4096)
    finally:
        writer.close()
        await writer.wait_closed()


async def shell(directory: Path, command: str) -> str:
    """Run a command that may be run twice in the shell on a machine's serial console, and return what it printed."""
    reader, writer = await asyncio.open_unix_connection(directory / "console.sock")
    said = b""
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                writer.write(f"\necho BEG''IN; {command}; echo DO''NE\n".encode())
                await writer.drain()
                try:
                    async with asyncio.timeout(AGAIN_SECONDS):
                        while b"DONE" not in said.rpartition(b"BEGIN\r\n")[2] or b"BEGIN\r\n" not in said:
                            if not (data := await reader.read(4096)):
                                raise ConnectionError("the console is closed")
                            said += data
                    return said.rpartition(b"BEGIN\r\n")[2].partition(b"DONE")[0].decode().replace("\r", "")
                except TimeoutError:
                    continue
    finally:
        writer.close()
        await writer.wait_closed()


async def uefi_shell(directory: Path, *commands: str) -> str:
    """Run commands in UEFI's own shell, which has just come up; return what the ones before the last printed."""
    reader, writer = await asyncio.open_unix_connection(directory / "console.sock")
    said = b""
    try:
        writer.write(b"\x1b")  # no start-up script
        async with asyncio.timeout(PATIENCE):
            for command in commands:
                said += await reader.readuntil(b"Shell> ")
                # It is slow: each letter is shown before the next one is read.
                for letter in f"{command}\r":
                    writer.write(letter.encode())
                    await asyncio.sleep(0.05)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", said.decode(errors="replace"))


class UefiGuest:
    """UEFI's shell, which is what runs when no disk can be booted from."""

    def __init__(self) -> None:
        self._line = ""

    async def boot(self, machine: FakeMachine) -> None:
        """Come up, and listen to the console."""
        machine.on_typed = lambda data: self._typed(machine, data.decode())
        machine.say(f"{UEFI_UP} v2.2")

    async def die(self) -> None:
        """Be gone."""

    def _typed(self, machine: FakeMachine, text: str) -> None:
        if text.startswith("\x1b"):
            machine.say("Shell> ")
        self._line += text.removeprefix("\x1b")
        while "\r" in self._line:
            command, _, self._line = self._line.partition("\r")
            if command == "reset -s":
                machine.power_off()
                return
            assert command == "pci"
            for _ in machine.nics:
                machine.say(UEFI_NIC)
            machine.say("Shell> ")


class SectorGuest:
    """What bootsector.S does."""

    def __init__(self) -> None:
        self._scope = TaskScope("sector guest")

    async def boot(self, machine: FakeMachine) -> None:
        """Come up, and listen to the console."""
        machine.on_typed = lambda data: self._typed(machine, data)
        machine.say(SECTOR_UP)

    async def die(self) -> None:
        """Be gone."""

    def _typed(self, machine: FakeMachine, data: bytes) -> None:
        match data:
            case b"p":
                machine.power_off()
            case b"c":
                machine.panic()
            case b"r":
                self._scope.start(machine.reboot(), "reboot")
            case _:
                machine.say(data.decode())


class SmallGuest:
    """A shell that knows the commands of these tests, and a guest agent that answers a ping.

    Attributes:
        share: What the machine's share shows.
    """

    def __init__(self) -> None:
        self.share: Path | None = None
        self._agent: asyncio.Server | None = None

    async def boot(self, machine: FakeMachine) -> None:
        """Come up, and listen."""
        machine.on_typed = lambda data: self._typed(machine, data.decode())
        machine.balloon = {"stat-total-memory": machine.size.memory_mib << 20, "stat-free-memory": 1 << 20}
        socket = machine.directory / "agent.sock"
        self._agent = await asyncio.start_unix_server(self._serve_agent, socket)
        machine.serve_agent(socket)
        machine.say(f"{SMALL_UP} after 0 s")

    async def die(self) -> None:
        """Be gone."""
        if self._agent is not None:
            self._agent.close()
            await self._agent.wait_closed()

    async def _serve_agent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"guest-ping" in await reader.readline()
        writer.write(b'{"return": {}}\n')
        writer.close()
        await writer.wait_closed()

    def _typed(self, machine: FakeMachine, text: str) -> None:
        found = re.fullmatch(r"\necho BEG''IN; (.*); echo DO''NE\n", text)
        assert found
        for line in ("BEGIN", *self._output(machine, found[1]), "DONE"):
            machine.say(line)

    def _output(self, machine: FakeMachine, command: str) -> list[str]:
        if command == DISKS:
            return [f"size {_seen_size(disk) // 512} {serial}" for serial, disk in machine.disks.items()]
        if command == ADDRESSES:
            return [nic.mac for nic in machine.nics.values()]
        if command == MEMORY:
            return [f"MemTotal: {machine.size.memory_mib * 1000} kB"]
        if command == PROCESSORS:
            return [str(machine.size.vcpus)]
        boot = machine.spec.boot
        assert isinstance(boot, FirmwareBoot)
        if command == OEM_STRINGS:
            return boot.oem_strings
        assert command == HELLO
        assert "share" in machine.shares
        assert self.share is not None
        return [(self.share / "hello").read_text()]


def _seen_size(disk: Disk) -> int:
    """Return the bytes the guest sees."""
    if disk.format == "qcow2":
        with disk.path.open("rb") as file:
            size: int = struct.unpack(">Q", file.read(32)[24:])[0]  # qcow2's header
        return size
    return disk.size or disk.path.stat().st_size
