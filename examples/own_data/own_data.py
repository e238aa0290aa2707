"""From a folder of images to a bundle with tiers that were calibrated on them, and what each tier costs and loses.

python examples/own_data/own_data.py OUT
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from edgeprune.cli import main as edgeprune
from edgeprune.io.files import write_text
from edgeprune.tabletop.dataset import scenes
from edgeprune.tabletop.drawing import draw_scene

TIERS = {"quality": 0.85, "balanced": 0.65, "fast": 0.5}  # share of the visual work that stays, the best first
METHOD = ("--method", "fitprune", "--stages", 2)


def write_samples(path: Path, samples: Iterable[dict[str, str]]) -> None:
    """Write one JSON object a line: `image` (a path relative to the file), `prompt`, and for `eval` the `answer`."""
    write_text(path, "".join(json.dumps(sample) + "\n" for sample in samples))


def stand_in(folder: Path, seed: int, count: int) -> list[dict[str, str]]:
    """Draw TableTop scenes into a folder, as your robot's camera would fill it, and return what is asked about each."""
    folder.mkdir(parents=True)
    samples = []
    for number, (scene, questions) in enumerate(scenes(seed, count)):
        name = f"{number:03}.png"
        draw_scene(scene).save(folder / name)
        image = f"{folder.name}/{name}"
        samples += [{"image": image, "prompt": q.prompt, "answer": q.answer, "kind": q.kind} for q in questions]
    return samples


def calibrate(out: Path, model: str, shown: list[str]) -> list[str]:
    """Make a plan for each tier; the first pass over the samples serves them all. Return the options that export takes."""
    given = ("--data", out / "calibration.jsonl", "--statistics", out / "statistics.safetensors", *shown)
    for name, budget in TIERS.items():
        command("calibrate", model, *METHOD, "--budget", budget, *given, "-o", out / f"{name}.json")
    return [word for name in TIERS for word in ("--tier", f"{name}={out / name}.json")]


def command(*words: object) -> str:
    """Run `edgeprune`, show the command, and return what it printed."""
    line = [str(word) for word in words]
    print(f"$ edgeprune {shlex.join(line)}", flush=True)
    with redirect_stdout(io.StringIO()) as printed:
        code = edgeprune(line, prog_name="edgeprune", standalone_mode=False)
    if code:
        raise SystemExit(code)
    return printed.getvalue()


def rows(bundle: Path, data: Path, shown: list[str]) -> list[str]:
    """Return the table's rows: every tier, and after them no pruning."""
    lines, report = list[str](), dict[str, Any]()
    for name in TIERS:
        report = json.loads(command("eval", bundle, "--data", data, "--tier", name, *shown, "--json"))
        lines.append(_row(name, report, "pruned"))
    return [*lines, _row("no pruning", report, "unpruned")]


def _row(name: str, report: dict[str, Any], side: str) -> str:
    kinds, cost = report["kinds"], report["cost"][side]
    short, facts = (f"{kinds[kind][side]:.0%}" if kind in kinds else "-" for kind in ("all short answers", "describe"))
    ratio = cost["ttft_ms"] / report["cost"]["unpruned"]["ttft_ms"]
    return f"| {name} | {short} | {facts} | {ratio:.2f}x | {cost['kv_bytes'] / 1024:.0f} KiB |"


def main() -> None:
    """Parse the command line; write samples, calibrate, export, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    parser.add_argument("--scenes", type=int, default=6, help="to calibrate on, and as many others to evaluate on")
    parser.add_argument("--limit", help="only so many samples of each file")
    parser.add_argument("--model", default="tabletop", help="a transformers folder")
    parser.add_argument("--image-size", help="for a model that takes images of any size, such as 448x448")
    parser.add_argument("--fit", choices=("exact", "stretch", "pad"), help="for images of another aspect")
    options = parser.parse_args()
    out: Path = options.out
    shown = [*(["--limit", options.limit] if options.limit else []), *(["--fit", options.fit] if options.fit else [])]
    size = ["--image-size", options.image_size] if options.image_size else []
    asked = stand_in(out / "images", 7, options.scenes)
    questions = [{key: sample[key] for key in ("image", "prompt")} for sample in asked]  # answers are not needed
    write_samples(out / "calibration.jsonl", questions)
    write_samples(out / "test.jsonl", stand_in(out / "test", 8, options.scenes))
    bundle = out / "own.bundle"
    command("export", options.model, "-o", bundle, *calibrate(out, options.model, shown + size))
    table = rows(bundle, out / "test.jsonl", shown)
    print("\n| tier | short answers | facts described | TTFT | KV caches |", "|---|---|---|---|---|", *table, sep="\n")


if __name__ == "__main__":
    main()
