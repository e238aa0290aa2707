"""Measure a trained TableTop model through an exported bundle, seeing and blind, and write its card.

    python examples/train_tabletop/measure.py MODEL_FOLDER --log WORK/log.jsonl
    python examples/train_tabletop/measure.py tabletop-l --tables examples/train_tabletop/tabletop-l/README.md --log WORK/log.jsonl

Scenes come from the seeds of `edgeprune tabletop`, which training never draws from. Blind means that every image is replaced by
grey; "most common answer" is what always giving the most frequent answer of a kind would score. The card is README.md in the
model folder. --tables leaves the words of an existing card as they are, and puts new tables between its marks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter as Tally
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from edgeprune.tabletop.questions import DESCRIBE, KINDS
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
exactly; descriptions count by the F1 of their facts (item and place, or label and place).

{one}

And {pairs} pairs of scenes of that seed ({blind_pairs} of them blind), both images in one question: one about one of the pictures
(`picture`), which picture has an object, what changed from the first to the second, which has more of a colour or shape, how many
there are together, and a description of one of the two.

{two}

## Training

{runs}. Accuracy over short answers and descriptions together, on at least 64 scenes of another stream, as the runs went
([the whole log](training_log.jsonl)):

{progress}
"""


def exported(model: Path, work: Path) -> edgeprune.runtime.Runtime:
    """Return a model folder's unpruned bundle, loaded; `work`: where to put it."""
    loaded = load_model(resolve_model(str(model)))
    geometry, layers = loaded.geometry(None), loaded.model.config.text_config.num_hidden_layers
    bundle = export_bundle(loaded, unpruned_plan(loaded.folder.model_type, layers, geometry), work / "bundle")
    return edgeprune.runtime.load(bundle.path)


def short_answers(model: edgeprune.runtime.Runtime, work: Path, scenes: int, seed: int) -> float:
    """Return the share of right short answers about one image."""
    write_dataset(work / "short", scenes, seed, kinds=[kind for kind in KINDS if kind != DESCRIBE])
    report = measure(model, read_samples(work / "short" / "dataset.jsonl"), "answers")
    return report.rows()[ALL].accuracy(UNPRUNED)


def with_tables(card: str, tables: dict[str, str]) -> str:
    """Return a card with new tables between its marks, such as <!-- one --> and <!-- end of one -->."""
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        first, found, rest = card.partition(begin)
        _, closed, last = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"The card has no place for the table {name!r}.")
        card = f"{first}{begin}\n{table}\n{end}{last}"
    return card


def measure(model: edgeprune.runtime.Runtime, samples: list[Sample], what: str) -> EvalReport:
    """Evaluate, and show how far it is."""
    with CommandProgress() as progress:
        return evaluate(model, samples, progress=progress.count(f"{what}, samples", len(samples)))


def accuracy_table(seeing: EvalReport, blind: EvalReport, samples: list[Sample]) -> str:
    """Return a table with a line a kind."""
    unseen = blind.rows()
    lines = ["| kind | asked | right | blind | most common answer |", "|---|---|---|---|---|"]
    for kind, entry in seeing.rows().items():
        answers = Tally(sample.answer for sample in samples if sample.kind == kind)
        prior = f"{answers.most_common(1)[0][1] / answers.total():.1%}" if answers and kind != DESCRIBE else ""
        scores = f"{entry.accuracy(UNPRUNED):.1%} | " + (f"{unseen[kind].accuracy(UNPRUNED):.1%}" if kind in unseen else "-")
        name = f"**{ALL}**" if kind == ALL else kind
        lines.append(f"| {name} | {entry.total} | {scores} | {prior} |")
    return "\n".join(lines)


def progress_table(logs: list[list[dict[str, Any]]]) -> tuple[str, str]:
    """Return the table of evaluations of the runs, one after the other, and what the runs took, in words."""
    lines, runs = ["| run | step | minute | right |", "|---|---|---|---|"], []
    for run, log in enumerate(logs, start=1):
        minute = 0.0
        for entry in log:
            minute = entry.get("minutes", minute)
            if "all" in entry:
                lines.append(f"| {entry.get('run', run)} | {entry['step']} | {minute:.0f} | {entry['all']:.1%} |")
        runs.append(f"{minute:.0f} minutes on 2 CPU cores, {log[-1]['step']} steps")
    return "\n".join(lines), "; then ".join(runs)


@dataclass(frozen=True)
class Accuracy:
    """Measures a model on scenes of a seed. `folder`: for scenes and images, emptied by the caller."""

    model: edgeprune.runtime.Runtime
    folder: Path
    seed: int

    def table(self, scenes: int, blind: int, images: int) -> str:
        """Return a line a kind of question about one image or two; the first `blind` scenes are also asked with grey images."""
        data, grey = self.folder / f"data-{images}", self.folder / "grey.png"
        write_dataset(data, scenes, self.seed, images=images)
        Image.new("RGB", (SIDE, SIDE), (128, 128, 128)).save(grey)
        samples = read_samples(data / "dataset.jsonl")
        unseen = [replace(sample, image=(grey,) * images) for sample in samples if int(sample.images[0].name[:6]) < blind]
        seeing = measure(self.model, samples, f"{images} seeing")
        return accuracy_table(seeing, measure(self.model, unseen, f"{images} blind"), samples)


def main() -> None:
    """Parse the command line, measure, write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--log", type=Path, nargs="+", required=True, help="log.jsonl of the training runs, in order")
    parser.add_argument("--tables", type=Path, metavar="CARD", help="an existing card to put the tables into")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=500, help="0 leaves two images out")
    parser.add_argument("--blind", type=int, default=200, help="scenes asked with the image replaced by grey")
    parser.add_argument("--blind-pairs", type=int, default=100, help="pairs asked so")
    parser.add_argument("--seed", type=int, default=2026)
    options = parser.parse_args()
    logs = [[json.loads(line) for line in log.read_text().splitlines()] for log in options.log]
    with tempfile.TemporaryDirectory() as folder:
        accuracy = Accuracy(exported(options.model, Path(folder)), Path(folder), options.seed)
        one = accuracy.table(options.scenes, options.blind, images=1)
        two = accuracy.table(options.pairs, options.blind_pairs, images=2) if options.pairs else ""
    progress, runs = progress_table(logs)
    if options.tables:
        tables = {"one": one, "two": two, "progress": progress}
        card = with_tables(options.tables.read_text(), {name: table for name, table in tables.items() if table})
        place = options.tables
    else:
        loaded = load_model(resolve_model(str(options.model)))
        config = loaded.model.config
        card, place = (
            CARD.format(
                parameters=sum(p.numel() for p in loaded.model.parameters()) / 1e6,
                layers=config.text_config.num_hidden_layers,
                hidden=config.text_config.hidden_size,
                heads=config.text_config.num_attention_heads,
                kv_heads=config.text_config.num_key_value_heads,
                depth=config.vision_config.depth,
                side=SIDE,
                one=one,
                two=two,
                progress=progress,
                runs=runs,
                **{name: getattr(options, name) for name in ("scenes", "pairs", "blind", "blind_pairs", "seed")},
            ),
            options.model / "README.md",
        )
    place.write_text(card)
    place.with_name("training_log.jsonl").write_text("".join(log.read_text() for log in options.log))
    Console().print(card)


if __name__ == "__main__":
    main()
