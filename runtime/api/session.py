"""The public objects of the runtime: a loaded model (`Runtime`), its conversations (`Chat`) and finished answers (`Answer`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.processors import fit as fit_image
from edgeprune.runtime.api.options import AnswerOptions, parse_options
from edgeprune.runtime.backends.shared import GuardedBackend
from edgeprune.runtime.generation.conversation import (
    Conversation,
    ImageOrFrames,
    PreparedImage,
    Prompt,
    Stream,
    Turn,
    prepare_image,
)
from edgeprune.runtime.generation.pipeline import Pipeline, ReceiptCallback, SharedState
from edgeprune.runtime.generation.request import LatencyEstimate, RequestLimits
from edgeprune.runtime.generation.sampling import Sampling
from edgeprune.runtime.media.feed import Feed
from edgeprune.runtime.media.images import ImageSource, read_image
from edgeprune.runtime.telemetry.receipt import ImageCuts, Receipt, shorten

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

    from edgeprune.runtime.media.overlay import Panel, TokenCanvas

_WARM_UP_TOKENS = 4
_GREY = (128, 128, 128)

ImageOrImages = ImageSource | PreparedImage | Sequence[ImageSource | PreparedImage]


@dataclass(frozen=True)
class Answer:
    """A finished answer and its receipt."""

    text: str
    receipt: Receipt

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Answer({shorten(self.text)!r}, {self.receipt!r})"


class Runtime:
    """A loaded model. Thread-safe: each conversation holds its own state, and graphs run one at a time.

    As a context manager, `with load(...) as model:`, it is closed at the end of the block.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._warming = False

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._pipeline.state.closed else self.phase
        return f"<Runtime {state}: {self.name}, {self.kind}s of {self.plan.geometry}, {len(self.plan.cuts)} cuts>"

    def close(self) -> None:
        """Wait for the graph that runs and release the memory of graphs, engines and caches; a second call does nothing.

        Later questions raise UsageError, and so does an answer that has not ended.
        """
        state = self._pipeline.state
        if state.closed:
            return
        state.closed = True
        if isinstance(self._pipeline.backend, GuardedBackend):
            self._pipeline.backend.close()
        self.forget()

    @property
    def plan(self) -> KeepPlan:
        """The keep plan that is frozen into the decoder; the plan of the first tier if the bundle has several."""
        return self._pipeline.plan

    @property
    def tiers(self) -> tuple[str, ...]:
        """The names of the bundle's tiers, highest quality first; empty if the bundle has one plan."""
        return tuple(name for name, _ in self._pipeline.tiers)

    @property
    def kind(self) -> str:
        """The input kind of the bundle: "image" or "video"."""
        return self._pipeline.image.kind

    @property
    def spatial(self) -> bool:
        """Whether each visual token corresponds to a region of the image, so that `draw` works."""
        return self._pipeline.image_spec.spatial

    @property
    def name(self) -> str:
        """The name of the exported model."""
        return self._pipeline.name

    @property
    def phase(self) -> str:
        """The current state: "warming", "busy" while an answer is generated, else "ready"."""
        if self._warming:
            return "warming"
        return "busy" if self._pipeline.state.running else "ready"

    def watch(self, watcher: ReceiptCallback) -> None:
        """Call `watcher` with the receipt of every answer once it has ended, in the thread that consumed the stream.

        A watcher may ask, also in the same chat. One that raises is logged to the logger "edgeprune"; the answer stays as it is.
        """
        self._pipeline.state.watchers.append(watcher)

    def forget(self) -> None:
        """Empty the cache of image embeddings and prefixes."""
        self._pipeline.state.feature_cache.clear()

    def warm_up(self) -> None:
        """Answer a prompt about a grey image twice per tier: the first answer allocates memory, the second measures latency.

        These answers reach no watcher and leave nothing in the cache.
        """
        pipeline, geometry = self._pipeline, self._pipeline.plan.geometry
        grey = Image.new("RGB", (geometry.width, geometry.height), _GREY)
        image = [grey] * geometry.frames if self.kind == "video" else grey
        tiers: tuple[str | None, ...] = self.tiers or (None,)
        self._warming = True
        try:
            for latency in (LatencyEstimate(), pipeline.state.latency):  # the estimate of the first round is discarded
                isolated = replace(pipeline, eos_token_ids=(), state=SharedState(latency=latency))
                for tier in tiers:
                    conversation = Conversation(isolated, fit="stretch")
                    for _ in conversation.ask("?", [image], Sampling(max_tokens=_WARM_UP_TOKENS), RequestLimits(tier=tier)):
                        pass
        finally:
            self._warming = False

    def generate(
        self, image: ImageOrImages, prompt: str, *, prune: bool = True, fit: str = "exact", **options: Unpack[AnswerOptions]
    ) -> Answer:
        """Answer one prompt about one or more images.

        * `image`: a path, the bytes of an image file, a binary file object, a Pillow image, a uint8 array [H, W], [H, W, 1],
          [H, W, 3] or [H, W, 4], a DLPack array, an NV12 frame, or a list of them. For a video bundle the list holds the frames.
        * `prompt`: the question.
        * `prune`: False runs the same graphs with all visual tokens.
        * `fit`: what to do with an image whose aspect ratio differs from the bundle's: "exact" raises ImageError, "stretch"
          distorts it, "pad" adds grey bars.
        * `options`: the keywords of an answer that AnswerOptions lists: limits (`tier`, `deadline_ms`, `max_kv_bytes`) and sampling
          (`max_tokens`, `temperature`, `top_p`, `seed`, `stop`, `choices`, `json_schema`, ...).

        Raises ImageError for an image that cannot be used, UsageError for other arguments, and EngineError if the engine fails.
        """
        stream = self.stream(image, prompt, prune=prune, fit=fit, **options)
        return Answer("".join(stream), stream.receipt)

    def stream(
        self, image: ImageOrImages, prompt: str, *, prune: bool = True, fit: str = "exact", **options: Unpack[AnswerOptions]
    ) -> Stream:
        """Like `generate`, but return the answer as a stream of text pieces."""
        if image is None:
            raise UsageError("There is no image.", hint="Pass one, or use chat() for turns without an image.")
        return self.chat(prune=prune, fit=fit).ask(prompt, image, **options)

    def ask_latest(
        self,
        feed: Feed,
        prompt: str,
        *,
        timeout: float | None = None,
        prune: bool = True,
        fit: str = "exact",
        **options: Unpack[AnswerOptions],
    ) -> Stream:
        """Like `stream`, but about the newest frame of a feed (the newest frames for a video bundle).

        Waits at most `timeout` seconds for a frame that no earlier request used. Raises the errors of `Feed.take`. The receipt
        reports the age of the frame and the number of dropped frames.
        """
        shot = feed.take(timeout=timeout)
        frames = list(shot.frames)
        stream = self.stream(frames if self.kind == "video" else frames[-1], prompt, prune=prune, fit=fit, **options)
        stream.receipt.captured, stream.receipt.frames_dropped = shot.captured_monotonic, shot.dropped
        return stream

    def draw(
        self, image: ImageOrImages, receipt: Receipt, *, fit: str = "exact", question: str = "", answer: str = ""
    ) -> Image.Image:
        """Return one panel per cut of the receipt, with dropped visual tokens greyed out; all cache cuts share one panel.

        `question` and `answer` are written above the panels.
        """
        from edgeprune.runtime.media.sheet import join_panels

        images = 1 if self.kind == "video" else len(_as_list(image))
        return join_panels(self.panels(image, receipt, fit=fit), images=images, question=question, answer=answer)

    def panels(self, image: ImageOrImages, receipt: Receipt, *, fit: str = "exact") -> list[Panel]:
        """Return the panels that `draw` joins, with their titles, image by image.

        Raises UsageError if the model's visual tokens do not correspond to regions of the image.
        """
        if not self.spatial:
            raise UsageError("The visual tokens of this model stand for no place in the image: there is nothing to draw.")
        images = [read_image(source) for source in _as_list(image)]
        inputs = [images] if self.kind == "video" else [[frame] for frame in images]
        cuts_by_image = receipt.cuts_by_image(len(inputs))
        return [panel for frames, cuts in zip(inputs, cuts_by_image, strict=True) for panel in self._panels(frames, cuts, fit)]

    def _panels(self, frames: list[Image.Image], cuts: ImageCuts, fit: str) -> list[Panel]:
        from edgeprune.runtime.media.overlay import kept_token_panels

        kept = [(cut.cut, cut.kept) for cut in cuts.tokens]
        return kept_token_panels(self._canvas(frames, fit), kept, [cut.kept for cut in cuts.caches])

    def _canvas(self, frames: list[Image.Image], fit: str) -> TokenCanvas:
        from edgeprune.runtime.media.overlay import TokenCanvas

        geometry, spec = self.plan.geometry, self._pipeline.image_spec
        fitted = [fit_image(frame, geometry, fit, spec) for frame in frames]
        if not geometry.views:
            return TokenCanvas.plain(fitted[0], geometry.rows, geometry.columns)
        canvases = [spec.canvas(frame, geometry.frames) for frame in fitted]
        return TokenCanvas.of(canvases, canvases[0].size, geometry.views)

    def chat(self, *, prune: bool = True, fit: str = "exact", history: Sequence[Turn] = ()) -> Chat:
        """Return a new multi-turn conversation. Any turn may have images.

        `history`: earlier turns, for example a system prompt. Raises UsageError and ImageError.
        """
        kind = self.kind
        read = [replace(turn, text=_read_prompt(turn.text), images=_read_images(turn.images, kind)) for turn in history]
        return Chat(Conversation(self._pipeline, prune=prune, fit=fit, history=read))

    def prepare(self, image: ImageOrImages, *, fit: str = "exact") -> PreparedImage:
        """Return an image, or the frames of a video, in the form that waits in little memory, for turns and prompts of this model.

        It holds the pixels at about the bundle's size, not those of the source. Raises ImageError and UsageError.
        """
        frames = [read_image(source) for source in _as_list(image)]
        return prepare_image(self._pipeline, frames, fit, compact=True)


class Chat:
    """A multi-turn conversation about one or more images. Use each chat from one thread at a time; others get a UsageError."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def __repr__(self) -> str:
        return f"<Chat of {self._conversation.turns} turns>"

    def ask(
        self, prompt: Prompt, image: ImageOrImages | None = None, *, rerank: bool = False, **options: Unpack[AnswerOptions]
    ) -> Stream:
        """Start the next user turn, with or without new images. Exhaust the stream before the next call.

        `prompt`: a text, or a list of texts and images in order (each a list of frames for a video bundle). `image`: an image or a
        list of them, before the text; for a video bundle, the list of frames. `rerank`: choose the visual tokens of earlier images
        anew, by this question; the whole chat is then prefilled again. UsageError is raised if there is nothing to rank. `options`:
        as in `Runtime.generate`.
        """
        images = [] if image is None else _read_images(_as_list(image), self._conversation.kind)
        return self._conversation.ask(_read_prompt(prompt), images, *parse_options(options), rerank=rerank)


def _read_images(images: Sequence[Any], kind: str) -> list[ImageOrFrames]:
    # All frames of a video count as one image.
    if any(isinstance(image, PreparedImage) for image in images):
        return list(images)
    frames = [read_image(image) for image in images]
    return [frames] if kind == "video" and frames else list(frames)


def _read_prompt(prompt: Prompt) -> Prompt:
    return [_read_part(part) for part in prompt] if isinstance(prompt, (list, tuple)) else prompt


def _read_part(part: Any) -> str | ImageOrFrames:
    if isinstance(part, (str, PreparedImage)):
        return part
    return [read_image(frame) for frame in part] if isinstance(part, (list, tuple)) else read_image(part)


def _as_list(image: ImageOrImages) -> list[ImageSource]:
    return list(image) if isinstance(image, (list, tuple)) else [image]  # type: ignore[list-item]
