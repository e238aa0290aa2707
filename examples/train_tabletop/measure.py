"""Measure a trained TableTop model through an exported bundle, seeing and blind, and write its card.

    python examples/train_tabletop/measure.py MODEL_FOLDER --log WORK/log.jsonl

Scenes come from the seeds of `edgeprune tabletop`, which training never draws from. Blind means that every image is replaced by
grey; "most common answer" is what always giving the most frequent answer of a kind would score. The card is README.md in the
model folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter as Tally
from dataclasses import replace
from pathlib import Path

from PIL import Image
from rich.console import Console

import edgeprune.runtime
from edgeprune.calibration.data.samples import Sample, read_samples
from edgeprune.calibration.evaluation import ALL, UNPRUNED, EvalReport, evaluate
from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.cli.output.progress import CommandProgress
from edgeprune.export.exporter import export_bundle
from edgeprune.plan.presets import unpruned_plan
from edgeprune.tabletop.dataset import write_dataset
from edgeprune.tabletop.questions import DESCRIBE
from edgeprune.tabletop.world import SIDE

CARD = """# TableTop, a small model that sees

A Qwen2-VL of {parameters:.1f} M parameters: {layers} decoder layers of hidden size {hidden}, {heads} query heads on
{kv_heads} KV heads, a vision tower of {depth} layers, 144 visual tokens for a {side} x {side} image.
It was trained from random weights on drawn robot-table scenes by `examples/train_tabletop/train.py`. It is EdgePrune's
accuracy instrument: its attention is learned, small items cover one to four visual tokens, and without its eyes it knows
nothing. It answers the questions of `edgeprune tabletop` and nothing else.

## Accuracy

Measured by `examples/train_tabletop/measure.py` through an unpruned ONNX bundle, greedily: {scenes} scenes of seed {seed}, which
training never drew from, one question of each kind a scene ({blind} scenes of them blind). Short answers count when they match
exactly; for descriptions each stated fact counts (item and place, or label and place).

| kind | asked | right | blind | most common answer |
|---|---|---|---|---|
{rows}

## Training

{minutes:.0f} minutes on 2 CPU cores, {steps} steps of 8 images with about 16 questions each. Accuracy over short answers and
descriptions together, on 64 scenes of another stream, as the run went ([the whole log](training_log.jsonl)):

| step | minute | right |
|---|---|---|
{progress}
"""


def measure(model: edgeprune.runtime.Runtime, samples: list[Sample], what: str) -> EvalReport:
    """Evaluate, and show how far it is."""
    with CommandProgress() as progress:
        return evaluate(model, samples, progress=progress.count(f"{what}, samples", len(samples)))


def accuracy_rows(seeing: EvalReport, blind: EvalReport, samples: list[Sample]) -> str:
    """Return one table line a kind."""
    lines = []
    for kind, entry in seeing.rows().items():
        answers = Tally(sample.answer for sample in samples if sample.kind == kind)
        prior = f"{answers.most_common(1)[0][1] / answers.total():.1%}" if answers and kind != DESCRIBE else ""
        scores = f"{entry.accuracy(UNPRUNED):.1%} | {blind.rows()[kind].accuracy(UNPRUNED):.1%}"
        name = f"**{ALL}**" if kind == ALL else kind
        lines.append(f"| {name} | {entry.total} | {scores} | {prior} |")
    return "\n".join(lines)


def progress_rows(log: list[dict[str, float]]) -> tuple[str, float, int]:
    """Return the table of evaluations, the minutes and the steps of the whole run."""
    lines, minute = [], 0.0
    for entry in log:
        minute = entry.get("minutes", minute)
        if "all" in entry:
            lines.append(f"| {entry['step']} | {minute:.0f} | {entry['all']:.1%} |")
    return "\n".join(lines), minute, int(log[-1]["step"])


def main() -> None:
    """Parse the command line, measure, write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--log", type=Path, required=True, help="log.jsonl of the training run")
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--blind", type=int, default=400, help="scenes asked with the image replaced by grey")
    parser.add_argument("--seed", type=int, default=2026)
    options = parser.parse_args()
    loaded = load_model(resolve_model(str(options.model)))
    config = loaded.model.config
    with tempfile.TemporaryDirectory() as folder:
        data, grey = Path(folder) / "data", Path(folder) / "grey.png"
        write_dataset(data, options.scenes, options.seed)
        Image.new("RGB", (SIDE, SIDE), (128, 128, 128)).save(grey)
        samples = read_samples(data / "dataset.jsonl")
        unseen = {f"{index:06}.png" for index in range(options.blind)}
        plan = unpruned_plan(loaded.folder.model_type, config.text_config.num_hidden_layers, loaded.geometry(None))
        model = edgeprune.runtime.load(export_bundle(loaded, plan, Path(folder) / "bundle").path)
        seeing = measure(model, samples, "seeing")
        blind = measure(model, [replace(s, image=grey) for s in samples if s.images[0].name in unseen], "blind")
    log = [json.loads(line) for line in options.log.read_text().splitlines()]
    progress, minutes, steps = progress_rows(log)
    card = CARD.format(
        parameters=sum(p.numel() for p in loaded.model.parameters()) / 1e6,
        layers=config.text_config.num_hidden_layers,
        hidden=config.text_config.hidden_size,
        heads=config.text_config.num_attention_heads,
        kv_heads=config.text_config.num_key_value_heads,
        depth=config.vision_config.depth,
        side=SIDE,
        scenes=options.scenes,
        seed=options.seed,
        blind=options.blind,
        rows=accuracy_rows(seeing, blind, samples),
        minutes=minutes,
        steps=steps,
        progress=progress,
    )
    (options.model / "README.md").write_text(card)
    shutil.copy(options.log, options.model / "training_log.jsonl")
    Console().print(card)


if __name__ == "__main__":
    main()
