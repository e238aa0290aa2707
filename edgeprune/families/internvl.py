"""InternVL3 and 3.5: tiles and a thumbnail in InternViT with class tokens, pixel shuffle, and a Qwen2, Qwen3 or Llama decoder.

Zhu et al., arXiv 2504.10479, and Wang et al., arXiv 2508.18265; the modules are those of transformers'
models/internvl/modeling_internvl.py, which is for the "-hf" checkpoints. The position table is interpolated to the tile size once,
as a constant. The text is that of processing_internvl.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgeprune.bundle import ImageText
from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import DecoderParts, Family, check_text, text_decoder
from edgeprune.families.encoder import ViewEncoder, mean_over_heads, patch_linear, projected
from edgeprune.families.encoder_pruning import EncoderPruning, RowLayout
from edgeprune.plan import Cut, Geometry

_IMAGE = "<img><IMG_CONTEXT></img>"


class InternVL(Family):
    """The family of InternVLForConditionalGeneration."""

    name = "internvl"
    projects_tokens = True
    videos = True

    @staticmethod
    def check(config: Any) -> None:
        """Refuse unsupported encoders and decoders, and features other than the encoder's last."""
        check_text(config)
        vision = config.vision_config
        if vision.model_type != "internvl_vision":
            raise UnsupportedModelError(f"Its vision encoder {vision.model_type!r} is not supported, only 'internvl_vision' is.")
        if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "default":
            taken = f"layer {config.vision_feature_layer}, {config.vision_feature_select_strategy!r}"
            raise UnsupportedModelError(f"Its visual features ({taken}) are not supported, only layer -1, 'default' is.")
        if len(set(vision.patch_size)) > 1:
            raise UnsupportedModelError(f"Its patches of {vision.patch_size} pixels are not square, which is not supported.")

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's patches; a `size` of complete tiles sets their number.

        `crop_to_patches` is always on, as in InternVL's combined processor of text and images.
        """
        merge = int(1 / config.downsample_ratio)
        own = {**processor, "crop_to_patches": True, "patch_size": config.vision_config.patch_size[0], "merge_size": merge}
        tile = processor.get("size")
        if size is None or not isinstance(tile, Mapping) or size[0] % tile["height"] or size[1] % tile["width"]:
            return own
        tiles = (size[0] // tile["height"]) * (size[1] // tile["width"])
        return own | {"min_patches": tiles, "max_patches": tiles}

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the markers around all tiles of an image, or around each numbered frame of a video."""
        token = self._model.config.image_token_id
        if geometry.frames == 1:
            return ImageText("image", "<IMG_CONTEXT>", _IMAGE, token)
        frames = "\n".join(f"Frame{number}: {_IMAGE}" for number in range(1, geometry.frames + 1))
        return ImageText("video", "<video>", frames, token)

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder and projector for one layout of tiles; signals come from the class tokens."""
        return TileTower(self._model.model, geometry, EncoderPruning(cuts, geometry), signals=signals)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        return text_decoder(self._model.model.language_model, self._model.lm_head)


class TileTower(nn.Module):
    """The encoder and projector over equal tiles: patches [patches, 3 * P * P] to tokens [1, V, hidden].

    With `signals`, it also returns the attention that each token receives from its tile's class token in the penultimate block
    [V], averaged over heads, and its keys averaged over heads [V, head_dim], both averaged over its merged patches. These are
    adjacent from the input on.
    """

    places: torch.Tensor
    order: torch.Tensor

    def __init__(self, model: Any, geometry: Geometry, thinning: EncoderPruning, *, signals: bool = False) -> None:
        super().__init__()
        self.tower, self.projector, self.signals = model.vision_tower, model.multi_modal_projector, signals
        merge, patch = int(1 / model.config.downsample_ratio), geometry.patch
        self.views, view = len(geometry.layout), geometry.layout[0]
        rows, columns, self.merged = view.rows * merge, view.columns * merge, merge**2
        layers = self.tower.encoder.layer
        self.encoder = ScaledEncoder(
            layers,
            RowLayout(self.views, 1, self.merged),
            signal_layer=max(len(layers) - 2, 0) if signals else None,
            thinning=thinning,
        )
        self.patch = patch_linear(self.tower.embeddings.patch_embeddings.projection)
        self.blocks = len(self.encoder.layers)
        self.takes = (self.views * rows * columns, self.patch.in_features)
        with torch.no_grad():
            # The embedding of an all-zero image: class token plus position, then bias plus position of each patch.
            places = self.tower.embeddings(torch.zeros(1, 3, rows * patch, columns * patch))
        numbers = torch.arange(rows * columns).view(1, rows, columns, 1)
        order = model.pixel_shuffle(numbers, model.config.downsample_ratio).flatten()
        starts = torch.arange(self.views)[:, None] * (rows * columns)
        self.register_buffer("places", torch.cat([places[:, :1], places[:, 1:][:, order]], dim=1), persistent=False)
        self.register_buffer("order", (starts + order).flatten(), persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image or video, the signals, and the indices that each cut kept."""
        patches = self.patch(pixel_values.index_select(0, self.order)).unflatten(0, (self.views, -1)) + self.places[:, 1:]
        hidden = torch.cat([self.places[:, :1].expand(self.views, 1, -1), patches], dim=1).flatten(0, 1)
        (hidden,), beside = self.encoder(hidden)
        features = self.tower.layernorm(hidden).reshape(-1, self.merged * hidden.shape[1])
        return projected(self.projector, features, beside, signals=self.signals)


class ScaledEncoder(ViewEncoder):
    """InternViT's layers: queries and keys may be normalized, and residual branches are scaled per channel."""

    def layer(self, layer: Any, hidden: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output of one layer, its attention weights, and its keys averaged over heads [rows, head_dim]."""
        attn, normed = layer.attention, layer.layernorm_before(hidden)
        keys = attn.k_norm(attn.k_proj(normed))
        mixed, weights = self.attend(attn.q_norm(attn.q_proj(normed)), keys, attn.v_proj(normed), attn.num_heads)
        hidden = hidden + layer.lambda_1 * attn.projection_layer(mixed)
        return hidden + layer.lambda_2 * layer.mlp(layer.layernorm_after(hidden)), weights, mean_over_heads(keys, attn.num_heads)
