"""YAML from people."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vmruntime import yamltext
from vmruntime.yamltext import BadYaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(
        ["on", "yes", "~", "2030-01-01", "12:30", "52:54:00:12:34:56", "1e3", "0644", "<<", "=", "- a", "#x"]
    )
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@given(DOCUMENTS)
def test_what_is_written_is_read_back(document: Any) -> None:
    text = yamltext.dump(document)
    assert yamltext.load(text) == document
    assert yaml.safe_load(text) == document  # what cloud-init reads with


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        yamltext.dump(yamltext.load(text))
    except BadYaml as error:
        assert error.message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ('{"a": [1, 2.5, true, null]}', {"a": [1, 2.5, True, None]}),
        ("expires: 2030-01-01", {"expires": "2030-01-01"}),
        ("mac: 52:54:00:12:34:56\nat: 12:30\nfor: 1:30.5", {"mac": "52:54:00:12:34:56", "at": "12:30", "for": "1:30.5"}),
        ("permissions: 0644", {"permissions": 0o644}),
        ("22: ssh", {"22": "ssh"}),
        ("on: x", BadYaml),
        ("base: &b {a: 1, c: 3}\nx:\n  <<: *b\n  a: 2", {"base": {"a": 1, "c": 3}, "x": {"a": 2, "c": 3}}),
        ("p: &p {a: 1}\nq: &q {a: 2, b: 2}\nx: {<<: [*p, *q]}", {"p": {"a": 1}, "q": {"a": 2, "b": 2}, "x": {"a": 1, "b": 2}}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
    ],
)  # fmt: skip
def test_values(text: str, value: Any) -> None:
    if value is BadYaml:
        with pytest.raises(BadYaml):
            yamltext.load(text)
    else:
        assert yamltext.load(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "line 2, column 1: the key 'a' is there twice"),
        ("a: {", "did not find expected node content"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed"),
        ("a: 1\n---\nb: 2", "line 2, column 1: "),
        ("a: \x00", "line 1: has a character that YAML does not allow"),
        ("a: !!binary aGk=", "line 1, column 4: the tag !!binary is not supported"),
        ("a: !mine x", "the tag !mine is not supported"),
        ("a: !!set {x}", "the tag !!set is not supported"),
        ("a: .inf", "is not a number that JSON has"),
        ("a: 123456789012345678901", "does not fit into 64 bits"),
        ("a: !!int x", "'x' is not an integer"),
        ("? [a]\n: b", "put it in quotes"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 103 + "]" * 103, "is nested more than 100 deep"),
        ("a: &x 1\nb: {<<: *x}", "only mappings can be merged, and this is a number"),
        ("a: *nothing", "undefined alias"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(BadYaml) as refusal:
        yamltext.load(text)
    assert words in refusal.value.message


def test_aliases_that_explode() -> None:
    lines = ["a0: &a0 " + "x" * 1000]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    with pytest.raises(BadYaml, match="when its aliases are written out"):
        yamltext.load("\n".join(lines))


def test_a_mapping_is_wanted() -> None:
    assert yamltext.load_mapping("# nothing\n") == {}
    with pytest.raises(BadYaml, match="is a list, not a mapping"):
        yamltext.load_mapping("- a")
    with pytest.raises(BadYaml, match="is a text, not a mapping"):
        yamltext.load_mapping("echo hello")


def test_equal_values_are_written_out() -> None:
    shared = ["a"]
    assert yamltext.dump({"x": shared, "y": shared}) == "x:\n- a\ny:\n- a\n"
