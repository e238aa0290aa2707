"""Weights that stay in their files: the graphs are the same to the byte, whatever the checkpoint's type and files."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY_GEOMETRY
from torch import nn

from edgeprune.bundle import EMBED, VISION
from edgeprune.checkpoint import weights
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import EdgePruneError, UnsupportedModelError
from edgeprune.export import exporter
from edgeprune.export.exporter import export_bundle
from edgeprune.export.passes import weights as matrices
from edgeprune.export.tracing import trace_embedding, trace_vision
from edgeprune.model.quantization import quantize
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.registry import FAMILIES
from edgeprune.targets import TARGETS, Lowering

LARGE = 2000  # elements; the optimizer compares constants of up to 1024 by their numbers


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LARGE", LARGE)


def on_disk(folder: Path) -> LoadedModel:
    loaded = load_model(resolve_model(str(folder)), on_disk=True)
    assert len(weights.stored_in(loaded.model)) > 3
    return loaded


def digests(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.onnx*"))}


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("onnxruntime", "fp32"),
        pytest.param("jetpack6", "fp16", marks=pytest.mark.slow),
        pytest.param("jetpack7.2", "int8", marks=pytest.mark.slow),
        pytest.param("jetpack7.2", "int4", marks=pytest.mark.slow),
    ],
)
def test_graphs_are_the_same_either_way(even: LoadedModel, target: str, precision: str, tmp_path: Path) -> None:
    # PyramidDrop multiplies by the next layer's matrices a second time.
    plan = staircase_plan(unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY), "pyramiddrop", [0.5], [1]).with_cuts(
        Cut("cache", "plphp", 2, layer=1)
    )
    lowering = Lowering(TARGETS[target], precision)
    held = export_bundle(even, plan, tmp_path / "held", lowering=lowering)
    stored = export_bundle(on_disk(even.folder.path), plan, tmp_path / "stored", lowering=lowering)
    assert stored.manifest == held.manifest
    assert len(digests(stored.path / "onnx")) >= 6


# One of each kind of vision encoder and of decoder.
DISTINCT = ("gemma3", "idefics2", "internvl", "lfm2_vl", "llava", "qwen2_5_vl", "qwen3_5")


@pytest.mark.parametrize(
    "name", [name if name in DISTINCT else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES)]
)
def test_families_need_no_large_matrix_before_it_is_written(name: str, tmp_path: Path) -> None:
    tiny = import_module(f"tiny_{name}")
    folder = tiny.folder(tmp_path)
    for way, loaded in (("held", load_model(resolve_model(str(folder)))), ("stored", on_disk(folder))):
        (tmp_path / way / "onnx").mkdir(parents=True)
        parts = loaded.family.decoder()
        plan = unpruned_plan(name, len(parts.layers), loaded.geometry(tiny.SIZE))
        lowering = Lowering(TARGETS["jetpack6"], "int8")
        trace_vision(loaded.family, plan, lowering, tmp_path / way / VISION)
        trace_embedding(parts, lowering, tmp_path / way / EMBED)
    assert digests(tmp_path / "held/onnx") == digests(tmp_path / "stored/onnx")


@pytest.fixture
def checkpoint(tiny_folder: Path, tmp_path: Path) -> Path:
    """Return a private copy of the tiny model, to be rewritten by the test."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "checkpoint"))


def split(folder: Path) -> list[str]:
    """Divide the weights over three files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{number + 1:05}-of-00003.safetensors" for number in range(3)]
    where = {name: names[index % 3] for index, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return names


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_is_the_one_that_transformers_loads(checkpoint: Path, kind: torch.dtype, files: int) -> None:
    rewrite(checkpoint, lambda _, tensor: tensor.to(kind))
    if files > 1:
        split(checkpoint)
    loaded = on_disk(checkpoint)
    found = dict(loaded.model.named_parameters())
    for name, expected in load_model(resolve_model(str(checkpoint))).model.named_parameters():
        source = getattr(found[name], "stored", None)
        assert source is None or found[name].isnan().all()
        assert torch.equal(found[name] if source is None else source.rows(0, source.shape[0]), expected), name
    assert loaded.end_tokens() == (2,)


@pytest.mark.parametrize("stored", [False, True])
def test_broken_checkpoints_are_refused(checkpoint: Path, stored: bool, tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(UnsupportedModelError, match=words) as caught:
            load_model(resolve_model(str(checkpoint)), on_disk=stored)
        assert "\n" not in str(caught.value)

    whole = (checkpoint / "model.safetensors").read_bytes()
    for broken in (whole[:-100], whole[:50], b""):
        (checkpoint / "model.safetensors").write_bytes(broken)
        refused("is not a whole safetensors file")
    (checkpoint / "model.safetensors").write_bytes(whole)
    rewrite(checkpoint, lambda name, tensor: tensor.to(torch.int8) if "layers.1.mlp.up_proj" in name else tensor)
    refused(r"layers\.1\.mlp\.up_proj\.weight .* is of type I8: this checkpoint is quantized.*EdgePrune quantizes by itself")
    (checkpoint / "model.safetensors").write_bytes(whole)
    rewrite(checkpoint, lambda name, tensor: tensor[:-1].clone() if "layers.1.mlp.up_proj" in name else tensor)
    refused("Cannot load|mismatched keys")
    (checkpoint / "model.safetensors").write_bytes(whole)
    names = split(checkpoint)
    (checkpoint / names[1]).unlink()
    refused(f"lacks 1 of the 3 files that its index names: {names[1]}.*Download the whole checkpoint")
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    refused("Cannot read .*index")
    (checkpoint / "model.safetensors.index.json").unlink()
    refused("neither model.safetensors nor")


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_other_tensors_than_the_models_are_refused(checkpoint: Path, kind: str) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    if kind == "missing":
        del tensors[next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))]
    else:
        tensors["model.layers.0.mlp.side_proj.weight"] = torch.zeros(100, 100)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=f"has {kind} keys: .*mlp"):
        load_model(resolve_model(str(checkpoint)), on_disk=True)


def test_matrices_that_transformers_takes_apart_are_loaded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    expected = dict(load_model(resolve_model(str(checkpoint))).model.named_parameters())
    known = conversion_mapping.get_checkpoint_conversion_mapping
    apart = WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", lambda kind: [*(known(kind) or []), apart])
    tensors = load_file(checkpoint / "model.safetensors")
    for name in [name for name in tensors if "gate_proj" in name]:
        up = tensors.pop(name.replace("gate_proj", "up_proj"))
        tensors[name.replace("gate_proj", "gate_up")] = torch.cat([tensors.pop(name), up])
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    loaded = load_model(resolve_model(str(checkpoint)), on_disk=True)
    assert not weights.stored_in(loaded.model)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.model.named_parameters())


def test_only_what_is_multiplied_stays_on_disk(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.positions, self.product = nn.Embedding(90, 30), nn.Embedding(80, 30), nn.Linear(30, 70)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

    model = Model()
    held = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(held, tmp_path / "model.safetensors")
    stored = weights.stored_tensors(tmp_path)
    state = weights.state_of(stored)
    model.load_state_dict(state, assign=True)
    weights.attach(model, stored, state, on_disk=True)
    assert sorted(source.shape for source in weights.stored_in(model).values()) == [(70, 30), (90, 30)]
    assert torch.equal(model.positions.weight, held["positions.weight"])


def test_numbers_made_from_what_was_not_read_are_refused(even: LoadedModel, tmp_path: Path) -> None:
    loaded = on_disk(even.folder.path)
    loaded.model.lm_head.weight = nn.Parameter(loaded.model.lm_head.weight.detach() * 2)
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight"):
        export_bundle(loaded, KeepPlan("qwen2_vl", 2, TINY_GEOMETRY), tmp_path / "out")


class Watched:
    """A matrix that notes how many of its rows are asked for at once, and how often."""

    shape = (70, 256)

    def __init__(self) -> None:
        self.numbers = torch.randn(self.shape, generator=torch.Generator().manual_seed(0))
        self.asked: list[int] = []

    def rows(self, start: int, stop: int) -> torch.Tensor:
        self.asked.append(stop - start)
        return self.numbers[start:stop]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_matrices_are_quantized_once_and_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "_PIECE", 256 * 20)
    watched = Watched()
    matrix = matrices.IntegerMatrix(watched, kind, torch.float16)
    integers, scales = matrix.integers("integers"), matrix.scales("scales")
    expected = quantize(watched.numbers, kind, torch.float16)
    assert np.array_equal(integers.numpy().astype(np.int8), expected.values.numpy().T)
    assert np.array_equal(scales.numpy(), expected.scales.numpy().T.squeeze(0) if kind == "int8" else expected.scales.numpy().T)
    assert watched.asked == [20, 20, 20, 10]
    assert np.array_equal(scales.numpy().ravel(), expected.scales.numpy().T.ravel())  # nothing is kept, so they are computed again
    assert np.array_equal(matrix.restored("restored").numpy(), expected.restored().half().numpy().T)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_whole_matrices_are_written_in_pieces(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "_PIECE", 256 * 20)
    watched = Watched()
    tensor, file = matrices.LazyInitializer(watched, "whole", kind), BytesIO()
    tensor.tofile(file)
    assert watched.asked == [20, 20, 20, 10]
    expected = watched.numbers.to(kind).numpy()
    assert file.getvalue() == expected.tobytes() == tensor.tobytes()
    assert tensor.nbytes == len(file.getvalue()) and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_space_that_is_asked_for_is_what_the_weights_take(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(resolve_model("tabletop"), on_disk=True)
    lowering = Lowering(TARGETS["jetpack6"], precision)
    plan = unpruned_plan("qwen2_vl", len(loaded.family.decoder().layers), loaded.geometry(None))
    bundle = export_bundle(loaded, plan, tmp_path / "out", lowering=lowering)
    taken = sum(path.stat().st_size for path in (bundle.path / "onnx").glob("*.data"))
    asked = exporter._bytes(loaded, lowering)
    assert 0.9 < asked / taken < 1.2
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(0.8 * asked)))
    with pytest.raises(EdgePruneError, match="The bundle will take"):
        export_bundle(loaded, plan, tmp_path / "again", lowering=lowering)
