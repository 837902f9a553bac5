"""`vmruntime guest`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import click

import vmruntime
from vmruntime.cli.context import App, pass_app
from vmruntime.errors import FailedPrecondition, Internal, InvalidArgument, NotFound

INSTALL = Path("images/initramfs/install.sh")


@click.group(short_help="Build or describe the guest of pods.")
def guest() -> None:
    """Build or describe the guest that container pods boot."""


@guest.command()
@click.option(
    "--source",
    type=click.Path(file_okay=False, path_type=Path),
    help="vmruntime's source tree, when it is neither here nor where this program comes from.",
)
@pass_app
def build(app: App, source: Path | None) -> None:
    """Build the guest's kernel, agent and initial file system from source, and install them.

    Runs `make guest` in the source tree; `make kernel` there first gives the minimal kernel, which boots faster.
    Pods that run keep the guest they were started with.
    """
    tree = _source_tree(source)
    make = shutil.which("make")
    if make is None:
        raise FailedPrecondition("make is not installed", remedy="apt install make")
    directory = app.settings.guest_directory
    # The second puts it where this configuration wants it; make's own choice is the default directory.
    for argv in ([make, "-C", str(tree), "guest"], [str(tree / INSTALL), str(directory)]):
        try:
            status = subprocess.run(argv, check=False).returncode
        except OSError as error:
            raise Internal(f"{argv[0]} cannot be run: {error.strerror}") from error
        if status != 0:
            words = f"{' '.join(argv)} failed with status {status}"
            raise Internal(words, remedy="the lines above say why")
    click.echo(f"the guest for new pods is built; vmruntime guest info describes it ({directory})", err=True)


@guest.command()
@pass_app
def info(app: App) -> None:
    """Print what is known of the installed guest (guest.json)."""
    file = app.settings.guest_directory / "guest.json"
    try:
        click.echo(file.read_text(encoding="utf-8"), nl=False)
    except FileNotFoundError:
        raise NotFound(f"there is no guest: {file} does not exist", remedy="vmruntime guest build") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Internal(f"{file} cannot be read: {error}") from error


def _source_tree(given: Path | None) -> Path:
    """Return the source tree: the one given, else one at or above here or this program."""
    if given is not None:
        if not _is_source_tree(given):
            raise InvalidArgument.field("--source", str(given), "is not vmruntime's source tree")
        return given
    for start in (Path.cwd(), Path(vmruntime.__file__).parent):
        for directory in (start, *start.parents):
            if _is_source_tree(directory):
                return directory
    raise FailedPrecondition(
        "the guest is built from vmruntime's source, which is not here", remedy="give its directory: --source DIR"
    )


def _is_source_tree(directory: Path) -> bool:
    return (directory / "Makefile").is_file() and (directory / "guest-agent" / "Cargo.toml").is_file()
