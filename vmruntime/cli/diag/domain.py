"""What libvirt has of a pod's machine, where it runs it."""

from __future__ import annotations

from pathlib import Path

from vmruntime.cli.context import App
from vmruntime.cli.diag.bundle import Bundle

SYSTEM = "qemu:///system"
SYSTEM_LOGS = Path("/var/log/libvirt/qemu")


def collect_domain(bundle: Bundle, app: App, place: str, pod_id: str) -> None:
    """Add the domain's XML and libvirt's log of it; a pod that libvirt does not run has neither.

    A machine is called NAMESPACE-POD-ID there, with eight digits of the id.
    """
    uri, suffix = _uri(app), f"-{pod_id[:8]}"
    root = uri.partition("?root=")[2]
    if root:
        # libvirt inside the daemon: nobody else can ask it, but what it keeps are files.
        for path in sorted(Path(root).glob(f"**/qemu/*{suffix}.*")):
            if path.suffix in (".xml", ".log"):
                bundle.file(f"{place}/libvirt-{path.parents[1].name}-{path.name}", path)
        return
    if bundle.tools.which("virsh") is None:
        return
    listed = bundle.tools.run(["virsh", "-q", "-r", "-c", uri, "list", "--all", "--name"]) or ""
    for name in (line.strip() for line in listed.splitlines()):
        if name.endswith(suffix):
            virsh = ["virsh", "-r", "-c", uri]
            bundle.output(f"{place}/domain.xml", [*virsh, "dumpxml", name], [*virsh, "domstate", "--reason", name])
            bundle.file(f"{place}/libvirt.log", bundle.tools.path(SYSTEM_LOGS / f"{name}.log"))


def _uri(app: App) -> str:
    """Return libvirt's URI: the configured one, that which the daemon has chosen, or the usual one."""
    if configured := app.settings.hypervisor.libvirt_uri:
        return configured
    try:
        return (app.paths.run / "libvirt" / "uri").read_text().strip() or SYSTEM
    except OSError:
        return SYSTEM
