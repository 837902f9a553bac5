"""The options of `run` that are of VMs alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vmruntime.cli.quantities import Memory
from vmruntime.cli.vmspec import VmOptions

_FILE = click.Path(dir_okay=False, path_type=Path)
_OPTIONS = (
    click.option("--vm", is_flag=True, help="IMAGE is of a virtual machine, which is booted as it is."),
    click.option(
        "--ssh-key", multiple=True, type=_FILE, metavar="FILE",
        help="VM: public keys that may log in; repeatable. Default: ~/.ssh/id_*.pub, where there are some.",
    ),
    click.option("--no-ssh-key", is_flag=True, help="VM: give it no public key, not this user's own either."),
    click.option("--user-data", type=_FILE, metavar="FILE", help="VM: cloud-config, or a script, for cloud-init."),
    click.option("--root-size", type=Memory(), default=0, metavar="SIZE", help="VM: size of its root disk, such as 20G."),
    click.option("--firmware", type=click.Choice(["bios", "uefi"]), help="VM: what starts its boot loader."),
    click.option("--disk-driver", type=click.Choice(["scsi", "virtio"]), help="VM: how it sees its disks."),
    click.option("--vnc", is_flag=True, help="VM: give it a screen, for `vmruntime vnc`."),
    click.option("--tpm", is_flag=True, help="VM: give it a TPM; needs swtpm."),
)  # fmt: skip


def vm_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command with --kind; its function takes what they say as `vm`, None if it is no VM."""

    @functools.wraps(function)
    def gathered(*args: Any, vm: bool, kind: str | None, **values: Any) -> None:
        options = {name: values.pop(name) for name in _NAMES}
        if vm and kind not in (None, "image"):
            raise click.UsageError(f"--vm and --kind {kind} exclude each other")
        is_vm = vm or kind == "image"
        if not is_vm:
            _refuse(options)
        kind = "image" if is_vm else kind
        return function(*args, vm=_vm_options(**options) if is_vm else None, kind=kind, **values)

    made: Callable[..., None] = gathered
    for option in reversed(_OPTIONS):
        made = option(made)
    return made


_NAMES = ("ssh_key", "no_ssh_key", "user_data", "root_size", "firmware", "disk_driver", "vnc", "tpm")


def _refuse(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value:
            raise click.UsageError(
                f"--{name.replace('_', '-')} means nothing without --vm: the image is of a container"
            )


def _vm_options(
    *,
    ssh_key: tuple[Path, ...],
    no_ssh_key: bool,
    user_data: Path | None,
    root_size: int,
    firmware: str | None,
    disk_driver: str | None,
    vnc: bool,
    tpm: bool,
) -> VmOptions:
    if ssh_key and no_ssh_key:
        raise click.UsageError("--ssh-key and --no-ssh-key exclude each other")
    return VmOptions(
        ssh_keys=ssh_key if ssh_key or no_ssh_key else None,
        user_data=user_data,
        root_size=root_size,
        firmware=firmware or "",
        disk_driver=disk_driver or "",
        vnc=vnc,
        tpm=tpm,
    )


def refuse_process_options(**given: object) -> None:
    """Refuse what is of processes, and a VM that boots its image has none to start.

    Raises:
        click.UsageError: With the option and what does it instead.
    """
    for name, value in given.items():
        if value:
            shown = "CMD" if name == "cmd" else f"--{name}"
            raise click.UsageError(
                f"{shown} means nothing with --vm, which boots its image: say it to cloud-init by --user-data"
            )
