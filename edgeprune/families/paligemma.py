"""PaliGemma: one square view in SigLIP, a linear projector, and a Gemma or Gemma 2 decoder with a bidirectional prompt.

Beyer et al., arXiv 2407.07726, and Steiner et al., arXiv 2412.03555 (PaliGemma 2); the modules are those of transformers'
models/paligemma/modeling_paligemma.py, models/gemma and models/gemma2.
The image comes first, then the bos token, the prompt and a line break, as in processing_paligemma.py. All of them attend to each
other; only the answer is causal. A second turn would have to be visible to the first, so there is one turn with one image. Token
embeddings are scaled, visual tokens are not.

Departures: rotary positions begin at 0 instead of 1, which changes no score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from edgeprune.bundle import ImageText
from edgeprune.errors import UnsupportedModelError
from edgeprune.families.base import DecoderParts, Family, text_decoder
from edgeprune.families.encoder import SIGLIP, FeatureEncoder, check_encoder, projected_view
from edgeprune.families.encoder_pruning import EncoderPruning
from edgeprune.families.gemma import gemma2_decoder
from edgeprune.plan import Cut, Geometry

_IMAGE = "<image>"
_DECODERS = {"gemma": text_decoder, "gemma2": gemma2_decoder}
_TEMPLATE = """\
{%- if messages | length != 1 or messages[0].role != 'user' -%}
{{ raise_exception('PaliGemma answers one prompt and holds no conversation') }}
{%- endif -%}
{%- set parts = messages[0].content -%}
{%- if parts is string or parts | selectattr('type', 'equalto', 'image') | list | length != 1 -%}
{{ raise_exception('PaliGemma takes one image with its prompt') }}
{%- endif -%}
{{- '<image>' + bos_token -}}
{%- for part in parts if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- '\\n' -}}
"""


class PaliGemma(Family):
    """The family of PaliGemmaForConditionalGeneration."""

    name = "paligemma"
    projects_tokens = True
    chat_template = _TEMPLATE

    @staticmethod
    def check(config: Any) -> None:
        """Refuse unsupported encoders and decoders."""
        check_encoder(config, SIGLIP)
        text = config.text_config.model_type
        if text not in _DECODERS:
            raise UnsupportedModelError(
                f"Its text model {text!r} is not supported behind 'paligemma'.", hint=f"Supported: {', '.join(_DECODERS)}."
            )

    @staticmethod
    def settings(config: Any, processor: Mapping[str, Any], size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return the image processor's settings with the model's patches; images have a fixed size, so `size` has no effect."""
        return {**processor, "patch_size": config.vision_config.patch_size}

    def image_text(self, geometry: Geometry) -> ImageText:
        """Return the placeholder token of an image."""
        return ImageText("image", _IMAGE, _IMAGE, self._model.config.image_token_id)

    def vision(self, geometry: Geometry, *, signals: bool = False, cuts: Sequence[Cut] = ()) -> nn.Module:
        """Return the encoder, its last norm and the projector; signals come from the penultimate layer."""
        model = self._model.model
        encoder = FeatureEncoder(model.vision_tower, 1, signals=signals, thinning=EncoderPruning(cuts, geometry))
        norm, projector = model.vision_tower.post_layernorm, model.multi_modal_projector
        return projected_view(self._model.config, geometry, encoder, norm, projector, signals=signals)

    def decoder(self) -> DecoderParts:
        """Return the decoder's parts, with a bidirectional prompt."""
        text = self._model.model.language_model
        return replace(_DECODERS[text.config.model_type](text, self._model.lm_head), bidirectional=True)
