"""What methods see at their cuts, and what they answer.

A method is a class made for one cut and one geometry. It says *which* tokens; how many is the plan's matter. At the site "vision"
it answers a score for each token (`score`), at "input" and "layer" positions (`select`), at "cache" a score for each KV head
(`score_heads`). Everything is traced, so shapes must not depend on values; at a layer or in a cache V may be 0 (steps without an
image), before the decoder it never is.

Choosing tokens that differ from those already chosen: the greedy max-min step that several input methods share.

A loop of constant length over one similarity matrix [V, V]; traced, it unrolls into four cheap nodes a step (TopK, Gather, Squeeze,
Max). With `block` > 1 the most different tokens are taken several at a time: fewer steps, and the tokens of one block may resemble
each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from edgeprune.plan import Cut, Geometry

Signal = Callable[[], Any]


def _absent() -> Any:
    raise AssertionError("a method asked for a signal that its site does not give")


class EncoderView(Protocol):
    """What is known before a block of the vision encoder, as `edgeprune.families.thinning` tells it."""

    @property
    def order(self) -> torch.Tensor:
        """Indices [V] of the living visual tokens in the image, view after view."""
        ...

    @property
    def attention(self) -> Callable[[], torch.Tensor]:
        """Return what each token received in the block before [V], averaged over heads and the token's patches.

        From the class token, or averaged over queries where there is none.
        """
        ...


@dataclass(frozen=True)
class InputView:
    """What is known before decoder layer 0.

    `visual` [V, hidden]: the projected visual tokens. `prompt` [M, hidden]: the embeddings of the user's words, without the
    chat template. From the vision encoder, for methods whose `needs` name them: `attention` [V], how much attention a token
    receives in the last block but one, and `keys` [V, key dim] of that block. `kept` [V]: indices in the image of the tokens that
    the vision encoder has left, where it has cuts.
    """

    visual: torch.Tensor
    prompt: torch.Tensor
    attention: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    @property
    def order(self) -> torch.Tensor:
        """Indices [V] of the tokens in the image."""
        if self.kept is not None:
            return self.kept
        return torch.arange(self.visual.shape[0], device=self.visual.device)


@dataclass(frozen=True)
class LayerView:
    """What is known at a cut inside the decoder; each signal is computed only when called.

    `order` [V]: indices of the living visual tokens among the image's, ascending. H query heads, `kv_heads` KV heads, T tokens
    of text after the image. All attention is softmaxed over every key, of the layer just run (at "cache": of the cache's own
    layer).

    `attention()` [H, V]: from the last token. `text_attention()` [H, T, V]: from every text token after the image.
    `past_attention()` [H, S, K]: from every new token to the visual tokens of earlier steps. `visual_attention()` [H, V, V]:
    from visual to visual tokens. `next_attention()` [H, V]: from the last token, as the next layer will see it. `embeds()`: the
    embeddings ([V, hidden], [T, hidden]) with which visual tokens and text entered the decoder.
    """

    order: torch.Tensor
    kv_heads: int = 1
    attention: Signal = _absent
    text_attention: Signal = _absent
    past_attention: Signal = _absent
    visual_attention: Signal = _absent
    next_attention: Signal = _absent
    embeds: Signal = _absent


class Method(Protocol):
    """What every method has. `sites`: where it can act; `needs`: signals of the vision encoder that not every family gives."""

    sites: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]]

    def __init__(self, cut: Cut, geometry: Geometry) -> None: ...


class Scored:
    """A method that gives every token one number and keeps the highest."""

    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, view: Any) -> torch.Tensor:
        """Return one number per visual token [V]."""
        raise NotImplementedError

    def select(self, view: Any, keep: int) -> torch.Tensor:
        """Return the ascending positions [min(keep, V)] of the tokens that stay."""
        return keep_best(self.score(view), keep)

    def score_heads(self, view: LayerView) -> torch.Tensor:
        """Return the same numbers for every KV head [kv heads, V]."""
        return self.score(view)[None].expand(view.kv_heads, -1)


@runtime_checkable
class Merging(Protocol):
    """An input method that does not only drop tokens: it also returns what the kept ones become [K, hidden]."""

    def merge(self, view: InputView, chosen: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of the chosen tokens [K], the dropped ones merged into them."""
        ...


def keep_best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the ascending positions [min(keep, V)] of the highest scores [V].

    Lowers to TopK twice: by score, then on the indices, since graphs for TensorRT have no Sort.
    """
    return ascending(rank(scores, keep))


def rank(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the positions [..., min(keep, V)] of the highest scores [..., V], the highest first."""
    count = torch.sym_min(keep, scores.shape[-1])  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return torch.topk(scores, count).indices


def ascending(positions: torch.Tensor) -> torch.Tensor:
    """Return positions [K] in ascending order; lowers to TopK."""
    return torch.topk(positions, positions.shape[0], largest=False, sorted=True).values


def cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarities [n, m] of rows [n, hidden] and [m, hidden], in float32."""
    return _unit(left) @ _unit(right).transpose(0, 1)


def add_most_different(
    similarity: torch.Tensor, chosen: torch.Tensor, count: int, *, block: int = 1, reduce: str = "max"
) -> torch.Tensor:
    """Return the `chosen` positions [n] followed by `count` more, each the least similar to those before it.

    `similarity` [V, V]. `reduce`: a token is as similar as to the nearest chosen one ("max"), or as to all on average ("mean").
    """
    places = torch.arange(similarity.shape[0], device=similarity.device)
    # Infinitely similar to itself, a chosen token never comes first again: no mask has to be carried along.
    similarity = torch.where(places[:, None] == places[None], float("inf"), similarity)
    nearest = _reduced(similarity.index_select(0, chosen), reduce)
    picked = [chosen]
    for start in range(0, count, block):
        best = torch.topk(nearest, min(block, count - start), largest=False).indices
        picked.append(best)
        rows = _reduced(similarity.index_select(0, best), reduce)
        nearest = torch.maximum(nearest, rows) if reduce == "max" else nearest + rows
    return torch.cat(picked)


def _reduced(rows: torch.Tensor, reduce: str) -> torch.Tensor:
    # The mean is kept as a sum: it orders tokens the same, since all are compared to equally many.
    if rows.shape[0] == 1:
        return rows[0]
    return rows.amax(dim=0) if reduce == "max" else rows.sum(dim=0)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1)
