"""Plain text decoders: Llama, Mistral, Qwen2 and Qwen3, which several vision families put behind their encoders.

The modules are those of transformers' models/llama, models/mistral, models/qwen2 and models/qwen3. A sliding window and a dynamic
scaling of the rotary positions change nothing until a sequence is longer than they say: they bound `context` instead of being
refused.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import DecoderParts, refuse_quantized, text_rope

KINDS = ("llama", "mistral", "qwen2", "qwen3")


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
