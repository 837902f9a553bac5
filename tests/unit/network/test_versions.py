"""The protocol's version that a network and its plugins agree on, and the commands that came with later ones."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.network.conftest import PluginDirectory, attach, network
from vmruntime.errors import Code
from vmruntime.network.cni import Cni
from vmruntime.network.conf import default
from vmruntime.network.errors import NetworkConfigError, NetworkError
from vmruntime.network.plugins import Plugins

ALL = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
RESULT: dict[str, Any] = {"ips": [{"address": "10.1.0.5/16"}]}
ATTACHMENT_KEY = "cni.dev/valid-attachments"


@pytest.fixture
def cni(plugins: PluginDirectory) -> Cni:
    return Cni(Plugins(plugins.bin_dirs, timeout=20.0))


async def test_the_newest_that_all_speak(cni: Cni, plugins: PluginDirectory) -> None:
    plugins.speaking("first", *ALL)
    plugins.speaking("ipam", *ALL[:-1])
    plugins.speaking("second", *ALL)
    conf = network({"type": "first", "ipam": {"type": "ipam"}}, {"type": "second"}, cniVersions=["0.4.0", "1.1.0"])
    assert (await cni.negotiated(conf)).cni_version == "1.0.0"
    assert sorted(plugins.calls()) == ["first VERSION", "ipam VERSION", "second VERSION"]
    assert plugins.request("ipam", "VERSION") == {"cniVersion": "1.1.0"}
    assert plugins.environment("ipam", "VERSION")["CNI_NETNS"] == "dummy"
    await cni.negotiated(conf)
    assert plugins.calls() == []  # once is enough
    plugins.speaking("ipam", *ALL, "2.0.0")
    assert (await cni.negotiated(conf)).cni_version == "1.1.0"
    assert plugins.calls() == ["ipam VERSION"]  # but a new program is asked again


async def test_none_that_all_speak(cni: Cni, plugins: PluginDirectory) -> None:
    plugins.speaking("old", "0.3.1", "0.4.0")
    plugins.speaking("new", "1.0.0", "1.1.0")
    with pytest.raises(NetworkConfigError) as caught:
        await cni.negotiated(network({"type": "old"}, {"type": "new"}, cniVersions=["0.4.0"]))
    assert caught.value.message == (
        "/etc/cni/net.d/1.conflist: `cniVersion`: not all plugins speak 0.4.0 or 1.0.0: "
        "old speaks 0.3.1, 0.4.0; new speaks 1.0.0, 1.1.0"
    )


@pytest.mark.parametrize("script", ["exit 0", "echo nonsense", "exit 1", "echo '{\"supportedVersions\": 3}'"])
async def test_plugins_that_do_not_tell(cni: Cni, plugins: PluginDirectory, script: str) -> None:
    """They are taken at the file's word."""
    plugins.script("silent", script)
    plugins.speaking("other", "0.4.0", "1.0.0")
    conf = network({"type": "silent"}, {"type": "other"}, cniVersions=["1.1.0"])
    for _ in range(2):
        assert (await cni.negotiated(conf)).cni_version == "1.0.0"
    assert plugins.calls().count("silent VERSION") == 1


async def test_a_plugin_that_hangs_is_asked_again(plugins: PluginDirectory) -> None:
    cni = Cni(Plugins(plugins.bin_dirs, timeout=0.5))
    plugins.script("ours", "sleep 1000")
    for _ in range(2):
        with pytest.raises(NetworkError, match="ours VERSION failed") as caught:
            await cni.negotiated(network({"type": "ours"}))
        assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert plugins.calls() == ["ours VERSION"] * 2


async def test_the_built_in_network_suits_old_and_new_plugins(cni: Cni, plugins: PluginDirectory) -> None:
    for versions, chosen in ((ALL, "1.1.0"), (ALL[:-1], "1.0.0"), (ALL[:-2], "0.4.0")):
        for name in ("bridge", "host-local", "portmap"):
            plugins.speaking(name, *versions)
        assert (await cni.negotiated(default("10.88.0.0/16"))).cni_version == chosen


async def test_status(cni: Cni, plugins: PluginDirectory) -> None:
    plugins.plugin("first")
    plugins.failing("second", "STATUS", code=50, msg="no controller", details="it does not answer")
    chain = ({"type": "first", "mtu": 1400}, {"type": "second"}, {"type": "third"})
    await cni.status(network(*chain, version="1.0.0"))
    assert plugins.calls() == []  # before it was thought of
    with pytest.raises(NetworkError, match="second STATUS failed: no controller it does not answer") as caught:
        await cni.status(network(*chain, version="1.1.0"))
    assert caught.value.code is Code.UNAVAILABLE
    assert plugins.calls() == ["first STATUS", "second STATUS"]
    assert plugins.request("first", "STATUS") == {"type": "first", "mtu": 1400, "name": "net", "cniVersion": "1.1.0"}
    environment = plugins.environment("first", "STATUS")
    assert {key for key in environment if key.startswith("CNI_")} == {"CNI_COMMAND", "CNI_PATH"}


async def test_garbage_collection(cni: Cni, plugins: PluginDirectory) -> None:
    plugins.failing("first", "GC", code=100, msg="locked")
    plugins.plugin("second")
    chain = ({"type": "first"}, {"type": "second", "capabilities": {"portMappings": True}, ATTACHMENT_KEY: "rubbish"})
    valid = [attach(network({"type": "first"}), container_id=name) for name in ("a", "b")]
    for conf in (network(*chain), network(*chain, version="1.1.0", disableGC=True)):
        assert await cni.collect(conf, valid) is False
    assert plugins.calls() == []
    with pytest.raises(NetworkError, match="first GC failed: locked"):
        await cni.collect(network(*chain, version="1.1.0"), valid)
    assert plugins.calls() == ["first GC", "second GC"]
    assert plugins.request("second", "GC") == {
        "type": "second",
        "name": "net",
        "cniVersion": "1.1.0",
        ATTACHMENT_KEY: [{"containerID": "a", "ifname": "eth0"}, {"containerID": "b", "ifname": "eth0"}],
    }
    environment = plugins.environment("second", "GC")
    assert {key for key in environment if key.startswith("CNI_")} == {"CNI_COMMAND", "CNI_PATH"}
    plugins.plugin("first")
    assert await cni.collect(network(*chain, version="1.1.0"), []) is True
    assert plugins.request("first", "GC")[ATTACHMENT_KEY] == []


async def test_check(cni: Cni, plugins: PluginDirectory, lock: int) -> None:
    plugins.plugin("first")
    plugins.failing("second", "CHECK", code=100, msg="the address is gone")
    chain = ({"type": "first"}, {"type": "second", "capabilities": {"bandwidth": True}}, {"type": "third"})
    capabilities = {"bandwidth": {"ingressRate": 1000}}
    for unchecked in (
        attach(network(*chain), result=None),
        attach(network(*chain, version="0.3.1"), result=RESULT),
        attach(network(*chain, disableCheck=True), result=RESULT),
    ):
        assert await cni.check(unchecked, lock) is False
    assert plugins.calls() == []
    attachment = attach(network(*chain), result=RESULT, capabilities=capabilities)
    with pytest.raises(NetworkError, match="second CHECK failed: the address is gone"):
        await cni.check(attachment, lock)
    assert plugins.calls() == ["first CHECK", "second CHECK"]
    request = plugins.request("second", "CHECK")
    assert (request["prevResult"], request["runtimeConfig"]) == (RESULT, capabilities)
    assert plugins.environment("first", "CHECK")["CNI_NETNS"] == "/run/netns/none"  # whether it exists or not
    plugins.plugin("second")
    plugins.plugin("third")
    assert await cni.check(attachment, lock) is True
