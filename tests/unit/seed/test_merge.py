"""Virtlet's way of joining user-data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmruntime.seed.merge import merge

LEAVES = st.none() | st.booleans() | st.integers(0, 3) | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4)


@pytest.mark.parametrize(
    ("base", "override", "joined"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"users": [{"name": "x"}]}, {"users": [{"name": "y"}]}, {"users": [{"name": "x"}, {"name": "y"}]}),
        (
            {"a": {"b": {"c": 1}, "d": [1]}},
            {"a": {"b": {"e": 2}, "d": [2]}},
            {"a": {"b": {"c": 1, "e": 2}, "d": [1, 2]}},
        ),
        ({"a": [1]}, {"a": "text"}, {"a": "text"}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
    ],
)
def test_examples(base: Any, override: Any, joined: Any) -> None:
    assert merge(base, override) == joined


@given(MAPPINGS, MAPPINGS)
def test_nothing_is_lost_and_nothing_changed(base: dict[str, Any], override: dict[str, Any]) -> None:
    before = copy.deepcopy((base, override))
    joined = merge(base, override)
    assert (base, override) == before
    assert joined.keys() == base.keys() | override.keys()
    for key, value in joined.items():
        if key not in override:
            assert value == base[key]
        elif isinstance(base.get(key), list) and isinstance(override[key], list):
            assert value == base[key] + override[key]
        elif isinstance(base.get(key), dict) and isinstance(override[key], dict):
            assert value == merge(base[key], override[key])
        else:
            assert value == override[key]


@given(MAPPINGS, MAPPINGS, MAPPINGS)
def test_neutral_and_associative_where_types_agree(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    assert merge(a, {}) == a == merge({}, a)
    lists = [{key: [value] for key, value in each.items()} for each in (a, b, c)]
    assert merge(merge(lists[0], lists[1]), lists[2]) == merge(lists[0], merge(lists[1], lists[2]))
