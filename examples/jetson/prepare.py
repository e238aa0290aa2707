"""Do everything for a Jetson that needs no Jetson: export, check, estimate. Write a folder with what is left for the device.

python examples/jetson/prepare.py MODEL OUT --module orin-nano --target jetpack6 --method fastv --keep 0.5 --layer 2
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from edgeprune.cli import main as edgeprune
from edgeprune.errors import install_command
from edgeprune.io.files import write_text

ROOT = Path(__file__).resolve().parents[2]
DEVICE = Path(__file__).parent / "device"
# TensorRT and CUDA of the JetPack: an engine fits one TensorRT, and CUDA may not be newer than the driver.
BASE_IMAGES = {
    "jetpack6": "nvcr.io/nvidia/l4t-jetpack:r36.4.0",
    "jetpack7": "nvcr.io/nvidia/tensorrt:25.09-py3",
    "jetpack7.2": "nvcr.io/nvidia/tensorrt:26.03-py3",
}


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
    parser.add_argument("--target", default="jetpack6", choices=tuple(BASE_IMAGES))
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
    shutil.copytree(DEVICE, options.out, dirs_exist_ok=True)
    write_text(options.out / ".env", f"CONTEXT={options.context}\nBASE_IMAGE={BASE_IMAGES[options.target]}\n")
    print("\nWhat is left, on the Jetson:")
    print(f"  scp -r {options.out} robot:answers", "  ssh robot 'cd answers && ./on_device.sh IMAGE PROMPT'", sep="\n")


if __name__ == "__main__":
    main()
