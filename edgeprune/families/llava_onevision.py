"""LLaVA-NeXT and LLaVA-OneVision: an overview and tiles, packed into one grid with newlines, and a plain text decoder.

LLaVA-NeXT (1.6): Liu et al., llava-vl.github.io/blog/2024-01-30-llava-next; the modules are those of transformers'
models/llava_next/modeling_llava_next.py. It has CLIP or SigLIP, and a Vicuna, Mistral, Llama 3 or Qwen decoder. Joining the tiles,
removing padding bars and adding newlines depend on the geometry alone: one gather does all of it.

LLaVA-OneVision: Li et al., arXiv 2408.03326; the modules are those of models/llava_onevision/modeling_llava_onevision.py. It has
SigLIP and a Qwen2 decoder, and takes videos. It shrinks large grids by bilinear interpolation and pools the frames of a video: one
gather of at most four patches per token and a weighted sum.

Departure: every image has tiles; for a prompt with several images, LLaVA-OneVision's processor in transformers has an option for
overviews only. A newline has no place in the image, so its signals are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.image_processing_utils import select_best_resolution

from edgeprune.bundle import ImageText
from edgeprune.families.base import DecoderParts, Family, check_text, text_decoder
from edgeprune.families.encoder import CLIP, SIGLIP, FeatureEncoder, check_encoder, check_grid, check_selection
from edgeprune.plan import Cut, Geometry, View


class LlavaNext(Family):
    """The family of LlavaNextForConditionalGeneration."""

    name = "llava_next"
    no_encoder_cuts_reason = "newlines are no patches and patches under bars are no tokens, so tiles differ in their tokens"

    @staticmethod
    def check(config: Any) -> None:
        """Refuse unsupported encoders and decoders, and features with a class token or without a patch."""
        check_text(config)
        check_encoder(config, CLIP, SIGLIP)
        check_selection(config)

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's tiles; `size` restricts them to its best resolution."""
        pinpoints = config.image_grid_pinpoints
        return {
            **processor,
            "patch_size": config.vision_config.patch_size,
            "image_grid_pinpoints": pinpoints if size is None else [list(select_best_resolution(size, pinpoints))],
        }

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the placeholder token of all views of an image, or of all frames of a video."""
        kind = "video" if geometry.frames > 1 else "image"
        return ImageText(kind, f"<{kind}>", f"<{kind}>", getattr(self._model.config, f"{kind}_token_id"))

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder, projector and packing; signals come from the layer before the features."""
        del cuts  # this family supports none
        return PackedTower(self._model.model, geometry, signals=signals)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        return text_decoder(self._model.model.language_model, self._model.lm_head)


class LlavaOneVision(LlavaNext):
    """The family of LlavaOnevisionForConditionalGeneration."""

    name = "llava_onevision"
    several_as_one = False
    no_encoder_cuts_reason = "a token is woven of up to four patches of several tiles, which would have to stay together"
    videos = True

    @staticmethod
    def check(config: Any) -> None:
        """Refuse unsupported encoders and decoders, and fewer features than patches."""
        check_encoder(config, SIGLIP)
        LlavaNext.check(config)

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return LLaVA-NeXT's settings and the limit of the packed grid."""
        return LlavaNext.settings(config, processor, size) | {"vision_aspect_ratio": config.vision_aspect_ratio}


class PackedTower(nn.Module):
    """The encoder, projector and packing: patches of all views [patches, 3 * P * P] to visual tokens [1, V, hidden].

    With `signals`, it also returns the attention that each token receives [V] and its keys averaged over heads [V, head_dim].
    """

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
        packed = [_packed(grid, view, views * side**2) for grid, view in zip(grids, geometry.layout, strict=True)]
        places, shares = (torch.cat(parts).transpose(0, 1) for parts in zip(*packed, strict=True))
        used = shares.any(dim=1)
        self.register_buffer("places", places[used], persistent=False)  # [1 to 4, V]
        self.register_buffer("shares", shares[used, :, None], persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image or video and, if enabled, the signals."""
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
    # The number of views, and the grid of patch numbers of the image within its tiles; the overview has the first numbers.
    top, left, rows, columns = (round(edge * side / size) for edge in (view.top, view.left, view.height, view.width))
    down, across = (rows + 2 * top) // side, (columns + 2 * left) // side
    numbers = torch.arange(down * across * side**2).view(down, across, side, side) + side**2
    grid = numbers.transpose(1, 2).reshape(down * side, across * side)
    return 1 + down * across, grid[top : top + rows, left : left + columns]


def _packed(grid: torch.Tensor, view: View, newline: int) -> tuple[torch.Tensor, torch.Tensor]:
    # For each token of the view, the four patch numbers of the grid around it and their weights, both [tokens, 4].
    (top, bottom, down), (left, right, across) = _interpolated(grid.shape[0], view.rows), _interpolated(grid.shape[1], view.columns)
    places = torch.stack([grid[rows][:, columns] for rows in (top, bottom) for columns in (left, right)], dim=2)
    shares = torch.stack([high[:, None] * wide for high in (1 - down, down) for wide in (1 - across, across)], dim=2)
    ends = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(view.rows, view.separators, 4)
    places = nn.functional.pad(places, (0, 0, 0, view.separators), value=newline)
    return places.flatten(0, 1), torch.cat([shares, ends], dim=1).flatten(0, 1)


def _interpolated(many: int, few: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Bilinear interpolation along one side: the two neighbours of each new point, and the weight of the second.
    points = ((torch.arange(few) + 0.5) * (many / max(few, 1)) - 0.5).clamp(min=0)
    low = points.long()
    return low, (low + 1).clamp(max=max(many - 1, 0)), points - low
