"""How a command ended, as clients of the error stream want to hear it.

Since protocol v4 it is a metav1.Status in JSON (k8s.io/apimachinery/pkg/apis/meta/v1); before, a failure is plain text
and success is silence.
"""

from __future__ import annotations

import json

from vmruntime.model.streams import ExecEnd

STRUCTURED = frozenset({"v4.channel.k8s.io", "v5.channel.k8s.io", "v4.base64.channel.k8s.io"})
"""Protocols whose error stream carries a Status."""


def success(protocol: str) -> bytes:
    """Return what the error stream says of a command that ended with 0, or of an attachment's end."""
    return _status({"status": "Success"}) if protocol in STRUCTURED else b""


def exited(protocol: str, end: ExecEnd) -> bytes:
    """Return what the error stream says of a command's end."""
    if end.error:
        # The program could not be run: a shell's exit code for that, with the reason.
        return _failure(protocol, end.exit_code, end.error)
    if end.exit_code == 0:
        return success(protocol)
    return _failure(protocol, end.exit_code, "")


def failed(protocol: str, message: str) -> bytes:
    """Return what the error stream says when the runtime itself failed."""
    text = f"Internal error occurred: {message}"
    if protocol not in STRUCTURED:
        return text.encode()
    causes = {"causes": [{"message": message}]}
    return _status({"status": "Failure", "message": text, "reason": "InternalError", "details": causes, "code": 500})


def _failure(protocol: str, exit_code: int, reason: str) -> bytes:
    text = f"command terminated with non-zero exit code: {reason or f'exit status {exit_code}'}"
    if protocol not in STRUCTURED:
        return text.encode()
    causes = {"causes": [{"reason": "ExitCode", "message": str(exit_code)}]}
    return _status({"status": "Failure", "message": text, "reason": "NonZeroExitCode", "details": causes})


def _status(fields: dict[str, object]) -> bytes:
    return json.dumps({"metadata": {}, **fields}).encode()
