"""A conversation: messages, their images, the caches that hold them from one answer to the next, and the stream of an answer."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from edgeprune.errors import UsageError
from edgeprune.processors import fit
from edgeprune.runtime.backends.interface import CANCELLED, CancellationToken, Cancelled, DecoderOutput
from edgeprune.runtime.backends.kv_cache import KvCache
from edgeprune.runtime.generation.decode import DecodeLoop
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.runtime.generation.prefill import ImageInput, Prefill
from edgeprune.runtime.generation.request import Request, RequestLimits
from edgeprune.runtime.generation.sampling import Sampler, Sampling
from edgeprune.runtime.generation.sequence import DecodeKeepRatio, SequenceState
from edgeprune.runtime.media.images import image_hash
from edgeprune.runtime.telemetry.receipt import Receipt
from edgeprune.runtime.text.prompt import ImagePlaceholders, Message
from edgeprune.runtime.text.tokenizer import reject_control_tokens

ImageOrFrames = Image.Image | Sequence[Image.Image]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What was said before a conversation begins: `role` is one of ROLES; only a user shows `images`."""

    role: str
    text: str
    images: Sequence[ImageOrFrames] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"Unknown role {self.role!r}.", hint=f"Roles are: {', '.join(ROLES)}.")
        if self.images and self.role != "user":
            raise UsageError(f"A turn of the {self.role} has images.", hint="Put them into a turn of the user.")


class Stream:
    """An answer being generated, an iterator of pieces of text; nothing runs before the first is asked for.

    One thread reads, any thread may cancel. `text` is what was said so far; `receipt` fills as it goes and is final at the end.
    """

    def __init__(self, pieces: Generator[str], receipt: Receipt, cancellation: CancellationToken) -> None:
        self._pieces, self._cancellation = pieces, cancellation
        self._reading = threading.Lock()
        self.receipt = receipt
        self.text = ""

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        with self._reading:
            piece = next(self._pieces)
            self.text += piece
            return piece

    def cancel(self) -> None:
        """Ask for the end and return at once. The reader's iteration ends within one decode step; what was said is the answer."""
        self._cancellation.cancel(CANCELLED)

    def close(self) -> None:
        """Stop generating, from any thread, and wait until that has happened; what was said so far is the answer."""
        self.cancel()
        with self._reading:
            self._pieces.close()


class Conversation:
    """Several turns on the same caches. One thread asks and reads at a time."""

    def __init__(self, pipeline: Pipeline, *, prune: bool = True, fit: str = "exact", history: Sequence[Turn] = ()) -> None:
        self._pipeline, self._prune, self._fit = pipeline, prune, fit
        self._layout = ImagePlaceholders(pipeline.image, pipeline.plan.geometry, pipeline.tokenizer)
        self._messages: list[Message] = []
        self._images: list[ImageInput] = []  # in the order of the messages
        self._history = tuple(history)  # what is not yet among the messages
        self._stream: Stream | None = None
        self._reset()

    def _reset(self) -> None:
        self._sequence = SequenceState(self._pipeline, self._layout.spans, prune=self._prune)

    @property
    def kind(self) -> str:
        """What the conversation is about: "image" or "video"."""
        return self._layout.kind

    @property
    def cache(self) -> KvCache:
        """What the conversation has taken in."""
        return self._sequence.cache

    def ask(
        self,
        prompt: str,
        images: Sequence[ImageOrFrames] = (),
        sampling: Sampling | None = None,
        limits: RequestLimits | None = None,
    ) -> Stream:
        """Return the stream of the answer to the next user turn.

        Of a bundle for video each of `images` is the list of its frames. A stream that is never read leaves no trace; one that is
        still running is ended by asking again. Raises UsageError and ImageError before anything has changed.
        """
        if not prompt.strip():
            raise UsageError("The prompt is empty.", hint="Ask something about the image.")
        limits = limits or RequestLimits()
        if limits.tier is not None:
            self._pipeline.tier(limits.tier)  # refuses one that is not there
            if not self._prune:
                raise UsageError("Without pruning there are no tiers.", hint="Leave tier or prune=False out.")
        sampling = sampling or Sampling()
        form = self._pipeline.grammars.constraint(sampling.choices, sampling.json_schema) if sampling.structured else None
        sampler = Sampler(sampling, form)
        turns = (*self._history, Turn("user", prompt, images))
        for turn in turns:
            reject_control_tokens(turn.text, self._pipeline.tokenizer, self._layout.placeholder)
        pictured = bool(images) or any(turn.images for turn in self._history)
        why_not = "the answer ended before the image was taken in" if pictured else "this turn has no image"
        receipt = Receipt(pruned=False, reason=why_not, deadline_ms=limits.deadline_ms)
        request = Request(sampler, limits, receipt)
        messages = [self._message(turn) for turn in turns]
        shown = [self._prepare_image(image, turn.text, receipt) for turn in turns for image in turn.images]
        if self._stream is not None:
            self._stream.close()
        self._stream = Stream(self._answer(messages, shown, request), receipt, request.cancellation)
        return self._stream

    def _message(self, turn: Turn) -> Message:
        parts = [{"type": self._layout.kind} for _ in turn.images] + [{"type": "text", "text": turn.text}]
        return {"role": turn.role, "content": parts}  # some templates drop a mere string

    def _prepare_image(self, picture: ImageOrFrames, words: str, receipt: Receipt) -> ImageInput:
        spec, geometry = self._pipeline.image_spec, self._pipeline.plan.geometry
        with receipt.times.stage("preprocess"):
            frames = [picture] if isinstance(picture, Image.Image) else list(picture)
            if len(frames) != geometry.frames:
                raise UsageError(f"The bundle takes {geometry}, not {len(frames)} at once.", hint="Give as many frames as it says.")
            key = image_hash(frames, self._fit, self._prune) if self._pipeline.state.feature_cache.budget else None
            fitted = [fit(frame, geometry, self._fit, spec) for frame in frames]
            return ImageInput(words, partial(spec.patches, fitted), key)

    def _answer(self, turns: list[Message], shown: list[ImageInput], request: Request) -> Generator[str]:
        receipt, cancellation = request.receipt, request.cancellation
        with self._pipeline.state.track_answer(receipt):
            try:
                cancellation.raise_if_cancelled()
                ids = self._tokens(turns, len(shown))
                prefill = self._prefill(ids, shown, request)
            except Cancelled:  # before it began, or while the images were looked at: the conversation is as it was
                receipt.finish_reason = str(cancellation.reason)
                return
            except BaseException as error:
                receipt.finish_reason = "error" if isinstance(error, Exception) else "cancelled"
                raise
            self._messages += turns
            self._images += shown
            self._history = ()
            yield from self._generate(ids, prefill, request)

    def _generate(self, ids: list[int], prefill: Prefill, request: Request) -> Generator[str]:
        # However the stream ends, the conversation stays whole: what was said so far is the answer.
        receipt, said = request.receipt, list[int]()
        try:
            step, token = self._first(ids, prefill, request)
            keep_ratio = (
                DecodeKeepRatio(self._pipeline.backend, prefill.plan.decode) if self._prune and receipt.visual_tokens else None
            )
            generation = DecodeLoop(self._pipeline, self._sequence, request, keep_ratio, prefill.max_kv_bytes)
            said = generation.token_ids
            yield from generation.run(step, token)
            self._update_latency(prefill, receipt)
        except GeneratorExit:
            receipt.finish_reason = "cancelled"
            raise
        except Cancelled:
            receipt.finish_reason = str(request.cancellation.reason)
            self._reset()  # the caches hold half a turn
        except BaseException as error:  # Ctrl-C too: the caches may hold half a turn
            receipt.finish_reason = "error" if isinstance(error, Exception) else "cancelled"
            self._reset()
            raise
        finally:
            self._messages.append(self._message(Turn("assistant", self._pipeline.tokenizer.decode(said))))

    def _first(self, ids: list[int], prefill: Prefill, request: Request) -> tuple[DecoderOutput, int]:
        with request.receipt.times.stage("prefill"), request.cancellation.deadline(request.remaining):
            if ids[: len(self._sequence.ids)] != self._sequence.ids:
                self._reset()  # the text was tokenised otherwise than it was generated: start over, images are kept
            with self._pipeline.lock.acquire(request.cancellation):
                step = prefill.run(self._sequence, ids, self._images, request.sampler.sampling.max_tokens)
            return step, request.sampler.sample(step.logits)

    def _update_latency(self, prefill: Prefill, receipt: Receipt) -> None:
        times, images = receipt.times, receipt.visual_tokens // self._pipeline.plan.geometry.tokens
        if not self._prune:
            return
        prefill_ms = (times.prefill_ms + times.select_ms) / images if images and "prefix" not in receipt.reused else None
        whole = receipt.finish_reason in ("end", "stop")
        self._pipeline.state.latency.update(prefill.tier, prefill_ms, times.ms_per_token, receipt.generated_tokens if whole else 0)

    def _tokens(self, turns: list[Message], images: int) -> list[int]:
        # All of the conversation with these turns; refused before anything changes.
        messages, images = [*self._messages, *turns], images + len(self._images)
        prompt = self._pipeline.chat_template.render(messages, add_generation_prompt=True, **self._pipeline.special_tokens)
        ids = self._pipeline.tokenizer.encode_prompt(self._layout.expand(prompt), self._pipeline.special_tokens.get("bos_token"))
        if self._layout.count(ids) != images:
            raise UsageError("The chat template of this model does not place one image token for each image.")
        length = len(ids) + images * (self._pipeline.plan.geometry.tokens - len(self._layout.spans))
        if length > self._pipeline.decoder.context:
            raise UsageError(
                f"The conversation would be {length} tokens long, but the model takes {self._pipeline.decoder.context}.",
                hint="Begin a new one, or ask with fewer images.",
            )
        return ids

    def _prefill(self, ids: list[int], shown: list[ImageInput], request: Request) -> Prefill:
        # What has to be decided before the conversation changes. It may have to be read again from its beginning.
        prefill = Prefill(self._pipeline, self._layout, request, prune=self._prune)
        for image in shown:
            prefill.encode(image)
        again = ids[: len(self._sequence.ids)] != self._sequence.ids
        images = len(self._images) + len(shown) - (0 if again else self._sequence.images)
        text = len(ids) - (0 if again else len(self._sequence.ids)) - images * len(self._layout.spans)
        prefill.choose_tier(0 if again else self._sequence.cache.bytes, images, text)
        return prefill
