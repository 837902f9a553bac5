"""One daemon for the tests of this folder, real images on a real registry's format, and a leak check after every test."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import leaks
from tests.support.daemon import Daemon, running_daemon
from vmruntime.generated import cri_pb2 as cri


@pytest.fixture(scope="session")
def base() -> Iterator[Path]:
    """A short directory, because unix socket paths are short."""
    with tempfile.TemporaryDirectory(prefix="vmr-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)  # VMs run unprivileged and pass through
        yield Path(directory)


@pytest.fixture(scope="session")
def busybox(base: Path) -> str:
    """An OCI layout with a static BusyBox, as an import reference."""
    layout, bundle = base / "busybox", base / "bundle"
    for command in (
        ["umoci", "init", "--layout", str(layout)],
        ["umoci", "new", "--image", f"{layout}:1"],
        ["umoci", "unpack", "--image", f"{layout}:1", str(bundle)],
    ):
        subprocess.run(command, check=True, capture_output=True)
    root = bundle / "rootfs"
    for name in ("bin", "etc", "tmp"):
        (root / name).mkdir(exist_ok=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    for applet in (
        "sh",
        "cat",
        "echo",
        "id",
        "sleep",
        "uname",
        "hostname",
        "head",
        "yes",
        "nc",
        "ls",
        "kill",
        "true",
        "ps",
        "chmod",
        "chown",
        "httpd",
        "mkdir",
        "seq",
        "sha256sum",
        "stat",
        "stty",
        "tar",
        "wc",
    ):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nweb:x:1001:1002::/srv:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\nweb:x:1002:\n")
    subprocess.run(["umoci", "repack", "--image", f"{layout}:1", str(bundle)], check=True, capture_output=True)
    return f"oci:{layout}:1"


@pytest.fixture(scope="session")
def daemon(base: Path) -> Iterator[Daemon]:
    """A running daemon."""
    with running_daemon(base / "d") as daemon:
        yield daemon


@pytest.fixture
def image(daemon: Daemon, busybox: str) -> str:
    """The BusyBox image, pulled; its reference."""
    answer = daemon.images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=busybox)))
    return str(answer.image_ref)


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which anything of the shared daemon, or below the test's own directory, is left on the host.

    A daemon that a test starts itself is checked when it ends, by running_daemon().
    """
    names = request.fixturenames
    own = request.getfixturevalue("tmp_path") if "tmp_path" in names else None
    if "daemon" in names:
        daemon: Daemon = request.getfixturevalue("daemon")
        pods, containers = daemon.pods(), daemon.containers()
        with leaks.nothing_left(daemon.footprint, lambda: daemon.remove_all_but(pods, containers), kept=pods):
            yield
    else:
        yield
    if own is not None:
        assert leaks.below(own) == []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show the figures that tests took down."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid}: {name}: {value}")
