#!/usr/bin/env bash
# Make a machine ready: system packages for FFCV, and .venv with exactly what requirements.txt locks.
# Run again it does nothing unless the lock, this script or the system packages changed.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly FFCV_PACKAGES=(g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev)
readonly NATIVE=bdkd_dist/data/native/jpeg.c  # built with the project; its headers come with FFCV's packages
readonly VENV=.venv
readonly FFCV_LOG=$VENV/ffcv-build.log

say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }

# Install Debian packages, as root or through sudo; where neither is possible, say the command.
apt_install() {
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        if ! command -v sudo >/dev/null || ! { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
            say "cannot install packages without root; run: sudo apt-get install -y $*"
            return 1
        fi
        as_root=(sudo)
    fi
    say "installing system packages: $*"
    { "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null; } || {
        say "apt-get failed; run: ${as_root[*]:+sudo }apt-get install -y $*"
        return 1
    }
}

# What this machine lacks to build FFCV: Debian packages, or commands and libraries where there is no apt.
ffcv_lacks() {
    local name
    if command -v dpkg-query >/dev/null; then
        for name in "${FFCV_PACKAGES[@]}"; do
            dpkg-query -W -f='${Status}\n' "$name" 2>/dev/null | grep -q 'ok installed' || echo "$name"
        done
    else
        for name in g++ pkg-config; do
            command -v "$name" >/dev/null || echo "$name"
        done
        for name in opencv4 libturbojpeg; do
            pkg-config --exists "$name" 2>/dev/null || echo "$name"
        done
    fi
}

# What .venv is made from. It does not say that FFCV is there: a build that failed is not tried again each time.
situation() {
    local files=(requirements.txt pyproject.toml "$0" "$NATIVE")
    echo "$(cat "${files[@]}" 2>/dev/null | sha256sum | cut -c1-16), for FFCV lacking: ${lacks[*]:-nothing}"
}

# uv from the PATH, or a pinned one in a small environment of its own.
find_uv() {
    if command -v uv >/dev/null; then
        UV=uv
        return
    fi
    UV=.bootstrap/bin/uv
    [ -x "$UV" ] && return
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        apt_install python3 python3-venv || exit 1
    fi
    say "installing uv"
    python3 -m venv .bootstrap
    .bootstrap/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r cluster/uv-requirements.txt
}

mapfile -t lacks < <(ffcv_lacks)
if [ "$(head -n 1 $VENV/.ready 2>/dev/null)" = "$(situation)" ]; then exit 0; fi
if [ "${#lacks[@]}" -gt 0 ]; then
    if ! command -v apt-get >/dev/null; then
        say "no apt here: for FFCV install ${lacks[*]} (with headers) yourself, then run: make setup"
    elif apt_install "${lacks[@]}"; then
        mapfile -t lacks < <(ffcv_lacks)
    fi
fi

find_uv
[ -x $VENV/bin/python ] || "$UV" venv -q --python '>=3.11,<3.14' $VENV || {
    say "Python 3.11, 3.12 or 3.13 is needed (with its headers, for FFCV) and could not be had; install one"
    exit 1
}
export VIRTUAL_ENV=$PWD/$VENV

# FFCV is built here, so it stands apart: its lines of the lock, and all the others.
lock=$(mktemp -d)
trap 'rm -rf "$lock"' EXIT
awk -v folder="$lock" '/^[a-zA-Z0-9]/ { file = /^ffcv==/ ? "ffcv" : "others" } file { print > (folder "/" file ".txt") }' requirements.txt

say "installing Python packages into $VENV (a few GB the first time)"
"$UV" pip install -q --require-hashes --compile-bytecode -r "$lock/others.txt"
"$UV" pip install -q --no-deps --no-build-isolation -e .
rm -f "$FFCV_LOG"
if [ "${#lacks[@]}" -gt 0 ]; then
    say "going on without FFCV: the torch loader gives the same batches, more slowly"
else
    say "building FFCV"
    if "$UV" pip install -q --require-hashes --no-deps --no-build-isolation --compile-bytecode -r "$lock/ffcv.txt" \
        >"$FFCV_LOG" 2>&1; then
        rm -f "$FFCV_LOG"
    else
        say "FFCV did not build ($FFCV_LOG says why); going on with the torch loader, which gives the same batches," \
            "more slowly; to try again run: rm -f $VENV/.ready && make setup"
    fi
fi
situation >$VENV/.ready
