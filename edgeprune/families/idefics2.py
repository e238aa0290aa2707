"""Idefics2: images of any shape in an encoder like SigLIP's, resampled into a few latents, a Mistral decoder.

Laurençon et al., arXiv 2405.02246; the modules are those of transformers' models/idefics2/modeling_idefics2.py. Position ids by
fractional coordinates (NaViT, arXiv 2307.06304) are constants of one geometry, and no view is padded, so the masks vanish. The text
is that of processing_idefics2.py: neighbouring images share a mark, and a space sets the last one off from a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgeprune.bundle import ImageText
from edgeprune.families.base import DecoderParts, Family, check_text, text_decoder
from edgeprune.families.encoder import ViewEncoder, patch_linear
from edgeprune.families.encoder_pruning import RowLayout
from edgeprune.plan import Cut, Geometry

_FAKE, _IMAGE = "<fake_token_around_image>", "<image>"


class Idefics2(Family):
    """Where the parts of an Idefics2ForConditionalGeneration are."""

    name = "idefics2"
    signals = ()
    no_signals_reason = "the latents of its resampler stand for no place in the image"
    no_encoder_cuts_reason = "a resampler makes as many latents of any patches"

    @staticmethod
    def check(config: Any) -> None:
        """Refuse quantized weights and text models that are no plain decoder."""
        check_text(config)

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's patches and latents; with `size`, such that it bounds the edges.

        A limit is only ever lowered: quarters of an image are as large as the whole only where the old one still holds.
        """
        model = {"patch_size": config.vision_config.patch_size, "latents": config.perceiver_config.resampler_n_latents}
        edges = dict(processor.get("size") or {"shortest_edge": 378, "longest_edge": 980})
        if size is not None and set(edges) == {"shortest_edge", "longest_edge"}:
            edges = {"shortest_edge": min(edges["shortest_edge"], *size), "longest_edge": min(edges["longest_edge"], max(size))}
        return {**processor, **model, "size": edges}

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the views, with one mark before each and one at the end."""
        text = (_FAKE + _IMAGE) * len(geometry.layout) + _FAKE
        return ImageText("image", _IMAGE, text, self._model.config.image_token_id, boundary=_FAKE)

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder and resampler for one layout of views."""
        del signals, cuts  # it has neither
        return ResampledTower(self._model.model, geometry)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        return text_decoder(self._model.model.text_model, self._model.lm_head)


class ResampledTower(nn.Module):
    """The encoder and resampler: patches [patches, 3 * P * P] of equal views to their latents [1, views * latents, hidden]."""

    places: torch.Tensor

    def __init__(self, model: Any, geometry: Geometry) -> None:
        super().__init__()
        self.tower, self.projection = model.vision_model, model.connector.modality_projection
        self.resampler = Resampler(model.connector.perceiver_resampler, len(geometry.layout))
        self.encoder = ViewEncoder(self.tower.encoder.layers, RowLayout(len(geometry.layout)))
        self.patch = patch_linear(self.tower.embeddings.patch_embedding)
        whole, side = geometry.layout[-1], self.tower.embeddings.patch_size  # quarters are brought to the size of the whole
        rows, columns = whole.height // side, whole.width // side
        self.blocks = len(self.encoder.layers)
        self.takes = (len(geometry.layout) * rows * columns, self.patch.in_features)
        places = empty_picture(self.tower.embeddings, rows, columns)
        self.register_buffer("places", places.repeat(len(geometry.layout), 1), persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the latents of one image."""
        (hidden,), _ = self.encoder(self.patch(pixel_values) + self.places)
        latents: torch.Tensor = self.resampler(self.projection(self.tower.post_layernorm(hidden)))
        return latents[None]


def empty_picture(embeddings: Any, rows: int, columns: int) -> torch.Tensor:
    """Return what a picture of zeros becomes, that is the bias and the position of each patch [rows * columns, width]."""
    side = embeddings.patch_size
    with torch.no_grad():
        zeros, there = torch.zeros(1, 3, rows * side, columns * side), torch.ones(1, rows, columns, dtype=torch.bool)
        places: torch.Tensor = embeddings(zeros, there)[0]
    return places


class Resampler(nn.Module):
    """The perceiver resampler: latents attend to a view's patches and to themselves; its matrices act on rows of tokens."""

    def __init__(self, resampler: Any, views: int) -> None:
        super().__init__()
        self.resampler, self.views = resampler, views

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """Return the latents [views * latents, hidden] of views with as many patches each [views * patches, hidden]."""
        views, latents = self.views, self.resampler.latents.repeat(self.views, 1)
        for layer in self.resampler.layers:
            asking, shown = layer.input_latents_norm(latents), layer.input_context_norm(context)
            seen = torch.cat([shown.unflatten(0, (views, -1)), asking.unflatten(0, (views, -1))], dim=1).flatten(0, 1)
            latents = latents + _attend(layer.self_attn, asking, seen, views)
            latents = latents + layer.mlp(layer.post_attention_layernorm(latents))
        normed: torch.Tensor = self.resampler.norm(latents)
        return normed


def _attend(attn: Any, asking: torch.Tensor, seen: torch.Tensor, views: int) -> torch.Tensor:
    # Rows [views * latents, hidden] over rows [views * (patches + latents), hidden], each view by itself.
    heads, size = attn.num_key_value_heads, attn.head_dim
    query = attn.q_proj(asking).view(views, -1, heads, attn.num_key_value_groups, size).permute(0, 2, 3, 1, 4)
    key, value = (project(seen).view(views, -1, heads, 1, size).permute(0, 2, 3, 1, 4) for project in (attn.k_proj, attn.v_proj))
    weights = torch.softmax(query * attn.scaling @ key.transpose(-1, -2), dim=-1)
    mixed: torch.Tensor = attn.o_proj((weights @ value).permute(0, 3, 1, 2, 4).reshape(asking.shape[0], -1))
    return mixed
