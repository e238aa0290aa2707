"""Multi-turn conversations: messages, images, the KV cache that persists between answers, and the stream of an answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from edgeprune.errors import UsageError
from edgeprune.processors import fit
from edgeprune.runtime.backends.interface import CANCELLED, DEADLINE, CancellationToken, Cancelled, DecoderOutput
from edgeprune.runtime.backends.kv_cache import KvCache
from edgeprune.runtime.backends.shared import closed_model
from edgeprune.runtime.generation.decode import DecodeLoop
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.runtime.generation.prefill import ImageInput, Prefill, prefix_cacheable
from edgeprune.runtime.generation.request import UNFINISHED, Request, RequestLimits
from edgeprune.runtime.generation.sampling import Sampler, Sampling
from edgeprune.runtime.generation.sequence import DecodeKeepRatio, SequenceState
from edgeprune.runtime.media.images import image_hash
from edgeprune.runtime.telemetry.receipt import RUNNING, Receipt, shorten
from edgeprune.runtime.text.prompt import CHARS_PER_TOKEN, Message
from edgeprune.runtime.text.tokenizer import reject_control_tokens, reject_unencodable

ROLES = ("system", "user", "assistant")
_LARGE = 3  # times the bundle's pixels, whose float32 patches then take less memory than the image


@dataclass(frozen=True)
class PreparedImage:
    """An image, or the frames of a video, ready for the vision encoder.

    `patches`: returns the array [patches, patch pixels]. `key`: a hash of the fitted pixels, None without a cache.
    """

    patches: Callable[[], np.ndarray]
    key: bytes | None


def prepare_image(pipeline: Pipeline, image: Image.Image | Sequence[Image.Image], how: str, *, compact: bool) -> PreparedImage:
    """Fit an RGB image, or the frames of a video, to the bundle. Raises ImageError and UsageError.

    `compact`: do not keep an image that is much larger than the bundle's; compute its patches at once.
    """
    spec, geometry = pipeline.image_spec, pipeline.plan.geometry
    frames = [image] if isinstance(image, Image.Image) else list(image)
    if len(frames) != geometry.frames:
        raise UsageError(f"The bundle takes {geometry}, not {len(frames)} at once.", hint="Give as many frames as it says.")
    fitted = [fit(frame, geometry, how, spec) for frame in frames]
    key = image_hash(fitted, how) if pipeline.state.feature_cache.budget else None
    if compact and sum(frame.width * frame.height for frame in fitted) > _LARGE * len(fitted) * geometry.width * geometry.height:
        patches = spec.patches(fitted)
        return PreparedImage(lambda: patches, key)
    return PreparedImage(partial(spec.patches, fitted), key)


ImageOrFrames = Image.Image | Sequence[Image.Image] | PreparedImage
Prompt = str | Sequence[str | ImageOrFrames]


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation's history. `role`: one of ROLES; only user turns may have images.

    `text`: a text, before which the chat template is given `images`; or texts and images in order, and no `images`. Texts with no
    image between them become one, each on a line.
    """

    role: str
    text: Prompt
    images: Sequence[ImageOrFrames] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"Unknown role {self.role!r}.", hint=f"Roles are: {', '.join(ROLES)}.")
        in_order = isinstance(self.text, (list, tuple))
        if self.images and in_order:
            raise UsageError("A turn has images in order and others beside them.", hint="Put all of them into the list.")
        name = "The prompt" if self.role == "user" else f"The text of the {self.role}"
        reject_unencodable(self.words if in_order else self.text, name)
        if self.all_images and self.role != "user":
            raise UsageError(f"A turn of the {self.role} has images.", hint="Put them into a turn of the user.")

    @property
    def parts(self) -> tuple[str | ImageOrFrames, ...]:
        """The texts and images in the order in which the chat template is given them."""
        if isinstance(self.text, str):
            return (*self.images, self.text)
        parts = list[str | ImageOrFrames]()
        for part in self.text:
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += f"\n{part}"
            else:
                parts.append(part)
        return tuple(parts)

    @property
    def all_images(self) -> tuple[ImageOrFrames, ...]:
        """The images in order."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    @property
    def words(self) -> str:
        """The texts, one a line."""
        return "\n".join(part for part in self.parts if isinstance(part, str))


class Stream:
    """An answer in progress: an iterator of text pieces, for `for` and `async for`. Nothing runs before the first is asked for.

    Any thread may iterate, one at a time, and any may cancel. `text`: the answer so far. `receipt`: updated during generation,
    final at the end. `generating`: whether the next piece is being computed.
    """

    def __init__(self, pieces: Generator[str], receipt: Receipt, cancellation: CancellationToken) -> None:
        self._pieces, self._cancellation = pieces, cancellation
        self._reading = threading.RLock()  # a watcher runs inside the last `next`, and may use the stream
        self._asker = self._reader = threading.current_thread()
        self.generating = False
        self.receipt = receipt
        self.text = ""

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        with self._reading:
            self._reader = threading.current_thread()
            if self.generating:
                raise StopIteration  # called by a watcher, after the last piece
            with self._generation():
                piece = next(self._pieces)
            self.text += piece
            return piece

    @contextmanager
    def _generation(self) -> Iterator[None]:
        self.generating = True
        try:
            yield
        finally:
            self.generating = False

    @property
    def foreign(self) -> bool:
        """Whether the answer is unfinished and belongs to other threads: those that asked for it and read it, if they still run."""
        owners, current = (self._asker, self._reader), threading.current_thread()
        return self.receipt.finish_reason == RUNNING and current not in owners and any(owner.is_alive() for owner in owners)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> str:
        # A thread of the event loop computes each piece. A task that is cancelled cancels the answer.
        import asyncio  # slow to import

        try:
            piece = await asyncio.to_thread(next, self, None)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    def __repr__(self) -> str:
        return f"<Stream {self.receipt.finish_reason}: {shorten(self.text)!r}>"

    def cancel(self) -> None:
        """Request cancellation and return at once. Iteration ends within one decode step; the text so far is the answer."""
        self._cancellation.cancel(CANCELLED)

    def close(self) -> None:
        """Cancel, from any thread, and wait until generation has stopped; the text so far is the answer."""
        self.cancel()
        with self._reading:
            if not self.generating:  # it is where a watcher closes its own answer, which has ended
                with self._generation():
                    self._pieces.close()
            if self.receipt.finish_reason == RUNNING:  # never read
                self.receipt.finish_reason = CANCELLED


class Conversation:
    """Several turns that share one KV cache. One thread asks at a time; UsageError is raised in any other meanwhile."""

    def __init__(self, pipeline: Pipeline, *, prune: bool = True, fit: str = "exact", history: Sequence[Turn] = ()) -> None:
        self._pipeline, self._prune, self._fit = pipeline, prune, fit
        self._layout = pipeline.prompts.placeholders
        self._messages: list[Message] = []
        self._images: list[ImageInput] = []  # in the order of the messages
        self._history = tuple(history)  # turns not yet in `_messages`
        self._stream: Stream | None = None  # the newest, until it has ended
        self._asking = threading.RLock()
        self._reset()

    def _reset(self) -> None:
        self._sequence = SequenceState(self._pipeline, self._layout.spans, prune=self._prune)

    @property
    def kind(self) -> str:
        """The input kind of the conversation: "image" or "video"."""
        return self._layout.kind

    @property
    def turns(self) -> int:
        """Number of turns so far, of the user and of the assistant."""
        return len(self._messages)

    @property
    def cache(self) -> KvCache:
        """The KV cache of the conversation."""
        return self._sequence.cache

    def ask(
        self,
        prompt: Prompt,
        images: Sequence[ImageOrFrames] = (),
        sampling: Sampling | None = None,
        limits: RequestLimits | None = None,
        *,
        rerank: bool = False,
    ) -> Stream:
        """Return the stream of the answer to the next user turn.

        `prompt`: as the text of a Turn; a list may have images alone. For a video bundle each of `images` is a list of frames.
        `rerank`: choose the visual tokens of earlier images anew, by this question. A stream that is never read changes nothing. A
        new request closes the previous stream, unless another thread has yet to finish it. Raises UsageError and ImageError before
        any state changes.
        """
        with self._one_thread():
            if rerank:
                self._check_rerank()
            return self._ask(prompt, images, sampling, limits, rerank=rerank)

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        hint = "Use one chat per thread, or finish or close the stream of the other thread first."
        if not self._asking.acquire(blocking=False):
            raise UsageError("Another thread is asking in this chat.", hint=hint)
        try:
            previous = self._stream
            if previous is not None and previous.foreign:
                raise UsageError("Another thread has not finished its answer in this chat.", hint=hint)
            yield
        finally:
            self._asking.release()

    def _ask(
        self,
        prompt: Prompt,
        images: Sequence[ImageOrFrames],
        sampling: Sampling | None,
        limits: RequestLimits | None,
        *,
        rerank: bool,
    ) -> Stream:
        started_s = time.monotonic()  # compiling a grammar and preparing images count against the deadline
        if self._pipeline.state.closed:
            raise closed_model()
        question = Turn("user", prompt, images)
        image_alone = not isinstance(prompt, str) and bool(question.all_images)
        if not image_alone and self._is_empty(question.words):
            raise UsageError("The prompt is empty.", hint="Ask something about the image.")
        limits = limits or RequestLimits()
        if limits.tier is not None:
            self._pipeline.tier(limits.tier)  # raises UsageError for an unknown tier
            if not self._prune:
                raise UsageError("Without pruning there are no tiers.", hint="Leave tier or prune=False out.")
        sampling = sampling or Sampling()
        structured = sampling.structured
        constraint = self._pipeline.grammars.constraint(sampling.choices, sampling.json_schema) if structured else None
        sampler = Sampler(sampling, constraint, self._pipeline.generation)
        turns = (*self._history, question)
        for turn in turns:
            reject_control_tokens(turn.words, self._pipeline.tokenizer, self._layout.placeholder)
        has_images = any(turn.all_images for turn in turns)
        why_not = "the answer ended before the image was taken in" if has_images else "this turn has no image"
        receipt = Receipt(pruned=False, reason=why_not, deadline_ms=limits.deadline_ms)
        request = Request(sampler, limits, receipt, started_s=started_s, rerank_by=question.words if rerank else None)
        messages = [self._message(turn) for turn in turns]
        new_images = [
            self._image_input(image, _question(turns[number:]), receipt)
            for number, turn in enumerate(turns)
            for image in turn.all_images
        ]
        previous = self._stream
        if previous is not None:
            previous.close()
        if previous is not None and previous.generating and self._stream is previous:  # a signal handler asks
            raise UsageError("This thread is in the middle of an answer of this chat.", hint="Ask when it has ended.")
        self._stream = Stream(self._answer(messages, new_images, request), receipt, request.cancellation)
        return self._stream

    def _check_rerank(self) -> None:
        ignores = self._pipeline.input_cut_ignores_prompt
        if not self._prune:
            raise UsageError("Without pruning there is nothing to rank again.", hint="Leave rerank or prune=False out.")
        if all(prefix_cacheable(plan, prune=True, input_cut_ignores_prompt=ignores) for plan in self._pipeline.plans):
            raise UsageError("No cut of this bundle looks at the question.", hint="Leave rerank out: it would change nothing.")
        if not self._images and not any(turn.all_images for turn in self._history):
            raise UsageError("This chat has no earlier image to rank again.", hint="Leave rerank out.")

    def _is_empty(self, words: str) -> bool:
        # A tokenizer may drop characters, but not so many. A long text is not tokenized before its length is checked.
        return not words.strip() or (len(words) < CHARS_PER_TOKEN and not self._pipeline.tokenizer.encode(words))

    def _message(self, turn: Turn) -> Message:
        kind = self._layout.kind
        parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": kind} for part in turn.parts]
        return {"role": turn.role, "content": parts}  # some templates drop plain strings

    def _image_input(self, image: ImageOrFrames, question: str, receipt: Receipt) -> ImageInput:
        with receipt.times.stage("preprocess"):
            if not isinstance(image, PreparedImage):
                image = prepare_image(self._pipeline, image, self._fit, compact=False)
            return ImageInput(question, image.patches, image.key and image.key + bytes([self._prune]))

    def _answer(self, messages: list[Message], new_images: list[ImageInput], request: Request) -> Generator[str]:
        try:
            with self._pipeline.state.track_answer(request.receipt):
                yield from self._turn(messages, new_images, request)
        finally:
            self._stream = None  # before the watchers, which may ask the next question
            self._pipeline.state.notify(request.receipt)

    def _turn(self, messages: list[Message], new_images: list[ImageInput], request: Request) -> Generator[str]:
        receipt, cancellation = request.receipt, request.cancellation
        try:
            cancellation.raise_if_cancelled()
            ids = self._tokenize(messages, len(new_images))
            prefill = self._prepare_prefill(ids, new_images, request)
        except Cancelled:  # before prefill, possibly during image encoding: the conversation is unchanged
            receipt.finish_reason = str(cancellation.reason)
            return
        except BaseException as error:
            receipt.finish_reason = "error" if isinstance(error, Exception) else CANCELLED
            raise
        self._messages += messages
        self._images += new_images
        self._history = ()
        if request.rerank_by is not None:
            self._reset()
            for image in self._images:
                image.question = request.rerank_by if request.rerank_by.strip() else image.question
        yield from self._generate(ids, prefill, request)

    def _generate(self, ids: list[int], prefill: Prefill, request: Request) -> Generator[str]:
        # However the stream ends, the answer so far becomes the assistant's turn, so that the conversation stays consistent.
        receipt, answer_ids = request.receipt, list[int]()
        try:
            step, token = self._first_token(ids, prefill, request)
            keep_ratio = (
                DecodeKeepRatio(self._pipeline.backend, prefill.plan.decode) if self._prune and receipt.visual_tokens else None
            )
            decode_loop = DecodeLoop(self._pipeline, self._sequence, request, keep_ratio, prefill.max_kv_bytes)
            answer_ids = decode_loop.token_ids  # the list that the loop extends
            yield from decode_loop.run(step, token)
            self._update_latency(prefill, receipt)
        except GeneratorExit:
            if receipt.finish_reason == RUNNING:  # not after the last piece
                receipt.finish_reason = CANCELLED
            raise
        except Cancelled:
            receipt.finish_reason = str(request.cancellation.reason)
            if receipt.finish_reason == DEADLINE:
                self._update_latency(prefill, receipt)
            self._reset()  # the KV cache may hold part of a turn
        except BaseException as error:  # including KeyboardInterrupt: the KV cache may hold part of a turn
            receipt.finish_reason = "error" if isinstance(error, Exception) else CANCELLED
            self._reset()
            raise
        finally:
            skip = request.sampler.sampling.skip_special_tokens
            said = self._pipeline.tokenizer.decode(answer_ids, skip_special=skip)
            self._messages.append(self._message(Turn("assistant", said)))

    def _first_token(self, ids: list[int], prefill: Prefill, request: Request) -> tuple[DecoderOutput, int]:
        with request.receipt.times.stage("prefill"), request.cancellation.deadline(request.remaining):
            if not self._sequence.continued_by(ids):
                self._reset()  # the answer's text tokenizes to other ids than were generated: prefill from the first token
            with self._pipeline.lock.acquire(request.cancellation):
                request.sampler.begin(ids)
                step = prefill.run(self._sequence, ids, self._images, request.sampler.sampling.max_tokens)
            return step, request.sampler.sample(step.logits)

    def _update_latency(self, prefill: Prefill, receipt: Receipt) -> None:
        if not self._prune:
            return
        times, images = receipt.times, prefill.images
        elapsed_ms = times.prefill_ms + times.select_ms
        if not receipt.generated_tokens:  # the deadline stopped the prefill
            if elapsed_ms < prefill.expected_ms:
                return  # before it showed anything new
            elapsed_ms *= UNFINISHED
        prefill_ms = elapsed_ms / images if images and "prefix" not in receipt.reused else None
        complete = receipt.finish_reason in ("end", "stop")
        tokens = receipt.generated_tokens if complete else 0
        self._pipeline.state.latency.update(prefill.tier, prefill_ms, times.ms_per_token, tokens)

    def _tokenize(self, new_messages: list[Message], new_images: int) -> list[int]:
        # Ids of the entire conversation with the new messages. Raises UsageError before any state changes.
        messages, images = [*self._messages, *new_messages], len(self._images) + new_images
        ids = self._pipeline.prompts.ids(messages)
        if self._prune and images and self._layout.image_ends(ids)[-1] == len(ids):
            raise UsageError(
                "The chat template of this model puts no text after the last image, and the last token must not be pruned.",
                hint="Ask with prune=False.",
            )
        return ids

    def _prepare_prefill(self, ids: list[int], new_images: list[ImageInput], request: Request) -> Prefill:
        # Encodes the images and chooses the tier before any state changes. The prefill may have to restart from the first token.
        prefill = Prefill(self._pipeline, self._layout, request, prune=self._prune)
        for image in new_images:
            prefill.encode(image)
        restart = request.rerank_by is not None or not self._sequence.continued_by(ids)
        images = len(self._images) + len(new_images) - (0 if restart else self._sequence.images)
        text = len(ids) - (0 if restart else len(self._sequence.ids)) - images * len(self._layout.spans)
        prefill.choose_tier(0 if restart else self._sequence.cache.bytes, images, text)
        return prefill


def _question(turns: Sequence[Turn]) -> str:
    # What is asked about the images of the first turn: its text, or that of the next turn of the user that has one, if any.
    return next((turn.words for turn in turns if turn.role == "user" and turn.words.strip()), "")
