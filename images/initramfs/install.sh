#!/usr/bin/env bash
# Installs build/guest where the daemon looks for it.
#
# Usage: images/initramfs/install.sh [DIRECTORY]     (default /var/lib/vmruntime/guest)
#
# DIRECTORY is a symbolic link to a directory named after the guest's content, and is switched by one rename: a reader
# who resolves it first never mixes two guests. The guest before this one is kept, older ones are removed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=images/lib.sh
. "$here/../lib.sh"

link=${1:-/var/lib/vmruntime/guest}
source=$ROOT/build/guest
[ -s "$source/guest.json" ] || die "nothing to install; run: make guest"
digest=$(sha256sum <"$source/guest.json" | cut -c1-16)
parent=$(dirname "$link")
target=$link-$digest

mkdir -p "$parent"
previous=$(readlink "$link" 2>/dev/null || true)
if [ "$previous" = "$(basename "$target")" ] && [ -s "$link/guest.json" ]; then
    say "$link holds this guest already"
    exit 0
fi
if [ ! -s "$target/guest.json" ]; then
    temporary=$(mktemp -d "$link-new.XXXXXX")
    trap 'rm -rf "$temporary"' EXIT
    cp "$source/vmlinuz" "$source/initramfs.img" "$source/guest.json" "$temporary/"
    chmod 0755 "$temporary"
    chmod 0644 "$temporary"/*
    rm -rf "$target"
    mv -T "$temporary" "$target"
fi
# A plain directory of an earlier, hand-made installation makes way.
if [ -d "$link" ] && [ ! -L "$link" ]; then mv -T "$link" "$link-replaced.$$" && rm -rf "$link-replaced.$$"; fi
ln -sfn "$(basename "$target")" "$link.tmp.$$"
mv -Tf "$link.tmp.$$" "$link"
for old in "$link"-????????????????; do
    case $(basename "$old") in
    "$(basename "$target")" | "${previous:-none}") ;;
    *) if [ -d "$old" ]; then rm -rf "$old"; fi ;;
    esac
done
say "installed as $link -> $(basename "$target")"
