#!/usr/bin/env bash
# Installs the peer that only `make bench` needs: containerd and runc. What a host has of them, from anywhere, is used as it is.
#
# Usage: tools/setup-bench.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
for program in containerd containerd-shim-runc-v2 ctr runc; do
    if ! command -v "$program" >/dev/null; then
        # Nothing may be removed for them: Docker's own packages of the same programs would be.
        exec "$here/install-packages.sh" "$here/packages-bench.txt" --no-remove
    fi
done
