"""Compare keep ratios and methods on the bundled model: accuracy, agreement, and what an answer costs.

    python examples/budgets/compare.py OUT --scenes 200

Every bundle answers each question twice in a row, with and without its plan, so that drift of the machine cancels in the ratios.
transformers' own generate answers them in turns with the unpruned bundle, on as many threads.
Writes OUT/results.json and OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

import edgeprune.runtime
from edgeprune.calibration.data.samples import Sample, read_samples, score
from edgeprune.calibration.evaluation import ALL, PRUNED, UNPRUNED, Cost, evaluate
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.cli.output.progress import CommandProgress
from edgeprune.export.exporter import export_bundle
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.tabletop.dataset import write_dataset
from edgeprune.tabletop.questions import DESCRIBE

KEEPS = (0.5, 0.25, 0.1)
METHODS = ("fastv", "random", "uniform")
LAYER = 2
THREADS = 1


def measure_bundle(loaded: LoadedModel, method: str, keep: float, samples: list[Sample], folder: Path) -> dict[str, Any]:
    """Export one budget, evaluate it, and return its row."""
    base = unpruned_plan(loaded.folder.model_type, len(loaded.family.decoder().layers), loaded.geometry(None))
    plan = base if keep == 1.0 else staircase_plan(base, method, [keep], [LAYER])
    bundle = export_bundle(loaded, plan, folder / f"{method}-{round(100 * keep)}", force=True)
    model = edgeprune.runtime.load(bundle.path, threads=THREADS)
    model.generate(samples[0].image, samples[0].prompt)  # warm up
    with CommandProgress() as progress:
        report = evaluate(model, samples, progress=progress.count(f"{method} {keep:.0%}, samples", len(samples)))
    variant = PRUNED if report.pruned else UNPRUNED
    short, facts = report.rows()[ALL], report.kinds[DESCRIBE]
    cost, whole = report.cost[variant].to_dict(), report.cost[UNPRUNED].to_dict()
    return {
        "method": method if report.pruned else "none",
        "keep": keep,
        "accuracy": short.accuracy(variant),
        "facts": facts.accuracy(variant),
        "agreement": short.agreement if report.pruned else 1.0,
        "ttft_ratio": cost["ttft_ms"] / whole["ttft_ms"],
        "ms_per_token_ratio": cost["ms_per_token"] / whole["ms_per_token"],
        "ttft_ms": cost["ttft_ms"],
        "ms_per_token": cost["ms_per_token"],
        "kv_bytes": cost["kv_bytes"],
    }


class _Clock:
    # A streamer for generate: notes when each token arrived.
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the times are all that is wanted."""


def measure_transformers(loaded: LoadedModel, samples: list[Sample], folder: Path) -> dict[str, Any]:
    """Answer the samples in turns with transformers and with the unpruned bundle; return the row of transformers."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(loaded.folder.path, backend="pil")
    model = edgeprune.runtime.load(folder / "none-100", threads=THREADS)
    points = {False: [0.0, 0.0], True: [0.0, 0.0]}  # right and asked, for short answers and for descriptions
    clocks, ours = Cost(), Cost()
    agreed = 0
    with CommandProgress() as progress:
        counted = progress.count("transformers, samples", len(samples))
        for done, sample in enumerate(samples, start=1):
            text = _answer_with_transformers(loaded, processor, sample, clocks)
            answer = model.generate(sample.image, sample.prompt)
            ours.add(answer.receipt)
            agreed += answer.text == text
            scored = score(sample, text)
            points[sample.kind == DESCRIBE][0] += scored.correct
            points[sample.kind == DESCRIBE][1] += scored.total
            counted(done)
    cost, whole = clocks.to_dict(), ours.to_dict()
    return {
        "method": "transformers",
        "keep": 1.0,
        "accuracy": points[False][0] / points[False][1],
        "facts": points[True][0] / points[True][1],
        "agreement": agreed / len(samples),
        "ttft_ratio": cost["ttft_ms"] / whole["ttft_ms"],
        "ms_per_token_ratio": cost["ms_per_token"] / whole["ms_per_token"],
        **cost,
    }


def _answer_with_transformers(loaded: LoadedModel, processor: Any, sample: Sample, cost: Cost) -> str:
    begun, clock = time.perf_counter(), _Clock()
    inputs = _inputs(loaded, processor, sample)
    with torch.no_grad():
        output = loaded.model.generate(**inputs, max_new_tokens=128, do_sample=False, streamer=clock, return_dict_in_generate=True)
    cost.ttft_ms.append(1e3 * (clock.times[1] - begun))  # the first call of the streamer is the prompt
    cost.ms_per_token += [1e3 * (b - a) for a, b in pairwise(clock.times[1:])]
    cost.kv_bytes.append(sum(x.keys.nbytes + x.values.nbytes for x in output.past_key_values.layers))
    text: str = loaded.tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def _inputs(loaded: LoadedModel, processor: Any, sample: Sample) -> dict[str, torch.Tensor]:
    pixels = processor(images=[Image.open(sample.images[0]).convert("RGB")], return_tensors="pt")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.prompt}]}]
    text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    count = int(pixels["image_grid_thw"].prod()) // loaded.model.config.vision_config.spatial_merge_size**2
    ids = loaded.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt").input_ids
    types = (ids == loaded.model.config.image_token_id).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **pixels}


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    lines = [
        "| keep | method | short answers | facts described | agreement | TTFT | ms per token | KV bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['keep']:.0%} | {row['method']} | {row['accuracy']:.1%} | {row['facts']:.1%} | {row['agreement']:.1%} "
            f"| {row['ttft_ratio']:.2f}x | {row['ms_per_token_ratio']:.2f}x | {row['kv_bytes'] / 1024:.0f} KiB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and measure everything in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    write_dataset(options.out / "data", options.scenes, options.seed, force=True)
    samples = read_samples(options.out / "data" / "dataset.jsonl")
    loaded = load_model(resolve_model("tabletop"))
    rows = [measure_bundle(loaded, "none", 1.0, samples, options.out)]
    rows += [measure_bundle(loaded, method, keep, samples, options.out) for keep in KEEPS for method in METHODS]
    rows.append(measure_transformers(loaded, samples, options.out))
    (options.out / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    (options.out / "table.md").write_text(to_markdown(rows))
    Console(width=160).print(to_markdown(rows))


if __name__ == "__main__":
    main()
