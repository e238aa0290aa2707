"""A prompt with one image for the eager decoder, run with and without caches, beside what transformers attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.model import PrunedDecoder, Segment, StepOutput
from edgeprune.model.cache import LayerCache, LayerStates
from edgeprune.plan import KeepPlan


@dataclass
class Prompt:
    """One image prompt as transformers wants it, and its parts as the pruned decoder wants them."""

    inputs: dict[str, torch.Tensor]
    before: int
    tokens: int

    @classmethod
    def make(cls, loaded: LoadedModel, plan: KeepPlan) -> Prompt:
        geometry, config = plan.geometry, loaded.model.config
        grid = [geometry.height // geometry.patch, geometry.width // geometry.patch]
        generator = torch.Generator().manual_seed(3)
        patches = torch.randn(grid[0] * grid[1], 3 * 2 * geometry.patch**2, generator=generator)
        words = torch.randint(10, 200, (9,), generator=generator).tolist()
        ids = torch.tensor([[1, 20, 3, *[config.image_token_id] * geometry.tokens, 4, *words]])
        inputs = {
            "input_ids": ids,
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, *grid]]),
            "mm_token_type_ids": (ids == config.image_token_id).long(),
        }
        return cls(inputs, 3, geometry.tokens)

    def segments(self, loaded: LoadedModel, plan: KeepPlan) -> tuple[Segment, Segment, Segment]:
        ids, end = self.inputs["input_ids"], self.before + self.tokens
        rope = {name: self.inputs[name] for name in ("image_grid_thw", "mm_token_type_ids")}
        positions = loaded.model.model.get_rope_index(ids, **rope)[0][:, 0]
        embeds = loaded.family.decoder().embed_tokens(ids)
        visual = loaded.family.vision(plan.geometry)(self.inputs["pixel_values"])
        return (
            Segment(embeds[:, : self.before], positions[:, : self.before]),
            Segment(visual, positions[:, self.before : end]),
            Segment(embeds[:, end:], positions[:, end:]),
        )


def run(loaded: LoadedModel, plan: KeepPlan, prompt: Prompt) -> StepOutput:
    decoder = PrunedDecoder(loaded.family.decoder(), plan)
    with torch.no_grad():
        output: StepOutput = decoder(*prompt.segments(loaded, plan), decoder.empty_caches())
    return output


def attentions_of(loaded: LoadedModel, prompt: Prompt) -> tuple[torch.Tensor, ...]:
    """Return transformers' own attention of every layer [1, heads, S, S]."""
    loaded.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found: tuple[torch.Tensor, ...] = loaded.model(**prompt.inputs, output_attentions=True).attentions
    finally:
        loaded.model.set_attn_implementation("sdpa")
    return found


Cache = LayerCache | LayerStates


def grown(caches: Sequence[Cache], step: StepOutput, before: int, after: int) -> list[Cache]:
    """Return caches with what a step adds to them, whose prefix and suffix have `before` and `after` tokens."""
    return [cache.append(rows, before, after) for cache, rows in zip(caches, step.rows, strict=True)]
