"""What learning which tokens matter brings on the bundled model, on scenes that nothing was chosen on.

    python examples/learned/learned_tokens.py OUT
    python examples/learned/learned_tokens.py OUT --images 20 40 80 160 --budgets 0.112
    python examples/learned/learned_tokens.py OUT --time

Plans are learned from scenes of seed 77 and compared by `edgeprune compare` on scenes of another. At each budget: the closed form,
the trained one, and the methods that learn nothing, with options that `edgeprune calibrate` chose. --images: a learning curve.
--time: how long the selections take at the size of a large model, 73 of 729 tokens of 896 numbers. What OUT already holds is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

LEARNING_SEED = 77
TUNED = ("cdpruner", "zspaprune")  # whose options calibration chooses
WIDTH, TOKENS, KEPT, RANK, HIDDEN, REPEATS = 896, 729, 73, 64, 16, 40


def main() -> None:
    """Make the plans and compare them, or time the selections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.112, 0.05])
    parser.add_argument("--images", type=int, nargs="+", default=[120], help="scenes to learn from; several for a curve")
    parser.add_argument("--scenes", type=int, default=60, help="scenes to measure on")
    parser.add_argument("--seed", type=int, default=2000, help="of the scenes to measure on")
    parser.add_argument("--time", action="store_true")
    request = parser.parse_args()
    request.out.mkdir(parents=True, exist_ok=True)
    if request.time:
        print_times()
        return
    draw(unseen := request.out / f"unseen-{request.seed}", request.scenes, request.seed)
    for budget in request.budgets:
        curve = len(request.images) > 1
        plans = [plan for images in request.images for plan in learned(request.out, budget, images)]
        plans += [] if curve else [tuned(request.out, budget, method, request.images[0]) for method in TUNED]
        given = [word for plan in plans for word in ("--plan", str(plan))]
        folder = request.out / f"{'curve' if curve else 'comparison'}-{budget:g}-{request.seed}"
        edgeprune(
            "compare",
            "tabletop",
            "--data",
            unseen / "dataset.jsonl",
            "--methods",
            "divprune",
            "--keep",
            budget,
            *given,
            "-o",
            folder,
        )
        print((folder / "table.md").read_text())


def draw(folder: Path, count: int, seed: int) -> None:
    """Draw scenes with questions, unless they are there."""
    if not folder.is_dir():
        edgeprune("tabletop", folder, "--scenes", count, "--seed", seed)


def learned(out: Path, budget: float, images: int) -> list[Path]:
    """Learn plans from some images, by the closed form and trained, and print how long each took; return their files."""
    draw(data := out / f"scenes-{images}", images, LEARNING_SEED)
    plans = []
    for how in ("closed", "trained"):
        plan = out / f"{how}-{budget:g}-{images}.json"
        if not plan.is_file():
            began = time.perf_counter()
            train = ["--train"] if how == "trained" else []
            kept = ["--statistics", out / f"recorded-{images}"]
            options = ["--method", "learned", "--budget", budget, *train, *kept, "-o", plan, "--json"]
            found = json.loads(edgeprune("calibrate", "tabletop", "--data", data / "dataset.jsonl", *options))["learning"]
            rival = found["rivals"][0]
            print(
                f"{plan.name}: {time.perf_counter() - began:.0f} s, {found['divergence']:.3f} nats on held-out images, "
                f"{rival['method']} {rival['divergence']:.3f}, settings {found['settings']}, trained {found['trained']}",
                flush=True,
            )
        plans.append(plan)
    return plans


def tuned(out: Path, budget: float, method: str, images: int) -> Path:
    """Make the plan of a method that learns nothing, with the options that calibration prefers; return its file."""
    plan = out / f"{method}-{budget:g}.json"
    if not plan.is_file():
        data = out / f"scenes-{images}" / "dataset.jsonl"
        edgeprune("calibrate", "tabletop", "--data", data, "--limit", 60, "--method", method, "--budget", budget, "-o", plan)
    return plan


def print_times() -> None:
    """Print how long each selection takes in ONNX Runtime on one thread, and how many nodes its graph has."""
    for name, options in (("divprune", {}), ("cdpruner", {}), ("zspaprune", {}), ("learned", {})):
        nodes, milliseconds = selection_time(name, options)
        print(f"{name}: {nodes} nodes, {milliseconds:.2f} ms")


def selection_time(name: str, options: dict[str, Any]) -> tuple[int, float]:
    """Return the number of nodes of a method's selection, and its median time in ms."""
    import tempfile

    import onnx
    import onnxruntime

    from edgeprune.export.tracing import trace_selector
    from edgeprune.families.base import DecoderParts
    from edgeprune.plan import Cut, Geometry, KeepPlan
    from edgeprune.targets import PLAIN

    class Parts:
        hidden, planes = WIDTH, 0

    side = int(TOKENS**0.5)
    cut = Cut("input", name, KEPT, options=options, weights=_drawn() if name == "learned" else None)
    plan = KeepPlan("llava", 2, Geometry(16 * side, 16 * side, 16, 1), (cut,))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "selector.onnx"
        parts: Any = Parts()
        record: DecoderParts = parts
        trace_selector(record, plan, {}, PLAIN, path)
        threads = onnxruntime.SessionOptions()
        threads.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), threads)
        nodes = len(onnx.load(path, load_external_data=False).graph.node)
    rng, wanted = np.random.default_rng(0), {entry.name for entry in session.get_inputs()}
    given = {"visual_embeds": (1, TOKENS, WIDTH), "prompt_embeds": (1, 20, WIDTH)}
    feeds = {key: rng.normal(size=shape).astype(np.float32) for key, shape in given.items() if key in wanted}
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        session.run(None, feeds)
        taken.append(1e3 * (time.perf_counter() - began))
    return nodes, float(np.median(taken))


def _drawn() -> Any:
    import torch

    from edgeprune.methods.learned import write

    shapes = {"theta": (WIDTH,), "hidden": (WIDTH, HIDDEN), "hidden_bias": (HIDDEN,), "out": (HIDDEN,)}
    shapes |= {"metric": (WIDTH, RANK), "metric_bias": (RANK,)}
    tensors = {name: torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / 30 for name, shape in shapes.items()}
    return write(tensors, {"weights_sha256": "", "keeps": [KEPT, KEPT], "question": 0.0})


def edgeprune(*words: object) -> str:
    """Run a command; return what it printed on stdout."""
    line = [sys.executable, "-m", "edgeprune", *map(str, words)]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
