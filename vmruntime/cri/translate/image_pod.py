"""Annotations of image pods: Virtlet's names with Virtlet's meaning, and a vmruntime.io/ name for each.

| Virtlet | vmruntime.io/ | value |
|---|---|---|
| VirtletVCPUCount | vcpus | 1 to 255; Virtlet's: 0 and less is the default |
| VirtletCPUModel | cpu-model | empty or host-model |
| VirtletLibvirtCPUSetting | libvirt-cpu | YAML: libvirt's <cpu>, elements and attributes as capitalised keys |
| VirtletDiskDriver | disk-driver | scsi (default) or virtio |
| VirtletRootVolumeSize | root-volume-size | a quantity, such as 10Gi |
| VirtletSystemUUID | system-uuid | a UUID |
| VirtletSSHKeys | ssh-keys | public keys, a line each |
| VirtletSSHKeySource | ssh-key-source | configmap/NAME or secret/NAME, with /KEY if it is not authorized_keys |
| VirtletCloudInitImageType | cloud-init-image-type | nocloud (default) or configdrive |
| VirtletCloudInitMetaData | cloud-init-meta-data | a mapping as YAML or JSON |
| VirtletCloudInitUserData | cloud-init-user-data | a mapping as YAML or JSON |
| VirtletCloudInitUserDataOverwrite | cloud-init-user-data-overwrite | boolean |
| VirtletCloudInitUserDataScript | cloud-init-user-data-script | text |
| VirtletCloudInitUserDataSource | cloud-init-user-data-source | configmap/NAME or secret/NAME |
| VirtletCloudInitUserDataSourceKey | cloud-init-user-data-source-key | a key of it |
| VirtletCloudInitUserDataSourceEncoding | cloud-init-user-data-source-encoding | plain (default) or base64 |
| VirtletFilesFromDataSource | files-from-data-source | configmap/NAME or secret/NAME |
| VirtletForceDHCPNetworkConfig | force-dhcp-network-config | boolean |
| VirtletChown9pfsMounts | chown-mounts | boolean |
| | firmware | bios (default) or uefi |
| | tpm, vnc | boolean |

A boolean under Virtlet's name is true when it is exactly "true", else false; ours is "true" or "false".
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from vmruntime import yamltext
from vmruntime.cri.translate.checks import bad
from vmruntime.errors import InvalidArgument
from vmruntime.model import quantity, ssh_keys
from vmruntime.model.image_pod import (
    CpuSetting,
    DataSource,
    DiskDriver,
    Encoding,
    Firmware,
    ImagePod,
    SeedFormat,
    SourceKind,
)

PREFIX = "vmruntime.io/"
VIRTLET_PREFIX = "Virtlet"
MOST_VCPUS = 255  # Virtlet's limit, and that of QEMU's q35 without x2APIC

E = TypeVar("E", bound=enum.Enum)

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_OBJECT_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_OBJECT_KEY = re.compile(r"[A-Za-z0-9._-]{1,253}")
_CPU_WORD = re.compile(r"[A-Za-z0-9._+-]{0,64}")
# Names that are no annotation of an image pod alone.
_ELSEWHERE = frozenset({"kind", "created-by"})
_SCRIPT_REMEDY = "a script belongs into cloud-init-user-data-script"


def image_pod_from_annotations(annotations: Mapping[str, str]) -> ImagePod:
    """Return what a pod's annotations ask for.

    Both names of one setting may be there as long as they mean the same.

    Raises:
        InvalidArgument: Some cannot be used; the message names every one of them, its value and the remedy.
    """
    problems = list(_misspelt(annotations))
    values: dict[str, Any] = {}
    for setting in _SETTINGS:
        try:
            found = _read(setting, annotations)
        except InvalidArgument as error:
            problems.append(error)
        else:
            values |= found
    pod = ImagePod(**{name: value for name, value in values.items() if name in ImagePod.__struct_fields__})
    problems += _contradictions(pod, values, annotations)
    if not problems:
        return _with_source_key(pod, values.get("user_data_source_key", ""))
    raise _together(problems)


@dataclasses.dataclass(frozen=True)
class _Setting:
    """One thing to set.

    Attributes:
        field: Of ImagePod, or a name of our own.
        ours: Without prefix.
        virtlet: Without prefix; empty: Virtlet did not have it.
        parse: From the annotation's name and value.
        lenient: What parses the value under Virtlet's name, when that is taken otherwise.
    """

    field: str
    ours: str
    virtlet: str
    parse: Callable[[str, str], Any]
    lenient: Callable[[str, str], Any] | None = None

    def names(self) -> Iterator[tuple[str, Callable[[str, str], Any]]]:
        yield PREFIX + self.ours, self.parse
        if self.virtlet:
            yield VIRTLET_PREFIX + self.virtlet, self.lenient or self.parse


def _read(setting: _Setting, annotations: Mapping[str, str]) -> dict[str, Any]:
    given = [(name, parse) for name, parse in setting.names() if name in annotations]
    values, problems = [], []
    for name, parse in given:
        try:
            values.append(parse(f"annotation {name}", annotations[name]))
        except InvalidArgument as error:
            problems.append(error)
    if problems:
        raise problems[0] if len(problems) == 1 else _together(problems)
    if len(values) == 2 and values[0] != values[1]:
        ours, theirs = (name for name, _ in given)
        raise InvalidArgument(
            f"annotation {ours}: {_shown(annotations[ours])} differs from annotation {theirs}:"
            f" {_shown(annotations[theirs])}, which means the same setting",
            remedy="keep one of them",
        )
    return {setting.field: values[0]} if values else {}


def _shown(value: str) -> str:
    """Return a value for a message; documents, which may have secrets, by their size only."""
    return repr(value) if len(value) <= 60 and "\n" not in value else f"a text of {len(value)} characters"


def _together(problems: Sequence[InvalidArgument]) -> InvalidArgument:
    if len(problems) == 1:
        return problems[0]
    return InvalidArgument("; ".join(str(problem) for problem in problems))


def _misspelt(annotations: Mapping[str, str]) -> Iterator[InvalidArgument]:
    """Iterate over names that are nearly one of ours: left alone, they would be ignored without a word."""
    known = [dict(setting.names()) for setting in _SETTINGS]
    for name in annotations:
        for prefix in (PREFIX, VIRTLET_PREFIX):
            rest = name.removeprefix(prefix)
            if rest == name or rest in _ELSEWHERE or any(name in names for names in known):
                continue
            if name == "VirtletConfigMapAsFiles":
                near = ["FilesFromDataSource"]
            else:
                names = [full.removeprefix(prefix) for each in known for full in each if full.startswith(prefix)]
                near = difflib.get_close_matches(rest, names, n=1, cutoff=0.75)
            if near:
                yield InvalidArgument(
                    f"annotation {name}: {_shown(annotations[name])} is for nothing: there is no such annotation",
                    remedy=f"did you mean {prefix}{near[0]}?",
                )


def _contradictions(
    pod: ImagePod, values: Mapping[str, Any], annotations: Mapping[str, str]
) -> Iterator[InvalidArgument]:
    """Iterate over annotations that are right alone and wrong together."""
    topology = pod.cpu.topology if pod.cpu is not None else None
    if topology is not None and pod.vcpus and topology.vcpus != pod.vcpus:
        yield InvalidArgument(
            f"annotation {_used('cpu', annotations)}: its topology has {topology.vcpus} CPUs, but annotation"
            f" {_used('vcpus', annotations)} asks for {pod.vcpus}",
            remedy="make the product of sockets, dies, cores and threads that many, or leave one of them out",
        )
    key = values.get("user_data_source_key", "")
    if key and not _given("user_data_source", annotations):
        yield InvalidArgument(
            f"annotation {_used('user_data_source_key', annotations)}: {key!r} is a key of nothing",
            remedy=f"say by {PREFIX}cloud-init-user-data-source which ConfigMap or Secret has it",
        )


def _with_source_key(pod: ImagePod, key: str) -> ImagePod:
    if not key or pod.user_data_source is None:
        return pod
    source = msgspec.structs.replace(pod.user_data_source, key=key)
    return msgspec.structs.replace(pod, user_data_source=source)


def _given(field: str, annotations: Mapping[str, str]) -> list[str]:
    """Return the names under which a setting is in the annotations."""
    setting = next(one for one in _SETTINGS if one.field == field)
    return [name for name, _ in setting.names() if name in annotations]


def _used(field: str, annotations: Mapping[str, str]) -> str:
    return _given(field, annotations)[0]


def _vcpus(name: str, value: str) -> int:
    count = _virtlet_vcpus(name, value)
    if count == 0:
        raise bad(name, value, "is less than 1", remedy="leave it out for as many as the pod's CPU limits say")
    return count


def _virtlet_vcpus(name: str, value: str) -> int:
    if _INTEGER.fullmatch(value) is None:
        raise bad(name, value, "is not a number", remedy=f'write a number from 1 to {MOST_VCPUS}, in quotes: "2"')
    if int(value) > MOST_VCPUS:
        raise bad(name, value, f"is more than {MOST_VCPUS}", remedy=f"use 1 to {MOST_VCPUS}")
    return max(0, int(value))


def _cpu_model(name: str, value: str) -> bool:
    if value not in ("", "host-model"):
        raise bad(
            name,
            value,
            "is not a CPU model that can be chosen",
            remedy=f'use "host-model" or "", or {PREFIX}libvirt-cpu for any other',
        )
    return value == "host-model"


def _cpu_setting(name: str, value: str) -> CpuSetting:
    document = _mapping(name, value)
    if any(key.lower() == "numa" for key in document):
        raise InvalidArgument(
            f"{name}: Numa cannot be chosen, since the pod's limits say how much memory there is", remedy="leave it out"
        )
    try:
        setting = msgspec.convert(_lower_keys(document), CpuSetting)
    except msgspec.ValidationError as error:
        words, _, place = str(error).partition(" - at `$")
        raise InvalidArgument(
            f"{name}: {place.strip('`.') or 'its mapping'}: {words[:1].lower()}{words[1:]}",
            remedy="see https://libvirt.org/formatdomain.html#cpu-model-and-topology; keys are capitalised",
        ) from None
    named = [setting.vendor, *(feature.name for feature in setting.features)]
    if setting.model is not None:
        named += [setting.model.value, setting.model.vendor_id]
    for word in named:
        if _CPU_WORD.fullmatch(word) is None:
            raise bad(name, word, "is not the name of a CPU, feature or vendor", remedy="use letters, digits, . _ + -")
    return setting


def _lower_keys(value: Any) -> Any:
    """Virtlet's keys are Go's names of fields, which Go finds in any case."""
    if isinstance(value, dict):
        return {key.lower(): _lower_keys(item) for key, item in value.items()}
    return [_lower_keys(item) for item in value] if isinstance(value, list) else value


def _size(name: str, value: str) -> int:
    remedy = "give bytes as a quantity, such as 10Gi"
    number = quantity.parse(value.strip())
    if number is None:
        raise bad(name, value, "is not a quantity", remedy=remedy)
    if number < 0 or number != number.to_integral_value() or number >= 2**63:
        raise bad(name, value, "is not a number of bytes that a disk can have", remedy=remedy)
    return int(number)


def _uuid(name: str, value: str) -> str:
    uuid = value.strip().lower().removeprefix("urn:uuid:").removeprefix("{").removesuffix("}")
    if _UUID.fullmatch(uuid) is None:
        raise bad(name, value, "is not a UUID", remedy="such as 53008994-44c0-4017-ad44-9c49758083da")
    return uuid


def _choice(options: type[E], name: str, value: str, *, lower: bool = False) -> E:
    """Return a member by its value; empty: the first one, the default."""
    try:
        return options(value.lower() if lower else value) if value else next(iter(options))
    except ValueError:
        known = " or ".join(f'"{option.value}"' for option in options)
        raise bad(name, value, "is not known", remedy=f"use {known}") from None


def _boolean(name: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise bad(name, value, "is neither true nor false", remedy='use "true" or "false", in quotes')
    return value == "true"


def _exactly_true(name: str, value: str) -> bool:
    return value == "true"


def _text(name: str, value: str) -> str:
    return value


def _mapping(name: str, value: str) -> dict[str, Any]:
    try:
        return yamltext.load_mapping(value)
    except yamltext.BadYaml as error:
        remedy = _SCRIPT_REMEDY if value.startswith("#!") else "give a mapping as YAML or JSON"
        raise InvalidArgument(f"{name}: {error.message}", remedy=remedy) from None


def _source(name: str, value: str, *, key: bool = False) -> DataSource:
    """Parse kind/name; with `key`, kind/name/key too."""
    form = "configmap/NAME or secret/NAME" + (", with /KEY at its end if need be" if key else "")
    parts = value.split("/")
    if not 2 <= len(parts) <= 2 + key:
        raise bad(name, value, "does not name a ConfigMap or Secret", remedy=f"use {form}")
    if parts[0] not in ("configmap", "secret"):
        raise bad(name, value, f"has the kind {parts[0]!r}, which is not known", remedy=f"use {form}")
    if _OBJECT_NAME.fullmatch(parts[1]) is None:
        raise bad(name, value, f"has the name {parts[1]!r}, which no object can have", remedy=f"use {form}")
    return DataSource(
        kind=SourceKind(parts[0]), name=parts[1], key=_source_key(name, parts[2]) if len(parts) == 3 else ""
    )


def _source_key(name: str, value: str) -> str:
    if _OBJECT_KEY.fullmatch(value) is None:
        raise bad(name, value, "is not a key of a ConfigMap or Secret", remedy="use letters, digits, - _ and .")
    return value


_disk_driver = functools.partial(_choice, DiskDriver)
_seed_format = functools.partial(_choice, SeedFormat, lower=True)
_encoding = functools.partial(_choice, Encoding)
_firmware = functools.partial(_choice, Firmware)
_source_with_key = functools.partial(_source, key=True)

_SETTINGS: Sequence[_Setting] = (
    _Setting("vcpus", "vcpus", "VCPUCount", _vcpus, _virtlet_vcpus),
    _Setting("host_cpu", "cpu-model", "CPUModel", _cpu_model),
    _Setting("cpu", "libvirt-cpu", "LibvirtCPUSetting", _cpu_setting),
    _Setting("disk_driver", "disk-driver", "DiskDriver", _disk_driver),
    _Setting("root_volume_size", "root-volume-size", "RootVolumeSize", _size),
    _Setting("system_uuid", "system-uuid", "SystemUUID", _uuid),
    _Setting("firmware", "firmware", "", _firmware),
    _Setting("tpm", "tpm", "", _boolean),
    _Setting("vnc", "vnc", "", _boolean),
    _Setting("ssh_keys", "ssh-keys", "SSHKeys", ssh_keys.parse),
    _Setting("ssh_key_source", "ssh-key-source", "SSHKeySource", _source_with_key),
    _Setting("seed_format", "cloud-init-image-type", "CloudInitImageType", _seed_format),
    _Setting("meta_data", "cloud-init-meta-data", "CloudInitMetaData", _mapping),
    _Setting("user_data", "cloud-init-user-data", "CloudInitUserData", _mapping),
    _Setting(
        "user_data_overwrite",
        "cloud-init-user-data-overwrite",
        "CloudInitUserDataOverwrite",
        _boolean,
        _exactly_true,
    ),
    _Setting("user_data_script", "cloud-init-user-data-script", "CloudInitUserDataScript", _text),
    _Setting("user_data_source", "cloud-init-user-data-source", "CloudInitUserDataSource", _source),
    _Setting("user_data_source_key", "cloud-init-user-data-source-key", "CloudInitUserDataSourceKey", _source_key),
    _Setting(
        "user_data_encoding",
        "cloud-init-user-data-source-encoding",
        "CloudInitUserDataSourceEncoding",
        _encoding,
    ),
    _Setting("files_source", "files-from-data-source", "FilesFromDataSource", _source),
    _Setting("force_dhcp", "force-dhcp-network-config", "ForceDHCPNetworkConfig", _boolean, _exactly_true),
    _Setting("chown_mounts", "chown-mounts", "Chown9pfsMounts", _boolean, _exactly_true),
)
