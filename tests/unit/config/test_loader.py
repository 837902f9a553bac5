from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import pytest

from vmruntime.config.loader import keys, load, parse
from vmruntime.config.settings import Settings
from vmruntime.errors import InvalidArgument, NotFound

FILE = Path("/etc/test.toml")
DOCUMENTATION = Path(__file__).parents[3] / "docs" / "configuration.md"


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ('rot = "/x"', "rot: '/x' is not a known key", "did you mean root?"),
        ("[guest]\nscratch_gb = 3", "guest.scratch_gb: 3 is not a known key", "did you mean guest.scratch_gib?"),
        ('[hypervisors]\nqemu = "q"', "hypervisors: {'qemu': 'q'} is not a known key", "did you mean hypervisor?"),
        ('pull_timeout = 3', "pull_timeout: 3 is not a known key", "did you mean images.pull_timeout?"),
        ("[log]\nzzz = 1", "log.zzz: 1 is not a known key", "[log] knows level, format"),
        ("[guest]\nscratch_gib = 0", "guest.scratch_gib: 0 cannot be used", "give an integer ≥ 1"),
        ("[guest]\ndefault_vcpus = 256", "guest.default_vcpus: 256 cannot be used", "give an integer ≥ 1 and ≤ 255"),
        ('[hypervisor]\naccelerator = "KVM"', "hypervisor.accelerator: 'KVM' cannot be used",
         'give one of "auto", "kvm", "tcg"'),
        ("[hypervisor]\nboot_timeout = 0", "hypervisor.boot_timeout: 0 cannot be used", "give a number > 0"),
        ("[hypervisor]\nboot_timeout = inf", "hypervisor.boot_timeout: inf never ends", "give a number of seconds"),
        ('[images]\npinned = ["a", 3]', "images.pinned[1]: 3 cannot be used", "give a string"),
        ('[network]\nbin_dirs = "/x"', "network.bin_dirs: '/x' cannot be used", "give an array, each item a string"),
        ("guest = 3", "guest: 3 cannot be used", "give a table"),
        ("root = 2020-01-01", "root: datetime.date(2020, 1, 1) cannot be used", "give a string"),
        ('root = "var"', "root: 'var' is not an absolute path", "begin it with /"),
        ('run = "/a/../b"', "run: '/a/../b' has a \"..\" or NUL in it", "write the path out"),
        ('root = "/x"\nrun = "/x"', "run: '/x' is the same directory as root", "give each its own"),
        ('socket = "vmruntime.sock"', "socket: 'vmruntime.sock' is not an absolute path", "begin it with /"),
        ('[images]\npolicy = "p.json"', "images.policy: 'p.json' is not an absolute path", "begin it with /"),
        ('[network]\nbin_dirs = ["/a", "b"]', "network.bin_dirs[1]: 'b' is not an absolute path", "begin it with /"),
        ("[network]\nbin_dirs = []", "network.bin_dirs: [] is empty", "name the directories of the CNI plugins"),
        ('cgroup_parent = "pods"', "cgroup_parent: 'pods' is not an absolute cgroup path", "begin it with /"),
        ('[hypervisor]\nuser = ""', "hypervisor.user: '' names no account", 'the default is "vmruntime"'),
        ('[hypervisor]\nqemu = "bin/qemu"', "hypervisor.qemu: 'bin/qemu' is a relative path",
         "give a name on PATH or begin it with /"),
        ('[guest]\nkernel_args = "a\\nb"', "guest.kernel_args: 'a\\nb' has a control character", "separate by spaces"),
        ('[images]\npinned = ["a b"]', "images.pinned[0]: 'a b' is no image reference", "such as busybox:1.36"),
        ('[network]\ndefault_subnet = "10.1.2.3/16"', "network.default_subnet: '10.1.2.3/16' is not a network",
         "did you mean 10.1.0.0/16?"),
        ('[network]\ndefault_subnet = "pods"', "network.default_subnet: 'pods' is not a network",
         "such as 10.88.0.0/16"),
        ('[network]\ndefault_subnet = "10.0.0.0/29"', "network.default_subnet: '10.0.0.0/29' has room for 5 pods",
         "use at least a /28"),
        ('[network]\ndefault_subnet = "10.1.0.0/16,10.2.0.0/16"',
         "network.default_subnet: '10.1.0.0/16,10.2.0.0/16' has two of one IP version", "such as 10.88.0.0/16,fd88::/64"),
        ('[network]\ndefault_subnet = "10.1.0.0/16, fd88::1/64"', "network.default_subnet: 'fd88::1/64' is not a network",
         "did you mean fd88::/64?"),
        ('[network]\nconf_template = "t.json"', "network.conf_template: 't.json' is not an absolute path",
         "begin it with /"),
        ('[streaming]\naddress = "localhost"', "streaming.address: 'localhost' is not an IP address", "such as 127.0.0.1"),
        ('[metrics]\naddress = "localhost"', "metrics.address: 'localhost' is not an IP address", "such as 127.0.0.1"),
        ('[tracing]\nendpoint = "otel"', "tracing.endpoint: 'otel' is no host and port",
         "such as localhost:4317 or https://otel.example:4317"),
        ('hooks_dirs = ["/a", "b"]', "hooks_dirs[1]: 'b' is not an absolute path", "begin it with /"),
        ('hooks_in_vms = "run"', "hooks_in_vms: 'run' cannot be used", 'give one of "refuse", "skip"'),
        ("[images]\nprune_after_days = -1", "images.prune_after_days: -1 cannot be used", "give a number ≥ 0"),
        ("[images]\nprune_after_days = inf", "images.prune_after_days: inf never ends", "give a number of seconds"),
        ('[streaming]\ntls_cert = "/c"', "streaming.tls_key: '' is missing", "TLS needs both a certificate and its key"),
        ('[streaming]\ntls_key = "k"', "streaming.tls_key: 'k' is not an absolute path", "begin it with /"),
        ('[network]\ndefault_subnet = "224.0.0.0/16"', "network.default_subnet: '224.0.0.0/16' cannot be a pod network",
         "such as 10.88.0.0/16"),
    ],
)  # fmt: skip
def test_complaints(text: str, message: str, remedy: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(text, FILE)
    assert caught.value.message == f"{FILE}: {message}"
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(
    ("text", "place"), [("a = 1\nb = [", "at line 2, the end of the file"), ("a = 1\nb = = 2", "at line 2, column 5")]
)
def test_syntax_errors_have_a_line(text: str, place: str) -> None:
    with pytest.raises(InvalidArgument, match=place):
        parse(text, FILE)


def test_socket_paths_must_fit() -> None:
    assert parse(f'socket = "/{"s" * 106}"', FILE).socket
    with pytest.raises(InvalidArgument, match="is 108 bytes long"):
        parse(f'socket = "/{"s" * 107}"', FILE)
    # Counted in bytes, not characters.
    with pytest.raises(InvalidArgument, match="is 109 bytes long"):
        parse(f'socket = "/{"é" * 54}"', FILE)
    with pytest.raises(InvalidArgument, match="run: .* is too long") as caught:
        parse(f'run = "/{"r" * 80}"', FILE)
    longest = int(caught.value.remedy.rsplit(" ", 2)[1])
    assert parse(f'run = "/{"r" * (longest - 1)}"', FILE).run
    with pytest.raises(InvalidArgument):
        parse(f'run = "/{"r" * longest}"', FILE)


def test_defaults_are_valid_and_need_no_file(tmp_path: Path) -> None:
    assert load(default=tmp_path / "none") == Settings() == parse("", FILE)


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such configuration file"):
        load(tmp_path / "none")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match="not UTF-8 text at byte 0"):
        load(tmp_path / "binary")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        load(tmp_path)


def test_values_arrive(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('root = "/data"\n[hypervisor]\nboot_timeout = 5\n[network]\ndefault_subnet = "fd00::/64"\n')
    settings = load(default=file)
    assert settings.root == "/data"
    assert settings.hypervisor.boot_timeout == 5.0
    assert str(settings.guest_directory) == "/data/guest"


def test_every_key_is_documented_with_its_default() -> None:
    rows = {}
    section = ""
    for line in DOCUMENTATION.read_text().splitlines():
        if line.startswith("## "):
            name = line.split("`")[1] if "`[" in line else ""
            section = name.strip("[]") + "." if name else ""
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[section + cells[0].strip("`")] = cells[1].strip("`")
    documented = dict(keys())
    assert set(rows) == set(documented)
    for key, default in documented.items():
        assert rows[key] == _toml(default), key


def _toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case list():
            return "[" + ", ".join(_toml(item) for item in value) + "]"
        case _:
            return str(value)


def test_keys_reach_every_table() -> None:
    tables = {name for name, type_ in get_type_hints(Settings).items() if hasattr(type_, "__struct_fields__")}
    assert {key.split(".")[0] for key, _ in keys() if "." in key} == tables
