"""LoRA adapters that peft wrote, merged as peft merges them (tests/support/adapters), into weights in memory and on disk."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from repository import TESTS
from safetensors.torch import load_file, save_file
from tiny_models import model_folder, qwen2_vl_config
from transformers import Qwen2VLForConditionalGeneration

from edgeprune.bundle import Bundle
from edgeprune.checkpoint import adapter as adapters
from edgeprune.checkpoint import weights
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.cli import main
from edgeprune.errors import UnsupportedModelError, UsageError

ADAPTERS = TESTS / "support" / "adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZE = ("--image-size", "84x112")


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LARGE", 500)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the plain adapter, to be changed."""
    return Path(shutil.copytree(ADAPTERS / "plain", tmp_path / "adapter"))


def change(adapter: Path, **settings: Any) -> None:
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rename(adapter: Path, old: str, new: str) -> None:
    save_file({name.replace(old, new): tensor for name, tensor in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)


def values(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Return all parameters, those on disk as they are read."""
    found = {}
    for name, parameter in loaded.model.named_parameters():
        source = getattr(parameter, "stored", None)
        found[name] = parameter.detach() if source is None else source.rows(0, source.shape[0])
        if source is not None and parameter.shape[0] > 5:  # pieces are read as graphs are written
            assert torch.allclose(source.rows(2, 5), found[name][2:5], rtol=1e-5, atol=1e-6)
    return found


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", ["plain", "patterns", "whole"])
def test_what_is_added_is_what_peft_adds(name: str, on_disk: bool, tiny_folder: Path, small_is_large: None) -> None:
    expected = json.loads((ADAPTERS / name / "expected.json").read_text())
    plain = values(load_model(resolve_model(str(tiny_folder))))
    loaded = load_model(resolve_model(str(tiny_folder), adapter=str(ADAPTERS / name)), on_disk=on_disk)
    merged = values(loaded)
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    whole = {f"{key.removeprefix('base_model.model.')}" for key in load_file(ADAPTERS / name / WEIGHTS) if "lora_" not in key}
    assert changed == set(expected) | whole
    for key, found in expected.items():
        added = merged[key] - plain[key]
        corner = torch.tensor(found["corner"])
        assert torch.allclose(added[: len(corner), : len(corner)], corner, rtol=1e-4, atol=1e-5), key
        assert float(added.abs().sum()) == pytest.approx(found["sum"], rel=1e-4), key
    for key in whole:
        assert torch.equal(merged[key], load_file(ADAPTERS / name / WEIGHTS)[f"base_model.model.{key}"])
    if on_disk:
        stored = weights.stored_in(loaded.model).values()
        assert any(isinstance(source, adapters.MergedMatrix) for source in stored)


def test_another_scale_is_noticed(copy: Path, tiny_folder: Path) -> None:
    # The golden numbers are of alpha 6.
    change(copy, lora_alpha=7)
    key = "model.language_model.layers.0.self_attn.q_proj.weight"
    corner = torch.tensor(json.loads((copy / "expected.json").read_text())[key]["corner"])
    plain = values(load_model(resolve_model(str(tiny_folder))))[key]
    merged = values(load_model(resolve_model(str(tiny_folder), adapter=str(copy))))[key]
    assert torch.allclose((merged - plain)[: len(corner), : len(corner)], corner * 7 / 6, rtol=1e-4, atol=1e-5)


def test_names_of_older_versions_of_transformers_are_known(copy: Path, tiny_folder: Path) -> None:
    expected = values(load_model(resolve_model(str(tiny_folder), adapter=str(copy))))
    rename(copy, "model.model.language_model.", "model.model.")  # up to transformers 4.51
    rename(copy, "model.model.visual.", "model.visual.")
    found = values(load_model(resolve_model(str(tiny_folder), adapter=str(copy))))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


OLD_NAMES = {"llava": ("language_model.model.", "model.language_model."), "qwen2_5_vl": ("model.", "model.language_model.")}


@pytest.mark.parametrize("family", OLD_NAMES)
def test_old_names_of_other_families(family: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = import_module(f"tiny_{family}").folder(tmp_path / "model")
    old, new = OLD_NAMES[family]
    plain = values(load_model(resolve_model(str(folder))))
    key = f"{new}layers.1.self_attn.q_proj"
    rows, columns = plain[f"{key}.weight"].shape
    parts = {"lora_A.weight": torch.ones(1, columns), "lora_B.weight": torch.ones(rows, 1)}
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"base_model.model.{old}layers.1.self_attn.q_proj.{part}": tensor for part, tensor in parts.items()},
        tmp_path / "adapter" / WEIGHTS,
    )
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    merged = values(load_model(resolve_model(str(folder), adapter=str(tmp_path / "adapter"))))
    assert torch.allclose(merged[f"{key}.weight"] - plain[f"{key}.weight"], torch.full((rows, columns), 2.0), atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "has use_dora"),
    "IA3": ({"peft_type": "IA3"}, "is of type IA3"),
    "biases": ({"bias": "lora_only"}, "has bias=lora_only"),
    "bias of B": ({"lora_bias": True}, "has lora_bias"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "has init_lora_weights=pissa, which changes the base model"),
    "tokens": ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
    "activated": ({"alora_invocation_tokens": [1]}, "has alora_invocation_tokens"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_adapters_than_plain_lora_are_refused_by_name(kind: str, copy: Path) -> None:
    settings, words = REFUSED[kind]
    change(copy, **settings)
    with pytest.raises(UnsupportedModelError, match=rf"{words}.*only plain LoRA is merged.*merge_and_unload"):
        resolve_model("tabletop", adapter=str(copy))


def test_adapters_without_their_files_are_refused(copy: Path) -> None:
    with pytest.raises(UsageError, match=r"no adapter folder nowhere.*adapter_config\.json"):
        resolve_model("tabletop", adapter="nowhere")
    (copy / WEIGHTS).rename(copy / "adapter_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"has no adapter_model\.safetensors; pickles are refused"):
        resolve_model("tabletop", adapter=str(copy))
    change(copy, lora_alpha=None)
    with pytest.raises(UsageError, match="has no lora_alpha"):
        resolve_model("tabletop", adapter=str(copy))


def refused(words: str, folder: Path, adapter: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        load_model(resolve_model(str(folder), adapter=str(adapter)))
    assert "\n" not in str(caught.value)


def test_adapters_that_do_not_fit_are_refused(copy: Path, tiny_folder: Path) -> None:
    whole = load_file(copy / WEIGHTS)

    def write(**changes: torch.Tensor | None) -> None:
        changed = {f"base_model.model.{name.replace('__', '.')}": tensor for name, tensor in changes.items()}
        save_file({name: tensor for name, tensor in (whole | changed).items() if tensor is not None}, copy / WEIGHTS)

    query = "model__language_model__layers__0__self_attn__q_proj"
    write(**{f"{query}__lora_B__weight": None})
    refused(r"only one of the two factors of model\.language_model\.layers\.0\.self_attn\.q_proj", tiny_folder, copy)
    write(**{f"{query}__lora_B__weight": torch.zeros(99, 2)})
    refused(r"q_proj, 99x48, where the model has 48x48.*an adapter of maker/tiny-VL", tiny_folder, copy)
    write(**{f"{query}__lora_magnitude_vector": torch.zeros(48)})
    refused("holds .*lora_magnitude_vector", tiny_folder, copy)
    write(model__layers__9__x__lora_A__weight=torch.zeros(2, 4), model__layers__9__x__lora_B__weight=torch.zeros(4, 2))
    refused("which the model does not have", tiny_folder, copy)
    patches = "model__visual__patch_embed__proj__lora_"
    write(**{f"{patches}A__weight": torch.zeros(2, 4), f"{patches}B__weight": torch.zeros(4, 2)})
    refused("patch_embed.proj, a Conv3d: only plain LoRA", tiny_folder, copy)
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-9])
    refused("is not a whole safetensors file", tiny_folder, copy)


def test_a_matrix_that_two_layers_share_is_not_changed_for_one(copy: Path, tmp_path: Path) -> None:
    config = qwen2_vl_config({})
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    (tmp_path / "tied").mkdir()
    folder = model_folder(tmp_path / "tied", Qwen2VLForConditionalGeneration, config)
    head = {"lora_A.weight": torch.ones(1, 48), "lora_B.weight": torch.ones(config.text_config.vocab_size, 1)}
    save_file({f"base_model.model.lm_head.{part}": tensor for part, tensor in head.items()}, copy / WEIGHTS)
    refused("changes lm_head, which the model shares with another layer", folder, copy)


def test_an_adapter_alone_names_its_base_and_the_command(copy: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(copy), "-o", str(tmp_path / "b")])
    assert result.exit_code == 1
    assert f"{copy} is an adapter of maker/tiny-VL, not a model." in result.stderr
    assert f"edgeprune export maker/tiny-VL --adapter {copy} -o BUNDLE" in result.stderr
    change(copy, base_model_name_or_path="unsloth/Qwen2.5-VL-3B-Instruct-unsloth-bnb-4bit")
    with pytest.raises(UnsupportedModelError, match=r"export unsloth/Qwen2.5-VL-3B-Instruct --adapter"):
        resolve_model(str(copy))


def test_a_bundle_knows_its_adapter(copy: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.output

    bundle = tmp_path / "b"
    run("export", tiny_folder, "-o", bundle, *SIZE, "--adapter", copy)
    source = Bundle.load(bundle).manifest.source
    plain = resolve_model(str(tiny_folder))
    assert (source.adapter, len(source.adapter_sha256)) == (str(copy), 64)
    assert source.weights_sha256 != plain.source().weights_sha256
    assert f"adapter        {copy}" in run("inspect", bundle)
    run("verify", bundle)
    refusal = run("verify", bundle, "--against", tiny_folder, code=2)
    assert f"has the adapter {copy} merged" in refusal and f"--adapter {copy}" in refusal
    change(copy, lora_alpha=7)
    for again in ((), ("--against", tiny_folder, "--adapter", copy)):
        assert "its adapter with --adapter" in run("verify", bundle, *again, code=1)
