"""PLPHP's live classes: after a prompt each layer reads the share of its class, for the whole answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeprune.plan import Cut
from edgeprune.runtime.backends.interface import DecoderOutput
from edgeprune.runtime.generation.sequence import DecodeKeepRatio
from edgeprune.runtime.telemetry.receipt import Receipt

OPTIONS: dict[str, Any] = {"form": "classes", "thresholds": [0.2, 0.5], "shares": [0.25, 0.5, 1.0]}


class Cache:
    """Remembers how it was limited."""

    def __init__(self) -> None:
        self.limits: list[tuple[list[float], int]] = []

    def limit_visual(self, shares: list[float], first: int) -> Cache:
        self.limits.append((shares, first))
        return self


def after(*scores: float) -> DecoderOutput:
    """Return a step whose last token gives the image these shares of its attention, layer by layer."""
    shares = np.full((len(scores), 4), 0.1, np.float32)
    shares[:, 1] = scores
    return DecoderOutput(np.zeros(3, np.float32), (), (), shares)


def limited(cut: Cut, *steps: DecoderOutput) -> tuple[Cache, Receipt]:
    cache, receipt = Cache(), Receipt(pruned=True, reason="")
    ratio: Any = DecodeKeepRatio(None, cut)  # type: ignore[arg-type]  # it predicts nothing
    for step in steps:
        assert ratio.apply(cache, step) is cache
        ratio.record(receipt)
    return cache, receipt


def test_each_layer_reads_the_share_of_its_class() -> None:
    cache, receipt = limited(Cut("decode", "plphp", 0, options=OPTIONS), after(0.19, 0.2, 0.49, 0.5, 0.9))
    assert cache.limits == [([0.25, 0.5, 0.5, 1.0, 1.0], 0)]
    assert receipt.decode_shares == [pytest.approx(0.65)]


def test_classes_are_those_of_the_prompt() -> None:
    cache, receipt = limited(Cut("decode", "plphp", 0, options=OPTIONS), after(0.1, 0.9), after(0.9, 0.1), after(0.9, 0.9))
    assert cache.limits == [([0.25, 1.0], 0)]
    assert receipt.decode_shares == [pytest.approx(0.625)] * 3


def test_layers_before_the_cut_read_everything() -> None:
    cache, _ = limited(Cut("decode", "plphp", 0, layer=1, options=OPTIONS), after(0.1, 0.1, 0.9))
    assert cache.limits == [([1.0, 0.25, 1.0], 1)]
