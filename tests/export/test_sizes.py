"""What a model would cost, known before any export: equal to what its bundle says, with no weight read.

`test_family_contract.py` compares every family under a plan with cuts at all sites.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import LoadedModel, load_model, load_outline, resolve_model
from edgeprune.checkpoint.weights import stored_in
from edgeprune.device.workload import ModelSizes, Shapes, workload
from edgeprune.errors import PlanError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.sizes import sizes_of
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.targets import PLAIN

QUANTIZED = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def counted(weights: Shapes) -> Counter[tuple[int, ...]]:
    # A graph's matrices are transposed.
    return Counter(tuple(sorted(shape)) for shape in weights)


def outline_of(name: str | Path) -> LoadedModel:
    return load_outline(resolve_model(str(name)))


def test_the_bundled_model_costs_what_its_bundle_says(tmp_path: Path) -> None:
    outline = outline_of("tabletop")
    base = unpruned_plan(outline.folder.model_type, outline.decoder_shape().layers, outline.geometry(None))
    plan = staircase_plan(base, "uniform", [0.5], (0,))
    expected = ModelSizes.of(export_bundle(load_model(resolve_model("tabletop")), plan, tmp_path / "bundle"))
    found = sizes_of(outline, plan, PLAIN)
    assert counted(found.vision_weights) == counted(expected.vision_weights)
    assert found.selector == expected.selector > 0
    question: dict[str, Any] = {"text_tokens": 32, "generated": 64, "precision": "int4"}
    assert workload(found, plan, **question) == workload(expected, plan, **question)


def test_a_tiny_model_costs_what_its_bundle_says(tiny_folder: Path, tiny_bundle: Bundle) -> None:
    found, expected = sizes_of(outline_of(tiny_folder), tiny_bundle.plan, PLAIN), ModelSizes.of(tiny_bundle)
    works = [workload(sizes, tiny_bundle.plan, text_tokens=7, generated=5) for sizes in (found, expected)]
    assert works[0] == works[1]
    assert works[0].layer_bytes > 0 and works[0].tower_bytes > 0


@pytest.mark.parametrize("part", ["decoder", "vision"])
def test_a_missing_matrix_is_seen(part: str, tiny_folder: Path, tiny_bundle: Bundle) -> None:
    outline = outline_of(tiny_folder)
    model = outline.model.model
    if part == "decoder":
        model.language_model.layers[1].mlp.up_proj = nn.Identity()
    else:
        model.visual.blocks[1].mlp = nn.Identity()
    found, expected = sizes_of(outline, tiny_bundle.plan, PLAIN), ModelSizes.of(tiny_bundle)
    works = [workload(sizes, tiny_bundle.plan, text_tokens=7, generated=5) for sizes in (found, expected)]
    assert works[0] != works[1]


def test_an_outline_reads_no_weights(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(b"no weights")
    outline, whole = outline_of(folder), load_model(resolve_model(str(tiny_folder)))
    shapes = {name: parameter.shape for name, parameter in whole.model.named_parameters()}
    assert {name: parameter.shape for name, parameter in outline.model.named_parameters()} == shapes
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in outline.model.parameters())
    assert not stored_in(outline.model)
    assert outline.decoder_shape() == whole.decoder_shape() and outline.geometry((84, 112)) == whole.geometry((84, 112))


def test_a_quantized_checkpoint_has_the_sizes_of_the_original(tiny_folder: Path, tiny_plan: KeepPlan, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZED}))
    found, expected = (sizes_of(outline_of(path), tiny_plan, PLAIN) for path in (folder, tiny_folder))
    assert found == expected


def test_a_plan_of_another_model_is_refused(tiny_folder: Path, tiny_plan: KeepPlan) -> None:
    with pytest.raises(PlanError, match="4 decoder layers"):
        sizes_of(outline_of(tiny_folder), replace(tiny_plan, layers=4), PLAIN)
