"""Images with the unpruned model's answers to the questions about each, and what the decoder says with other visual tokens.

The questions of an image stand behind one copy of it in one forward pass, hidden from each other. Decoders with states instead of
caches, and those whose prompts attend to each other, take one question at a time. Images of one question are a scene together, each
with a selection of its own, as at run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edgeprune.io.files import write_bytes
from edgeprune.model import PrunedDecoder, Segment
from edgeprune.model.cache import LayerCache
from edgeprune.plan import KeepPlan

PACKED = 512  # tokens of questions and answers, and of images that are not the same for all, in one forward pass
LIKELY = 64  # tokens of the vocabulary whose probabilities a divergence compares one by one
_MEASURED = ("order", "products", "likely", "ids")
_TINY = 1e-12
DROPPED = 1e-6  # the weight of a token that a gate leaves out: above 0, so that its gradient says what it would have given


@dataclass(frozen=True)
class Asked:
    """A question and the unpruned model's answer: `prompt`, the text behind the image, and `answer`, without its last token.

    `words` [M, hidden]: the embedded question without the chat template.
    """

    prompt: Segment
    answer: Segment
    words: torch.Tensor

    @property
    def text(self) -> Segment:
        """Prompt and answer."""
        return joined([self.prompt, self.answer])

    @property
    def length(self) -> int:
        """The number of tokens of prompt and answer."""
        return self.prompt.embeds.shape[1] + self.answer.embeds.shape[1]

    @property
    def tokens(self) -> int:
        """The number of tokens of the answer."""
        return 1 + self.answer.embeds.shape[1]


@dataclass(frozen=True)
class Scene:
    """The V visual tokens of an image, or of several, the text before the question, and the questions about them.

    `sizes`: the tokens of each image. `order` [V]: the index of each token in its image. `products` [questions, V]: v·∂L/∂v of
    each visual token, where L is the negative log-likelihood of the answer. `likely` and `ids` [answer tokens, LIKELY]: the
    log-probabilities of the most likely tokens without pruning.
    """

    prefix: Segment
    visual: Segment
    asked: tuple[Asked, ...]
    sizes: tuple[int, ...]
    order: torch.Tensor
    products: torch.Tensor
    likely: torch.Tensor
    ids: torch.Tensor

    @property
    def importance(self) -> torch.Tensor:
        """Of each visual token [V], the logarithm of |v·∂L/∂v|, where L is the negative log-likelihood of all answers."""
        return torch.log(self.products.sum(dim=0).abs() + 1e-4)

    @property
    def shares(self) -> torch.Tensor:
        """Of each question and visual token [questions, V], the share of its image's |v·∂L/∂v|, where L is that of the answer."""
        parts = torch.split(self.products.abs() + _TINY, list(self.sizes), dim=1)
        return torch.cat([part / part.sum(dim=1, keepdim=True) for part in parts], dim=1)

    def images(self, width: int) -> tuple[torch.Tensor, ...]:
        """Return the visual tokens of each image, their first `width` columns."""
        return torch.split(self.visual.embeds[0, :, :width], list(self.sizes))

    def only(self, numbers: Sequence[int]) -> Scene:
        """Return the scene with only some of its questions, by their numbers."""
        lengths = [asked.tokens for asked in self.asked]
        parts = (torch.split(rows, lengths) for rows in (self.likely, self.ids))
        likely, ids = (torch.cat([rows[number] for number in numbers]) for rows in parts)
        asked = tuple(self.asked[number] for number in numbers)
        products = torch.stack([self.products[number] for number in numbers])
        return replace(self, asked=asked, products=products, likely=likely, ids=ids)

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically."""
        from safetensors.torch import save

        parts = {"prefix": self.prefix, "visual": self.visual}
        for number, asked in enumerate(self.asked):
            parts |= {f"prompt.{number}": asked.prompt, f"answer.{number}": asked.answer}
        tensors = {f"{name}.{field}": getattr(part, field) for name, part in parts.items() for field in ("embeds", "positions")}
        tensors |= {f"words.{number}": asked.words for number, asked in enumerate(self.asked)}
        tensors |= {name: getattr(self, name) for name in _MEASURED} | {"sizes": torch.tensor(self.sizes)}
        write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))

    @classmethod
    def load(cls, path: Path, device: str) -> Scene:
        """Read a scene that was saved."""
        from safetensors.torch import load_file

        tensors = load_file(path, device)

        def segment(name: str) -> Segment:
            return Segment(tensors[f"{name}.embeds"], tensors[f"{name}.positions"])

        count = sum(name.startswith("words.") for name in tensors)
        asked = (Asked(segment(f"prompt.{n}"), segment(f"answer.{n}"), tensors[f"words.{n}"]) for n in range(count))
        sizes = tuple(tensors["sizes"].tolist())
        return cls(segment("prefix"), segment("visual"), tuple(asked), sizes, *(tensors[name] for name in _MEASURED))


@dataclass(frozen=True)
class Shown:
    """Questions, and the visual tokens that there are for them, at the indices `order` [K] in the scene.

    `logs` [K]: what is added to the attention scores towards each of them; None for nothing.
    """

    asked: tuple[Asked, ...]
    visual: Segment
    order: torch.Tensor
    logs: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.order.shape[0] + sum(asked.length for asked in self.asked)


class Listener:
    """The decoder of a model whose own answers are replayed. Its plan has no cuts in it, but for a withdrawal."""

    def __init__(self, decoder: PrunedDecoder) -> None:
        self.decoder = decoder
        self.alone = bool(decoder.shape.states or decoder.shape.bidirectional)
        self.gates = not decoder.shape.states

    @classmethod
    def of(cls, parts: object, plan: KeepPlan) -> Listener:
        """Return the listener of a decoder's parts."""
        return cls(PrunedDecoder(parts, plan).eval())  # type: ignore[arg-type]

    def logits(
        self,
        scene: Scene,
        *,
        visual: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        logs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits [answer tokens, vocabulary] of all answers, question after question.

        `visual`: other embeddings of the visual tokens. `chosen` [K]: the visual tokens that there
        are. `gate` [V]: the weight from 0 to 1 with which others attend to each, exact at 1. `logs` [V] or [K]: what is added
        to the attention scores towards each visual token.
        """
        seen = scene.visual if visual is None else Segment(visual, scene.visual.positions)
        order = torch.arange(seen.embeds.shape[1], device=seen.embeds.device)
        if chosen is not None:
            seen, order = Segment(seen.embeds.index_select(1, chosen), seen.positions.index_select(1, chosen)), chosen
        weight = None if gate is None else torch.log(gate + DROPPED)
        packs = (Shown(tuple(pack), seen, order, logs) for pack in self.packs(scene.asked))
        return torch.cat([self._replayed(scene.prefix, [pack], weight) for pack in packs])

    def answers(self, prefix: Segment, shown: Sequence[Shown]) -> list[torch.Tensor]:
        """Return the logits [answer tokens, vocabulary] of the answers to the questions of each of `shown`.

        Many go through one forward pass, hidden from each other: a few tokens at a time leave a CPU waiting for the weights. Text
        between images sees one of `shown`, so these go one by one.
        """
        parts: list[list[torch.Tensor]] = [[] for _ in shown]
        between = bool((prefix.positions[0, :, None] > shown[0].visual.positions[0]).any())
        for pack in self._packed(shown, apart=self.alone or between):
            logits = self._replayed(prefix, [each for _, each in pack], None)
            lengths = [sum(asked.tokens for asked in each.asked) for _, each in pack]
            for (number, _), rows in zip(pack, torch.split(logits, lengths), strict=True):
                parts[number].append(rows)
        return [torch.cat(rows) for rows in parts]

    def one_by_one(self, prefix: Segment, visual: Segment, asked: Sequence[Asked]) -> Iterator[torch.Tensor]:
        """Yield the logits [answer tokens, vocabulary] of each answer, for a backward pass of its own.

        The image is prefilled once, so the backward pass of an answer goes through its own text and the image alone, not through
        the other questions of a pack. The graph of the prefill is shared: keep it (`retain_graph`), unless questions are `alone`.
        """
        order = torch.arange(visual.embeds.shape[1], device=visual.embeds.device)
        if self.alone:
            yield from (self._replayed(prefix, [Shown((each,), visual, order)], None) for each in asked)
            return
        nothing, empty = Segment(prefix.embeds[:, :0], prefix.positions[:, :0]), self.decoder.empty_caches()
        rows = self.decoder(prefix, visual, nothing, empty, order, every_logit=True).rows
        caches = [cache.append(new, prefix.embeds.shape[1], 0) for cache, new in zip(empty, rows, strict=True)]
        for each in asked:
            output = self.decoder(nothing, nothing, each.text, caches, every_logit=True)
            yield output.logits[0, each.prompt.embeds.shape[1] - 1 :]

    def packs(self, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        """Yield the questions of one forward pass after another."""
        pack: list[Asked] = []
        for each in asked:
            if pack and (self.alone or sum(other.length for other in pack) + each.length > PACKED):
                yield pack
                pack = []
            pack.append(each)
        yield pack

    def _packed(self, shown: Sequence[Shown], *, apart: bool) -> Iterator[list[tuple[int, Shown]]]:
        # What goes through one forward pass after another, with its number.
        pack: list[tuple[int, Shown]] = []
        for number, each in enumerate(shown):
            for asked in self.packs(each.asked):
                part = replace(each, asked=tuple(asked))
                if pack and (apart or sum(other.length for _, other in pack) + part.length > PACKED):
                    yield pack
                    pack = []
                pack.append((number, part))
        yield pack

    def _replayed(self, prefix: Segment, shown: Sequence[Shown], weight: torch.Tensor | None) -> torch.Tensor:
        if self.decoder.shape.bidirectional:
            return self._after_prefill(prefix, shown[0], weight)
        asked = [each for part in shown for each in part.asked]
        visual, text = joined([part.visual for part in shown]), joined([each.text for each in asked])
        order = torch.cat([part.order for part in shown])
        lengths = [[each.length for each in part.asked] for part in shown]
        tokens = [len(part.order) for part in shown]
        bias = bias_of(prefix.embeds.shape[1], tokens, lengths, weight, _logs(shown), device=order.device)
        output = self.decoder(prefix, visual, text, self.decoder.empty_caches(), order, bias=bias, every_logit=True)
        rows, start = list[torch.Tensor](), 0
        for each in asked:
            rows.append(output.logits[0, start + each.prompt.embeds.shape[1] - 1 : start + each.length])
            start += each.length
        return torch.cat(rows)

    def _after_prefill(self, prefix: Segment, shown: Shown, weight: torch.Tensor | None) -> torch.Tensor:
        # The tokens of a prompt attend to each other, and those of its answer only to what is before them.
        (asked,), order, logs = shown.asked, shown.order, shown.logs
        before, tokens, after = (part.embeds.shape[1] for part in (prefix, shown.visual, asked.prompt))
        bias, empty = bias_of(before, [tokens], [[after]], weight, logs, device=order.device), self.decoder.empty_caches()
        prefill = self.decoder(prefix, shown.visual, asked.prompt, empty, order, bias=bias)
        caches = [cache.append(rows, before, after) for cache, rows in zip(empty, prefill.rows, strict=True)]
        assert all(isinstance(cache, LayerCache) for cache in caches)
        steps = asked.answer.embeds.shape[1]
        if not steps:
            return torch.as_tensor(prefill.logits[0])
        nothing = Segment(asked.answer.embeds[:, :0], asked.answer.positions[:, :0])
        row = sum((each for each in (weight, logs) if each is not None), torch.zeros(tokens, device=order.device))
        counts = (tokens if self.decoder.plan.tokens_at_layer(layer) else 0 for layer in range(len(caches)))
        hide = None if weight is None and logs is None else [row[None, :count].expand(steps, -1) for count in counts]
        output = self.decoder(nothing, nothing, asked.answer, caches, hide=hide, every_logit=True)
        return torch.cat([prefill.logits[0], output.logits[0]])


def _logs(shown: Sequence[Shown]) -> torch.Tensor | None:
    given = [part.logs for part in shown if part.logs is not None]
    assert len(given) in (0, len(shown))
    return torch.cat(given) if given else None


def joined(parts: Sequence[Segment]) -> Segment:
    """Return segments one after another."""
    return Segment(torch.cat([part.embeds for part in parts], dim=1), torch.cat([part.positions for part in parts], dim=1))


def bias_of(
    before: int,
    tokens: Sequence[int],
    lengths: Sequence[Sequence[int]],
    weight: torch.Tensor | None,
    logs: torch.Tensor | None = None,
    *,
    device: torch.device | None = None,
) -> torch.Tensor | None:
    """Return what is added to the scores [S, S] of `before` tokens, groups of `tokens` visual ones, and texts; None for nothing.

    `lengths`: of the texts about each group. A group and its texts see no other group, and its texts no other text. `weight` [V] is
    added for each visual token as a key, but not where it attends to itself; `logs` [V] also there.
    """
    texts = [length for group in lengths for length in group]
    if len(texts) == 1 and weight is None and logs is None:
        return None
    total, after = before + sum(tokens) + sum(texts), sum(texts)
    bias = torch.zeros(total, total, device=device)
    if len(texts) > 1:
        group = _marks(before, [*tokens, *(sum(group) for group in lengths)], [*range(len(tokens))] * 2, device)
        text = _marks(before + sum(tokens), texts, range(len(texts)), device)
        same = (group[:, None] == group) & ((text < 0) | (text[:, None] == text))
        bias = torch.where((group < 0) | (group[:, None] < 0) | same, bias, float("-inf"))
    if logs is not None:
        bias = bias + torch.nn.functional.pad(logs, (before, after))[None]
    if weight is None:
        return bias
    columns = torch.nn.functional.pad(weight, (before, after))[None]
    own = torch.nn.functional.pad(torch.diag(weight), (before, after, before, after))
    return bias + columns - own


def _marks(before: int, lengths: Sequence[int], marks: Sequence[int], device: torch.device | None) -> torch.Tensor:
    # -1 for `before` tokens, and then each mark so often.
    repeats = torch.tensor([before, *lengths], device=device)
    return torch.repeat_interleave(torch.tensor([-1, *marks], device=device), repeats)


def measured(
    listener: Listener,
    prefix: Segment,
    visual: Segment,
    asked: tuple[Asked, ...],
    images: int = 1,
    order: torch.Tensor | None = None,
) -> Scene:
    """Return a scene with what the unpruned model says and what matters to its answers, by a backward pass of each.

    `images`: how many the visual tokens are of, all of them equally many. `order` [V]: indices of the tokens in their image; all
    tokens of it if None.
    """
    tokens = visual.embeds.detach().clone().requires_grad_(True)
    products, references = list[torch.Tensor](), list[tuple[torch.Tensor, torch.Tensor]]()
    for logits in listener.one_by_one(prefix, Segment(tokens, visual.positions), asked):
        references.append(probabilities(logits.detach()))
        said = logits.detach().argmax(dim=-1)  # the unpruned model's own answer
        loss = torch.nn.functional.cross_entropy(logits.float(), said, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, tokens, retain_graph=not listener.alone)
        products.append((gradient * visual.embeds)[0].sum(dim=-1))
    likely, ids = (torch.cat(rows) for rows in zip(*references, strict=True))
    size = tokens.shape[1] // images
    order = torch.arange(size, device=tokens.device).repeat(images) if order is None else order
    return Scene(prefix, visual, asked, (size,) * images, order, torch.stack(products), likely, ids)


def probabilities(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of the LIKELY most likely tokens of each row of logits, and their ids, both [n, LIKELY]."""
    logs = torch.log_softmax(logits.float(), dim=-1)
    likely, ids = torch.topk(logs, min(LIKELY, logs.shape[1]))
    return likely, ids


def lost(scene: Scene, logits: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence in nats [n] from the unpruned model to logits [n, vocabulary] of a scene's answers.

    Tokens that the unpruned model holds unlikely count as one.
    """
    logs = torch.log_softmax(logits.float(), dim=-1).gather(1, scene.ids)
    rest, others = (torch.log1p(-each.exp().sum(dim=-1).clamp_max(1 - 1e-6)) for each in (scene.likely, logs))
    return (scene.likely.exp() * (scene.likely - logs)).sum(dim=-1) + rest.exp() * (rest - others)
