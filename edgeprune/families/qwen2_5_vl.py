"""Qwen2.5-VL and Cosmos-Reason1: Qwen2-VL's decoder, and a vision tower with window attention in most blocks.

Bai et al., arXiv 2502.13923; the modules are those of transformers' models/qwen2_5_vl/modeling_qwen2_5_vl.py. A bundle's image has
one fixed grid, so the windows are constants. Patches are ordered by window once, and windows of equal size attend in one batch.
There are at most four sizes: inner windows, and those cut by the right edge, the bottom edge and the corner. Windows lie within a
frame, and all frames of a video have the same windows. Cosmos-Reason1 (NVIDIA, arXiv 2503.15558) has the same modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from edgeprune.families.encoder_pruning import EncoderPruning, in_image_order
from edgeprune.families.qwen2_vl import Qwen2VL, Signal, VisionTower
from edgeprune.plan import Cut, Geometry


class Qwen25VL(Qwen2VL):
    """The family of Qwen2_5_VLForConditionalGeneration."""

    name = "qwen2_5_vl"

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return Qwen2-VL's settings and the number of time positions per second."""
        return Qwen2VL.settings(config, processor, size) | {"tokens_per_second": config.vision_config.tokens_per_second}

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the vision tower for one fixed grid; signals come from the last block without windows."""
        return WindowedTower(self._model.model.visual, geometry, EncoderPruning(cuts, geometry), signals=signals)


class WindowedTower(VisionTower):
    """Qwen2-VL's tower with patches ordered by window, and windows in all blocks except the tower's `fullatt_block_indexes`.

    After a cut the number of tokens per window depends on the image. A frame then attends in one batch, with other windows masked.
    """

    patches: torch.Tensor
    back: torch.Tensor
    window: torch.Tensor

    def __init__(self, tower: Any, geometry: Geometry, thinning: EncoderPruning, *, signals: bool = False) -> None:
        super().__init__(tower, geometry, thinning, signals=signals)
        self.whole = frozenset(tower.fullatt_block_indexes)
        if signals:
            self.signal_block = max(self.whole)
        order, self.windows = _windows(geometry, tower.window_size // (geometry.patch * geometry.merge))
        lengths = torch.tensor([length for count, length in self.windows for _ in range(count)])
        window = torch.arange(len(lengths)).repeat_interleave(lengths)[order.argsort()].repeat(self.frames)
        self.register_buffer("window", window, persistent=False)  # [V] the window of each token
        order = (torch.arange(self.frames)[:, None] * len(order) + order).flatten()
        thinning.order = order
        patches = (order[:, None] * self.merged + torch.arange(self.merged)).flatten()  # patches of a token are adjacent
        self.register_buffer("patches", patches, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)
        self.cos, self.sin = self.cos[:, patches], self.sin[:, patches]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image or video, the signals, and the indices that each cut kept."""
        outputs = super().forward(pixel_values.index_select(0, self.patches))
        visual, *beside = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        signals = len(beside) - len(self.thinning.cuts)
        ordered = [in_image_order(kept, self.frames) for kept in beside[signals:]]
        back = ordered[-1][1] if ordered else self.back
        others = [*(signal.index_select(0, back) for signal in beside[:signals]), *(kept for kept, _ in ordered)]
        visual = visual.index_select(1, back)
        return (visual, *others) if others else visual

    def _mix(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, order: torch.Tensor
    ) -> tuple[torch.Tensor, Signal]:
        if index in self.whole:
            return super()._mix(index, query, key, value, order)
        if len(order) < len(self.back):
            return self._mix_masked(query, key, value, order)
        sizes = [count * length * self.merged for count, length in self.windows]
        parts = zip(self.windows, *(torch.split(rows, sizes, dim=1) for rows in (query, key, value)), strict=True)
        mixed, weights = list[torch.Tensor](), list[torch.Tensor]()
        for (count, length), *rows in parts:
            batched = [part.reshape(part.shape[0] * count, length * self.merged, part.shape[2]) for part in rows]
            weights.append(torch.softmax(batched[0] @ batched[1].transpose(1, 2), dim=-1))
            mixed.append((weights[-1] @ batched[2]).view(rows[0].shape))
        return torch.cat(mixed, dim=1), partial(_received, weights, query.shape[:2])

    def _mix_masked(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, order: torch.Tensor
    ) -> tuple[torch.Tensor, Signal]:
        window = self.window.index_select(0, order).view(self.frames, -1, 1).expand(-1, -1, self.merged).flatten(1)
        hidden = torch.where(window[:, :, None] == window[:, None], 0.0, float("-inf"))  # [frames, patches, patches]
        scores = (query @ key.transpose(1, 2)).view(-1, *hidden.shape) + hidden
        weights = torch.softmax(scores, dim=-1).flatten(0, 1)
        return weights @ value, partial(weights.mean, dim=1)


def _received(weights: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    # Weights are [heads * frames * windows, patches, patches] for each window size; queries in other windows count as zero.
    return torch.cat([part.sum(dim=1).view(shape[0], -1) for part in weights], dim=1) / shape[1]


def _windows(geometry: Geometry, side: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    # The visual tokens of a frame ordered by window, with windows sorted by size; and (count, tokens) for each size.
    rows, columns = geometry.rows, geometry.columns
    window = torch.arange(rows)[:, None] // side * columns + torch.arange(columns) // side
    members = [torch.nonzero(window.flatten() == number).flatten() for number in sorted(set(window.flatten().tolist()))]
    members.sort(key=len)
    lengths = [len(tokens) for tokens in members]
    return torch.cat(members), [(lengths.count(length), length) for length in sorted(set(lengths))]
