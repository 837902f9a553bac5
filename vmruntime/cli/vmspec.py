"""`vmruntime run --vm`: from its options to the annotations of an image pod, from what is typed to an image's reference."""

from __future__ import annotations

import dataclasses
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from vmruntime import yamltext
from vmruntime.cli.images import local_source
from vmruntime.errors import InvalidArgument, NotFound, PermissionDenied
from vmruntime.images.endpoint import check_url
from vmruntime.images.url_names import is_url
from vmruntime.model import ssh_keys

PREFIX = "vmruntime.io/"
USER_DATA_LIMIT = 512 * 1024
"""Characters; the annotations of a pod have 1 MiB together."""

_HEADERS = re.compile(
    r"#(?!cloud-config(?:\s|$))(?:!|cloud-|include|upstart-|part-handler|# template:)|Content-Type:|MIME-Version:"
)
"""First lines of user-data that is not cloud-config, as cloud-init tells them apart (its "User data formats")."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VmOptions:
    """What `run` was told of a VM.

    Attributes:
        ssh_keys: Files of public keys; None: this user's own.
        user_data: cloud-config, or anything else that cloud-init takes; None: none.
        root_size: Bytes; 0: as large as the image's disk.
        firmware, disk_driver: Empty: the daemon's default.
    """

    ssh_keys: Sequence[Path] | None = None
    user_data: Path | None = None
    root_size: int = 0
    firmware: str = ""
    disk_driver: str = ""
    vnc: bool = False
    tpm: bool = False

    def annotations(self) -> dict[str, str]:
        """Return what the pod is to say; blocks.

        Raises:
            NotFound, PermissionDenied: A file cannot be read.
            InvalidArgument: One holds something else than it should.
        """
        given = {
            "ssh-keys": "\n".join(self._keys()),
            "root-volume-size": str(self.root_size or ""),
            "firmware": self.firmware,
            "disk-driver": self.disk_driver,
            "vnc": "true" if self.vnc else "",
            "tpm": "true" if self.tpm else "",
        }
        if self.user_data is not None:
            given |= _user_data(self.user_data)
        return {PREFIX + name: value for name, value in given.items() if value}

    def _keys(self) -> list[str]:
        files = own_keys() if self.ssh_keys is None else self.ssh_keys
        keys = [key for file in files for key in ssh_keys.parse(f"--ssh-key {file}", _text(file, "--ssh-key"))]
        return list(dict.fromkeys(keys))


def own_keys() -> list[Path]:
    """Return the public keys that ssh would offer for this user, but for certificates."""
    return sorted(path for path in Path("~/.ssh").expanduser().glob("id_*.pub") if not path.name.endswith("-cert.pub"))


def vm_source(text: str) -> str:
    """Return what the daemon is told of a VM image, given as a name, a URL, or the path of a file.

    A path is what begins with /, ./, ../ or ~/; the daemon reads it, and is told its URL.

    Raises:
        NotFound: There is no such file.
        InvalidArgument: It is a directory or the like, or a URL that cannot be fetched.
    """
    if is_url(text):
        return check_url(text)
    if text.startswith(("/", "./", "../", "~/")):
        return _file_url(Path(text).expanduser())
    return local_source(text) or text


def _file_url(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise NotFound(f"the disk image {path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise InvalidArgument.field("IMAGE", str(path), "is not a file", remedy="give a qcow2, raw or vmdk file")
    # A URL has no ".."; the file itself keeps the name that the user gave it.
    return (path.parent.resolve() / path.name).as_uri()


def _user_data(path: Path) -> dict[str, str]:
    text = _text(path, "--user-data")
    if len(text) > USER_DATA_LIMIT:
        raise InvalidArgument(
            f"--user-data {path}: has {len(text)} characters; at most {USER_DATA_LIMIT} fit into an annotation",
            remedy="have it fetch the rest",
        )
    if _HEADERS.match(text):
        return {"cloud-init-user-data-script": text}
    try:
        yamltext.load_mapping(text)
    except yamltext.BadYaml as error:
        raise InvalidArgument(
            f"--user-data {path}: is no cloud-config: {error.message}",
            remedy='begin a script with "#!"; see cloud-init\'s documentation, "User data formats"',
        ) from None
    return {"cloud-init-user-data": text}


def _text(path: Path, option: str) -> str:
    try:
        return path.expanduser().read_bytes().decode()
    except PermissionError:
        raise PermissionDenied(f"{option} {path}: permission denied") from None
    except OSError as error:
        raise NotFound(f"{option} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{option} {path}: is not UTF-8 text at byte {error.start}") from None
