"""A conversation: messages, the KV caches that hold them, and the loop that generates the next answer."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from edgeprune.bundle import DecoderShape
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.runtime.cache import KvCache
from edgeprune.runtime.chat import ChatTemplate, Message, StreamDecoder, TextCodec, refuse_control_tokens
from edgeprune.runtime.engine import Engine, Seen, Step, StepInput, Tokens
from edgeprune.runtime.positions import image_positions, text_positions
from edgeprune.runtime.preprocess import ImageSpec, fit
from edgeprune.runtime.rate import Rate
from edgeprune.runtime.receipt import Receipt, cut_receipts
from edgeprune.runtime.sampling import Sampler, Sampling, StopWatch

SYSTEM, INSTRUCTION, GENERATED = 0, 1, 2
_ONE_HOT = np.eye(3, dtype=np.float32)


@dataclass(frozen=True)
class Model:
    """Everything that conversations share and never change: the engine, the text side, the image side and the plan."""

    engine: Engine
    codec: TextCodec
    template: ChatTemplate
    special_tokens: dict[str, str]
    image_spec: ImageSpec
    image_token: int
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
        self._messages: list[Message] = []
        self._images: list[_Shown] = []  # in the order of the messages
        self._stream: Stream | None = None
        self._reset()

    def _reset(self) -> None:
        self._ids: list[int] = []  # what the caches hold; an image is one id
        self._seen_images = 0
        shape = self._model.decoder
        self._cache = KvCache.empty(shape)
        self._groups: list[int] = []  # of the text in the caches: SYSTEM, INSTRUCTION, GENERATED or none of them
        self._position = 0

    @property
    def cache(self) -> KvCache:
        """What the conversation has taken in."""
        return self._cache

    def ask(self, prompt: str, image: Image.Image | None = None, sampling: Sampling | None = None) -> Stream:
        """Return the stream of the answer to the next user turn.

        A stream that is never read leaves no trace; one that is still running is ended by asking again.
        """
        if not prompt.strip():
            raise UsageError("The prompt is empty.", hint="Ask something about the image.")
        refuse_control_tokens(prompt, self._model.codec)
        if self._stream is not None:
            self._stream.close()
        receipt = Receipt(pruned=False, reason="this turn has no image" if image is None else "")
        seen = [] if image is None else [_Shown(self._see(image, receipt), prompt)]
        parts = [{"type": "image"} for _ in seen] + [{"type": "text", "text": prompt}]
        turn: Message = {"role": "user", "content": parts}
        self._stream = Stream(self._answer(turn, seen, Sampler(sampling or Sampling()), receipt), receipt)
        return self._stream

    def _see(self, image: Image.Image, receipt: Receipt) -> Seen:
        started = time.perf_counter()
        patches, _ = self._model.image_spec.patches(fit(image, self._model.plan.geometry, self._fit, self._model.image_spec))
        prepared = time.perf_counter()
        seen = self._model.engine.see(patches)
        receipt.times.preprocess_ms = 1e3 * (prepared - started)
        receipt.times.vision_ms = 1e3 * (time.perf_counter() - prepared)
        return seen

    def _answer(self, turn: Message, seen: list[_Shown], sampler: Sampler, receipt: Receipt) -> Generator[str]:
        # However the stream ends, the conversation stays whole: what was said so far is the answer.
        said: list[int] = []
        self._messages.append(turn)
        self._images += seen
        try:
            yield from self._generate(sampler, receipt, said)
        except GeneratorExit:
            receipt.finish_reason = "cancelled"
            raise
        except Exception:
            receipt.finish_reason = "error"
            self._reset()  # the caches may hold half a turn
            raise
        finally:
            self._messages.append({"role": "assistant", "content": self._model.codec.decode(said)})

    def _generate(self, sampler: Sampler, receipt: Receipt, said: list[int]) -> Generator[str]:
        started = time.perf_counter()
        step = self._prefill(receipt)
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
            if receipt.generated_tokens >= sampler.sampling.max_tokens:
                receipt.finish_reason = "length"
                yield watch.push(decoder.flush()) + watch.flush()
                return
            step = self._decode(token, step, rate, receipt)
            token = sampler.pick(step.logits)

    def _decode(self, token: int, before: Step, rate: Rate | None, receipt: Receipt) -> Step:
        started = time.perf_counter()
        if rate is not None:
            self._cache = rate.shorten(self._cache, before, receipt)
        # Unpruned, visual tokens lie among the text and are all read.
        receipt.visual_reads.append(self._cache.visual_reads if self._prune else receipt.visual_whole)
        nothing = self._no_tokens()
        step = self._step(nothing, nothing, self._text([token]), GENERATED)
        self._ids.append(token)
        receipt.times.decode_ms.append(1e3 * (time.perf_counter() - started))
        return step

    def _prefill(self, receipt: Receipt) -> Step:
        ids = self._model.codec.encode(
            self._model.template.render(self._messages, add_generation_prompt=True, **self._model.special_tokens)
        )
        if ids.count(self._model.image_token) != len(self._images):
            raise UsageError("The chat template of this model does not place one image token for each image.")
        if ids[: len(self._ids)] != self._ids:
            self._reset()  # the text was tokenised otherwise than it was generated: start over, images are kept
        self._cache = self._cache.shortened(1.0, 0)  # what an earlier answer could spare, this one may need
        step = self._feed(ids[len(self._ids) :], receipt)
        self._ids = ids
        return step

    def _feed(self, ids: list[int], receipt: Receipt) -> Step:
        # One forward per image: the text before it, the image, and the text up to the next image.
        images = [index for index, token in enumerate(ids) if token == self._model.image_token]
        receipt.text_tokens = len(ids) - len(images)
        if not images:
            nothing = self._no_tokens()
            return self._step(nothing, nothing, self._text(ids), INSTRUCTION)
        begin = 0
        for image, end in zip(images, [*images[1:], len(ids)], strict=True):
            step = self._feed_image(ids[begin:image], ids[image + 1 : end], receipt)
            begin = end
        return step

    def _feed_image(self, before: list[int], after: list[int], receipt: Receipt) -> Step:
        geometry, shape, plan = self._model.plan.geometry, self._model.decoder, self._model.plan
        prefix = self._text(before)
        where, self._position = image_positions(self._position, geometry.rows, geometry.columns, shape.position_axes)
        shown = self._images[self._seen_images]
        visual = Tokens(shown.seen.embeds, where)
        self._seen_images += 1
        suffix = self._text(after)
        receipt.visual_tokens += geometry.tokens
        receipt.visual_whole += geometry.tokens * plan.layers
        if not self._prune:
            receipt.reason = "pruning was switched off"
            receipt.visual_stored += geometry.tokens * plan.layers
            return self._step(prefix.then(visual), self._no_tokens(), suffix, INSTRUCTION)
        order = np.arange(geometry.tokens)
        if plan.input is not None:
            visual, order = self._select(visual, shown, receipt)
        before_image = self._cache.visual_reads
        step = self._step(prefix, visual, suffix, INSTRUCTION, order)
        receipt.visual_stored += self._cache.visual_reads - before_image
        receipt.cuts += cut_receipts(plan, order, step)
        receipt.pruned = bool(receipt.cuts)
        receipt.reason = "" if receipt.cuts else "the plan has no cuts"
        return step

    def _select(self, visual: Tokens, shown: _Shown, receipt: Receipt) -> tuple[Tokens, np.ndarray]:
        started = time.perf_counter()
        prompt = self._model.engine.embed(self._model.codec.encode(shown.prompt))
        embeds, kept = self._model.engine.select(shown.seen, prompt)
        receipt.times.select_ms += 1e3 * (time.perf_counter() - started)
        return visual.only(kept, embeds), kept

    def _step(self, prefix: Tokens, visual: Tokens, suffix: Tokens, group: int, order: np.ndarray | None = None) -> Step:
        before = prefix.embeds.shape[1]
        self._groups += [SYSTEM] * before + [group] * suffix.embeds.shape[1]
        order = np.zeros(0, np.int64) if order is None else order
        step = self._model.engine.step(StepInput(prefix, visual, suffix, order, _ONE_HOT[self._groups]), self._cache)
        self._cache = self._cache.grown(step.text, step.visual if len(order) else None)
        return replace(step, text=(), visual=())

    def _text(self, ids: list[int]) -> Tokens:
        if not ids:
            return self._no_tokens()
        positions = text_positions(self._position, len(ids), self._model.decoder.position_axes)
        self._position += len(ids)
        return Tokens(self._model.engine.embed(ids), positions)

    def _no_tokens(self) -> Tokens:
        shape = self._model.decoder
        return Tokens(np.zeros((1, 0, shape.hidden), np.float32), np.zeros((shape.position_axes, 0), np.int64))


@dataclass(frozen=True)
class _Shown:
    # An image of the conversation and the words it was shown with, which an input cut may ask for.
    seen: Seen
    prompt: str
