"""Qwen3-VL and Cosmos-Reason2: a learned position table, DeepStack, interleaved mRoPE, and normalized heads in the decoder.

Bai et al., arXiv 2511.21631; the modules are those of transformers' models/qwen3_vl/modeling_qwen3_vl.py, also for Cosmos-Reason2.
For one fixed grid the interpolated position table is a constant. DeepStack (Meng et al., arXiv 2406.04334): separate mergers turn
the outputs of some blocks into planes beside the visual tokens, which the first decoder layers add. Every frame of a video follows
its timestamp, as in transformers 4.57, where the frames replace the markers that the chat template writes around a video; 5.23
leaves these markers around all frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from edgeprune.bundle import ImageText
from edgeprune.families.base import DecoderParts
from edgeprune.families.encoder_pruning import EncoderPruning
from edgeprune.families.qwen2_vl import Qwen2VL, VisionTower, patch_grid
from edgeprune.plan import Cut, Geometry

_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


class Qwen3VL(Qwen2VL):
    """The family of Qwen3VLForConditionalGeneration."""

    name = "qwen3_vl"
    own_video_prompts = "transformers 5 leaves the template's video markers around the frames"

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the placeholder token of an image, or one per frame of a video, each after its timestamp."""
        if geometry.frames == 1:
            return super().image_text(geometry)
        config = self._model.config
        step, last = config.vision_config.temporal_patch_size, geometry.frames - 1
        ends = [(first, min(first + step - 1, last)) for first in range(0, geometry.frames, step)]
        times = [sum(frame / geometry.fps for frame in pair) / 2 for pair in ends]
        return ImageText("video", _VIDEO, "".join(f"<{time:.1f} seconds>{_VIDEO}" for time in times), config.video_token_id)

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the vision tower for one fixed grid; signals come from the penultimate block."""
        return DeepTower(self._model.model.visual, geometry, EncoderPruning(cuts, geometry), signals=signals)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        text = self._model.model.language_model
        planes = len(self._model.model.visual.deepstack_visual_indexes)
        return replace(super().decoder(), rope=InterleavedRope(text.rotary_emb), head_dim=text.config.head_dim, planes=planes)


class DeepTower(VisionTower):
    """Qwen2-VL's tower, with a position table and planes: [1, V, (1 + planes) * hidden], tokens before planes."""

    places: torch.Tensor

    def __init__(self, tower: Any, geometry: Geometry, thinning: EncoderPruning, *, signals: bool = False) -> None:
        super().__init__(tower, geometry, thinning, signals=signals)
        frame = patch_grid(replace(geometry, views=()))
        table, weights = get_vision_interpolation_indices_and_weights(
            frame,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=geometry.merge,
        )
        places = (tower.pos_embed(table) * weights[:, :, None]).sum(dim=1).detach()
        self.register_buffer("places", places, persistent=False)  # [patches of a frame, hidden]
        blocks = list(getattr(tower, "deepstack_visual_indexes", ()))  # Qwen3.5 has none
        self.deep = sorted(blocks)
        self.mergers = nn.ModuleList([*(tower.deepstack_merger_list[blocks.index(block)] for block in self.deep), tower.merger])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image or video with their planes, the signals, and the indices that each cut kept."""
        patches = self.patch(pixel_values)
        placed = (patches.view(self.frames, *self.places.shape) + self.places).view(patches.shape)
        states, beside = self._encode(placed, self.deep)
        *planes, tokens = [merger(state) for merger, state in zip(self.mergers, states, strict=True)]
        merged = torch.cat([tokens, *planes], dim=1)[None]
        return (merged, *beside) if beside else merged


class InterleavedRope(nn.Module):
    """The text model's interleaved mRoPE, whose frequencies alternate between time, row and column.

    It gathers what transformers writes into slices, which would become a dozen scatters for TensorRT.
    """

    axes: torch.Tensor

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        axes = torch.zeros_like(rotary.inv_freq, dtype=torch.int64)
        for axis in (1, 2):
            axes[axis : 3 * rotary.mrope_section[axis] : 3] = axis
        self.register_buffer("axes", axes, persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and sines, each [S, head_dim], of positions [3, S]."""
        angles = positions.index_select(0, self.axes).float().transpose(0, 1) * self.rotary.inv_freq
        both, scale = torch.cat([angles, angles], dim=1), self.rotary.attention_scaling
        return both.cos() * scale, both.sin() * scale
