"""Where libvirt is: a daemon of the host's, or its driver inside this process."""

from __future__ import annotations

import os
import pwd
import socket
from pathlib import Path

SYSTEM = "qemu:///system"
SOCKETS = (Path("/run/libvirt/virtqemud-sock"), Path("/run/libvirt/libvirt-sock"))
KVM = Path("/dev/kvm")
_CHOICE = "uri"


def choose_uri(configured: str, directory: Path, sockets: tuple[Path, ...] = SOCKETS) -> str:
    """Return libvirt's URI.

    A choice holds until the host's next boot, since the machines that run know one libvirt only.

    Args:
        configured: The setting hypervisor.libvirt_uri; empty: chosen here.
        directory: RUN/libvirt, for the driver inside the process and for the choice.
        sockets: Where a daemon of the host's may listen.
    """
    if configured:
        return configured
    choice = directory / _CHOICE
    try:
        if chosen := choice.read_text().strip():
            return chosen
    except FileNotFoundError:
        pass
    chosen = SYSTEM if any(_answers(path) for path in sockets) else embedded_uri(directory)
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    partial = choice.with_suffix(".new")
    partial.write_text(chosen + "\n")
    partial.replace(choice)
    return chosen


def embedded_uri(directory: Path) -> str:
    """Return the URI of the driver inside the process."""
    return f"qemu:///embed?root={directory}"


def is_embedded(uri: str) -> bool:
    """Whether the driver is to run inside the process."""
    return uri.startswith("qemu:///embed")


def embedded_log(uri: str, name: str) -> Path:
    """Return where the driver inside the process keeps what a domain's QEMU says."""
    return Path(uri.partition("root=")[2]) / "log" / "qemu" / f"{name}.log"


def prepare_embedded(uri: str, account: pwd.struct_passwd) -> None:
    """Write the configuration of the driver inside the process; its directory can be passed through by QEMU."""
    root = Path(uri.partition("root=")[2])
    (root / "etc").mkdir(parents=True, exist_ok=True)
    root.chmod(0o711)
    (root / "etc" / "qemu.conf").write_text(qemu_conf(account, may_use_kvm=may_use(KVM, account)))


def qemu_conf(account: pwd.struct_passwd, *, may_use_kvm: bool) -> str:
    """Return the configuration (qemu.conf).

    Args:
        account: What machines run as; each domain names it by itself, too.
        may_use_kvm: It can open /dev/kvm, or there is none. libvirt tries QEMU with the right to open everything; if the
            account itself has not, it takes what it learnt for outdated and learns it again at each step.
    """
    user, group = (f"+{account.pw_uid}", f"+{account.pw_gid}") if may_use_kvm else ("root", "root")
    return "\n".join(
        [
            f'user = "{user}"',
            f'group = "{group}"',
            'security_driver = "none"',
            # Files are passed as descriptors: none changes its owner.
            "dynamic_ownership = 0",
            "remember_owner = 0",
            # The pod's cgroup has QEMU; and virtlogd is a daemon of libvirt's daemon.
            "cgroup_controllers = []",
            "namespaces = []",
            'stdio_handler = "file"',
            "seccomp_sandbox = 1",
            "",
        ]
    )


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def may_use(path: Path, account: pwd.struct_passwd, *, execute: bool = False) -> bool:
    """Whether an account can read and write a device, or pass through a directory; one that is not there: yes."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return True
    wanted = 0o1 if execute else 0o6
    if status.st_uid == account.pw_uid:
        shift = 6
    else:
        shift = 3 if status.st_gid in os.getgrouplist(account.pw_name, account.pw_gid) else 0
    return status.st_mode >> shift & wanted == wanted
