"""Mistral Small 3.1 and Ministral 3: Pixtral's encoder with 2-D rotary positions, a patch merger, and a Mistral decoder.

The modules are those of transformers' models/mistral3/modeling_mistral3.py and models/pixtral/modeling_pixtral.py (Agrawal et al.,
arXiv 2410.07073). A bundle's image has one fixed grid, so the rotary tables are constants, and the patches of a visual token are
adjacent from the input on. The text is that of processing_pixtral.py: a token of text ends each row of visual tokens.

Pixtral-12B has the same encoder and text behind LLaVA's projector: `edgeprune.families.llava` uses them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.pixtral.modeling_pixtral import apply_rotary_pos_emb

from edgeprune.bundle import ImageText
from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import DecoderParts, Family, check_text, text_decoder
from edgeprune.families.encoder import PIXTRAL, ProjectedView, ViewEncoder, check_encoder, patch_linear
from edgeprune.families.encoder_pruning import EncoderPruning, RowLayout
from edgeprune.plan import Cut, Geometry

_IMAGE, _BREAK, _END = "[IMG]", "[IMG_BREAK]", "[IMG_END]"


class Mistral3(Family):
    """The family of Mistral3ForConditionalGeneration."""

    name = "mistral3"
    projects_tokens = True

    @staticmethod
    def check(config: Any) -> None:
        """Refuse unsupported encoders and decoders, and features of several layers."""
        check_text(config)
        check_encoder(config, PIXTRAL)
        if not isinstance(config.vision_feature_layer, int):
            raise UnsupportedModelError(
                f"Its visual features of several layers ({config.vision_feature_layer}) do not fit its projector's norm."
            )

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's patches; `size` limits height and width."""
        return pixtral_settings(config, processor, size, config.spatial_merge_size)

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the text of an image: a placeholder token for each row, and a token of text after it."""
        return pixtral_text(self._model.config, geometry)

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder, patch merger and projector; signals come from the layer before the features."""
        model = self._model.model
        projector = MergingProjector(model.multi_modal_projector, geometry.merge**2)
        return pixtral_view(model.vision_tower, geometry, self._model.config.vision_feature_layer, cuts, projector, signals=signals)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        return text_decoder(self._model.model.language_model, self._model.lm_head)


def pixtral_settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None, merge: int) -> dict[str, Any]:
    """Return Pixtral's image processor settings with the model's patches, `merge` along each side of a visual token."""
    limit = {} if size is None else {"size": {"height": size[0], "width": size[1]}}
    return {**processor, "patch_size": config.vision_config.patch_size, "merge_size": merge, **limit}


def pixtral_text(config: Any, geometry: Geometry) -> ImageText:
    """Return the text of an image: a placeholder token for each row, with a break after it, and an end after the last."""
    return ImageText("image", _IMAGE, (_IMAGE + _BREAK) * (geometry.rows - 1) + _IMAGE + _END, config.image_token_id)


def pixtral_view(
    tower: Any, geometry: Geometry, layers: int | Sequence[int], cuts: Sequence[Cut], projector: nn.Module, *, signals: bool
) -> ProjectedView:
    """Return the module from patches to visual tokens; `layers`: how many run before the features, as in FeatureEncoder."""
    encoder = PixtralEncoder(tower, geometry, layers, EncoderPruning(cuts, geometry), signals=signals)
    return ProjectedView(encoder, projector, signals=signals)


class PixtralEncoder(nn.Module):
    """The encoder over one grid: patches [patches, 3 * P * P] in reading order to features [patches, layers * width].

    The patches of a visual token are adjacent in the features. With `signals`, it also returns the attention that each visual token
    receives [V], averaged over heads, queries and its patches, and the mean of its keys [V, head_dim], with their rotary positions.
    """

    order: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self, tower: Any, geometry: Geometry, layers: int | Sequence[int], thinning: EncoderPruning, *, signals: bool
    ) -> None:
        super().__init__()
        blocks, merge = tower.transformer.layers, geometry.merge
        features = [range(len(blocks) + 1)[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        self.blocks, self.norm, self.patch = max(features), tower.ln_pre, patch_linear(tower.patch_conv)
        self.takes = (geometry.tokens * merge**2, self.patch.in_features)
        rows = RowLayout(1, merged=merge**2)
        signal_layer = max(min(self.blocks, len(blocks) - 1) - 1, 0) if signals else None
        self.encoder = RotaryEncoder(blocks[: self.blocks], rows, features=features, signal_layer=signal_layer, thinning=thinning)
        places = torch.cartesian_prod(torch.arange(geometry.rows * merge), torch.arange(geometry.columns * merge))
        order = torch.arange(len(places)).view(geometry.rows, merge, geometry.columns, merge).transpose(1, 2).flatten()
        tables = tower.patch_positional_embedding(tower.patch_conv.weight, places[order])
        for name, table in zip(("order", "cos", "sin"), (order, *tables), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the features, and a tuple of the signals, if enabled, and the indices that each cut kept."""
        patches = self.patch(pixel_values.index_select(0, self.order))
        features, beside = self.encoder(self.norm(patches), self.cos, self.sin)
        return torch.cat(features, dim=1), beside


class RotaryEncoder(ViewEncoder):
    """Pixtral's layers over one view; `tables`: cosines and sines [patches, head_dim]."""

    def layer(self, layer: Any, hidden: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output of one layer, its attention weights, and its keys averaged over heads [patches, head_dim]."""
        attn, normed = layer.attention, layer.attention_norm(hidden)
        shape = (-1, attn.num_heads, attn.head_dim)
        states = (project(normed).view(shape).transpose(0, 1) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
        query, key, value = states  # [heads, patches, head_dim]
        query, key = apply_rotary_pos_emb(query, key, *tables, unsqueeze_dim=0)
        weights = torch.softmax((query * attn.scaling) @ key.transpose(1, 2), dim=-1)
        hidden = hidden + attn.o_proj((weights @ value).transpose(0, 1).flatten(1))
        return hidden + layer.feed_forward(layer.ffn_norm(hidden)), weights[None], key.mean(dim=0)


class MergingProjector(nn.Module):
    """Mistral 3's projector, given the `merged` patches of each visual token one after the other."""

    def __init__(self, projector: Any, merged: int) -> None:
        super().__init__()
        self.projector, self.merged = projector, merged
        self.width = projector.norm.weight.shape[0]  # of a patch

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the visual tokens [V, hidden] of patches [V * merged, width], or of tokens [V, merged * width]."""
        parts = self.projector
        patches = patches.reshape(-1, self.width)
        # The merger's columns are ordered by channel, then by patch, as torch's unfold orders them.
        joined = parts.norm(patches).view(-1, self.merged, self.width).transpose(1, 2).flatten(1)
        visual: torch.Tensor = parts.linear_2(parts.act(parts.linear_1(parts.patch_merger.merging_layer(joined))))
        return visual
