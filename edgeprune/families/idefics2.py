"""Idefics2: a SigLIP-like encoder for images of any shape, a resampler into a few latents, and a Mistral decoder.

Laurençon et al., arXiv 2405.02246; the modules are those of transformers' models/idefics2/modeling_idefics2.py. Position ids from
fractional coordinates (NaViT, arXiv 2307.06304) are constants of one geometry. No view is padded, so no masks are needed. The text
is that of processing_idefics2.py: adjacent images share a marker, and a space separates the last marker from a word.
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
    """The family of Idefics2ForConditionalGeneration."""

    name = "idefics2"
    signals = ()
    no_signals_reason = "the latents of its resampler stand for no place in the image"
    no_encoder_cuts_reason = "a resampler makes as many latents of any patches"

    @staticmethod
    def check(config: Any) -> None:
        """Refuse unsupported text models."""
        check_text(config)

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's patches and latents; `size` limits the edges.

        Limits are only lowered: beyond the old ones the quarters of an image would differ in size from the full image.
        """
        model = {"patch_size": config.vision_config.patch_size, "latents": config.perceiver_config.resampler_n_latents}
        edges = dict(processor.get("size") or {"shortest_edge": 378, "longest_edge": 980})
        if size is not None and set(edges) == {"shortest_edge", "longest_edge"}:
            edges = {"shortest_edge": min(edges["shortest_edge"], *size), "longest_edge": min(edges["longest_edge"], max(size))}
        return {**processor, **model, "size": edges}

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the text of an image: one marker before each view and one at the end."""
        text = (_FAKE + _IMAGE) * len(geometry.layout) + _FAKE
        return ImageText("image", _IMAGE, text, self._model.config.image_token_id, boundary=_FAKE)

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder and resampler for one layout of views."""
        del signals, cuts  # this family supports neither
        return ResampledTower(self._model.model, geometry)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        return text_decoder(self._model.model.text_model, self._model.lm_head)


class ResampledTower(nn.Module):
    """The encoder and resampler: patches [patches, 3 * P * P] of equal views to latents [1, views * latents, hidden]."""

    places: torch.Tensor

    def __init__(self, model: Any, geometry: Geometry) -> None:
        super().__init__()
        self.tower, self.projection = model.vision_model, model.connector.modality_projection
        self.resampler = Resampler(model.connector.perceiver_resampler, len(geometry.layout))
        self.encoder = ViewEncoder(self.tower.encoder.layers, RowLayout(len(geometry.layout)))
        self.patch = patch_linear(self.tower.embeddings.patch_embedding)
        overview, side = geometry.layout[-1], self.tower.embeddings.patch_size  # quarters are resized to the overview's size
        rows, columns = overview.height // side, overview.width // side
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
    """Return the embedding of an all-zero image, that is the bias plus the position of each patch [rows * columns, width]."""
    side = embeddings.patch_size
    with torch.no_grad():
        zeros, mask = torch.zeros(1, 3, rows * side, columns * side), torch.ones(1, rows, columns, dtype=torch.bool)
        places: torch.Tensor = embeddings(zeros, mask)[0]
    return places


class Resampler(nn.Module):
    """The perceiver resampler: latents attend to the patches of their view and to each other; matrices act on rows of tokens."""

    def __init__(self, resampler: Any, views: int) -> None:
        super().__init__()
        self.resampler, self.views = resampler, views

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """Return the latents [views * latents, hidden] of views with equally many patches [views * patches, hidden]."""
        views, latents = self.views, self.resampler.latents.repeat(self.views, 1)
        for layer in self.resampler.layers:
            queries, patches = layer.input_latents_norm(latents), layer.input_context_norm(context)
            keys = torch.cat([patches.unflatten(0, (views, -1)), queries.unflatten(0, (views, -1))], dim=1).flatten(0, 1)
            latents = latents + _attend(layer.self_attn, queries, keys, views)
            latents = latents + layer.mlp(layer.post_attention_layernorm(latents))
        normed: torch.Tensor = self.resampler.norm(latents)
        return normed


def _attend(attn: Any, queries: torch.Tensor, keys: torch.Tensor, views: int) -> torch.Tensor:
    # Queries [views * latents, hidden] attend to keys [views * (patches + latents), hidden] of their own view.
    heads, size = attn.num_key_value_heads, attn.head_dim
    query = attn.q_proj(queries).view(views, -1, heads, attn.num_key_value_groups, size).permute(0, 2, 3, 1, 4)
    key, value = (project(keys).view(views, -1, heads, 1, size).permute(0, 2, 3, 1, 4) for project in (attn.k_proj, attn.v_proj))
    weights = torch.softmax(query * attn.scaling @ key.transpose(-1, -2), dim=-1)
    mixed: torch.Tensor = attn.o_proj((weights @ value).permute(0, 3, 1, 2, 4).reshape(queries.shape[0], -1))
    return mixed
