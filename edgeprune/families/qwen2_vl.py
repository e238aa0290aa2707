"""Qwen2-VL: mRoPE decoder, vision tower with 2-D rotary positions and full attention, patch merger.

Wang et al., arXiv 2409.12191; the modules are those of transformers' models/qwen2_vl/modeling_qwen2_vl.py. A bundle's image
has one fixed grid, so the tower's rotary tables are constants and its per-image attention windows vanish.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb, get_vision_position_ids

from edgeprune.errors import UnsupportedModelError, UsageError
from edgeprune.families.base import DecoderParts
from edgeprune.plan import Geometry


class Qwen2VL:
    """Where the parts of a Qwen2VLForConditionalGeneration are."""

    name = "qwen2_vl"
    position_axes = 3
    signals = ("vision attention",)

    def __init__(self, model: Any) -> None:
        self._model = model

    @staticmethod
    def check(config: Any) -> None:
        """Refuse sliding windows and quantized weights."""
        if any(kind != "full_attention" for kind in config.text_config.layer_types):
            raise UnsupportedModelError("This Qwen2-VL uses sliding-window attention, which is not supported.")
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedModelError(
                "This checkpoint is quantized.", hint="Export the original weights; EdgePrune quantizes by itself."
            )

    @staticmethod
    def geometry(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None) -> Geometry:
        """Return the geometry; without `size`, a square of the processor's smallest area when that is its only one."""
        vision = config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        if size is None:
            size = _default_size(processor, unit)
        if size[0] % unit or size[1] % unit or min(size) <= 0:
            raise UsageError(f"Image size {size[0]}x{size[1]} does not divide into {unit}-pixel visual tokens.")
        return Geometry(size[0], size[1], vision.patch_size, vision.spatial_merge_size)

    def vision(self, geometry: Geometry, *, signals: bool = False) -> nn.Module:
        """Return the vision tower for one fixed grid, and with `signals` what its last block but one attends to."""
        return VisionTower(self._model.model.visual, geometry, signals=signals)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        text = self._model.model.language_model
        config = text.config
        return DecoderParts(
            layers=text.layers,
            norm=text.norm,
            lm_head=self._model.lm_head,
            embed_tokens=text.embed_tokens,
            rope=_Rope(text.rotary_emb),
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
        )


class VisionTower(nn.Module):
    """The tower and merger over one image of a fixed grid: patches [patches, C * T * P * P] to tokens [1, V, hidden].

    With `signals`, also from the last block but one: the attention that a token receives [V], averaged over heads and queries,
    and its keys [V, heads * head_dim], both averaged over the patches that are merged into it. There is no class token to ask
    instead.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, tower: Any, geometry: Geometry, *, signals: bool = False) -> None:
        super().__init__()
        self.tower = tower
        # The kernel is as large as its stride: a convolution over one patch is a matrix product.
        kernel = tower.patch_embed.proj.weight
        self.patch = nn.Linear(kernel[0].numel(), kernel.shape[0], bias=False, device="meta")
        self.patch.weight = nn.Parameter(kernel.flatten(1), requires_grad=False)
        self.merged = geometry.merge**2
        self.signal_block = max(len(tower.blocks) - 2, 0) if signals else -1
        grid = torch.tensor([[1, geometry.height // geometry.patch, geometry.width // geometry.patch]])
        where = get_vision_position_ids(grid, geometry.merge)
        cos, sin = tower.rotary_pos_emb(tower.patch_embed.proj.weight, where)
        self.register_buffer("cos", cos[None], persistent=False)
        self.register_buffer("sin", sin[None], persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image, and the signals."""
        hidden = self.patch(pixel_values)
        signals: tuple[torch.Tensor, ...] = ()
        for index, block in enumerate(self.tower.blocks):
            mixed, weights, keys = self._attend(index, block.attn, block.norm1(hidden))
            if index == self.signal_block:
                received = weights.mean(dim=(0, 1)).view(-1, self.merged).mean(dim=1)
                signals = (received, keys.transpose(0, 1).reshape(received.shape[0], self.merged, -1).mean(dim=1))
            hidden = hidden + mixed
            hidden = hidden + block.mlp(block.norm2(hidden))
        merged: torch.Tensor = self.tower.merger(hidden)
        return (merged[None], *signals) if signals else merged[None]

    def _attend(self, index: int, attn: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (hidden.shape[0], 3, attn.num_heads, attn.head_dim)
        query, key, value = attn.qkv(hidden).view(shape).permute(1, 2, 0, 3).unbind(0)  # [heads, patches, head_dim]
        query, key = apply_rotary_pos_emb(query, key, self.cos, self.sin, unsqueeze_dim=0)
        query, key = query[0], key[0]
        mixed, weights = self._mix(index, query * attn.scaling, key, value)
        return attn.proj(mixed.transpose(0, 1).flatten(1)), weights, key

    def _mix(self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # What a block attends to, and how: every patch to every other one.
        weights = torch.softmax(query @ key.transpose(1, 2), dim=-1)
        return weights @ value, weights


class _Rope(nn.Module):
    # The text model's mRoPE for positions [3, S]; the Hugging Face module wants a batch axis.
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        reference = self.rotary.inv_freq
        cos, sin = self.rotary(reference, positions[:, None])
        return cos[0], sin[0]


def _default_size(processor: Mapping[str, Any], unit: int) -> tuple[int, int]:
    area = processor.get("size") or {}
    smallest = area.get("shortest_edge", processor.get("min_pixels"))
    largest = area.get("longest_edge", processor.get("max_pixels"))
    side = math.isqrt(smallest) if smallest else 0
    if smallest != largest or side * side != smallest or side % unit:
        raise UsageError("This model takes images of any size, but a bundle has one.", hint="Give --image-size 448x448, say.")
    return side, side
