"""What ConfigMaps and Secrets say that annotations name, in Virtlet's forms."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from vmruntime import yamltext
from vmruntime.errors import InvalidArgument, NotFound
from vmruntime.model import ssh_keys
from vmruntime.model.image_pod import DataSource, Encoding, SourceKind
from vmruntime.seed.paths import absolute
from vmruntime.seed.request import SeedFile, SourceContent

KEYS_KEY = "authorized_keys"
_PATH, _ENCODING = "_path", "_encoding"


def keys(source: DataSource, content: SourceContent) -> list[str]:
    """Return the SSH keys of a source.

    Raises:
        NotFound: The source has no such key.
        InvalidArgument: A line is no public key.
    """
    key = source.key or KEYS_KEY
    return ssh_keys.parse(f"{source}, key {key!r}", _text(source, key, content))


def cloud_config(source: DataSource, content: SourceContent) -> dict[str, Any]:
    """Return cloud-config of which each key of the source is a member, its value read as YAML.

    Raises:
        InvalidArgument: A value is not YAML.
    """
    config = {}
    for key in sorted(content):
        try:
            config[key] = yamltext.load(_text(source, key, content))
        except yamltext.BadYaml as error:
            raise InvalidArgument(
                f"{source}, key {key!r}: {error.message}",
                remedy="each key is a member of cloud-config; for a whole document name its key by an annotation",
            ) from None
    return config


def document(source: DataSource, content: SourceContent, encoding: Encoding) -> str:
    """Return the whole of user-data, which is the value of the source's key.

    Raises:
        NotFound: The source has no such key.
        InvalidArgument: It is not text in this encoding.
    """
    text = _text(source, source.key, content)
    return text if encoding is Encoding.PLAIN else _utf8(source, source.key, _decoded(source, source.key, text))


def files(source: DataSource, content: SourceContent) -> list[SeedFile]:
    """Return the files of a source: NAME is the content, NAME_path the place, NAME_encoding base64 (default) or plain.

    Raises:
        InvalidArgument: A file has no place, or one that cannot be used, or its content is not what its encoding says.
    """
    found = []
    for key in sorted(content):
        main = next((key.removesuffix(end) for end in (_PATH, _ENCODING) if key.endswith(end)), None)
        if main is not None and main in content:
            continue
        if key + _PATH not in content:
            missing = f"there is no key {main!r} that it belongs to" if main else f"there is no key {key + _PATH!r}"
            raise InvalidArgument(
                f"{source}, key {key!r}: {missing}",
                remedy=f"a file is two keys: NAME, its content, and NAME{_PATH}, its place",
            )
        found.append(_file(source, key, content))
    return found


def _file(source: DataSource, key: str, content: SourceContent) -> SeedFile:
    place = _text(source, key + _PATH, content).strip()
    encoding = _text(source, key + _ENCODING, content).strip() if key + _ENCODING in content else Encoding.BASE64.value
    if encoding not in (Encoding.PLAIN.value, Encoding.BASE64.value):
        raise InvalidArgument(
            f"{source}, key {key + _ENCODING!r}: {encoding!r} is not known", remedy='use "plain" or "base64"'
        )
    plain = encoding == Encoding.PLAIN.value
    return SeedFile(
        path=absolute(f"{source}, key {key + _PATH!r}", place),
        content=content[key] if plain else _decoded(source, key, _text(source, key, content)),
        mode=0o600 if source.kind is SourceKind.SECRET else 0o644,
    )


def _decoded(source: DataSource, key: str, text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidArgument(
            f"{source}, key {key!r}: is not base64", remedy='encode it, or say that its encoding is "plain"'
        ) from None


def _text(source: DataSource, key: str, content: SourceContent) -> str:
    if key not in content:
        there = ", ".join(sorted(content)[:10]) or "nothing"
        raise NotFound(f"{source} has no key {key!r}", remedy=f"add it, or name one that it has: {there}")
    return _utf8(source, key, content[key])


def _utf8(source: DataSource, key: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{source}, key {key!r}: is not UTF-8 text at byte {error.start}") from None
