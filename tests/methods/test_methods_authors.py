"""The kept sets that the authors' own code gave, on inputs that a seed makes again (tests/methods/authors/README.md).

No line of theirs is here. What differs on purpose (positions, recycled tokens) stands in each method's file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from author_trials import HEADS, INNER, LAYERS, WIDTH, WORDS, Recorded, Trial, decoder_weights, embeddings, recorded, trial
from transformers import LlamaConfig, LlamaModel

from edgeprune.calibration.allocate.budgets import vtw_plan
from edgeprune.calibration.collect.measure import Deletions, mean_received
from edgeprune.calibration.data.statistics import Statistics, StatisticsSource
from edgeprune.calibration.replay.episodes import divergence
from edgeprune.families.base import DecoderParts, text_decoder
from edgeprune.families.encoder import attend_within, mean_over_heads
from edgeprune.families.encoder_pruning import RowLayout
from edgeprune.methods.base import InputView, LayerView
from edgeprune.methods.sparsevlm import text_raters
from edgeprune.model import PrunedDecoder, Segment
from edgeprune.plan import Cut, Geometry, KeepPlan, View, keep_count
from edgeprune.registry import method_class

SQUARE = Geometry(80, 80, 16, 1)  # methods at the input do not ask for it
FITPRUNE_SCHEME = (0, 0, 7, 6, 4, 5, 16, 40)  # tokens that the authors' scheme for 30 % deletes in the first layers
LONG_PREFIX = 35  # text tokens before the image, fixed in the code of FitPrune and VTW


def tensor(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows)


def select(
    name: str, view: InputView, keep: int, options: Mapping[str, Any] | None = None, geometry: Geometry = SQUARE
) -> list[int]:
    """Return the positions that an input method keeps."""
    chosen: torch.Tensor = method_class(name)(Cut("input", name, keep, options=options or {}), geometry).select(view, keep)
    return chosen.tolist()


def cdpruner(made: Trial) -> list[list[int]]:
    visual, prompt = made.features(), made.gaussian(7, made.width)
    rank = max(8, made.width // 3) if made.realistic else made.width
    keep = max(1, int(made.share * min(made.tokens, int(0.8 * rank))))
    return [select("cdpruner", InputView(tensor(visual), tensor(prompt)), keep)]


def dart(made: Trial) -> list[list[int]]:
    words, image, text = int(made.rng.integers(4, 20)), int(made.rng.integers(1, 6)), int(made.rng.integers(0, 5))
    visual, prompt = made.features(), made.gaussian(words, made.width)
    keep = keep_count(made.tokens, made.share, "dart")
    pivots = {"image_pivots": image, "text_pivots": min(text, words)}
    return [select("dart", InputView(tensor(visual), tensor(prompt)), keep, pivots)]


def divprune(made: Trial) -> list[list[int]]:
    visual = tensor(made.features())
    return [select("divprune", InputView(visual, visual[:1]), keep_count(made.tokens, made.share, "divprune"))]


def evs(made: Trial) -> list[list[int]]:
    frames, rows, columns = int(made.rng.integers(2, 7)), int(made.rng.integers(4, 12)), int(made.rng.integers(4, 12))
    height, width = rows * 16, columns * 16
    views = tuple(View(0, 0, height, width, rows, columns, time=time) for time in range(frames))
    geometry = Geometry(height, width, 16, 1, views, frames, 1.0)
    visual = tensor(made.features(geometry.tokens))
    keep = keep_count(geometry.tokens, max(made.share, 1 / frames), "evs")
    return [select("evs", InputView(visual, visual[:1]), keep, geometry=geometry)]


def zspaprune(made: Trial) -> list[list[int]]:
    visual, prompt = tensor(made.features()), tensor(made.gaussian(7, made.width))
    options = {"core": 0.6, "relevance": "pooled", "reduce": "max", "block": 1}
    return [select("zspaprune", InputView(visual, prompt), max(2, int(made.share * made.tokens)), options)]


def visionzip_view(made: Trial) -> tuple[InputView, int, int]:
    """Return a view, how many tokens stay, and how many of them are contextual."""
    made.gaussian(1, made.width)  # the class token, which is not among the visual tokens
    rest = made.features()
    query, key = (tensor(made.gaussian(8, made.tokens + 1, 16)) for _ in range(2))
    keep = max(2, int(made.share * made.tokens))
    contextual = int(int(made.rng.integers(1, 60)) / 100 * keep)
    query, key = (rows.transpose(0, 1).flatten(1) for rows in (query, key))
    _, weights = attend_within(query, key, key, 8, 1)
    rows = RowLayout(1, first=1)
    keys = rows.patches(mean_over_heads(key, 8))
    return InputView(tensor(rest), tensor(rest[:1]), rows.received(weights), keys), keep, contextual


def visionzip(made: Trial) -> list[list[int]]:
    view, keep, contextual = visionzip_view(made)
    method = method_class("visionzip")(Cut("input", "visionzip", keep, options={"contextual": (contextual + 0.5) / keep}), SQUARE)
    return [method.select(view, keep).tolist(), sorted(method._parts(view, keep)[1].tolist())]


def evit(made: Trial) -> list[list[int]]:
    rows = np.concatenate([made.gaussian(1, made.width), made.features()])
    rows = (rows / np.abs(rows).max(axis=1, keepdims=True)).astype(np.float32)
    weight, bias = made.gaussian(3 * made.width, made.width, scale=0.3), made.gaussian(3 * made.width, scale=0.3)
    query, key, value = (tensor(rows) @ tensor(weight).T + tensor(bias)).chunk(3, dim=1)
    layout = RowLayout(1, first=1)
    _, weights = attend_within(query, key, value, 8, 1)
    return [layout.best(layout.received(weights), keep_count(made.tokens, made.share, "evit")).tolist()]


@dataclass
class Chain:
    """A random Llama decoder, as the authors' code ran it; `embeds`: text, an image, text."""

    parts: DecoderParts
    embeds: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, made: Trial, kv_heads: int, layers: int) -> Chain:
        """Return the decoder and the inputs of a trial."""
        parts = decoder_parts(decoder_weights(made, kv_heads, layers), kv_heads, layers)
        return cls(parts, tuple(map(tensor, embeddings(made))))

    @property
    def segments(self) -> tuple[Segment, Segment, Segment]:
        """The three segments of a prompt."""
        first, image, last = (part.shape[0] for part in self.embeds)
        ends = torch.arange(first + image + last)[None]
        starts = (0, first, first + image, first + image + last)
        return tuple(Segment(part[None], ends[:, a:b]) for part, a, b in zip(self.embeds, starts, starts[1:], strict=False))  # type: ignore[return-value]

    @torch.no_grad()
    def run(self, *cuts: Cut, **options: Any) -> Any:
        """Run the decoder with cuts and return its output."""
        geometry = Geometry(16, 16 * self.embeds[1].shape[0], 16, 1)
        plan = KeepPlan("llava", len(self.parts.layers), geometry, cuts)
        decoder = PrunedDecoder(self.parts, plan).eval()
        return decoder(*self.segments, decoder.empty_caches(), **options)

    def sets(self, *cuts: Cut) -> list[list[int]]:
        """Return the image's tokens that each cut keeps."""
        return [kept.tolist() for kept in self.run(*cuts).kept]


def decoder_parts(weights: dict[str, np.ndarray], kv_heads: int, layers: int, head: np.ndarray | None = None) -> DecoderParts:
    """Return the parts of a decoder with these weights; `head`: those of the last layer, by default unit ones."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        intermediate_size=INNER,
        vocab_size=1,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    )
    model = LlamaModel(config).eval()
    model.load_state_dict({name: tensor(rows) for name, rows in weights.items()}, strict=False)
    last = torch.nn.Linear(WIDTH, WIDTH if head is None else len(head), bias=False)
    last.weight.data = torch.eye(WIDTH) if head is None else tensor(head)
    return text_decoder(model, last)


def fastv(made: Trial) -> list[list[int]]:
    layer = int(made.rng.choice((1, 2, 3, 5)))
    chain = Chain.of(made, int(made.rng.choice((2, 8))), layer + 1)
    return chain.sets(Cut("layer", "fastv", keep_count(made.tokens, made.share, "fastv"), layer))


def pyramiddrop(made: Trial) -> list[list[int]]:
    first = int(made.rng.integers(1, 4))
    second, share = first + int(made.rng.integers(1, 3)), max(made.share, 0.15)
    keeps = [int(made.tokens * kept) for kept in (share, share * share)]
    cuts = [Cut("layer", "pyramiddrop", keep, layer) for keep, layer in zip(keeps, (first, second), strict=True)]
    return Chain.of(made, 8, second + 1).sets(*cuts)


def sparsevlm(made: Trial) -> list[list[int]]:
    first = int(made.rng.integers(0, 3))
    second = first + int(made.rng.integers(1, 3))
    third = second + 1
    chain = Chain.of(made, int(made.rng.choice((2, 8))), third + 2)
    keeps = [max(least, int(made.tokens * made.share**power)) for power, least in ((1, 3), (2, 2), (3, 1))]
    # The authors' layers are those whose output is pruned.
    cuts = [Cut("layer", "sparsevlm", keep, layer + 1) for keep, layer in zip(keeps, (first, second, third), strict=True)]
    raters = text_raters(chain.embeds[1], chain.embeds[2]).nonzero()[:, 0].tolist()
    return [*chain.sets(*cuts), raters]


def fitprune_chain(made: Trial) -> tuple[Chain, float]:
    """Return the decoder of a trial and its tolerance."""
    tokens = (100, 144, 196)[int(made.rng.integers(0, 3))]
    kv_heads = int(made.rng.choice((2, 8)))
    parts = decoder_parts(decoder_weights(made, kv_heads), kv_heads, LAYERS)
    shapes = ((LONG_PREFIX, made.gaussian), (tokens, made.features), (WORDS, made.gaussian))
    embeds = tuple(tensor(make(count, WIDTH)) for count, make in shapes)
    return Chain(parts, embeds), int(made.rng.integers(8, 40)) / 64


def fitprune(made: Trial) -> list[list[int]]:
    chain, _ = fitprune_chain(made)
    keeps = chain.embeds[1].shape[0] - np.cumsum(FITPRUNE_SCHEME)
    # What a layer deletes behind its attention is what a cut before the next layer drops.
    return chain.sets(*(Cut("layer", "fitprune", int(keep), layer + 1) for layer, keep in enumerate(keeps[:-1])))


OURS: dict[str, Callable[[Trial], list[list[int]]]] = {
    "cdpruner": cdpruner,
    "dart": dart,
    "divprune": divprune,
    "evit": evit,
    "evs": evs,
    "fastv": fastv,
    "fitprune": fitprune,
    "pyramiddrop": pyramiddrop,
    "sparsevlm": sparsevlm,
    "visionzip": visionzip,
    "zspaprune": zspaprune,
}


def wrong(name: str, records: Iterable[Recorded]) -> list[int]:
    """Return the seeds of the trials in which our method keeps other sets than recorded."""
    ours = ((record, OURS[name](trial(name, record.seed))) for record in records)
    return [record.seed for record, sets in ours if [tuple(each) for each in sets] != list(record.kept[: len(sets)])]


@pytest.mark.parametrize("name", OURS)
def test_the_same_tokens_are_kept(name: str) -> None:
    records = recorded(name)
    assert len(records) == 120
    assert wrong(name, records[::10]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_the_same_tokens_are_kept_in_every_trial(name: str) -> None:
    assert wrong(name, recorded(name)) == []


@pytest.mark.parametrize("name", OURS)
def test_another_ranking_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(scores: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return topk(-scores if scores.is_floating_point() else scores, *arguments, **options)

    topk = torch.topk
    monkeypatch.setattr(torch, "topk", first)
    assert wrong(name, recorded(name)[:2])


def visionzip_merged(made: Trial) -> float:
    """Return the sum that stands for the contextual tokens of a trial, each number times a cosine of its place."""
    view, keep, contextual = visionzip_view(made)
    zipped: Any = method_class("visionzip")(
        Cut("input", "visionzip", keep, options={"contextual": (contextual + 0.5) / keep}), SQUARE
    )
    chosen, targets = zipped.select(view, keep), zipped._parts(view, keep)[1]
    merged = zipped.merge(view, chosen)[(chosen[:, None] == targets[None]).any(dim=1)]
    return float((merged * torch.cos(torch.arange(merged.numel()).float()).view(merged.shape)).sum())


def test_visionzip_merges_to_the_same_tokens() -> None:
    records = recorded("visionzip")[::4]
    expected = np.array([record.values[0] for record in records])
    found = np.array([visionzip_merged(trial("visionzip", record.seed)) for record in records])
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-2)


def fitprune_counts(record: Recorded) -> list[int]:
    """Return how many tokens each layer deletes at the tolerance of a trial, all layers run on what the ones before left."""
    chain, alpha = fitprune_chain(trial("fitprune", record.seed))
    assert alpha == record.values[0]
    totals: list[tuple[float, ...]] = []

    def add(layer: int, view: LayerView) -> None:
        totals.append(tuple(float(received.sum()) for received in mean_received(view)))

    chain.run(probe=add)
    cross, within = zip(*totals, strict=True)
    deletions = Deletions(alpha, cross, within)
    chain.run(delete=deletions)
    return [before - after for before, after in zip(deletions.counts, deletions.counts[1:], strict=False)]


def test_fitprune_deletes_as_many_tokens_in_each_layer() -> None:
    for record in recorded("fitprune")[::10]:
        assert fitprune_counts(record) == [int(count) for count in record.values[1:LAYERS]]


@pytest.mark.slow
def test_fitprune_deletes_as_many_tokens_in_each_layer_of_every_trial() -> None:
    records = recorded("fitprune")
    assert [record.seed for record in records if fitprune_counts(record) != [int(n) for n in record.values[1:LAYERS]]] == []


def vtw_costs(made: Trial) -> np.ndarray:
    """Return the mean cost [layers] of withdrawing the tokens of two images before layers 5, 6 and 7; 9 before the others."""
    tokens = (64, 100, 144)[int(made.rng.integers(0, 3))]
    kv_heads = int(made.rng.choice((2, 8)))
    weights, head = decoder_weights(made, kv_heads), made.gaussian(40, WIDTH, scale=0.3)
    parts = decoder_parts(weights, kv_heads, LAYERS, head)
    costs = np.full((2, LAYERS), 9.0)
    for sample in range(2):
        shapes = ((LONG_PREFIX, made.gaussian), (tokens, made.features), (WORDS, made.gaussian))
        chain = Chain(parts, tuple(tensor(make(count, WIDTH)) for count, make in shapes))
        full = chain.run().logits[0]
        for layer in range(5, LAYERS):
            costs[sample, layer] = float(divergence(chain.run(Cut("layer", "vtw", 0, layer)).logits[0], full))
    mean: np.ndarray = costs.mean(axis=0)
    return mean


def vtw_agrees(record: Recorded) -> bool:
    """Return whether the costs of a trial are the recorded ones and the layer is the same."""
    costs = vtw_costs(trial("vtw", record.seed))
    *expected, eta, layer = record.values
    source = StatisticsSource("llava", LAYERS, 2, "", SQUARE, "last", "mean", False)
    sums = {name: np.zeros(shape) for name, shape in source.shapes().items()} | {"withdrawn_kl": costs}
    plan = vtw_plan(Statistics.empty(source).with_sample(sums), KeepPlan("llava", LAYERS, SQUARE), eta=eta)
    return np.allclose(costs[5:], expected, rtol=1e-3) and plan.cuts[0].layer == layer


def test_vtw_withdraws_before_the_same_layer() -> None:
    records = recorded("vtw")
    assert len(records) == 120
    assert [record.seed for record in records[::10] if not vtw_agrees(record)] == []


@pytest.mark.slow
def test_vtw_withdraws_before_the_same_layer_in_every_trial() -> None:
    assert [record.seed for record in recorded("vtw") if not vtw_agrees(record)] == []


def test_the_other_divergence_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "divergence", lambda withdrawn, full: divergence_before(full, withdrawn))
    assert not all(map(vtw_agrees, recorded("vtw")[:2]))


divergence_before = divergence
