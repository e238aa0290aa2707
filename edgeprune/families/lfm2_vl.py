"""LFM2-VL: tiles and a thumbnail of its own size in a NaFlex encoder, pixel unshuffle, and a decoder of mostly short convolutions.

LFM2: Liquid AI, arXiv 2511.23404; the modules are those of transformers' models/lfm2_vl, models/lfm2 and models/siglip2. A layer of
the decoder has grouped-query attention or a gated convolution over the last tokens, whose inputs are its state. The encoder's
position table is resized for one fixed grid, so it is a constant. Views of different sizes attend separately; upstream pads and
masks them. The text is that of processing_lfm2_vl.py: a tag before each tile and the thumbnail, between two marks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from edgeprune.bundle import ImageText
from edgeprune.errors import PlanError, UnsupportedModelError
from edgeprune.families.base import DecoderParts, Family, text_rope
from edgeprune.families.encoder import ViewEncoder, attend_within, check_encoder, projected
from edgeprune.families.encoder_pruning import EncoderPruning, UnequalViews
from edgeprune.families.recurrent import shifted_sum
from edgeprune.plan import Cut, Geometry

_IMAGE, _START, _END, _THUMBNAIL = "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"


class Lfm2VL(Family):
    """The family of Lfm2VlForConditionalGeneration."""

    name = "lfm2_vl"
    projects_tokens = True
    stateful = "a convolution"

    @staticmethod
    def check(config: Any) -> None:
        """Refuse other encoders and decoders, and rotary positions that depend on the length."""
        check_encoder(config, "siglip2_vision_model")
        text = config.text_config
        if text.model_type != "lfm2":
            raise UnsupportedModelError(f"Its text model {text.model_type!r} is not supported behind {config.model_type!r}.")
        if (rope := text.rope_parameters["rope_type"]) in ("dynamic", "longrope"):
            raise UnsupportedModelError(f"This model's {rope!r} rotary positions depend on the length, which is not supported.")
        if "full_attention" not in text.layer_types:
            raise UnsupportedModelError("None of this model's layers has attention, which is not supported.")

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's patches; a `size` of one view is kept for all images."""
        fixed = {} if size is None else {"fixed_size": list(size)}
        return {
            **processor,
            "encoder_patch_size": config.vision_config.patch_size,
            "downsample_factor": config.downsample_factor,
            **fixed,
        }

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the text of an image: the tiles, each after its row and column, and the thumbnail."""
        views = geometry.layout
        if len(views) == 1:
            return self._image(_IMAGE)
        # The thumbnail shows the whole; without one, every view is a tile.
        whole = views[-1].height > views[0].height or views[-1].width > views[0].width
        tiles, rows, text = views[: len(views) - whole], sorted({tile.top for tile in views}), ""
        for tile in tiles:
            column = sum(other.top == tile.top and other.left <= tile.left for other in tiles)
            text += f"<|img_row_{rows.index(tile.top) + 1}_col_{column}|>{_IMAGE}"
        return self._image(text + (_THUMBNAIL + _IMAGE if whole else ""))

    def _image(self, text: str) -> ImageText:
        return ImageText("image", _IMAGE, f"{_START}{text}{_END}", self._model.config.image_token_id)

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder and projector for one layout of views; signals come from the penultimate block."""
        return NaflexTower(self._model.model, geometry, EncoderPruning(cuts, geometry), signals=signals)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        text = self._model.model.language_model
        config = text.config
        shape = (config.conv_L_cache - 1, config.hidden_size)
        return DecoderParts(
            layers=nn.ModuleList(map(_DecoderLayer, text.layers)),
            norm=text.embedding_norm,
            lm_head=self._model.lm_head,
            embed_tokens=text.embed_tokens,
            rope=text_rope(text.rotary_emb),
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            context=config.max_position_embeddings,
            states={index: (shape,) for index, layer in enumerate(text.layers) if not layer.is_attention_layer},
        )


class _DecoderLayer(nn.Module):
    # A decoder layer by the names of Llama's.
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = layer.operator_norm, layer.ffn_norm
        self.mlp = layer.feed_forward
        if layer.is_attention_layer:
            self.self_attn = _Attention(layer.self_attn)
        else:
            self.mixer = ShortConvolution(layer.conv)


class _Attention(nn.Module):
    # Attention by the names of Qwen3's.
    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj
        self.q_norm, self.k_norm, self.scaling = attn.q_layernorm, attn.k_layernorm, attn.scaling


class ShortConvolution(nn.Module):
    """A gated causal convolution over few tokens: hidden states [S, hidden], state [kernel - 1, hidden], the inputs before them."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.in_proj, self.out_proj, self.conv = conv.in_proj, conv.out_proj, conv.conv

    def forward(self, hidden: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output [S, hidden] and the new state."""
        before, after, values = self.in_proj(hidden).chunk(3, dim=1)
        mixed, state = shifted_sum(torch.cat([state, before * values]), self.conv)
        return self.out_proj(after * mixed), state


class NaflexTower(nn.Module):
    """The encoder and projector: patches [patches, P * P * 3] of all views to visual tokens [1, V, hidden].

    With `signals`, it also returns the attention that each token receives in the penultimate block [V], averaged over heads and
    queries, and its keys averaged over heads [V, head_dim], both averaged over its merged patches. These are adjacent from the
    input on.
    """

    places: torch.Tensor
    order: torch.Tensor

    def __init__(self, model: Any, geometry: Geometry, thinning: EncoderPruning, *, signals: bool = False) -> None:
        super().__init__()
        self.tower, projector, self.signals = model.vision_tower, model.multi_modal_projector, signals
        norms = [projector.layer_norm] if projector.use_layer_norm else []
        self.projector = nn.Sequential(*norms, projector.linear_1, projector.act, projector.linear_2)
        views, merge = geometry.layout, projector.factor
        fewest = min(view.tokens for view in views)
        for cut, _ in thinning.cuts.values():
            if cut.keep > fewest * len(views):
                raise PlanError(
                    f"{cut} keeps {cut.keep // len(views)} tokens in each of {len(views)} views, and one has {fewest}.",
                    hint=f"Keep at most {fewest * len(views)}.",
                )
        grids = [(view.rows * merge, view.columns * merge) for view in views]
        self.merged, layers = merge**2, self.tower.encoder.layers
        rows = UnequalViews(len(views), merged=self.merged, tokens=tuple(view.tokens for view in views))
        self.encoder = NaflexEncoder(layers, rows, signal_layer=max(len(layers) - 2, 0) if signals else None, thinning=thinning)
        self.patch, self.blocks = self.tower.embeddings.patch_embedding, len(layers)
        self.takes = (geometry.tokens * self.merged, self.patch.in_features)
        order = torch.cat([_merged_order(*grid, merge) for grid in grids])
        starts = torch.tensor([rows * columns for rows, columns in grids]).cumsum(0).roll(1)
        starts[0] = 0
        order += starts.repeat_interleave(torch.tensor([rows * columns for rows, columns in grids]))
        places = torch.cat([_places(self.tower.embeddings, *grid) for grid in grids])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("places", places[order], persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image, the signals, and the indices that each cut kept."""
        (hidden,), beside = self.encoder(self.patch(pixel_values.index_select(0, self.order)) + self.places)
        features = self.tower.post_layernorm(hidden).reshape(-1, self.merged * hidden.shape[1])
        return projected(self.projector, features, beside, signals=self.signals)


class NaflexEncoder(ViewEncoder):
    """Encoder layers over views of different sizes, which attend separately."""

    rows: UnequalViews

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> tuple[torch.Tensor, Any]:
        """Return the attention within each view [patches, width], and its weights in each run of equal views."""
        runs, tokens = self.rows.runs, self.rows.tokens
        if query.shape[0] != sum(tokens) * self.rows.merged:  # a cut leaves every view as many
            mixed, weights = attend_within(query, key, value, heads, self.views)
            return mixed, (weights,)
        firsts = [sum(runs[:index]) for index in range(len(runs))]
        lengths = [count * tokens[first] * self.rows.merged for count, first in zip(runs, firsts, strict=True)]
        queries, keys, values = (torch.split(rows, lengths) for rows in (query, key, value))
        outputs = [attend_within(queries[run], keys[run], values[run], heads, count) for run, count in enumerate(runs)]
        return torch.cat([mixed for mixed, _ in outputs]), tuple(weights for _, weights in outputs)


def _merged_order(rows: int, columns: int, merge: int) -> torch.Tensor:
    # The patches of a view such that those of one visual token are adjacent, in the order of pixel unshuffle.
    grid = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
    return grid.transpose(1, 2).flatten()


def _places(embeddings: Any, rows: int, columns: int) -> torch.Tensor:
    # The position embeddings [rows * columns, width], resized as upstream does.
    side = embeddings.position_embedding_size
    table = embeddings.position_embedding.weight.detach().view(side, side, -1)
    resized: torch.Tensor = embeddings.resize_positional_embeddings(table, torch.tensor([[rows, columns]]), rows * columns)
    return resized[0]
