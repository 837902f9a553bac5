"""Reads the directories of CDI files. They are read for every container with such devices, so a change needs no restart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmruntime.daemon.trusted import read_trusted
from vmruntime.errors import FailedPrecondition
from vmruntime.pods.oci.cdi import MANUAL, CdiSpec, CdiSpecs, parse

SUFFIXES = (".json", ".yaml")


def load_cdi_specs(directories: Sequence[str]) -> CdiSpecs:
    """Return all files. One that cannot be used does not hold up devices of others; it is told when a device is missing.

    Args:
        directories: Of *.json and *.yaml files; a later one has precedence. One that does not exist has none.
    """
    specs: list[CdiSpec] = []
    bad: list[str] = []
    for priority, directory in enumerate(directories):
        try:
            files = sorted(path for path in Path(directory).iterdir() if path.suffix in SUFFIXES)
        except FileNotFoundError:
            continue
        except OSError as error:
            bad.append(f"{directory}: {error.strerror}")
            continue
        for file in files:
            try:
                specs.append(parse(read_trusted(file, MANUAL), str(file), priority))
            except FailedPrecondition as error:
                bad.append(error.message)
    return CdiSpecs(specs=specs, bad=bad, directories=list(directories))
