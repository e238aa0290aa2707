"""Published checkpoints with random weights: answers are those of transformers' `generate` under the checkpoint's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from genuine import NAMES, write_checkpoint
from lfm2_vl_processor import upstream_processor
from PIL import Image

from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.checkpoint.processor import chat_template
from edgeprune.cli import main
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import Runtime

QUESTION, TOKENS = "What is the colour of the cube?", 32
SIZES = {"idefics2-8b": (1960, 1960)}
# Qwen2.5-VL has a repetition penalty, Idefics2 forbids its image tokens, PaliGemma begins with the image, Gemma 3 surrounds it.
QUICK = ("gemma-3-4b-it", "lfm2_5-vl-1.6b", "qwen2_5-vl-3b", "qwen3_5-0.8b", "paligemma-3b-pt-448")


def opened(name: str, folder: Path) -> tuple[LoadedModel, Image.Image]:
    loaded = load_model(resolve_model(str(write_checkpoint(name, folder))))
    if loaded.folder.model_type == "lfm2_vl":
        loaded.processor.image_processor = upstream_processor(loaded.folder.processor)
    size = SIZES.get(name) or loaded._spec(None).default_size() or (448, 448)
    return loaded, Image.fromarray(np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8))


def text_by_transformers(loaded: LoadedModel, picture: Image.Image, changed: dict[str, Any]) -> str:
    """Return the greedy answer of `generate` about one image, by the checkpoint's own processor and generation_config."""
    processor, own = loaded.processor, chat_template(loaded.processor)
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    if own is None and loaded.folder.model_type == "paligemma":
        inputs = processor(text=QUESTION, images=[picture], return_tensors="pt", images_kwargs=changed)
        inputs.pop("labels", None)
    else:
        outside = loaded.family.outside_chats.get(str(loaded.folder.processor.get("processor_class")))
        template = outside.template if outside else own or loaded.family.chat_template
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            chat_template=template,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"images_kwargs": changed},
        )
    with torch.no_grad():
        made = loaded.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=list(loaded.end_tokens()))
    text: str = loaded.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of transformers' PaliGemma processor, with NumPy 2
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_greedy_answers_are_those_of_generate(name: str, tmp_path: Path) -> None:
    loaded, picture = opened(name, tmp_path)
    plan = unpruned_plan(loaded.folder.model_type, 2, loaded.geometry((picture.height, picture.width)))
    changed = loaded.changed_settings(plan.geometry)
    answer = Runtime(reference_model(loaded, plan)).generate(picture, QUESTION, max_tokens=TOKENS)
    assert answer.text == text_by_transformers(loaded, picture, changed)
    assert answer.receipt.generated_tokens > 4


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_commands_export_and_verify_it(name: str, tmp_path: Path) -> None:
    loaded, picture = opened(name, tmp_path / "model")
    bundle = str(tmp_path / "bundle")
    export = ["export", str(tmp_path / "model"), "-o", bundle, "--image-size", f"{picture.height}x{picture.width}"]
    for command in (export, ["verify", bundle]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    # Nothing is left out of the comparison with the processor and with `generate` where the checkpoint has a template.
    # LFM2-VL's image processor needs torchvision.
    left_out = chat_template(loaded.processor) is None or loaded.folder.model_type == "lfm2_vl"
    assert ("nothing" in result.output) == left_out
