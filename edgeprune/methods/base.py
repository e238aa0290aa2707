"""The interface of pruning methods: the views that they receive at their cuts, and helpers for ranking tokens.

A method is a class instantiated for one cut and one geometry. It decides *which* tokens stay; the plan decides how many. A method
returns a score per token at site "vision" (`score`), positions at "input" and "layer" (`select`), and a score per token and KV head
at "cache" (`score_heads`). Methods are traced, so shapes must not depend on values. At "layer" and "cache" V may be 0 (steps
without an image), but never before the decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from edgeprune.plan import Cut, Geometry

Signal = Callable[[], Any]


def _same(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _absent() -> Any:
    raise AssertionError("a method asked for a signal that its site does not give")


class EncoderView(Protocol):
    """The inputs of a method at a cut inside the vision encoder, given by `edgeprune.families.encoder_pruning`."""

    @property
    def order(self) -> torch.Tensor:
        """Indices [V] in the image of the remaining visual tokens, view after view."""
        ...

    @property
    def attention(self) -> Callable[[], torch.Tensor]:
        """Return the attention that each token received in the previous block [V], averaged over heads and the token's patches.

        It comes from the class token, or is averaged over all queries if the encoder has none.
        """
        ...


@dataclass(frozen=True)
class InputView:
    """The inputs of a method before decoder layer 0.

    `visual` [V, hidden]: the projected visual tokens. `prompt` [M, hidden]: embeddings of the user's text without the chat
    template. From the encoder's penultimate block, for methods with "vision attention" in `needs`: `attention` [V] that each token
    receives, and `keys` [V, key dim], averaged over heads. `features` [V, width]: the encoder's output, of which `project` makes
    `visual`, where the projector acts on each token alone. `kept` [V]: indices in the image of the tokens kept by cuts inside the
    encoder, if any.
    """

    visual: torch.Tensor
    prompt: torch.Tensor
    attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    features: torch.Tensor | None = None
    project: Callable[[torch.Tensor], torch.Tensor] = _same
    kept: torch.Tensor | None = None

    @property
    def order(self) -> torch.Tensor:
        """Indices [V] of the tokens in the image."""
        if self.kept is not None:
            return self.kept
        return torch.arange(self.visual.shape[0], device=self.visual.device)


@dataclass(frozen=True)
class LayerView:
    """The inputs of a method at a cut inside the decoder; each signal is computed only when called.

    `order` [V]: indices in the image of the remaining visual tokens, ascending. There are H query heads, `kv_heads` KV heads and T
    text tokens after the image. Attention is normalized over all keys and comes from the layer just run (at "cache", from the
    layer of the cache).

    `attention()` [H, V]: from the last token. `text_attention()` [H, T, V]: from every text token after the image.
    `past_attention()` [H, S, K]: from every new token to the cached visual tokens. `visual_attention()` [H, V, V]: among visual
    tokens. `next_attention()` [H, V]: from the last token, by the projections of the next layer. `values()` [V, KV heads, width]:
    of the visual tokens in this layer. `embeds()`: the embeddings that entered the decoder, of all visual tokens before any layer
    cut [N, hidden] and of the text after the image [T, hidden].
    """

    order: torch.Tensor
    kv_heads: int = 1
    attention: Signal = _absent
    text_attention: Signal = _absent
    past_attention: Signal = _absent
    visual_attention: Signal = _absent
    next_attention: Signal = _absent
    values: Signal = _absent
    embeds: Signal = _absent


class Method(Protocol):
    """A pruning method. `sites`: where it can act. `needs`: signals of the vision encoder that it requires.

    `attention`: whose attention a layer cut ranks by, for decoders that have it in some layers only: that of the "previous" layer
    (the default), of the "next" one, or "" for none.
    """

    sites: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]]

    def __init__(self, cut: Cut, geometry: Geometry) -> None: ...


class Scored:
    """A method that scores every token and keeps the highest scores."""

    needs: ClassVar[tuple[str, ...]] = ()
    attention: ClassVar[str] = "previous"

    def score(self, view: Any) -> torch.Tensor:
        """Return one score per visual token [V]."""
        raise NotImplementedError

    def select(self, view: Any, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of the kept tokens."""
        return keep_best(self.score(view), keep)

    def score_heads(self, view: LayerView) -> torch.Tensor:
        """Return the same scores for every KV head [kv heads, V]."""
        return self.score(view)[None].expand(view.kv_heads, -1)


@runtime_checkable
class Merging(Protocol):
    """An input method that merges dropped tokens into the kept ones; an attribute `merges` of False says that its cut does not."""

    def merge(self, view: InputView, chosen: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [K, hidden] of the chosen tokens [K], with the dropped tokens merged into them."""
        ...


@runtime_checkable
class Weighing(Protocol):
    """An input method that says itself how much each kept token counts (option weigh)."""

    def log_weights(self, view: InputView, chosen: torch.Tensor) -> torch.Tensor:
        """Return what is added to the attention scores towards each of the chosen tokens [K]."""
        ...


class InputMethod(Protocol):
    """A method at the input of the decoder."""

    def select(self, view: InputView, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of the kept tokens."""
        ...


def log_weights(method: InputMethod, view: InputView, chosen: torch.Tensor) -> torch.Tensor:
    """Return what is added to the attention scores towards each of the chosen tokens [K] if the cut weighs."""
    if isinstance(method, Weighing):
        return method.log_weights(view, chosen)
    return represented(unit(view.visual), chosen).log()


def represented(places: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return how many tokens each of the chosen [K] stands for [K], float32: those whose nearest chosen token it is, at least one.

    `places` [V, dimensions]: rows of length 1, which are near if their product is large. With the logarithms added to its attention
    scores, a kept token is attended to as the tokens that it stands for would be if they were its equals ("proportional attention"
    of Bolya et al., "Token Merging", arXiv 2210.09461).
    """
    return nearest_chosen(places, chosen).sum(dim=0).clamp_min(1.0)


def nearest_chosen(places: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return 1 where a chosen token [K] is the nearest one of a token [V], and 0 elsewhere [V, K], float32. `places`: as above."""
    similarity = places @ places.index_select(0, chosen).transpose(0, 1)
    nearest = torch.topk(similarity, 1, dim=1).indices
    own = torch.arange(chosen.shape[0], device=chosen.device)
    return torch.where(nearest == own[None], 1.0, 0.0)


def keep_best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the ascending positions [min(keep, V)] of the highest scores [V].

    Lowers to two TopK, by score and then on the indices, since graphs for TensorRT have no Sort.
    """
    return ascending(rank(scores, keep))


def rank(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the positions [..., min(keep, V)] of the highest scores [..., V], in descending order of score."""
    count = torch.sym_min(keep, scores.shape[-1])  # type: ignore[no-untyped-call]
    return torch.topk(scores, count).indices


def in_turns(rankings: list[torch.Tensor]) -> torch.Tensor:
    """Return scores [..., V] that interleave several rankings [..., V]: the best token of each, then the second best, and so on."""
    count = rankings[0].shape[-1]
    turns = []
    for turn, scores in enumerate(rankings):
        # Sorting twice gives the inverse permutation, that is the rank of each token.
        order = torch.topk(scores, count).indices
        rank = torch.topk(order, count, largest=False).indices
        turns.append(rank * len(rankings) + turn)
    return -torch.stack(turns).amin(dim=0).float()


def ascending(positions: torch.Tensor) -> torch.Tensor:
    """Return positions [K] in ascending order; lowers to TopK."""
    return torch.topk(positions, positions.shape[0], largest=False, sorted=True).values


def cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the float32 cosine similarities [n, m] of rows [n, hidden] and [m, hidden]; they are finite for any input."""
    return unit(left) @ unit(right).transpose(0, 1)


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Return rows [n, hidden] at length 1 in float32, and zeros where a row has no direction."""
    scaled = torch.nn.functional.normalize(rows.float(), dim=-1)
    # NaN compares false. A greedy selection over NaN would take the first token again and again.
    return torch.where(scaled.abs() <= 2.0, scaled, 0.0)


def add_most_different(
    similarity: torch.Tensor, chosen: torch.Tensor, count: int, *, block: int = 1, reduce: str = "max"
) -> torch.Tensor:
    """Return the `chosen` positions [n] followed by `count` more, each the least similar to those before it (greedy max-min).

    `similarity` [V, V]. `reduce`: the similarity to a set is that to its nearest token ("max") or the mean over its tokens
    ("mean"). `block`: how many tokens each step takes; tokens of one block may resemble each other. A traced loop unrolls into four
    cheap nodes per step (TopK, Gather, Squeeze, Max).
    """
    positions = torch.arange(similarity.shape[0], device=similarity.device)
    # A chosen token has infinite similarity to itself, so it is never chosen again. This saves a mask.
    similarity = torch.where(positions[:, None] == positions[None], float("inf"), similarity)
    return add_least_similar(lambda tokens: similarity.index_select(0, tokens), chosen, count, block=block, reduce=reduce)


def add_least_similar(
    similarity_of: Callable[[torch.Tensor], torch.Tensor],
    chosen: torch.Tensor,
    count: int,
    *,
    block: int = 1,
    reduce: str = "max",
) -> torch.Tensor:
    """Return what `add_most_different` does, by a function that returns the similarities [n, V] of tokens [n] to all tokens.

    It is called once per step: cheap similarities need no matrix of all V² of them. That of a token to itself has to be infinite.
    """
    nearest = _reduced(similarity_of(chosen), reduce)
    picked = [chosen]
    for start in range(0, count, block):
        best = torch.topk(nearest, min(block, count - start), largest=False).indices
        picked.append(best)
        rows = _reduced(similarity_of(best), reduce)
        nearest = torch.maximum(nearest, rows) if reduce == "max" else nearest + rows
    return torch.cat(picked)


def _reduced(rows: torch.Tensor, reduce: str) -> torch.Tensor:
    # The mean is kept as a sum: all tokens are compared to equally many, so the order is the same.
    if rows.shape[0] == 1:
        return rows[0]
    return rows.amax(dim=0) if reduce == "max" else rows.sum(dim=0)
