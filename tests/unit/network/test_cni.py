"""Plugin chains with plugins that do as they like: what each is given, and what becomes of what it says."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.network.conftest import SANDBOX_ID, PluginDirectory, attach, network
from vmruntime.errors import Code
from vmruntime.network.cni import Cni
from vmruntime.network.errors import NetworkError
from vmruntime.network.plugins import ANSWER_LIMIT, Plugins

RESULT: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "eth0", "sandbox": "/run/netns/none"}],
    "ips": [{"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 0}],
    "routes": [{"dst": "0.0.0.0/0"}],
}
CHAIN = network({"type": "first", "mtu": 1400}, {"type": "second", "capabilities": {"portMappings": True}})


@pytest.fixture
def cni(plugins: PluginDirectory) -> Cni:
    return Cni(Plugins(plugins.bin_dirs, timeout=20.0))


def failing_add(cni: Cni, lock: int) -> Any:
    return cni.add(attach(network({"type": "ours"})), lock)


async def test_a_chain_passes_its_result_on(cni: Cni, plugins: PluginDirectory, lock: int) -> None:
    more = {**RESULT, "dns": {"nameservers": ["10.1.0.1"]}}
    plugins.plugin("first", ADD=RESULT)
    plugins.plugin("second", ADD=more)
    attachment = attach(CHAIN, capabilities={"portMappings": [{"hostPort": 80}], "bandwidth": {"ingressRate": 1}})
    result = await cni.add(attachment, lock)
    assert plugins.calls() == ["first ADD", "second ADD"]
    assert plugins.request("first", "ADD") == {"type": "first", "mtu": 1400, "name": "net", "cniVersion": "1.0.0"}
    assert plugins.request("second", "ADD") == {
        "type": "second",
        "name": "net",
        "cniVersion": "1.0.0",
        "prevResult": RESULT,
        "runtimeConfig": {"portMappings": [{"hostPort": 80}]},
    }
    environment = plugins.environment("second", "ADD")
    assert {key: value for key, value in environment.items() if key.startswith("CNI_")} == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": SANDBOX_ID,
        "CNI_NETNS": "/run/netns/none",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=web",
        "CNI_PATH": str(plugins.bin),
    }
    assert attachment.result == more
    assert result.dns.servers == ["10.1.0.1"]

    await cni.delete(attachment, lock)
    assert plugins.calls() == ["second DEL", "first DEL"]
    assert plugins.request("first", "DEL")["prevResult"] == more
    assert plugins.environment("first", "DEL")["CNI_NETNS"] == ""  # it does not exist


async def test_a_namespace_that_is_there_is_named_at_the_end(
    cni: Cni, plugins: PluginDirectory, lock: int, tmp_path: Path
) -> None:
    plugins.plugin("ours")
    await cni.delete(attach(network({"type": "ours"}), netns=str(tmp_path)), lock)
    assert plugins.environment("ours", "DEL")["CNI_NETNS"] == str(tmp_path)
    assert "prevResult" not in plugins.request("ours", "DEL")


async def test_old_plugins_get_no_result_at_the_end(cni: Cni, plugins: PluginDirectory, lock: int) -> None:
    plugins.plugin("ours", ADD={"ip4": {"ip": "10.1.0.5/16"}})
    attachment = attach(network({"type": "ours"}, version="0.3.1"))
    await cni.add(attachment, lock)
    await cni.delete(attachment, lock)
    assert "prevResult" not in plugins.request("ours", "DEL")
    assert plugins.request("ours", "DEL")["cniVersion"] == "0.3.1"


async def test_what_the_file_says_in_the_runtimes_place_is_not_passed_on(
    cni: Cni, plugins: PluginDirectory, lock: int
) -> None:
    plugins.plugin("ours", ADD=RESULT)
    plugin = {"type": "ours", "runtimeConfig": {"a": 1}, "prevResult": {"b": 2}, "name": "other", "cniVersion": "0.1.0"}
    await cni.add(attach(network(plugin)), lock)
    assert plugins.request("ours", "ADD") == {"type": "ours", "name": "net", "cniVersion": "1.0.0"}


async def test_a_failed_plugin_ends_the_chain(cni: Cni, plugins: PluginDirectory, lock: int) -> None:
    plugins.failing("first", "ADD", cniVersion="1.0.0", code=7, msg="no", details="the\nsubnet\tis\x00 bad")
    plugins.plugin("second", ADD=RESULT)
    with pytest.raises(NetworkError) as caught:
        await cni.add(attach(CHAIN), lock)
    assert caught.value.message == "network net (/etc/cni/net.d/1.conflist): first ADD failed: no the subnet is bad"
    assert (caught.value.cni_code, caught.value.code) == (7, Code.INTERNAL)
    assert plugins.calls() == ["first ADD"]


@pytest.mark.parametrize(("number", "code"), [(11, Code.UNAVAILABLE), (50, Code.UNAVAILABLE), (100, Code.INTERNAL)])
async def test_error_codes(cni: Cni, plugins: PluginDirectory, lock: int, number: int, code: Code) -> None:
    plugins.failing("ours", "ADD", code=number, msg="words")
    with pytest.raises(NetworkError, match="words") as caught:
        await failing_add(cni, lock)
    assert (caught.value.cni_code, caught.value.code) == (number, code)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 0", "ours ADD answered nothing"),
        ("echo; exit 0", "ours ADD answered nothing"),
        ("echo nonsense", "ours ADD answered no JSON"),
        ("echo '[]'", "ours ADD answered no JSON object"),
        ("printf '\\377\\376'", "ours ADD answered no JSON"),
        ("head -c 200000 /dev/zero | tr '\\0' '['", "ours ADD answered no JSON"),
        ("echo '{}'", "no IP address in the pod"),
        ("echo '{}'; exit 3", "ours ADD failed: {}"),
        ("exit 3", "ours ADD failed: status 3, and it said nothing"),
        ("kill -9 $$", "ours ADD failed: signal 9, and it said nothing"),
        ("echo words; exit 3", "ours ADD failed: words"),
        ("echo no route >&2; exit 3", "ours ADD failed: no route"),
        ('echo \'{"code": "x", "msg": 5}\'; echo why >&2; exit 1', "ours ADD failed: why"),
        ('echo \'{"code": 1e999, "msg": "a"}\'; exit 1', "ours ADD failed: "),
        ('printf \'{"code": 7, "msg": "\'; head -c 100000 /dev/zero | tr "\\0" x; echo \'"}\'; exit 1', "xxxx…"),
    ],
)
async def test_plugins_that_say_something_else(
    cni: Cni, plugins: PluginDirectory, lock: int, script: str, message: str
) -> None:
    plugins.script("ours", script)
    with pytest.raises(NetworkError) as caught:
        await failing_add(cni, lock)
    assert message in caught.value.message
    assert caught.value.message.startswith("network net (/etc/cni/net.d/1.conflist): ")
    assert len(caught.value.message) < 1200
    assert caught.value.message.isprintable()


async def test_megabytes(cni: Cni, plugins: PluginDirectory, lock: int) -> None:
    plugins.script("ours", "head -c 30000000 /dev/zero")
    with pytest.raises(NetworkError, match=f"wrote more than {ANSWER_LIMIT} bytes"):
        await failing_add(cni, lock)
    plugins.script("ours", "head -c 30000000 /dev/zero >&2; echo end >&2; exit 1")
    with pytest.raises(NetworkError, match="end"):
        await failing_add(cni, lock)


async def test_a_plugin_that_hangs(plugins: PluginDirectory, lock: int) -> None:
    """It is ended with its children, and the message says what took how long."""
    plugins.script("ours", f"sleep 1000 & echo $! > {plugins.path}/child; wait")
    began = time.monotonic()
    with pytest.raises(NetworkError) as caught:
        await failing_add(Cni(Plugins(plugins.bin_dirs, timeout=1.0)), lock)
    assert time.monotonic() - began < 15
    assert "ours ADD failed" in caught.value.message
    assert "did not finish within 1 s" in caught.value.message
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert "network.plugin_timeout" in caught.value.remedy
    child = (plugins.path / "child").read_text().strip()
    stat = Path(f"/proc/{child}/stat")
    for _ in range(100):  # until its new parent has collected it
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError(f"{child} still runs")


async def test_programs_that_are_none(cni: Cni, plugins: PluginDirectory, lock: int) -> None:
    with pytest.raises(NetworkError, match="'ours' is in none of") as caught:
        await failing_add(cni, lock)
    assert "network.bin_dirs" in caught.value.remedy
    file = plugins.bin / "ours"
    file.write_bytes(b"\x7fELF rubbish")
    file.chmod(0o755)
    with pytest.raises(NetworkError, match="cannot be run: Exec format error"):
        await failing_add(cni, lock)
    file.write_text("#!/no/such/interpreter\n")
    with pytest.raises(NetworkError, match="ours ADD failed"):
        await failing_add(cni, lock)
    file.chmod(0o644)
    assert cni.missing(network({"type": "ours", "ipam": {"type": "other"}})) == ["ours", "other"]


async def test_every_plugin_is_told_of_the_end(plugins: PluginDirectory, lock: int) -> None:
    """Whatever the others do: fail, hang, or be gone."""
    plugins.failing("first", "DEL", code=100, msg="busy")
    plugins.script("second", "sleep 1000")
    plugins.plugin("fourth")
    conf = network(*({"type": name} for name in ("first", "second", "third", "fourth")))
    with pytest.raises(NetworkError) as caught:
        await Cni(Plugins(plugins.bin_dirs, timeout=1.0)).delete(attach(conf), lock)
    assert plugins.calls() == ["fourth DEL", "second DEL", "first DEL"]
    for words in ("'third' is in none of", "second DEL failed", "did not finish", "first DEL failed: busy"):
        assert words in caught.value.message
