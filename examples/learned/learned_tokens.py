"""What learning which tokens matter brings on a TableTop model, on scenes that nothing was chosen on.

    python examples/learned/learned_tokens.py OUT
    python examples/learned/learned_tokens.py OUT --model tabletop-l --scenes 20 --images 60
    python examples/learned/learned_tokens.py OUT --images 20 30 40 80 160 --budgets 0.112 --seed 6000
    python examples/learned/learned_tokens.py OUT --images 20 30 40 80 160 320 --budgets 0.112 --seed 6000 --forms merged
    python examples/learned/learned_tokens.py OUT --seed 6000 --forms closed --shared
    python examples/learned/learned_tokens.py OUT --time

Plans are learned from scenes of seed 77 and compared by `edgeprune compare` on scenes of another. At each budget: the closed form,
the trained one, the closed form with the options weigh and merge, DivPrune, and the three best variants of methods that learn
nothing, as the held-out images rank them beside the first of these forms. --forms asked: the closed form with what each question
asks for; placed: with positions. --images: a learning curve. --shared: each budget's own
weights and those of all budgets, which are learned for the largest and the least.
--time: how long the selections take at the size of a large model, 73 of 729 tokens of 896 numbers. What OUT already holds is kept.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.cli import main as command
from edgeprune.plan import Cut, KeepPlan

LEARNING_SEED = 77
LOOKS = ("--option", "position=no")  # what each question asks for, and where tokens are, are forms of their own
ALL = ("--option", "question=no", *LOOKS)
MERGED = ("--option", "weigh=yes", "--option", "merge=yes")
FORMS = {"closed": ALL, "trained": ("--train", *ALL), "merged": (*MERGED, *ALL), "asked": LOOKS, "placed": ALL[:2]}
WIDTH, TOKENS, KEPT, RANK, HIDDEN, REPEATS = 896, 729, 73, 64, 16, 120


def main() -> None:
    """Make the plans and compare them, or time the selections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="tabletop", help="tabletop, or tabletop-l after `make instrument`")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.112, 0.05])
    parser.add_argument("--images", type=int, nargs="+", default=[120], help="scenes to learn from; several for a curve")
    parser.add_argument("--scenes", type=int, default=60, help="scenes to measure on")
    parser.add_argument("--seed", type=int, default=2000, help="of the scenes to measure on")
    parser.add_argument("--forms", nargs="+", default=["closed", "trained", "merged"], choices=FORMS)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--time", action="store_true")
    request = parser.parse_args()
    request.out.mkdir(parents=True, exist_ok=True)
    if request.time:
        print_times()
        return
    draw(unseen := request.out / f"unseen-{request.seed}", request.scenes, request.seed)
    for budget in request.budgets:
        plans = [learned(request.model, request.out, budget, images, form) for images in request.images for form in request.forms]
        curve = len(request.images) > 1
        plans += [] if request.shared else others(plans[-len(request.forms)])
        plans += [shared(request.model, request.out, request.budgets, budget, request.images[-1])] if request.shared else []
        given = [word for plan in plans for word in ("--plan", plan)]
        kind = "shared" if request.shared else "curve" if curve else "comparison"
        folder = request.out / f"{kind}-{budget:g}-{request.seed}"
        data = unseen / "dataset.jsonl"
        edgeprune("compare", request.model, "--data", data, "--methods", "divprune", "--keep", budget, *given, "-o", folder)
        print((folder / "table.md").read_text(), flush=True)


def draw(folder: Path, count: int, seed: int) -> None:
    """Draw scenes with questions, unless they are there."""
    if not folder.is_dir():
        edgeprune("tabletop", folder, "--scenes", count, "--seed", seed)


def learned(model: str, out: Path, budget: float, images: int, form: str) -> Path:
    """Learn a plan from some images in one of FORMS, print how long it took, and return its file."""
    draw(data := out / f"scenes-{images}", images, LEARNING_SEED)
    plan = out / f"{form}-{budget:g}-{images}.json"
    if not plan.is_file():
        began = time.perf_counter()
        options = ["--method", "learned", "--budget", budget, "--statistics", out / f"recorded-{images}", "-o", plan, "--json"]
        options += FORMS[form]
        found = json.loads(edgeprune("calibrate", model, "--data", data / "dataset.jsonl", *options))["learning"]
        report(plan).write_text(json.dumps(found, indent=1) + "\n")
        print(f"{plan.name}: {time.perf_counter() - began:.0f} s, {json.dumps(found)}", flush=True)
    return plan


def shared(model: str, out: Path, budgets: Sequence[float], budget: float, images: int) -> Path:
    """Return the file of a plan for one of `budgets`, whose weights, in closed form, were learned for the largest and the least."""
    from edgeprune.calibration.data.samples import read_samples
    from edgeprune.calibration.learn.run import LearnRequest, learn
    from edgeprune.checkpoint.loading import load_model, resolve_model
    from edgeprune.io.progress import SILENT
    from edgeprune.plan import keep_count
    from edgeprune.plan.presets import unpruned_plan

    loaded = load_model(resolve_model(model))
    base = unpruned_plan(loaded.folder.model_type, loaded.decoder_shape().layers, loaded.geometry(None))
    keep, most, least = (keep_count(base.geometry.tokens, share) for share in (budget, max(budgets), min(budgets)))
    plan, whole = (out / f"shared-{count}-of-{most}-to-{least}-{images}.json" for count in (keep, most))
    if not whole.is_file():
        draw(data := out / f"scenes-{images}", images, LEARNING_SEED)
        request = LearnRequest.of(most, least, {"question": False}, seed=0, max_tokens=128, fit="exact", device="cpu")
        samples, kept = read_samples(data / "dataset.jsonl", need_answers=False), out / f"recorded-{images}"
        found = learn(loaded, samples, base, request, whole, SILENT, kept=kept, gate=False)
        base.with_cuts(Cut("input", "learned", most, weights=found.weights)).save(whole)
    if not plan.is_file():
        (cut,) = KeepPlan.load(whole).cuts
        base.with_cuts(replace(cut, keep=keep)).save(plan)
    return plan


def report(plan: Path) -> Path:
    """Return where what `calibrate` said of a plan is kept."""
    return plan.with_suffix(".report.json")


def others(learned_plan: Path) -> list[Path]:
    """Make plans of the best variants of methods that learn nothing, at the same count of tokens; return their files."""
    plan, paths = KeepPlan.load(learned_plan), list[Path]()
    for rival in json.loads(report(learned_plan).read_text())["rivals"]:
        if rival["method"] == "divprune":
            continue  # a row of its own
        assert plan.input is not None
        cut = Cut("input", rival["method"], plan.input.keep, options=rival["options"])
        words = [rival["method"], *(f"{name}-{value}" for name, value in rival["options"].items())]
        paths.append(learned_plan.with_name(f"{'-'.join(words)}-{plan.input.keep}.json"))
        KeepPlan(plan.family, plan.layers, plan.geometry, (cut,)).save(paths[-1])
    return paths


def print_times() -> None:
    """Print how much CPU time each selection takes in ONNX Runtime on one thread, and how many nodes its graph has."""
    merging = {"weigh": True, "merge": True}
    cuts = {name: Cut("input", name, KEPT) for name in ("divprune", "zspaprune")}
    cuts["learned"] = Cut("input", "learned", KEPT, weights=_drawn())
    cuts["learned, with positions"] = Cut("input", "learned", KEPT, weights=_drawn(position=0.1))
    cuts["learned, weigh and merge"] = Cut("input", "learned", KEPT, options=merging, weights=_drawn(merge=True))
    cuts["all of them"] = Cut("input", "learned", KEPT, options=merging, weights=_drawn(merge=True, position=0.1))
    runs = {name: selection(cut) for name, cut in cuts.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):  # in turns, so that all of them meet the same machine
        for name, (_, session, feeds) in runs.items():
            began = time.thread_time()  # not the clock: others may use the CPU
            session.run(None, feeds)
            taken[name].append(1e3 * (time.thread_time() - began))
    medians = {name: float(np.median(each)) for name, each in taken.items()}
    for name, (nodes, *_) in runs.items():
        print(f"{name}: {nodes} nodes, {medians[name]:.2f} ms, {medians[name] / medians['divprune']:.2f} of DivPrune's")


def selection(cut: Cut) -> tuple[int, Any, dict[str, Any]]:
    """Return the number of nodes of a cut's selection, a session that runs it on one thread, and inputs."""
    import tempfile

    import onnx
    import onnxruntime

    from edgeprune.export.tracing import trace_selector
    from edgeprune.families.base import DecoderParts
    from edgeprune.plan import Geometry
    from edgeprune.targets import PLAIN

    class Parts:
        hidden, planes = WIDTH, 0

    side = int(TOKENS**0.5)
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
    return nodes, session, feeds


def _drawn(*, merge: bool = False, position: float = 0.0) -> Any:
    import torch

    from edgeprune.calibration.learn.asking import WORDS
    from edgeprune.calibration.learn.merging import INNER
    from edgeprune.methods.learned import write

    shapes = {"theta": (WIDTH,), "hidden": (WIDTH, HIDDEN), "hidden_bias": (HIDDEN,), "out": (HIDDEN,)}
    shapes |= {"metric": (WIDTH, RANK), "metric_bias": (RANK,), "mean_word": (WIDTH,)}
    shapes |= {"words": (WIDTH, WORDS), "asked": (RANK, WORDS)}
    if merge:
        shapes |= {name: (WIDTH, INNER) for name in ("own", "near", "mattering")}
        shapes |= {"merge_bias": (INNER,), "added": (INNER, WIDTH), "added_bias": (WIDTH,)}
        shapes |= {"attended": (INNER,), "attended_bias": (1,), "power": (1,)}
    tensors = {name: torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / 30 for name, shape in shapes.items()}
    return write(tensors, {"weights_sha256": "", "keeps": [KEPT, KEPT], "question": 1.0, "position": position})


def edgeprune(*words: object) -> str:
    """Run a command; return what it printed on stdout."""
    with redirect_stdout(io.StringIO()) as printed:
        code = command([str(word) for word in words], prog_name="edgeprune", standalone_mode=False)
    if code:
        raise SystemExit(code)
    return printed.getvalue()


if __name__ == "__main__":
    main()
