#!/usr/bin/env bash
# Installs what vmruntime needs from the distribution and makes the account VMs run as. Quick when all is there.
#
# Usage: tools/setup-system.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ "$(id -u)" = 0 ] || { echo "error: set-up installs packages and makes an account; run it as root" >&2; exit 1; }

"$here/install-packages.sh" "$here/packages.txt"

if ! getent passwd vmruntime >/dev/null; then
    group=()
    if getent group kvm >/dev/null; then group=(--gid kvm); fi
    useradd --system --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "${group[@]}" vmruntime
fi

# libvirt's driver looks for the account it would run QEMU as by default; Debian has it in a package that brings systemd along.
getent group libvirt-qemu >/dev/null || groupadd --system libvirt-qemu
getent passwd libvirt-qemu >/dev/null || useradd --system --no-create-home --home-dir /var/lib/libvirt \
    --shell /usr/sbin/nologin --gid libvirt-qemu libvirt-qemu

# --- Rust: at least what the agent's manifest asks for
wanted=$(sed -n 's/^rust-version = "1\.\([0-9]*\).*/\1/p' "$here/../guest-agent/Cargo.toml")
version() { rustc --version 2>/dev/null | sed -n 's/^rustc 1\.\([0-9]*\).*/\1/p'; }
if [ "$(version || true)" = "" ] || [ "$(version)" -lt "${wanted:-85}" ]; then
    apt-cache show rustc-web >/dev/null 2>&1 || apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends cargo-web rustc-web </dev/null >/dev/null
fi

# --- Go, for the tests that drive the streaming server with Kubernetes' own client
wanted=$(sed -n 's/^go 1\.\([0-9]*\).*/\1/p' "$here/../tests/e2e/remotecommand/go.mod")
go_version() { PATH=$PATH:/usr/local/go/bin go version 2>/dev/null | sed -n 's/.* go1\.\([0-9]*\).*/\1/p'; }
found=$(go_version || true)
if [ "${found:-0}" -lt "$wanted" ]; then
    candidate=$(apt-cache policy golang-go | sed -n 's/.*Candidate: [0-9]*:1\.\([0-9]*\).*/\1/p')
    if [ "${candidate:-0}" -ge "$wanted" ]; then
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends golang-go </dev/null >/dev/null
    else
        echo "note: no Go 1.$wanted or newer here; tests/e2e/test_streaming.py will be skipped"
    fi
fi

# --- vsock without the kernel's help
libexec=/usr/local/libexec/vmruntime
if [ ! -c /dev/vhost-vsock ] && [ ! -x "$libexec/vhost-device-vsock" ]; then
    echo "building vhost-device-vsock (this host has no /dev/vhost-vsock)"
    build=$(mktemp -d)
    cargo install --quiet --locked vhost-device-vsock --version 0.3.0 --root "$build"
    install -D -m 755 "$build/bin/vhost-device-vsock" "$libexec/vhost-device-vsock"
    rm -rf "$build"
fi
