"""Compare how the images of one question can be ranked by the answers: accuracy on questions about two scenes.

    edgeprune tabletop pairs --images 2 --scenes 60 --seed 77
    python examples/several_images/accuracy.py OUT --data pairs/dataset.jsonl

`apart` and `ahead` are those of overlap.py. `joint`: the decoder is given what one forward pass over both images keeps, a budget
of each image; `turn`: with one budget for both. Writes OUT/accuracy.json and OUT/accuracy.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from overlap import METHODS, Kept, by_runtime, jointly, ranked_apart, write_table

from edgeprune.calibration.data.samples import Sample, read_samples, score
from edgeprune.calibration.replay.reference import TorchBackend, reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.methods.base import LayerView
from edgeprune.plan import KeepPlan, keep_count
from edgeprune.plan.presets import ranked_plan, staircase_plan, unpruned_plan
from edgeprune.runtime import Runtime
from edgeprune.runtime.media.images import read_image

WAYS = ("apart", "ahead", "joint", "turn")


class Given:
    """A method that keeps what it is given, image after image. `sets`: of one cut, for a cache cut [image][head]."""

    def __init__(self) -> None:
        self.sets: list[list[frozenset[int]]] = []

    def select(self, view: LayerView, keep: int) -> torch.Tensor:
        """Return the positions of the tokens that stay."""
        if not len(view.order):
            return view.order
        (wanted,) = self.sets.pop(0)
        return torch.nonzero(torch.isin(view.order, torch.tensor(sorted(wanted))))[:, 0]

    def score_heads(self, view: LayerView) -> torch.Tensor:
        """Return scores [kv heads, V] that put the tokens first."""
        if not len(view.order):
            return torch.zeros(view.kv_heads, 0)
        wanted = self.sets.pop(0)
        return torch.stack([torch.isin(view.order, torch.tensor(sorted(head))).float() for head in wanted])


class Contender:
    """A plan whose images are ranked in one of WAYS, on PyTorch."""

    def __init__(self, loaded: LoadedModel, plan: KeepPlan, way: str) -> None:
        self._loaded, self._plan, self._way = loaded, plan, way
        pipeline = reference_model(loaded, plan)
        self._runtime, self._given = Runtime(pipeline), list[Given]()
        if way in ("joint", "turn"):
            backend = pipeline.backend
            assert isinstance(backend, TorchBackend)
            for cuts in (backend._decoder.layer_cuts, backend._decoder.cache_cuts):
                for layer, (cut, _) in cuts.items():
                    self._given.append(Given())
                    cuts[layer] = (cut, self._given[-1])

    def answer(self, images: Sequence[Any], prompt: str) -> str:
        """Return the answer."""
        if self._given:
            with ranked_apart():
                _, inputs = by_runtime(self._loaded, self._plan, list(images), prompt)
            self._give(jointly(self._loaded, self._plan, inputs[: len(images)], of_turn=self._way == "turn"))
        with ranked_apart() if self._way == "apart" else nullcontext():
            return self._runtime.generate(list(images), prompt, max_tokens=64).text

    def _give(self, kept: Kept) -> None:
        heads = len(kept[0]) // len(self._given)
        for number, given in enumerate(self._given):
            given.sets = [sets[number * heads : (number + 1) * heads] for sets in kept]


def plan_at(method: str, base: KeepPlan, keep: float) -> KeepPlan:
    """Return the method's plan of overlap.py that ends with another share of the tokens."""
    if method == "plphp":
        return ranked_plan(base, [keep_count(base.geometry.tokens, keep)] * base.layers)
    stages = ([keep], [2]) if method == "fastv" else ([(1 + keep) / 2 if keep > 0.4 else 2 * keep, keep], [2, 4])
    return staircase_plan(base, method, *stages)


def accuracy(contender: Contender, samples: Sequence[Sample]) -> float:
    """Return the share of right answers in percent."""
    points = [score(sample, contender.answer([read_image(path) for path in sample.images], sample.prompt)) for sample in samples]
    return round(100 * sum(point.correct for point in points) / sum(point.total for point in points), 1)


def main() -> None:
    """Measure every method in every way, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="tabletop")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args()
    loaded, samples = load_model(resolve_model(args.model)), read_samples(args.data)
    base = unpruned_plan(loaded.folder.model_type, len(loaded.family.decoder().layers), loaded.geometry(None))
    print("unpruned", accuracy(Contender(loaded, base, "ahead"), samples), flush=True)
    rows = []
    for keep in args.keep:
        for method in args.methods:
            plan = plan_at(method, base, keep)
            ways = WAYS[:3] if plan.cache_cuts else WAYS
            found: dict[str, Any] = {way: accuracy(Contender(loaded, plan, way), samples) for way in ways}
            rows.append({"method": method, "keep": keep, **dict.fromkeys(WAYS, ""), **found})
            print(rows[-1], flush=True)
    write_table(rows, args.out, "accuracy")


if __name__ == "__main__":
    main()
