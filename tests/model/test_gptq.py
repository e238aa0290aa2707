"""GPTQ against its authors' code, and a decoder that runs layer by layer against the whole."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.model import PrunedDecoder, Segment, gptq
from edgeprune.model.gptq import FittedMatrix
from edgeprune.model.quantization import Quantized, quantize
from edgeprune.plan.presets import unpruned_plan

RECORDED = Path(__file__).with_name("gptq_authors.npz")


def trial(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix [24, 384] and rows [600, 384] that are alike."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((24, 384)).astype(np.float32)
    rows = rng.standard_normal((600, 48)) @ rng.standard_normal((48, 384)) + 0.3 * rng.standard_normal((600, 384))
    return torch.from_numpy(weight), torch.from_numpy(rows.astype(np.float32))


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the scale of the largest weight, as the authors' Quantizer does without its own search (mse=False)."""
    monkeypatch.setattr(gptq, "scales_for", lambda blocks, kind, scale_type: blocks.abs().amax(dim=-1) / 7.5)


# Recorded: the integers of GPTQ.fasterquant(percdamp=0.01, groupsize=128) with Quantizer.configure(4, perchannel=True, sym=True) of
# IST-DASLab/gptq at commit 2d65066, on a CPU with torch 2.13. No line of theirs is here.
@pytest.mark.parametrize("seed", [0, 1])
def test_integers_are_those_of_the_authors(seed: int, largest: None) -> None:
    weight, rows = trial(seed)
    found = gptq.gptq(weight, rows.T @ rows, torch.float32)
    with np.load(RECORDED) as recorded:
        assert np.array_equal(found.values.numpy(), recorded[f"trial{seed}"])


@pytest.mark.parametrize(("name", "value"), [("DAMPING", 0.02), ("BLOCK", 96)])
def test_the_comparison_with_the_authors_can_fail(name: str, value: float, largest: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, name, value)
    weight, rows = trial(0)
    with np.load(RECORDED) as recorded:
        assert not np.array_equal(gptq.gptq(weight, rows.T @ rows, torch.float32).values.numpy(), recorded["trial0"])


def lost(weight: torch.Tensor, quantized: Quantized, rows: torch.Tensor) -> float:
    expected = rows @ weight.T
    return float((rows @ quantized.restored().T - expected).norm() / expected.norm())


def test_products_lose_less_than_by_rounding() -> None:
    weight, rows = trial(2)
    fitted = gptq.gptq(weight, rows[:400].T @ rows[:400], torch.float16)
    assert fitted.scales.dtype == torch.float16 and fitted.scales.shape == (24, 3) and fitted.values.min() == -8
    assert lost(weight, fitted, rows[400:]) < 0.6 * lost(weight, quantize(weight, "int4", torch.float16), rows[400:])


def test_inputs_that_were_never_met_are_rounded() -> None:
    weight, rows = trial(3)
    weight[5] = 0
    nothing, rounded = gptq.gptq(weight, torch.zeros(384, 384), torch.float16), quantize(weight, "int4", torch.float16)
    assert torch.equal(nothing.values, rounded.values) and torch.equal(nothing.scales, rounded.scales)
    rows[:, 128:256] = 0
    some = gptq.gptq(weight, rows.T @ rows, torch.float16)
    assert torch.equal(some.values[:, 128:256], rounded.values[:, 128:256]) and (some.scales > 0).all()


def test_a_file_holds_two_integers_in_a_byte(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (10, 256), generator=generator).to(torch.int8)
    whole = Quantized("int4", values, torch.rand(10, 2, generator=generator).half())
    matrix = FittedMatrix.save(whole, tmp_path / "matrix.safetensors")
    assert (tmp_path / "matrix.safetensors").stat().st_size < 10 * 256 / 2 + 10 * 2 * 2 + 300
    part = matrix.quantized(3, 7)
    assert torch.equal(part.values, values[3:7]) and torch.equal(part.scales, whole.scales[3:7])
    assert matrix.shape == (10, 256) and torch.equal(matrix.rows(0, 10), whole.restored())


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "paligemma", "gemma3", "lfm2_vl", "qwen3_5"])
def test_layer_by_layer_is_the_whole(name: str, tmp_path: Path) -> None:
    # Planes of DeepStack, prompts that see themselves, windows, and layers with states.
    kind: Any = import_module(f"tiny_{name}")
    loaded: LoadedModel = load_model(resolve_model(str(kind.folder(tmp_path))))
    parts, axes = loaded.family.decoder(), loaded.family.position_axes
    geometry = loaded.geometry(getattr(kind, "SIZE", None))
    decoder = PrunedDecoder(parts, unpruned_plan(loaded.folder.model_type, len(parts.layers), geometry)).eval()
    lengths, generator = [3, geometry.tokens, 5, 4], torch.Generator().manual_seed(0)
    embeds = torch.randn(1, sum(lengths), (1 + parts.planes) * parts.hidden, generator=generator)
    positions = torch.arange(sum(lengths)).expand(axes, -1)
    prefix, visual, suffix, answer = (
        Segment(*both) for both in zip(torch.split(embeds, lengths, dim=1), torch.split(positions, lengths, dim=1), strict=True)
    )
    nothing = Segment(answer.embeds[:, :0], answer.positions[:, :0])
    caches = list(decoder.empty_caches())
    with torch.no_grad():
        for segments, is_answer in (((prefix, visual, suffix), False), ((nothing, nothing, answer), True)):
            expected = decoder(*segments, caches, every_logit=is_answer)
            tokens = decoder.rows_of(*segments, every_logit=is_answer)
            for index, cache in enumerate(caches):
                tokens, rows = decoder.run_layer(index, tokens, cache, every_logit=is_answer)
                caches[index] = cache.append(rows, tokens.sizes[0], tokens.sizes[2])
            last = tokens.hidden if is_answer else tokens.hidden[-1:]
            torch.testing.assert_close(parts.lm_head(parts.norm(last))[None], expected.logits, atol=1e-5, rtol=1e-5)
