"""`vmruntime port-forward`."""

from __future__ import annotations

import asyncio

import click

from vmruntime.cli.context import App, pass_app
from vmruntime.cli.forwarding import Forward, forward
from vmruntime.cli.lookup import Inventory
from vmruntime.cli.render import printable
from vmruntime.cli.sessions import tls_context
from vmruntime.generated import cri_pb2


@click.command("port-forward", short_help="Lead ports of this machine to ports of a pod.")
@click.option("--address", default="127.0.0.1", show_default=True, metavar="IP", help="Where to listen.")
@click.argument("pod")
@click.argument("ports", nargs=-1, required=True, metavar="[LOCAL:]PORT...")
@pass_app
def port_forward(app: App, address: str, pod: str, ports: tuple[str, ...]) -> None:
    """Lead ports of this machine to ports of a pod, until Ctrl-C.

    The pod's side is its loopback, so that servers are reached which listen there only. LOCAL is the port here, the
    same when left out; `:PORT` takes any free one.

    \b
    Example:
      vmruntime port-forward web 8080:80 :5432
    """  # noqa: D301
    forwards = [Forward.parse(text) for text in ports]
    client = app.connect()
    found = Inventory.fetch(client).find_pod(pod)
    url = client.call(client.runtime.PortForward, cri_pb2.PortForwardRequest(pod_sandbox_id=found.id)).url

    def complain(text: str) -> None:
        click.echo(f"vmruntime: {printable(text)}", err=True)

    asyncio.run(forward(url, address, forwards, click.echo, complain, tls_context(app.settings.streaming)))
