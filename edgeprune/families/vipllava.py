"""ViP-LLaVA: LLaVA whose projector sees CLIP's features of several layers side by side, behind a norm.

Cai et al., arXiv 2312.00784; the modules are those of transformers' models/vipllava/modeling_vipllava.py. Which layers is the
configuration's `vision_feature_layers`; the class token is always left out, so SigLIP, which has none, would lose a patch.

Departure: a single layer is refused. The config.json of vip-llava-7b-hf names one (-2), which transformers once ignored and now
believes, and then builds a projector that the weights do not fit.
"""

from __future__ import annotations

from typing import Any

from edgeprune.errors import UnsupportedModelError
from edgeprune.families.encoder import CLIP, check_encoder
from edgeprune.families.llava import Llava
from edgeprune.families.text import check_text


class VipLlava(Llava):
    """Where the parts of a VipLlavaForConditionalGeneration are."""

    name = "vipllava"

    @staticmethod
    def check(config: Any) -> None:
        """Refuse quantized weights, other encoders and decoders, and features of one layer alone."""
        check_text(config)
        check_encoder(config, CLIP)
        layers = config.vision_feature_layer
        if isinstance(layers, int):
            raise UnsupportedModelError(
                f"Its config.json names a single layer of vision features, {layers}, but ViP-LLaVA has several.",
                hint='Replace it by those of its training, "vision_feature_layers": [-2, -5, -8, -11, 6] in vip-llava-7b-hf.',
            )
