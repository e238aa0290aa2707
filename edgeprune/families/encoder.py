"""Vision transformers over equal views, with the features of CLIP and SigLIP as LLaVA and related families use them.

Every patch attends to all patches of its view. The layers are transformers' own, in the form that SigLIP, CLIP and Idefics share
(norm, attention, norm, MLP). Attention is ours, so that matrices act on rows of patches; theirs adds a batch axis for the views.

The modules are those of transformers' models/clip/modeling_clip.py and models/siglip/modeling_siglip.py. Images have one size, so
the embedding of an all-zero image (class token, bias, positions) is a constant. Layers after the last feature never run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from edgeprune.errors import UnsupportedModelError
from edgeprune.families.encoder_pruning import EncoderPruning, RowLayout, SurvivingTokens
from edgeprune.plan import Geometry

CLIP, SIGLIP, PIXTRAL = "clip_vision_model", "siglip_vision_model", "pixtral"


class ViewEncoder(nn.Module):
    """Encoder layers with cuts between them: rows [views * rows per view, width] to patches [views * patches, width].

    `features`: how many layers run before each feature, by default all. `signal_layer`: the index of the layer that gives signals.
    """

    def __init__(
        self,
        layers: Any,
        rows: RowLayout,
        *,
        features: Sequence[int] = (),
        signal_layer: int | None = None,
        thinning: EncoderPruning | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.rows, self.views = layers, rows, rows.views
        self.features = tuple(features) or (len(layers),)
        self.signal_layer, self.thinning = signal_layer, thinning
        if thinning is not None:
            thinning.check(len(layers))

    def forward(self, hidden: torch.Tensor, *tables: torch.Tensor) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Return the features, and a tuple of the signals and the indices in the image [K] that each cut kept.

        Signals are the attention that each visual token receives [V] and its keys, averaged over heads [V, head_dim]. `tables`:
        constants of each row that the layers need, such as rotary positions; they go along with the rows.
        """
        states, signals, kept = {0: hidden}, tuple[torch.Tensor, ...](), [] if self.thinning is None else [self.thinning.order]
        for index, layer in enumerate(self.layers):
            hidden, weights, keys = self.layer(layer, states[index], *tables)
            states = {number: rows for number, rows in states.items() if number in self.features} | {index + 1: hidden}
            if index == self.signal_layer:
                signals = self.rows.received(weights), self.rows.means(keys)
            if self.thinning is not None and index + 1 in self.thinning.cuts:
                pick = self.thinning.pick(index + 1, SurvivingTokens(kept[-1], partial(self.rows.received, weights)), self.rows)
                states = {number: pick.patches(rows) for number, rows in states.items()}
                tables = tuple(map(pick.patches, tables))
                signals = tuple(map(pick.tokens, signals))
                kept.append(pick.tokens(kept[-1]))
        return [self.rows.patches(states[number]) for number in self.features], (*signals, *kept[1:])

    def layer(self, layer: Any, hidden: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the output of one layer, its attention weights, and its keys averaged over heads [rows, head_dim]."""
        attn, normed = layer.self_attn, layer.layer_norm1(hidden)
        keys = attn.k_proj(normed)
        mixed, weights = self.attend(attn.q_proj(normed), keys, attn.v_proj(normed), attn.num_heads)
        hidden = hidden + attn.out_proj(mixed)
        return hidden + layer.mlp(layer.layer_norm2(hidden)), weights, mean_over_heads(keys, attn.num_heads)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attention within each view [views * patches, width] and its weights [views, heads, patches, patches]."""
        return attend_within(query, key, value, heads, self.views)


def mean_over_heads(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows [n, heads * head_dim] averaged over heads [n, head_dim]."""
    return rows.view(rows.shape[0], heads, -1).mean(dim=1)


def attend_within(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, views: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of rows [views * patches, width] within each view, and its weights [views, heads, patches, patches]."""
    shape = (views, -1, heads, query.shape[1] // heads)
    query, key, value = (rows.view(shape).transpose(1, 2) for rows in (query, key, value))
    weights = torch.softmax((query * shape[-1] ** -0.5) @ key.transpose(2, 3), dim=-1)
    return (weights @ value).transpose(1, 2).flatten(0, 1).flatten(1), weights


def patch_linear(convolution: nn.Conv2d) -> nn.Linear:
    """Return a convolution whose kernel equals its stride as a linear layer over patches [n, pixels], without bias."""
    kernel = convolution.weight
    linear = nn.Linear(kernel[0].numel(), kernel.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(kernel.flatten(1), requires_grad=False)
    return linear


def check_encoder(config: Any, *kinds: str) -> None:
    """Refuse vision encoders whose `model_type` is not one of `kinds`."""
    found = config.vision_config.model_type
    if found not in kinds:
        known = " and ".join(map(repr, kinds))
        raise UnsupportedModelError(
            f"Its vision encoder {found!r} is not supported behind {config.model_type!r}.", hint=f"Supported: {known}."
        )


def check_selection(config: Any) -> None:
    """Refuse a feature selection that keeps CLIP's class token, or drops the first patch of SigLIP, which has no class token."""
    selection, kind = config.vision_feature_select_strategy, config.vision_config.model_type
    if (selection == "default") != (kind == CLIP):
        what = "keeps the class token" if kind == CLIP else "drops the first patch"
        raise UnsupportedModelError(f"Its vision_feature_select_strategy {selection!r} {what}, which is not supported.")


def check_grid(config: Any, rows: int, columns: int) -> None:
    """Refuse views whose rows and columns of patches differ from the encoder's positions."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    if (rows, columns) != (side, side):
        raise UnsupportedModelError(
            f"Its image processor makes {rows} x {columns} patches, but its vision encoder takes {side} x {side}.",
            hint="Check the size in preprocessor_config.json.",
        )


class FeatureEncoder(nn.Module):
    """The encoder: patches [views * patches, 3 * P * P] to features [views * patches, layers * width], without class tokens.

    `layers`: how many layers run before the features, negative if counted back from the output (-1); the features of a list are
    concatenated. With `signals`, it also returns the attention that each patch receives [views * patches], from the class token
    or averaged over all queries if there is none, and its keys, averaged over heads [views * patches, head_dim]. They come from
    the layer before the last feature, but never from the encoder's last layer. `thinning`: the cuts inside the encoder.
    `left_out`: whether the first patch of each view has no features.
    """

    places: torch.Tensor

    def __init__(
        self,
        tower: Any,
        views: int,
        layers: int | Sequence[int] = -1,
        *,
        signals: bool = False,
        thinning: EncoderPruning | None = None,
        left_out: bool = False,
    ) -> None:
        super().__init__()
        depth, chosen = len(tower.encoder.layers), [layers] if isinstance(layers, int) else layers
        features, self.views = [range(depth + 1)[layer] for layer in chosen], views
        run = max(features)
        embeddings, side = tower.embeddings, tower.embeddings.image_size
        self.patch, self.norm = patch_linear(embeddings.patch_embedding), getattr(tower, "pre_layrnorm", nn.Identity())
        self.takes = (views * embeddings.num_patches, self.patch.in_features)
        with torch.no_grad():
            places = embeddings(torch.zeros(1, 3, side, side))
        self.first = places.shape[1] - embeddings.num_patches  # the class token comes before the patches
        self.register_buffer("places", places, persistent=False)
        signal_layer = max(min(run, depth - 1) - 1, 0) if signals else None
        rows, layers_run = RowLayout(views, self.first + left_out, left_out=left_out), tower.encoder.layers[:run]
        self.encoder = ViewEncoder(layers_run, rows, features=features, signal_layer=signal_layer, thinning=thinning)
        self.blocks = run

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the features of all views, and a tuple of the signals, if enabled, and the indices that each cut kept."""
        hidden = self.patch(pixel_values).unflatten(0, (self.views, -1)) + self.places[:, self.first :]
        if self.first:
            hidden = torch.cat([self.places[:, : self.first].expand(self.views, -1, -1), hidden], dim=1)
        features, beside = self.encoder(self.norm(hidden.flatten(0, 1)))
        return torch.cat(features, dim=1), beside


def projected(
    projector: nn.Module, features: torch.Tensor, beside: tuple[torch.Tensor, ...], *, signals: bool
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Return the visual tokens [1, V, hidden] of features [V, width], and the encoder's other outputs `beside`.

    With `signals`, which are the first two of these, the features follow them.
    """
    visual = projector(features)[None]
    if signals:
        received, keys, *kept = beside
        return visual, received, keys, features, *kept
    return (visual, *beside) if beside else visual


class ProjectedView(nn.Module):
    """The encoder and projector: patches [patches, 3 * P * P] to visual tokens [1, V, hidden] and the encoder's other outputs.

    `encoder`: a FeatureEncoder, or a module with its outputs and attributes. With `signals`, the features of each token [V, width]
    are an output too.
    """

    def __init__(self, encoder: Any, projector: nn.Module, *, signals: bool = False) -> None:
        super().__init__()
        self.encoder, self.projector, self.takes = encoder, projector, encoder.takes
        self.blocks, self.signals = encoder.blocks, signals

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image, the signals, if enabled, and the indices that each cut kept."""
        features, beside = self.encoder(pixel_values)
        if self.signals:
            features = features.reshape(beside[0].shape[0], -1)  # the patches of a token are adjacent
        return projected(self.projector, features, beside, signals=self.signals)


def projected_view(
    config: Any, geometry: Geometry, encoder: FeatureEncoder, *projectors: nn.Module, signals: bool = False
) -> ProjectedView:
    """Return the module for an image of one view, with one visual token per patch."""
    check_grid(config, geometry.rows, geometry.columns)
    return ProjectedView(encoder, nn.Sequential(*projectors), signals=signals)
