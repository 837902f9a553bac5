"""What containerd is told, without one."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from bench import containerd
from bench.containerd import PAUSE, Containerd, build_pause, config_text

CRI = "io.containerd.grpc.v1.cri"


def test_everything_is_below_one_directory() -> None:
    text = config_text(Path("/tmp/b"), Path("/tmp/b/net.d"), "/usr/lib/cni")
    config = tomllib.loads(text)
    cri = config["plugins"][CRI]
    assert config["version"] == 2
    paths = [
        config["root"],
        config["state"],
        config["grpc"]["address"],
        config["plugins"]["io.containerd.internal.v1.opt"]["path"],
        cri["cni"]["conf_dir"],
        cri["registry"]["config_path"],
        cri["containerd"]["runtimes"]["runc"]["options"]["Root"],
    ]
    assert [path for path in paths if not path.startswith("/tmp/b/")] == []
    assert cri["sandbox_image"] == PAUSE
    assert cri["netns_mounts_under_state_dir"] is True


def test_a_path_with_a_quote_stays_one_string() -> None:
    config = tomllib.loads(config_text(Path('/tmp/a"b\\c'), Path("/n"), "/c"))
    assert config["root"] == '/tmp/a"b\\c/root'


def test_the_network_is_that_of_our_daemon_with_a_bridge_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containerd, "cni_directory", lambda: "/usr/lib/cni")
    ours, other = (Containerd(tmp_path / name) for name in ("a", "b"))
    config = tomllib.loads((tmp_path / "a" / "config.toml").read_text())
    (conflist,) = Path(config["plugins"][CRI]["cni"]["conf_dir"]).iterdir()
    network = json.loads(conflist.read_text())
    assert network["name"] == network["plugins"][0]["bridge"] == ours.footprint.bridge
    assert [plugin["type"] for plugin in network["plugins"]] == ["bridge", "portmap"]
    assert len(ours.footprint.bridge) <= 15
    assert ours.footprint.bridge != other.footprint.bridge
    assert ours.footprint.cgroup_parent != other.footprint.cgroup_parent


def test_what_is_missing_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if name == "runc" else f"/bin/{name}")
    with (
        pytest.raises(RuntimeError, match=r"^runc: not found; `make bench-setup`"),
        containerd.containerd(tmp_path / "c"),
    ):
        pass


def test_the_pause_image_is_one_static_program_that_ends_when_told(tmp_path: Path) -> None:
    layout = build_pause(tmp_path / "pause")
    index = json.loads((layout / "index.json").read_text())
    assert index["manifests"][0]["annotations"] == {"org.opencontainers.image.ref.name": "image"}
    with subprocess.Popen([tmp_path / "pause" / "pause"]) as pause:
        with pytest.raises(subprocess.TimeoutExpired):
            pause.wait(0.2)
        pause.terminate()
        assert pause.wait(5) == 0
