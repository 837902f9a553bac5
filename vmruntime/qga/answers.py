"""What guest agents say of guests, in types (qga/qapi-schema.json of QEMU), believed within limits only."""

from __future__ import annotations

import base64
import binascii
import ipaddress
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vmruntime.qga.errors import QgaLied
from vmruntime.qga.wire import shown

OUTPUT_LIMIT = 16 * 1024 * 1024
"""Bytes of each output that qemu-ga keeps (GUEST_EXEC_MAX_OUTPUT)."""

Name = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_MOST = 4096
_MOST_BLOCKS = 65536
_SIGNALS = 64


class _Command(msgspec.Struct):
    name: Name
    enabled: bool = True


class _Info(msgspec.Struct):
    version: Name
    supported_commands: Annotated[list[_Command], Meta(max_length=_MOST)]


class GuestInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The agent itself.

    Attributes:
        commands: Those it knows and is to obey.
    """

    version: str
    commands: frozenset[str]


class GuestAddress(msgspec.Struct, frozen=True):
    """An address in the guest."""

    address: str
    prefix: int


class Traffic(msgspec.Struct, frozen=True, rename="kebab"):
    """Counters of an interface."""

    rx_bytes: Count = 0
    rx_packets: Count = 0
    rx_errs: Count = 0
    rx_dropped: Count = 0
    tx_bytes: Count = 0
    tx_packets: Count = 0
    tx_errs: Count = 0
    tx_dropped: Count = 0


class GuestInterface(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface as the guest has it; traffic is None where the agent does not count it."""

    name: str
    mac: str = ""
    addresses: list[GuestAddress] = []
    traffic: Traffic | None = None


class _Address(msgspec.Struct, rename="kebab"):
    ip_address: Name
    prefix: Annotated[int, Meta(ge=0, le=128)]


class _Interface(msgspec.Struct, rename="kebab"):
    name: Name
    hardware_address: Name = ""
    ip_addresses: Annotated[list[_Address], Meta(max_length=_MOST)] = []
    statistics: Traffic | None = None


class _Vcpu(msgspec.Struct, rename="kebab"):
    logical_id: Count
    online: bool


class _MemoryBlock(msgspec.Struct, rename="kebab"):
    phys_index: Count
    online: bool


class GuestFilesystem(msgspec.Struct, frozen=True, rename="kebab"):
    """A mounted file system; sizes are None where the agent does not tell them (before 3.0, and of some kinds)."""

    name: Name
    mountpoint: Name
    type: Name
    used_bytes: Count | None = None
    total_bytes: Count | None = None


class _Pid(msgspec.Struct):
    pid: Annotated[int, Meta(gt=0, lt=2**31)]


class _Status(msgspec.Struct, rename="kebab"):
    exited: bool
    exitcode: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    signal: Annotated[int, Meta(ge=1, le=_SIGNALS)] | None = None
    out_data: str = ""
    err_data: str = ""
    out_truncated: bool = False
    err_truncated: bool = False


class ExecResult(msgspec.Struct, frozen=True, kw_only=True):
    """A process in the guest that has ended.

    Attributes:
        exit_code: 0 to 255; 128 and the number of the signal that ended it.
        truncated: There was more output than the agent or the caller wants.
    """

    exit_code: int
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False


def info(value: Any) -> GuestInfo:
    """Read the answer to guest-info."""
    found = _convert("guest-info", value, _Info)
    return GuestInfo(
        version=shown(found.version),
        commands=frozenset(command.name for command in found.supported_commands if command.enabled),
    )


def vcpus(value: Any) -> tuple[int, list[int]]:
    """Read the answer to guest-get-vcpus; return how many processors there are, and those that are not used."""
    found = _convert("guest-get-vcpus", value, Annotated[list[_Vcpu], Meta(max_length=_MOST)])
    return len(found), [one.logical_id for one in found if not one.online]


def offline_blocks(value: Any) -> list[int]:
    """Read the answer to guest-get-memory-blocks; return those that are not used."""
    found = _convert("guest-get-memory-blocks", value, Annotated[list[_MemoryBlock], Meta(max_length=_MOST_BLOCKS)])
    return [one.phys_index for one in found if not one.online]


def interfaces(value: Any) -> list[GuestInterface]:
    """Read the answer to guest-network-get-interfaces."""
    command = "guest-network-get-interfaces"
    return [
        GuestInterface(
            name=shown(one.name),
            mac=shown(one.hardware_address).lower(),
            addresses=[_address(command, address) for address in one.ip_addresses],
            traffic=one.statistics,
        )
        for one in _convert(command, value, Annotated[list[_Interface], Meta(max_length=_MOST)])
    ]


def filesystems(value: Any) -> list[GuestFilesystem]:
    """Read the answer to guest-get-fsinfo."""
    found = _convert("guest-get-fsinfo", value, Annotated[list[GuestFilesystem], Meta(max_length=_MOST)])
    return [
        msgspec.structs.replace(one, name=shown(one.name), mountpoint=shown(one.mountpoint), type=shown(one.type))
        for one in found
    ]


def pid(value: Any) -> int:
    """Read the answer to guest-exec."""
    found: int = _convert("guest-exec", value, _Pid).pid
    return found


def exec_status(value: Any, limit: int = OUTPUT_LIMIT) -> ExecResult | None:
    """Read the answer to guest-exec-status; None: it still runs. Of each output `limit` bytes are kept."""
    command = "guest-exec-status"
    status = _convert(command, value, _Status)
    if not status.exited:
        return None
    if status.signal is not None:
        code = 128 + status.signal
    elif status.exitcode is not None:
        code = status.exitcode & 0xFF  # Windows has 32 bits
    else:
        raise QgaLied(f"the answer to {command} says that a process has ended, and not how")
    stdout, stderr = _bytes(command, status.out_data), _bytes(command, status.err_data)
    cut = len(stdout) > limit or len(stderr) > limit
    return ExecResult(
        exit_code=code,
        stdout=stdout[:limit],
        stderr=stderr[:limit],
        truncated=cut or status.out_truncated or status.err_truncated,
    )


def _convert(command: str, value: Any, type_: Any) -> Any:
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        raise QgaLied(f"the answer to {command}: {shown(error)}") from None


def _address(command: str, address: _Address) -> GuestAddress:
    text = address.ip_address.partition("%")[0]  # a link-local one may name its interface
    try:
        return GuestAddress(str(ipaddress.ip_address(text)), address.prefix)
    except ValueError:
        raise QgaLied(f"the answer to {command}: {shown(text)!r} is not an IP address") from None


def _bytes(command: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise QgaLied(f"the answer to {command}: an output is not base64") from None
