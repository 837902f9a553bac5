"""cri-tools' conformance suite, an independent client of the CRI, against the daemon; `make conformance` runs it.

The suite comes as a Go module and is built here. Of its text one constant is changed: the digest of an image that is
asked for by digest, since the images it asks for are made here, too (images.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conformance import images
from tests.support import golang
from tests.support.daemon import Daemon, running_daemon
from tests.support.registry import registries_conf, registry

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]

PROJECT = Path(__file__).parents[2]
MODULE = "sigs.k8s.io/cri-tools@v1.37.0"
MODULE_SUM = "h1:BmTImEoTX3KPXCLwmIU9mfCC8umUqF4R8WibY9eVU9Y="
GO = (1, 26)
DIGEST_IN_SUITE = "sha256:9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"
# Which specs to run (a regular expression); all by default.
FOCUS = os.environ.get("CRITEST_FOCUS", "")
# A mount that a privileged container makes for the host to see cannot come from a VM.
HOST_PODS = 'host_pods = "privileged"\n'
TRANSPORTS = {"spdy": [], "websocket": ["-websocket-exec", "-websocket-attach", "-websocket-portforward"]}


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmr-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(scope="module")
def served(base: Path) -> Iterator[tuple[Daemon, str]]:
    """A daemon whose images all come from a registry on loopback, and the digest of the image asked for by digest."""
    subprocess.run([PROJECT / "images/demo/build.sh", "nginx"], check=True)
    subprocess.run([PROJECT / "images/busybox/build.sh"], check=True)
    work = base / "images"
    work.mkdir()
    with registry(base / "registry") as server:
        digest = images.push_all(PROJECT / "build/demo-images", PROJECT / "build/busybox", work, server)
        names = dict.fromkeys(("registry.k8s.io", "k8s.gcr.io", "gcr.io"), server.address)
        conf = registries_conf(base / "registries.conf", names)
        with running_daemon(base / "d", HOST_PODS + f'[images]\nregistries_conf = "{conf}"\n') as daemon:
            yield daemon, digest


@pytest.fixture(scope="module")
def critest(base: Path, served: tuple[Daemon, str]) -> Path:
    """The suite's program."""
    go, why_not = golang.find_go(GO)
    if not go:
        pytest.skip(f"cri-tools' suite is not tried: {why_not}")
    found = json.loads(subprocess.run([go, "mod", "download", "-json", MODULE], check=True, capture_output=True).stdout)
    assert found["Sum"] == MODULE_SUM
    source = base / "cri-tools"
    shutil.copytree(found["Dir"], source, copy_function=shutil.copyfile)
    for path in (source, *source.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # the module cache is read-only
    constants = source / "pkg/validate/consts.go"
    constants.write_text(constants.read_text().replace(DIGEST_IN_SUITE, served[1]))
    program = base / "critest"
    # Under one name always, so that Go's build cache serves the next run.
    command = [go, "test", "-trimpath", "-c", "-o", str(program), "./cmd/critest"]
    subprocess.run(command, cwd=source, check=True)
    shutil.rmtree(source)
    return program


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_spec(base: Path, served: tuple[Daemon, str], critest: Path, transport: str) -> None:
    """Every spec that applies passes; over WebSocket only those that stream are run."""
    daemon, _ = served
    report = base / f"{transport}.xml"
    endpoint = f"unix://{daemon.socket}"
    focus = FOCUS or ("" if transport == "spdy" else "Streaming")
    options = [*([f"-ginkgo.focus={focus}"] if focus else []), "-ginkgo.no-color", f"-ginkgo.junit-report={report}"]
    command = [str(critest), f"-runtime-endpoint={endpoint}", f"-image-endpoint={endpoint}"]
    subprocess.run([*command, *options, *TRANSPORTS[transport]], check=False)

    outcomes = _outcomes(report)
    failed = sorted(name for name, (status, _) in outcomes.items() if status not in ("passed", "skipped"))
    passed = [name for name, (status, _) in outcomes.items() if status == "passed"]
    skipped = [f"{name}: {why}" for name, (status, why) in sorted(outcomes.items()) if status == "skipped" and why]
    summary = f"{len(passed)} specs passed, {len(failed)} failed, {len(skipped)} do not apply here"
    (PROJECT / "build" / f"conformance-{transport}.txt").write_text("\n  ".join([summary, *skipped]) + "\n")
    assert passed
    assert failed == []


def _outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """Return how each spec ended, "passed", "skipped" or else, and why, by the suite's JUnit report."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.get("name", "").startswith("[It]"):
            skip = case.find("skipped")
            why = "" if skip is None else skip.get("message", "").removeprefix("skipped").strip(" -")
            found[str(case.get("name"))] = (str(case.get("status")), why)
    return found
