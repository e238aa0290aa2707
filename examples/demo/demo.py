"""Export the bundled model with a pruning plan, ask it about fresh scenes with and without pruning, and draw what was kept.

python examples/demo/demo.py demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import edgeprune.runtime
from edgeprune.calibration.data.samples import Sample, score
from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.cli.output.progress import CommandProgress
from edgeprune.export.exporter import STAGES, export_bundle
from edgeprune.plan import Cut
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import Answer
from edgeprune.tabletop.drawing import draw_scene
from edgeprune.tabletop.questions import ask_one
from edgeprune.tabletop.world import sample_scene

KINDS = ("colour", "where", "label", "nearest", "describe")


def make_bundle(folder: Path) -> Path:
    """Export `tabletop` with the quarter of the visual tokens that ZSPAPrune keeps: a core near the question, then what differs."""
    with CommandProgress(["model", *STAGES]) as progress:
        progress.begin("model")
        loaded = load_model(resolve_model("tabletop"))
        base = unpruned_plan(loaded.folder.model_type, len(loaded.family.decoder().layers), loaded.geometry(None))
        plan = base.with_cuts(Cut("input", "zspaprune", base.geometry.tokens // 4, options={"core": 0.15}))
        return export_bundle(loaded, plan, folder / "tabletop.bundle", force=True, progress=progress).path


def ask(bundle: Path, folder: Path, seed: int) -> Table:
    """Ask one question of each kind with and without pruning; write the scene of each with its kept tokens."""
    model = edgeprune.runtime.load(bundle)
    rng = np.random.default_rng([11, seed])
    table = Table("question", "truth", "all 144 tokens", "pruned", "tokens kept", "first token ms", "ms a token")
    for prune in (False, True):  # warm up
        model.generate(draw_scene(sample_scene(rng)), "Describe the scene.", prune=prune)
    for kind in KINDS:
        question = None
        while question is None:
            scene = sample_scene(rng)
            question = ask_one(scene, rng, kind)
        image = draw_scene(scene)
        whole, pruned = (model.generate(image, question.prompt, prune=prune) for prune in (False, True))
        sheet = model.draw(image, pruned.receipt, question=question.prompt, answer=pruned.text)
        sheet.save(folder / f"kept-{kind}.png")
        times = [f"{a:.1f} -> {b:.1f}" for a, b in _times(whole, pruned)]
        kept = " -> ".join(str(n) for n in (144, *(cut.after for cut in pruned.receipt.cuts)))
        marks = [_mark(answer, Sample(Path(), question.prompt, question.answer, kind)) for answer in (whole, pruned)]
        table.add_row(question.prompt, question.answer, *marks, kept, *times)
    return table


def _mark(answer: Answer, sample: Sample) -> str:
    points = score(sample, answer.text)
    return f"{answer.text} {'[green]✓' if points.correct == points.total else '[red]✗'}"


def _times(whole: Answer, pruned: Answer) -> list[tuple[float, float]]:
    a, b = whole.receipt.times, pruned.receipt.times
    return [(a.ttft_ms, b.ttft_ms), (a.ms_per_token, b.ms_per_token)]


def main() -> None:
    """Parse the command line, export, ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the bundle and the pictures go")
    parser.add_argument("--seed", type=int, default=0, help="which scenes are drawn")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    bundle = make_bundle(options.folder)
    console = Console(width=160)
    console.print(ask(bundle, options.folder, options.seed))
    console.print(f"Dropped patches are greyed out in {options.folder}/kept-*.png")
    console.print(f'Next: edgeprune run {bundle} --image IMAGE --prompt "Where is the red cube?"', highlight=False)


if __name__ == "__main__":
    main()
