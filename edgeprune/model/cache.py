"""The KV cache of a layer, with separate tensors for text and visual tokens, and the rows that one step adds to it.

A layer without attention has states of fixed size in its place, which a step replaces.

A step returns only its new rows, and the owner of the caches appends them: no growing tensor is copied. Visual tokens have caches
of their own, so that a prefix of them can be read.

Every cache begins with a null row to which no token attends, so that no product has an empty operand when there is no image or no
text yet: ONNX Runtime 1.31.1 divides by zero there in a matrix product with a folded transpose (FusedMatMul with transBatchB).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NewKv:
    """The rows a step adds to one layer: `key` and `value` [n, kv heads, head_dim] of its prefix, kept visual tokens and suffix.

    `place`, for layers with a window: the tokens' places in the sequence, [n, 1], or [n, kv heads] if each head keeps its own.
    `weight` [n, 1], if the input cut weighs: the logarithms of how many tokens each stands for.
    """

    key: torch.Tensor
    value: torch.Tensor
    place: torch.Tensor | None = None
    weight: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerStates:
    """The states of one layer without attention, float32, in the order of its shapes in DecoderParts."""

    tensors: tuple[torch.Tensor, ...]

    def append(self, rows: NewKv | LayerStates, before: int, after: int) -> LayerStates:
        """Return the states after a step, which are among its rows."""
        assert isinstance(rows, LayerStates)
        return rows


@dataclass(frozen=True)
class LayerCache:
    """One layer's KV cache: text [1 + T, kv heads, head_dim] and visual tokens [1 + K, kv heads, head_dim].

    `place` and `visual_place`, for layers with a window: the places of the tokens as in `NewKv`, also with null rows. `weight` and
    `visual_weight`, if the input cut weighs: their weights, likewise. `rows` and `visual_rows` [1]: how many rows are real, the
    null row among them; None for all.
    """

    key: torch.Tensor
    value: torch.Tensor
    visual_key: torch.Tensor
    visual_value: torch.Tensor
    place: torch.Tensor | None = None
    visual_place: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    visual_weight: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    visual_rows: torch.Tensor | None = None

    def append(self, rows: NewKv | LayerStates, before: int, after: int) -> LayerCache:
        """Return the cache with the rows of a step appended; its prefix has `before` tokens and its suffix `after`."""
        assert isinstance(rows, NewKv)
        end = rows.key.shape[0] - after
        grown: dict[str, torch.Tensor] = {}
        for name in ("key", "value", "place", "weight"):
            text, visual, new = (getattr(holder, part) for holder, part in ((self, name), (self, f"visual_{name}"), (rows, name)))
            if text is not None and visual is not None and new is not None:
                grown[name] = torch.cat([text, new[:before], new[end:]])
                grown[f"visual_{name}"] = torch.cat([visual, new[before:end]])
        return LayerCache(**grown)


def caches_of(
    flat: Sequence[torch.Tensor], holders: Mapping[int, int], states: Mapping[int, int], *, weighs: bool = False
) -> list[LayerCache | LayerStates]:
    """Return the caches of a flat sequence.

    It has key and value of each layer with attention and places for text, then the same for visual tokens, then states. `holders`:
    for each layer with a window, the layer that holds its places (`KeepPlan.place_layers`). `states`: for each layer without
    attention, the number of its states. `weighs`: whether weights follow the places.
    """
    half, held = (len(flat) - sum(states.values())) // 2, sorted(set(holders.values()))
    text, visual, rest = flat[:half], flat[half : 2 * half], iter(flat[2 * half :])
    first = half - len(held) - weighs
    weights = {"weight": text[half - 1], "visual_weight": visual[half - 1]} if weighs else {}
    places = {layer: first + held.index(holder) for layer, holder in holders.items()}
    pairs, caches = iter(range(0, first, 2)), list[LayerCache | LayerStates]()
    for layer in range(first // 2 + len(states)):
        if layer in states:
            caches.append(LayerStates(tuple(next(rest) for _ in range(states[layer]))))
            continue
        pair = slice(begin := next(pairs), begin + 2)
        place = (text[places[layer]], visual[places[layer]]) if layer in places else ()
        caches.append(LayerCache(*text[pair], *visual[pair], *place, **weights))
    return caches


def flat_rows(rows: Sequence[NewKv | LayerStates], holders: Mapping[int, int]) -> tuple[torch.Tensor, ...]:
    """Return the rows as a flat sequence: key and value of each layer with attention, places, weights; as in `caches_of`."""
    pairs = [part for layer in rows if isinstance(layer, NewKv) for part in (layer.key, layer.value)]
    places = [rows[layer].place for layer in sorted(set(holders.values()))]  # type: ignore[union-attr]  # it has attention
    weights = [layer.weight for layer in rows if isinstance(layer, NewKv)][:1]  # all layers have the same
    return (*pairs, *(part for part in (*places, *weights) if part is not None))


def flat_states(rows: Sequence[NewKv | LayerStates]) -> tuple[torch.Tensor, ...]:
    """Return the states as a flat sequence, layer by layer."""
    return tuple(state for layer in rows if isinstance(layer, LayerStates) for state in layer.tensors)
