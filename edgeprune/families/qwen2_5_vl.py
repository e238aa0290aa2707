"""Qwen2.5-VL: Qwen2-VL's decoder, and a vision tower most of whose blocks attend within windows.

Bai et al., arXiv 2502.13923; the modules are those of transformers' models/qwen2_5_vl/modeling_qwen2_5_vl.py. A bundle's image has
one fixed grid, so the windows are constants: patches are ordered by window once, windows of equal size attend in one batch, and
there are at most four sizes (inner ones, and those cut by the right edge, the bottom edge and the corner). Windows lie within a
frame, and all frames of a video are cut alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edgeprune.families.qwen2_vl import Qwen2VL, VisionTower
from edgeprune.plan import Geometry


class Qwen25VL(Qwen2VL):
    """Where the parts of a Qwen2_5_VLForConditionalGeneration are."""

    name = "qwen2_5_vl"

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return Qwen2-VL's settings and how many time positions a second has."""
        return Qwen2VL.settings(config, processor, size) | {"tokens_per_second": config.vision_config.tokens_per_second}

    def vision(self, geometry: Geometry, *, signals: bool = False) -> nn.Module:
        """Return the vision tower for one fixed grid, and with `signals` what its last block without windows attends to."""
        return WindowedTower(self._model.model.visual, geometry, signals=signals)


class WindowedTower(VisionTower):
    """Qwen2-VL's tower in another order of patches, with windows in all blocks but the tower's `fullatt_block_indexes`."""

    patches: torch.Tensor
    back: torch.Tensor

    def __init__(self, tower: Any, geometry: Geometry, *, signals: bool = False) -> None:
        super().__init__(tower, geometry, signals=signals)
        self.whole = frozenset(tower.fullatt_block_indexes)
        if signals:
            self.signal_block = max(self.whole)
        order, self.windows = _windows(geometry, tower.window_size // (geometry.patch * geometry.merge))
        order = (torch.arange(self.frames)[:, None] * len(order) + order).flatten()
        patches = (order[:, None] * self.merged + torch.arange(self.merged)).flatten()  # those of a token lie together
        self.register_buffer("patches", patches, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)
        self.cos, self.sin = self.cos[:, patches], self.sin[:, patches]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image or video, and the signals."""
        seen = super().forward(pixel_values.index_select(0, self.patches))
        if isinstance(seen, torch.Tensor):
            return seen.index_select(1, self.back)
        visual, *signals = seen
        return (visual.index_select(1, self.back), *(signal.index_select(0, self.back) for signal in signals))

    def _mix(self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if index in self.whole:
            return super()._mix(index, query, key, value)
        sizes = [count * length * self.merged for count, length in self.windows]
        parts = zip(self.windows, *(torch.split(rows, sizes, dim=1) for rows in (query, key, value)), strict=True)
        mixed = []
        for (count, length), *rows in parts:
            apart = [part.reshape(part.shape[0] * count, length * self.merged, part.shape[2]) for part in rows]
            alone, weights = super()._mix(index, *apart)
            mixed.append(alone.view(rows[0].shape))
        return torch.cat(mixed, dim=1), weights


def _windows(geometry: Geometry, side: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    # The visual tokens of a frame by window, windows of equal size one after the other; and how many there are of each size.
    rows, columns = geometry.rows, geometry.columns
    window = torch.arange(rows)[:, None] // side * columns + torch.arange(columns) // side
    members = [torch.nonzero(window.flatten() == number).flatten() for number in sorted(set(window.flatten().tolist()))]
    members.sort(key=len)
    lengths = [len(tokens) for tokens in members]
    return torch.cat(members), [(lengths.count(length), length) for length in sorted(set(lengths))]
