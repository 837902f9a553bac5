"""Names of VM images and their URLs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.images.certificates import Certificates
from vmruntime.errors import FailedPrecondition, InvalidArgument, NotFound, VmruntimeError
from vmruntime.images.disk_header import DiskFormat
from vmruntime.images.endpoint import Checksum, Endpoint, Tls, Transport, check_url, redacted
from vmruntime.images.translation import Translator, image_name, load_directory, parse

SHA = "sha256:" + "aB" * 32
# The examples of Virtlet's manual, and what is ours.
VIRTLET = r"""
prefix: my-prefix
translations:
- name: cirros
  url: https://download.cirros-cloud.net/0.3.5/cirros-0.3.5-x86_64-disk.img
- name: ubuntu/16.04
  url: https://cloud-images.ubuntu.com/xenial/current/xenial-server-cloudimg-amd64-disk1.img
- regexp: 'cirros/(\d\.\d\.\d)'
  url: 'https://download.cirros-cloud.net/$1/cirros-$1-x86_64-disk.img'
- regexp: 'centos/(\d+)-(\d+)'
  url: 'https://cloud.centos.org/centos/$1/images/CentOS-$1-x86_64-GenericCloud-$2.qcow2'
"""
OURS = f"""
translations:
- name: cirros
  url: http://127.0.0.1/cirros
- regexp: '^debian-(?P<release>[a-z]+)(-(x))?$'
  url: 'https://images.example/${{release}}_12/$$home/$3'
  checksum: {SHA}
  format: qcow2
  transport: slow
- name: local
  url: file:///srv/disk.raw
  format: raw
transports:
  slow: {{timeout: 30000, maxRedirects: 1, proxy: 'http://user:pw@proxy.example:3128'}}
"""


def translator(*texts: str, **options: object) -> Translator:
    rules = [rule for number, text in enumerate(texts) for rule in parse(text, f"{number}.yaml")]
    return Translator(rules, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("my-prefix/cirros", "https://download.cirros-cloud.net/0.3.5/cirros-0.3.5-x86_64-disk.img"),
        (
            "my-prefix/ubuntu/16.04",
            "https://cloud-images.ubuntu.com/xenial/current/xenial-server-cloudimg-amd64-disk1.img",
        ),
        ("my-prefix/cirros/0.4.0", "https://download.cirros-cloud.net/0.4.0/cirros-0.4.0-x86_64-disk.img"),
        ("my-prefix/centos/7-01", "https://cloud.centos.org/centos/7/images/CentOS-7-x86_64-GenericCloud-01.qcow2"),
        ("cirros", "http://127.0.0.1/cirros"),
        ("debian-bookworm", "https://images.example/bookworm_12/$home/"),
        ("debian-bookworm-x", "https://images.example/bookworm_12/$home/x"),
        ("images.example/some/disk.img", "https://images.example/some/disk.img"),
    ],
)
def test_names(name: str, url: str) -> None:
    assert translator(VIRTLET, OURS).translate(name).url == url


def test_everything_a_rule_says() -> None:
    transport = Transport(timeout=30.0, max_redirects=1, proxy="http://user:pw@proxy.example:3128")
    found = translator(OURS).translate("debian-trixie")
    assert found == Endpoint(
        url="https://images.example/trixie_12/$home/",
        checksum=Checksum("sha256", "ab" * 32),
        format=DiskFormat.QCOW2,
        transport=transport,
    )
    assert translator(OURS).translate("local") == Endpoint(url="file:///srv/disk.raw", format=DiskFormat.RAW)


def test_the_nameless_profile_is_that_of_rules_without_one() -> None:
    text = "translations: [{name: a, url: 'http://x/a'}, {name: b, url: 'http://x/b', transport: b}]\n"
    text += 'transports: {"": {timeout: 1000}, b: }'
    rules = translator(text)
    assert rules.translate("a").transport == Transport(timeout=1.0)
    assert rules.translate("b").transport == Transport()
    assert rules.translate("example.org/c").transport == Transport()


def test_precedence() -> None:
    first = "translations: [{regexp: 'a.', url: 'http://x/1'}, {name: cd, url: 'http://x/2'}]"
    second = (
        "translations: [{name: ab, url: 'http://x/3'}, {name: cd, url: 'http://x/4'}, {regexp: 'a', url: 'http://x/5'}]"
    )
    rules = translator(first, second)
    assert [rules.translate(name).url[-1] for name in ("ab", "cd", "ac", "a")] == ["3", "2", "1", "5"]


def test_patterns_are_those_of_go() -> None:
    rules = translator(
        r"translations: [{regexp: '^[[:alpha:]]+\Q.x\E\z', url: 'http://x/1'}, {regexp: '^(a+)+$', url: 'http://x/2'}]"
    )
    assert rules.translate("abc.x").url == "http://x/1"
    assert rules.translate("a" * 254 + "b").url.startswith("https://aaa")  # at once


def test_names_without_a_rule() -> None:
    assert translator(default_scheme="http").translate("host.example/disk").url == "http://host.example/disk"
    with pytest.raises(NotFound, match="no rule says where the image 'host.example/disk' is"):
        translator(default_scheme="").translate("host.example/disk")
    with pytest.raises(InvalidArgument, match="image 'a b': 'https://a b' has a character that URLs do not have"):
        translator().translate("a b")
    with pytest.raises(InvalidArgument, match="is empty, or longer than 255"):
        translator().translate("x" * 256)
    bad = translator("translations: [{regexp: '^x(.*)', url: 'http://host$1/'}]")
    with pytest.raises(
        InvalidArgument, match=r"image 'x:0': 0.yaml: translations\[0\] makes of it what 'http://host:0/' names no host"
    ):
        bad.translate("x:0")


@pytest.mark.parametrize(
    ("reference", "name", "digest"),
    [
        ("virtlet.cloud/cirros", "cirros", ""),
        ("virtlet.cloud/team/debian:12", "team/debian", ""),
        (f"virtlet.cloud/debian:12@{SHA}", "debian", SHA),
        ("virtlet.cloud/host:5000/x", "host:5000/x", ""),
        ("debian", "debian", ""),
    ],
)
def test_references(reference: str, name: str, digest: str) -> None:
    assert image_name(reference) == (name, digest)


def test_a_mapping_object() -> None:
    text = f"apiVersion: virtlet.k8s/v1\nkind: VirtletImageMapping\nmetadata: {{name: primary}}\nspec:\n  {OURS.strip().replace(chr(10), chr(10) + '  ')}\n"
    assert translator(text).translate("cirros").url == "http://127.0.0.1/cirros"
    with pytest.raises(FailedPrecondition, match="^f: spec.translations\\[0\\].url: "):
        parse("kind: VirtletImageMapping\nspec: {translations: [{name: a, url: x}]}", "f")
    with pytest.raises(FailedPrecondition, match="^f: kind: 'Pod' is not VirtletImageMapping"):
        parse("kind: Pod", "f")


def test_a_directory(tmp_path: Path) -> None:
    assert load_directory(tmp_path / "absent") == []
    (tmp_path / "b.yaml").write_text("translations: [{name: x, url: 'http://b/'}]")
    (tmp_path / "a.json").write_text(json.dumps({"translations": [{"name": "x", "url": "http://a/"}]}))
    for ignored in ("README", ".hidden.yaml", "c.yaml.bak"):
        (tmp_path / ignored).write_text("{")
    (tmp_path / "d.yml").mkdir()
    assert [rule.endpoint.url for rule in load_directory(tmp_path)] == ["http://a/", "http://b/"]
    (tmp_path / "b.yaml").write_bytes(b"\xff")
    with pytest.raises(FailedPrecondition, match=f"^{tmp_path}/b.yaml: is not UTF-8 text at byte 0"):
        load_directory(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b" " * (1024 * 1024 + 1))
    with pytest.raises(FailedPrecondition, match="is larger than 1048576 bytes"):
        load_directory(tmp_path)
    with pytest.raises(FailedPrecondition, match="a.json: cannot be read: Not a directory"):
        load_directory(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line "),
        ("translation: []", ": object contains unknown field `translation`"),
        ("translations: x", "translations: expected `array | null`, got `str`"),
        ("translations: [{name: a}]", "translations[0]: object missing required field `url`"),
        ("translations: [{url: 'http://x/'}]", "translations[0]: has not one of name and regexp"),
        ("translations: [{name: a, regexp: b, url: 'http://x/'}]", "translations[0]: has not one of name and regexp"),
        ("translations: [{name: a, url: ftp://x/}]", "translations[0].url: 'ftp://x/' has not one of the schemes"),
        ("translations: [{name: a, url: 'http:///x'}]", "names no host"),
        ("translations: [{name: a, url: 'http://u:secret@h:port/'}]", "translations[0].url: 'http://h:port/' is not a URL"),
        ("translations: [{name: a, url: 'http://x/#y'}]", "has a fragment"),
        ("translations: [{name: a, url: 'file://host/x'}]", "is not the URL of a local file"),
        ("translations: [{name: a, url: 'http://x/'}, {name: a, url: 'http://y/'}]", "translations[1].name: 'a' is there twice"),
        ("translations: [{name: a, url: 'http://x/', transport: t}]", "translations[0].transport: 't' is not in transports"),
        ("translations: [{name: a, url: 'http://x/', checksum: 'md5:00'}]", "translations[0].checksum: 'md5:00' is not a checksum"),
        ("translations: [{name: a, url: 'http://x/', format: iso}]", "translations[0].format: invalid enum value 'iso'"),
        ("translations: [{regexp: '(', url: 'http://x/'}]", "translations[0].regexp: '(' cannot be used: missing )"),
        ("translations: [{regexp: 'a(?=b)', url: 'http://x/'}]", "cannot be used: invalid perl operator: (?="),
        ("translations: [{regexp: 'a(.)', url: 'http://x/$2'}]", "translations[0].url: $2 is no group of the regexp"),
        ("translations: [{regexp: 'a(.)', url: 'http://x/$1_y'}]", "$1_y is no group of the regexp (write ${1} where"),
        ("translations: [{regexp: 'a(.)', url: 'gopher://x/$1'}]", "translations[0].url: 'gopher://x/0' has not one of"),
        ("transports: {t: {maxRedirects: -1}}", "transports.t.maxRedirects: expected `int` >= 0"),
        ("transports: {t: {timeout: 1s}}", "transports.t.timeout: expected `int`, got `str`"),
        ("transports: {t: {proxy: 'ftp://x'}}", "transports.t.proxy: 'ftp' is no kind of proxy"),
        ("transports: {t: {proxy: 'http://'}}", "transports.t.proxy: 'http://' names no host"),
        ("transports: {t: {tls: {serverName: 'a b'}}}", "transports.t.tls.serverName: 'a b' is not a host name"),
        ("transports: {\"\": {tls: {certificates: [{cert: x}]}}}", 'transports."".tls.certificates[0]: cert has no certificate'),
        ("transports: {t: {tls: {certs: []}}}", "transports.t.tls: object contains unknown field `certs`"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(FailedPrecondition) as refusal:
        parse(text, "/etc/images.d/a.yaml")
    assert str(refusal.value).startswith("/etc/images.d/a.yaml: ")
    assert words in str(refusal.value)
    assert "secret" not in str(refusal.value)


def profile(*entries: dict[str, str], **members: object) -> str:
    return json.dumps({"transports": {"t": {"tls": {"certificates": entries, **members}}}, "translations": [
        {"name": "x", "url": "https://x/", "transport": "t"}]})  # fmt: skip


def test_certificates(certificates: Certificates) -> None:
    authority, client, key = certificates.pem("ca"), certificates.pem("client"), certificates.key("client")
    text = profile(
        {"cert": f"text before\n{authority}"}, {"cert": client, "key": key}, serverName="images.example", insecure=False
    )
    tls = translator(text).translate("x").transport.tls
    assert tls == Tls(authorities=authority, client=client + key, server_name="images.example")
    assert "PRIVATE" not in repr(translator(text).translate("x").transport)
    # The key beside its certificate; a chain with its authority.
    together = translator(profile({"cert": f"{key}{client}{authority}"})).translate("x").transport.tls
    assert together == Tls(authorities=authority, client=client + authority + key)


@pytest.mark.parametrize(
    ("cert", "key", "words"),
    [
        (
            "client",
            "",
            "cert has a certificate that is no authority (CA:TRUE) and has no key (add its key, or take it out)",
        ),
        ("client", "server", "cert and key cannot be used together: key values mismatch"),
        ("client", "locked", "key is encrypted, and nobody could type its passphrase (decrypt it: openssl pkey)"),
    ],
)
def test_certificates_that_are_of_no_use(certificates: Certificates, cert: str, key: str, words: str) -> None:
    with pytest.raises(FailedPrecondition) as refusal:
        parse(profile({"cert": certificates.pem(cert), "key": certificates.key(key) if key else ""}), "f")
    assert str(refusal.value) == f"f: transports.t.tls.certificates[0]: {words}"


def test_more_certificates_that_are_of_no_use(certificates: Certificates) -> None:
    client = {"cert": certificates.pem("client"), "key": certificates.key("client")}
    for entries, words in (
        ([client, client], r"certificates\[1\]: is a second client certificate"),
        ([{"cert": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"}], r"certificates\[0\]: cert has a certificate that cannot be read"),
        ([{"cert": certificates.pem("ca"), "key": "nonsense"}], r"certificates\[0\]: key has no private key"),
    ):  # fmt: skip
        with pytest.raises(FailedPrecondition, match=words):
            parse(profile(*entries), "f")


def test_secrets_of_urls_are_not_shown() -> None:
    endpoint = Endpoint(url="https://user:pa55@host/x?y=a@b")
    assert "pa55" not in repr(endpoint)
    assert redacted("see https://user:pa55@host/x and http://h/") == "see https://host/x and http://h/"


@given(st.text(max_size=60) | st.from_regex(r"(https?|file)://[ -~]{0,20}", fullmatch=True))
def test_any_url(text: str) -> None:
    try:
        assert check_url(text) == text
    except InvalidArgument as error:
        assert error.message


@given(st.text(max_size=30), st.text(max_size=20))
def test_any_regexp_and_name(regexp: str, name: str) -> None:
    try:
        Translator(
            parse(json.dumps({"translations": [{"regexp": regexp or "x", "url": "http://x/$0"}]}), "f")
        ).translate(name)
    except VmruntimeError as error:
        assert error.message
