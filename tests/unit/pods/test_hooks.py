"""Hook files: what is one, what it matches, and in which order they run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from vmruntime.daemon.hooks import load_hooks
from vmruntime.errors import FailedPrecondition
from vmruntime.pods.oci.hooks import Hook, Subject, matches, oci_hooks, outside, parse


def document(**changes: Any) -> dict[str, Any]:
    made = {"version": "1.0.0", "hook": {"path": "/bin/true"}, "when": {"always": True}, "stages": ["prestart"]}
    return {**made, **changes}


def hook(**changes: Any) -> Hook:
    return parse(json.dumps(document(**changes)).encode(), "h.json")


SUBJECT = Subject(annotations={"a.example/x": "one", "b": "two"}, program="/usr/sbin/init", bind_mounts=True)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({"always": True}, True),
        ({"always": False}, False),
        ({"hasBindMounts": True}, True),
        ({"hasBindMounts": False}, False),
        ({"commands": [".*/init$", "x"]}, True),
        ({"commands": ["^init"]}, False),
        ({"annotations": {"^a\\.example/": "^one$"}}, True),
        ({"annotations": {"^a\\.example/": "two"}}, False),
        ({"annotations": {"x": "one", "^b$": "two"}}, True),
        ({"annotations": {"x": "one", "^c$": "two"}}, False),
        ({"annotations": {"[[:alpha:]]{7}/x": "[[:lower:]]+"}}, True),
        ({"always": True, "commands": ["nothing"]}, False),
        ({"hasBindMounts": True, "annotations": {"b": "two"}, "commands": ["init"]}, True),
    ],
)
def test_every_condition_that_is_given_has_to_match(when: dict[str, Any], expected: bool) -> None:
    assert matches(hook(when=when), SUBJECT) is expected


def test_no_annotation_makes_a_pattern_slow() -> None:
    """It would take a backtracking matcher longer than anybody lives."""
    subject = Subject(annotations={"x": "a" * 65536 + "!"}, program="sh", bind_mounts=False)
    assert not matches(hook(when={"annotations": {"x": "^(a+)+$"}}), subject)


def test_a_container_without_bind_mounts() -> None:
    bare = Subject(annotations={}, program="sh", bind_mounts=False)
    assert not matches(hook(when={"hasBindMounts": True}), bare)
    assert not matches(hook(when={"hasBindMounts": True, "always": True}), bare)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "file: expected `object`, got `array`"),
        ("{}", "file: object missing required field `version`"),
        (document(version="0.1.0"), "version: '0.1.0' is not '1.0.0'"),
        (document(version=1), "version: expected `str`, got `int`"),
        (document(hook={}), "hook: object missing required field `path`"),
        (document(hook={"path": "bin/x"}), "hook.path: 'bin/x' is not an absolute path"),
        (document(hook={"path": "/x", "arguments": []}), "hook: object contains unknown field `arguments`"),
        (document(hook={"path": "/x", "env": ["A"]}), "hook.env[0]: 'A' is not NAME=value"),
        (document(hook={"path": "/x", "timeout": 0}), "hook.timeout: 0 is not a positive number"),
        (document(hook={"path": "/x", "args": "y"}), "hook.args: expected `array`, got `str`"),
        (document(when={}), "when: {} has no condition"),
        (document(when={"annotation": {}}), "when: object contains unknown field `annotation`"),
        (document(when={"commands": ["["]}), "when.commands[0]: '[' is not a regular expression"),
        (document(when={"commands": ["[[:moon:]]"]}), "when.commands[0]: '[[:moon:]]' is not a regular expression"),
        (document(when={"annotations": {"[": "x"}}), "when.annotations: '[' is not a regular expression"),
        (document(when={"annotations": {"x": "("}}), "when.annotations['x']: '(' is not a regular expression"),
        (
            document(when={"commands": ["(?=x)"]}),
            "when.commands[0]: '(?=x)' is not a regular expression of RE2: invalid perl",
        ),
        (document(stages=[]), "stages: [] names no stage"),
        (document(stages=["prestart", "midnight"]), "stages[1]: invalid enum value 'midnight'"),
    ],
)
def test_what_is_no_hook_is_named_with_file_and_field(text: str | dict[str, Any], complaint: str) -> None:
    data = text if isinstance(text, str) else json.dumps(text)
    with pytest.raises(FailedPrecondition, match=rf"^/etc/h\.json: {re.escape(complaint)}"):
        parse(data.encode(), "/etc/h.json")


def test_the_oci_configuration_gets_the_hook_as_written() -> None:
    full = {"path": "/bin/x", "args": ["x", "-v"], "env": ["A=b"], "timeout": 5}
    hooks = [hook(hook=full, stages=["poststop", "startContainer", "poststop"]), hook(stages=["poststop"])]
    assert oci_hooks(hooks, ("poststop", "startContainer")) == {
        "poststop": [full, {"path": "/bin/true"}],
        "startContainer": [full],
    }
    assert oci_hooks(hooks, ("startContainer",)) == {"startContainer": [full]}
    assert [outside(one) for one in hooks] == [["poststop"], ["poststop"]]


def test_directories(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    for directory, name, program in (
        (first, "10-Zebra.json", "/bin/sh"),
        (first, "20-masked.json", "/bin/sh"),
        (first, "notes.txt", "/bin/sh"),
        (second, "05-later.json", "/bin/true"),
        (second, "10-apple.json", "/bin/true"),
        (second, "20-masked.json", "/bin/true"),
    ):
        (directory / name).write_text(json.dumps(document(hook={"path": program})))
    found = load_hooks([str(first), str(second), str(tmp_path / "absent")])
    assert [(Path(one.file).name, one.command.path) for one in found] == [
        ("05-later.json", "/bin/true"),
        ("10-apple.json", "/bin/true"),
        ("10-Zebra.json", "/bin/sh"),
        ("20-masked.json", "/bin/true"),
    ]


def test_programs_and_files_have_to_be_trustworthy(tmp_path: Path) -> None:
    program, file = tmp_path / "program", tmp_path / "h.json"
    file.write_text(json.dumps(document(hook={"path": str(program)})))

    def refused(words: str) -> None:
        with pytest.raises(FailedPrecondition, match=words):
            load_hooks([str(tmp_path)])

    refused(rf"^{file}: hook\.path: {program}: No such file or directory")
    program.write_text("#!/bin/sh")
    refused(rf"^{file}: hook\.path: {program} is not an executable file")
    program.chmod(0o777)
    refused(rf"^{file}: hook\.path: {program} may be written by others than its owner")
    program.chmod(0o755)
    assert len(load_hooks([str(tmp_path)])) == 1
    file.chmod(0o666)
    refused(rf"^{file}: it may be written by others than its owner")
    file.chmod(0o664)
    refused(rf"^{file}: it may be written by others than its owner")
    file.chmod(0o644)
    tmp_path.chmod(0o777)
    refused(rf"^{file}: it, reached through {tmp_path}, which may be written by others .*chmod go-w {tmp_path}")
    tmp_path.chmod(0o1777)  # sticky: what is root's stays
    assert len(load_hooks([str(tmp_path)])) == 1
    tmp_path.chmod(0o755)
    # What runs inside the container is the image's: nothing of the host is looked at.
    file.write_text(json.dumps(document(hook={"path": "/opt/of/the/image"}, stages=["startContainer"])))
    assert outside(load_hooks([str(tmp_path)])[0]) == []
    refused_directory = tmp_path / "h.json"
    with pytest.raises(FailedPrecondition, match=rf"^hooks_dirs: {refused_directory} cannot be read"):
        load_hooks([str(refused_directory)])


def test_links_are_followed_by_owner_and_mode(tmp_path: Path) -> None:
    open_to_all, hooks = tmp_path / "open", tmp_path / "hooks"
    open_to_all.mkdir()
    hooks.mkdir()
    (tmp_path / "real.json").write_text(json.dumps(document()))
    (open_to_all / "link.json").symlink_to("../real.json")
    (hooks / "h.json").symlink_to(open_to_all / "link.json")
    assert len(load_hooks([str(hooks)])) == 1
    open_to_all.chmod(0o777)  # anybody may put another link there
    with pytest.raises(FailedPrecondition, match=f"reached through {open_to_all}, which may be written by others"):
        load_hooks([str(hooks)])
    (hooks / "h.json").unlink()
    (hooks / "h.json").symlink_to("h.json")
    with pytest.raises(FailedPrecondition, match="Too many levels of symbolic links"):
        load_hooks([str(hooks)])
    (hooks / "h.json").unlink()
    os.mkfifo(hooks / "h.json", 0o600)
    with pytest.raises(FailedPrecondition, match="not a file"):
        load_hooks([str(hooks)])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user(tmp_path: Path) -> None:
    file = tmp_path / "h.json"
    file.write_text(json.dumps(document()))
    os.chown(file, 4242, -1)
    with pytest.raises(FailedPrecondition, match="it belongs to the user 4242"):
        load_hooks([str(tmp_path)])
