"""Gemma 3: one square view in SigLIP, its patches averaged to 256 visual tokens, and a decoder of local and global layers.

Gemma Team, arXiv 2503.19786; the modules are those of transformers' models/gemma3/modeling_gemma3.py. The visual tokens of one
image attend to each other, in local layers within the window. Pan and scan, which adds crops of oblong images, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgeprune.bundle import ImageText
from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import DecoderParts, Family
from edgeprune.families.encoder import SIGLIP, ViewEncoder, check_encoder, check_grid, patch_linear, projected
from edgeprune.families.encoder_pruning import EncoderPruning, RowLayout
from edgeprune.families.gemma import gemma3_decoder
from edgeprune.plan import Cut, Geometry

_BEGIN, _TOKEN, _END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
_ROPES = ("default", "linear")


class Gemma3(Family):
    """The family of Gemma3ForConditionalGeneration."""

    name = "gemma3"
    projects_tokens = True
    position_axes = 2

    @staticmethod
    def check(config: Any) -> None:
        """Refuse other encoders, bidirectional text, and positions or pooling of another kind."""
        check_encoder(config, SIGLIP)
        text, side = config.text_config, config.vision_config.image_size // config.vision_config.patch_size
        if text.model_type != "gemma3_text":
            raise UnsupportedModelError(
                f"Its text model {text.model_type!r} is not supported behind 'gemma3'.", hint="Supported: 'gemma3_text'."
            )
        if text.use_bidirectional_attention:
            raise UnsupportedModelError("Its text is bidirectional (use_bidirectional_attention), which is not supported.")
        kinds = {each["rope_type"] for each in text.rope_parameters.values()} - set(_ROPES)
        if kinds:
            raise UnsupportedModelError(f"Its rotary positions of type {min(kinds)!r} are not supported behind 'gemma3'.")
        if side % _tokens_along(config) or _tokens_along(config) ** 2 != config.mm_tokens_per_image:
            raise UnsupportedModelError(
                f"Its {side} x {side} patches cannot be averaged to {config.mm_tokens_per_image} visual tokens of one size."
            )

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's patches; images have a fixed size, so `size` has no effect."""
        vision = config.vision_config
        merge = vision.image_size // vision.patch_size // _tokens_along(config)
        return {**processor, "patch_size": vision.patch_size, "merge_size": merge}

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the text of an image: the placeholder begins it."""
        return ImageText("image", _BEGIN, f"\n\n{_BEGIN}{_TOKEN}{_END}\n\n", self._model.config.image_token_id)

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder and projector; signals come from the penultimate layer."""
        check_grid(self._model.config, geometry.rows * geometry.merge, geometry.columns * geometry.merge)
        return PooledTower(self._model.model, geometry, EncoderPruning(cuts, geometry), signals=signals)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        return gemma3_decoder(self._model.model.language_model, self._model.lm_head)


class PooledTower(nn.Module):
    """The encoder, the average over squares of patches, and the projector: patches [patches, 3 * P * P] to tokens [1, V, hidden].

    With `signals`, it also returns the attention that each token receives in the penultimate layer [V], averaged over heads and
    queries, and its keys averaged over heads [V, head_dim], both averaged over its patches. These are adjacent from the input on.
    """

    places: torch.Tensor
    order: torch.Tensor

    def __init__(self, model: Any, geometry: Geometry, thinning: EncoderPruning, *, signals: bool = False) -> None:
        super().__init__()
        tower, projector, merge = model.vision_tower, model.multi_modal_projector, geometry.merge
        layers, self.rows = tower.encoder.layers, RowLayout(1, merged=merge**2)
        self.encoder = ViewEncoder(layers, self.rows, signal_layer=max(len(layers) - 2, 0) if signals else None, thinning=thinning)
        self.patch, self.norm = patch_linear(tower.embeddings.patch_embedding), tower.post_layernorm
        self.projector = nn.Sequential(projector.mm_soft_emb_norm, _linear(projector.mm_input_projection_weight))
        self.blocks, self.signals = len(self.encoder.layers), signals
        self.takes = (geometry.tokens * merge**2, self.patch.in_features)
        side = tower.embeddings.image_size
        with torch.no_grad():
            places = tower.embeddings(torch.zeros(1, 3, side, side))[0]
        grid = torch.arange(len(places)).view(geometry.rows, merge, geometry.columns, merge)
        self.register_buffer("order", grid.transpose(1, 2).flatten(), persistent=False)
        self.register_buffer("places", places[self.order], persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image, the signals, and the indices that each cut kept."""
        (hidden,), beside = self.encoder(self.patch(pixel_values.index_select(0, self.order)) + self.places)
        return projected(self.projector, self.rows.means(self.norm(hidden)), beside, signals=self.signals)


def _tokens_along(config: Any) -> int:
    return int(config.mm_tokens_per_image**0.5)


def _linear(weight: torch.Tensor) -> nn.Linear:
    # A matrix [in, out] as a linear layer without bias.
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
    return linear
