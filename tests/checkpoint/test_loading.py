"""What is refused of a model folder before anything heavy runs, and what runs only where it is trusted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from tiny_models import TINY_GEOMETRY
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import PlanError, UnsupportedModelError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.processors import named_processor
from edgeprune.registry import FAMILIES, family_class, has_chat_template
from edgeprune.runtime.text.tokenizer import TextTokenizer

OWN = "import transformers\n\n\nclass Ours(transformers.Qwen2VLForConditionalGeneration):\n    pass\n"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change(folder: Path, part: str | None = None, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(values)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("on_disk", [False, True])
def test_code_of_a_folder_runs_only_where_it_is_trusted(folder: Path, on_disk: bool) -> None:
    # transformers knows the older names of tensors for its own classes alone.
    state = load_model(resolve_model(str(folder))).model.state_dict()
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "ours.py").write_text(OWN)
    change(folder, auto_map={"AutoModelForImageTextToText": "ours.Ours"})
    assert type(load_model(resolve_model(str(folder)), on_disk=on_disk).model).__name__ == "Qwen2VLForConditionalGeneration"
    loaded = load_model(resolve_model(str(folder), trust_remote_code=True), on_disk=on_disk)
    assert type(loaded.model).__name__ == "Ours"


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "mllama", "qwen2"])
def test_other_architectures_are_named_with_what_is_supported(folder: Path, name: str) -> None:
    change(folder, model_type=name)
    with pytest.raises(UnsupportedModelError, match=rf"'{name}' are not supported.*qwen3_vl, smolvlm"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("part", "values", "named"),
    [
        (None, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized with bitsandbytes"),
        ("text_config", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None}, "sliding"),
        ("text_config", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "depend on the length"),
        (None, {"architectures": ["Qwen9VLForEverything"]}, "Qwen9VLForEverything"),
        (None, {"architectures": ["Ours"], "auto_map": {"AutoModelForImageTextToText": "ours.Ours"}}, "give --trust-remote-code"),
    ],
)
def test_twists_are_named(folder: Path, part: str | None, values: dict[str, Any], named: str) -> None:
    change(folder, part, **values)
    with pytest.raises(UnsupportedModelError, match=named):
        load_model(resolve_model(str(folder)))


def test_truncation_and_padding_of_the_last_call_before_saving_are_not_taken_over(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    long = "What colour is the cube? " * 20
    expected = tokenizer(long).input_ids
    tokenizer(long, truncation=True, max_length=24, padding="max_length")
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"]["max_length"] == 24
    loaded = load_model(resolve_model(str(folder)))
    model = reference_model(loaded, unpruned_plan("qwen2_vl", 3, TINY_GEOMETRY))
    written = Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())  # what an export writes
    readers = (model.tokenizer.encode, TextTokenizer(folder / "tokenizer.json").encode, lambda text: written.encode(text).ids)
    assert [encode(long) for encode in readers] == [expected] * 3
    assert model.tokenizer.encode("0") == tokenizer("0", padding=False, truncation=False).input_ids


def test_settings_of_all_processors_may_be_in_one_file(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert resolve_model(str(folder)).processor == settings


@pytest.mark.parametrize("site", ["layer", "cache"])
def test_a_single_token_is_not_kept_inside_the_decoder(tiny: LoadedModel, tiny_plan: KeepPlan, site: str) -> None:
    method = "fastv" if site == "layer" else "plphp"
    plan = KeepPlan(tiny_plan.family, tiny_plan.layers, tiny_plan.geometry, (Cut(site, method, 1, layer=1),))
    with pytest.raises(PlanError, match="Keep 2, or none"):
        tiny.check_plan(plan)


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("template", "has no chat template"),
        ("end", "has no end token"),
        ("image", "does not make the image token"),
        ("image turn", "writes no prompt about an image: The chat template failed: TypeError"),
        ("image place", "writes no prompt about an image: The chat template of this model does not place"),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused_before_anything_is_traced(
    lacking: str, words: str, tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacking == "template":
        for holder in (tiny.processor, tiny.tokenizer):
            monkeypatch.setattr(holder, "chat_template", None)
        broken = replace(tiny, folder=replace(tiny.folder, path=tmp_path))
    else:
        broken = tiny
    written = {"image turn": "{{ 'User: ' + messages[0].content }}", "image place": "User: {{ messages[0].content[1].text }}"}
    if lacking in written:
        monkeypatch.setattr(tiny.processor, "chat_template", written[lacking])
    if lacking == "end":
        monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", None)
    if lacking == "image":
        monkeypatch.setattr(tiny.model.config, "image_token_id", 100_000)
    with pytest.raises(UnsupportedModelError, match=words):
        export_bundle(broken, unpruned_plan("qwen2_vl", 3, TINY_GEOMETRY), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_fills_the_context_is_refused(tiny: LoadedModel) -> None:
    assert tiny.geometry((28 * 7, 28 * 73)).tokens == 511
    with pytest.raises(UsageError, match=r"512 tokens, but .* takes 512 with the question"):
        tiny.geometry((28 * 16, 28 * 32))


def test_families_with_a_template_of_their_own_need_no_file() -> None:
    for name in FAMILIES:
        assert has_chat_template(name) == (family_class(name).chat_template is not None)


def test_every_family_knows_its_image_processor() -> None:
    for name in FAMILIES:
        theirs = IMAGE_PROCESSOR_MAPPING_NAMES[name].get("pil", IMAGE_PROCESSOR_MAPPING_NAMES[name].get("torchvision"))
        assert named_processor({}, name)["image_processor_type"] == str(theirs).removesuffix("Pil")
