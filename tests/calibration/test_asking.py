"""What questions ask for: whose importance is whose, and the fit finds what was planted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from recorded_scenes import recorded

from edgeprune.calibration.data.samples import read_samples
from edgeprune.calibration.learn.asking import fitted
from edgeprune.calibration.learn.closed import Settings, Sums, closed_form
from edgeprune.calibration.learn.scenes import Asked, Scene
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.methods.base import InputView
from edgeprune.methods.learned import Learned, write
from edgeprune.model import Segment
from edgeprune.plan import Cut, Geometry
from edgeprune.tabletop.dataset import write_dataset

WIDTH, TOKENS, WORDS = 24, 30, 5


def test_each_question_has_its_own_importance(tiny: LoadedModel, tmp_path: Path) -> None:
    write_dataset(tmp_path / "scenes", 1, 6, kinds=("exists", "describe"))
    listener, found = recorded(tiny, read_samples(tmp_path / "scenes" / "dataset.jsonl")[:2])
    said = listener.logits(found).argmax(dim=-1)
    lengths = [asked.tokens for asked in found.asked]

    def losses(by: float) -> list[float]:
        visual = found.visual.embeds.clone()
        visual[0, 3] *= 1 + by
        with torch.no_grad():
            logits = listener.logits(found, visual=visual).double()
        rows = torch.nn.functional.cross_entropy(logits, said, reduction="none")
        return [float(part.sum()) for part in torch.split(rows, lengths)]

    slopes = [(more - less) / 2e-3 for more, less in zip(losses(1e-3), losses(-1e-3), strict=True)]
    assert found.products[:, 3].tolist() == pytest.approx(slopes, rel=0.05, abs=1e-5)
    assert found.shares.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert found.only([1]).products.tolist() == found.products[1:].tolist()


def planted(seed: int, words: torch.Tensor, directions: torch.Tensor) -> Scene:
    """Return a scene with a question of each word, whose answer takes the tokens that lie in the direction of that word."""
    visual = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)) + 2

    def segment(rows: int) -> Segment:
        return Segment(torch.zeros(1, rows, WIDTH), torch.zeros(1, rows))

    asked = tuple(Asked(segment(1), segment(0), torch.stack([word, words.mean(dim=0)])) for word in words)
    shares = torch.softmax(3 * (visual[0] - 2) @ directions.T, dim=0).T
    seen, order = Segment(visual, torch.zeros(1, TOKENS)), torch.arange(TOKENS)
    return Scene(segment(1), seen, asked, (TOKENS,), order, shares, torch.zeros(0), torch.zeros(0))


def test_the_fit_finds_what_each_word_asks_for() -> None:
    generator = torch.Generator().manual_seed(0)
    words, directions = (torch.randn(WORDS, WIDTH, generator=generator) for _ in range(2))
    directions = torch.nn.functional.normalize(directions, dim=1)
    scenes = [partial(planted, seed, words, directions) for seed in range(40)]
    sums = Sums()
    for scene in scenes:
        sums.add(scene().visual.embeds[0], scene().importance)
    closed = closed_form(sums, Settings(), WIDTH)
    tensors = fitted(scenes, WIDTH, closed, 0.5).added_to(closed, 0.5)

    def right(question: float) -> float:
        # How often the token that matters most to an answer about an unseen image is the one that stays.
        weights = write(tensors if question else closed, {"weights_sha256": "", "keeps": [1, TOKENS], "question": question})
        method = Learned(Cut("input", "learned", 1, weights=weights), Geometry(6, 5, 1, 1))
        found = list[bool]()
        for scene in (planted(seed, words, directions) for seed in range(100, 120)):
            for asked, shares in zip(scene.asked, scene.shares, strict=True):
                found.append(int(method.select(InputView(scene.visual.embeds[0], asked.words), 1)) == int(shares.argmax()))
        return sum(found) / len(found)

    assert right(0.0) < 0.4
    assert right(1.0) > 0.8
