"""LLaVA-1.5, Mantis, Pixtral-12B and ViP-LLaVA: one view in CLIP, SigLIP or Pixtral, a projector, and a plain text decoder.

LLaVA: Liu et al., arXiv 2310.03744; the modules are those of transformers' models/llava/modeling_llava.py. This family supports all
checkpoints of the `model_type` with a CLIP encoder (without its class token) or a SigLIP encoder (with all patches), features of
any layers, and a Llama (Vicuna), Mistral, Qwen2 or Qwen3 decoder: LLaVA-1.5, BakLLaVA and LLaVA-Interleave. Pixtral-12B has an
encoder for images of any size, and the text of an image, in common with Mistral 3.

Mantis: Jiang et al., arXiv 2405.01483. Its checkpoints name LLaVA's class, and a processor that transformers does not have and that
numbers the images. With SigLIP, "default" leaves out the first patch, as training did. The prompt is that of the authors'
mantis/models/conversation.py and mantis/models/mllava/processing_llava.py, with the system prompt of training.

ViP-LLaVA: Cai et al., arXiv 2312.00784; the modules are those of transformers' models/vipllava/modeling_vipllava.py. The projector
normalizes the concatenated features of several CLIP layers, the configuration's `vision_feature_layers`. It always drops the class
token, so SigLIP, which has none, would lose a patch. Departure: a single layer is refused. The config.json of vip-llava-7b-hf names
one (-2); older transformers ignored it, newer ones follow it and build a projector that does not fit the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from edgeprune.bundle import ImageText
from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import DecoderParts, Family, OutsideChat, check_text, text_decoder
from edgeprune.families.encoder import CLIP, PIXTRAL, SIGLIP, FeatureEncoder, check_encoder, check_selection, projected_view
from edgeprune.families.encoder_pruning import EncoderPruning
from edgeprune.families.mistral3 import pixtral_settings, pixtral_text, pixtral_view
from edgeprune.plan import Cut, Geometry

_IMAGE = "<image>"
# What mantis/models/conversation.py (llama_3) and MLlavaProcessor write; the images stand where the parts of a message do.
_MANTIS_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0].role != 'system' -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\nYou are a pirate chatbot who always responds in pirate speak!<|eot_id|>' -}}
{%- endif -%}
{%- set images = namespace(count=0) -%}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' -}}
{%- for part in message.content -%}
{{- '' if loop.first else ' ' -}}
{%- if part.type == 'image' -%}
{%- set images.count = images.count + 1 -%}
{{- '(image ' ~ images.count ~ ': <Image><image></Image>)' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""
# What transformers' documentation of the model writes by hand; its checkpoints have no template.
_VIP_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
A chat between a curious human and an artificial intelligence assistant. {{ '' -}}
The assistant gives helpful, detailed, and polite answers to the human's questions.
{%- endif -%}
{%- for message in messages -%}
{%- if message.role != 'system' -%}{{ '###Human: ' if message.role == 'user' else '###Assistant: ' }}{%- endif -%}
{%- for part in message.content if part.type == 'image' -%}{{ '<image>\n' }}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}###Assistant:{%- endif -%}
"""


class Llava(Family):
    """The family of LlavaForConditionalGeneration."""

    name = "llava"
    projects_tokens = True
    outside_chats = {"MLlavaProcessor": OutsideChat(_MANTIS_TEMPLATE, "<|eot_id|>")}  # noqa: RUF012 (a constant)

    @staticmethod
    def check(config: Any) -> None:
        """Refuse unsupported encoders and decoders, and a class token among the visual tokens."""
        check_text(config)
        check_encoder(config, CLIP, SIGLIP, PIXTRAL)
        if not _leaves_out(config):
            check_selection(config)

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's patches; `size` has an effect only with Pixtral's encoder."""
        if config.vision_config.model_type == PIXTRAL:
            return pixtral_settings(config, processor, size, 1)
        left_out = {"drop_first_patch": True} if _leaves_out(config) else {}
        return {**processor, "patch_size": config.vision_config.patch_size, **left_out}

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the placeholder token of an image, or Pixtral's text of its rows."""
        config = self._model.config
        if config.vision_config.model_type == PIXTRAL:
            return pixtral_text(config, geometry)
        return ImageText("image", _IMAGE, _IMAGE, config.image_token_id)

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder and projector; signals come from the layer before the features."""
        model, config = self._model.model, self._model.config
        tower, layers, projector = model.vision_tower, config.vision_feature_layer, model.multi_modal_projector
        if config.vision_config.model_type == PIXTRAL:
            return pixtral_view(tower, geometry, layers, cuts, projector, signals=signals)
        thinning, left_out = EncoderPruning(cuts, geometry, views=1), _leaves_out(config)
        encoder = FeatureEncoder(tower, 1, layers, signals=signals, thinning=thinning, left_out=left_out)
        return projected_view(config, geometry, encoder, projector, signals=signals)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        return text_decoder(self._model.model.language_model, self._model.lm_head)


def _leaves_out(config: Any) -> bool:
    # SigLIP has no class token, so that "default", which leaves out the first row, leaves out a patch.
    return bool(config.vision_config.model_type == SIGLIP and config.vision_feature_select_strategy == "default")


class VipLlava(Llava):
    """The family of VipLlavaForConditionalGeneration."""

    name = "vipllava"
    chat_template = _VIP_TEMPLATE

    @staticmethod
    def check(config: Any) -> None:
        """Refuse unsupported encoders and decoders, and features of a single layer."""
        check_text(config)
        check_encoder(config, CLIP)
        layers = config.vision_feature_layer
        if isinstance(layers, int):
            raise UnsupportedModelError(
                f"Its config.json names a single layer of vision features, {layers}, but ViP-LLaVA has several.",
                hint='Replace it by those of its training, "vision_feature_layers": [-2, -5, -8, -11, 6] in vip-llava-7b-hf.',
            )
