"""Blocking steps with domains; each runs in a thread of the connection."""

from __future__ import annotations

import contextlib
import xml.etree.ElementTree as ET
from collections.abc import Mapping

import msgspec

from vmruntime.hypervisor.errors import HypervisorError
from vmruntime.hypervisor.libvirt.binding import libvirt
from vmruntime.hypervisor.libvirt.domain import METADATA_NAMESPACE
from vmruntime.hypervisor.libvirt.place import embedded_log, is_embedded

_UNDEFINE = (
    libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM  # the pod's file, as its disks are
    | libvirt.VIR_DOMAIN_UNDEFINE_KEEP_TPM
    | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
)


class Mark(msgspec.Struct, frozen=True):
    """What a domain of ours carries as metadata."""

    pod: str
    owner: str


def find(connection: libvirt.virConnect, uuid: str) -> libvirt.virDomain | None:
    """Return the domain of this uuid, or None."""
    try:
        return connection.lookupByUUIDString(uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def mark_of(domain: libvirt.virDomain) -> Mark | None:
    """Return a domain's mark; None: it is not ours."""
    try:
        text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, METADATA_NAMESPACE)
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_NO_DOMAIN):
            return None
        raise
    element = ET.fromstring(text)
    return Mark(element.get("pod", ""), element.get("owner", ""))


def create(
    connection: libvirt.virConnect, uuid: str, xml: str, descriptors: Mapping[str, list[int]], *, owner: str, keep: bool
) -> None:
    """Start a domain, paused; one of ours that has its uuid is ended before.

    Args:
        connection: libvirt's.
        uuid: As in the XML.
        xml: The domain.
        descriptors: Of its disks, by the names of their groups.
        owner: Whose it is.
        keep: libvirt remembers it after its end.

    Raises:
        HypervisorError: The uuid is that of somebody else's domain.
        libvirt.libvirtError: libvirt refused; nothing stays.
    """
    old = find(connection, uuid)
    if old is not None:
        if not _is_of(old, owner):
            raise HypervisorError(f"libvirt has a machine of somebody else's with the uuid {uuid}: {old.name()}")
        end(old)
    if not keep:
        connection.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
        return
    domain = connection.defineXML(xml)
    try:
        for name, fds in descriptors.items():
            domain.FDAssociate(name, fds, 0)
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    except BaseException:
        with contextlib.suppress(libvirt.libvirtError):
            domain.undefineFlags(_UNDEFINE)
        raise


def remove(connection: libvirt.virConnect, uuid: str, owner: str) -> None:
    """End a domain and let libvirt forget it; unknown or somebody else's: success, and nothing done."""
    domain = find(connection, uuid)
    if domain is not None and _is_of(domain, owner):
        end(domain)


def of_owner(connection: libvirt.virConnect, owner: str) -> dict[str, str]:
    """Return the pods' ids of an owner's domains, running or not, by the domains' uuids."""
    marks = {domain.UUIDString(): mark_of(domain) for domain in connection.listAllDomains()}
    return {uuid: mark.pod for uuid, mark in marks.items() if mark is not None and mark.owner == owner}


def end(domain: libvirt.virDomain) -> None:
    """End a domain and let libvirt forget it; its log goes, too, but for one of libvirtd, whose logs are the host's to keep."""
    uri, name = str(domain.connect().getURI()), str(domain.name())
    _destroy(domain)
    if _is_kept(domain):
        domain.undefineFlags(_UNDEFINE)
    if is_embedded(uri):
        embedded_log(uri, name).unlink(missing_ok=True)


def _is_of(domain: libvirt.virDomain, owner: str) -> bool:
    mark = mark_of(domain)
    return mark is not None and mark.owner == owner


def _destroy(domain: libvirt.virDomain) -> None:
    """End a domain at once; it has ended: success."""
    try:
        domain.destroy()
    except libvirt.libvirtError as error:
        if error.get_error_code() not in (libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN):
            raise


def _is_kept(domain: libvirt.virDomain) -> bool:
    """Whether libvirt has a definition of the domain."""
    try:
        return bool(domain.isPersistent())
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return False
        raise


def state_of(connection: libvirt.virConnect, uuid: str) -> tuple[int, int] | None:
    """Return state and reason of a domain (virDomainGetState); None: unknown."""
    domain = find(connection, uuid)
    if domain is None:
        return None
    state, reason = domain.state()
    return int(state), int(reason)


def serials_of(connection: libvirt.virConnect, uuid: str) -> set[str]:
    """Return the serials of the disks that libvirt knows of a domain."""
    domain = find(connection, uuid)
    if domain is None:
        return set()
    found = ET.fromstring(domain.XMLDesc()).iterfind("./devices/disk/serial")
    return {element.text for element in found if element.text}


def security_models(connection: libvirt.virConnect) -> list[str]:
    """Return the host's security models beside DAC."""
    found = connection.getSecurityModel()
    return [found[0]] if found and found[0] not in ("", "dac", "none") else []
