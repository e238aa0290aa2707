"""Idefics3, SmolVLM and SmolVLM2: tiles of one size in a SigLIP-like encoder, pixel shuffle into fewer tokens, and a Llama decoder.

Idefics3: Laurençon et al., arXiv 2408.12637; the modules are those of transformers' models/idefics3/modeling_idefics3.py. A tile is
completely filled, so its position ids are constants. The text is that of processing_idefics3.py: a tag before each tile, and the
full image last.

SmolVLM: Marafioti et al., arXiv 2504.05299; the first release uses the architecture Idefics3, SmolVLM2 the modules of transformers'
models/smolvlm/modeling_smolvlm.py, which repeat Idefics3's. The frames of a video are images without tiles, each after its
timestamp. The text of a video is that of processing_smolvlm.py, which spells out the number of frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from transformers.models.smolvlm.processing_smolvlm import (
    DEFAULT_CHAT_TEMPLATE,
    DEFAULT_MEDIA_OUTTRO,
    DEFAULT_VIDEO_INTRO,
    FRAME_TIMESTAMP_MESSAGE,
)

from edgeprune.bundle import ImageText
from edgeprune.errors import UsageError
from edgeprune.families.base import DecoderParts, Family, check_text, text_decoder
from edgeprune.families.encoder import ViewEncoder, patch_linear, projected
from edgeprune.families.encoder_pruning import EncoderPruning, RowLayout
from edgeprune.families.idefics2 import empty_picture
from edgeprune.plan import Cut, Geometry

_FAKE, _IMAGE, _GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


class Idefics3(Family):
    """The family of Idefics3ForConditionalGeneration."""

    name = "idefics3"
    projects_tokens = True

    @staticmethod
    def check(config: Any) -> None:
        """Refuse unsupported text models."""
        check_text(config)

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's patches; `size` sets the longest edge."""
        longest = {} if size is None else {"size": {"longest_edge": max(size)}}
        return {**processor, "patch_size": config.vision_config.patch_size, "merge_size": config.scale_factor, **longest}

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the text of an image: the tiles, each after its row and column, and the full image."""
        tiles = geometry.layout[:-1]
        text, rows = "", sorted({tile.top for tile in tiles})
        for row, top in enumerate(rows, 1):
            columns = sum(tile.top == top for tile in tiles)
            text += "".join(f"{_FAKE}<row_{row}_col_{column}>{_IMAGE}" for column in range(1, columns + 1)) + "\n"
        text += "\n" if tiles else ""
        return ImageText("image", _IMAGE, text + whole_text(), self._model.config.image_token_id)

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder and connector for one layout of tiles; signals come from the penultimate block."""
        return TileTower(self._model.model, geometry, EncoderPruning(cuts, geometry), signals=signals)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        return text_decoder(self._model.model.text_model, self._model.lm_head)


class TileTower(nn.Module):
    """The encoder and connector over equal tiles: patches [patches, 3 * P * P] to tokens [1, V, hidden].

    With `signals`, it also returns the attention that each token receives in the penultimate block [V], averaged over heads and
    queries, and its keys averaged over heads [V, head_dim], both averaged over its merged patches. These are adjacent from the
    input on.
    """

    places: torch.Tensor
    order: torch.Tensor

    def __init__(self, model: Any, geometry: Geometry, thinning: EncoderPruning, *, signals: bool = False) -> None:
        super().__init__()
        self.tower, self.projector, self.signals = model.vision_model, model.connector.modality_projection, signals
        views, merge = geometry.layout, model.connector.scale_factor
        side, self.merged = views[0].rows * merge, merge**2
        layers, rows = self.tower.encoder.layers, RowLayout(len(views), merged=self.merged)
        self.encoder = ViewEncoder(layers, rows, signal_layer=max(len(layers) - 2, 0) if signals else None, thinning=thinning)
        self.patch = patch_linear(self.tower.embeddings.patch_embedding)
        self.blocks = len(self.encoder.layers)
        self.takes = (len(views) * side**2, self.patch.in_features)
        places = empty_picture(self.tower.embeddings, side, side)
        order = model.connector.pixel_shuffle(torch.arange(side**2).view(1, -1, 1), merge).flatten()
        starts = torch.arange(len(views))[:, None] * side**2
        self.register_buffer("places", places[order].repeat(len(views), 1), persistent=False)
        self.register_buffer("order", (starts + order).flatten(), persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the visual tokens of one image or video, the signals, and the indices that each cut kept."""
        (hidden,), beside = self.encoder(self.patch(pixel_values.index_select(0, self.order)) + self.places)
        features = self.tower.post_layernorm(hidden).reshape(-1, self.merged * hidden.shape[1])
        return projected(self.projector, features, beside, signals=self.signals)


def whole_text() -> str:
    """Return the text of a full image or a frame."""
    return f"{_FAKE}{_GLOBAL}{_IMAGE}{_FAKE}"


class SmolVLM(Idefics3):
    """The family of SmolVLMForConditionalGeneration."""

    name = "smolvlm"
    videos = True
    chat_template = DEFAULT_CHAT_TEMPLATE

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the text of an image as in Idefics3, or of a video: its frames with their timestamps."""
        image = super().image_text(geometry)
        if geometry.frames == 1:
            return image
        length = timedelta(seconds=int(geometry.frames / geometry.fps))
        text = DEFAULT_VIDEO_INTRO.format(frame_count=_number_words(geometry.frames), video_duration=str(length))
        for frame in range(geometry.frames):
            minutes, seconds = divmod(int(frame / geometry.fps), 60)
            text += FRAME_TIMESTAMP_MESSAGE.format(timestamp=f"{minutes:02d}:{seconds:02d}") + whole_text()
        return replace(image, kind="video", placeholder="<video>", text=text + DEFAULT_MEDIA_OUTTRO)


def _number_words(number: int) -> str:
    # English number words, in the spelling of num2words.
    if number >= 1000:
        raise UsageError(f"A SmolVLM video of {number} frames is too long.", hint="Take fewer frames of it.")
    hundreds, rest = divmod(number, 100)
    tens, ones = divmod(rest, 10)
    small = (*_ONES, *_TEENS)[rest] if rest < 20 else _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    if not hundreds:
        return small
    return f"{_ONES[hundreds]} hundred" + (f" and {small}" if rest else "")
