"""`vmruntime list`."""

from __future__ import annotations

import time
from typing import Any

import click

from vmruntime.cli import options
from vmruntime.cli.client import Client
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.follow import status_of
from vmruntime.cli.lookup import Inventory, pod_kinds
from vmruntime.cli.render import add_row, ago, console, print_json, table, timestamp
from vmruntime.errors import NotFound
from vmruntime.generated import cri_pb2
from vmruntime.ids import short_id


@click.command("list", short_help="Show all pods and their containers.")
@options.output("table", "json")
@click.option("-q", "--quiet", is_flag=True, help="Print the full ids of the pods and nothing else.")
@click.option("--running", is_flag=True, help="Leave out what does not run.")
@click.option("--no-trunc", is_flag=True, help="Show full ids.")
@pass_app
def list_(app: App, output: str, quiet: bool, running: bool, no_trunc: bool) -> None:
    """Show all pods, newest first, each with its containers below it."""
    client = app.connect()
    inventory = Inventory.fetch(client)
    pods = sorted(inventory.pods, key=lambda pod: pod.created_at, reverse=True)
    if running:
        pods = [pod for pod in pods if pod.state == cri_pb2.SANDBOX_READY]
    if quiet:
        for pod in pods:
            click.echo(pod.id)
        return
    kinds = pod_kinds(client)
    shown = [_pod(client, pod, inventory, running, kinds.get(pod.id)) for pod in pods]
    if output == "json":
        print_json([{**pod, "created_at": timestamp(pod["created_at"])} for pod in shown])
        return
    _print_table(shown, no_trunc)


def _pod(
    client: Client, pod: cri_pb2.PodSandbox, inventory: Inventory, running: bool, kind: str | None
) -> dict[str, Any]:
    containers = [
        _container(client, container)
        for container in inventory.of_pod(pod.id)
        if not running or container.state == cri_pb2.CONTAINER_RUNNING
    ]
    return {
        "id": pod.id,
        "name": pod.metadata.name,
        "namespace": pod.metadata.namespace,
        "uid": pod.metadata.uid,
        "attempt": pod.metadata.attempt,
        "kind": kind,
        "state": "ready" if pod.state == cri_pb2.SANDBOX_READY else "stopped",
        "ips": _addresses(client, pod),
        "created_at": pod.created_at,
        "runtime_handler": pod.runtime_handler,
        "labels": dict(pod.labels),
        "annotations": dict(pod.annotations),
        "containers": containers,
    }


def _addresses(client: Client, pod: cri_pb2.PodSandbox) -> list[str]:
    request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod.id)
    try:
        network = client.call(client.runtime.PodSandboxStatus, request).status.network
    except NotFound:
        # Removed since it was listed.
        return []
    return [ip for ip in (network.ip, *(more.ip for more in network.additional_ips)) if ip]


def _container(client: Client, container: cri_pb2.Container) -> dict[str, Any]:
    state = cri_pb2.ContainerState.Name(container.state).removeprefix("CONTAINER_").lower()
    exit_code: int | None = None
    reason = ""
    if container.state == cri_pb2.CONTAINER_EXITED:
        try:
            status = status_of(client, container.id)
            exit_code, reason = status.exit_code, status.reason
        except NotFound:
            state = "removed"
    return {
        "id": container.id,
        "name": container.metadata.name,
        "attempt": container.metadata.attempt,
        "image": container.image.user_specified_image or container.image.image,
        "image_id": container.image_id,
        "state": state,
        "exit_code": exit_code,
        "reason": reason,
        "created_at": timestamp(container.created_at),
    }


def _print_table(pods: list[dict[str, Any]], full_ids: bool) -> None:
    def identifier(text: str) -> str:
        return text if full_ids else short_id(text)

    shown = table("POD ID", "NAME", "NAMESPACE", "KIND", "STATE", "IP", "CREATED")
    now = time.time_ns()
    for pod in pods:
        add_row(
            shown, identifier(pod["id"]), pod["name"], pod["namespace"], pod["kind"] or "-", pod["state"],
            ", ".join(pod["ips"][:1]), ago(pod["created_at"], now),
        )  # fmt: skip
        for container in pod["containers"]:
            state = container["state"]
            if container["exit_code"] is not None:
                state += f" ({container['exit_code']}{_cause(container['reason'])})"
            add_row(shown, f"  {identifier(container['id'])}", container["name"], "", "", state, "", container["image"])
    console().print(shown)


def _cause(reason: str) -> str:
    # Completed and Error say no more than the number does.
    return "" if reason in ("", "Completed", "Error") else f", {reason}"
