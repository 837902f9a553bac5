"""Block devices as disks: one device is one disk, whatever its names and whoever asks for it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vmruntime.errors import InvalidArgument
from vmruntime.hypervisor.interface import Disk
from vmruntime.model.container import Device
from vmruntime.sandboxes.vm_devices import as_attached, block_disk


@pytest.fixture
def disk_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that looks like a block device."""
    path = tmp_path / "disk"
    path.touch()
    really = os.stat

    def pretend(at: str) -> os.stat_result:
        status = really(at)
        return os.stat_result((stat.S_IFBLK | 0o600, *status[1:])) if at == str(path) else status

    monkeypatch.setattr("vmruntime.sandboxes.vm_devices.os.stat", pretend)
    return path


def disk(path: Path, permissions: str) -> tuple[Device, Disk]:
    device = Device(container_path="/dev/x", host_path=str(path), permissions=permissions)
    found = block_disk(device)
    assert found is not None
    return device, found


def test_two_names_are_one_disk(disk_path: Path, tmp_path: Path) -> None:
    (tmp_path / "name").symlink_to("disk")
    assert disk(tmp_path / "name", "rw")[1] == disk(disk_path, "rwm")[1]


def test_what_is_writable_already_is_shared_and_what_is_not_is_refused(disk_path: Path) -> None:
    reading, writing = disk(disk_path, "r"), disk(disk_path, "rw")
    assert (reading[1].readonly, writing[1].readonly) == (True, False)
    assert as_attached(*reading, set()) == as_attached(*reading, {reading[1].serial}) == reading[1]
    assert as_attached(*writing, set()) == as_attached(*writing, {writing[1].serial}) == writing[1]
    assert as_attached(*reading, {writing[1].serial}) == writing[1]
    with pytest.raises(InvalidArgument, match=r"permissions: 'rw' cannot be had: .*disk is in this pod read-only"):
        as_attached(*writing, {reading[1].serial})
