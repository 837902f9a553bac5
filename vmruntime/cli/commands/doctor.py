"""`vmruntime doctor`."""

from __future__ import annotations

import dataclasses

import click
from rich.text import Text

from vmruntime.cli import options
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.doctor import examine
from vmruntime.cli.doctor.host import Host
from vmruntime.cli.doctor.report import Capability, State
from vmruntime.cli.render import console, print_json, printable

_STYLES = {State.FOUND: "green", State.DEGRADED: "yellow", State.MISSING: "red"}


@click.command(short_help="Say what this machine has and lacks.")
@options.output("text", "json")
@pass_app
@click.pass_context
def doctor(ctx: click.Context, app: App, output: str) -> None:
    """Say what this machine has and lacks, and what to do about it.

    Ends with exit status 1 when something is missing without which pods cannot run.
    """
    capabilities = examine(Host(), app.settings)
    if output == "json":
        print_json([{**dataclasses.asdict(item), "state": item.state.value} for item in capabilities])
    else:
        _print(capabilities)
    ctx.exit(1 if any(item.blocking for item in capabilities) else 0)


def _print(capabilities: list[Capability]) -> None:
    out = console()
    width = max(len(item.name) for item in capabilities)
    for item in capabilities:
        line = Text.assemble(
            (f"{item.state.value:<9}", _STYLES[item.state]), f"{item.name:<{width}}  {printable(item.why)}"
        )
        out.print(line, soft_wrap=True)
        if item.remedy:
            out.print(Text(f"{'':<9}{'':<{width}}  → {printable(item.remedy)}"), soft_wrap=True)
    blocking = [item.name for item in capabilities if item.blocking]
    better = [item.name for item in capabilities if item.state is not State.FOUND and not item.blocking]
    if blocking:
        verdict = f"Pods cannot run here: {', '.join(blocking)}."
    else:
        verdict = "Pods can run here." + (f" It could be better: {', '.join(better)}." if better else "")
    out.print(Text(f"\n{verdict}"), soft_wrap=True)
