"""What a container's first process is started with."""

from __future__ import annotations

import posixpath

from vmruntime.errors import InvalidArgument
from vmruntime.model.container import ContainerSpec
from vmruntime.model.image import ImageConfig

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def arguments(container: ContainerSpec, image: ImageConfig) -> list[str]:
    """Return argv by Kubernetes' rule.

    `command` replaces the image's entrypoint and drops its cmd; `args` replaces cmd.

    Raises:
        InvalidArgument: Neither the container nor the image says what to run.
    """
    if container.command:
        argv = [*container.command, *container.args]
    else:
        argv = [*image.entrypoint, *(container.args or image.cmd)]
    if not argv or not argv[0]:
        raise InvalidArgument(
            "no command specified: neither the container nor its image names one",
            remedy="set command in the container, or ENTRYPOINT or CMD in the image",
        )
    return argv


def environment(container: ContainerSpec, image: ImageConfig, hostname: str) -> list[str]:
    """Return NAME=value strings: defaults, then the image's, then the container's; a later one wins in its place."""
    found = {"PATH": _PATH, "HOSTNAME": hostname}
    if container.tty:
        found["TERM"] = "xterm"
    for entry in image.env:
        name, equals, value = entry.partition("=")
        # An entry without "=" means nothing to a process; Docker drops such a one too.
        if name and equals and "\0" not in entry:
            found[name] = value
    found.update(container.envs)
    return [f"{name}={value}" for name, value in found.items()]


def directory(container: ContainerSpec, image: ImageConfig) -> str:
    """Return the absolute working directory; an image's may be written relative to the root."""
    return posixpath.join("/", container.working_dir or image.working_dir)
