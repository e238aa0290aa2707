#!/bin/sh
# Makes the virtual environment `venv` in this folder, with the EdgePrune of the wheel beside this script.
#
# Only JetPack's own Python sees JetPack's TensorRT, and pip may not change it (PEP 668, since Ubuntu 24.04). So EdgePrune gets a
# virtual environment of that Python which sees the packages of the system.
set -eu
cd "$(dirname "$0")"
PYTHON="${PYTHON:-/usr/bin/python3}"
set -- edgeprune-*.whl
if [ $# -ne 1 ] || [ ! -f "$1" ]; then
    echo "There must be one edgeprune-*.whl beside install.sh. Make it anew: python examples/jetson/prepare.py" >&2
    exit 1
fi
if ! "$PYTHON" -c 'import ensurepip' 2>/dev/null; then # Ubuntu has it in a package of its own
    as_root=sudo
    if [ "$(id -u)" -eq 0 ]; then as_root=; fi
    $as_root apt-get update
    $as_root apt-get install --yes python3-venv
fi
"$PYTHON" -m venv --system-site-packages venv
venv/bin/python -m pip install "./$1[tensorrt,serve]"
venv/bin/python -m pip install --force-reinstall --no-deps "./$1" # another wheel of the same version
