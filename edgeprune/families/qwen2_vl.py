"""Qwen2-VL: a decoder with mRoPE, a vision tower with 2-D rotary positions and full attention within a frame, and a patch merger.

Wang et al., arXiv 2409.12191; the modules are those of transformers' models/qwen2_vl/modeling_qwen2_vl.py. A bundle's image has one
fixed grid, so the tower's rotary tables are constants. All frames of a video have the same grid and attend in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb, get_vision_position_ids

from edgeprune.bundle import ImageText
from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import DecoderParts, Family
from edgeprune.families.encoder_pruning import EncoderPruning, RowLayout, SurvivingTokens
from edgeprune.plan import Cut, Geometry

Signal = Callable[[], torch.Tensor]


class Qwen2VL(Family):
    """The family of Qwen2VLForConditionalGeneration."""

    name = "qwen2_vl"
    position_axes = 3
    videos = True

    @staticmethod
    def check(config: Any) -> None:
        """Refuse sliding windows, and rotary positions that depend on the length."""
        if any(kind != "full_attention" for kind in getattr(config.text_config, "layer_types", None) or ()):
            raise UnsupportedModelError("This model uses sliding-window attention, which is not supported.")
        if (rope := config.text_config.rope_parameters["rope_type"]) in ("dynamic", "longrope"):
            raise UnsupportedModelError(f"This model's {rope!r} rotary positions depend on the length, which is not supported.")

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings; with `size`, every image is brought to that area."""
        area = {} if size is None else {"size": dict.fromkeys(("shortest_edge", "longest_edge"), size[0] * size[1])}
        return {key: value for key, value in processor.items() if not area or key not in ("min_pixels", "max_pixels")} | area

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the placeholder token of an image, or of all frames of a video."""
        kind = "video" if geometry.frames > 1 else "image"
        return ImageText(kind, f"<|{kind}_pad|>", f"<|{kind}_pad|>", getattr(self._model.config, f"{kind}_token_id"))

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the vision tower for one fixed grid; signals come from the penultimate block."""
        return VisionTower(self._model.model.visual, geometry, EncoderPruning(cuts, geometry), signals=signals)

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
            context=config.max_position_embeddings,
        )


class VisionTower(nn.Module):
    """The tower and merger over the frames of one fixed grid: patches [patches, C * T * P * P] to tokens [1, V, hidden].

    With `signals`, it also returns the attention that each token receives in the penultimate block [V], averaged over heads and
    queries (there is no class token), and its keys averaged over heads [V, head_dim], both averaged over its merged patches. With
    cuts in the encoder, the last outputs are the indices in the image that each cut kept.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, tower: Any, geometry: Geometry, thinning: EncoderPruning, *, signals: bool = False) -> None:
        super().__init__()
        self.tower, self.thinning = tower, thinning
        self.blocks = len(tower.blocks)
        thinning.check(self.blocks)
        # The kernel equals its stride, so the convolution of one patch is a matrix product.
        kernel, bias = tower.patch_embed.proj.weight, tower.patch_embed.proj.bias
        self.patch = nn.Linear(kernel[0].numel(), kernel.shape[0], bias=bias is not None, device="meta")
        self.patch.weight, self.patch.bias = nn.Parameter(kernel.flatten(1), requires_grad=False), bias
        self.merged, self.frames = geometry.merge**2, len(geometry.layout)
        self.rows = RowLayout(self.frames, merged=self.merged)
        self.takes = (geometry.tokens * self.merged, self.patch.in_features)
        self.signal_block = max(len(tower.blocks) - 2, 0) if signals else -1
        tables = tower.rotary_pos_emb(kernel, get_vision_position_ids(patch_grid(geometry), geometry.merge))
        for name, table in zip(("cos", "sin"), tables, strict=True):
            self.register_buffer(name, table[None], persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image or video, the signals, and the indices that each cut kept."""
        (last,), beside = self._encode(self.patch(pixel_values))
        merged: torch.Tensor = self.tower.merger(last)
        return (merged[None], *beside) if beside else merged[None]

    def _encode(
        self, hidden: torch.Tensor, state_blocks: Collection[int] = ()
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        # Returns the states after `state_blocks`, in ascending order, and after the last block; the signals and each cut's indices.
        states, kept, signals = list[torch.Tensor](), [self.thinning.order], tuple[torch.Tensor, ...]()
        tables = self.cos, self.sin
        for index, block in enumerate(self.tower.blocks):
            mixed, attention, keys = self._attend(index, block.attn, block.norm1(hidden), tables, kept[-1])
            if index == self.signal_block:
                signals = self._received(attention), self.rows.means(keys.mean(dim=0))
            hidden = hidden + mixed
            hidden = hidden + block.mlp(block.norm2(hidden))
            states += [hidden] if index in state_blocks else []
            if index + 1 in self.thinning.cuts:
                pick = self.thinning.pick(index + 1, SurvivingTokens(kept[-1], partial(self._received, attention)), self.rows)
                hidden, *states = map(pick.patches, (hidden, *states))
                tables = pick.patches(tables[0][0])[None], pick.patches(tables[1][0])[None]
                signals = tuple(map(pick.tokens, signals))
                kept.append(pick.tokens(kept[-1]))
        return [*states, hidden], (*signals, *kept[1:])

    def _attend(
        self, index: int, attn: Any, hidden: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], order: torch.Tensor
    ) -> tuple[torch.Tensor, Signal, torch.Tensor]:
        shape = (hidden.shape[0], 3, attn.num_heads, attn.head_dim)
        query, key, value = attn.qkv(hidden).view(shape).permute(1, 2, 0, 3).unbind(0)  # [heads, patches, head_dim]
        query, key = apply_rotary_pos_emb(query, key, *tables, unsqueeze_dim=0)
        parts = [rows.reshape(-1, shape[0] // self.frames, shape[3]) for rows in (query * attn.scaling, key, value)]
        mixed, received = self._mix(index, parts[0], parts[1], parts[2], order)
        return attn.proj(mixed.reshape(value.shape).transpose(0, 1).flatten(1)), received, key[0]

    def _mix(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, order: torch.Tensor
    ) -> tuple[torch.Tensor, Signal]:
        # Attention among all patches of a frame [heads * frames, patches per frame, head_dim], and a function for the attention
        # that each patch receives [heads * frames, patches per frame], the mean over the frame's queries.
        weights = torch.softmax(query @ key.transpose(1, 2), dim=-1)
        return weights @ value, partial(weights.mean, dim=1)

    def _received(self, attention: Signal) -> torch.Tensor:
        patches: torch.Tensor = attention()
        return self.rows.means(patches.view(-1, self.frames, patches.shape[1]).mean(dim=0).flatten())


def patch_grid(geometry: Geometry) -> torch.Tensor:
    """Return the number of frames and the rows and columns of patches in each [1, 3]."""
    return torch.tensor([[len(geometry.layout), geometry.height // geometry.patch, geometry.width // geometry.patch]])


class _Rope(nn.Module):
    # The text model's mRoPE for positions [3, S]; the Hugging Face module requires a batch axis.
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rotary(self.rotary.inv_freq, positions[:, None])
        return cos[0], sin[0]
