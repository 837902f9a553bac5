"""`vmruntime vnc`."""

from __future__ import annotations

import asyncio
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from vmruntime.cli.client import Client
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.lookup import Inventory, describe, pod_info
from vmruntime.cli.render import printable
from vmruntime.cli.vnc import show
from vmruntime.errors import FailedPrecondition, NotFound, PermissionDenied
from vmruntime.generated import cri_pb2

VIEWERS: dict[str, Callable[[str, int], Sequence[str]]] = {
    "remote-viewer": lambda host, port: ["remote-viewer", f"vnc://{_bracketed(host)}:{port}"],
    "vncviewer": lambda host, port: ["vncviewer", f"{_bracketed(host)}::{port}"],
}
"""Programs that show a screen, in the order of our liking, and how they are called."""

ANNOTATION = "vmruntime.io/vnc"


@click.command(short_help="Show the screen of an image pod.")
@click.option("--address", default="127.0.0.1", show_default=True, metavar="IP", help="Where to listen.")
@click.option(
    "-p", "--port", type=click.IntRange(0, 65535), default=0, metavar="PORT", help="Port to listen on.  [default: any]"
)
@click.option("--viewer", is_flag=True, help="Start remote-viewer or vncviewer, whichever is installed.")
@click.argument("pod")
@pass_app
@click.pass_context
def vnc(ctx: click.Context, app: App, address: str, port: int, viewer: bool, pod: str) -> None:
    """Lead a port of this machine to the screen of an image pod, until Ctrl-C.

    The line that is printed says where a VNC viewer finds it; with --viewer one is started, and its end ends this.
    There is no password: whoever reaches the port sees the screen and types.
    """
    command = _viewer() if viewer else None
    client = app.connect()
    found = Inventory.fetch(client).find_pod(pod)
    screen = app.paths.sandbox(found.id) / "vnc.sock"
    _check(client, found, screen)

    def say(host: str, bound: int) -> None:
        click.echo(f"vnc://{_bracketed(host)}:{bound}", err=viewer)

    def complain(text: str) -> None:
        click.echo(f"vmruntime: {printable(text)}", err=True)

    ctx.exit(asyncio.run(show(screen, address, port, say, complain, command)))


def _viewer() -> Callable[[str, int], Sequence[str]]:
    for name, command in VIEWERS.items():
        if shutil.which(name) is not None:
            return command
    raise NotFound(
        f"no VNC viewer is installed: none of {', '.join(VIEWERS)}",
        remedy="apt install virt-viewer or tigervnc-viewer; or leave out --viewer and point yours at what is printed",
    )


def _check(client: Client, pod: cri_pb2.PodSandbox, screen: Path) -> None:
    """Raise FailedPrecondition, saying why, unless a VM listens there."""
    try:
        if stat.S_ISSOCK(screen.stat().st_mode):
            return
    except FileNotFoundError:
        pass
    except PermissionError:
        raise PermissionDenied(f"{screen}: permission denied", remedy="run as root") from None
    if pod_info(client, pod.id).get("kind") != "image":
        raise FailedPrecondition(f"pod {describe(pod)} has no screen: it is not of the kind image")
    if pod.annotations.get(ANNOTATION) != "true":
        raise FailedPrecondition(
            f"the VM of pod {describe(pod)} has no screen",
            remedy=f'make the pod anew with the annotation {ANNOTATION}: "true", or vmruntime run --vm --vnc',
        )
    raise FailedPrecondition(f"the VM of pod {describe(pod)} does not run")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
