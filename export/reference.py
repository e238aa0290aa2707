"""The eager reference: the same generation loop as the runtime, on PyTorch instead of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from edgeprune.export.loading import LoadedModel
from edgeprune.model import PrunedDecoder, Segment
from edgeprune.plan import KeepPlan
from edgeprune.runtime.chat import ChatTemplate, TextCodec
from edgeprune.runtime.conversation import Model
from edgeprune.runtime.engine import Step, Tokens
from edgeprune.runtime.preprocess import ImageSpec


class EagerEngine:
    """The family's modules and the pruned decoder, run eagerly."""

    def __init__(self, loaded: LoadedModel, plan: KeepPlan) -> None:
        parts = loaded.family.decoder()
        self._vision = loaded.family.vision(plan.geometry).eval()
        self._embed = parts.embed_tokens
        self._decoder = PrunedDecoder(parts, plan).eval()

    @torch.no_grad()
    def see(self, patches: np.ndarray) -> np.ndarray:
        """Return visual tokens [1, V, hidden] of patches [patches, patch pixels]."""
        return _array(self._vision(torch.from_numpy(patches)))

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return embeddings [1, n, hidden]."""
        return _array(self._embed(torch.tensor([list(ids)])))

    @torch.no_grad()
    def step(self, prefix: Tokens, visual: Tokens, suffix: Tokens, caches: Any) -> Step:
        """Run the tokens of three segments on top of `caches` (None: empty ones)."""
        segments = [
            Segment(torch.from_numpy(tokens.embeds), torch.from_numpy(tokens.positions)) for tokens in (prefix, visual, suffix)
        ]
        output = self._decoder(*segments, self._decoder.empty_caches() if caches is None else caches)
        return Step(_array(output.logits)[0, 0], output.caches, tuple(_array(kept) for kept in output.kept))

    def cache_bytes(self, caches: Any) -> int:
        """Return the bytes that the keys and values take."""
        return sum(part.nbytes for cache in caches or () for part in cache)


def reference_model(loaded: LoadedModel, plan: KeepPlan) -> Model:
    """Return the model behind the runtime's interface; wrap it in `edgeprune.runtime.Runtime` to ask it questions."""
    loaded.check_plan(plan)
    return Model(
        engine=EagerEngine(loaded, plan),
        codec=TextCodec(Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())),
        template=ChatTemplate(loaded.chat_template()),
        special_tokens=loaded.special_tokens(),
        image_spec=ImageSpec.from_processor_config(loaded.processor(plan.geometry)),
        image_token=int(loaded.model.config.image_token_id),
        end_tokens=loaded.end_tokens(),
        hidden=loaded.family.decoder().hidden,
        position_axes=loaded.family.position_axes,
        plan=plan,
    )


def _array(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array
