"""The `vmruntime` command and its global options."""

from __future__ import annotations

import signal
import traceback
from pathlib import Path
from typing import IO, Any

import click

from vmruntime import __version__
from vmruntime.cli.commands.attach import attach
from vmruntime.cli.commands.completion import completion
from vmruntime.cli.commands.console import console
from vmruntime.cli.commands.cp import cp
from vmruntime.cli.commands.diag import diag
from vmruntime.cli.commands.doctor import doctor
from vmruntime.cli.commands.exec import exec_
from vmruntime.cli.commands.guest import guest
from vmruntime.cli.commands.image import image
from vmruntime.cli.commands.inspect import inspect
from vmruntime.cli.commands.list import list_
from vmruntime.cli.commands.logs import logs
from vmruntime.cli.commands.machine import pause, reset, resume
from vmruntime.cli.commands.port_forward import port_forward
from vmruntime.cli.commands.rm import rm
from vmruntime.cli.commands.run import run
from vmruntime.cli.commands.serve import serve
from vmruntime.cli.commands.ssh import ssh
from vmruntime.cli.commands.stop import stop
from vmruntime.cli.commands.trace import trace
from vmruntime.cli.commands.version import version
from vmruntime.cli.commands.vnc import vnc
from vmruntime.cli.context import App
from vmruntime.errors import VmruntimeError


class Failure(click.ClickException):
    """A failure as the user sees it: one line, and what to do about it."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the failure on stderr."""
        click.echo(f"error: {self.message}", file=file, err=True)


class Commands(click.Group):
    """The root of the commands, where every failure becomes a line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command.

        Raises:
            Failure: For everything vmruntime itself complains about; exit status 1.
        """
        try:
            return super().invoke(ctx)
        except VmruntimeError as error:
            self._trace(ctx)
            message = f"{error.message}\n  {error.remedy}" if error.remedy else error.message
            raise Failure(message) from error
        except KeyboardInterrupt:
            self._trace(ctx)
            click.echo(err=True)
            ctx.exit(128 + signal.SIGINT)

    @staticmethod
    def _trace(ctx: click.Context) -> None:
        app = ctx.find_object(App)
        if app is not None and app.debug:
            click.echo(traceback.format_exc(), err=True, nl=False)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="VMRUNTIME_CONFIG",
    help="Configuration file, instead of /etc/vmruntime/config.toml.",
)
@click.option(
    "-a",
    "--address",
    default="",
    metavar="SOCKET",
    envvar="VMRUNTIME_ADDRESS",
    help="CRI socket of the daemon, instead of the configured one.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
@click.version_option(__version__, prog_name="vmruntime", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context, config: Path | None, address: str, debug: bool) -> None:
    """Run each pod in a virtual machine of its own.

    vmruntime is a Kubernetes container runtime (CRI). `serve` runs the daemon that kubelet talks to; the other
    commands show and run pods on this machine through the same socket. `doctor` says what this machine lacks.
    """
    ctx.obj = App(config=config, address=address, debug=debug)


for command in (
    run, list_, exec_, attach, logs, port_forward, cp, ssh, stop, rm, inspect, trace, console, vnc, pause, resume, reset, image, serve,
    doctor, diag, guest, version, completion,
):  # fmt: skip
    main.add_command(command)


if __name__ == "__main__":
    main()
