"""Every family at the true size of a real checkpoint, with random weights: minutes and gigabytes, so only where asked for.

    pytest tests/families/test_true_size.py -m size -k smolvlm -s

Vision embeddings and logits against transformers in float32 (1e-3 of the largest), 16 greedy tokens, and the bundle of a pruned
plan against the eager model (`--precision` of what is exported).
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_family_contract import PROMPTS, Asked, pruned, said_by_transformers, tiny, turn
from transformers import AutoConfig, AutoModelForImageTextToText
from true_sizes import SIZES, widened

from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.export.exporter import export_bundle
from edgeprune.export.verification import verify
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime.backends.kv_cache import DecoderInput
from edgeprune.tabletop.dataset import frames_for
from edgeprune.targets import TARGETS, Lowering

pytestmark = pytest.mark.size
TOLERANCE = 1e-3


def folder_of(name: str, path: Path) -> Path:
    path.mkdir()
    tiny(name).folder(path)
    config = widened(path, name)
    for weights in path.glob("*.safetensors*"):
        weights.unlink()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if "q_proj" in parameter:
                weight *= 4  # so that attention is not flat
            if "mm_input_projection" in parameter:  # transformers leaves Gemma 3's at zero
                weight.normal_(std=0.02)
    generation = json.loads((path / "generation_config.json").read_text())
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(generation))
    assert config["text_config"]["hidden_size"] == model.config.text_config.hidden_size
    return path


def report(name: str, **figures: Any) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"family": name, **figures, "peak_rss_gb": round(peak, 2)}))


@contextmanager
def watched(loaded: LoadedModel) -> Iterator[list[torch.Tensor]]:
    """Keep what enters transformers' first decoder layer."""
    found: list[torch.Tensor] = []
    norm = loaded.family.decoder().layers[0].input_layernorm
    hook = norm.register_forward_pre_hook(lambda _, given: found.append(given[0][0]))
    yield found
    hook.remove()


def relative(expected: np.ndarray, actual: np.ndarray) -> float:
    return float(np.abs(expected - actual).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(SIZES))
def test_it_agrees_at_true_size(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    started = time.perf_counter()
    loaded = load_model(resolve_model(str(folder_of(name, tmp_path / "model"))))
    plan = unpruned_plan(loaded.folder.model_type, len(loaded.family.decoder().layers), loaded.geometry(SIZES[name]["size"]))
    image = frames_for(plan.geometry)[0]
    reference = reference_model(loaded, plan)
    asked = Asked(reference)
    answer, first = asked.ask(PROMPTS[0], [image])
    with watched(loaded) as theirs:
        said = said_by_transformers(loaded, reference, [turn(PROMPTS[0], 1)], [image])
    step = asked.recorder.inputs[0][0]
    vision = relative(theirs[0][span_of(step)].numpy(), step.visual.embeds[0, :, : reference.decoder.hidden])
    logits = relative(said.logits, first)
    parameters = sum(weight.numel() for weight in loaded.model.parameters())
    report(
        name,
        parameters=parameters,
        tokens=plan.geometry.tokens,
        vision=vision,
        logits=logits,
        seconds=time.perf_counter() - started,
    )
    assert vision <= TOLERANCE and logits <= TOLERANCE
    assert answer == reference.tokenizer.decode(said.tokens)
    precision = request.config.getoption("--precision")
    bundle = export_bundle(
        loaded, pruned(loaded, name, SIZES[name]["size"]), tmp_path / "bundle", lowering=Lowering(TARGETS["onnxruntime"], precision)
    )
    stages = verify(bundle, loaded)
    report(name, precision=precision, stages={stage.name: stage.worst for stage in stages}, seconds=time.perf_counter() - started)
    assert [stage.name for stage in stages if not stage.passed] == []


def span_of(step: DecoderInput) -> np.ndarray:
    """Return where in the sequence the visual tokens of a step are: text and tokens in the order of their places."""
    segments = (step.prefix, step.visual, step.suffix)
    times = np.concatenate([part.positions[0] for part in segments])
    order = np.argsort(times, kind="stable")
    before, visual = step.prefix.positions.shape[1], step.visual.positions.shape[1]
    where = np.empty_like(order)
    where[order] = np.arange(len(order))
    return where[before : before + visual]
