"""The service around the chains: readiness, looking after attachments. What needs a namespace is tested end to end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import structlog.testing

from tests.unit.network.conftest import ALL, Rig, attach, network, sandbox
from vmruntime.errors import Code
from vmruntime.network import service
from vmruntime.network.errors import NetworkConfigError, NetworkError

RESULT: dict[str, Any] = {"ips": [{"address": "10.1.0.5/16"}]}


async def test_ready_follows_the_files(rig: Rig) -> None:
    """Each answer is about the directory as it is now."""
    ready, why = await rig.service.ready()
    assert (ready, "bridge, host-local, portmap" in why) == (False, True)  # the built-in network needs them
    rig.plugins.speaking("ours", *ALL)
    path = rig.configure()
    assert await rig.service.ready() == (True, "")
    rig.plugins.failing("ours", "STATUS", code=51, msg="the uplink is down")
    ready, why = await rig.service.ready()
    assert (ready, "ours STATUS failed: the uplink is down" in why) == (False, True)
    path.write_text("{")
    ready, why = await rig.service.ready()
    assert (ready, f"{path}: not JSON" in why) == (False, True)
    rig.plugins.speaking("ours", "0.4.0")
    rig.configure()
    ready, why = await rig.service.ready()
    assert (ready, "ours speaks 0.4.0" in why) == (False, True)


async def test_a_skipped_file_is_told_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    # A logger of its own: a daemon in another test may have made the real one fast, past any capturing.
    logger = structlog.testing.CapturingLogger()
    monkeypatch.setattr(
        service, "log", structlog.wrap_logger(logger, processors=[], wrapper_class=structlog.BoundLogger)
    )
    rig.plugins.speaking("ours", *ALL)
    rig.configure()
    (rig.conf_dir / "00-broken.conf").write_text("{")
    for _ in range(3):
        assert await rig.service.ready() == (True, "")
    assert [call.kwargs["event"] for call in logger.calls] == ["CNI configuration skipped"]
    assert f"{rig.conf_dir}/00-broken.conf: not JSON" in logger.calls[0].kwargs["reason"]


async def test_nothing_is_begun_without_plugins(rig: Rig) -> None:
    """So there is nothing to undo, which would need the plugins too."""
    rig.configure()
    with pytest.raises(NetworkConfigError, match="plugins not installed: ours"):
        await rig.service.add(sandbox())
    assert rig.cached() == set()


async def test_check(rig: Rig) -> None:
    assert await rig.service.check("a") is False
    assert rig.cached() == set()
    rig.plugins.plugin("ours")
    attachment = attach(network({"type": "ours"}), container_id="a", result=RESULT)
    await rig.attachments.save(attachment)
    assert await rig.service.check("a") is True
    rig.plugins.failing("ours", "CHECK", code=100, msg="the route is gone")
    with pytest.raises(NetworkError, match="ours CHECK failed: the route is gone"):
        await rig.service.check("a")
    await rig.service.teardown("a")
    assert rig.cached() == set()


async def test_collect(rig: Rig) -> None:
    """What nobody owns gets DEL; the plugins hear of the rest, network by network."""
    rig.plugins.speaking("ours", *ALL)
    rig.configure()
    here, elsewhere = network({"type": "ours"}), network({"type": "ours"}, name="other")
    await rig.attachments.save(attach(here, container_id="stays"))
    await rig.attachments.save(attach(here, container_id="goes", result=RESULT))
    await rig.attachments.save(attach(elsewhere, container_id="old"))
    await rig.service.collect({"stays", "old", "without-a-network"})
    assert [call for call in rig.plugins.calls() if "VERSION" not in call] == ["ours DEL", "ours GC"]
    assert rig.plugins.environment("ours", "DEL")["CNI_CONTAINERID"] == "goes"
    valid = rig.plugins.request("ours", "GC")["cni.dev/valid-attachments"]
    assert valid == [{"containerID": "stays", "ifname": "eth0"}]
    assert {name for name in rig.cached() if name.endswith(".json")} == {"stays.json", "old.json"}


async def test_no_garbage_is_collected_while_a_file_cannot_be_read(rig: Rig) -> None:
    """Plugins would take away the address of the pod that it belongs to; a stranger's file is no reason."""
    rig.plugins.speaking("ours", *ALL)
    rig.configure()
    await rig.attachments.save(attach(network({"type": "ours"}), container_id="goes", result=RESULT))
    (rig.paths.cni_cache / "damaged.json").write_text("{")
    with pytest.raises(NetworkError, match="addresses from damaged, whose"):
        await rig.service.collect({"damaged"})
    assert [call for call in rig.plugins.calls() if "VERSION" not in call] == ["ours DEL"]
    await rig.service.collect(set())
    assert "ours GC" in rig.plugins.calls()


async def test_collect_says_what_could_not_be_released(rig: Rig) -> None:
    rig.configure()
    rig.plugins.failing("ours", "DEL", code=11, msg="later")
    await rig.attachments.save(attach(network({"type": "ours"}), container_id="goes"))
    with pytest.raises(NetworkError, match="ours DEL failed: later"):
        await rig.service.collect(set())
    assert "ours GC" in rig.plugins.calls()
    assert "goes.json" in rig.cached()
    (rig.conf_dir / "10-net.conflist").write_text("{")
    with pytest.raises(NetworkConfigError, match="not JSON"):
        await rig.service.collect({"goes"})


async def test_teardown_with_a_damaged_cache(rig: Rig) -> None:
    """Nothing is known of the network, so nothing can be said to plugins; the rest goes."""
    rig.paths.cni_cache.mkdir(parents=True)
    (rig.paths.cni_cache / "a.json").write_text("{")
    await rig.service.teardown("a")
    assert rig.cached() == set()


async def test_a_full_disk_ends_the_start(rig: Rig) -> None:
    rig.plugins.speaking("ours", *ALL)
    rig.configure()
    rig.paths.root.mkdir()
    rig.paths.cni_cache.write_text("a file in its place")
    with pytest.raises(NetworkError, match="cannot be written") as caught:
        await rig.service.add(sandbox())
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert msgspec.json.encode(caught.value.__notes__)  # the clean-up failed for the same reason
    assert [call for call in rig.plugins.calls() if "VERSION" not in call] == []
