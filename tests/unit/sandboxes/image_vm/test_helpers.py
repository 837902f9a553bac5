"""What serves a machine beside its VM, without the programs that do."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.support.hosts import sandbox, short_directory
from vmruntime.aio.detached import DetachedProcess, ProcessIdentity
from vmruntime.config.settings import Settings
from vmruntime.model.image_pod import ImagePod
from vmruntime.sandboxes.image_vm.helpers import Helpers
from vmruntime.sandboxes.image_vm.prepare import Account

ID = "7".ljust(64, "0")


async def test_a_tpm_listens_however_long_the_path_of_its_state_is(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    async def spawn(argv: Sequence[str], **fields: Any) -> SimpleNamespace:
        commands.append(list(argv))
        path = next(word for word in argv if word.startswith("type=unixio,")).split(",")[1].removeprefix("path=")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(path)  # a path of more than 107 bytes is refused
        return SimpleNamespace(alive=True)

    async def record(role: str, identity: ProcessIdentity) -> None:
        raise AssertionError("nothing runs")

    monkeypatch.setattr(DetachedProcess, "spawn", spawn)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    found = pwd.getpwuid(os.getuid())
    pod = sandbox(ID)
    pod = msgspec.structs.replace(pod, spec=msgspec.structs.replace(pod.spec, image_pod=ImagePod(tpm=True)))
    with short_directory() as base:
        directory, disks = base / "run", base / "root" / ("long" * 20) / ID
        directory.mkdir()
        disks.mkdir(parents=True)
        helpers = Helpers(pod, Settings(), record, directory, disks, on_ready=lambda: None)
        for _ in range(2):  # the second time a machine is started there is the socket of the first
            extras = await helpers.before(Account(found.pw_name, found.pw_uid, found.pw_gid), 3)
            assert extras.tpm is not None
            assert extras.tpm.is_socket()
            assert directory in extras.tpm.parents
        assert f"dir={disks}/tpm,mode=0600" in commands[1]
        assert (disks / "tpm").stat().st_mode & 0o777 == 0o700
