"""The small VM image, by BIOS and by UEFI, with the seeds of both formats: what image pods' tests count on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support import vm_images
from vmruntime.model.image_pod import ImagePod, SeedFormat
from vmruntime.model.sandbox import Dns, NetworkInterface, NetworkRoute, PodNetwork
from vmruntime.qga.channel import Channel
from vmruntime.qga.client import GuestAgent
from vmruntime.seed.build import build_seed
from vmruntime.seed.request import SeedFile, SeedRequest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]

MAC = "52:54:00:12:34:56"
NETWORK = PodNetwork(
    netns="",
    interfaces=[NetworkInterface(name="pod0", mac=MAC, mtu=1400, addresses=["10.0.2.50/24"], tap="")],
    routes=[NetworkRoute(destination="0.0.0.0/0", gateway="10.0.2.2")],
)
UEFI = ("-bios", "/usr/share/ovmf/OVMF.fd")
UP = b"small: up after"
PROMPT = b"vm# "
BOOT_SECONDS = 60.0


class Guest:
    """A running guest.

    Attributes:
        said: What its serial console has said so far.
    """

    def __init__(self, process: asyncio.subprocess.Process, directory: Path) -> None:
        self._process = process
        self._directory = directory
        self.said = b""

    async def wait_for(self, *words: bytes) -> None:
        """Read the console until it has said all of this."""
        assert self._process.stdout is not None
        async with asyncio.timeout(BOOT_SECONDS):
            while not all(word in self.said for word in words):
                data = await self._process.stdout.read(4096)
                assert data, f"QEMU ended with the console at: {self.said[-2000:].decode(errors='replace')}"
                self.said += data

    def type(self, line: str) -> None:
        """Type a line on the serial console."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    async def press_power_button(self) -> None:
        reader, writer = await asyncio.open_unix_connection(self._directory / "monitor")
        writer.write(b"system_powerdown\n")
        await reader.readuntil(b"system_powerdown")
        writer.close()
        await writer.wait_closed()

    async def ended(self) -> int:
        """Return QEMU's exit status, having read the console to its end."""
        assert self._process.stdout is not None
        async with asyncio.timeout(BOOT_SECONDS):
            self.said += await self._process.stdout.read()
            return await self._process.wait()

    @contextlib.asynccontextmanager
    async def agent(self) -> AsyncIterator[GuestAgent]:
        agent = GuestAgent(await Channel.connect(self._directory / "agent"))
        try:
            await agent.wait(BOOT_SECONDS)
            yield agent
        finally:
            await agent.close()


@contextlib.asynccontextmanager
async def booted(directory: Path, disk: Path, seed: Path, ssh_port: int, *firmware: str) -> AsyncIterator[Guest]:
    """A guest that is up, in QEMU alone; killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *("qemu-system-x86_64", "-machine", "q35,usb=off", "-accel", "tcg", "-cpu", "max,la57=off", "-m", "256"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-action", "panic=exit-failure"),
        *("-chardev", f"socket,id=hmp,path={directory}/monitor,server=on,wait=off", "-mon", "chardev=hmp"),
        *("-chardev", f"socket,id=qga,path={directory}/agent,server=on,wait=off", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0", "-device", "pvpanic-pci"),
        *("-netdev", f"user,id=n0,restrict=on,hostfwd=tcp:127.0.0.1:{ssh_port}-10.0.2.50:22"),
        *("-device", f"virtio-net-pci,netdev=n0,mac={MAC}", "-device", "virtio-rng-pci", "-device", "virtio-scsi-pci"),
        *("-drive", f"if=none,id=root,format=qcow2,file={disk}", "-device", "scsi-hd,drive=root,bootindex=0"),
        *("-drive", f"if=none,id=seed,format=raw,readonly=on,file={seed}", "-device", "scsi-cd,drive=seed"),
        *firmware,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    guest = Guest(process, directory)
    try:
        await guest.wait_for(UP, PROMPT)
        yield guest
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await process.stdin.wait_closed()


@pytest.fixture
def disk(base: Path) -> Path:
    """An overlay on the image."""
    image = vm_images.small()
    path = base / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", path], check=True)
    return path


@pytest.fixture
def key(base: Path) -> Path:
    """A private SSH key; the public one is beside it."""
    path = base / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tester", "-f", path], check=True)
    return path


def seed(path: Path, key: Path, hostname: str, form: SeedFormat) -> Path:
    public = key.with_suffix(".pub").read_text().strip()
    user_data = {"write_files": [{"path": "/etc/plain", "content": "läuft\n"}], "runcmd": ["echo $0 ran >/run/ran"]}
    request = SeedRequest(
        instance_id=f"instance-of-{hostname}",
        hostname=hostname,
        image_pod=ImagePod(ssh_keys=[public], seed_format=form, user_data=user_data),
        network=NETWORK,
        dns=Dns(servers=["10.0.2.3"], searches=["pods.example"]),
        envs=[("COLOUR", "dark blue")],
        injected=[SeedFile(path="/etc/deep/secret", content=b"\x00\xff", mode=0o600)],
    )
    build_seed(request, path)
    return path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def check_seed(agent: GuestAgent, key: Path, hostname: str) -> None:
    """Everything a seed says is so in the guest."""
    script = """
        hostname; cat /etc/hostname /etc/plain /run/ran /etc/resolv.conf /etc/cloud/environment /root/.ssh/authorized_keys
        stat -c %a /etc/deep/secret /root/.ssh/authorized_keys; od -An -tx1 /etc/deep/secret
        cat /sys/class/net/pod0/mtu; ip route; wget -qO- http://127.0.0.1/
    """
    done = await agent.run(["sh", "-c", script], timeout=30)
    assert done.exit_code == 0, done.stderr
    public = key.with_suffix(".pub").read_text().strip()
    assert re.sub(" +", " ", done.stdout.decode()).splitlines() == [
        *(hostname, hostname, "läuft", "/bin/sh ran", "nameserver 10.0.2.3", "search pods.example"),
        *("COLOUR='dark blue'", public, "600", "600", " 00 ff", "1400"),
        *("default via 10.0.2.2 dev pod0 ", "10.0.2.0/24 dev pod0 scope link src 10.0.2.50 "),
        "<html><body>the small VM image</body></html>",
    ]
    found = {nic.name: [str(address.address) for address in nic.addresses] for nic in await agent.interfaces()}
    assert "10.0.2.50" in found["pod0"]


async def ssh(key: Path, port: int, command: str) -> str:
    options = "StrictHostKeyChecking=no UserKnownHostsFile=/dev/null IdentitiesOnly=yes BatchMode=yes LogLevel=ERROR"
    process = await asyncio.create_subprocess_exec(
        *("ssh", "-F", "none", "-i", str(key), "-p", str(port), *(f"-o{option}" for option in options.split())),
        *("root@127.0.0.1", command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "SSH_AUTH_SOCK": ""},
    )
    async with asyncio.timeout(BOOT_SECONDS):
        out, err = await process.communicate()
    assert process.returncode == 0, err
    return out.decode()


async def test_by_bios_then_by_uefi_on_one_disk(base: Path, disk: Path, key: Path) -> None:
    port = free_port()
    nocloud = seed(base / "one.iso", key, "one", SeedFormat.NOCLOUD)
    async with booted(base, disk, nocloud, port) as guest:
        async with guest.agent() as agent:
            await check_seed(agent, key, "one")
        assert await ssh(key, port, "cat /etc/plain") == "läuft\n"
        guest.type("echo typed at $((6 * 7))")
        await guest.wait_for(b"typed at 42\r\n")
        await guest.press_power_button()
        assert await guest.ended() == 0
        assert b"shutting down: power button" in guest.said

    # What was written is still there, another instance is set up anew, and a panic is told of.
    configdrive = seed(base / "two.iso", key, "two", SeedFormat.CONFIGDRIVE)
    async with booted(base, disk, configdrive, port, *UEFI) as guest:
        async with guest.agent() as agent:
            await check_seed(agent, key, "two")
            log = await agent.run(["sh", "-c", "cat /var/log/shutdown.log; ls -d /sys/firmware/efi"], timeout=30)
        assert re.fullmatch(r"\S+ shutting down: power button\n/sys/firmware/efi\n", log.stdout.decode())
        guest.type("echo c >/proc/sysrq-trigger")
        assert await guest.ended() == 1
        assert b"Kernel panic - not syncing: sysrq triggered crash" in guest.said
