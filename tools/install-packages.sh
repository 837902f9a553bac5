#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages of a list that are not there; no service of theirs starts by itself.
#
# Usage: tools/install-packages.sh LIST [APT-GET-OPTION...]
set -euo pipefail
list=$1
shift
[ "$(id -u)" = 0 ] || { echo "error: this installs packages; run it as root" >&2; exit 1; }

missing=()
while read -r package _; do
    case $package in
    '' | '#'*) continue ;;
    */*) if [ "${package#*/}" != "$(dpkg --print-architecture)" ]; then continue; fi ;;
    esac
    package=${package%/*}
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done <"$list"
[ "${#missing[@]}" -gt 0 ] || exit 0

echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# No service may start by itself: policy-rc.d, unless the host has its own.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
apt-get install -y -qq --no-install-recommends "$@" "${missing[@]}" </dev/null >/dev/null
