"""LLaVA-1.5 and ViP-LLaVA: one square view in CLIP or SigLIP, a projector of two layers, and a plain text decoder.

LLaVA: Liu et al., arXiv 2310.03744; the modules are those of transformers' models/llava/modeling_llava.py. This family supports all
checkpoints of the `model_type` with a CLIP encoder (without its class token) or a SigLIP encoder (with all patches), features of
any layers, and a Llama (Vicuna), Mistral, Qwen2 or Qwen3 decoder: LLaVA-1.5, BakLLaVA, LLaVA-Interleave and
Mantis-8B-siglip-llama3. Pixtral's encoder is refused.

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
from edgeprune.families.base import DecoderParts, Family, check_text, text_decoder
from edgeprune.families.encoder import CLIP, SIGLIP, FeatureEncoder, check_encoder, check_selection, projected_view
from edgeprune.families.encoder_pruning import EncoderPruning
from edgeprune.plan import Cut, Geometry

_IMAGE = "<image>"
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

    @staticmethod
    def check(config: Any) -> None:
        """Refuse unsupported encoders and decoders, and a class token among the visual tokens."""
        check_text(config)
        check_encoder(config, CLIP, SIGLIP)
        check_selection(config)

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's patches; images have a fixed size, so `size` has no effect."""
        return {**processor, "patch_size": config.vision_config.patch_size}

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the placeholder token of an image."""
        return ImageText("image", _IMAGE, _IMAGE, self._model.config.image_token_id)

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder and projector; signals come from the layer before the features."""
        model, config = self._model.model, self._model.config
        encoder = FeatureEncoder(
            model.vision_tower, 1, config.vision_feature_layer, signals=signals, thinning=EncoderPruning(cuts, geometry)
        )
        return projected_view(config, geometry, encoder, model.multi_modal_projector)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts."""
        return text_decoder(self._model.model.language_model, self._model.lm_head)


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
