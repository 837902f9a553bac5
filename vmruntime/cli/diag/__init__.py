"""What a bug report needs: everything about pods and their machine that tells no secret, in one archive."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmruntime.cli.context import App
from vmruntime.cli.diag import host, pods
from vmruntime.cli.diag.bundle import Bundle
from vmruntime.cli.doctor.host import Host
from vmruntime.cli.lookup import Inventory
from vmruntime.errors import NotFound, VmruntimeError

README = """\
What `vmruntime diag` found on this machine; for bug reports.

host/            versions, configuration, what `vmruntime doctor` says, processes
pods/NAME-ID/    what the daemon tells of a pod and its containers; the logs of its VM and helpers (the last 1 MiB of
                 each), their command lines, its network, its disks, and its domain where libvirt runs the VM
errors.txt       what could not be found out, and why

Left out on purpose: environment variables, commands and arguments of containers, user-data and every other annotation
that may hold a secret, seed ISOs, images and disks, the logs of containers of container pods.

The console of an image pod (console.log) is what its guest has printed, and command lines of processes are as they are:
look through them before you send this to anybody.

The daemon's own log is not here, since only this machine's administrator knows where it goes. With systemd:
    journalctl -u vmruntime --since "1 hour ago"
"""


def collect(app: App, target: str, path: Path, tools: Host) -> Sequence[str]:
    """Write an archive of everything about one pod, or about all.

    Args:
        app: The global options.
        target: A pod's name, id, or start of an id; empty: all pods.
        path: Of the archive; a file that is there is refused.
        tools: This machine.

    Returns:
        What could not be found out.

    Raises:
        NotFound: There is no such pod.
        AlreadyExists, PermissionDenied: The archive cannot be written.
    """
    with Bundle(path, tools) as bundle:
        bundle.text("README.txt", README)
        found = _pods(app, target, bundle)
        host.collect(bundle, app)
        for pod in found:
            pods.collect(bundle, app, pod)
        if bundle.errors:
            bundle.text("errors.txt", "\n".join(bundle.errors) + "\n")
        return bundle.errors


def _pods(app: App, target: str, bundle: Bundle) -> list[pods.Subject]:
    """Return the pods that are meant: those the daemon knows or, without one, those that have a directory."""
    try:
        client = app.connect()
        inventory = Inventory.fetch(client)
    except VmruntimeError as error:
        bundle.note("the daemon", error.message)
        return _directories(app, target)
    chosen = [inventory.find_pod(target)] if target else inventory.pods
    return [pods.Subject(pod.id, pod.metadata.name, client, tuple(inventory.of_pod(pod.id))) for pod in chosen]


def _directories(app: App, target: str) -> list[pods.Subject]:
    try:
        names = sorted(path.name for path in app.paths.sandboxes.iterdir())
    except OSError:
        names = []
    chosen = [name for name in names if name.startswith(target[: len(name)])]
    if target and len(chosen) != 1:
        raise NotFound(
            f"{target!r} is not the start of a pod's id that has a directory in {app.paths.sandboxes}",
            remedy="names of pods are known to the daemon only: start it, or give an id",
        )
    return [pods.Subject(name) for name in chosen]
