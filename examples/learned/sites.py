"""Other sites than the decoder's input: what calibration learns there, beside the methods that act there, at equal work.

    python examples/learned/sites.py OUT

On the bundled model, in PyTorch. Before a block of the vision encoder, score and metric are learned from what enters that block,
and take the place of EViT's attention. Before a layer of the decoder they are learned, for each question, from the states there
and the prompt's highest attention, and take the place of FastV's. The closed form is that of the decoder's input, and so is the
search of its settings, here by questions about held-out scenes. In the second table the input has the same work in the decoder.
Scenes of seed 77 teach, others measure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from learned_tokens import LEARNING_SEED, draw

from edgeprune.calibration.data.samples import Sample, Score, read_samples, score
from edgeprune.calibration.learn.closed import Settings, Sums, closed_form
from edgeprune.calibration.learn.heldout import search
from edgeprune.calibration.learn.run import HELD_OUT, LearnRequest, learn
from edgeprune.calibration.learn.scenes import Asked, Listener, measured
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.calibration.replay.reference import reference_model
from edgeprune.calibration.search.objectives import Agreement
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.io.progress import SILENT
from edgeprune.methods.base import InputView
from edgeprune.methods.evit import EViT
from edgeprune.methods.fastv import FastV
from edgeprune.methods.learned import Learned, write
from edgeprune.methods.ranking import logarithms
from edgeprune.plan import Cut, KeepPlan, Weights
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import Runtime
from edgeprune.tabletop.questions import DESCRIBE

RANK, MOST_TOKENS, JUDGES = 64, 128, 32
BLOCKS, IN_BLOCKS = (1, 2, 3), (36, 16)  # and the tokens that stay
LAYERS = {1: 20, 2: 24, 4: 18}  # and the tokens that stay

Taught = tuple[Sums, Callable[[Settings], dict[str, torch.Tensor]]]


def main() -> None:
    """Learn at each site, and print short answers and descriptions beside those of the methods that act there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=60, help="scenes to learn from")
    parser.add_argument("--scenes", type=int, default=20, help="scenes to measure on")
    parser.add_argument("--seed", type=int, default=6000, help="of the scenes to measure on")
    request = parser.parse_args()
    draw(request.out / f"scenes-{request.images}", request.images, LEARNING_SEED)
    draw(request.out / f"unseen-{request.seed}-{request.scenes}", request.scenes, request.seed)
    lessons = read_samples(request.out / f"scenes-{request.images}" / "dataset.jsonl")
    unseen = read_samples(request.out / f"unseen-{request.seed}-{request.scenes}" / "dataset.jsonl")
    loaded = load_model(resolve_model("tabletop"))
    loaded.model.requires_grad_(False)
    site = Sites(loaded, lessons)
    kept = request.out / f"recorded-{request.images}"
    print("| before block | tokens | evit | learned there | learned at the input |\n|---|---|---|---|---|")
    for block in BLOCKS:
        rows = site.before_block(block)
        for keep in IN_BLOCKS:
            plan = site.base.with_cuts(Cut("vision", "evit", keep, block))
            cells = [site.answers(plan, unseen), site.answers(plan, unseen, rows), site.at_input(keep, lessons, kept, unseen)]
            print(f"| {block} of {site.blocks} | {keep} | {' | '.join(cells)} |", flush=True)
    print("\n| before layer | tokens | decoder work | fastv | learned there | learned at the input, tokens |")
    print("|---|---|---|---|---|---|")
    for layer, keep in LAYERS.items():
        rows, plan = site.before_layer(layer, keep), site.base.with_cuts(Cut("layer", "fastv", keep, layer))
        work = sum(map(plan.tokens_at_layer, range(plan.layers))) / plan.layers
        cells = [site.answers(plan, unseen), site.answers(plan, unseen, rows), site.at_input(round(work), lessons, kept, unseen)]
        share = work / site.base.geometry.tokens
        print(f"| {layer} of {plan.layers} | {keep} | {share:.0%} | {' | '.join(cells)}, {work:.0f} |", flush=True)


@dataclass
class Rows:
    """What is learned at a site: `features()` [V, d] of the tokens at the cut that is being made, and the weights."""

    hooks: Callable[[], Any]
    features: Callable[[Any], torch.Tensor]
    weights: Weights | None = None

    def chosen(self, view: Any, keep: int) -> torch.Tensor:
        """Return the ascending positions [keep] of the tokens that stay."""
        features = self.features(view)
        cut = Cut("input", "learned", keep, weights=self.weights)
        return Learned(cut, None).select(InputView(features, features[:1]), keep)  # type: ignore[arg-type]


class Sites:
    """The bundled model at all its sites."""

    def __init__(self, loaded: LoadedModel, lessons: Sequence[Sample]) -> None:
        self.loaded = loaded
        self.base = unpruned_plan(loaded.folder.model_type, loaded.decoder_shape().layers, loaded.geometry(None))
        self.blocks = len(loaded.model.model.visual.blocks)
        groups: dict[Any, list[Sample]] = {}
        for sample in lessons:
            groups.setdefault(sample.images, []).append(sample)
        self.taught = [group for number, group in enumerate(groups.values()) if number % HELD_OUT != HELD_OUT - 1]
        held = [sample for number, group in enumerate(groups.values()) if number % HELD_OUT == HELD_OUT - 1 for sample in group]
        self.judge = Agreement(loaded, self.base, held[:JUDGES], max_tokens=MOST_TOKENS, fit="exact", device="cpu")
        self.recorder = Recorder(loaded, self.base, MOST_TOKENS, "cpu")
        self.listener = Listener(self.recorder.decoder)
        self._inputs: dict[int, str] = {}

    def answers(self, plan: KeepPlan, samples: Sequence[Sample], rows: Rows | None = None) -> str:
        """Return the short answers that are right and the F1 of facts under a plan, with `rows` in the place of its method."""
        with placed(rows):
            runtime = Runtime(reference_model(self.loaded, plan))
            said = [runtime.generate(sample.image, sample.prompt, max_tokens=MOST_TOKENS).text for sample in samples]
        points = [(sample.kind == DESCRIBE, score(sample, text)) for sample, text in zip(samples, said, strict=True)]
        short = [each.f1 for describes, each in points if not describes]
        facts = sum((each for describes, each in points if describes), Score())
        return f"{sum(short) / len(short):.1%}, {facts.f1:.1%}"

    def at_input(self, keep: int, lessons: Sequence[Sample], kept: Path, samples: Sequence[Sample]) -> str:
        """Return the answers of the method learned, which acts at the decoder's input."""
        if keep not in self._inputs:
            request = LearnRequest.of(keep, keep, {}, seed=0, max_tokens=MOST_TOKENS, fit="exact", device="cpu")
            found = learn(self.loaded, lessons, self.base, request, kept / "plan.json", SILENT, kept=kept, gate=False)
            cut = Cut("input", "learned", keep, weights=found.weights)
            self._inputs[keep] = self.answers(self.base.with_cuts(cut), samples)
        return self._inputs[keep]

    def before_block(self, block: int) -> Rows:
        """Learn before a block of the vision encoder, from importance at the decoder's input."""
        before = self.loaded.model.model.visual.blocks[block - 1]
        rows, sums = entering(before.norm2, before.mlp, lambda hidden, view: hidden), Sums()
        for group in self.taught:
            self.recorder.see(1)
            with rows.hooks():
                recordings = [self.recorder.ask(sample, "exact")[0] for sample in group]
                features = rows.features(None)
            prefix, visual, _ = self.recorder.segments(recordings[0])
            asked = [Asked(self.recorder.segments(each)[2], each.answer, torch.zeros(1, 1)) for each in recordings]
            sums.add(features, measured(self.listener, prefix, visual, tuple(asked)).importance)
        return self._settled(rows, sums, self.base.with_cuts(Cut("vision", "evit", IN_BLOCKS[-1], block)))

    def before_layer(self, layer: int, keep: int) -> Rows:
        """Learn before a layer of the decoder, from importance to the answer of each question there."""
        before, entered = self.recorder.decoder.layers[layer - 1], self.recorder.decoder.layers[layer].input_layernorm
        rows, sums = entering(before.post_attention_layernorm, before.mlp, beside_attention), Sums()
        for group in self.taught:
            self.recorder.see(1)
            for sample in group:
                (recording,) = self.recorder.ask(sample, "exact")
                prefix, visual, prompt = self.recorder.segments(recording)
                sums.add(
                    *self._layer_lesson(rows, entered, layer, Asked(prompt, recording.answer, torch.zeros(1, 1)), prefix, visual)
                )
        return self._settled(rows, sums, self.base.with_cuts(Cut("layer", "fastv", keep, layer)))

    def _layer_lesson(
        self, rows: Rows, entered: Any, layer: int, asked: Asked, prefix: Any, visual: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Features from the prompt alone, as at run time, and importance from prompt and answer.
        found: list[torch.Tensor] = []

        def probe(index: int, view: Any) -> None:
            if index == layer - 1:
                found.append(view.text_attention())

        decoder, tokens = self.recorder.decoder, visual.embeds.shape[1]
        with torch.no_grad(), rows.hooks():
            decoder(prefix, visual, asked.prompt, decoder.empty_caches(), probe=probe)
            view = Seen(found[0], tokens, asked.prompt.embeds.shape[1], decoder.shape.kv_heads)
            features = rows.features(view)
        states: list[torch.Tensor] = []

        def keep_state(_: Any, given: tuple[torch.Tensor]) -> None:
            states.append(given[0])

        handle = entered.register_forward_pre_hook(keep_state)
        embeds = visual.embeds.detach().clone().requires_grad_(True)
        output = decoder(prefix, type(visual)(embeds, visual.positions), asked.text, decoder.empty_caches(), every_logit=True)
        handle.remove()
        logits = output.logits[0, asked.prompt.embeds.shape[1] - 1 :]
        loss = torch.nn.functional.cross_entropy(logits, logits.detach().argmax(dim=-1), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, states[0])
        begin = prefix.embeds.shape[1]
        product = (gradient * states[0]).detach()[begin : begin + tokens].sum(dim=-1)
        return features, torch.log(product.abs() + 1e-4)

    def _settled(self, rows: Rows, sums: Sums, plan: KeepPlan) -> Rows:
        # With the settings that are closest to the unpruned model on held-out questions.
        def moved(settings: Settings) -> float:
            rows.weights = self._weights(sums, settings)
            with placed(rows):
                return self.judge.divergences([plan])[0]

        rows.weights = self._weights(sums, search(moved, lambda done: None)[0])
        return rows

    def _weights(self, sums: Sums, settings: Settings) -> Weights:
        tensors = closed_form(sums, settings, RANK)
        return write(
            tensors, {"weights_sha256": self.loaded.weights_sha256, "keeps": [1, self.base.geometry.tokens], "question": 0.0}
        )


@dataclass(frozen=True)
class Seen:
    """What `beside_attention` takes of a layer's view."""

    attention: torch.Tensor
    tokens: int
    text: int
    kv_heads: int

    @property
    def order(self) -> torch.Tensor:
        """A number for each visual token."""
        return torch.arange(self.tokens)

    def text_attention(self) -> torch.Tensor:
        """Return the attention from every text token behind the image [H, T, V]."""
        return self.attention

    def embeds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows as many as there are visual tokens, and text tokens behind them."""
        return torch.zeros(self.tokens, 1), torch.zeros(self.text, 1)


def beside_attention(hidden: torch.Tensor, view: Any) -> torch.Tensor:
    """Return the states of visual tokens, of all states [tokens, d], beside the logarithms of the prompt's highest attention."""
    tokens, text = len(view.order), len(view.embeds()[1])
    begin = len(hidden) - text - tokens
    peaks = logarithms(view.text_attention(), view.kv_heads, "max", max(tokens, 1))
    return torch.cat([hidden[begin : begin + tokens], peaks.transpose(0, 1)], dim=1)


def entering(norm: Any, mlp: Any, features: Callable[[torch.Tensor, Any], torch.Tensor]) -> Rows:
    """Return the rows behind a block whose last part is `mlp`, which adds to what enters `norm`."""
    before, added = list[torch.Tensor](), list[torch.Tensor]()

    @contextmanager
    def hooks() -> Iterator[None]:
        first = norm.register_forward_pre_hook(lambda _, given: before.__setitem__(slice(None), [given[0].detach()]))
        second = mlp.register_forward_hook(lambda _, given, result: added.__setitem__(slice(None), [result.detach()]))
        try:
            yield
        finally:
            first.remove()
            second.remove()

    return Rows(hooks, lambda view: features(before[0] + added[0], view))


@contextmanager
def placed(rows: Rows | None) -> Iterator[None]:
    """Let `rows` choose in the place of EViT and FastV, while the block runs."""

    def select(_: Any, view: Any, keep: int) -> torch.Tensor:
        assert rows is not None
        return rows.chosen(view, keep) if len(view.order) else view.order

    def scores(self: Any, view: Any) -> torch.Tensor:
        assert rows is not None
        found = torch.zeros(len(view.order))
        return found.index_fill(0, rows.chosen(view, self.cut.keep), 1.0)

    plain = EViT.__init__

    def remember(self: Any, cut: Cut, geometry: Any) -> None:
        plain(self, cut, geometry)
        self.cut = cut

    with ExitStack() as stack:
        if rows is not None:
            stack.enter_context(rows.hooks())
            stack.enter_context(patch.object(FastV, "select", select))
            stack.enter_context(patch.object(EViT, "__init__", remember))
            stack.enter_context(patch.object(EViT, "score", scores))
        yield


if __name__ == "__main__":
    main()
