"""`vmruntime completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from vmruntime.errors import Internal


@click.command(short_help="Print a shell completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that completes vmruntime's commands and options in a shell.

    \b
    bash: vmruntime completion bash >/etc/bash_completion.d/vmruntime
    zsh:  vmruntime completion zsh >"${fpath[1]}/_vmruntime"
    fish: vmruntime completion fish >~/.config/fish/completions/vmruntime.fish
    """  # noqa: D301
    kind = get_completion_class(shell)
    if kind is None:
        raise Internal(f"click has no completion for {shell}")
    click.echo(kind(ctx.find_root().command, {}, "vmruntime", "_VMRUNTIME_COMPLETE").source())
