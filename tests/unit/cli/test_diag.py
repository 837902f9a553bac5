from __future__ import annotations

import json
import os
import stat
import sys
import tarfile
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Cli
from vmruntime.cli.diag import masking
from vmruntime.cli.diag.bundle import LOG_LIMIT
from vmruntime.cli.doctor.host import Host
from vmruntime.cri.translate import image_pod

SECRETS = ("hunter2", "s3cret-arg", "the user-data", "seed content", "image content")
ECHO = f"#!{sys.executable}\nimport os, sys; print(os.path.basename(sys.argv[0]), *sys.argv[1:])\n"
IP = (
    f"#!{sys.executable}\nimport sys\n"
    "print('[{\"ifname\": \"eth0\"}]' if '-j' in sys.argv else 'ip ' + ' '.join(sys.argv[1:]))\n"
)
VIRSH = (
    f"#!{sys.executable}\nimport sys\n"
    "print('other\\ndefault-vm-' + open(sys.argv[0] + '.id').read() if 'list' in sys.argv else ' '.join(sys.argv[1:]))\n"
)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine with programs that print what they are called with."""
    programs = tmp_path / "bin"
    programs.mkdir()
    texts = dict.fromkeys(("tc", "qemu-img", "setpriv", "prlimit", "uname"), ECHO) | {"ip": IP, "virsh": VIRSH}
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (programs / "virsh.id").write_text("none")
    monkeypatch.setenv("PATH", str(programs))
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    monkeypatch.setattr("vmruntime.cli.commands.diag.Host", lambda: Host(root=root))
    return root


def process(root: Path, pid: int, *argv: str) -> None:
    (root / "proc" / str(pid)).mkdir(parents=True)
    (root / "proc" / str(pid) / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in argv))
    (root / "proc" / str(pid) / "status").write_text("Name:\tx\nState:\tS (sleeping)\nVmRSS:\t  512 kB\nThreads:\t3\n")


def vm(cli: Cli, root: Path) -> str:
    """Add an image pod with everything that one leaves on a machine; return its id."""
    pod = cli.cri.add_pod("vm")
    status = cli.cri.pods[pod]
    status.annotations["vmruntime.io/kind"] = "image"
    status.annotations["vmruntime.io/cloud-init-user-data"] = "the user-data hunter2"
    status.annotations["kubectl.kubernetes.io/last-applied-configuration"] = "hunter2"
    container = cli.cri.add_container(pod, "vm")
    cli.cri.containers[container].annotations["x"] = "hunter2"
    cli.cri.info = {"info": json.dumps({"args": ["s3cret-arg"], "command": [], "pid": 4})}
    run, disks = cli.base / "run" / "sandboxes" / pod[:13], cli.base / "root" / "pods" / pod
    run.mkdir(parents=True)
    disks.mkdir(parents=True)
    (run / "console.log").write_bytes(b"x" * LOG_LIMIT + b"login: ")
    (run / "qemu.log").write_text("qemu says")
    (disks / "root.qcow2").write_text("image content")
    (disks / "seed.iso").write_text("seed content")
    (disks / "machine.json").write_text('{"size": 1}')
    process(root, 77, "qemu-system-x86_64", "-serial", f"file:{run}/console.log")
    process(root, 78, "qemu-system-x86_64", "-serial", "file:/of/another/console.log")
    (root / "run" / "netns").mkdir(parents=True, exist_ok=True)
    (root / "run" / "netns" / f"vmrt-{pod[:13]}").touch()
    return pod


def read(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2]: tar.extractfile(member) for member in tar}
        return {name: file.read().decode() for name, file in names.items() if file is not None}


def test_everything_about_a_pod(cli: Cli, machine: Path, tmp_path: Path) -> None:
    pod = vm(cli, machine)
    (tmp_path / "bin" / "virsh.id").write_text(pod[:8])
    archive = tmp_path / "a.tar.gz"
    result = cli("diag", "-o", archive, "vm")
    assert (result.exit_code, result.stdout) == (0, f"{archive}\n"), result.output
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    found = read(archive)
    place = f"pods/vm-{pod[:13]}"
    shown = json.loads(found[f"{place}/pod.json"])
    assert shown["status"]["metadata"]["name"] == "vm"
    assert shown["status"]["annotations"] == {
        "vmruntime.io/kind": "image",
        "vmruntime.io/cloud-init-user-data": "<21 characters>",
        "kubectl.kubernetes.io/last-applied-configuration": "<7 characters>",
    }
    container = json.loads(found[f"{place}/container-vm-0.json"])
    assert container["info"]["info"] == {"args": "<1 words>", "command": [], "pid": 4}
    console = found[f"{place}/console.log"]
    assert (len(console), console[-8:]) == (LOG_LIMIT, "xlogin: ")
    assert found[f"{place}/qemu.log"] == "qemu says"
    assert found[f"{place}/machine.json"] == '{"size": 1}'
    processes = found[f"{place}/processes.txt"]
    assert processes.startswith("77: qemu-system-x86_64 -serial")
    assert "State: S (sleeping), VmRSS: 512 kB, Threads: 3" in processes
    assert "/of/another" not in processes
    network = found[f"{place}/network.txt"]
    assert f"ip -n vmrt-{pod[:13]} addr" in network
    assert f"tc -n vmrt-{pod[:13]} -s filter show dev eth0 parent ffff:" in network
    assert "13 (" in found[f"{place}/disks.txt"]
    assert "info -U -f qcow2 --" in found[f"{place}/qemu-img.txt"]
    assert f"-r -c qemu:///system dumpxml default-vm-{pod[:8]}" in found[f"{place}/domain.xml"]
    assert json.loads(found["host/version.json"])["daemon"]["runtime_version"] == "9.9"
    assert {one["name"] for one in json.loads(found["host/doctor.json"])} >= {"qemu", "kvm"}
    everything = "".join(found.values())
    assert [secret for secret in SECRETS if secret in everything] == []


def test_all_pods_by_default(cli: Cli, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vm(cli, machine)
    cli.cri.add_pod("web")
    result = cli("diag")
    (archive,) = tmp_path.glob("vmruntime-diag-*.tar.gz")
    assert result.stdout == f"{archive.name}\n"
    names = {name.split("/")[1].rpartition("-")[0] for name in read(archive) if name.startswith("pods/")}
    assert names == {"vm", "web"}
    assert "there is no network namespace" in read(archive)["errors.txt"]
    assert "there is no network namespace" in result.stderr


def test_refusals(cli: Cli, machine: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").touch()
    assert "exists already" in cli("diag", "-o", tmp_path / "a.tar.gz").stderr
    assert "cannot be written" in cli("diag", "-o", tmp_path / "none" / "a.tar.gz").stderr
    result = cli("diag", "-o", tmp_path / "b.tar.gz", "nobody")
    assert (result.exit_code, "no pod has the id or name" in result.stderr) == (1, True)
    assert not (tmp_path / "b.tar.gz").exists()


def test_without_a_daemon(cli: Cli, machine: Path, tmp_path: Path) -> None:
    pod = vm(cli, machine)
    assert cli.daemon is not None
    (cli.base / "config.toml").write_text(
        f'socket = "{cli.base}/none.sock"\nroot = "{cli.base}/root"\nrun = "{cli.base}/run"\n'
    )
    for number, target in enumerate((pod, pod[:5], "")):
        result = cli("diag", "-o", tmp_path / f"{number}.tar.gz", *([target] if target else []))
        assert result.exit_code == 0, result.output
        found = read(tmp_path / f"{number}.tar.gz")
        assert found[f"pods/{pod[:13]}/qemu.log"] == "qemu says"
        assert found[f"pods/{pod[:13]}/machine.json"] == '{"size": 1}'
        assert f"pods/{pod[:13]}/pod.json" not in found
        assert "the daemon: no vmruntime daemon" in found["errors.txt"]
    result = cli("diag", "-o", tmp_path / "n.tar.gz", "vm")
    assert "names of pods are known to the daemon only" in result.stderr


def test_what_a_vm_may_have_put_there_is_not_followed(cli: Cli, machine: Path, tmp_path: Path) -> None:
    pod = vm(cli, machine)
    (tmp_path / "shadow").write_text("hunter2")
    directory = cli.base / "run" / "sandboxes" / pod[:13]
    (directory / "evil.log").symlink_to(tmp_path / "shadow")
    os.mkfifo(directory / "pipe.log")
    (directory / "dir.log").mkdir()
    assert cli("diag", "-o", tmp_path / "a.tar.gz", "vm").exit_code == 0
    found = read(tmp_path / "a.tar.gz")
    assert "hunter2" not in "".join(found.values())
    assert "pipe.log: is not a file" in found["errors.txt"]
    assert "evil.log: Too many levels of symbolic links" in found["errors.txt"]


def test_libvirt_inside_the_daemon(cli: Cli, machine: Path, tmp_path: Path) -> None:
    pod = vm(cli, machine)
    embedded = tmp_path / "embedded"
    (embedded / "run" / "qemu").mkdir(parents=True)
    (embedded / "run" / "qemu" / f"default-vm-{pod[:8]}.xml").write_text("<domain/>")
    (embedded / "run" / "qemu" / "default-vm-00000000.xml").write_text("<other/>")
    (cli.base / "run" / "libvirt").mkdir()
    (cli.base / "run" / "libvirt" / "uri").write_text(f"qemu:///embed?root={embedded}\n")
    assert cli("diag", "-o", tmp_path / "a.tar.gz", "vm").exit_code == 0
    found = read(tmp_path / "a.tar.gz")
    assert [text for name, text in found.items() if "libvirt-" in name] == ["<domain/>"]


def test_configuration_without_passwords() -> None:
    given = {"a": {"proxy": "http://me:hunter2@proxy:3128"}, "list": ["https://x:y@z/"], "api_token": "abc", "n": 3}
    assert masking.settings(given) == {
        "a": {"proxy": "http://proxy:3128"}, "list": ["https://z/"], "api_token": "<3 characters>", "n": 3,
    }  # fmt: skip


def test_shown_annotations_are_those_of_image_pods() -> None:
    # A setting that gets another name must not be shown or hidden by its old one.
    ours = {setting.ours for setting in image_pod._SETTINGS}
    hidden = {"ssh-keys", "cloud-init-meta-data", "cloud-init-user-data", "cloud-init-user-data-script"}
    assert ours - hidden | {"kind", "created-by"} == masking.OURS
    assert {setting.virtlet for setting in image_pod._SETTINGS if setting.ours not in hidden} - {""} == masking.VIRTLETS
