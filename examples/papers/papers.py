"""Calibrate the methods of three papers on a TableTop model, and compare them with all others on scenes that nothing was tuned on.

    python examples/papers/papers.py OUT --scenes 60
    python examples/papers/papers.py OUT --scenes 60 --pairs
    python examples/papers/papers.py OUT --model tabletop-l --scenes 20 --calibration-scenes 60

Plans come from `edgeprune calibrate` on its own scenes, the rest is `edgeprune compare` on others. What OUT already holds is kept:
an interrupted run goes on. --only NAME ... makes some of the calibrated plans. --pairs asks about two images instead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeprune.calibration.search.candidates import BASELINES
from edgeprune.calibration.search.pareto import Curve, Point
from edgeprune.tabletop.pairs import PAIR_KINDS
from edgeprune.tabletop.questions import DESCRIBE

CALIBRATION_SEED, EVALUATION_SEED = 77, 2000
LEARNED = "--method learned --option question=no --option position=no"
RANKING, LEARNED_RANKING = "--rows peak --reduce max", "--rows learned --reduce max"
SHORT = "all short answers"
# Row: how its plan is calibrated, on all samples or on those with long answers. Methods that learn as they come have a few samples.
ALL, LONG, FEW = "dataset.jsonl", "long.jsonl", "few.jsonl"
EVERY = 8  # of all samples is among the few; of pairs, which take twice as long, half as many
RATE = "--method dyrate --follow --budget 0.62"
PLANS = {
    "plphp-50": f"{LONG} {RANKING} --method plphp --prior --budget 0.5",
    "plphp-40": f"{LONG} {RANKING} --method plphp --prior --budget 0.4 --delta 0.16",
    "plphp-30": f"{LONG} {RANKING} --method plphp --prior --budget 0.3 --delta 0.1",
    "plphp-30-last-row": f"{LONG} --method plphp --budget 0.3 --delta 0.1",
    "plphp-30-live": f"{LONG} {RANKING} --method plphp --prior --budget 0.3 --delta 0.1 --option classes=live",
    **{
        f"plphp-{keep}-learned": f"{LONG} {LEARNED_RANKING} --method plphp --allocate even --budget {keep / 100}"
        for keep in (50, 40, 30, 25)
    },
    "random-cache-30": f"{ALL} --method random --site cache --budget 0.3",
    "uniform-cache-30": f"{ALL} --method uniform --site cache --budget 0.3",
    **{f"dyrate-{form}": f"{LONG} {RATE} --onto plphp-40.json --form {form}" for form in ("predictor", "schedule", "map")},
    "dyrate-learned": f"{LONG} {RATE} --onto plphp-40-learned.json --form predictor",
    **{f"learned-{keep}": f"{ALL} {LEARNED} --train --budget {keep / 100}" for keep in (25, 10)},
    **{f"learned-{keep}-weighed": f"{ALL} {LEARNED} --option weigh=yes --budget {keep / 100}" for keep in (25, 10)},
    "learned-10-merged": f"{ALL} {LEARNED} --option weigh=yes --option merge=yes --budget 0.1",
    **{f"zspaprune-{keep}-searched": f"{ALL} --limit 200 --method zspaprune --budget {keep / 100}" for keep in (25, 10)},
    **{
        f"auto-{share}": f"{ALL} {RANKING} --limit 360 --seed 1 --method auto --max-drop 100% --target-flops {share / 100} "
        f"--curve auto-{share}.curve.json"
        for share in (50, 25, 10)
    },
}
_STATISTICS = {"ranked": RANKING, "learned": LEARNED_RANKING}  # named by how caches are ranked
SINGLES = {f"best-single-{share}": share for share in (50, 25, 10)}  # of those that learn nothing, from the search's curve
AS_IT_COMES = "--option core=0 --option relevance=pooled --option norm=0.5"
WEIGHED = "--budget 0.25 --option weigh=yes"
PAIR_PLANS = {
    **{f"plphp-{keep}": f"{FEW} {RANKING} --method plphp --budget {keep / 100}" for keep in (50, 25)},
    "zspaprune-25-weighed": f"{ALL} --method zspaprune {AS_IT_COMES} {WEIGHED}",
    "learned-25-weighed": f"{ALL} {LEARNED} {WEIGHED}",
}
# As they come. PLPHP, whose rows above are calibrated, is not among them.
METHODS = "cdpruner,dart,divprune,evit,fastv,fitprune,pyramiddrop,sparsevlm,visionzip,vtw,zspaprune,random,uniform"
PAIR_METHODS = "cdpruner,divprune,fastv,pyramiddrop,sparsevlm,zspaprune,random,uniform"


def main() -> None:
    """Make the plans, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="tabletop", help="tabletop, or tabletop-l after `make instrument`")
    parser.add_argument("--scenes", type=int, default=60, help="scenes to measure on")
    parser.add_argument("--calibration-scenes", type=int, default=120)
    parser.add_argument("--only", nargs="*", help="calibrated plans to compare; without a name, none")
    parser.add_argument("--pairs", action="store_true", help="ask about two images")
    request = parser.parse_args()
    out, plans = (request.out / "pairs", PAIR_PLANS) if request.pairs else (request.out, PLANS)
    out.mkdir(parents=True, exist_ok=True)
    images = 2 if request.pairs else 1
    _draw(out / "calibration", request.calibration_scenes, CALIBRATION_SEED, images)
    _draw(out / "evaluation", request.scenes, EVALUATION_SEED, images)
    rows = [*plans, *(() if request.pairs else SINGLES)] if request.only is None else request.only
    made = []
    for number, row in enumerate(rows, start=1):
        print(f"[{number}/{len(rows)}] {row}", flush=True)
        made += ["--plan", str(_plan(request.model, out, row, plans))]
    compared = METHODS + (",resize" if request.model == "tabletop" else "")  # TableTop-L has 144 tokens at every size
    methods = ["--methods", PAIR_METHODS if request.pairs else compared, "--keep", "0.5,0.25" if request.pairs else "0.5,0.25,0.1"]
    samples = ["--data", str(out / "evaluation" / ALL), "--calibrate-on", str(out / "calibration" / FEW)]
    _edgeprune("compare", request.model, *methods, *samples, *made, "-o", str(out / "comparison"))
    if request.pairs:
        (out / "kinds.md").write_text(_kinds_table(json.loads((out / "comparison" / "results.json").read_text())))


def _draw(folder: Path, scenes: int, seed: int, images: int) -> None:
    if not folder.exists():
        _edgeprune("tabletop", str(folder), "--scenes", str(scenes), "--seed", str(seed), "--images", str(images))
    lines = (folder / ALL).read_text().splitlines()
    (folder / LONG).write_text("\n".join(line for line in lines if json.loads(line)["kind"] == DESCRIBE) + "\n")
    (folder / FEW).write_text("\n".join(lines[:: EVERY * images]) + "\n")


def _plan(model: str, out: Path, row: str, plans: dict[str, str]) -> Path:
    path = out / f"{row}.json"
    if path.is_file():
        return path
    if row in SINGLES:
        curve = Curve.load(out / f"auto-{SINGLES[row]}.curve.json")
        _best_single(curve, SINGLES[row] / 100).plan.save(path)
        return path
    data, *options = plans[row].split()
    options = [str(out / option) if option.endswith(".json") else option for option in options]
    # Rows of the same samples and ranking share statistics; a search collects them from every second sample.
    # What the learned selection records is a folder of its own.
    pass_of = next((name for name in ("auto", "learned") if row.startswith(name)), Path(data).stem)
    ranked = next((name for name, how in _STATISTICS.items() if how in plans[row]), "last")
    statistics = ["--statistics", str(out / f"{pass_of}-{ranked}.safetensors")]
    _edgeprune("calibrate", model, "--data", str(out / "calibration" / data), *options, *statistics, "-o", str(path))
    return path


def _best_single(curve: Curve, share: float) -> Point:
    others = (*BASELINES, "learned", "composed")
    singles = [point for point in curve.points if point.group not in others and point.flops <= share + 0.005]
    return max(singles, key=lambda point: (point.score, -point.flops))


def _kinds_table(results: dict[str, Any]) -> str:
    kinds = [*(kind for kind in PAIR_KINDS if kind != DESCRIBE), SHORT, DESCRIBE]
    lines = ["| plan | " + " | ".join([*kinds, "agreement"]) + " |", "|---" * (len(kinds) + 2) + "|"]
    for row in results["rows"]:
        if row["plan"] is not None:
            variant = "unpruned" if row["name"] == "none" else "pruned"
            found = row["report"]["kinds"]
            shares = [*(found[kind][variant] for kind in kinds), found[SHORT].get("agreement")]
            lines.append(f"| {row['name']} | " + " | ".join("-" if share is None else f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines) + "\n"


def _edgeprune(*arguments: str) -> None:
    subprocess.run([sys.executable, "-c", "from edgeprune.cli import main; main()", *arguments], check=True)


if __name__ == "__main__":
    main()
