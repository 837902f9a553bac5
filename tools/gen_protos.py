"""Generates Python stubs and type hints from proto/ into vmruntime/generated.

Usage: python tools/gen_protos.py [ROOT]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PROTOS = ("cri.proto", "agent.proto", "maintenance.proto")


def generate(root: Path) -> None:
    """Write *_pb2.py, *_pb2_grpc.py and their .pyi for every proto under ROOT/proto.

    Raises:
        SystemExit: when protoc refuses a file; its own message is on stderr.
    """
    from grpc_tools import protoc

    out = root / "vmruntime" / "generated"
    out.mkdir(exist_ok=True)
    # protoc looks for the type-hint plugins on PATH; they are installed beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    # The virtual prefix makes the generated modules import each other as vmruntime.generated.X_pb2.
    arguments = [
        "protoc",
        f"-Ivmruntime/generated={root / 'proto'}",
        f"--python_out={root}",
        f"--grpc_python_out={root}",
        f"--mypy_out=quiet:{root}",
        f"--mypy_grpc_out=quiet:{root}",
        *(f"vmruntime/generated/{name}" for name in PROTOS),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed; see its message above")


if __name__ == "__main__":
    generate(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
