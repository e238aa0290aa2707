"""Plain text decoders: Llama, Mistral, Qwen2 and Qwen3, which several vision families put behind their encoders.

The modules are those of transformers' models/llama, models/mistral, models/qwen2 and models/qwen3. A sliding window and a dynamic
scaling of the rotary positions change nothing until a sequence is longer than they say: they bound `context` instead of being
refused.

What a model family tells the rest of EdgePrune.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from edgeprune.bundle import ImageText
from edgeprune.errors import UnsupportedModelError
from edgeprune.plan import Cut, Geometry

KINDS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class DecoderParts:
    """The decoder's own modules.

    `layers`: decoder layers with `input_layernorm`, `self_attn` (q_proj, k_proj, v_proj, o_proj, and where it has them q_norm and
    k_norm for each head), `post_attention_layernorm` and `mlp`. `rope(positions)`: cosines and sines, each [S, head_dim], of
    integer positions [axes, S]. `embed_tokens`: a module from ids to embeddings as they enter layer 0, scaled where the model
    scales them.

    `planes`: how many of the first layers add a feature of its own to every visual token (DeepStack): visual tokens and embeddings
    are then (1 + planes) * hidden wide. `bidirectional`: tokens of one step all see each other (a prefix language model).
    `context`: the longest sequence that attention was made for, in tokens.
    """

    layers: nn.ModuleList
    norm: nn.Module
    lm_head: nn.Module
    embed_tokens: nn.Module
    rope: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    planes: int = 0
    bidirectional: bool = False


class Family:
    """One architecture: how to check a model, what its images are in the text, and where its parts are.

    `position_axes`: 3 with mRoPE. `signals`: what its vision encoder tells beside the visual tokens, for input methods whose
    `needs` name it; `no_signals_reason`: why it tells no more, where it does not. `no_encoder_cuts_reason`: why no token can leave
    inside the encoder, where none can. `videos`: whether it was trained on them. `chat_template`: for model folders without one.
    """

    name: ClassVar[str]
    position_axes: ClassVar[int] = 1
    signals: ClassVar[tuple[str, ...]] = ("vision attention",)
    no_signals_reason: ClassVar[str] = ""
    no_encoder_cuts_reason: ClassVar[str] = ""
    videos: ClassVar[bool] = False
    chat_template: ClassVar[str | None] = None

    def __init__(self, model: Any) -> None:
        self._model = model

    @staticmethod
    def check(config: Any) -> None:
        """Raise UnsupportedModelError when the configuration has a twist that the family's graphs do not cover."""
        raise NotImplementedError

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the settings for `edgeprune.processors.image_spec`: the model's image processor's own, and what it leaves to the
        configuration; with `size` (height, width), such that images of that aspect are brought to it where any size is taken.
        """
        raise NotImplementedError

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return how an image, or a video, stands in the text."""
        raise NotImplementedError

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return a module from patches [patches, patch pixels] to visual tokens [1, V, hidden], with planes that much wider.

        Its `takes` is the shape of its patches, `blocks` how many its encoder runs. With `signals`, of a family that has them, it
        also returns the attention each token receives [V] and its keys [V, key dim]. With `cuts`, of a family without
        `no_encoder_cuts_reason`, all of these are of the tokens that stay, and last it returns the indices in the image [K],
        ascending, that each of the vision cuts kept.

        Raises PlanError for a cut beyond the encoder's blocks, or whose count does not divide among the views.
        """
        raise NotImplementedError

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        raise NotImplementedError


def refuse_quantized(config: Any) -> None:
    """Raise UnsupportedModelError for a checkpoint of quantized weights."""
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError("This checkpoint is quantized.", hint="Give the original weights, to be quantized here.")


def text_rope(rotary: nn.Module) -> nn.Module:
    """Return the rope of a Hugging Face text model with plain positions: integers [1, S] to cosines and sines [S, head_dim]."""
    return _TextRope(rotary)


class _TextRope(nn.Module):
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.rotary(self.rotary.inv_freq, positions)
        return cos[0], sin[0]


def check_text(config: Any) -> None:
    """Refuse quantized weights, other text models (mixtures of experts are), and rotary positions of two minds."""
    refuse_quantized(config)
    text = config.text_config
    if text.model_type not in KINDS:
        raise UnsupportedModelError(
            f"Its text model {text.model_type!r} is not supported behind {config.model_type!r}.",
            hint=f"Supported: {', '.join(KINDS)}.",
        )
    if text.rope_parameters["rope_type"] == "longrope":
        raise UnsupportedModelError("This model's 'longrope' rotary positions depend on the length, which is not supported.")


def text_decoder(text: Any, lm_head: nn.Module) -> DecoderParts:
    """Return the parts of a Hugging Face text model (without its head) and the head."""
    config = text.config
    rotary = copy.copy(text.rotary_emb)
    if rotary.rope_type == "dynamic":
        rotary.rope_type = "default"  # within `context` the frequencies are those it starts with
    return DecoderParts(
        layers=text.layers,
        norm=text.norm,
        lm_head=lm_head,
        embed_tokens=text.embed_tokens,
        rope=text_rope(rotary),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        context=min(config.max_position_embeddings, getattr(config, "sliding_window", None) or config.max_position_embeddings),
    )
