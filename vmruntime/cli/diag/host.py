"""What is so on the machine, whatever pod it is about."""

from __future__ import annotations

import dataclasses

import msgspec

from vmruntime import __version__
from vmruntime.cli.client import Client
from vmruntime.cli.context import App
from vmruntime.cli.diag import masking
from vmruntime.cli.diag.bundle import Bundle
from vmruntime.cli.doctor import examine
from vmruntime.cli.render import info, plain
from vmruntime.generated import cri_pb2
from vmruntime.hypervisor.devices import ARCHITECTURES

ANSWER_SECONDS = 10.0
FILES = ("/etc/os-release", "/proc/version", "/proc/cpuinfo", "/proc/meminfo", "/proc/cgroups", "/proc/self/mountinfo")


def collect(bundle: Bundle, app: App) -> None:
    """Add everything of the machine."""
    bundle.json("host/config.json", masking.settings(msgspec.to_builtins(app.settings)))
    findings = examine(bundle.tools, app.settings)
    bundle.json("host/doctor.json", [{**dataclasses.asdict(one), "state": one.state.value} for one in findings])
    _daemon(bundle, app)
    _programs(bundle, app)
    for path in FILES:
        text = bundle.tools.read(path)
        if text is not None:
            bundle.text(f"host/{path.strip('/').replace('/', '-')}", text)
    bundle.output("host/uname.txt", ["uname", "-a"], ["uptime"], ["df", "-h", app.settings.root, app.settings.run])
    bundle.output("host/network.txt", ["ip", "-d", "addr"], ["ip", "route", "show", "table", "all"], ["ip", "netns"])


def _daemon(bundle: Bundle, app: App) -> None:
    versions: dict[str, object] = {"client": __version__, "daemon": None}
    with bundle.trying("host/version.json"), Client.connect(app.socket) as client:
        answer = client.call(client.runtime.Version, cri_pb2.VersionRequest(version="v1"), timeout=ANSWER_SECONDS)
        versions["daemon"] = plain(answer)
        request = cri_pb2.StatusRequest(verbose=True)
        status = client.call(client.runtime.Status, request, timeout=ANSWER_SECONDS)
        shown = {"status": plain(status.status), "info": masking.settings(info(status.info))}
        bundle.json("host/status.json", shown)
    bundle.json("host/version.json", versions)


def _programs(bundle: Bundle, app: App) -> None:
    architecture = ARCHITECTURES.get(bundle.tools.machine)
    qemu = app.settings.hypervisor.qemu or (architecture.qemu if architecture is not None else "qemu-system-x86_64")
    names = [qemu, "qemu-img", "libvirtd", "virsh", "skopeo", "curl", "swtpm", "dnsmasq", "zstd", "crun"]
    # Most are not needed on every machine; doctor says which are missing.
    present = [name for name in names if bundle.tools.which(name) is not None]
    bundle.output("host/programs.txt", *([name, "--version"] for name in present))
