"""The runtime's front door: load a bundle, ask it questions."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.bundle import CHAT_TEMPLATE, PREPROCESSOR, SPECIAL_TOKENS, TOKENIZER, Bundle
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.runtime.chat import ChatTemplate, TextCodec
from edgeprune.runtime.conversation import Conversation, Model, Stream
from edgeprune.runtime.images import read_image
from edgeprune.runtime.overlay import Panel, kept_panels, lay_out
from edgeprune.runtime.preprocess import ImageSpec
from edgeprune.runtime.preprocess import fit as fit_image
from edgeprune.runtime.providers import open_engine
from edgeprune.runtime.receipt import Receipt
from edgeprune.runtime.sampling import Sampling

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


@dataclass(frozen=True)
class Answer:
    """A finished answer and its receipt."""

    text: str
    receipt: Receipt


class Runtime:
    """A loaded model. Everything here is read-only after loading; conversations hold the state."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @property
    def plan(self) -> KeepPlan:
        """The keep plan that is frozen into the decoder."""
        return self._model.plan

    def generate(self, image: ImageLike, prompt: str, *, prune: bool = True, fit: str = "exact", **sampling: Any) -> Answer:
        """Answer one question about one image.

        `image`: a path, a Pillow image or a uint8 array [H, W, 3]. `prune=False` runs the same graphs with every visual token.
        `fit`: what to do with an image of another aspect than the bundle's: "exact" refuses, "stretch" and "pad" adapt it.
        Keywords of Sampling (max_tokens, temperature, top_p, seed, stop) are passed on. Raises ImageError and UsageError.
        """
        stream = self.stream(image, prompt, prune=prune, fit=fit, **sampling)
        return Answer("".join(stream), stream.receipt)

    def stream(self, image: ImageLike, prompt: str, *, prune: bool = True, fit: str = "exact", **sampling: Any) -> Stream:
        """Like `generate`, but return the pieces of the answer as they come."""
        if image is None:
            raise UsageError("There is no image.", hint="Pass one, or use chat() for turns without an image.")
        return self.chat(prune=prune, fit=fit).ask(prompt, image, **sampling)

    def draw(self, image: ImageLike, receipt: Receipt, *, fit: str = "exact") -> Image.Image:
        """Return the image once for each cut of an answer's receipt, the dropped visual tokens greyed out; KV caches are one."""
        return lay_out(self.panels(image, receipt, fit=fit))

    def panels(self, image: ImageLike, receipt: Receipt, *, fit: str = "exact") -> list[Panel]:
        """Return the pictures that `draw` puts side by side, with their titles."""
        geometry, caches = self.plan.geometry, {str(cut) for cut in self.plan.cache_cuts}
        picture = fit_image(read_image(image), geometry, fit, self._model.image_spec)
        kept = [(cut.cut, cut.kept) for cut in receipt.cuts if cut.cut not in caches]
        cached = [cut.kept for cut in receipt.cuts if cut.cut in caches]
        return kept_panels(picture, kept, (geometry.rows, geometry.columns), cached)

    def chat(self, *, prune: bool = True, fit: str = "exact") -> Chat:
        """Return a new conversation of several turns, with an image in any of them."""
        return Chat(Conversation(self._model, prune=prune, how=fit))


class Chat:
    """Several turns about one or more images. Use each chat from one thread at a time."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def ask(self, prompt: str, image: ImageLike | None = None, **sampling: Any) -> Stream:
        """Ask the next question, with a new image or about what was said; exhaust the stream before the next one."""
        picture = None if image is None else read_image(image)
        return self._conversation.ask(prompt, picture, _sampling(sampling))


def load(path: str | os.PathLike[str], *, threads: int | None = None, provider: str = "cpu") -> Runtime:
    """Load a bundle after checking every file against its manifest.

    `provider`: what computes, one of `edgeprune.runtime.providers.PROVIDERS`; no other is taken in its place. `threads`: of ONNX
    Runtime. Raises BundleError when a file is missing or altered, EngineError when the provider cannot be had here.
    """
    bundle = Bundle.load(Path(path))
    engine = open_engine(bundle, provider, threads)
    return Runtime(
        Model(
            engine=engine,
            codec=TextCodec(bundle.file(TOKENIZER)),
            template=ChatTemplate(bundle.file(CHAT_TEMPLATE).read_text(encoding="utf-8")),
            special_tokens=json.loads(bundle.file(SPECIAL_TOKENS).read_text(encoding="utf-8")),
            image_spec=ImageSpec.from_processor_config(json.loads(bundle.file(PREPROCESSOR).read_text(encoding="utf-8"))),
            image_token=bundle.manifest.image_token,
            end_tokens=bundle.manifest.end_tokens,
            decoder=bundle.manifest.decoder,
            plan=bundle.plan,
        )
    )


def _sampling(options: dict[str, Any]) -> Sampling:
    try:
        return Sampling(**options)
    except TypeError as error:
        known = ", ".join(Sampling.__dataclass_fields__)
        raise UsageError(f"{error}.", hint=f"Sampling options are: {known}.") from error
