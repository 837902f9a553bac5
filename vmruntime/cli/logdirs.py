"""The log directories of pods made by `vmruntime run`.

CRI leaves log files to whoever asked for the pod: kubelet removes those of its pods, we those of ours.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vmruntime.cli.podspec import CREATOR, CREATOR_ANNOTATION, NAMESPACE, log_directory_name
from vmruntime.errors import Internal, PermissionDenied
from vmruntime.generated import cri_pb2


def make_log_directory(path: Path) -> None:
    """Make a pod's log directory.

    Raises:
        PermissionDenied: This account may not.
        Internal: The file system refuses.
    """
    try:
        path.mkdir(mode=0o750, parents=True)
    except PermissionError:
        raise PermissionDenied(f"{path}: permission denied", remedy="run as root") from None
    except OSError as error:
        raise Internal(f"{path}: cannot be made: {error.strerror}") from error


def remove_log_directory(logs: Path, pod: cri_pb2.PodSandboxConfig | cri_pb2.PodSandbox) -> None:
    """Remove the log directory of a pod that `vmruntime run` made; other pods' are left alone."""
    # The path is built from the parts we choose the names of, never taken from what somebody put into a pod.
    name = log_directory_name(pod.metadata)
    ours = pod.annotations.get(CREATOR_ANNOTATION) == CREATOR and pod.metadata.namespace == NAMESPACE
    if ours and "/" not in name:
        shutil.rmtree(logs / name, ignore_errors=True)
