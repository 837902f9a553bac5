"""`vmruntime inspect`."""

from __future__ import annotations

from typing import Any

import click

from vmruntime.cli import images
from vmruntime.cli.client import Client
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.lookup import Inventory
from vmruntime.cli.render import info, plain, print_json
from vmruntime.errors import NotFound
from vmruntime.generated import cri_pb2


@click.command(short_help="Print everything known, as JSON.")
@click.argument("targets", metavar="POD|CONTAINER|IMAGE...", nargs=-1, required=True)
@pass_app
def inspect(app: App, targets: tuple[str, ...]) -> None:
    """Print everything the daemon tells of pods, containers or images, as a JSON array."""
    client = app.connect()
    inventory = Inventory.fetch(client)
    print_json([_inspect(client, inventory, text) for text in targets])


def _inspect(client: Client, inventory: Inventory, text: str) -> dict[str, Any]:
    try:
        target = inventory.find(text)
    except NotFound:
        image = images.find(client, text)
        if image is None:
            raise
        return _image(client, image)
    if isinstance(target, cri_pb2.PodSandbox):
        request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=target.id, verbose=True)
        answer = client.call(client.runtime.PodSandboxStatus, request)
        containers = [_container(client, container.id) for container in inventory.of_pod(target.id)]
        return {"type": "pod", "status": plain(answer.status), "info": info(answer.info), "containers": containers}
    return _container(client, target.id)


def _container(client: Client, container_id: str) -> dict[str, Any]:
    request = cri_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    answer = client.call(client.runtime.ContainerStatus, request)
    return {"type": "container", "status": plain(answer.status), "info": info(answer.info)}


def _image(client: Client, image: cri_pb2.Image) -> dict[str, Any]:
    request = cri_pb2.ImageStatusRequest(image=cri_pb2.ImageSpec(image=image.id), verbose=True)
    answer = client.call(client.image.ImageStatus, request)
    return {"type": "image", "status": plain(answer.image), "info": info(answer.info)}
