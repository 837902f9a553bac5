"""The containerd that benchmarks are beside runs pods and leaves nothing, however it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.client import Client
from bench.containerd import PAUSE, PROGRAMS, Containerd, containerd
from tests.support import leaks

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason="no containerd here; `make bench-setup`"),
]


@pytest.fixture
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmr-", dir="/tmp") as name:
        yield Path(name) / "c"


def pod_of(peer: Containerd) -> tuple[Client, str]:
    client = peer.client(PAUSE)
    return client, client.run_pod()


def nothing_of(peer: Containerd) -> None:
    footprint, ids = peer.footprint, peer.footprint.ids()
    assert ids
    assert leaks.below(footprint.base) == []
    assert list(leaks.links(footprint)) == []
    looks = (leaks.processes, leaks.cgroups, leaks.rules, leaks.reservations)
    end = time.monotonic() + 10  # what was killed is a zombie until the host's init has looked
    while (left := [what for look in looks for what in look(footprint, ids)]) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []


def test_a_pod_is_as_kubelet_would_have_it(base: Path) -> None:
    with containerd(base) as peer:
        client, pod = pod_of(peer)
        assert client.address(pod).startswith("10.")
        client.start(client.create(pod, "c", []))
        client.remove_pod(pod)
    nothing_of(peer)


def test_pods_that_are_left_go_with_it(base: Path) -> None:
    interrupted = contextlib.ExitStack()
    peer = interrupted.enter_context(containerd(base))
    pod_of(peer)
    with pytest.raises(KeyboardInterrupt), interrupted:
        raise KeyboardInterrupt
    nothing_of(peer)


def test_a_containerd_that_was_killed_is_started_again_to_remove_its_pods(base: Path) -> None:
    with containerd(base) as peer:
        pod_of(peer)
        pid = peer.footprint.pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    nothing_of(peer)


def test_what_only_force_removes_is_removed_and_told(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.containerd.END_SECONDS", 0.5)
    monkeypatch.setattr(Containerd, "_remove_pods", lambda self: None)
    with (
        pytest.raises(RuntimeError, match=r"left behind:(?s:.*)process: \d+ .*containerd-shim"),
        containerd(base) as peer,
    ):
        pod_of(peer)
    shutil.rmtree(peer.footprint.reservations)  # files go with the directory
    nothing_of(peer)
