"""A first answer that nobody waits for.

A loaded model, and the questions it can be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.processors import fit as fit_image
from edgeprune.runtime.generation.conversation import Conversation, ImageOrFrames, Stream, Turn
from edgeprune.runtime.generation.pipeline import Pipeline, ReceiptCallback, SharedState
from edgeprune.runtime.generation.request import LatencyEstimate, RequestLimits
from edgeprune.runtime.generation.sampling import Sampling
from edgeprune.runtime.media.feed import Feed
from edgeprune.runtime.media.images import ImageSource, read_image
from edgeprune.runtime.telemetry.receipt import ImageCuts, Receipt

if TYPE_CHECKING:
    from edgeprune.runtime.media.overlay import Panel, TokenCanvas

_TOKENS = 4
_GREY = (128, 128, 128)

ImageOrImages = ImageSource | Sequence[ImageSource]


def warm_up(pipeline: Pipeline) -> None:
    """Answer about a grey picture of the bundle's size, twice under every tier: the first time allocates, the second is measured.

    Nobody is told of these answers, and nothing of them is recalled.
    """
    geometry = pipeline.plan.geometry
    grey = Image.new("RGB", (geometry.width, geometry.height), _GREY)
    picture = [grey] * geometry.frames if pipeline.image.kind == "video" else grey
    names: list[str | None] = [name for name, _ in pipeline.tiers] or [None]
    for latency in (LatencyEstimate(), pipeline.state.latency):
        alone = replace(pipeline, eos_token_ids=(), state=SharedState(latency=latency))
        for name in names:
            conversation = Conversation(alone, fit="stretch")
            for _ in conversation.ask("?", [picture], Sampling(max_tokens=_TOKENS), RequestLimits(tier=name)):
                pass


@dataclass(frozen=True)
class Answer:
    """A finished answer and its receipt."""

    text: str
    receipt: Receipt


class Runtime:
    """A loaded model, for any number of threads: conversations hold the state, and their graphs run one at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._warming = False

    @property
    def plan(self) -> KeepPlan:
        """The keep plan that is frozen into the decoder; of a bundle with tiers the first."""
        return self._pipeline.plan

    @property
    def tiers(self) -> tuple[str, ...]:
        """The names of the budgets that the bundle was prepared for, the best first; none where it has one plan."""
        return tuple(name for name, _ in self._pipeline.tiers)

    @property
    def kind(self) -> str:
        """What the bundle was made for: "image" or "video"."""
        return self._pipeline.image.kind

    @property
    def spatial(self) -> bool:
        """Whether visual tokens stand for places of the image, so that they can be drawn."""
        return self._pipeline.image_spec.spatial

    @property
    def name(self) -> str:
        """The model as it was named when it was exported."""
        return self._pipeline.name

    @property
    def phase(self) -> str:
        """What it is doing: "warming", "busy" while an answer is generated, else "ready"."""
        if self._warming:
            return "warming"
        return "busy" if self._pipeline.state.running else "ready"

    def watch(self, watcher: ReceiptCallback) -> None:
        """Call `watcher` with the receipt of every answer when it has ended, in the thread that read it."""
        self._pipeline.state.watchers.append(watcher)

    def forget(self) -> None:
        """Empty the cache of image embeddings and prefixes."""
        self._pipeline.state.feature_cache.clear()

    def warm_up(self) -> None:
        """Answer about a grey picture under every tier, so that later answers find memory allocated and their pace known."""
        self._warming = True
        try:
            warm_up(self._pipeline)
        finally:
            self._warming = False

    def generate(self, image: ImageOrImages, prompt: str, *, prune: bool = True, fit: str = "exact", **options: Any) -> Answer:
        """Answer one question about one image.

        `image`: a path, a Pillow image, a uint8 array [H, W, 3] or a frame as `read_image` takes it, or a list of them, which for a
        bundle that was made for video are its frames. `prune=False` runs the same graphs with every visual token. `fit`: what to do
        with an image of another aspect than the bundle's: "exact" refuses, "stretch" and "pad" adapt it. Keywords of RequestLimits
        (tier, deadline_ms, max_kv_bytes) and of Sampling (max_tokens, temperature, top_p, seed, stop, ...) are passed on. Raises
        ImageError and UsageError.
        """
        stream = self.stream(image, prompt, prune=prune, fit=fit, **options)
        return Answer("".join(stream), stream.receipt)

    def stream(self, image: ImageOrImages, prompt: str, *, prune: bool = True, fit: str = "exact", **options: Any) -> Stream:
        """Like `generate`, but return the pieces of the answer as they come."""
        if image is None:
            raise UsageError("There is no image.", hint="Pass one, or use chat() for turns without an image.")
        return self.chat(prune=prune, fit=fit).ask(prompt, image, **options)

    def ask_latest(self, feed: Feed, prompt: str, *, timeout: float | None = None, **options: Any) -> Stream:
        """Like `stream`, about the newest frame of a feed, or of a bundle for video the newest frames.

        Waits for a frame that was not asked about before, at most `timeout` seconds; raises what `Feed.take` raises. The receipt
        says how old the frame was and how many were dropped.
        """
        shot = feed.take(timeout=timeout)
        frames = list(shot.frames)
        stream = self.stream(frames if self.kind == "video" else frames[-1], prompt, **options)
        stream.receipt.captured, stream.receipt.frames_dropped = shot.captured, shot.dropped
        return stream

    def draw(self, image: ImageOrImages, receipt: Receipt, *, fit: str = "exact") -> Image.Image:
        """Return the image once for each cut of an answer's receipt, the dropped visual tokens greyed out; KV caches are one."""
        from edgeprune.runtime.media.overlay import join_panels

        return join_panels(self.panels(image, receipt, fit=fit))

    def panels(self, image: ImageOrImages, receipt: Receipt, *, fit: str = "exact") -> list[Panel]:
        """Return the pictures that `draw` puts side by side, with their titles, one image after the other.

        Raises UsageError for a model whose visual tokens stand for no place of the image.
        """
        if not self.spatial:
            raise UsageError("The visual tokens of this model stand for no place in the image: there is nothing to draw.")
        pictures = [read_image(picture) for picture in _as_list(image)]
        shown = [pictures] if self._pipeline.image.kind == "video" else [[picture] for picture in pictures]
        parts = zip(shown, receipt.cuts_by_image(len(shown)), strict=True)
        return [panel for frames, cuts in parts for panel in self._panels(frames, cuts, fit)]

    def _panels(self, frames: list[Image.Image], cuts: ImageCuts, fit: str) -> list[Panel]:
        from edgeprune.runtime.media.overlay import kept_token_panels

        kept = [(cut.cut, cut.kept) for cut in cuts.tokens]
        return kept_token_panels(self._board(frames, fit), kept, [cut.kept for cut in cuts.caches])

    def _board(self, frames: list[Image.Image], fit: str) -> TokenCanvas:
        from edgeprune.runtime.media.overlay import TokenCanvas

        geometry, spec = self.plan.geometry, self._pipeline.image_spec
        fitted = [fit_image(frame, geometry, fit, spec) for frame in frames]
        if not geometry.views:
            return TokenCanvas.plain(fitted[0], geometry.rows, geometry.columns)
        canvases = [spec.canvas(frame, geometry.frames) for frame in fitted]
        return TokenCanvas.of(canvases, canvases[0].size, geometry.views)

    def chat(self, *, prune: bool = True, fit: str = "exact", history: Sequence[Turn] = ()) -> Chat:
        """Return a new conversation of several turns, with an image in any of them.

        `history`: what was said before, a system prompt perhaps. Raises UsageError and ImageError.
        """
        read = [replace(turn, images=_read_images(turn.images, self.kind)) for turn in history]
        return Chat(Conversation(self._pipeline, prune=prune, fit=fit, history=read))


class Chat:
    """Several turns about one or more images. Use each chat from one thread at a time."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def ask(self, prompt: str, image: ImageOrImages | None = None, **options: Any) -> Stream:
        """Ask the next question, with new images or about what was said; exhaust the stream before the next one.

        `image`: one, or a list; of a bundle for video the list of the frames. Keywords as those of `Runtime.generate`.
        """
        pictures = [] if image is None else _read_images(_as_list(image), self._conversation.kind)
        named = {name: options.pop(name) for name in RequestLimits.__dataclass_fields__ if name in options}
        return self._conversation.ask(prompt, pictures, _sampling(options), RequestLimits(**named))


def _read_images(images: Sequence[Any], kind: str) -> list[ImageOrFrames]:
    # The frames of a video are one picture.
    pictures = [read_image(image) for image in images]
    return list(pictures) if kind != "video" or not pictures else [pictures]


def _as_list(image: ImageOrImages) -> list[ImageSource]:
    return list(image) if isinstance(image, (list, tuple)) else [image]  # type: ignore[list-item]


def _sampling(options: dict[str, Any]) -> Sampling:
    unknown = [name for name in options if name not in Sampling.__dataclass_fields__]
    if unknown:
        known = ", ".join([*Sampling.__dataclass_fields__, *RequestLimits.__dataclass_fields__])
        raise UsageError(f"There is no option {unknown[0]!r}.", hint=f"Options are: {known}.")
    try:
        return Sampling(**options)
    except TypeError as error:
        raise UsageError(f"An option is of the wrong type: {error}.") from error
