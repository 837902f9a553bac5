"""What the types of the configuration cannot say: rules about paths, lengths and addresses.

A problem is returned, not raised, so that the caller can put the name of the file in front of it.
"""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from vmruntime.config.settings import Settings
from vmruntime.errors import InvalidArgument
from vmruntime.paths import Paths

SOCKET_PATH_LIMIT = 107
"""Bytes of a unix socket's path without the final NUL (unix(7))."""

SANDBOX_SOCKET_RESERVE = 24
"""Bytes kept for the names of sockets in a sandbox's directory."""

MINIMUM_ADDRESSES = 8
"""Fewer pods than this per node is a typing mistake rather than a network."""

_field = InvalidArgument.field


def problems(settings: Settings) -> Iterator[InvalidArgument]:
    """Iterate over everything in the settings that cannot work, in the order of the file."""
    yield from _paths(settings)
    yield from _socket_lengths(settings)
    yield from _cgroup(settings)
    yield from _hypervisor(settings)
    yield from _guest(settings)
    yield from _images(settings)
    yield from _network(settings)
    yield from _streaming(settings)
    if settings.metrics.address:
        yield from _address("metrics.address", settings.metrics.address)
    yield from _tracing(settings)


def _paths(settings: Settings) -> Iterator[InvalidArgument]:
    required = {
        "root": settings.root,
        "run": settings.run,
        "network.conf_dir": settings.network.conf_dir,
        "images.translations_dir": settings.images.translations_dir,
        **{f"hooks_dirs[{i}]": path for i, path in enumerate(settings.hooks_dirs)},
        **{f"cdi_spec_dirs[{i}]": path for i, path in enumerate(settings.cdi_spec_dirs)},
        **{f"network.bin_dirs[{i}]": path for i, path in enumerate(settings.network.bin_dirs)},
    }
    optional = {
        "socket": settings.socket,
        "guest.directory": settings.guest.directory,
        "network.conf_template": settings.network.conf_template,
        "images.policy": settings.images.policy,
        "images.registries_conf": settings.images.registries_conf,
        "images.registries_d": settings.images.registries_d,
        "streaming.tls_cert": settings.streaming.tls_cert,
        "streaming.tls_key": settings.streaming.tls_key,
    }
    for key, value in {**required, **{k: v for k, v in optional.items() if v}}.items():
        if not os.path.isabs(value):
            yield _field(key, value, "is not an absolute path", remedy="begin it with /")
        elif "\0" in value or ".." in Path(value).parts:
            yield _field(key, value, 'has a ".." or NUL in it', remedy="write the path out")
    if settings.root == settings.run:
        yield _field("run", settings.run, "is the same directory as root", remedy="give each its own")


def _socket_lengths(settings: Settings) -> Iterator[InvalidArgument]:
    def length(path: Path | str) -> int:
        return len(os.fsencode(path))

    if settings.socket and length(settings.socket) > SOCKET_PATH_LIMIT:
        yield _field(
            "socket",
            settings.socket,
            f"is {length(settings.socket)} bytes long",
            remedy=f"unix sockets allow {SOCKET_PATH_LIMIT}",
        )
    deepest = length(Paths(run=Path(settings.run)).sandbox("0" * 64)) + 1 + SANDBOX_SOCKET_RESERVE
    if deepest > SOCKET_PATH_LIMIT:
        longest = length(settings.run) - (deepest - SOCKET_PATH_LIMIT)
        yield _field(
            "run",
            settings.run,
            "is too long: the pods' sockets under it would not fit into a unix socket address",
            remedy=f"use a directory of at most {longest} bytes",
        )


def _cgroup(settings: Settings) -> Iterator[InvalidArgument]:
    parent = settings.cgroup_parent
    if ".." in Path(parent).parts or "\0" in parent:
        yield _field("cgroup_parent", parent, 'has a ".." or NUL in it', remedy="write the path out")
    elif settings.cgroup_driver == "cgroupfs" and not parent.startswith("/"):
        yield _field("cgroup_parent", parent, "is not an absolute cgroup path", remedy="begin it with /")


def _hypervisor(settings: Settings) -> Iterator[InvalidArgument]:
    hypervisor = settings.hypervisor
    if not hypervisor.user:
        yield _field("hypervisor.user", "", "names no account", remedy='the default is "vmruntime"')
    for key, program in (("qemu", hypervisor.qemu), ("vhost_device_vsock", hypervisor.vhost_device_vsock)):
        # A bare name is looked up on PATH; anything else must not depend on where the daemon was started.
        if "/" in program and not os.path.isabs(program):
            yield _field(
                f"hypervisor.{key}", program, "is a relative path", remedy="give a name on PATH or begin it with /"
            )
    yield from _finite("hypervisor.boot_timeout", hypervisor.boot_timeout)


def _guest(settings: Settings) -> Iterator[InvalidArgument]:
    arguments = settings.guest.kernel_args
    if not arguments.isprintable():
        yield _field("guest.kernel_args", arguments, "has a control character", remedy="separate by spaces")


def _images(settings: Settings) -> Iterator[InvalidArgument]:
    yield from _finite("images.pull_timeout", settings.images.pull_timeout)
    yield from _finite("images.prune_after_days", settings.images.prune_after_days)
    for i, reference in enumerate(settings.images.pinned):
        if not reference or not reference.isprintable() or " " in reference:
            yield _field(f"images.pinned[{i}]", reference, "is no image reference", remedy="such as busybox:1.36")


def _network(settings: Settings) -> Iterator[InvalidArgument]:
    network = settings.network
    if not network.bin_dirs:
        yield _field("network.bin_dirs", [], "is empty", remedy="name the directories of the CNI plugins")
    yield from _subnets(network.default_subnet)
    yield from _finite("network.plugin_timeout", network.plugin_timeout)


def _subnets(text: str) -> Iterator[InvalidArgument]:
    subnets = [part.strip() for part in text.split(",")]
    versions = [":" in subnet for subnet in subnets]
    if len(set(versions)) < len(versions):
        key = "network.default_subnet"
        yield _field(key, text, "has two of one IP version", remedy="such as 10.88.0.0/16,fd88::/64")
    for subnet in subnets:
        yield from _subnet(subnet)


def _subnet(text: str) -> Iterator[InvalidArgument]:
    key = "network.default_subnet"
    try:
        subnet = ipaddress.ip_network(text)
    except ValueError:
        try:
            meant = str(ipaddress.ip_network(text, strict=False)) if "/" in text else ""
        except ValueError:
            meant = ""
        remedy = f"did you mean {meant}?" if meant else "such as 10.88.0.0/16"
        yield _field(key, text, "is not a network", remedy=remedy)
        return
    # Three are never a pod's: the network's own address, the bridge's and the broadcast address.
    usable = subnet.num_addresses - 3
    if usable < MINIMUM_ADDRESSES:
        yield _field(
            key, text, f"has room for {max(0, usable)} pods", remedy=f"use at least a /{subnet.max_prefixlen - 4}"
        )
    elif subnet.is_multicast or subnet.is_loopback:
        yield _field(key, text, "cannot be a pod network", remedy="such as 10.88.0.0/16")


def _address(key: str, text: str) -> Iterator[InvalidArgument]:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        yield _field(key, text, "is not an IP address", remedy="such as 127.0.0.1")


def _streaming(settings: Settings) -> Iterator[InvalidArgument]:
    streaming = settings.streaming
    yield from _address("streaming.address", streaming.address)
    if bool(streaming.tls_cert) != bool(streaming.tls_key):
        missing = "tls_key" if streaming.tls_cert else "tls_cert"
        yield _field(f"streaming.{missing}", "", "is missing", remedy="TLS needs both a certificate and its key")


def _tracing(settings: Settings) -> Iterator[InvalidArgument]:
    endpoint = settings.tracing.endpoint
    if not endpoint:
        return
    try:
        parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port is not None
    except ValueError:  # a port that is none, a bracket that is not closed
        whole = False
    if not whole or parts.path.strip("/") or parts.query or "@" in parts.netloc:
        yield _field(
            "tracing.endpoint",
            endpoint,
            "is no host and port",
            remedy="such as localhost:4317 or https://otel.example:4317",
        )


def _finite(key: str, seconds: float) -> Iterator[InvalidArgument]:
    if not math.isfinite(seconds):
        yield _field(key, seconds, "never ends", remedy="give a number of seconds")
