from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import sqlite3
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from tests.unit.cli.conftest import Cli
from vmruntime.cli.doctor import CHECKS, examine
from vmruntime.cli.doctor.host import Account, Host
from vmruntime.cli.doctor.report import Capability, State
from vmruntime.config.settings import GuestSettings, HypervisorSettings, ImageSettings, NetworkSettings, Settings

GUEST = "/var/lib/vmruntime/guest"
KERNEL = "6.1.0-test"
PYTHON = Path(sys.executable).name
ANSWERS = {
    "qemu-system-x86_64": "QEMU emulator version 7.2.0 (Debian)\n",
    PYTHON: "9000000\n",
}
USER = Account("vmruntime", 999, frozenset({999}))
PROGRAMS = {
    *ANSWERS,
    "virtiofsd",
    "vmruntime-agent",
    "crun",
    "skopeo",
    *("qemu-img", "curl", "unshare", "blkid"),
    "zstd",
    "mkfs.ext4",
    "prlimit",
    "iptables",
    "ip",
    "tc",
    "dnsmasq",
    "swtpm",
}


@dataclasses.dataclass
class Machine:
    """A host made of files, where everything is as it should be until a test spoils it."""

    root: Path
    programs: set[str] = dataclasses.field(default_factory=lambda: set(PROGRAMS))
    answers: dict[str, str] = dataclasses.field(default_factory=lambda: dict(ANSWERS))
    busy_devices: dict[str, str] = dataclasses.field(default_factory=dict)
    account: Account | None = USER
    free: int = 50 * 2**30
    euid: int = 0
    open_files: int = 1048576
    settings: Settings = dataclasses.field(default_factory=Settings)

    def write(self, path: str, text: str | bytes = "", mode: int = 0o644) -> Path:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        file.chmod(mode)
        return file

    def remove(self, path: str) -> None:
        (self.root / path.lstrip("/")).unlink()

    def guest_json(self, **changes: object) -> None:
        directory = self.root / GUEST.lstrip("/")
        digests = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in os.listdir(directory)}
        content = {
            "schema": 1, "arch": "x86_64", "kernel": "minimal", "kernel_release": "6.1", "agent_version": "0.1",
            "crun_version": "1.8", "kernel_sha256": digests["vmlinuz"], "initramfs_sha256": digests["initramfs.img"],
        }  # fmt: skip
        self.write(f"{GUEST}/guest.json", json.dumps({**content, **changes}))

    def host(self) -> Host:
        def run(argv: Sequence[str]) -> str | None:
            return self.answers.get(Path(argv[0]).name)

        return Host(
            root=self.root,
            which=lambda name: f"/usr/bin/{Path(name).name}" if Path(name).name in self.programs else None,
            run=run,
            open_device=lambda path: self.busy_devices.get("/" + str(path.relative_to(self.root)), ""),
            account=lambda name: self.account,
            free_bytes=lambda path: self.free,
            euid=self.euid,
            open_files=self.open_files,
            machine="x86_64",
        )

    def examine(self) -> dict[str, Capability]:
        return {item.name: item for item in examine(self.host(), self.settings)}

    def set(self, **tables: object) -> None:
        self.settings = msgspec.structs.replace(self.settings, **tables)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    tmp_path.chmod(0o755)
    made = Machine(tmp_path)
    made.write("/proc/meminfo", "MemTotal: 9 kB\nMemAvailable: 8388608 kB\n")
    made.write("/proc/sys/fs/inotify/max_user_instances", "1024\n")
    made.write("/proc/sys/kernel/osrelease", f"{KERNEL}\n")
    made.write("/proc/sys/kernel/random/boot_id", "boot-1\n")
    made.write(f"/lib/modules/{KERNEL}/modules.builtin", "kernel/net/sched/sch_ingress.ko\n")
    made.write(f"/lib/modules/{KERNEL}/modules.dep", "kernel/net/sched/cls_u32.ko.xz: kernel/lib/x.ko\n")
    made.write("/sys/module/act_mirred/refcnt")
    for device in ("/dev/kvm", "/dev/vhost-vsock", "/dev/net/tun"):
        made.write(device, mode=0o666)
    for name in ("vmlinuz", "initramfs.img"):
        made.write(f"{GUEST}/{name}", name)
    made.guest_json()
    made.write("/etc/containers/policy.json", "{}")
    for name in ("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"):
        made.write(f"/usr/share/OVMF/{name}")
    for plugin in ("bridge", "host-local", "portmap", "loopback"):
        made.write(f"/usr/lib/cni/{plugin}", mode=0o755)
    made.write("/sys/fs/cgroup/cgroup.controllers", "cpu memory pids io\n")
    (made.root / "run").mkdir()
    return made


def test_a_good_machine_lacks_nothing_but_the_daemon(machine: Machine) -> None:
    answers = machine.examine()
    assert len(answers) == len(CHECKS)
    assert {name: item.why for name, item in answers.items() if item.state is not State.FOUND} == {
        "daemon": answers["daemon"].why
    }
    assert not any(item.blocking for item in answers.values())


def test_an_empty_machine_is_told_everything(tmp_path: Path) -> None:
    machine = Machine(tmp_path, programs=set(), account=None, free=0, euid=1, open_files=1024)
    answers = machine.examine()
    blocking = {name for name, item in answers.items() if item.blocking}
    assert blocking == {
        "account", "disk", "qemu", "vsock", "guest", "skopeo", "mkfs.ext4", "unshare",
        "cni plugins", "iptables", "tun",
    }  # fmt: skip
    for item in answers.values():
        assert item.why
        assert item.remedy or item.state is State.FOUND


Spoil = Callable[[Machine], object]


@pytest.mark.parametrize(
    ("spoil", "name", "state", "words"),
    [
        (lambda m: m.programs.discard("virtiofsd"), "virtiofsd", State.MISSING, "pods in VMs can have no volumes"),
        (lambda m: m.programs.discard("crun"), "host pods", State.MISSING, "crun is not on this host"),
        (lambda m: setattr(m, "euid", 1), "root", State.DEGRADED, "not root"),
        (lambda m: setattr(m, "account", None), "account", State.MISSING, "no user 'vmruntime'"),
        (lambda m: setattr(m, "account", Account("root", 0, frozenset())), "account", State.DEGRADED, "is root"),
        (lambda m: (m.root / "run").chmod(0o700), "directories", State.MISSING, "cannot pass through /run"),
        (lambda m: setattr(m, "free", 2**29), "disk", State.MISSING, "0.5 GiB"),
        (lambda m: setattr(m, "free", 2**31), "disk", State.DEGRADED, "2.0 GiB"),
        (lambda m: m.write("/proc/meminfo", "MemAvailable: 1000 kB\n"), "memory", State.DEGRADED, "room for 0 pods"),
        (lambda m: m.write("/proc/meminfo", "rubbish"), "memory", State.DEGRADED, "does not tell"),
        (lambda m: setattr(m, "open_files", 1024), "open files", State.DEGRADED, "1024"),
        (lambda m: setattr(m, "open_files", -1), "open files", State.FOUND, "unlimited"),
        (lambda m: m.write("/proc/sys/fs/inotify/max_user_instances", "8"), "inotify", State.DEGRADED, "8"),
        (lambda m: m.answers.update({"qemu-system-x86_64": "QEMU emulator version 5.2.0\n"}), "qemu", State.MISSING,
         "5.2.0"),
        (lambda m: m.answers.clear(), "qemu", State.MISSING, "does not answer"),
        (lambda m: m.remove("/dev/kvm"), "kvm", State.DEGRADED, "emulated"),
        (lambda m: m.busy_devices.update({"/dev/kvm": "Permission denied"}), "kvm", State.DEGRADED,
         "Permission denied"),
        (lambda m: (m.root / "dev/kvm").chmod(0o600), "kvm", State.DEGRADED, "vmruntime may not open"),
        (lambda m: m.set(hypervisor=HypervisorSettings(accelerator="tcg")), "kvm", State.DEGRADED, "not used"),
        (lambda m: (m.set(hypervisor=HypervisorSettings(accelerator="kvm")), m.remove("/dev/kvm")), "kvm",
         State.MISSING, 'accelerator is "kvm"'),
        (lambda m: m.remove("/dev/vhost-vsock"), "vsock", State.MISSING, "does not exist"),
        (lambda m: (m.remove("/dev/vhost-vsock"), m.programs.add("vhost-device-vsock")), "vsock", State.FOUND,
         "/usr/bin/vhost-device-vsock"),
        (lambda m: (m.remove("/dev/vhost-vsock"),
                    m.write("/usr/local/libexec/vmruntime/vhost-device-vsock", mode=0o755)),
         "vsock", State.FOUND, "/usr/local/libexec"),
        (lambda m: m.set(hypervisor=HypervisorSettings(vsock="vhost-user")), "vsock", State.MISSING, "not wanted"),
        (lambda m: (m.set(hypervisor=HypervisorSettings(vsock="native")), m.remove("/dev/vhost-vsock")), "vsock",
         State.MISSING, 'vsock is "native"'),
        (lambda m: m.set(hypervisor=HypervisorSettings(vsock="vhost-user", vhost_device_vsock="/opt/none")), "vsock",
         State.MISSING, "not installed"),
        (lambda m: m.remove(f"{GUEST}/vmlinuz"), "guest", State.MISSING, "vmlinuz does not exist"),
        (lambda m: m.remove(f"{GUEST}/guest.json"), "guest", State.DEGRADED, "guest.json does not exist"),
        (lambda m: m.write(f"{GUEST}/guest.json", "{"), "guest", State.DEGRADED, "guest.json"),
        (lambda m: m.write(f"{GUEST}/guest.json", "{}"), "guest", State.DEGRADED, "schema"),
        (lambda m: m.guest_json(schema=2), "guest", State.DEGRADED, "schema 2"),
        (lambda m: m.guest_json(arch="aarch64"), "guest", State.MISSING, "for aarch64"),
        (lambda m: m.guest_json(kernel="distribution"), "guest", State.DEGRADED, "slower"),
        (lambda m: m.write(f"{GUEST}/initramfs.img", "other"), "guest", State.MISSING, "not the file"),
        (lambda m: m.set(guest=GuestSettings(directory="/elsewhere")), "guest", State.MISSING, "/elsewhere/vmlinuz"),
        (lambda m: m.programs.discard("zstd"), "zstd", State.MISSING, "unpacks layers"),
        (lambda m: m.programs.discard("skopeo"), "skopeo", State.MISSING, "pulls images"),
        (lambda m: m.programs.discard("curl"), "curl", State.MISSING, "downloads VM images"),
        (lambda m: m.set(images=ImageSettings(translations_dir="/dev/null")), "VM image names", State.MISSING, "/dev/null: "),
        (lambda m: m.remove("/etc/containers/policy.json"), "image policy", State.DEGRADED, "unsigned"),
        (lambda m: m.write("/etc/containers/policy.json", "{"), "image policy", State.MISSING, "not JSON"),
        (lambda m: m.write("/etc/containers/policy.json", '{"type": "signedBy"}'), "image policy", State.MISSING, "gpg"),
        (lambda m: m.write("/etc/hooks/bad.json", "{") and m.set(hooks_dirs=["/etc/hooks"]), "hooks", State.MISSING, "not JSON"),
        (lambda m: m.set(images=ImageSettings(policy="/etc/none")), "image policy", State.MISSING, "/etc/none"),
        (lambda m: m.set(images=ImageSettings(registries_conf="/etc/none")), "registries", State.MISSING, "/etc/none"),
        (lambda m: m.write("/etc/cni/net.d/10-x.conf", "{"), "cni configuration", State.MISSING, "not JSON"),
        (lambda m: (m.write("/etc/cni/net.d/1.conf", "{"), _ptp(m)), "cni configuration", State.DEGRADED, "not JSON"),
        (lambda m: m.set(network=NetworkSettings(conf_template="/etc/t")), "cni configuration", State.MISSING,
         "/etc/t: No such file"),
        (lambda m: (m.set(network=NetworkSettings(conf_template="/etc/t")),
                    m.write("/etc/t", '{"name": "n", "cniVersion": "1.0.0", "type": "ptp", "ipam": ${ranges}}')),
         "cni configuration", State.DEGRADED, "waits for kubelet's pod CIDR"),
        (lambda m: (m.set(network=NetworkSettings(conf_template="/etc/t")), _ptp(m)), "cni configuration", State.FOUND,
         "5.conf"),
        (lambda m: _ptp(m), "cni plugins", State.MISSING, "ptp"),
        (lambda m: m.remove("/usr/lib/cni/loopback"), "cni plugins", State.DEGRADED, "loopback"),
        (lambda m: m.set(network=NetworkSettings(bin_dirs=["/opt"])), "cni plugins", State.MISSING, "not in /opt"),
        (lambda m: m.answers.update(env='{"supportedVersions": ["0.3.1"]}'), "cni plugins", State.MISSING,
         "bridge speaks 0.3.1"),
        (lambda m: m.answers.update(env='{"supportedVersions": ["0.4.0"]}'), "cni plugins", State.FOUND, "(CNI 0.4.0)"),
        (lambda m: m.answers.update(env="rubbish"), "cni plugins", State.FOUND, "(CNI 1.1.0)"),
        (lambda m: m.programs.discard("iptables"), "iptables", State.MISSING, "masquerade"),
        (lambda m: m.programs.discard("dnsmasq"), "dnsmasq", State.MISSING, "DHCP requests of image pods"),
        (lambda m: m.programs.discard("swtpm"), "swtpm", State.MISSING, "the TPM of image pods"),
        (lambda m: m.remove("/usr/share/OVMF/OVMF_VARS_4M.fd"), "uefi", State.MISSING, "boot by BIOS only"),
        (lambda m: m.answers.pop(PYTHON), "libvirt", State.DEGRADED, "virsh does not show them"),
        (lambda m: m.answers.update({PYTHON: "8002000\n"}), "libvirt", State.DEGRADED, "8.2.0 is older than 9.0.0"),
        (lambda m: (m.answers.pop(PYTHON), m.set(hypervisor=HypervisorSettings(image_pods="libvirt"))),
         "libvirt", State.MISSING, 'image_pods is "libvirt"'),
        (lambda m: (m.answers.pop(PYTHON), m.set(hypervisor=HypervisorSettings(image_pods="qemu"))),
         "libvirt", State.FOUND, "not wanted"),
        (lambda m: m.write("/run/libvirt/libvirt-sock"), "libvirt", State.FOUND, "9.0.0, the daemon at /run/libvirt"),
        (lambda m: m.set(hypervisor=HypervisorSettings(libvirt_uri="qemu+tcp:///x")), "libvirt", State.FOUND, "qemu+tcp"),
        (lambda m: m.remove("/dev/net/tun"), "tun", State.MISSING, "does not exist"),
        (lambda m: m.busy_devices.update({"/dev/net/tun": "No such device"}), "tun", State.MISSING, "No such device"),
        (lambda m: m.write(f"/lib/modules/{KERNEL}/modules.dep"), "traffic control", State.MISSING, "cls_u32"),
        (lambda m: m.remove(f"/lib/modules/{KERNEL}/modules.dep"), "traffic control", State.DEGRADED, "cannot see"),
        (lambda m: (m.remove(f"/lib/modules/{KERNEL}/modules.dep"),
                    m.write("/proc/config.gz", gzip.compress(b"CONFIG_NET_CLS_U32=y\n"))),
         "traffic control", State.FOUND, "cls_u32 built in"),
        (lambda m: (m.remove(f"/lib/modules/{KERNEL}/modules.dep"), m.write(f"/boot/config-{KERNEL}", "X=y\n")),
         "traffic control", State.MISSING, "cls_u32"),
        (lambda m: m.write("/sys/fs/cgroup/cgroup.controllers", "cpu\n"), "cgroups", State.DEGRADED, "memory, pids"),
        (lambda m: m.set(cgroup_driver="systemd"), "cgroup driver", State.MISSING, "does not run here"),
        (lambda m: m.write("/run/systemd/system/x"), "cgroup driver", State.DEGRADED, "kubelet"),
    ],
)  # fmt: skip
def test_each_lack_is_named(machine: Machine, spoil: Spoil, name: str, state: State, words: str) -> None:
    spoil(machine)
    answer = machine.examine()[name]
    assert (answer.state, words in answer.why) == (state, True), answer


def _ptp(machine: Machine) -> Path:
    return machine.write("/etc/cni/net.d/5.conf", '{"cniVersion": "1.0.0", "name": "n", "type": "ptp"}')


def test_iptables_is_not_needed_without_masquerading(machine: Machine) -> None:
    _ptp(machine)
    machine.programs.discard("iptables")
    assert not machine.examine()["iptables"].blocking


def test_cgroup_v1(machine: Machine) -> None:
    machine.remove("/sys/fs/cgroup/cgroup.controllers")
    for name in ("cpu", "memory", "pids"):
        (machine.root / "sys/fs/cgroup" / name).mkdir()
    assert machine.examine()["cgroups"].why.startswith("cgroup v1")


@pytest.mark.parametrize(
    ("fact", "state", "words"),
    [
        ("boot-1 QEMU 1 2\nworks", State.FOUND, "has booted its guest"),
        ("boot-1 QEMU 1 2\na guest does not boot on it: time is up", State.DEGRADED, "does not boot on it"),
        ("boot-0 QEMU 1 2\na guest does not boot on it", State.FOUND, "proves it"),
    ],
)
def test_what_the_daemon_found_out_about_kvm(machine: Machine, fact: str, state: State, words: str) -> None:
    database = machine.write("/var/lib/vmruntime/vmruntime.db")
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE facts (name TEXT, value BLOB)")
        connection.execute("INSERT INTO facts VALUES ('accelerator', ?)", (fact.encode(),))
    connection.close()
    answer = machine.examine()["kvm"]
    assert (answer.state, words in answer.why) == (state, True), answer


def test_a_broken_store_does_not_break_doctor(machine: Machine) -> None:
    machine.write("/var/lib/vmruntime/vmruntime.db", "rubbish" * 1000)
    assert machine.examine()["kvm"].state is State.FOUND


def test_account_permissions(tmp_path: Path) -> None:
    def status(mode: int) -> os.stat_result:
        return os.stat_result((stat.S_IFCHR | mode, 0, 0, 1, 10, 20, 0, 0, 0, 0))

    assert Account("a", 0, frozenset()).may(status(0), 6)
    assert Account("a", 10, frozenset()).may(status(0o600), 6)
    assert not Account("a", 10, frozenset({20})).may(status(0o066), 6)
    assert Account("a", 11, frozenset({20})).may(status(0o060), 6)
    assert not Account("a", 11, frozenset({21})).may(status(0o664), 6)


def test_the_real_host_answers() -> None:
    host = Host()
    assert host.which("sh") is not None
    assert host.run(["/bin/sh", "-c", "echo hello"]) == "hello\n"
    assert host.run(["/bin/sh", "-c", "exit 1"]) is None
    assert host.run(["/nonexistent"]) is None
    assert host.open_device(Path("/nonexistent")) == "No such file or directory"
    assert host.open_device(Path("/dev/null")) == ""
    root = host.account("root")
    assert root is not None
    assert root.uid == 0
    assert host.account("surely-nobody-has-this-name") is None
    assert host.free_bytes(host.nearest("/var/lib/not/there")) > 0


def test_the_command(cli: Cli) -> None:
    shown = json.loads(cli("doctor", "-o", "json").stdout)
    daemon = shown[-1]
    assert (daemon["name"], daemon["state"]) == ("daemon", "found")
    assert "fake 9.9" in daemon["why"]
    result = cli("doctor")
    assert result.exit_code == int(any(item["essential"] and item["state"] == "missing" for item in shown))
    assert "Pods can" in result.stdout
