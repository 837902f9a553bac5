"""Runs the daemon without the command line: python -m vmruntime.daemon [CONFIG]."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from vmruntime.config.loader import load
from vmruntime.daemon.main import serve
from vmruntime.errors import VmruntimeError


def main() -> None:
    """Load the configuration and serve; a failure is one line on stderr and status 1."""
    try:
        asyncio.run(serve(load(Path(sys.argv[1]) if len(sys.argv) > 1 else None)))
    except VmruntimeError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
