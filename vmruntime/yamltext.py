"""YAML from people, as values JSON can hold: everything else is refused with its line and column.

PyYAML finds the nodes; the values are made here, since its own constructors lose duplicate keys without a word, make
dates and base-60 numbers of what looks like text (2030-01-01, 12:30, many MAC addresses), and let a few lines of
aliases grow to gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from vmruntime.errors import InvalidArgument

DEPTH_LIMIT = 100
EXPANDED_LIMIT = 8 * 1024 * 1024
"""Characters and nodes of a document, each alias counted as what it stands for."""

_TAG = "tag:yaml.org,2002:"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_SCALARS = SafeConstructor()


class BadYaml(InvalidArgument):
    """Raised when a text is not YAML, or has what JSON cannot hold; the message begins with line and column."""


def load(text: str) -> Any:
    """Return the document in a text as None, bool, int, float, str, list and dict with str keys.

    Integers as keys become text. Dates and base-60 numbers stay text.

    Raises:
        BadYaml: It is not YAML; a key is there twice; it has a tag of its own, a number that JSON does not have, or
            aliases that expand to more than EXPANDED_LIMIT.
    """
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        words = error.problem or error.context or "cannot be read"
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise BadYaml(place + words) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadYaml(f"line {line}: has a character that YAML does not allow: {error.character!r}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise BadYaml(f"cannot be read: {error}") from None
    return None if node is None else _Values().value(node, 0)


def load_mapping(text: str) -> dict[str, Any]:
    """Return the mapping in a text; nothing at all is an empty one.

    Raises:
        BadYaml: See load(); or it is not a mapping.
    """
    document = load(text)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise BadYaml(f"is {kind(document)}, not a mapping (lines of key: value)")
    return document


def kind(value: object) -> str:
    """Return what a value is called in YAML, with its article."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "a mapping"
        case _:
            return f"a {type(value).__name__}"


class _Dumper(_DUMPER):  # type: ignore[misc, valid-type]
    """Writes equal lists out twice rather than by an alias, which small readers do not know."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def dump(value: Any) -> str:
    """Return a value as YAML in block style, keys in their order; load() gives the same value back."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return text


class _Values:
    """Makes the values of one document."""

    def __init__(self) -> None:
        self._expanded = 0

    def value(self, node: yaml.Node, depth: int) -> Any:
        self._expanded += 1
        if depth > DEPTH_LIMIT:
            raise _at(node, f"is nested more than {DEPTH_LIMIT} deep, or contains itself")
        if isinstance(node, yaml.ScalarNode):
            self._expanded += len(node.value)
        if self._expanded > EXPANDED_LIMIT:
            raise _at(node, f"the document is larger than {EXPANDED_LIMIT} characters when its aliases are written out")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, depth)
        raise _tag(node)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged = {**self._merged(value_node, depth), **merged}
                continue
            key = _key(key_node)
            if key in own:
                raise _at(key_node, f"the key {key!r} is there twice")
            own[key] = self.value(value_node, depth + 1)
        return {**merged, **own}

    def _merged(self, node: yaml.Node, depth: int) -> dict[str, Any]:
        """Return what a merge key adds; of several mappings an earlier one wins (yaml.org/type/merge.html)."""
        found: dict[str, Any] = {}
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            value = self.value(source, depth + 1)
            if not isinstance(value, dict):
                raise _at(source, f"only mappings can be merged, and this is {kind(value)}")
            found = {**value, **found}
        return found


def _key(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        key = _scalar(node)
        if isinstance(key, str):
            return key
        if isinstance(key, int) and not isinstance(key, bool):
            return str(key)
    raise _at(node, f"a key is {node.value if isinstance(node, yaml.ScalarNode) else 'not a text'}: put it in quotes")


def _scalar(node: yaml.ScalarNode) -> Any:
    text: str = node.value
    match node.tag.removeprefix(_TAG):
        case "str" | "timestamp" | "value":
            return text
        case "null":
            return None
        case "bool":
            return _SCALARS.construct_yaml_bool(node)
        case "int" | "float" if ":" in text:
            return text
        case "int":
            return _integer(node)
        case "float":
            number = _SCALARS.construct_yaml_float(node)
            if not math.isfinite(number):
                raise _at(node, f"{text} is not a number that JSON has: put it in quotes")
            return number
        case _:
            raise _tag(node)


def _integer(node: yaml.ScalarNode) -> int:
    try:
        number: int = _SCALARS.construct_yaml_int(node)
    except ValueError:  # an integer by an explicit tag, such as !!int x
        raise _at(node, f"{node.value[:40]!r} is not an integer") from None
    if not -(2**63) <= number < 2**64:
        raise _at(node, f"{node.value[:40]} does not fit into 64 bits: put it in quotes")
    return number


def _tag(node: yaml.Node) -> BadYaml:
    return _at(node, f"the tag {node.tag.replace(_TAG, '!!')} is not supported; use texts, numbers, lists and mappings")


def _at(node: yaml.Node, words: str) -> BadYaml:
    mark = node.start_mark
    return BadYaml(f"line {mark.line + 1}, column {mark.column + 1}: {words}")
