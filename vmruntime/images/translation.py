r"""From the names of VM images to URLs: Virtlet's translation files, with checksums and formats added.

A file is YAML or JSON, by itself or as the `spec` of a VirtletImageMapping:

    prefix: team                    # optional: only names team/… are meant
    translations:
    - name: debian                  # a fixed name, or
      url: https://images.example/debian-12.qcow2
      checksum: sha256:…            # ours, optional; sha512:… too
      format: qcow2                 # ours, optional; raw, vmdk
    - regexp: 'centos/(\d+)'        # what is found in the name; $1, ${name} in the URL are its groups, $$ a dollar
      url: 'https://centos.example/$1/CentOS-$1.qcow2'
      transport: slow               # optional; an empty name is the profile of rules that name none
    transports:
      slow: {timeout: 30000, maxRedirects: 1, proxy: 'http://proxy:3128', tls: {…}}   # milliseconds

Files count in the order of their names, rules in their order; fixed names before regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import re2
from msgspec import Meta

from vmruntime import yamltext
from vmruntime.errors import FailedPrecondition, InvalidArgument, NotFound
from vmruntime.images import pem
from vmruntime.images.disk_header import DiskFormat
from vmruntime.images.endpoint import MAX_REDIRECTS, Checksum, Endpoint, Tls, Transport, check_url

PREFIX = "virtlet.cloud/"
FILE_LIMIT = 1024 * 1024
SUFFIXES = (".yaml", ".yml", ".json")
NAME_LIMIT = 255  # as of image references
KIND = "VirtletImageMapping"
EMPTY = '""'

T = TypeVar("T")

# Virtlet's patterns are Go's, which are RE2's; names are written by authors of pods, and none makes RE2 slow.
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False

_REFERENCE = re.compile(r"\$(?:(\$)|\{(\w+)\}|(\w+))", re.ASCII)  # Go's regexp.Expand


class _Certificate(msgspec.Struct, forbid_unknown_fields=True):
    cert: str = ""
    key: str = ""


class _Tls(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    certificates: list[_Certificate] = []
    server_name: str = ""
    insecure: bool = False


class _Transport(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    timeout: int = 0
    max_redirects: Annotated[int, Meta(ge=0, le=100)] | None = None
    proxy: str = ""
    tls: _Tls | None = None


class _Rule(msgspec.Struct, forbid_unknown_fields=True):
    url: str
    name: str = ""
    regexp: str = ""
    transport: str = ""
    checksum: str = ""
    format: Literal["", "qcow2", "raw", "vmdk"] = ""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    prefix: str = ""
    translations: list[_Rule] | None = None
    transports: dict[str, Any] | None = None


class Translation(msgspec.Struct, frozen=True, kw_only=True):
    """One rule, read.

    Attributes:
        place: File and key, for messages.
        prefix: Empty, or with a slash at its end.
        pattern: Compiled by RE2; None: `name` is meant.
    """

    place: str
    prefix: str
    name: str
    pattern: Any
    endpoint: Endpoint


class Translator:
    """Translates names by rules; made anew when the files change."""

    def __init__(self, rules: Sequence[Translation], default_scheme: Literal["", "http", "https"] = "https") -> None:
        """Take rules.

        Args:
            rules: In the order in which they count.
            default_scheme: What a name that no rule knows is the rest of a URL to; empty: such names are refused.
        """
        self._rules = rules
        self._default_scheme = default_scheme

    def translate(self, name: str) -> Endpoint:
        """Return where the image of a name is.

        Args:
            name: Without virtlet.cloud/, tag and digest; see image_name().

        Raises:
            NotFound: No rule knows the name.
            InvalidArgument: What comes out of it is not a URL.
        """
        if not name or len(name) > NAME_LIMIT:
            raise InvalidArgument.field("image", name[:300], f"is empty, or longer than {NAME_LIMIT} characters")
        for rule in self._rules:
            if rule.pattern is None and name == rule.prefix + rule.name:
                return rule.endpoint
        for rule in self._rules:
            if rule.pattern is None or not name.startswith(rule.prefix):
                continue
            found = rule.pattern.search(name.removeprefix(rule.prefix))
            if found is not None:
                return _expanded(rule, found, name)
        if not self._default_scheme:
            raise NotFound(f"no rule says where the image {name!r} is", remedy="add a translation, or correct the name")
        try:
            return Endpoint(url=check_url(f"{self._default_scheme}://{name}"))
        except InvalidArgument as error:
            raise InvalidArgument(f"image {name!r}: {error.message}", remedy="add a translation for it") from None


def image_name(reference: str) -> tuple[str, str]:
    """Split a reference to a VM image into the name that is translated, and its digest; tags count for nothing.

    `virtlet.cloud/debian:12@sha256:…` is ("debian", "sha256:…").
    """
    name, _, digest = reference.removeprefix(PREFIX).partition("@")
    head, colon, tag = name.rpartition(":")
    return (head if colon and "/" not in tag else name), digest


def load_directory(directory: Path) -> list[Translation]:
    """Return the rules of all files of a directory; one that is not there has none. Blocks.

    Raises:
        FailedPrecondition: A file cannot be used; the message names it and the key.
    """
    try:
        paths = sorted(
            path for path in directory.iterdir() if path.suffix in SUFFIXES and not path.name.startswith(".")
        )
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FailedPrecondition(f"{directory}: cannot be read: {error.strerror}") from error
    return [rule for path in paths if path.is_file() for rule in load_file(path)]


def load_file(path: Path) -> list[Translation]:
    """Return the rules of a file. Blocks.

    Raises:
        FailedPrecondition: It cannot be used; the message names it and the key.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_LIMIT + 1)
        if len(data) > FILE_LIMIT:
            raise FailedPrecondition(f"{path}: is larger than {FILE_LIMIT} bytes")
        return parse(data.decode(), str(path))
    except OSError as error:
        raise FailedPrecondition(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FailedPrecondition(f"{path}: is not UTF-8 text at byte {error.start}") from None


def parse(text: str, path: str) -> list[Translation]:
    """Return the rules in a text; `path` is what messages call it.

    Raises:
        FailedPrecondition: It cannot be used; the message names the key.
    """
    try:
        document = yamltext.load_mapping(text)
    except yamltext.BadYaml as error:
        raise FailedPrecondition(f"{path}: {error.message}", remedy=error.remedy) from None
    at = ""
    if "kind" in document or "apiVersion" in document:
        if document.get("kind") != KIND:
            raise FailedPrecondition(f"{path}: kind: {document.get('kind')!r} is not {KIND}")
        document, at = document.get("spec") or {}, "spec."
    return list(_rules(_converted(document, _File, f"{path}: {at}"), path, at))


def _converted(value: Any, type_: type[T], place: str) -> T:
    """Return a value as a type; `place` ends with a colon and a space, or with a full stop."""
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        words, _, key = str(error).partition(" - at `$")
        where = f"{place}{key.strip('`.')}".removesuffix(".").removesuffix(": ")
        raise FailedPrecondition(f"{where}: {words[:1].lower()}{words[1:]}", remedy=_KEYS) from None


_KEYS = "the keys are prefix, translations (name or regexp, url, transport, checksum, format) and transports"


def _rules(content: _File, path: str, at: str) -> Iterator[Translation]:
    transports = {
        name: _transport(profile or {}, f"{path}: {at}transports.{name or EMPTY}")
        for name, profile in (content.transports or {}).items()
    }
    prefix = f"{content.prefix.rstrip('/')}/" if content.prefix else ""
    names: set[str] = set()
    for number, rule in enumerate(content.translations or []):
        place = f"{path}: {at}translations[{number}]"
        if rule.name in names:
            raise FailedPrecondition(f"{place}.name: {rule.name!r} is there twice", remedy="keep one of them")
        if rule.name:
            names.add(rule.name)
        yield _rule(rule, prefix, transports, place)


def _rule(rule: _Rule, prefix: str, transports: Mapping[str, Transport], place: str) -> Translation:
    if bool(rule.name) == bool(rule.regexp):
        raise FailedPrecondition(f"{place}: has not one of name and regexp", remedy="give one of them")
    if rule.transport and rule.transport not in transports:
        known = ", ".join(name for name in transports if name) or "there are none"
        raise FailedPrecondition(
            f"{place}.transport: {rule.transport!r} is not in transports",
            remedy=f"add it, or use one of these: {known}",
        )
    pattern = _pattern(rule, place) if rule.regexp else None
    try:
        checksum = Checksum.parse(rule.checksum) if rule.checksum else None
    except InvalidArgument as error:
        raise FailedPrecondition(f"{place}.checksum: {error.message}", remedy=error.remedy) from None
    if pattern is None:
        _checked(rule.url, f"{place}.url")
    return Translation(
        place=place,
        prefix=prefix,
        name=rule.name,
        pattern=pattern,
        endpoint=Endpoint(
            url=rule.url,
            checksum=checksum,
            format=DiskFormat(rule.format) if rule.format else None,
            transport=transports.get(rule.transport, Transport()),
        ),
    )


def _pattern(rule: _Rule, place: str) -> Any:
    try:
        pattern = re2.compile(rule.regexp, options=_OPTIONS)
    except re2.error as error:
        why = error.args[0].decode(errors="replace")
        raise FailedPrecondition(
            f"{place}.regexp: {rule.regexp[:100]!r} cannot be used: {why}",
            remedy="see https://github.com/google/re2/wiki/Syntax",
        ) from None
    for name in (found[2] or found[3] for found in _REFERENCE.finditer(rule.url)):
        if name and not _has_group(pattern, name):
            raise FailedPrecondition(
                f"{place}.url: ${name} is no group of the regexp",
                remedy="write ${1} where letters, digits or _ follow, and $$ for a dollar",
            )
    example = _REFERENCE.sub(lambda found: "$" if found[1] else "0", rule.url)
    _checked(example, f"{place}.url")
    return pattern


def _has_group(pattern: Any, name: str) -> bool:
    return int(name) <= pattern.groups if name.isdigit() else name in pattern.groupindex


def _expanded(rule: Translation, found: Any, image: str) -> Endpoint:
    def value(reference: re.Match[str]) -> str:
        if reference[1]:
            return "$"
        name = reference[2] or reference[3]
        return found.group(int(name) if name.isdigit() else name) or ""

    url = _REFERENCE.sub(value, rule.endpoint.url)
    try:
        return msgspec.structs.replace(rule.endpoint, url=check_url(url))
    except InvalidArgument as error:
        raise InvalidArgument(f"image {image!r}: {rule.place} makes of it what {error.message}") from None


def _checked(url: str, place: str) -> None:
    try:
        check_url(url)
    except InvalidArgument as error:
        raise FailedPrecondition(f"{place}: {error.message}", remedy=error.remedy) from None


def _transport(value: object, place: str) -> Transport:
    profile = _converted(value, _Transport, f"{place}.")
    if profile.proxy:
        _check_proxy(profile.proxy, f"{place}.proxy")
    return Transport(
        timeout=max(0, profile.timeout) / 1000,
        max_redirects=MAX_REDIRECTS if profile.max_redirects is None else profile.max_redirects,
        proxy=profile.proxy,
        tls=_tls(profile.tls, f"{place}.tls") if profile.tls is not None else Tls(),
    )


def _check_proxy(url: str, place: str) -> None:
    scheme, _, rest = url.partition("://")
    if scheme not in ("http", "https", "socks5", "socks5h"):
        raise FailedPrecondition(
            f"{place}: {scheme[:40]!r} is no kind of proxy", remedy="such as http://proxy.example:3128"
        )
    _checked(f"http://{rest}", place)


def _tls(profile: _Tls, place: str) -> Tls:
    authorities, clients = "", []
    for number, entry in enumerate(profile.certificates):
        at = f"{place}.certificates[{number}]"
        try:
            trusted, client = pem.classify(entry.cert, entry.key)
        except InvalidArgument as error:
            raise FailedPrecondition(f"{at}: {error.message}", remedy=error.remedy) from None
        authorities += trusted
        clients += [client] if client else []
        if len(clients) > 1:
            raise FailedPrecondition(f"{at}: is a second client certificate", remedy="use another profile for it")
    name: Any = profile.server_name
    if name and re.fullmatch(r"[A-Za-z0-9._-]{1,253}", name) is None:
        raise FailedPrecondition(f"{place}.serverName: {name[:100]!r} is not a host name")
    return Tls(authorities=authorities, client="".join(clients), server_name=name, insecure=profile.insecure)
