#!/usr/bin/env bash
# jetson-containers runs this in the image.
set -euo pipefail
python3 -c 'import tensorrt; print("TensorRT", tensorrt.__version__)'
edgeprune doctor
