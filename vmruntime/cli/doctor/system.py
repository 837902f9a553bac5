"""The machine itself: who runs the daemon, room, limits."""

from __future__ import annotations

from pathlib import Path

from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.report import Capability, Check, degraded, found, missing
from vmruntime.config.settings import Settings

GIB = 2**30
DISK_NEEDED = 1 * GIB
DISK_WANTED = 10 * GIB
OPEN_FILES_WANTED = 65536
# Watches of kubelet, container runtimes and VMs' helpers come out of one number per user.
INOTIFY_INSTANCES_WANTED = 128
MEMORY_WANTED = 1 * GIB


def root(host: Host, settings: Settings) -> Capability:
    """Whether this command runs as root, as the daemon has to."""
    if host.euid == 0:
        return found("root", "this is root")
    return degraded("root", "this is not root, so some answers below may be wrong", "run doctor as root")


def account(host: Host, settings: Settings) -> Capability:
    """Whether the account exists that QEMU runs as."""
    name = settings.hypervisor.user
    user = host.account(name)
    if user is None:
        return missing(
            "account",
            f"there is no user {name!r} for QEMU to run as (hypervisor.user)",
            f"useradd --system --no-create-home --shell /usr/sbin/nologin {name}",
        )
    if user.uid == 0:
        return degraded(
            "account", f"QEMU runs as {name}, which is root", "set hypervisor.user to an account of its own"
        )
    return found("account", f"{name}, uid {user.uid}")


def directories(host: Host, settings: Settings) -> Capability:
    """Whether QEMU's account can pass through the directories above its sockets and logs."""
    user = host.account(settings.hypervisor.user)
    if user is None:
        return missing("directories", "cannot be judged without the account", "see account", essential=False)
    # Disks under root are opened by the daemon and handed over; sockets under run are reached by path.
    for directory in reversed((Path(settings.run), *Path(settings.run).parents)):
        here = host.path(directory)
        if here.exists() and not user.may(here.stat(), 1):
            return missing("directories", f"{user.name} cannot pass through {directory}", f"chmod o+x {directory}")
    return found("directories", f"{user.name} can reach {settings.run}")


def disk(host: Host, settings: Settings) -> Capability:
    """Whether there is room for images and pods."""
    try:
        free = host.free_bytes(host.nearest(settings.root))
    except OSError as error:
        return missing("disk", f"{settings.root}: {error.strerror}", "set root to a directory on a disk")
    why = f"{free / GIB:.1f} GiB free for {settings.root}"
    if free < DISK_NEEDED:
        return missing("disk", why, "free some space, or set root to a larger disk")
    if free < DISK_WANTED:
        return degraded("disk", why, f"images and pods' disks want {DISK_WANTED // GIB} GiB or more")
    return found("disk", why)


def memory(host: Host, settings: Settings) -> Capability:
    """Whether there is memory for VMs."""
    text = host.read("/proc/meminfo") or ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    words = fields.get("MemAvailable", "").split()
    if not words or not words[0].isdecimal():
        return degraded("memory", "/proc/meminfo does not tell", "mount /proc")
    available = int(words[0]) * 1024
    pods = available // ((settings.guest.default_memory_mib + settings.guest.overhead_memory_mib) * 2**20)
    why = f"{available / GIB:.1f} GiB available, room for {pods} pods of the default size"
    if available < MEMORY_WANTED or pods == 0:
        return degraded("memory", why, "lower guest.default_memory_mib, or free some memory")
    return found("memory", why)


def open_files(host: Host, settings: Settings) -> Capability:
    """Whether the daemon may open enough files."""
    limit = host.open_files
    # RLIM_INFINITY is -1 in Python.
    if 0 <= limit < OPEN_FILES_WANTED:
        return degraded(
            "open files",
            f"the limit is {limit}; each pod takes a few dozen",
            f"LimitNOFILE={OPEN_FILES_WANTED} in the unit file, or ulimit -n {OPEN_FILES_WANTED}",
        )
    return found("open files", "unlimited" if limit < 0 else f"the limit is {limit}")


def inotify(host: Host, settings: Settings) -> Capability:
    """Whether many pods can watch files."""
    text = (host.read("/proc/sys/fs/inotify/max_user_instances") or "").strip()
    if not text.isdecimal():
        return degraded("inotify", "the kernel does not tell its limits", "mount /proc")
    if int(text) < INOTIFY_INSTANCES_WANTED:
        return degraded(
            "inotify",
            f"{text} instances a user",
            f"sysctl fs.inotify.max_user_instances={INOTIFY_INSTANCES_WANTED}",
        )
    return found("inotify", f"{text} instances a user")


CHECKS: tuple[Check, ...] = (root, account, directories, disk, memory, open_files, inotify)
