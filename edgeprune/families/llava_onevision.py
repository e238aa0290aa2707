"""LLaVA-OneVision: an overview and tiles in SigLIP, packed into one grid with newlines, a Qwen2 decoder; videos too.

Li et al., arXiv 2408.03326; the modules are those of transformers' models/llava_onevision/modeling_llava_onevision.py. Where a
token comes from is a constant of one geometry: tiles are put together, bars left out, the grid shrunk (of a video, every frame
pooled) by bilinear interpolation, and newlines added, all by one gather of at most four patches a token and a weighted sum.

Departure: every image has tiles; in a prompt with several, transformers' processor can be told to make overviews only. A newline
stands for no place, so its signals are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.image_processing_utils import select_best_resolution

from edgeprune.bundle import ImageText
from edgeprune.families.base import DecoderParts, Family, check_text, text_decoder
from edgeprune.families.encoder import SIGLIP, FeatureEncoder, check_encoder, check_grid, check_selection
from edgeprune.plan import Cut, Geometry, View


class LlavaOneVision(Family):
    """Where the parts of a LlavaOnevisionForConditionalGeneration are."""

    name = "llava_onevision"
    no_encoder_cuts_reason = "a token is woven of up to four patches of several tiles, which would have to stay together"
    videos = True

    @staticmethod
    def check(config: Any) -> None:
        """Refuse quantized weights, other encoders and decoders, and fewer features than patches."""
        check_text(config)
        check_encoder(config, SIGLIP)
        check_selection(config)

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's tiles; with `size`, of its resolution alone."""
        pinpoints = config.image_grid_pinpoints
        return {
            **processor,
            "patch_size": config.vision_config.patch_size,
            "vision_aspect_ratio": config.vision_aspect_ratio,
            "image_grid_pinpoints": pinpoints if size is None else [list(select_best_resolution(size, pinpoints))],
        }

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the token that stands for all views of an image, or all frames of a video."""
        kind = "video" if geometry.frames > 1 else "image"
        return ImageText(kind, f"<{kind}>", f"<{kind}>", getattr(self._model.config, f"{kind}_token_id"))

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder, projector and packing, and with `signals` what its last layer but one attends to."""
        del cuts  # it has none
        return PackedTower(self._model.model, geometry, signals=signals)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        return text_decoder(self._model.model.language_model, self._model.lm_head)


class PackedTower(nn.Module):
    """Patches of all views [patches, 3 * P * P] to visual tokens [1, V, hidden]; with `signals`, also those of each token."""

    places: torch.Tensor
    shares: torch.Tensor

    def __init__(self, model: Any, geometry: Geometry, *, signals: bool = False) -> None:
        super().__init__()
        vision, view = model.config.vision_config, geometry.layout[0]
        side = vision.image_size // vision.patch_size
        if geometry.frames > 1:
            check_grid(model.config, view.height // geometry.patch, view.width // geometry.patch)
            frames = torch.arange(geometry.frames * side**2).view(-1, side, side)
            views, grids = geometry.frames, [*frames, frames.new_empty(1, 0)]
        else:
            check_grid(model.config, view.rows, view.columns)
            views, grid = _tiles(geometry.layout[1], side, vision.image_size)
            grids = [torch.arange(side**2).view(side, side), grid]
        self.encoder = FeatureEncoder(model.vision_tower, views, model.config.vision_feature_layer, signals=signals)
        self.projector, self.newline, self.takes = model.multi_modal_projector, model.image_newline, self.encoder.takes
        self.blocks = self.encoder.blocks
        made = [_packed(grid, view, views * side**2) for grid, view in zip(grids, geometry.layout, strict=True)]
        places, shares = (torch.cat(parts).transpose(0, 1) for parts in zip(*made, strict=True))
        used = shares.any(dim=1)
        self.register_buffer("places", places[used], persistent=False)  # [1 to 4, V]
        self.register_buffer("shares", shares[used, :, None], persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image or video and, if asked for, the signals."""
        features, signals = self.encoder(pixel_values)
        visual = self._pack(self.projector(features), self.newline[None])[None]
        if not signals:
            return visual
        received, keys = signals
        return visual, self._pack(received[:, None])[:, 0], self._pack(keys)

    def _pack(self, rows: torch.Tensor, newline: torch.Tensor | None = None) -> torch.Tensor:
        last = rows.new_zeros(1, rows.shape[1]) if newline is None else newline
        parts = torch.cat([rows, last]).index_select(0, self.places.flatten()).view(*self.places.shape, rows.shape[1])
        return (parts * self.shares).sum(dim=0) if parts.shape[0] > 1 else parts[0]


def _tiles(view: View, side: int, size: int) -> tuple[int, torch.Tensor]:
    # How many views there are, and the patches of the image in its tiles: a grid of numbers, the overview's come before.
    top, left, rows, columns = (round(edge * side / size) for edge in (view.top, view.left, view.height, view.width))
    down, across = (rows + 2 * top) // side, (columns + 2 * left) // side
    numbers = torch.arange(down * across * side**2).view(down, across, side, side) + side**2
    whole = numbers.transpose(1, 2).reshape(down * side, across * side)
    return 1 + down * across, whole[top : top + rows, left : left + columns]


def _packed(grid: torch.Tensor, view: View, newline: int) -> tuple[torch.Tensor, torch.Tensor]:
    # For each token of the view the four numbers of a grid between which it lies, and the share of each [tokens, 4].
    (top, bottom, down), (left, right, across) = _axis(grid.shape[0], view.rows), _axis(grid.shape[1], view.columns)
    places = torch.stack([grid[rows][:, columns] for rows in (top, bottom) for columns in (left, right)], dim=2)
    shares = torch.stack([high[:, None] * wide for high in (1 - down, down) for wide in (1 - across, across)], dim=2)
    ends = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(view.rows, view.separators, 4)
    places = nn.functional.pad(places, (0, 0, 0, view.separators), value=newline)
    return places.flatten(0, 1), torch.cat([shares, ends], dim=1).flatten(0, 1)


def _axis(many: int, few: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Bilinear interpolation along one side: the neighbours of each new point, and how near the second one is.
    points = ((torch.arange(few) + 0.5) * (many / max(few, 1)) - 0.5).clamp(min=0)
    low = points.long()
    return low, (low + 1).clamp(max=max(many - 1, 0)), points - low
