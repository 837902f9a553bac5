"""A real guest: its agent, containers, output, exec, disks, adoption and faults."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.hosts import GUEST, Host, open_tap, sandbox
from vmruntime.agent.errors import AgentError
from vmruntime.agent.interface import GuestContainer, GuestContainerState, GuestPhase, GuestSetup, PidMode
from vmruntime.errors import FailedPrecondition
from vmruntime.hypervisor.errors import BootFailed, HypervisorError, VmGone
from vmruntime.model.output import OutputRecord
from vmruntime.model.sandbox import Dns, IdMapping, NetworkInterface, UserNamespace
from vmruntime.sandboxes.container_vm import ContainerVm
from vmruntime.sandboxes.interface import LayerDisk

pytestmark = pytest.mark.vm

SERIAL = "c" * 32
IDS = IdMapping(container_id=0, host_id=100000, length=65536)
USERS = UserNamespace(uids=IDS, gids=IDS)


def spec(argv: list[str], **linux: Any) -> bytes:
    return json.dumps(
        {
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": argv, "env": ["PATH=/bin"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            ],
            "linux": {"namespaces": [{"type": "mount"}, {"type": "cgroup"}], **linux},
        }
    ).encode()


def container(name: str, argv: list[str], *, user: str = "", **linux: Any) -> GuestContainer:
    return GuestContainer(
        id=name,
        oci_spec=spec(argv, **linux),
        layer_serials=[SERIAL],
        readonly_rootfs=False,
        user=user,
        groups=[],
        image_groups=True,
        pid_mode=PidMode.CONTAINER,
    )


async def set_up(guest: ContainerVm, *interfaces: NetworkInterface, user: UserNamespace | None = None) -> None:
    await guest.agent.setup(
        GuestSetup(
            sandbox_id="ab" * 32,
            hostname="guest-host",
            time_ns=time.time_ns(),
            entropy=b"x" * 64,
            interfaces=list(interfaces),
            routes=[],
            dns=Dns(servers=["192.0.2.1"], searches=["example.org"]),
            sysctls={"net.ipv4.ip_unprivileged_port_start": "0"},
            scratch_serial=guest.scratch_serial,
            shared_pid_namespace=True,
            user=user,
        )
    )


async def output(guest: ContainerVm, name: str, after: int = 0) -> list[OutputRecord]:
    records = []
    async with guest.agent.output(name, after) as reader:
        async for record in reader:
            records.append(record)
            await reader.acknowledge(record.seq)
    return records


async def ended(guest: ContainerVm, name: str) -> GuestContainerState:
    async with asyncio.timeout(30):
        async for state in guest.agent.events():
            if state.id == name and state.phase is GuestPhase.EXITED:
                return state
    raise AssertionError("events ended")


async def test_containers_in_one_guest(guest: ContainerVm, busybox_layer: Path) -> None:
    """One guest, several containers: what they see, say and return."""
    await set_up(guest)
    await guest.attach_layers([LayerDisk(path=busybox_layer, serial=SERIAL)])

    script = "hostname; cat /etc/resolv.conf; echo problem >&2; echo unfinished | head -c 4; exit 3"
    await guest.agent.create(container("says", ["/bin/sh", "-c", script]))
    await guest.agent.start("says")
    records = await output(guest, "says")
    out = [r.data for r in records if not r.stderr]
    assert out[0] == b"guest-host"
    assert b"nameserver 192.0.2.1" in out
    assert out[-1] == b"unfi"
    assert [r.data for r in records if r.stderr] == [b"problem"]
    state = await ended(guest, "says")
    assert (state.exit_code, state.oom_killed) == (3, False)

    _, user = await guest.agent.create(container("user", ["/bin/sleep", "1000"], user="web"))
    assert (user.uid, user.gid, 1003 in user.groups) == (1001, 1002, True)
    await guest.agent.start("user")
    done = await guest.agent.exec_sync("user", ["/bin/sh", "-c", "id -u; echo bad >&2; exit 7"], 20, 1 << 20)
    assert (done.stdout, done.stderr, done.end.exit_code) == (b"1001\n", b"bad\n", 7)
    missing = await guest.agent.exec_sync("user", ["no-such"], 20, 1 << 20)
    assert missing.end.exit_code == 127
    assert "not found" in missing.end.error
    late = await guest.agent.exec_sync("user", ["/bin/sleep", "60"], 1, 1 << 20)
    assert late.end.timed_out
    await guest.agent.signal("user", 9, everyone=True)
    assert (await ended(guest, "user")).exit_code == 137

    hog = container("hog", ["/bin/sh", "-c", "x=$(yes | head -c 200000000)"], resources={"memory": {"limit": 16 << 20}})
    await guest.agent.create(hog)
    await guest.agent.start("hog")
    assert (await ended(guest, "hog")).oom_killed

    with pytest.raises(AgentError, match="executable file not found"):
        await guest.agent.create(container("typo", ["/bin/typo"]))
    with pytest.raises(AgentError, match="nobody-here"):
        await guest.agent.create(container("who", ["/bin/sh"], user="nobody-here"))

    released = [await guest.agent.delete(name) for name in ("says", "user", "hog", "typo", "who", "unknown")]
    assert [SERIAL] in released
    await guest.release_layers([SERIAL])
    await guest.release_layers([SERIAL])


async def test_a_guest_is_prepared_for_whatever_pod_comes(guest: ContainerVm, busybox_layer: Path) -> None:
    """What was done ahead is not done again, and does not show."""
    with pytest.raises(AgentError, match="oci_spec"):
        await guest.agent.prepare(b"y" * 64, guest.scratch_serial, b"[]")
    await guest.agent.prepare(b"y" * 64, guest.scratch_serial, spec(["/bin/none"]))
    await guest.agent.prepare(b"z" * 64, guest.scratch_serial, b"")
    assert await guest.agent.containers() == []
    await set_up(guest)
    with pytest.raises(AgentError, match="serves sandbox"):
        await guest.agent.prepare(b"y" * 64, guest.scratch_serial, b"")
    await guest.attach_layers([LayerDisk(path=busybox_layer, serial=SERIAL)])
    script = "hostname; cat /etc/hostname; /bin/busybox ps -o pid,args; /bin/busybox df /dev/shm | tail -n 1"
    says = msgspec.structs.replace(container("says", ["/bin/sh", "-c", script]), pid_mode=PidMode.POD)
    await guest.agent.create(says)
    await guest.agent.start("says")
    lines = [record.data.decode().split() for record in await output(guest, "says")]
    assert lines[:2] == [["guest-host"], ["guest-host"]]
    assert lines[3] == ["1", "vmruntime", "pod-init", "pid"]
    assert lines[-1][1] == "65536"
    await guest.agent.delete("says")


async def test_a_prepared_guest_has_a_user_namespace_all_the_same(guest: ContainerVm, busybox_layer: Path) -> None:
    await guest.agent.prepare(b"y" * 64, guest.scratch_serial, spec(["/bin/none"]))
    await set_up(guest, user=USERS)
    await guest.attach_layers([LayerDisk(path=busybox_layer, serial=SERIAL)])
    says = msgspec.structs.replace(container("says", ["/bin/cat", "/proc/1/uid_map"]), pid_mode=PidMode.POD)
    await guest.agent.create(says)
    await guest.agent.start("says")
    assert [record.data.split() for record in await output(guest, "says")] == [[b"0", b"100000", b"65536"]]


async def test_output_is_bounded_and_resumes(guest: ContainerVm, busybox_layer: Path) -> None:
    """What is not acknowledged is kept; the container waits when the buffer is full; nothing is lost."""
    await set_up(guest)
    await guest.attach_layers([LayerDisk(path=busybox_layer, serial=SERIAL)])
    script = f"i=0; while [ $i -lt 3000 ]; do echo line-$i-{'x' * 700}; i=$((i+1)); done"
    await guest.agent.create(container("loud", ["/bin/sh", "-c", script]))
    await guest.agent.start("loud")
    async with guest.agent.output("loud", 0) as reader:
        async for record in reader:
            if record.seq == 100:
                await reader.acknowledge(50)
                break
    records = await output(guest, "loud", 50)
    assert [r.seq for r in records] == list(range(51, 3001))
    assert all(r.data.startswith(b"line-%d-" % (r.seq - 1)) for r in records)


@pytest.mark.parametrize("user", [None, USERS], ids=["agents", "own"])
async def test_nics_take_the_names_and_mac_addresses_of_their_interfaces(
    guest: ContainerVm, busybox_layer: Path, user: UserNamespace | None
) -> None:
    """One was plugged in before its interface was known; each has the other's name at first."""
    first = NetworkInterface(
        name="eth1",
        mac="0a:58:0a:01:00:02",
        mtu=1400,
        addresses=["10.1.0.2/24"],
        tap="",
        device_mac="02:00:00:00:00:01",
    )
    second = NetworkInterface(name="eth0", mac="02:00:00:00:00:02", mtu=1450, addresses=["10.2.0.2/24"], tap="")
    for nic in (first, second):
        tap = open_tap()
        await guest.attach_nic(nic, tap)
        os.close(tap)
    await set_up(guest, first, second, user=user)
    await guest.attach_layers([LayerDisk(path=busybox_layer, serial=SERIAL)])
    await guest.agent.create(container("looks", ["/bin/busybox", "ip", "address"]))
    await guest.agent.start("looks")
    records = await output(guest, "looks")
    seen = " ".join(b" ".join(record.data for record in records).decode().split())
    assert re.search(r" eth1: <[^>]*,UP,[^>]*> mtu 1400 .{0,60}link/ether 0a:58:0a:01:00:02", seen)
    assert re.search(r" eth0: <[^>]*,UP,[^>]*> mtu 1450 .{0,60}link/ether 02:00:00:00:00:02", seen)
    assert "inet 10.1.0.2/24 brd 10.1.0.255 scope global eth1" in seen
    assert "inet 10.2.0.2/24 brd 10.2.0.255 scope global eth0" in seen


async def test_a_vm_is_adopted_and_ends(host: Host, busybox_layer: Path) -> None:
    """A second daemon finds the VM with its disks; killing QEMU is noticed; nothing is left."""
    one = sandbox("cd" * 32)
    first = await host.backend.start(one)
    await first.attach_layers([LayerDisk(path=busybox_layer, serial=SERIAL)])
    await first.close()
    second = await host.backend.adopt(one)
    assert (await second.agent.hello()).kernel == first.hello.kernel
    await second.attach_layers([LayerDisk(path=busybox_layer, serial=SERIAL)])  # known already: no second disk
    second._vm._process.kill()  # type: ignore[attr-defined]
    assert "QEMU ended" in await second.wait()
    await second.close()
    with pytest.raises(VmGone):
        await host.backend.adopt(one)
    await host.backend.release(one.id, final=True)


async def test_a_guest_that_does_not_boot_shows_its_console(host: Host, base: Path) -> None:
    broken = base / "guest"
    broken.mkdir()
    (broken / "vmlinuz").write_bytes((GUEST / "vmlinuz").read_bytes())
    (broken / "initramfs.img").write_bytes(b"garbage")
    other = Host(base, host.database, host.hypervisor, guest=broken, boot_timeout=30)
    with pytest.raises(BootFailed, match=r"(?s)did not come up.*console said.*panic"):
        await other.backend.start(sandbox("ef" * 32))


async def test_a_kernel_that_is_none_and_a_missing_guest(host: Host, base: Path) -> None:
    broken = base / "guest"
    broken.mkdir()
    other = Host(base, host.database, host.hypervisor, guest=broken, boot_timeout=5)
    with pytest.raises(FailedPrecondition, match="make guest"):
        await other.backend.start(sandbox("ef" * 32))
    (broken / "vmlinuz").write_bytes(b"not a kernel")
    (broken / "initramfs.img").write_bytes(b"")
    with pytest.raises((BootFailed, HypervisorError)):
        await other.backend.start(sandbox("ef" * 32))
