"""A conversation: messages, the KV caches that hold them, and the loop that generates the next answer."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from edgeprune.bundle import DecoderShape, ImageText
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.processors import ImageSpec, fit
from edgeprune.runtime.cache import KvCache
from edgeprune.runtime.chat import ChatTemplate, Message, StreamDecoder, TextCodec, refuse_control_tokens
from edgeprune.runtime.engine import Engine, Seen, Step, StepInput, Tokens
from edgeprune.runtime.layout import ImageLayout
from edgeprune.runtime.positions import span_positions, text_positions
from edgeprune.runtime.rate import Rate
from edgeprune.runtime.receipt import Receipt, cut_receipts
from edgeprune.runtime.sampling import Sampler, Sampling, StopWatch

SYSTEM, INSTRUCTION, GENERATED = 0, 1, 2
_ONE_HOT = np.eye(3, dtype=np.float32)
Picture = Image.Image | Sequence[Image.Image]


@dataclass(frozen=True)
class Model:
    """Everything that conversations share and never change: the engine, the text side, the image side and the plan."""

    engine: Engine
    codec: TextCodec
    template: ChatTemplate
    special_tokens: dict[str, str]
    image_spec: ImageSpec
    image: ImageText
    end_tokens: tuple[int, ...]
    decoder: DecoderShape
    plan: KeepPlan


class Stream:
    """An answer being generated, an iterator of pieces of text; nothing runs before the first is asked for.

    `text` is what was said so far; `receipt` fills as it goes and is final at the end.
    """

    def __init__(self, pieces: Generator[str], receipt: Receipt) -> None:
        self._pieces = pieces
        self.receipt = receipt
        self.text = ""

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """Stop generating; what was said so far is the answer."""
        self._pieces.close()


class Conversation:
    """Several turns on the same caches. Not thread-safe: one thread a conversation."""

    def __init__(self, model: Model, *, prune: bool = True, how: str = "exact") -> None:
        self._model, self._prune, self._fit = model, prune, how
        self._layout = ImageLayout(model.image, model.plan.geometry, model.codec)
        self._messages: list[Message] = []
        self._images: list[_Shown] = []  # in the order of the messages
        self._stream: Stream | None = None
        self._reset()

    def _reset(self) -> None:
        self._ids: list[int] = []  # what the caches hold; the span of an image is one id
        self._seen_images = 0
        shape = self._model.decoder
        self._cache = KvCache.empty(shape)
        self._groups = bytearray()  # of the text in the caches: SYSTEM, INSTRUCTION, GENERATED or none of them
        self._position = 0
        self._length = 0  # of the sequence, as if nothing had been pruned

    @property
    def kind(self) -> str:
        """What the conversation is about: "image" or "video"."""
        return self._layout.kind

    @property
    def cache(self) -> KvCache:
        """What the conversation has taken in."""
        return self._cache

    def ask(self, prompt: str, images: Sequence[Picture] = (), sampling: Sampling | None = None) -> Stream:
        """Return the stream of the answer to the next user turn.

        Of a bundle for video each of `images` is the list of its frames. A stream that is never read leaves no trace; one that is
        still running is ended by asking again. Raises UsageError and ImageError before anything has changed.
        """
        if not prompt.strip():
            raise UsageError("The prompt is empty.", hint="Ask something about the image.")
        refuse_control_tokens(prompt, self._model.codec, self._layout.placeholder)
        if self._stream is not None:
            self._stream.close()
        receipt = Receipt(pruned=False, reason="" if images else "this turn has no image")
        seen = [_Shown(self._see(image, receipt), prompt) for image in images]
        parts = [{"type": self._layout.kind} for _ in seen] + [{"type": "text", "text": prompt}]
        turn: Message = {"role": "user", "content": parts}
        self._stream = Stream(self._answer(turn, seen, Sampler(sampling or Sampling()), receipt), receipt)
        return self._stream

    def _see(self, picture: Picture, receipt: Receipt) -> Seen:
        started = time.perf_counter()
        spec, geometry = self._model.image_spec, self._model.plan.geometry
        frames = [picture] if isinstance(picture, Image.Image) else list(picture)
        if len(frames) != geometry.frames:
            raise UsageError(f"The bundle takes {geometry}, not {len(frames)} at once.", hint="Give as many frames as it says.")
        patches = spec.patches([fit(frame, geometry, self._fit, spec) for frame in frames])
        prepared = time.perf_counter()
        seen = self._model.engine.see(patches, whole=not self._prune)
        receipt.times.preprocess_ms += 1e3 * (prepared - started)
        receipt.times.vision_ms += 1e3 * (time.perf_counter() - prepared)
        return seen

    def _answer(self, turn: Message, seen: list[_Shown], sampler: Sampler, receipt: Receipt) -> Generator[str]:
        # However the stream ends, the conversation stays whole: what was said so far is the answer.
        said: list[int] = []
        ids = self._tokens(turn, len(seen))
        self._messages.append(turn)
        self._images += seen
        try:
            yield from self._generate(ids, sampler, receipt, said)
        except GeneratorExit:
            receipt.finish_reason = "cancelled"
            raise
        except Exception:
            receipt.finish_reason = "error"
            self._reset()  # the caches may hold half a turn
            raise
        finally:
            answer = {"type": "text", "text": self._model.codec.decode(said)}
            self._messages.append({"role": "assistant", "content": [answer]})  # some templates drop a mere string

    def _generate(self, ids: list[int], sampler: Sampler, receipt: Receipt, said: list[int]) -> Generator[str]:
        started = time.perf_counter()
        step = self._prefill(ids, receipt, sampler.sampling.max_tokens)
        token = sampler.pick(step.logits)
        receipt.times.prefill_ms = 1e3 * (time.perf_counter() - started) - receipt.times.select_ms
        decoder, watch = StreamDecoder(self._model.codec), StopWatch(sampler.sampling.stop)
        rate = Rate(self._model.engine, self._model.plan.decode) if self._prune and receipt.visual_tokens else None
        while True:
            receipt.generated_tokens += 1
            receipt.kv_bytes = self._cache.bytes
            if token in self._model.end_tokens:
                receipt.finish_reason = "end"
                yield watch.push(decoder.flush()) + watch.flush()
                return
            said.append(token)
            yield watch.push(decoder.push(token))
            if watch.stopped:
                receipt.finish_reason = "stop"
                return
            if receipt.generated_tokens >= sampler.sampling.max_tokens or self._length >= self._model.decoder.context:
                receipt.finish_reason = "length"
                yield watch.push(decoder.flush()) + watch.flush()
                return
            started = time.perf_counter()
            step = self._decode(token, step, rate, receipt)
            token = sampler.pick(step.logits)
            receipt.times.decode_ms.append(1e3 * (time.perf_counter() - started))
            receipt.times.graph_ms += [] if step.run_ms is None else [step.run_ms]

    def _decode(self, token: int, before: Step, rate: Rate | None, receipt: Receipt) -> Step:
        if rate is not None:
            self._cache = rate.shorten(self._cache, before, receipt)
        # Unpruned, visual tokens lie among the text and are all read.
        receipt.visual_reads.append(self._cache.visual_reads if self._prune else receipt.visual_whole)
        nothing = self._no_tokens()
        step = self._step(nothing, nothing, self._text([token]), GENERATED)
        self._ids.append(token)
        return step

    def _tokens(self, turn: Message, images: int) -> list[int]:
        # All of the conversation with this turn; refused before anything changes.
        messages, images = [*self._messages, turn], images + len(self._images)
        prompt = self._model.template.render(messages, add_generation_prompt=True, **self._model.special_tokens)
        ids = self._model.codec.encode_prompt(self._layout.expand(prompt), self._model.special_tokens.get("bos_token"))
        if self._layout.count(ids) != images:
            raise UsageError("The chat template of this model does not place one image token for each image.")
        length = len(ids) + images * (self._model.plan.geometry.tokens - len(self._layout.spans))
        if length > self._model.decoder.context:
            raise UsageError(
                f"The conversation would be {length} tokens long, but the model takes {self._model.decoder.context}.",
                hint="Begin a new one, or ask with fewer images.",
            )
        return ids

    def _prefill(self, ids: list[int], receipt: Receipt, answer: int) -> Step:
        if ids[: len(self._ids)] != self._ids:
            self._reset()  # the text was tokenised otherwise than it was generated: start over, images are kept
        self._cache = self._cache.shortened(1.0, 0)  # what an earlier answer could spare, this one may need
        new = ids[len(self._ids) :]
        visual = 0 if self._prune else (len(self._images) - self._seen_images) * self._model.plan.geometry.tokens
        self._cache = self._cache.reserved(min(len(new) + visual + answer, self._model.decoder.context))
        step = self._feed(new, receipt)
        self._ids = ids
        return step

    def _feed(self, ids: list[int], receipt: Receipt) -> Step:
        # One forward per image: the text before it, the image, and the text up to the next image.
        turns = self._layout.turns(ids)
        receipt.text_tokens = sum(len(part) for turn in turns for part in turn) if turns else len(ids)
        if not turns:
            nothing = self._no_tokens()
            return self._step(nothing, nothing, self._text(ids), INSTRUCTION)
        for turn in turns:
            step = self._feed_image(turn, receipt)
        return step

    def _feed_image(self, parts: list[list[int]], receipt: Receipt) -> Step:
        geometry, plan = self._model.plan.geometry, self._model.plan
        shown = self._images[self._seen_images]
        prefix, visual = self._interleaved(parts[:-1], shown.seen.embeds)
        self._seen_images += 1
        suffix = self._text(parts[-1])
        receipt.visual_tokens += geometry.tokens
        receipt.visual_whole += geometry.tokens * plan.layers
        if not self._prune:
            receipt.reason = "pruning was switched off"
            receipt.visual_stored += geometry.tokens * plan.layers
            return self._step(prefix.then(visual), self._no_tokens(), suffix, INSTRUCTION)
        # Positions are those of every token until `only` takes those of the tokens that stay.
        order, embeds = shown.seen.order, shown.seen.embeds
        if plan.input is not None:
            embeds, order = self._select(shown, receipt)
        before_image = self._cache.visual_reads
        step = self._step(prefix, visual.only(order, embeds), suffix, INSTRUCTION, order)
        receipt.visual_stored += self._cache.visual_reads - before_image
        receipt.cuts += cut_receipts(plan, shown.seen.kept, order, step)
        receipt.pruned = bool(receipt.cuts)
        receipt.reason = "" if receipt.cuts else "the plan has no cuts"
        return step

    def _select(self, shown: _Shown, receipt: Receipt) -> tuple[np.ndarray, np.ndarray]:
        started = time.perf_counter()
        prompt = self._model.engine.embed(self._model.codec.encode(shown.prompt))
        embeds, kept = self._model.engine.select(shown.seen, prompt)
        receipt.times.select_ms += 1e3 * (time.perf_counter() - started)
        return embeds, kept

    def _step(self, prefix: Tokens, visual: Tokens, suffix: Tokens, group: int, order: np.ndarray | None = None) -> Step:
        before = prefix.embeds.shape[1]
        self._groups += bytes([SYSTEM] * before + [group] * suffix.embeds.shape[1])
        order = np.zeros(0, np.int64) if order is None else order
        groups = _ONE_HOT[np.frombuffer(self._groups, np.uint8)]
        step = self._model.engine.step(StepInput(prefix, visual, suffix, order, groups), self._cache)
        self._cache = self._cache.grown(step.rows, before, suffix.embeds.shape[1])
        return replace(step, rows=())

    def _interleaved(self, before: list[list[int]], embeds: np.ndarray) -> tuple[Tokens, Tokens]:
        # The text before each span, and the visual tokens of all, each at its own position.
        axes = self._model.decoder.position_axes
        text, spans = [], []
        for ids, views in zip(before, self._layout.spans, strict=True):
            text.append(text_positions(self._position, len(ids), axes))
            span, self._position = span_positions(self._position + len(ids), views, axes)
            spans.append(span)
        ids = [token for part in before for token in part]
        visual = Tokens(embeds, np.concatenate(spans, axis=1))
        self._length += visual.positions.shape[1] + len(ids)
        return (Tokens(self._model.engine.embed(ids), np.concatenate(text, axis=1)) if ids else self._no_tokens()), visual

    def _text(self, ids: list[int]) -> Tokens:
        if not ids:
            return self._no_tokens()
        positions = text_positions(self._position, len(ids), self._model.decoder.position_axes)
        self._position += len(ids)
        self._length += len(ids)
        return Tokens(self._model.engine.embed(ids), positions)

    def _no_tokens(self) -> Tokens:
        shape = self._model.decoder
        return Tokens(np.zeros((1, 0, shape.width), np.float32), np.zeros((shape.position_axes, 0), np.int64))


@dataclass(frozen=True)
class _Shown:
    # An image of the conversation and the words it was shown with, which an input cut may ask for.
    seen: Seen
    prompt: str
