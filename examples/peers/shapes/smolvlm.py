"""SmolVLM: tiles of 512 pixels and the whole image, 64 visual tokens each, a Llama decoder.

As in its first release, which calls itself Idefics3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TILE, PATCH, MERGE = 512, 16, 4  # pixels, pixels, and patches merged along each side
TOKENS = (TILE // PATCH // MERGE) ** 2  # visual ones of a tile
VOCABULARY = 49280
MOST = 4  # rows and columns of tiles


@dataclass(frozen=True)
class SmolVLM:
    """The numbers of the decoder, of the vision tower, and the side of the square image in pixels: whole tiles."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    width: int
    blocks: int
    vision_heads: int
    side: int

    model_type = "idefics3"
    decoder_type, decoder_class, decoder_prefix = "llama", "LlamaForCausalLM", "model.text_model."
    picture = "<image>"
    tokens = (
        "\n\n",  # in the true tokenizer, where llama.cpp looks for it
        *("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"),
        *(f"<row_{row}_col_{column}>" for row in range(1, MOST + 1) for column in range(1, MOST + 1)),
    )

    @property
    def entering(self) -> int:
        """Visual tokens, two of text before each tile and the whole image, one behind that, and the ends of the rows."""
        rows = self.side // TILE
        return (rows**2 + 1) * (TOKENS + 2) + 1 + rows

    def config(self, ids: Mapping[str, int]) -> dict[str, Any]:
        """Return what its config.json says."""
        text = {
            "architectures": ["VLlama3ForCausalLM"],  # by this name llama.cpp's converter knows it
            "model_type": self.decoder_type,
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "max_position_embeddings": 8192,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            "tie_word_embeddings": False,
        }
        vision = {
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.vision_heads,
            "image_size": TILE,
            "patch_size": PATCH,
        }
        top = {"image_token_id": ids["<image>"], "scale_factor": MERGE, "pad_token_id": 0, "tie_word_embeddings": False}
        return {"text_config": text, "vision_config": vision, **top}

    def processor(self) -> dict[str, dict[str, Any]]:
        """Return what its preprocessor_config.json and processor_config.json say."""
        kind = {"processor_class": "Idefics3Processor"}
        images = {
            **{f"do_{step}": True for step in ("convert_rgb", "image_splitting", "normalize", "pad", "rescale", "resize")},
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Idefics3ImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "max_image_size": {"longest_edge": TILE},
            "resample": 1,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": self.side},
        }
        return {"preprocessor_config.json": images | kind, "processor_config.json": kind | {"image_seq_len": TOKENS}}

    def make_older(self, config: dict[str, Any], rope: Mapping[str, Any]) -> None:
        """Change nothing: transformers 4 reads the rest as it is."""
