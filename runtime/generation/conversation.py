"""A conversation: messages, their images, the caches that hold them from one answer to the next, and the stream of an answer."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from edgeprune.errors import UsageError
from edgeprune.processors import fit
from edgeprune.runtime.backends.interface import CANCELLED, Interrupt, Interrupted, Step
from edgeprune.runtime.backends.kv_cache import KvCache
from edgeprune.runtime.generation.decode import Generation
from edgeprune.runtime.generation.pipeline import Model
from edgeprune.runtime.generation.prefill import Prefill, Shown
from edgeprune.runtime.generation.request import Asked, Terms
from edgeprune.runtime.generation.sampling import Sampler, Sampling
from edgeprune.runtime.generation.sequence import Intake, Rate
from edgeprune.runtime.media.images import digest
from edgeprune.runtime.telemetry.receipt import Receipt
from edgeprune.runtime.text.prompt import ImageLayout, Message
from edgeprune.runtime.text.tokenizer import refuse_control_tokens

Picture = Image.Image | Sequence[Image.Image]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What was said before a conversation begins: `role` is one of ROLES; only a user shows `images`."""

    role: str
    text: str
    images: Sequence[Picture] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"Unknown role {self.role!r}.", hint=f"Roles are: {', '.join(ROLES)}.")
        if self.images and self.role != "user":
            raise UsageError(f"A turn of the {self.role} has images.", hint="Put them into a turn of the user.")


class Stream:
    """An answer being generated, an iterator of pieces of text; nothing runs before the first is asked for.

    One thread reads, any thread may cancel. `text` is what was said so far; `receipt` fills as it goes and is final at the end.
    """

    def __init__(self, pieces: Generator[str], receipt: Receipt, interrupt: Interrupt) -> None:
        self._pieces, self._interrupt = pieces, interrupt
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
        self._interrupt.fire(CANCELLED)

    def close(self) -> None:
        """Stop generating, from any thread, and wait until that has happened; what was said so far is the answer."""
        self.cancel()
        with self._reading:
            self._pieces.close()


class Conversation:
    """Several turns on the same caches. One thread asks and reads at a time."""

    def __init__(self, model: Model, *, prune: bool = True, how: str = "exact", history: Sequence[Turn] = ()) -> None:
        self._model, self._prune, self._fit = model, prune, how
        self._layout = ImageLayout(model.image, model.plan.geometry, model.codec)
        self._messages: list[Message] = []
        self._images: list[Shown] = []  # in the order of the messages
        self._history = tuple(history)  # what is not yet among the messages
        self._stream: Stream | None = None
        self._reset()

    def _reset(self) -> None:
        self._intake = Intake(self._model, self._layout.spans, prune=self._prune)

    @property
    def kind(self) -> str:
        """What the conversation is about: "image" or "video"."""
        return self._layout.kind

    @property
    def cache(self) -> KvCache:
        """What the conversation has taken in."""
        return self._intake.cache

    def ask(
        self, prompt: str, images: Sequence[Picture] = (), sampling: Sampling | None = None, terms: Terms | None = None
    ) -> Stream:
        """Return the stream of the answer to the next user turn.

        Of a bundle for video each of `images` is the list of its frames. A stream that is never read leaves no trace; one that is
        still running is ended by asking again. Raises UsageError and ImageError before anything has changed.
        """
        if not prompt.strip():
            raise UsageError("The prompt is empty.", hint="Ask something about the image.")
        terms = terms or Terms()
        if terms.tier is not None:
            self._model.tier(terms.tier)  # refuses one that is not there
            if not self._prune:
                raise UsageError("Without pruning there are no tiers.", hint="Leave tier or prune=False out.")
        sampling = sampling or Sampling()
        form = self._model.grammars.constraint(sampling.choices, sampling.json_schema) if sampling.structured else None
        sampler = Sampler(sampling, form)
        turns = (*self._history, Turn("user", prompt, images))
        for turn in turns:
            refuse_control_tokens(turn.text, self._model.codec, self._layout.placeholder)
        pictured = bool(images) or any(turn.images for turn in self._history)
        why_not = "the answer ended before the image was taken in" if pictured else "this turn has no image"
        receipt = Receipt(pruned=False, reason=why_not, deadline_ms=terms.deadline_ms)
        asked = Asked(sampler, terms, receipt)
        messages = [self._message(turn) for turn in turns]
        shown = [self._show(image, turn.text, receipt) for turn in turns for image in turn.images]
        if self._stream is not None:
            self._stream.close()
        self._stream = Stream(self._answer(messages, shown, asked), receipt, asked.interrupt)
        return self._stream

    def _message(self, turn: Turn) -> Message:
        parts = [{"type": self._layout.kind} for _ in turn.images] + [{"type": "text", "text": turn.text}]
        return {"role": turn.role, "content": parts}  # some templates drop a mere string

    def _show(self, picture: Picture, words: str, receipt: Receipt) -> Shown:
        spec, geometry = self._model.image_spec, self._model.plan.geometry
        with receipt.times.stage("preprocess"):
            frames = [picture] if isinstance(picture, Image.Image) else list(picture)
            if len(frames) != geometry.frames:
                raise UsageError(f"The bundle takes {geometry}, not {len(frames)} at once.", hint="Give as many frames as it says.")
            key = digest(frames, self._fit, self._prune) if self._model.state.recall.budget else None
            fitted = [fit(frame, geometry, self._fit, spec) for frame in frames]
            return Shown(words, partial(spec.patches, fitted), key)

    def _answer(self, turns: list[Message], shown: list[Shown], asked: Asked) -> Generator[str]:
        receipt, interrupt = asked.receipt, asked.interrupt
        with self._model.state.answering(receipt):
            try:
                interrupt.check()
                ids = self._tokens(turns, len(shown))
                prefill = self._prefill(ids, shown, asked)
            except Interrupted:  # before it began, or while the images were looked at: the conversation is as it was
                receipt.finish_reason = str(interrupt.reason)
                return
            except BaseException as error:
                receipt.finish_reason = "error" if isinstance(error, Exception) else "cancelled"
                raise
            self._messages += turns
            self._images += shown
            self._history = ()
            yield from self._generate(ids, prefill, asked)

    def _generate(self, ids: list[int], prefill: Prefill, asked: Asked) -> Generator[str]:
        # However the stream ends, the conversation stays whole: what was said so far is the answer.
        receipt, said = asked.receipt, list[int]()
        try:
            step, token = self._first(ids, prefill, asked)
            rate = Rate(self._model.engine, prefill.plan.decode) if self._prune and receipt.visual_tokens else None
            generation = Generation(self._model, self._intake, asked, rate, prefill.room)
            said = generation.said
            yield from generation.pieces(step, token)
            self._note(prefill, receipt)
        except GeneratorExit:
            receipt.finish_reason = "cancelled"
            raise
        except Interrupted:
            receipt.finish_reason = str(asked.interrupt.reason)
            self._reset()  # the caches hold half a turn
        except BaseException as error:  # Ctrl-C too: the caches may hold half a turn
            receipt.finish_reason = "error" if isinstance(error, Exception) else "cancelled"
            self._reset()
            raise
        finally:
            self._messages.append(self._message(Turn("assistant", self._model.codec.decode(said))))

    def _first(self, ids: list[int], prefill: Prefill, asked: Asked) -> tuple[Step, int]:
        with asked.receipt.times.stage("prefill"), asked.interrupt.due(asked.remaining):
            if ids[: len(self._intake.ids)] != self._intake.ids:
                self._reset()  # the text was tokenised otherwise than it was generated: start over, images are kept
            with self._model.turns.taken(asked.interrupt):
                step = prefill.run(self._intake, ids, self._images, asked.sampler.sampling.max_tokens)
            return step, asked.sampler.pick(step.logits)

    def _note(self, prefill: Prefill, receipt: Receipt) -> None:
        times, images = receipt.times, receipt.visual_tokens // self._model.plan.geometry.tokens
        if not self._prune:
            return
        prefill_ms = (times.prefill_ms + times.select_ms) / images if images and "prefix" not in receipt.reused else None
        whole = receipt.finish_reason in ("end", "stop")
        self._model.state.pace.note(prefill.tier, prefill_ms, times.ms_per_token, receipt.generated_tokens if whole else 0)

    def _tokens(self, turns: list[Message], images: int) -> list[int]:
        # All of the conversation with these turns; refused before anything changes.
        messages, images = [*self._messages, *turns], images + len(self._images)
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

    def _prefill(self, ids: list[int], shown: list[Shown], asked: Asked) -> Prefill:
        # What has to be decided before the conversation changes. It may have to be read again from its beginning.
        prefill = Prefill(self._model, self._layout, asked, prune=self._prune)
        for image in shown:
            prefill.see(image)
        again = ids[: len(self._intake.ids)] != self._intake.ids
        images = len(self._images) + len(shown) - (0 if again else self._intake.images)
        text = len(ids) - (0 if again else len(self._intake.ids)) - images * len(self._layout.spans)
        prefill.choose(0 if again else self._intake.cache.bytes, images, text)
        return prefill
