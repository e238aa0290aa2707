#!/bin/sh
# In the folder with the bundle: ./on_device.sh IMAGE PROMPT
# Every line can also be typed by itself. Stops at the first that fails. PROVIDER=cpu leaves the engines out.
set -eu
if [ $# -ne 2 ]; then
    echo "Usage: ./on_device.sh IMAGE PROMPT" >&2
    exit 2
fi
# shellcheck source=/dev/null
. ./.env # CONTEXT
PROVIDER="${PROVIDER:-tensorrt}"
./install.sh
PATH="$PWD/venv/bin:$PATH"
edgeprune doctor
if [ "$PROVIDER" = tensorrt ]; then
    edgeprune build robot.bundle --context "$CONTEXT" --unpruned # bench compares with no pruning; leave it out to save memory
    edgeprune selftest robot.bundle -o selftest.json --force
fi
edgeprune bench robot.bundle --provider "$PROVIDER"
edgeprune run robot.bundle --provider "$PROVIDER" --fit pad --image "$1" --prompt "$2"
# Then one of:
#   sudo ./service.sh
#   edgeprune serve robot.bundle --provider tensorrt --fit pad --host 0.0.0.0 --api-key-file keys.txt
#   edgeprune ros2 robot.bundle --provider tensorrt --image-topic /camera/image_raw --fit pad
