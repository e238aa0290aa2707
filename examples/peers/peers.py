"""Ask the same question of EdgePrune and of its peers, on this machine, in one run.

    python examples/peers/peers.py OUT --shape qwen2-vl-0.5b --peers transformers,openvino --keep 1.0,0.5,0.25,0.1 --precision int8

Everything is prepared in OUT first, and kept there. Then the contenders take turns, each in a process of its own. Writes
OUT/table.md and OUT/results.json. With `--rounds 0` it only prepares.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from contenders import PEERS, Contender, edgeprune, others
from preparing import PreparationError, Workplace, last_words, prepare
from reporting import Row, table
from shapes import SHAPES
from shapes.checkpoint import write_images

from edgeprune.device.machine import read_machine
from edgeprune.targets import PRECISIONS, TARGETS

HERE = Path(__file__).parent
PROMPT = "What is on the table?"
TEXT = 14  # tokens of it and of the chat around it
LONGEST = 1200  # seconds that a contender may take for one round


def main() -> None:
    """Prepare, take turns, write the table."""
    request = _parser().parse_args()
    place = Workplace(request.out.resolve(), request.shape, SHAPES[request.shape])
    peers = [peer for peer in request.peers.split(",") if peer]
    keeps = [float(keep) for keep in request.keep.split(",")]
    precision, block = request.edgeprune_precision or request.precision, max(place.shape.blocks // 4, 1)
    ours = edgeprune(request.target, precision, keeps, request.method, block)
    rows = [Row(contender) for contender in (*ours, *others(peers, request.precision, keeps))]
    print("preparing", flush=True)
    for row in rows:
        try:
            row.folder = prepare(place, row.contender)
        except PreparationError as error:
            row.reason = str(error)
    images = write_images(place.shape, place.folder / "images", request.rounds + 1)
    for number in range(request.rounds):
        print(f"round {number + 1} of {request.rounds}", flush=True)
        for row in rows[:: -1 if number % 2 else 1]:
            if row.folder is not None and not row.reason:
                _ask(place, row, [images[0], images[number + 1]], request)
        _write(request, place, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-vl-0.5b")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"Of {', '.join(PEERS)}.  [default: all]")
    parser.add_argument("--keep", default="1.0,0.5,0.25,0.1", help="Shares of the visual tokens; 1.0 prunes nothing.")
    parser.add_argument("--precision", choices=("fp32", "int8", "int4"), default="int8")
    parser.add_argument("--edgeprune-precision", choices=PRECISIONS, help="Where EdgePrune's goes by another name.")
    parser.add_argument("--method", default="cdpruner", help="EdgePrune's cut before the decoder.")
    parser.add_argument("--target", choices=TARGETS, default="cpu", help="EdgePrune's target.")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def _ask(place: Workplace, row: Row, images: list[Path], request: argparse.Namespace) -> None:
    contender: Contender = row.contender
    options = dict(contender.options)
    if contender.peer == "onnxruntime-genai":
        options["tokens"] = str(place.shape.entering + TEXT)
    command: list[object] = [place.python(contender.environment), HERE / contender.script, row.folder, *images, "--prompt", PROMPT]
    command += ["--tokens", request.tokens, "--threads", request.threads, "--keep", contender.keep]
    for name, value in options.items():
        command += ["--option", f"{name}={value}"]
    # Compiled kernels are kept between rounds; what the first round compiles, its warm-up pays.
    environment = os.environ | {"OMP_NUM_THREADS": str(request.threads), "TORCHINDUCTOR_CACHE_DIR": str(place.folder / "inductor")}
    try:
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        row.reason = f"no answer within {LONGEST} s"
        return
    if done.returncode:
        row.reason = last_words(done.stderr) or f"ended with {done.returncode}"
        return
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    row.reports.append(report)
    ttft = report["costs"][0]["ttft_ms"]
    print(f"  {contender.name}: " + ("no images" if ttft is None else f"{ttft:.0f} ms to the first token"), flush=True)


def _write(request: argparse.Namespace, place: Workplace, rows: list[Row]) -> None:
    asked = {name: str(value) for name, value in vars(request).items() if name != "out"}
    results = {"asked": asked, "machine": read_machine().to_dict(), "rows": [row.to_dict() for row in rows]}
    (place.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (place.out / "table.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
