"""CNI configuration files: which one counts, what it may say, and what is said of one that cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from vmruntime.network.conf import BUILT_IN, SIZE_LIMIT, SUPPORTED_VERSIONS, default, find, parse, read
from vmruntime.network.errors import NetworkConfigError

SUBNET = "10.88.0.0/16"
GOOD = {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge", "ipam": {"type": "host-local"}}]}


def write(path: Path, raw: object) -> Path:
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return path


def test_without_files_the_built_in_network_is_used(tmp_path: Path) -> None:
    (tmp_path / "20-directory.conf").mkdir()
    os.mkfifo(tmp_path / "30-pipe.conf")
    write(tmp_path / "README", "not a network")
    write(tmp_path / "10-net.conflist.rpmsave", "neither")
    for directory in (tmp_path, tmp_path / "missing", tmp_path / "README" / "below"):
        found = find(directory, SUBNET)
        assert (found.conf.source, found.skipped) == (BUILT_IN, ())
    assert found.conf.programs == ["bridge", "host-local", "portmap"]
    assert found.conf.plugins[0]["ipam"]["routes"] == [{"dst": "0.0.0.0/0"}]
    assert default("fd00::/64").plugins[0]["ipam"]["routes"] == [{"dst": "::/0"}]
    both = default("10.88.0.0/16, fd88::/64").plugins[0]["ipam"]
    assert both["ranges"] == [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]]
    assert both["routes"] == [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]


@pytest.mark.parametrize("subnet", ["10.88.0.1/16", "10.88.0.0/30", "pods", "", "10.88.0.0/16,"])
def test_the_built_in_networks_subnet_is_checked(tmp_path: Path, subnet: str) -> None:
    with pytest.raises(NetworkConfigError, match=r"network\.default_subnet"):
        find(tmp_path, subnet)


def test_the_first_usable_file_by_name_counts(tmp_path: Path) -> None:
    write(tmp_path / "20-b.conflist", {**GOOD, "name": "b"})
    write(tmp_path / "10-a.conf", "{")
    write(tmp_path / "15-a.json", {"name": "loop", "cniVersion": "1.0.0", "type": "loopback"})
    write(tmp_path / "30-c.conflist", {**GOOD, "name": "c"})
    found = find(tmp_path, SUBNET)
    assert found.conf.name == "b"
    assert found.conf.source == str(tmp_path / "20-b.conflist")
    assert ["not JSON" in found.skipped[0], "loopback" in found.skipped[1]] == [True, True]


def test_files_that_cannot_be_used_do_not_make_way_for_the_built_in_network(tmp_path: Path) -> None:
    write(tmp_path / "10-a.conf", "{")
    write(tmp_path / "20-b.conf", {"name": "b", "type": "bridge"})
    with pytest.raises(NetworkConfigError) as caught:
        find(tmp_path, SUBNET)
    assert f"{tmp_path}/10-a.conf: not JSON" in caught.value.message
    assert f"{tmp_path}/20-b.conf: `cniVersion` is missing" in caught.value.message


def test_a_single_plugin_is_a_list_of_one(tmp_path: Path) -> None:
    raw = {"cniVersion": "0.4.0", "name": "one", "type": "ptp", "ipam": {"type": "host-local"}, "mtu": 1400}
    conf = read(write(tmp_path / "1.conf", raw))
    assert (conf.name, conf.cni_version, conf.plugins) == ("one", "0.4.0", [raw])
    assert conf.programs == ["ptp", "host-local"]


@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_every_version_is_spoken(version: str) -> None:
    conf = parse({**GOOD, "cniVersion": version}, "f")
    assert conf.cni_version == version
    assert conf.at_least("0.1.0")
    assert conf.at_least("1.1.0") == (version == "1.1.0")


@pytest.mark.parametrize(
    ("keys", "version"),
    [
        ({"cniVersions": ["0.4.0", "1.0.0"]}, "1.0.0"),
        ({"cniVersion": "1.0.0", "cniVersions": ["0.4.0", "1.1.0", "9.0.0"]}, "1.1.0"),
        ({"cniVersion": "0.4.0", "cniVersions": []}, "0.4.0"),
        ({"cniVersion": "9.0.0", "cniVersions": ["0.3.1"]}, "0.3.1"),
    ],
)
def test_the_newest_version_that_is_understood(keys: dict[str, Any], version: str) -> None:
    conf = parse({"name": "net", "plugins": [{"type": "bridge"}], **keys}, "f")
    assert conf.cni_version == version
    assert conf.offered[-1] == version
    assert set(conf.offered) <= {*keys.get("cniVersions", []), keys.get("cniVersion")}


@pytest.mark.parametrize(("value", "flag"), [(True, True), (False, False), ("true", True), ("False", False)])
def test_flags(value: object, flag: bool) -> None:
    assert parse({**GOOD, "disableCheck": value}, "f").disable_check is flag
    assert parse({**GOOD, "disableGC": value}, "f").disable_gc is flag
    assert parse(GOOD, "f").disable_gc is False


def test_plugins_in_files_of_their_own(tmp_path: Path) -> None:
    """Only those of the network's own directory, after the list's, by name; not for a single plugin."""
    (tmp_path / "net").mkdir()
    write(tmp_path / "net" / "20-tuning.conf", {"type": "tuning", "mtu": 1400})
    write(tmp_path / "net" / "10-firewall.conf", {"type": "firewall"})
    write(tmp_path / "net" / "README", "{")
    listed = write(tmp_path / "1.conflist", GOOD)
    assert [plugin["type"] for plugin in read(listed).plugins] == ["bridge", "firewall", "tuning"]
    alone = write(tmp_path / "2.conflist", {"name": "net", "cniVersion": "1.1.0"})
    assert [plugin["type"] for plugin in read(alone).plugins] == ["firewall", "tuning"]
    for only in (True, "true"):
        inlined = write(tmp_path / "3.conflist", {**GOOD, "loadOnlyInlinedPlugins": only})
        assert [plugin["type"] for plugin in read(inlined).plugins] == ["bridge"]
    single = write(tmp_path / "4.conf", {"name": "net", "cniVersion": "1.0.0", "type": "ptp"})
    assert [plugin["type"] for plugin in read(single).plugins] == ["ptp"]
    broken = write(tmp_path / "net" / "30-broken.conf", "{")
    with pytest.raises(NetworkConfigError, match="30-broken.conf: not JSON"):
        read(listed)
    write(broken, {"type": "../sh"})
    with pytest.raises(NetworkConfigError, match=r"1.conflist: `plugins\[3\].type`: '../sh'"):
        read(listed)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("[]", "expected an object, found list"),
        ("3", "expected an object, found int"),
        ("", "not JSON"),
        ('{"name": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "has neither `plugins` nor `type`"),
        ({"plugins": []}, "missing required field `name`"),
        ({"name": "a", "plugins": []}, "`plugins` is empty"),
        ({"name": "a", "plugins": {}}, "`plugins`: Expected `array`"),
        ({"name": "a", "plugins": ["bridge"]}, "`plugins[0]`: Expected `object`"),
        ({"name": "a", "plugins": [{}]}, "`plugins[0]`: Object missing required field `type`"),
        ({"name": "a", "plugins": [{"type": 3}]}, "`plugins[0].type`: Expected `str`, got `int`"),
        ({"name": "a", "plugins": [{"type": "../sh"}]}, "`plugins[0].type`: '../sh' is not a plugin name"),
        ({"name": "a", "plugins": [{"type": ""}]}, "`plugins[0].type`: '' is not a plugin name"),
        ({"name": "a", "plugins": [{"type": "b"}, {"type": "x" * 256}]}, "`plugins[1].type`"),
        ({"name": "a", "plugins": [{"type": "b", "ipam": {"type": "/bin/sh"}}]}, "`plugins[0].ipam.type`: '/bin/sh'"),
        ({"name": "a", "plugins": [{"type": "b", "ipam": {"type": ["x"]}}]}, "`plugins[0].ipam.type`"),
        ({"name": "a", "plugins": [{"type": "b", "capabilities": ["x"]}]}, "`plugins[0].capabilities`"),
        ({"name": "a b", "cniVersion": "1.0.0", "type": "b"}, "`name`: 'a b' is not a network name"),
        ({"name": "", "cniVersion": "1.0.0", "type": "b"}, "`name`: '' is not a network name"),
        ({"name": "a", "type": "b"}, "`cniVersion` is missing"),
        ({"name": "a", "cniVersion": "2.0.0", "type": "b"}, "`cniVersion`: 2.0.0 is not supported"),
        ({"name": "a", "cniVersion": 1, "type": "b"}, "`cniVersion`: Expected `str`"),
        ({"name": "a", "cniVersions": "1.0.0", "plugins": [{"type": "b"}]}, "`cniVersions`: Expected `array"),
        ({**GOOD, "disableCheck": "maybe"}, "`disableCheck`: 'maybe' is neither true nor false"),
        ({**GOOD, "disableGC": 3}, "`disableGC`: Expected `bool | str`"),
        ({**GOOD, "loadOnlyInlinedPlugins": "x"}, "`loadOnlyInlinedPlugins`: 'x' is neither true nor false"),
        ({**GOOD, "loadOnlyInlinedPlugins": 3}, "`loadOnlyInlinedPlugins`: Expected `bool | str`"),
        ({"name": "lo", "cniVersion": "1.0.0", "type": "loopback"}, "loopback plugin alone"),
        (" " * SIZE_LIMIT + "{}", f"larger than {SIZE_LIMIT} bytes"),
    ],
    ids=str,
)  # fmt: skip
def test_complaints_name_file_and_key(tmp_path: Path, raw: object, message: str) -> None:
    path = write(tmp_path / "1.conflist", raw)
    with pytest.raises(NetworkConfigError) as caught:
        read(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert message in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "1.conf").symlink_to("nowhere")
    write(tmp_path / "2.conf", GOOD).write_bytes(b'{"name": "\xff\xfe"}')
    with pytest.raises(NetworkConfigError) as caught:
        find(tmp_path, SUBNET)
    assert "1.conf: No such file" in caught.value.message
    assert "2.conf: not JSON" in caught.value.message
