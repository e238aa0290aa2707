"""The sizes of real checkpoints, by family: what their config.json and preprocessor_config.json say of widths and depths.

`text`, `vision` and `top` go over the parts of a tiny configuration, `processor` over its image processor's settings; `size` is
that of the test image. Eight are too large for 24 GB in float32: of these `layers` says how many decoder layers are built, at
their true width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

AREA = {"size": {"shortest_edge": 448 * 448, "longest_edge": 448 * 448}}
QWEN2 = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
ANYRES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}

SIZES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {  # Qwen2-VL-2B-Instruct
        "text": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
        "top": {"tie_word_embeddings": True},
        "processor": AREA,
        "size": (448, 448),
    },
    "qwen2_5_vl": {  # Qwen2.5-VL-3B-Instruct
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "top": {"tie_word_embeddings": True},
        "processor": AREA,
        "size": (448, 448),
    },
    "lfm2_vl": {  # LFM2-VL-450M
        "text": {
            "hidden_size": 1024,
            "intermediate_size": 6656,
            "block_auto_adjust_ff_dim": True,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
            "vocab_size": 65536,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "vision": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 16,
            "num_patches": 256,
        },
        "top": {"tie_word_embeddings": True, "projector_hidden_size": 2560},
        "processor": {"encoder_patch_size": 16, "min_image_tokens": 64, "max_image_tokens": 256, "tile_size": 512, "max_tiles": 10},
        "size": (512, 512),
    },
    "qwen3_5": {  # Qwen3.5-0.8B
        "text": {
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "vocab_size": 248320,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        },
        "vision": {
            "depth": 12,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_heads": 12,
            "out_hidden_size": 1024,
            "num_position_embeddings": 2304,
        },
        "top": {"tie_word_embeddings": True},
        "processor": AREA,
        "size": (448, 448),
    },
    "qwen3_vl": {  # Qwen3-VL-2B-Instruct
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "top": {"tie_word_embeddings": True},
        "processor": AREA,
        "size": (448, 448),
    },
    "smolvlm": {  # SmolVLM-256M-Instruct
        "text": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49280,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
        "vision": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        "top": {"scale_factor": 4, "tie_word_embeddings": False},
        "processor": {"size": {"longest_edge": 1024}, "max_image_size": {"longest_edge": 512}},
        "size": (768, 1024),
    },
    "idefics3": {  # Idefics3-8B-Llama3
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128259,
            "max_position_embeddings": 131072,
        },
        "vision": {**SIGLIP, "num_hidden_layers": 27, "image_size": 364, "patch_size": 14},
        "top": {"scale_factor": 2, "tie_word_embeddings": False},
        "processor": {"size": {"longest_edge": 728}, "max_image_size": {"longest_edge": 364}},
        "size": (728, 728),
        "layers": 6,
    },
    "idefics2": {  # Idefics2-8B
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32003,
            "max_position_embeddings": 32768,
        },
        "vision": {**SIGLIP, "num_hidden_layers": 27, "image_size": 980, "patch_size": 14},
        "perceiver": {
            "hidden_size": 4096,
            "resampler_n_latents": 64,
            "resampler_depth": 3,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
            "num_key_value_heads": 4,
        },
        "processor": {"size": {"longest_edge": 980, "shortest_edge": 378}, "do_image_splitting": False},
        "size": (392, 392),
        "layers": 6,
    },
    "llava": {  # LLaVA-1.5-7B
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
        },
        "vision": CLIP,
        "processor": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        "size": (336, 336),
        "layers": 8,
    },
    "llava_next": {  # llava-v1.6-mistral-7b
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32064,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "vision": CLIP,
        "top": {"image_grid_pinpoints": ANYRES},
        "processor": {
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
            "image_grid_pinpoints": ANYRES,
        },
        "size": (336, 672),
        "layers": 8,
    },
    "llava_onevision": {  # llava-onevision-qwen2-0.5b-ov
        "text": QWEN2 | {"vocab_size": 152000, "max_position_embeddings": 32768},
        "vision": {**SIGLIP, "num_hidden_layers": 26, "image_size": 384, "patch_size": 14},
        "top": {"image_grid_pinpoints": [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)]},
        "processor": {
            "size": {"height": 384, "width": 384},
            "image_grid_pinpoints": [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)],
        },
        "size": (384, 768),
    },
    "internvl": {  # InternVL3-1B-hf
        "text": QWEN2 | {"vocab_size": 151674, "max_position_embeddings": 32768},
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
        },
        "processor": {"size": {"height": 448, "width": 448}},
        "size": (448, 896),
    },
    "mistral3": {  # Ministral-3-3B-Instruct-2512
        "text": {
            "hidden_size": 3072,
            "intermediate_size": 9216,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 131072,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 16.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16384,
                "rope_theta": 1e6,
                "rope_type": "yarn",
                "type": "yarn",
            },
        },
        "vision": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "head_dim": 64,
            "image_size": 1540,
        },
        "top": {"tie_word_embeddings": True},
        "processor": {"size": {"longest_edge": 1540}},
        "size": (448, 448),
        "layers": 8,
    },
    "gemma3": {  # gemma-3-4b-it
        "text": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
        },
        "vision": {**SIGLIP, "num_hidden_layers": 27, "image_size": 896, "patch_size": 14},
        "top": {"mm_tokens_per_image": 256, "tie_word_embeddings": True},
        "processor": {"size": {"height": 896, "width": 896}},
        "size": (896, 896),
        "layers": 8,
    },
    "paligemma": {  # paligemma-3b-pt-224
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 257216,
            "max_position_embeddings": 8192,
        },
        "vision": {**SIGLIP, "num_hidden_layers": 27, "image_size": 224, "patch_size": 14, "projection_dim": 2048},
        "top": {"projection_dim": 2048, "hidden_size": 2048},
        "processor": {"size": {"height": 224, "width": 224}},
        "size": (224, 224),
    },
}
SIZES["paligemma2"] = SIZES["paligemma"] | {  # paligemma2-3b-pt-224
    "text": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "vocab_size": 257216,
        "max_position_embeddings": 8192,
    },
    "vision": {**SIGLIP, "num_hidden_layers": 27, "image_size": 224, "patch_size": 14, "projection_dim": 2304},
    "top": {"projection_dim": 2304, "hidden_size": 2304},
    "layers": 10,
}
SIZES["vipllava"] = SIZES["llava"] | {"top": {"vision_feature_layer": [-2, -5, -8, -11, 6]}}  # ViP-LLaVA-7B


# What processor_config.json says of the number of visual tokens.
COMBINED: dict[str, dict[str, Any]] = {
    "gemma3": {"image_seq_length": 256},
    "idefics2": {"image_seq_len": 64},
    "idefics3": {"image_seq_len": 169},
    "internvl": {"image_seq_length": 256},
    "llava_onevision": {"num_image_tokens": 729, "vision_aspect_ratio": "anyres_max_9"},
    "smolvlm": {"image_seq_len": 64},
}


def widened(folder: Path, name: str) -> dict[str, Any]:
    """Bring the configuration and the processor of a tiny folder to true size; return the configuration."""
    sizes = SIZES[name]
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for part, key in (("text", "text_config"), ("vision", "vision_config"), ("perceiver", "perceiver_config")):
        if part in sizes:
            config[key] |= sizes[part]
            if "num_hidden_layers" in sizes[part]:
                config[key].pop("layer_types", None)  # one for each layer of the tiny model
    config["text_config"] |= {"num_hidden_layers": sizes["layers"]} if "layers" in sizes else {}
    config["text_config"].pop("layer_types", None)
    config |= sizes.get("top", {})
    config["text_config"]["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    (folder / "config.json").write_text(json.dumps(config))
    for file, changes in (
        ("preprocessor_config.json", sizes.get("processor", {})),
        ("processor_config.json", COMBINED.get(name, {})),
    ):
        path = folder / file
        if path.is_file():
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return config
