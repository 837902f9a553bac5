"""`vmruntime trace`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import click
from rich.text import Text

from vmruntime.cli import options
from vmruntime.cli.client import Client
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.lookup import Inventory, find_gone
from vmruntime.cli.render import console, print_json, timestamp
from vmruntime.cli.waterfall import Line, charts, lines, plain, rows
from vmruntime.errors import NotFound
from vmruntime.generated import maintenance_pb2 as own
from vmruntime.ids import short_id

PIPE_WIDTH = 120
"""Where stdout is no terminal and COLUMNS is not set."""


@click.command(short_help="Show where the time of a pod's start went.")
@options.output("text", "json")
@click.argument("pod")
@pass_app
def trace(app: App, output: str, pod: str) -> None:
    """Show what the calls on a pod did: each part's start and duration in milliseconds, and bars beside each other.

    The daemon keeps the last calls on each pod in memory, since it started. Of pods that were removed or did not start
    it keeps the last few; of several of one name the newest is meant.
    """
    client = app.connect()
    found = _find(client, pod)
    request = own.GetPodTraceRequest(pod_sandbox_id=found.pod_sandbox_id)
    calls = client.call(client.traces.GetPodTrace, request).calls
    if output == "json":
        print_json({**_pod(found), "calls": [_call(one) for one in calls]})
        return
    if not calls:
        raise NotFound(
            f"no calls on pod {found.name} ({short_id(found.pod_sandbox_id)}) are known",
            remedy="the daemon has been restarted since, or has dropped them for newer ones",
        )
    _print(found, calls)


def _find(client: Client, text: str) -> own.TracedPod:
    """Return the pod that is meant, else one that is gone."""
    try:
        pod = Inventory.fetch(client).find_pod(text)
    except NotFound:
        traced = client.call(client.traces.ListTracedPods, own.ListTracedPodsRequest()).pods
        return find_gone(text, traced)
    metadata = pod.metadata
    return own.TracedPod(pod_sandbox_id=pod.id, name=metadata.name, namespace=metadata.namespace, uid=metadata.uid)


def _print(pod: own.TracedPod, calls: Sequence[own.TracedCall]) -> None:
    shown = console()
    width = shutil.get_terminal_size((PIPE_WIDTH, 24)).columns
    gone = ", which is gone" if pod.gone else ""
    shown.print(Text(plain(f"pod {pod.name} ({short_id(pod.pod_sandbox_id)}){gone}; milliseconds")), soft_wrap=True)
    for chart in charts(calls):
        shown.print()
        shown.print(Text(timestamp(chart[0].started_at) or "", style="dim"))
        for line in lines(rows(chart), width):
            shown.print(_styled(line), soft_wrap=True)
            if line.row.error:
                indent = "  " * line.row.depth
                shown.print(Text(plain(f"{indent}! {line.row.error}"), style="red"), soft_wrap=True)
        if left_out := sum(call.left_out for call in chart):
            shown.print(f"{left_out} parts more were not kept")


def _styled(line: Line) -> Text:
    row = line.row
    bar = "red" if row.error else "yellow" if row.going_on else "green"
    text = Text(plain(line.text), style="" if row.depth else "bold")
    return text.append(" ").append(plain(line.bar), style=bar)


def _pod(pod: own.TracedPod) -> dict[str, Any]:
    return {
        "id": pod.pod_sandbox_id, "name": pod.name, "namespace": pod.namespace, "uid": pod.uid, "gone": pod.gone
    }  # fmt: skip


def _call(call: own.TracedCall) -> dict[str, Any]:
    return {
        "started_at": timestamp(call.started_at),
        "container_id": call.container_id or None,
        "container_name": call.container_name or None,
        "parts_left_out": call.left_out,
        **_part(call.whole),
    }


def _part(part: own.TracedPart) -> dict[str, Any]:
    return {
        "name": part.name,
        "start_ms": part.start_ns / 1e6,
        "duration_ms": part.duration_ns / 1e6,
        "going_on": part.going_on,
        "error": part.error or None,
        "attributes": dict(sorted(part.attributes.items())),
        "parts": [_part(one) for one in part.parts],
    }
