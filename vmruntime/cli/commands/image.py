"""`vmruntime image`."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import click

from vmruntime.cli import images, options
from vmruntime.cli.context import App, pass_app
from vmruntime.cli.quantities import Duration
from vmruntime.cli.render import add_row, ago, console, plain, print_json, size, table, timestamp
from vmruntime.generated import cri_pb2, maintenance_pb2
from vmruntime.images.convert import convert as converted
from vmruntime.images.disk_header import DiskFormat
from vmruntime.images.endpoint import redacted


@click.group()
def image() -> None:
    """Show, pull, import, remove and clean up images."""


@image.command("list")
@options.output("table", "json")
@click.option("-q", "--quiet", is_flag=True, help="Print the full ids and nothing else.")
@pass_app
def list_(app: App, output: str, quiet: bool) -> None:
    """Show the images on this machine."""
    client = app.connect()
    found = client.call(client.image.ListImages, cri_pb2.ListImagesRequest()).images
    found_sorted = sorted(found, key=lambda item: (list(item.repo_tags) or list(item.repo_digests), item.id))
    if quiet:
        for item in found_sorted:
            click.echo(item.id)
        return
    uses = images.uses(client)
    if output == "json":
        print_json([{**plain(item), **_use(uses.get(item.id))} for item in found_sorted])
        return
    # Most machines have none: the column is there for those that do.
    disks = {item.id: images.disk(item) for item in found_sorted}
    extra = ["DISK"] if any(disks.values()) else []
    shown = table("IMAGE", "TAG", "IMAGE ID", "SIZE", *extra, "LAST USED")
    now = time.time_ns()
    for item in found_sorted:
        last_used = _last_used(item, uses.get(item.id), now)
        cells = [
            images.short_image_id(item.id),
            size(item.size),
            *([disks[item.id] or "-"] if extra else []),
            last_used,
        ]
        for name, tag in _names(item):
            add_row(shown, name, tag, *cells)
    console().print(shown)


@image.command()
@click.option("-u", "--username", default="", help="Account at the registry; its password is read from stdin.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the id.")
@click.argument("reference")
@pass_app
def pull(app: App, username: str, quiet: bool, reference: str) -> None:
    """Pull an image from its registry.

    Layers that are on this machine already are not fetched again. The disk image of a virtual machine can be given by
    its URL.

    \b
    Example, with a password that does not show in the list of processes:
      vmruntime image pull -u me registry.example/app:1 <password-file
    """  # noqa: D301
    auth = None
    if username:
        # Asked for where there is a terminal; a pipe or file gives its first line.
        password = click.prompt("Password", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline()
        auth = cri_pb2.AuthConfig(username=username, password=str(password).rstrip("\r\n"))
    _pull(app, images.local_source(reference) or reference, auth, quiet)


@image.command("import")
@click.option("-q", "--quiet", is_flag=True, help="Print only the id.")
@click.argument("source")
@pass_app
def import_(app: App, quiet: bool, source: str) -> None:
    """Take an image from this machine's disk.

    SOURCE is an OCI image layout (a directory), an archive of one, what `docker save` wrote, or the disk of a virtual
    machine (qcow2, vmdk, or a file named .raw or .img). One that holds several images needs its transport and a name:
    oci:DIRECTORY:NAME, oci-archive:FILE:NAME, docker-archive:FILE:NAME. The daemon reads it, so it must be on the daemon's machine.
    """
    _pull(app, images.recognise(source), None, quiet)


@image.command()
@click.option("--format", "form", type=click.Choice(["qcow2", "raw", "vmdk"]), default="qcow2", show_default=True)
@click.option("--compress", is_flag=True, help="Make it small; VMs read it more slowly.")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@pass_app
def convert(app: App, form: str, compress: bool, source: Path, target: Path) -> None:
    """Make the disk image SOURCE into TARGET, of another format.

    SOURCE is checked first, as an image that is pulled would be: one that refers to other files of this machine is
    refused. No daemon is needed.
    """
    limit = app.settings.images.max_disk_gib * 1024**3
    asyncio.run(converted(source, target, DiskFormat(form), compress=compress, max_virtual_size=limit))


@image.command()
@click.argument("references", metavar="IMAGE...", nargs=-1, required=True)
@pass_app
def rm(app: App, references: tuple[str, ...]) -> None:
    """Remove images, by name or id; containers that run from them keep what they need."""
    client = app.connect()
    # All are looked up before any is touched: a typing mistake removes nothing.
    found = [images.require(client, reference) for reference in references]
    for item in found:
        request = cri_pb2.RemoveImageRequest(image=cri_pb2.ImageSpec(image=item.id))
        client.call(client.image.RemoveImage, request)
        click.echo(item.id)


@image.command()
@click.option(
    "--older-than",
    type=Duration(),
    required=True,
    help="How long nobody may have used an image: 12h, 7d; 0 takes every image that is not in use.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option("-q", "--quiet", is_flag=True, help="Print the full ids and nothing else.")
@pass_app
def prune(app: App, older_than: int, dry_run: bool, quiet: bool) -> None:
    """Remove images that nobody has used for some time.

    Pinned images stay, and those of containers, running or not. An image counts as used when it is pulled, and from a
    container's creation to its removal.
    """
    client = app.connect()
    request = maintenance_pb2.PruneImagesRequest(unused_seconds=older_than, dry_run=dry_run)
    pruned = client.call(client.maintenance.PruneImages, request)
    if quiet:
        for item in pruned.images:
            click.echo(item.id)
        return
    if pruned.images:
        shown = table("IMAGE", "TAG", "IMAGE ID", "LAST USED")
        now = time.time_ns()
        for item in pruned.images:
            for name, tag in _names(item):
                add_row(shown, name, tag, images.short_image_id(item.id), ago(item.last_used_at, now))
        console().print(shown)
    verb = "would be removed" if dry_run else "removed"
    count = f"{len(pruned.images)} image{'' if len(pruned.images) == 1 else 's'}"
    click.echo(f"{count} {verb}, {size(pruned.freed_bytes)}", err=True)


def _use(use: maintenance_pb2.ImageUse | None) -> dict[str, object]:
    """Return what JSON shows of an image's use."""
    return {"last_used_at": timestamp(use.last_used_at) if use else None, "in_use": use.in_use if use else None}


def _last_used(item: cri_pb2.Image, use: maintenance_pb2.ImageUse | None, now: int) -> str:
    if use is None:
        return "-"
    when = "in use" if use.in_use else ago(use.last_used_at, now)
    return f"{when}, pinned" if item.pinned else when


def _pull(app: App, reference: str, auth: cri_pb2.AuthConfig | None, quiet: bool) -> None:
    client = app.connect()
    began = time.monotonic()
    pulled = images.pull(client, reference, auth=auth)
    if not quiet:
        click.echo(f"{redacted(reference)}: here after {time.monotonic() - began:.1f} s", err=True)
    click.echo(pulled)


def _names(item: cri_pb2.Image | maintenance_pb2.PrunedImage) -> list[tuple[str, str]]:
    """Return the rows an image has: one a tag, else one a digest."""
    if item.repo_tags:
        return [(tag.rpartition(":")[0], tag.rpartition(":")[2]) for tag in item.repo_tags]
    return [(digest.partition("@")[0], "<none>") for digest in item.repo_digests] or [("<none>", "<none>")]
