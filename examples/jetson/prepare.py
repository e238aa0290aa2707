"""Do everything for a Jetson that needs no Jetson: export, check, estimate. Write the commands that are left for the device.

python examples/jetson/prepare.py MODEL OUT --module orin-nano --target jetpack6 --method fastv --keep 0.5 --layer 2
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

from edgeprune.cli import main as edgeprune
from edgeprune.errors import install_command
from edgeprune.io.files import write_text

ROOT = Path(__file__).resolve().parents[2]
REMAINING = """\
#!/bin/sh
# On the Jetson, in the folder with the bundle. Stops at the first step that fails.
set -e
python3 -m venv --system-site-packages venv   # JetPack's own TensorRT is a system package
venv/bin/pip install "$(ls edgeprune-*.whl)[tensorrt,serve]"
PATH="$PWD/venv/bin:$PATH"
edgeprune doctor
edgeprune build {name} --context {context} --unpruned   # bench compares with no pruning; leave it out to save memory
edgeprune selftest {name} -o selftest.json --force
edgeprune bench {name} --provider tensorrt
edgeprune run {name} --provider tensorrt --image "$1" --prompt "$2"
# Then one of:
#   edgeprune serve {name} --provider tensorrt --host 0.0.0.0 --api-key-file keys.txt
#   edgeprune ros2 {name} --provider tensorrt --image-topic /camera/image_raw --fit pad
"""


def command(*words: object) -> None:
    """Run `edgeprune` and show the command; leave where it fails."""
    line = [str(word) for word in words]
    print(f"$ edgeprune {shlex.join(line)}", flush=True)
    if code := edgeprune(line, prog_name="edgeprune", standalone_mode=False):
        raise SystemExit(code)


def main() -> None:
    """Parse the command line and do the steps; what is not known here is an option of `edgeprune export`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a transformers folder, an id of the Hugging Face Hub, or tabletop")
    parser.add_argument("out", type=Path, help="the folder to copy to the Jetson; not there yet")
    parser.add_argument("--module", default="orin-nano", help="a module that `edgeprune estimate --device` knows")
    parser.add_argument("--target", default="jetpack6", choices=("jetpack6", "jetpack7", "jetpack7.2"))
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--context", type=int, default=1024, help="text tokens that the caches may hold")
    options, export = parser.parse_known_args()
    bundle = options.out / "robot.bundle"
    command("export", options.model, "-o", bundle, "--target", options.target, "--precision", options.precision, *export)
    if importlib.util.find_spec("tensorrt_rtx"):
        command("check", bundle, "--context", options.context)
    else:
        print(f"Not checked: the builder that tries every graph is missing. {install_command('check')}")
    command("estimate", bundle, "--device", options.module)
    print("$ python tools/build_wheel.py", options.out, flush=True)
    subprocess.run([sys.executable, ROOT / "tools" / "build_wheel.py", options.out], check=True)
    script = options.out / "on_device.sh"
    write_text(script, REMAINING.format(name=bundle.name, context=options.context))
    script.chmod(0o755)
    print("\nWhat is left, on the Jetson:")
    print(f"  scp -r {options.out} robot:answers", "  ssh robot 'cd answers && ./on_device.sh IMAGE PROMPT'", sep="\n")


if __name__ == "__main__":
    main()
