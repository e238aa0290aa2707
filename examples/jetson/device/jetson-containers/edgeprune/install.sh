#!/usr/bin/env bash
# Runs while the image is built, where the driver is missing: TensorRT is looked for and not imported.
set -euo pipefail
if ! python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("tensorrt") is None)'; then
    # cudastack leaves TensorRT's wheels there and installs none (issue 1576 of jetson-containers).
    tag="cp$(python3 -c 'import sys; print(f"{sys.version_info.major}{sys.version_info.minor}")')"
    uv pip install /usr/local/lib/python3*/dist-packages/tensorrt-*-"$tag"-*.whl
fi
uv pip install "$(ls /tmp/edgeprune/edgeprune-*.whl)[tensorrt,serve]"
