"""Calibrate the methods of three papers on the bundled model, and measure them on scenes that nothing was tuned on.

    python examples/papers/papers.py OUT --scenes 60
    python examples/papers/papers.py OUT --scenes 60 --pairs

Plans come from `edgeprune calibrate` on its own scenes; every plan is exported and measured by `edgeprune eval` on others. Rows
that OUT already holds are kept, so an interrupted run goes on; --only NAME ... makes some rows. Writes OUT/table.md. --pairs asks
about two images instead, with every method that ranks tokens by the question, and writes OUT/pairs/table.md.
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
RANKING = "--rows peak --reduce max"
SHORT = "all short answers"
# Row: how its plan is calibrated, on all samples or on those with long answers.
ALL, LONG = "dataset.jsonl", "long.jsonl"
RATE = f"{LONG} {RANKING} --prior --onto plphp-40.json --method dyrate --follow --budget 0.62"
PLANS = {
    "plphp-50": f"{LONG} {RANKING} --method plphp --prior --budget 0.5",
    "plphp-40": f"{LONG} {RANKING} --method plphp --prior --budget 0.4 --delta 0.16",
    "plphp-30": f"{LONG} {RANKING} --method plphp --prior --budget 0.3 --delta 0.1",
    "plphp-30-last-row": f"{LONG} --method plphp --budget 0.3 --delta 0.1",
    "random-cache-30": f"{ALL} --method random --site cache --budget 0.3",
    "uniform-cache-30": f"{ALL} --method uniform --site cache --budget 0.3",
    **{f"zspaprune-{keep}": f"{ALL} --method zspaprune --core 0.15 --budget {keep / 100}" for keep in (25, 10)},
    **{f"{method}-{keep}": f"{ALL} --method {method} --budget {keep / 100}" for method in BASELINES for keep in (50, 25, 10)},
    **{f"dyrate-{form}": f"{RATE} --form {form}" for form in ("predictor", "schedule", "map")},
    **{
        f"auto-{share}": f"{ALL} {RANKING} --limit 360 --seed 1 --method auto --max-drop 100% --target-flops {share / 100} "
        f"--curve auto-{share}.curve.json"
        for share in (50, 25, 10)
    },
}
# About two images: what ranks tokens by the question, as it comes, and baselines. In the decoder the share is that of the last
# layers, for PLPHP that of the cache.
WHOLE = {50: "--keep 0.5", 25: "--keep 0.25"}
LAYER = {keep: f"{cut} --layer 2" for keep, cut in WHOLE.items()}
STAGES = {50: "--keep 0.75 --layer 2 --keep 0.5 --layer 4", 25: "--keep 0.5 --layer 2 --keep 0.25 --layer 4"}
CUTS = {"cdpruner": WHOLE, "zspaprune": WHOLE, "fastv": LAYER, "fitprune": STAGES, "pyramiddrop": STAGES, "sparsevlm": STAGES}
CUTS |= {"random": WHOLE, "uniform": WHOLE}
EXPORTED = {f"{method}-{keep}": f"--method {method} {cut}" for method, cuts in CUTS.items() for keep, cut in cuts.items()}
PAIR_PLANS = {f"plphp-{keep}": f"{ALL} {RANKING} --method plphp --budget {keep / 100}" for keep in (50, 25)}
SINGLES = {f"best-single-{share}": share for share in (50, 25, 10)}  # from the search's curve


def main() -> None:
    """Make the rows that are asked for, and the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=60, help="scenes to measure on")
    parser.add_argument("--calibration-scenes", type=int, default=120)
    parser.add_argument("--only", nargs="+", help="rows to make")
    parser.add_argument("--pairs", action="store_true", help="ask about two images")
    request = parser.parse_args()
    out, plans = (request.out / "pairs", PAIR_PLANS) if request.pairs else (request.out, PLANS)
    out.mkdir(parents=True, exist_ok=True)
    images = 2 if request.pairs else 1
    _draw(out / "calibration", request.calibration_scenes, CALIBRATION_SEED, images)
    _draw(out / "evaluation", request.scenes, EVALUATION_SEED, images)
    rows = ["none", *plans, *(EXPORTED if request.pairs else SINGLES)]
    chosen = request.only or rows
    for number, row in enumerate(chosen, start=1):
        if not (out / f"{row}.result.json").is_file():
            print(f"[{number}/{len(chosen)}] {row}", flush=True)
            options = EXPORTED[row].split() if request.pairs and row in EXPORTED else _plan_options(out, row, plans)
            _measure(out, row, options)
    (out / "table.md").write_text(_kinds_table(out, rows) if request.pairs else _cost_table(out, rows))


def _draw(folder: Path, scenes: int, seed: int, images: int) -> None:
    if not folder.exists():
        _edgeprune("tabletop", str(folder), "--scenes", str(scenes), "--seed", str(seed), "--images", str(images))
    lines = (folder / ALL).read_text().splitlines()
    (folder / LONG).write_text("\n".join(line for line in lines if json.loads(line)["kind"] == DESCRIBE) + "\n")


def _plan_options(out: Path, row: str, plans: dict[str, str]) -> list[str]:
    return [] if row == "none" else ["--plan", str(_plan(out, row, plans))]


def _measure(out: Path, row: str, options: list[str]) -> None:
    _edgeprune("export", "tabletop", "-o", str(out / row), "--force", *options)
    result = _edgeprune("eval", str(out / row), "--data", str(out / "evaluation" / ALL), "--json")
    (out / f"{row}.result.json").write_text(result)


def _plan(out: Path, row: str, plans: dict[str, str]) -> Path:
    path = out / f"{row}.json"
    if path.is_file():
        return path
    if row in SINGLES:
        curve = Curve.load(out / f"auto-{SINGLES[row]}.curve.json")
        _best_single(curve, SINGLES[row] / 100).plan.save(path)
        return path
    data, *options = plans[row].split()
    options = [str(out / option) if option.endswith(".json") else option for option in options]
    statistics = ["--statistics", str(out / f"{row.split('-')[0]}-{'last' if 'last' in row else 'ranked'}.safetensors")]
    _edgeprune("calibrate", "tabletop", "--data", str(out / "calibration" / data), *options, *statistics, "-o", str(path))
    return path


def _best_single(curve: Curve, share: float) -> Point:
    singles = [point for point in curve.points if point.group not in (*BASELINES, "composed") and point.flops <= share + 0.005]
    return max(singles, key=lambda point: (point.score, -point.flops))


def _kinds_table(out: Path, rows: list[str]) -> str:
    kinds = [*(kind for kind in PAIR_KINDS if kind != DESCRIBE), SHORT, DESCRIBE, "agreement", "visual KV held"]
    lines = ["| plan | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for row in rows:
        path = out / f"{row}.result.json"
        if path.is_file():
            result = json.loads(path.read_text())
            variant = "unpruned" if row == "none" else "pruned"
            shares = {kind: entry[variant] for kind, entry in result["kinds"].items()}
            shares |= {"agreement": result["kinds"][SHORT].get("agreement"), "visual KV held": result["cost"][variant]["visual_kv"]}
            lines.append(_cells(row, [shares[kind] for kind in kinds]))
    return "\n".join(lines) + "\n"


def _cost_table(out: Path, rows: list[str]) -> str:
    lines = ["| plan | short answers | facts described | agreement | visual tokens' prefill work | visual KV held | read |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        path = out / f"{row}.result.json"
        if path.is_file():
            lines.append(_line(row, json.loads(path.read_text()), _prefill(out / row)))
    return "\n".join(lines) + "\n"


def _line(row: str, result: dict[str, Any], prefill: float) -> str:
    kinds, variant = result["kinds"], "pruned" if "pruned" in result["cost"] else "unpruned"
    short, facts = kinds[SHORT], kinds[DESCRIBE]
    agreement, reads = short.get("agreement"), facts.get("visual_reads", 1.0)
    kept = prefill if row.startswith(("resize", "best-single")) and variant == "unpruned" else result["cost"][variant]["visual_kv"]
    # A smaller image is a bundle without cuts: its answers have none beside them to agree with.
    return _cells(row, [short[variant], facts[variant], agreement, prefill, kept, reads if variant == "pruned" else kept])


def _cells(row: str, shares: list[float | None]) -> str:
    return f"| {row} | " + " | ".join("-" if share is None else f"{share:.1%}" for share in shares) + " |"


def _prefill(bundle: Path) -> float:
    # Against the whole image, which a smaller one has less of: mean of the living tokens over the layers.
    from edgeprune.bundle import Bundle

    plan = Bundle.load(bundle).plan
    return sum(map(plan.tokens_at_layer, range(plan.layers))) / plan.layers / 144


def _edgeprune(*arguments: str) -> str:
    command = [sys.executable, "-c", "from edgeprune.cli import main; main()", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
