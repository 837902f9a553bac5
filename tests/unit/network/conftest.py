from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmruntime.config.settings import NetworkSettings
from vmruntime.model.sandbox import Sandbox, SandboxMetadata, SandboxSpec, SandboxState
from vmruntime.network import conf as configuration
from vmruntime.network.attachments import Attachment, Attachments
from vmruntime.network.conf import NetworkConf
from vmruntime.network.service import NetworkService
from vmruntime.paths import Paths

SANDBOX_ID = "5" * 64
ALL = ("0.4.0", "1.0.0", "1.1.0")


class PluginDirectory:
    """CNI plugins that write down what they are told and answer what a test says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bin = path / "bin"
        self.bin.mkdir(parents=True)

    @property
    def bin_dirs(self) -> list[str]:
        return [str(self.bin)]

    def script(self, name: str, text: str) -> Path:
        """Make a plugin of a shell script; its request is at $request, its answers at $base.COMMAND."""
        file = self.bin / name
        head = (
            "#!/bin/sh\n"
            f'base="{self.path}/{name}"; request="$base.$CNI_COMMAND.request"\n'
            f'echo "{name} $CNI_COMMAND" >> "{self.path}/calls"\n'
            'cat > "$request"; env > "$base.$CNI_COMMAND.env"\n'
        )
        # Written elsewhere first: a program open for writing cannot be run (execve(2), ETXTBSY).
        new = self.path / "new"
        new.write_text(f"{head}{text}\n")
        new.chmod(0o755)
        new.replace(file)
        return file

    def plugin(self, name: str, **answers: Any) -> None:
        """Make a plugin that answers each command as given: text, an object, or an int to exit with."""
        for command in ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"):
            (self.path / f"{name}.{command}").unlink(missing_ok=True)
        for command, answer in answers.items():
            text = answer if isinstance(answer, str) else json.dumps(answer)
            (self.path / f"{name}.{command}").write_text(text)
        self.script(name, '[ -e "$base.$CNI_COMMAND" ] && cat "$base.$CNI_COMMAND"; exit 0')

    def speaking(self, name: str, *versions: str) -> None:
        """Make a plugin that tells these versions and has no more to say."""
        self.plugin(name, VERSION={"cniVersion": "1.0.0", "supportedVersions": list(versions)})

    def failing(self, name: str, command: str, **error: Any) -> None:
        """Make a plugin fail at one command with a CNI error."""
        (self.path / f"{name}.error").write_text(json.dumps(error))
        self.script(name, f'[ $CNI_COMMAND = {command} ] && cat "$base.error" && exit 1; exit 0')

    def calls(self) -> list[str]:
        """Return what was run since the last time, as "plugin COMMAND"."""
        file = self.path / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def request(self, name: str, command: str) -> dict[str, Any]:
        """Return the request of the last such call."""
        request = json.loads((self.path / f"{name}.{command}.request").read_text())
        assert isinstance(request, dict)
        return request

    def environment(self, name: str, command: str) -> dict[str, str]:
        """Return the environment of the last such call."""
        lines = (self.path / f"{name}.{command}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def plugins(tmp_path: Path) -> PluginDirectory:
    return PluginDirectory(tmp_path / "cni")


@pytest.fixture
def lock() -> Iterator[int]:
    """A descriptor that plugins may inherit."""
    descriptor = os.open("/dev/null", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def network(*plugins: dict[str, Any], version: str = "1.0.0", **keys: Any) -> NetworkConf:
    """Return a network, checked like one of a file."""
    raw = {"name": "net", "cniVersion": version, "plugins": list(plugins)} | keys
    return configuration.parse(raw, "/etc/cni/net.d/1.conflist")


def attach(conf: NetworkConf, **changes: Any) -> Attachment:
    attachment = Attachment(
        container_id=SANDBOX_ID,
        netns="/run/netns/none",
        ifname="eth0",
        conf=conf,
        args="IgnoreUnknown=1;K8S_POD_NAME=web",
        capabilities={},
    )
    return msgspec.structs.replace(attachment, **changes)


def sandbox(**spec: Any) -> Sandbox:
    metadata = SandboxMetadata(name="web", uid="uid-web", namespace="default")
    return Sandbox(
        id=SANDBOX_ID, spec=SandboxSpec(metadata=metadata, **spec), state=SandboxState.CREATING, created_at=0
    )


class Rig:
    """A service with plugins and files of the test's own."""

    def __init__(self, plugins: PluginDirectory, base: Path) -> None:
        self.plugins = plugins
        self.conf_dir = base / "net.d"
        self.conf_dir.mkdir()
        self.paths = Paths(root=base / "root", run=base / "run")
        self.attachments = Attachments(self.paths.cni_cache)
        settings = NetworkSettings(conf_dir=str(self.conf_dir), bin_dirs=plugins.bin_dirs, plugin_timeout=20.0)
        self.service = NetworkService(self.paths, settings)

    def configure(self, version: str = "1.1.0", name: str = "net", **keys: Any) -> Path:
        path = self.conf_dir / "10-net.conflist"
        raw = {"cniVersion": version, "name": name, "plugins": [{"type": "ours"}]} | keys
        path.write_text(json.dumps(raw))
        return path

    def cached(self) -> set[str]:
        return {path.name for path in self.paths.cni_cache.glob("*")}


@pytest.fixture
def rig(plugins: PluginDirectory, tmp_path: Path) -> Rig:
    return Rig(plugins, tmp_path)
