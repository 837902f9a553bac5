"""Generates the protobuf stubs into vmruntime/generated when the package is built or installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gen_protos import generate
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ProtoBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Runs protoc before hatchling collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate stubs under the source root (also for editable installs)."""
        generate(Path(self.root))
