"""The values of options that are more than a word: sizes, times, CPUs, ports, users, pairs."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import TypeVar

import click

from vmruntime.generated import cri_pb2

T = TypeVar("T")

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_PROTOCOLS = {"tcp": cri_pb2.TCP, "udp": cri_pb2.UDP, "sctp": cri_pb2.SCTP}


class _Parsed(click.ParamType[T]):
    """A click type whose parse() raises ValueError with words for the user."""

    def parse(self, text: str) -> T:
        raise NotImplementedError

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> T:
        """Return the parsed value, or fail as click does."""
        try:
            return self.parse(str(value))
        except ValueError as error:
            self.fail(f"{value!r} {error}", param, ctx)


class Memory(_Parsed[int]):
    """Bytes: 268435456, 256M, 256Mi, 256MiB, 0.5g; every unit is a power of 1024."""

    name = "size"

    def parse(self, text: str) -> int:
        """Return bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(?:i?b?)", text.strip(), re.IGNORECASE)
        if found is None:
            raise ValueError("is not a size, such as 256M or 2G")
        amount = int(float(found.group(1)) * _UNITS[found.group(2).lower()])
        if amount <= 0:
            raise ValueError("is no memory at all")
        return amount

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes; a number, such as a default, is bytes already."""
        return value if isinstance(value, int) else super().convert(value, param, ctx)


class Duration(_Parsed[int]):
    """A time: 90s, 30m, 12h, 7d, 2w, or several of them, 1d12h; a number alone is seconds."""

    name = "duration"

    def parse(self, text: str) -> int:
        """Return seconds."""
        words = text.strip().lower()
        if words.isascii() and words.isdigit():
            return int(words)
        if re.fullmatch(r"(?:\d+[wdhms])+", words, re.ASCII) is None:
            raise ValueError("is not a duration, such as 12h or 7d")
        return sum(int(amount) * _SECONDS[unit] for amount, unit in re.findall(r"(\d+)([wdhms])", words))


class Publish(_Parsed[cri_pb2.PortMapping]):
    """A published port: [IP:]HOST:CONTAINER[/PROTOCOL], an IPv6 address in brackets."""

    name = "[ip:]host:container[/protocol]"

    def parse(self, text: str) -> cri_pb2.PortMapping:
        """Return the mapping as CRI has it."""
        ports, _, protocol = text.partition("/")
        if (protocol or "tcp").lower() not in _PROTOCOLS:
            raise ValueError("has an unknown protocol; use tcp, udp or sctp")
        found = re.fullmatch(r"(?:(\[[^\]]+\]|[^:\[\]]+):)?(\d+):(\d+)", ports)
        if found is None:
            raise ValueError("is not HOST:CONTAINER, such as 8080:80 or 127.0.0.1:8080:80/udp")
        address = (found.group(1) or "").strip("[]")
        if address:
            try:
                ipaddress.ip_address(address)
            except ValueError:
                raise ValueError(f"begins with {address!r}, which is no IP address") from None
        host, container = int(found.group(2)), int(found.group(3))
        for port in (host, container):
            if not 1 <= port <= 65535:
                raise ValueError(f"has port {port}, outside 1-65535")
        return cri_pb2.PortMapping(
            protocol=_PROTOCOLS[(protocol or "tcp").lower()],
            host_port=host,
            container_port=container,
            host_ip=address,
        )


class Pair(_Parsed[tuple[str, str]]):
    """KEY=VALUE; the value may be empty and may contain more equals signs."""

    name = "key=value"

    def parse(self, text: str) -> tuple[str, str]:
        """Return key and value."""
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ValueError("is not KEY=VALUE")
        return key, value


class Env(Pair):
    """KEY=VALUE, or KEY alone for the value it has in the caller's environment."""

    name = "key[=value]"

    def parse(self, text: str) -> tuple[str, str]:
        """Return name and value."""
        if text and "=" not in text:
            if text not in os.environ:
                raise ValueError("has no value, and there is none in the environment")
            return text, os.environ[text]
        return super().parse(text)


class User(_Parsed[cri_pb2.LinuxContainerSecurityContext]):
    """UID, UID:GID, NAME or NAME:GID; CRI has no way to name a group other than by number."""

    name = "user[:gid]"

    def parse(self, text: str) -> cri_pb2.LinuxContainerSecurityContext:
        """Return a security context that sets just the user."""
        user, colon, group = text.partition(":")
        if not user or (colon and not group):
            raise ValueError("is not USER or USER:GID")
        if group and not group.isdecimal():
            raise ValueError("names its group; give the group's number")
        context = cri_pb2.LinuxContainerSecurityContext()
        if user.isdecimal():
            context.run_as_user.value = int(user)
        else:
            context.run_as_username = user
        if group:
            context.run_as_group.value = int(group)
        return context
