"""A configuration made of a template and the node's pod CIDRs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.network.conftest import ALL, Rig
from vmruntime.config.settings import NetworkSettings
from vmruntime.errors import Code
from vmruntime.network.errors import NetworkConfigError, NetworkError
from vmruntime.network.service import NetworkService
from vmruntime.network.template import FILE_NAME, SIZE_LIMIT, render, write

TEMPLATE = """{
  "cniVersions": ["1.0.0", "1.1.0"], "name": "pods",
  "plugins": [{"type": "ours", "first": "${pod_cidr}", "all": ${pod_cidrs}, "dollar": "$$",
               "ipam": {"type": "ours", "ranges": ${ranges}, "routes": ${routes}}}]
}"""
V4, V6 = "10.244.1.0/24", "fd00:1::/64"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.json"
    path.write_text(TEMPLATE)
    return path


@pytest.mark.parametrize(
    ("cidrs", "ranges", "routes"),
    [
        ([V4], [[{"subnet": V4}]], ["0.0.0.0/0"]),
        ([V6], [[{"subnet": V6}]], ["::/0"]),
        ([V6, V4], [[{"subnet": V4}], [{"subnet": V6}]], ["0.0.0.0/0", "::/0"]),
        # A pod gets one address of each IP version, whatever the number of networks.
        ([V4, "10.244.9.0/24"], [[{"subnet": V4}, {"subnet": "10.244.9.0/24"}]], ["0.0.0.0/0"]),
    ],
)
def test_filled_in(template: Path, cidrs: list[str], ranges: object, routes: list[str]) -> None:
    text, conf = render(template, cidrs)
    (plugin,) = json.loads(text)["plugins"]
    assert plugin == {
        "type": "ours",
        "first": cidrs[0],
        "all": cidrs,
        "dollar": "$",
        "ipam": {"type": "ours", "ranges": ranges, "routes": [{"dst": dst} for dst in routes]},
    }
    assert (conf.name, conf.plugins) == ("pods", [plugin])


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("${subnet}", "${subnet} is not known", "${pod_cidr}, ${pod_cidrs}, ${ranges}, ${routes}"),
        ("{}\n  $", "Invalid placeholder in string: line 2, col 3", "$$ is a dollar sign"),
        ('{"name": "${pod_cidr}"', "not JSON once filled in", ""),
        ('{"name": "a", "plugins": [{"type": "b", "subnet": {{.PodCIDR}}}]}', "not JSON", "write ${ranges}"),
        ('{"name": "a", "cniVersion": "1.0.0", "plugins": [{"type": "../b"}]}', "`plugins[0].type`: '../b'", ""),
        ("", "not JSON once filled in", ""),
        ("é".encode("latin-1"), "not UTF-8 text at byte 0", ""),
        ("x" * (SIZE_LIMIT + 1), f"larger than {SIZE_LIMIT} bytes", ""),
    ],
)  # fmt: skip
def test_complaints_name_the_template(template: Path, text: str | bytes, message: str, remedy: str) -> None:
    template.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(NetworkConfigError) as caught:
        render(template, [V4])
    assert caught.value.message.startswith(f"{template}: ")
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NetworkConfigError, match=r"network\.conf_template: .*/none: No such file"):
        render(tmp_path / "none", [V4])


def test_written_whole_and_only_when_changed(tmp_path: Path) -> None:
    directory = tmp_path / "cni" / "net.d"
    assert write("one", directory) is True
    path = directory / FILE_NAME
    inode = path.stat().st_ino
    assert path.stat().st_mode & 0o777 == 0o644
    assert write("one", directory) is False
    assert path.stat().st_ino == inode
    assert write("two", directory) is True
    assert path.read_text() == "two"
    assert list(directory.iterdir()) == [path]
    path.unlink()
    path.mkdir()
    with pytest.raises(NetworkError, match="cannot be written") as caught:
        write("three", directory)
    assert caught.value.code is Code.RESOURCE_EXHAUSTED


def service(rig: Rig, template: Path | str) -> NetworkService:
    settings = NetworkSettings(
        conf_dir=str(rig.conf_dir), bin_dirs=rig.plugins.bin_dirs, plugin_timeout=20.0, conf_template=str(template)
    )
    rig.plugins.speaking("ours", *ALL)
    return NetworkService(rig.paths, settings)


async def test_the_network_waits_for_kubelet(rig: Rig, template: Path) -> None:
    """Pods must not land in the built-in network meanwhile."""
    network = service(rig, template)
    ready, why = await network.ready()
    assert (ready, "waits for kubelet's pod CIDR" in why) == (False, True)
    template.write_text("{")
    with pytest.raises(NetworkConfigError, match="not JSON"):
        await network.use_pod_cidrs([V4])
    ready, why = await network.ready()
    assert (ready, "not JSON" in why) == (False, True)
    template.write_text(TEMPLATE)
    await network.use_pod_cidrs([V4])
    assert await network.ready() == (True, "")
    assert await service(rig, template).ready() == (True, "")  # a restarted daemon need not be told again


async def test_a_new_pod_cidr_replaces_our_file_only(rig: Rig, template: Path) -> None:
    network = service(rig, template)
    ours = rig.conf_dir / FILE_NAME
    (rig.conf_dir / "00-broken.conflist").write_text("{")  # of no use to anybody
    await network.use_pod_cidrs([V4])
    await network.use_pod_cidrs([V6])
    assert V6 in ours.read_text()
    theirs = rig.configure(name="theirs")
    await network.use_pod_cidrs([V4])
    assert V6 in ours.read_text()
    ours.unlink()
    await network.use_pod_cidrs([V4])
    assert not ours.exists()
    assert json.loads(theirs.read_text())["name"] == "theirs"


async def test_without_a_template_nothing_is_made(rig: Rig) -> None:
    await service(rig, "").use_pod_cidrs([V4])
    assert list(rig.conf_dir.iterdir()) == []
