"""Layers of GPTQ and AWQ checkpoints: read as GPTQModel reads them, exported with their own integers, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from quantized_folders import Scheme, quantize_folder
from repository import TESTS
from safetensors.torch import load_file, save_file
from tiny_models import TINY_GEOMETRY

from edgeprune.bundle import DECODER, Bundle, SourceQuantization
from edgeprune.checkpoint import weights
from edgeprune.checkpoint.formats import Packing, packing_of
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.checkpoint.packed import PackedMatrix, with_packed_layers
from edgeprune.checkpoint.weights import stored_tensors
from edgeprune.cli import main
from edgeprune.errors import UnsupportedModelError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.verification import verify
from edgeprune.plan.presets import staircase_plan, unpruned_plan
from edgeprune.targets import TARGETS, Lowering

GOLDEN = TESTS / "support" / "genuine" / "packed-layers" / "layers.safetensors"
MADE = {name.partition(".")[0] for name in load_file(GOLDEN)}
PARTS = ("qweight", "qzeros", "scales", "g_idx")
GPTQ, GPTQ_V2, AWQ = Packing("gptq", "gptq"), Packing("gptq", "gptq_v2"), Packing("awq", "gemm")
SCHEMES = {
    "gptq": Scheme(),
    "gptq-128": Scheme(group=128),
    "gptq-8": Scheme(bits=8),
    "gptq-8-channel": Scheme(bits=8, group=0),
    "gptq-act-order": Scheme(shuffled=True),
    "gptq-asymmetric": Scheme(symmetric=False, layout="gptq_v2"),
    "awq": Scheme("awq", symmetric=False),
    "awq-channel": Scheme("awq", group=0, symmetric=False),
}


def golden(name: str, folder: Path) -> tuple[PackedMatrix, dict[str, torch.Tensor]]:
    """Return a layer that GPTQModel packed, and its tensors."""
    tensors = {key.removeprefix(f"{name}."): value for key, value in load_file(GOLDEN).items() if key.startswith(f"{name}.")}
    parts = {f"layer.{key}": value for key, value in tensors.items() if key != "weight"}
    save_file(parts, folder / "model.safetensors")
    packing = AWQ if name.startswith("awq") else GPTQ_V2 if "v2" in name else GPTQ
    (matrix,) = with_packed_layers(name, stored_tensors(folder), packing)
    assert isinstance(matrix, PackedMatrix)
    return matrix, tensors


@pytest.mark.parametrize("name", sorted(MADE))
def test_weights_are_those_that_gptqmodel_dequantizes(name: str, tmp_path: Path) -> None:
    matrix, tensors = golden(name, tmp_path)
    expected = tensors["weight"]
    assert matrix.shape == tuple(expected.shape) and matrix.name == "layer.weight"
    assert torch.equal(matrix.read().half(), expected)  # it multiplies in float16; ours is exact before it is rounded
    for start, stop in ((0, 3), (3, 14), (15, 24)):
        assert torch.equal(matrix.rows(start, stop), matrix.read()[start:stop])
    assert matrix.symmetric == (name in ("gptq_int4", "gptq_int8", "gptq_int8_channel", "gptq_act_order"))
    assert (matrix.order is not None) == ("order" in name)


@pytest.mark.parametrize("name", sorted(MADE))
def test_integers_scales_and_zero_points_are_those_of_the_layer(name: str, tmp_path: Path) -> None:
    matrix, tensors = golden(name, tmp_path)
    order = torch.arange(matrix.shape[1]) if matrix.order is None else matrix.order
    integers, zeros, scales = matrix.integers(0, 24), matrix.zero_points(), matrix.scales()
    assert torch.equal(scales, tensors["scales"]) and integers.dtype == torch.int8
    repeated = [numbers.float().repeat_interleave(matrix.group, dim=0).T for numbers in (zeros, scales)]
    assert torch.equal(((integers - repeated[0]) * repeated[1]).half(), tensors["weight"][:, order])


@pytest.mark.parametrize("name", sorted(MADE))
def test_one_changed_bit_is_another_weight(name: str, tmp_path: Path) -> None:
    matrix, tensors = golden(name, tmp_path)
    changed = {f"layer.{key}": value.clone() for key, value in tensors.items() if key != "weight"}
    changed["layer.qweight"][1, 1] ^= 1 << 5
    save_file(changed, tmp_path / "model.safetensors")
    assert int((matrix.read().half() != tensors["weight"]).sum()) == 1


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_the_writer_of_these_tests_and_the_reader_agree(name: str, tmp_path: Path) -> None:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(1)) * 0.1
    scheme = SCHEMES[name]
    parts, restored = scheme.packed(weight)
    save_file({f"layer.{key}": value for key, value in parts.items()}, tmp_path / "model.safetensors")
    packing = packing_of("it", Path(), {"quantization_config": scheme.settings()})
    (matrix,) = with_packed_layers("it", stored_tensors(tmp_path), packing)
    assert isinstance(matrix, PackedMatrix)
    assert torch.equal(matrix.read(), restored)
    assert (restored - weight).abs().max() < 0.06
    assert (matrix.group, matrix.bits) == (scheme.group or 128, scheme.bits)


@pytest.fixture(scope="session")
def quantized(even: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from the name of a scheme to a folder of that scheme and the weights of its quantized layers."""
    made: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def get(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "model"
            shutil.copytree(even.folder.path, folder)
            made[name] = folder, quantize_folder(folder, SCHEMES[name])
        return made[name]

    return get


def plain(folder: Path, restored: dict[str, torch.Tensor], to: Path) -> Path:
    """Write a float checkpoint of the weights that a quantized one stands for."""
    shutil.copytree(folder, to)
    stored = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[2] not in PARTS}
    save_file(kept | restored, to / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", ["gptq-act-order", "awq"])
def test_models_are_those_of_the_dequantized_weights(
    name: str, on_disk: bool, quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "LARGE", 2000)
    folder, restored = quantized(name)
    expected = load_model(resolve_model(str(plain(folder, restored, tmp_path / "plain")))).model
    model = load_model(resolve_model(str(folder)), on_disk=on_disk).model
    found = dict(model.named_parameters())
    packed = 0
    for key, parameter in expected.named_parameters():
        source = getattr(found[key], "stored", None)
        packed += isinstance(source, PackedMatrix)
        assert torch.equal(source.read() if on_disk and source is not None else found[key], parameter), key
    assert packed == len(restored) == 14
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_greedy_answers_are_those_of_the_dequantized_model(name: str, quantized: Any, tmp_path: Path) -> None:
    from eager import Prompt

    folder, restored = quantized(name)
    loaded = load_model(resolve_model(str(folder)))
    prompt = Prompt.make(loaded, unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY))
    from transformers import Qwen2VLForConditionalGeneration

    theirs = Qwen2VLForConditionalGeneration.from_pretrained(plain(folder, restored, tmp_path / "plain"), dtype="float32")
    said = [
        model.generate(**prompt.inputs, max_new_tokens=16, do_sample=False)[0].tolist() for model in (loaded.model, theirs.eval())
    ]
    assert said[0] == said[1]


def exported(folder: Path, target: str, precision: str, out: Path, *, on_disk: bool = True) -> Bundle:
    loaded = load_model(resolve_model(str(folder)), on_disk=on_disk)
    # PyramidDrop multiplies by the next layer's query and key a second time.
    plan = staircase_plan(unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY), "pyramiddrop", [0.5], [1])
    return export_bundle(loaded, plan, out, lowering=Lowering(TARGETS[target], precision))


def initializers(bundle: Bundle) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(bundle.file(DECODER)).graph.initializer}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("gptq", "jetpack7.2"),
        pytest.param("awq", "onnxruntime", marks=pytest.mark.slow),
        pytest.param("gptq-128", "onnxruntime", marks=pytest.mark.slow),
        pytest.param("awq", "jetpack7.2", marks=pytest.mark.slow),
        pytest.param("gptq-act-order", "cpu", marks=pytest.mark.slow),
    ],
)
def test_int4_graphs_have_the_integers_of_the_checkpoint(
    name: str, target: str, quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "LARGE", 2000)
    folder, restored = quantized(name)
    bundle = exported(folder, target, "int4", tmp_path / "stored")
    assert bundle.manifest.source.quantization == SourceQuantization(SCHEMES[name].method, 14, 0, 0)
    found, tensors = initializers(bundle), load_file(folder / "model.safetensors")
    order, group = (0, 4, 1, 5, 2, 6, 3, 7), SCHEMES[name].group
    for layer in (key.removesuffix(".weight") for key in restored):
        inside = next(key for key in found if key.endswith(f"{'.'.join(layer.split('.')[-4:])}.weight.int4")).removesuffix(".int4")
        words = tensors[f"{layer}.qweight"].numpy().view(np.uint32)
        if SCHEMES[name].method == "awq":
            integers = np.stack([(words >> (4 * place)) & 15 for place in order], axis=2).reshape(len(words), -1)
        else:
            integers = np.stack([(words >> (4 * place)) & 15 for place in range(8)], axis=1).reshape(-1, words.shape[1])
        if SCHEMES[name].shuffled:
            integers = integers[np.argsort(tensors[f"{layer}.g_idx"].numpy(), kind="stable")]
        assert np.array_equal(found[f"{inside}.int4"].astype(np.int8), integers.astype(np.int8) - 8), layer
        kind = np.float16 if target == "jetpack7.2" else np.float32
        assert found[f"{inside}.scales"].tobytes() == tensors[f"{layer}.scales"].numpy().astype(kind).tobytes()
    blocks = {
        attribute.i
        for node in onnx.load(bundle.file(DECODER), load_external_data=False).graph.node
        for attribute in node.attribute
        if attribute.name == "block_size"
    }
    assert blocks == {group}
    held = exported(folder, target, "int4", tmp_path / "held", on_disk=False)
    assert held.manifest == bundle.manifest


@pytest.mark.parametrize(
    ("name", "target", "precision", "counts"),
    [
        pytest.param("gptq", "jetpack7.2", "int4", (14, 0, 0), marks=pytest.mark.slow),
        pytest.param("gptq", "onnxruntime", "fp32", (0, 0, 14), marks=pytest.mark.slow),
        pytest.param("gptq", "jetpack6", "fp16", (0, 0, 14), marks=pytest.mark.slow),
        pytest.param("gptq", "onnxruntime", "int8", (0, 14, 0), marks=pytest.mark.slow),
        pytest.param("gptq-8", "onnxruntime", "int8", (0, 14, 0), marks=pytest.mark.slow),
        ("gptq-8-channel", "onnxruntime", "int8", (14, 0, 0)),
        pytest.param("gptq-8-channel", "jetpack7.2", "int8", (14, 0, 0), marks=pytest.mark.slow),
        pytest.param("gptq-8", "jetpack7.2", "int4", (0, 14, 0), marks=pytest.mark.slow),
        ("gptq-act-order", "onnxruntime", "int4", (14, 0, 0)),
        pytest.param("gptq-act-order", "jetpack7.2", "int4", (14, 0, 0), marks=pytest.mark.slow),
        pytest.param("gptq-asymmetric", "onnxruntime", "int4", (14, 0, 0), marks=pytest.mark.slow),
        ("awq", "onnxruntime", "int4", (14, 0, 0)),
        pytest.param("awq", "jetpack7.2", "int4", (14, 0, 0), marks=pytest.mark.slow),
        pytest.param("awq", "cpu", "int4", (14, 0, 0), marks=pytest.mark.slow),
        pytest.param("awq-channel", "jetpack6", "int4", (14, 0, 0), marks=pytest.mark.slow),
        pytest.param("awq", "onnxruntime", "fp32", (0, 0, 14), marks=pytest.mark.slow),
    ],
)
def test_bundles_compute_what_the_model_does_and_say_what_became_of_its_layers(
    name: str, target: str, precision: str, counts: tuple[int, int, int], quantized: Any, tmp_path: Path
) -> None:
    folder, _ = quantized(name)
    bundle = exported(folder, target, precision, tmp_path / "out")
    assert bundle.manifest.source.quantization == SourceQuantization(SCHEMES[name].method, *counts)
    report = verify(bundle, load_model(resolve_model(str(folder))))
    assert [(stage.name, stage.worst) for stage in report if not stage.passed] == []


_OPTIMUM = {"batch_size": 1, "block_name_to_quantize": None, "cache_block_outputs": True, "dataset": None, "tokenizer": None}
# The quantization_config of published checkpoints.
PUBLISHED: dict[str, tuple[dict[str, Any], Packing]] = {
    "Qwen2.5-VL-3B-Instruct-AWQ": (
        {
            "bits": 4,
            "group_size": 128,
            "modules_to_not_convert": ["visual"],
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
        AWQ,
    ),
    "Qwen2.5-Coder-1.5B-Instruct-GPTQ-Int4": (  # by the makers of Qwen2-VL-2B-Instruct-GPTQ-Int4, whose own was not found
        {
            **_OPTIMUM,
            "bits": 4,
            "damp_percent": 0.01,
            "desc_act": False,
            "exllama_config": {"version": 1},
            "group_size": 128,
            "modules_in_block_to_quantize": None,
            "quant_method": "gptq",
            "sym": True,
            "true_sequential": True,
            "use_cuda_fp16": False,
            "use_exllama": True,
        },
        GPTQ,
    ),
    "Llama-3-8B by optimum 2.1 with GPTQModel 6.0.3": (
        {
            **_OPTIMUM,
            "act_group_aware": True,
            "backend": "auto",
            "bits": 4,
            "checkpoint_format": "gptq_v2",
            "desc_act": False,
            "format": "gptq_v2",
            "group_size": 128,
            "meta": {"quantizer": ["optimum:2.1.0", "gptqmodel:6.0.3"]},
            "quant_method": "gptq",
            "sym": True,
        },
        GPTQ_V2,
    ),
}


def test_how_layers_are_packed_follows_from_the_settings() -> None:
    def packing(**settings: Any) -> Packing | None:
        return packing_of("it", Path(), {"quantization_config": settings})

    assert (
        packing() is None
        and packing_of("it", Path(), {}) is None
        and packing_of("it", Path(), {"quantization_config": None}) is None
    )
    assert packing(quant_method="gptq", bits=4, desc_act=True) == GPTQ
    assert packing(quant_method="gptq", checkpoint_format="gptq_v2", format="gptq") == GPTQ_V2
    assert packing(quant_method="AWQ", version="GEMM") == packing(quant_method="awq", w_bit=4) == AWQ
    assert packing_of("it", Path(), {"text_config": {"quantization_config": {"quant_method": "awq", "version": "gemm"}}}) == AWQ
    assert all(packing(**settings) == expected for settings, expected in PUBLISHED.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq in the layout marlin"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "gptq in the layout marlin"),
        ({"quant_method": "awq", "version": "gemv"}, "awq in the layout gemv"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "gemv_fast"),
        ({"quant_method": "awq", "version": "marlin"}, "marlin"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"bits": 4}, "an unnamed method"),
        (["gptq"], "quantized with"),
    ],
)
def test_other_quantizations_are_refused_by_name(settings: Any, words: str, quantized: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized("gptq")[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(UnsupportedModelError, match=rf"{words}.*Give a GPTQ or AWQ \(gemm\) checkpoint"):
        resolve_model(str(folder))


def changed(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors, next(name for name in tensors if name.endswith("1.mlp.up_proj.qweight")).removesuffix("qweight"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, layer: tensors.pop(f"{layer}scales"), r"1\.mlp\.up_proj is incomplete"),
        (
            lambda tensors, layer: tensors.update({f"{layer}qzeros": tensors[f"{layer}qzeros"].repeat(1, 3)}),
            "12 bits, which are not",
        ),
        (lambda tensors, layer: tensors.update({f"{layer}qzeros": torch.zeros(4, 8, dtype=torch.int32)}), "2 bits, which are not"),
        (lambda tensors, layer: tensors.update({f"{layer}qweight": tensors[f"{layer}qweight"][:, :-8].clone()}), "do not fit"),
        (lambda tensors, layer: tensors.update({f"{layer}g_idx": tensors[f"{layer}g_idx"] + 1}), "names groups that"),
        (lambda tensors, layer: tensors.update({f"{layer}qweight": tensors[f"{layer}qweight"].long()}), "types that are not read"),
        (
            lambda tensors, layer: tensors.update(
                {f"{layer}side.{part}": tensors[f"{layer}{part}"].clone() for part in ("qweight", "qzeros", "scales")}
            ),
            "no linear layer has it",
        ),
        (lambda tensors, layer: tensors.update({f"{layer}bias": torch.ones(128)}), r"unexpected keys: .*up_proj\.bias"),
    ],
)
def test_layers_that_are_not_whole_are_refused(change: Any, words: str, on_disk: bool, quantized: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized("gptq")[0], tmp_path / "model")
    changed(folder, change)
    with pytest.raises(UnsupportedModelError, match=words):
        load_model(resolve_model(str(folder)), on_disk=on_disk)


def test_packed_layers_without_settings_are_refused(quantized: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized("gptq")[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(UnsupportedModelError, match="but no quantization_config in its config"):
        load_model(resolve_model(str(folder)))


def test_biases_of_zero_that_autogptq_adds_to_every_layer_are_left_out(quantized: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(quantized("gptq")[0], tmp_path / "model")
    changed(folder, lambda tensors, layer: tensors.update({f"{layer}bias": torch.zeros(128, dtype=torch.float16)}))
    assert load_model(resolve_model(str(folder))).model.model.language_model.layers[1].mlp.up_proj.bias is None


def test_converters_of_other_tensors_leave_quantized_layers_alone(quantized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    known = conversion_mapping.get_checkpoint_conversion_mapping
    apart = WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", lambda kind: [*(known(kind) or []), apart])
    model = load_model(resolve_model(str(quantized("gptq")[0])), on_disk=True).model
    assert sum(isinstance(source, PackedMatrix) for source in weights.stored_in(model).values()) == 14


@pytest.mark.parametrize("name", ["internvl", "llava", "paligemma", "qwen2_5_vl"])
def test_families_load_quantized_layers_wherever_they_are(name: str, tmp_path: Path) -> None:
    folder = import_module(f"tiny_{name}").folder(tmp_path)
    restored = quantize_folder(folder, Scheme("awq", group=8, symmetric=False))
    expected = dict(load_model(resolve_model(str(plain(folder, restored, tmp_path / "plain")))).model.named_parameters())
    model = load_model(resolve_model(str(folder))).model
    assert len(weights.stored_in(model)) == len(restored) >= 14
    assert all(torch.equal(parameter, expected[key]) for key, parameter in model.named_parameters())


def test_what_became_of_the_layers_is_said(quantized: Any, tmp_path: Path) -> None:
    bundle = exported(quantized("gptq")[0], "onnxruntime", "int4", tmp_path / "out")
    shown = [CliRunner().invoke(main, ["inspect", str(bundle.path), *option]).output for option in ([], ["--json"])]
    assert re.search(r"quantized +gptq; layers of the checkpoint: 14 kept\n", shown[0])
    assert json.loads(shown[1])["quantization"] == {"method": "gptq", "kept": 14, "requantized": 0, "dequantized": 0}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("awq", "jetpack7.2"),
        pytest.param("awq", "jetpack6", marks=pytest.mark.slow),
        pytest.param("gptq-act-order", "jetpack7.2", marks=pytest.mark.slow),
    ],
)
def test_tensorrt_builds_what_becomes_of_zero_points_and_of_groups_out_of_order(
    name: str, target: str, quantized: Any, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason='needs NVIDIA\'s builder: pip install "edgeprune[check]"')
    from edgeprune.export.checking import check_bundle

    bundle = exported(quantized(name)[0], target, "int4", tmp_path / "out")
    nodes = onnx.load(bundle.file(DECODER), load_external_data=False).graph.node
    assert all(len(node.input) == 2 for node in nodes if node.op_type == "DequantizeLinear")
    added = Counter(inputs[-1].rpartition(".")[2] for node in nodes if (inputs := node.input))
    assert (added["offsets"], added["order"]) == ((14, 0) if name == "awq" else (0, 14))
    report = check_bundle(bundle, TARGETS[target])
    assert report.trials is not None and [trial.error for trial in report.trials if trial.error] == []
    assert [finding for finding in report.findings if finding.severity == "error"] == []
