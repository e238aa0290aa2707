"""What a model family tells the rest of EdgePrune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from edgeprune.plan import Geometry


@dataclass(frozen=True)
class DecoderParts:
    """The decoder's own modules.

    `layers`: decoder layers with `input_layernorm`, `self_attn` (q_proj, k_proj, v_proj, o_proj), `post_attention_layernorm`
    and `mlp`. `rope(positions)`: cosines and sines, each [S, head_dim], of integer positions [axes, S].
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


class Family(Protocol):
    """One architecture: how to check a model, and where its parts are.

    `signals`: what its vision encoder tells beside the visual tokens, for input methods whose `needs` name it.
    """

    name: str
    position_axes: int
    signals: tuple[str, ...]

    def __init__(self, model: Any) -> None: ...

    @staticmethod
    def check(config: Any) -> None:
        """Raise UnsupportedModelError when the configuration has a twist that the family's graphs do not cover."""

    @staticmethod
    def geometry(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None) -> Geometry:
        """Return the geometry of an image of `size` (height, width) pixels, or of the processor's own default size."""
        ...

    def vision(self, geometry: Geometry, *, signals: bool = False) -> nn.Module:
        """Return a module from patches [patches, patch pixels] to visual tokens [1, V, hidden].

        With `signals`, of a family that has them, it also returns the attention each token receives [V] and its keys [V, key dim].
        """
        ...

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        ...
