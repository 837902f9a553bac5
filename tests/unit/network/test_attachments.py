"""What is kept on disk of an attachment."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.unit.network.conftest import SANDBOX_ID, attach, network
from vmruntime.errors import Code
from vmruntime.network.attachments import Attachments
from vmruntime.network.errors import NetworkError

ATTACHMENT = attach(
    network({"type": "bridge", "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.1.0.0/16"}]]}}),
    capabilities={"portMappings": [{"hostPort": 80}]},
    result={"ips": [{"address": "10.1.0.5/16"}]},
)


async def test_saved_loaded_and_forgotten(tmp_path: Path) -> None:
    attachments = Attachments(tmp_path / "cni")
    assert await attachments.load(SANDBOX_ID) is None
    assert await attachments.all() == ([], set())
    await attachments.save(ATTACHMENT)
    assert await Attachments(tmp_path / "cni").load(SANDBOX_ID) == ATTACHMENT
    other = msgspec.structs.replace(ATTACHMENT, container_id="6" * 64, result=None)
    await attachments.save(other, on_disk=False)
    await attachments.keep(other.container_id)
    assert await attachments.all() == ([ATTACHMENT, other], set())
    attachments.lock(SANDBOX_ID).touch()
    (tmp_path / "cni" / f"{SANDBOX_ID}.new").write_text("half")
    await attachments.forget(SANDBOX_ID)
    await attachments.forget(SANDBOX_ID)
    assert [path.name for path in (tmp_path / "cni").iterdir()] == [f"{'6' * 64}.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"container_id": 3}', b"[" * 100_000])
async def test_a_damaged_file_is_no_attachment(tmp_path: Path, content: bytes) -> None:
    attachments = Attachments(tmp_path)
    (tmp_path / f"{SANDBOX_ID}.json").write_bytes(content)
    assert await attachments.load(SANDBOX_ID) is None
    assert await attachments.all() == ([], {SANDBOX_ID})


async def test_one_written_by_an_earlier_version(tmp_path: Path) -> None:
    """Keys that came later have defaults; those that went are passed over."""
    old = msgspec.to_builtins(ATTACHMENT)
    old["conf"] = {key: old["conf"][key] for key in ("name", "cni_version", "plugins", "source")}
    old["gone"] = 1
    was = msgspec.structs.replace(ATTACHMENT, conf=msgspec.structs.replace(ATTACHMENT.conf, offered=[]))
    (tmp_path / f"{SANDBOX_ID}.json").write_bytes(msgspec.json.encode(old))
    assert await Attachments(tmp_path).load(SANDBOX_ID) == was


async def test_a_disk_that_does_not_take_it(tmp_path: Path) -> None:
    (tmp_path / "cni").write_text("a file in its place")
    with pytest.raises(NetworkError, match="cannot be written") as caught:
        await Attachments(tmp_path / "cni").save(ATTACHMENT)
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    with pytest.raises(NetworkError, match="cannot be written"):
        await Attachments(tmp_path / "cni").keep(SANDBOX_ID)
