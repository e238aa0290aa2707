"""Qwen2-VL: one grid of patches, 2 x 2 of them a visual token, a Qwen2 decoder with rotary positions in three parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.tabletop import MODEL_FOLDER

TRUE_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2}
VOCABULARY = 151936


@dataclass(frozen=True)
class Qwen2VL:
    """The numbers of the decoder, of the vision tower, and the side of the square image in pixels."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vision: dict[str, int]
    side: int

    model_type = "qwen2_vl"
    decoder_type, decoder_class, decoder_prefix = "qwen2", "Qwen2ForCausalLM", "model."
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    tokens = ()  # the bundled model is one

    @property
    def blocks(self) -> int:
        """Blocks of the vision encoder."""
        return self.vision["depth"]

    @property
    def entering(self) -> int:
        """Visual tokens, and one of text before and behind them."""
        return (self.side // self.vision["patch_size"] // self.vision["spatial_merge_size"]) ** 2 + 2

    def config(self, ids: Mapping[str, int]) -> dict[str, Any]:
        """Return what its config.json says."""
        head = self.hidden // self.heads
        sections = {"mrope_section": [head // 8, head * 3 // 16, head * 3 // 16]}
        text = {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 32768,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **sections},
        }
        named = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
        named |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
        tokens = {name: ids[f"<|{token}|>"] for name, token in named.items()}
        vision = self.vision | {"hidden_size": self.hidden}
        return {"text_config": text, "vision_config": vision, "tie_word_embeddings": True, **tokens}

    def processor(self) -> dict[str, dict[str, Any]]:
        """Return what its preprocessor_config.json says."""
        bundled: dict[str, Any] = json.loads((MODEL_FOLDER / "preprocessor_config.json").read_text(encoding="utf-8"))
        area = self.side**2
        settings = {
            "patch_size": self.vision["patch_size"],
            "merge_size": self.vision["spatial_merge_size"],
            "size": {"shortest_edge": area, "longest_edge": area},
            "min_pixels": area,  # the same, as older versions and OpenVINO GenAI read it
            "max_pixels": area,
        }
        return {"preprocessor_config.json": bundled | settings}

    def make_older(self, config: dict[str, Any], rope: Mapping[str, Any]) -> None:
        """Change a config.json to what transformers 4 reads."""
        config["text_config"]["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config["vision_config"]["model_type"] = self.model_type
        config["hidden_size"] = self.hidden
