"""The runtime's front door: load a bundle, ask it questions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from edgeprune.bundle import CHAT_TEMPLATE, PREPROCESSOR, SPECIAL_TOKENS, TOKENIZER, Bundle
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.processors import fit as fit_image
from edgeprune.processors import image_spec
from edgeprune.runtime.chat import ChatTemplate, TextCodec
from edgeprune.runtime.conversation import Conversation, Model, Picture, Stream
from edgeprune.runtime.images import read_image
from edgeprune.runtime.providers import open_engine
from edgeprune.runtime.receipt import CutReceipt, Receipt
from edgeprune.runtime.sampling import Sampling

if TYPE_CHECKING:  # what draws is imported by who draws: it costs a tenth of what we are here for
    from edgeprune.runtime.board import Board
    from edgeprune.runtime.overlay import Panel

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
Pictures = ImageLike | Sequence[ImageLike]


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

    def generate(self, image: Pictures, prompt: str, *, prune: bool = True, fit: str = "exact", **sampling: Any) -> Answer:
        """Answer one question about one image.

        `image`: a path, a Pillow image or a uint8 array [H, W, 3], or a list of them, which for a bundle that was made for video
        are its frames. `prune=False` runs the same graphs with every visual token.
        `fit`: what to do with an image of another aspect than the bundle's: "exact" refuses, "stretch" and "pad" adapt it.
        Keywords of Sampling (max_tokens, temperature, top_p, seed, stop) are passed on. Raises ImageError and UsageError.
        """
        stream = self.stream(image, prompt, prune=prune, fit=fit, **sampling)
        return Answer("".join(stream), stream.receipt)

    def stream(self, image: Pictures, prompt: str, *, prune: bool = True, fit: str = "exact", **sampling: Any) -> Stream:
        """Like `generate`, but return the pieces of the answer as they come."""
        if image is None:
            raise UsageError("There is no image.", hint="Pass one, or use chat() for turns without an image.")
        return self.chat(prune=prune, fit=fit).ask(prompt, image, **sampling)

    def draw(self, image: Pictures, receipt: Receipt, *, fit: str = "exact") -> Image.Image:
        """Return the image once for each cut of an answer's receipt, the dropped visual tokens greyed out; KV caches are one."""
        from edgeprune.runtime.overlay import lay_out

        return lay_out(self.panels(image, receipt, fit=fit))

    def panels(self, image: Pictures, receipt: Receipt, *, fit: str = "exact") -> list[Panel]:
        """Return the pictures that `draw` puts side by side, with their titles, one image after the other.

        Raises UsageError for a model whose visual tokens stand for no place of the image.
        """
        if not self._model.image_spec.spatial:
            raise UsageError("The visual tokens of this model stand for no place in the image: there is nothing to draw.")
        pictures = [read_image(picture) for picture in _listed(image)]
        shown = [pictures] if self._model.image.kind == "video" else [[picture] for picture in pictures]
        each = len(receipt.cuts) // len(shown)  # cuts of the images one after the other
        parts = [receipt.cuts[each * number : each * (number + 1)] for number in range(len(shown))]
        return [panel for frames, cuts in zip(shown, parts, strict=True) for panel in self._panels(frames, cuts, fit)]

    def _panels(self, frames: list[Image.Image], cuts: Sequence[CutReceipt], fit: str) -> list[Panel]:
        from edgeprune.runtime.overlay import kept_panels

        caches = {str(cut) for cut in self.plan.cache_cuts}
        kept = [(cut.cut, cut.kept) for cut in cuts if cut.cut not in caches]
        return kept_panels(self._board(frames, fit), kept, [cut.kept for cut in cuts if cut.cut in caches])

    def _board(self, frames: list[Image.Image], fit: str) -> Board:
        from edgeprune.runtime.board import Board

        geometry, spec = self.plan.geometry, self._model.image_spec
        fitted = [fit_image(frame, geometry, fit, spec) for frame in frames]
        if not geometry.views:
            return Board.plain(fitted[0], geometry.rows, geometry.columns)
        canvases = [spec.canvas(frame, geometry.frames) for frame in fitted]
        return Board.of(canvases, canvases[0].size, geometry.views)

    def chat(self, *, prune: bool = True, fit: str = "exact") -> Chat:
        """Return a new conversation of several turns, with an image in any of them."""
        return Chat(Conversation(self._model, prune=prune, how=fit))


class Chat:
    """Several turns about one or more images. Use each chat from one thread at a time."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def ask(self, prompt: str, image: Pictures | None = None, **sampling: Any) -> Stream:
        """Ask the next question, with new images or about what was said; exhaust the stream before the next one.

        `image`: one, or a list; of a bundle for video the list of the frames.
        """
        return self._conversation.ask(prompt, self._pictures(image), _sampling(sampling))

    def _pictures(self, image: Pictures | None) -> list[Picture]:
        if image is None:
            return []
        pictures = [read_image(picture) for picture in _listed(image)]
        return [pictures] if self._conversation.kind == "video" else list(pictures)


def load(path: str | os.PathLike[str], *, threads: int | None = None, provider: str = "cpu") -> Runtime:
    """Load a bundle after checking every file against its manifest.

    `provider`: what computes, one of `edgeprune.runtime.providers.PROVIDERS`; no other is taken in its place. `threads`: of ONNX
    Runtime. Raises BundleError when a file is missing or altered, EngineError when the provider cannot be had here.
    """
    with Bundle.opening(Path(path)) as bundle:
        engine = open_engine(bundle, provider, threads)
        return Runtime(
            Model(
                engine=engine,
                codec=TextCodec(bundle.file(TOKENIZER)),
                template=ChatTemplate(bundle.file(CHAT_TEMPLATE).read_text(encoding="utf-8")),
                special_tokens=json.loads(bundle.file(SPECIAL_TOKENS).read_text(encoding="utf-8")),
                image_spec=image_spec(json.loads(bundle.file(PREPROCESSOR).read_text(encoding="utf-8"))),
                image=bundle.manifest.image,
                end_tokens=bundle.manifest.end_tokens,
                decoder=bundle.manifest.decoder,
                plan=bundle.plan,
            )
        )


def _listed(image: Pictures) -> list[ImageLike]:
    return list(image) if isinstance(image, (list, tuple)) else [image]  # type: ignore[list-item]


def _sampling(options: dict[str, Any]) -> Sampling:
    try:
        return Sampling(**options)
    except TypeError as error:
        known = ", ".join(Sampling.__dataclass_fields__)
        raise UsageError(f"{error}.", hint=f"Sampling options are: {known}.") from error
