"""Compare how the images of one question can be ranked, on the bundled model: kept sets beside those of one joint forward pass.

    python examples/several_images/overlap.py OUT --images 2 3 4 8 --scenes 20

The oracle is one forward pass over all images of the turn with the question last, which is what the authors' code does, where each
image keeps its budget. `apart`: each image is ranked by the text up to the next one. `ahead`: each is ranked with the later text
behind it, as the runtime does. Writes OUT/overlap.json and OUT/overlap.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.methods.base import LayerView, keep_best, rank
from edgeprune.model import PrunedDecoder, Segment
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import ranked_plan, staircase_plan, unpruned_plan
from edgeprune.runtime import Runtime
from edgeprune.runtime.backends.compare import RecordingBackend
from edgeprune.runtime.backends.kv_cache import DecoderInput, TokenSegment
from edgeprune.runtime.generation.sequence import SequenceState
from edgeprune.tabletop.dataset import scenes
from edgeprune.tabletop.drawing import draw_scene

QUESTIONS = (
    "What does the label say?",
    "Which object is nearest to the gripper?",
    "How many red objects are there?",
    "Where is the blue ball?",
)
METHODS = ("fastv", "pyramiddrop", "sparsevlm", "fitprune", "plphp")
Kept = list[list[frozenset[int]]]  # by image and cut, for a cache cut by head


def plan_of(method: str, base: KeepPlan) -> KeepPlan:
    """Return a plan that ends with a quarter of the tokens, in two stages where the method has several."""
    if method == "plphp":
        return ranked_plan(base, [base.geometry.tokens // 4] * base.layers)
    stages = ([0.25], [2]) if method == "fastv" else ([0.5, 0.25], [2, 4])
    return staircase_plan(base, method, *stages)


class EachImage:
    """A method that keeps a budget of every image among the visual tokens of several, `tokens` each.

    `of_turn`: keep that many times the number of images of all of them together instead.
    """

    def __init__(self, method: Any, tokens: int, images: int, *, of_turn: bool) -> None:
        self._method, self._tokens, self._images, self._of_turn = method, tokens, images, of_turn
        self.ranked: list[torch.Tensor] = []  # scores of cache cuts [kv heads, V]

    def select(self, view: LayerView, keep: int) -> torch.Tensor:
        """Return the ascending positions of the tokens that stay."""
        scores, image = self._method.score(view), view.order // self._tokens
        if self._of_turn:
            return keep_best(scores, keep * self._images)
        places = [torch.nonzero(image == number)[:, 0] for number in range(self._images)]
        return torch.cat([place[keep_best(scores[place], keep)] for place in places])

    def score_heads(self, view: LayerView) -> torch.Tensor:
        """Return the method's scores, and note them."""
        scores: torch.Tensor = self._method.score_heads(view)
        self.ranked.append(scores)
        return scores


def jointly(loaded: LoadedModel, plan: KeepPlan, inputs: list[DecoderInput], *, of_turn: bool = False) -> Kept:
    """Return what one forward pass over all images keeps of each. `inputs`: the steps of the images, each ranked apart."""
    images, tokens = len(inputs), plan.geometry.tokens
    before = [part for each in inputs[:-1] for part in (each.prefix, each.suffix)] + [inputs[-1].prefix]
    segments = [_joined(before), _joined([each.visual for each in inputs]), inputs[-1].suffix]
    decoder = PrunedDecoder(loaded.family.decoder(), plan).eval()
    wrapped = []
    for cuts in (decoder.layer_cuts, decoder.cache_cuts):
        for layer, (cut, method) in cuts.items():
            wrapped.append(EachImage(method, tokens, images, of_turn=of_turn))
            cuts[layer] = (cut, wrapped[-1])
    given = [Segment(torch.from_numpy(part.embeds), torch.from_numpy(part.positions)) for part in segments]
    with torch.no_grad():
        step = decoder(*given, decoder.empty_caches())
    kept: Kept = [[] for _ in range(images)]
    if plan.cache_cuts:
        for cut, each in zip(plan.cache_cuts, wrapped, strict=True):
            for number, scores in enumerate(each.ranked[0].split(tokens, dim=1)):
                kept[number] += [frozenset(head.tolist()) for head in rank(scores, cut.keep)]
        return kept
    for indices in step.kept:
        for number in range(images):
            kept[number].append(frozenset((indices[indices // tokens == number] - number * tokens).tolist()))
    return kept


def _joined(parts: list[TokenSegment]) -> TokenSegment:
    return TokenSegment(
        np.concatenate([part.embeds for part in parts], axis=1), np.concatenate([part.positions for part in parts], axis=1)
    )


@contextmanager
def ranked_apart() -> Iterator[None]:
    """Rank each image by the text up to the next one inside."""
    ahead = SequenceState._ahead

    def nothing(self: SequenceState, start: int, later: Any, **kind: bool) -> tuple[list[int], np.ndarray]:
        return ahead(self, start, later[:0], **kind)

    with mock.patch.object(SequenceState, "_ahead", nothing):
        yield


def by_runtime(loaded: LoadedModel, plan: KeepPlan, images: list[Image.Image], question: str) -> tuple[Kept, list[DecoderInput]]:
    """Return what the runtime keeps of each image, and its forward passes."""
    pipeline = reference_model(loaded, plan)
    recorder = RecordingBackend(pipeline.backend)
    receipt = Runtime(replace(pipeline, backend=recorder)).generate(images, question, max_tokens=1).receipt  # type: ignore[arg-type]
    by_image = [[*cuts.tokens, *cuts.caches] for cuts in receipt.cuts_by_image(len(images))]
    kept = [[frozenset(row.tolist()) for cut in cuts for row in np.atleast_2d(cut.kept)] for cuts in by_image]
    return kept, [tokens for tokens, _ in recorder.inputs]


def overlap(left: list[frozenset[int]], right: list[frozenset[int]]) -> float:
    """Return the mean share of tokens that two lists of equally large kept sets have in common."""
    return float(np.mean([len(a & b) / len(a) for a, b in zip(left, right, strict=True)]))


def measure(loaded: LoadedModel, method: str, count: int, shown: int) -> dict[str, Any]:
    """Return one row: overlaps with the oracle, and of the first image's kept sets between questions."""
    base = unpruned_plan(loaded.folder.model_type, len(loaded.family.decoder().layers), loaded.geometry(None))
    plan, ways = plan_of(method, base), ("apart", "ahead", "joint", "alone")
    pictures = [draw_scene(scene) for scene, _ in scenes(77, shown * count)]
    shares: dict[str, list[float]] = {"apart": [], "ahead": [], **{f"{way} questions": [] for way in ways}}
    for number in range(shown):
        images = pictures[number * count : (number + 1) * count]
        first: dict[str, list[list[frozenset[int]]]] = {way: [] for way in ways}
        for question in QUESTIONS:
            with ranked_apart():
                apart, inputs = by_runtime(loaded, plan, images, question)
            found = {"apart": apart, "ahead": by_runtime(loaded, plan, images, question)[0]}
            joint, alone = jointly(loaded, plan, inputs), by_runtime(loaded, plan, images[:1], question)[0]
            for way, kept in found.items():
                shares[way] += [overlap(mine, theirs) for mine, theirs in zip(kept[:-1], joint, strict=False)]
            for way, kept in {**found, "joint": joint, "alone": alone}.items():
                first[way].append(kept[0])
        for way, sets in first.items():
            shares[f"{way} questions"] += [overlap(*pair) for pair in combinations(sets, 2)]
    return {"method": method, "images": count, **{name: round(float(np.mean(values)), 3) for name, values in shares.items()}}


def write_table(rows: list[dict[str, Any]], out: Path, name: str) -> None:
    """Write rows as OUT/NAME.json and OUT/NAME.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
    lines = [" | ".join(map(str, line)) for line in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))]
    (out / f"{name}.md").write_text("\n".join(f"| {line} |" for line in lines) + "\n")


def main() -> None:
    """Measure every method with every number of images, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--scenes", type=int, default=10, help="Groups of images.")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args()
    loaded, rows = load_model(resolve_model("tabletop")), list[dict[str, Any]]()
    for count in args.images:
        for method in args.methods:
            rows.append(measure(loaded, method, count, args.scenes))
            print(rows[-1], flush=True)
    write_table(rows, args.out, "overlap")


if __name__ == "__main__":
    main()
