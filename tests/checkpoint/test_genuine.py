"""Published checkpoints: prompts and pixels are those of transformers' own processor under the checkpoint's own files.

No weights are needed: a prompt is ids, and an image is patches, before a model sees them.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from genuine import FILES, NAMES, write_files
from lfm2_vl_processor import upstream_processor
from PIL import Image
from tiny_folders import cut

from edgeprune.calibration.replay.reference import prompt_encoder
from edgeprune.checkpoint.configuration import check_folder, check_size, sized_geometry
from edgeprune.checkpoint.loading import LoadedModel, ModelFolder
from edgeprune.checkpoint.processor import (
    PreparedVideo,
    chat_template,
    image_settings,
    load_processor,
    processor_inputs,
    template_in_files,
)
from edgeprune.errors import UnsupportedModelError, UsageError
from edgeprune.plan import Geometry
from edgeprune.processors import image_spec
from edgeprune.registry import family_class

QUESTION, NEXT = "What is the colour of the cube?", "And here? Müller, 你好."
SIZES = {"idefics2-8b": (1960, 1960)}
# Checkpoints without a template: what their documentation writes for the processor, by kind of conversation.
_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"
_PIRATE = f"{_SYSTEM}You are a pirate chatbot who always responds in pirate speak!<|eot_id|>"
_USER, _END = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
_FIRST, _SECOND = (f"(image {number}: <Image><image></Image>)" for number in (1, 2))
WRITTEN: dict[str, dict[str, str]] = {
    "paligemma-3b-pt-448": {"one image": QUESTION},
    "paligemma2-3b-pt-224": {"one image": QUESTION},
    "vip-llava-7b-hf": {
        "one image": (
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
            f"polite answers to the human's questions.###Human: <image>\n{QUESTION}###Assistant:"
        )
    },
    # Mantis' own code makes these: conv_templates["llama_3"] and MLlavaProcessor. Its file has Llama 3's template, for text alone.
    "mantis-8b-siglip-llama3": {
        "one image": f"{_PIRATE}{_USER}{_FIRST} {QUESTION}{_END}",
        "two images": f"{_PIRATE}{_USER}{_FIRST} {_SECOND} {QUESTION}{_END}",
        "a system prompt": f"{_SYSTEM}Be short.<|eot_id|>{_USER}{_FIRST} {QUESTION}{_END}",
        "two turns": f"{_PIRATE}{_USER}{_FIRST} {QUESTION}{_END}Red.<|eot_id|>{_USER}{_SECOND} {NEXT}{_END}",
        "no image": f"{_PIRATE}{_USER}{QUESTION}{_END}",
    },
}
IMAGE: dict[str, Any] = {"type": "image"}
ENDING = transformers.GenerationConfig(eos_token_id=2)


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one image": [{"role": "user", "content": [IMAGE, text(QUESTION)]}],
    "two images": [{"role": "user", "content": [IMAGE, IMAGE, text(QUESTION)]}],
    "a system prompt": [
        {"role": "system", "content": [text("Be short.")]},
        {"role": "user", "content": [IMAGE, text(QUESTION)]},
    ],
    "two turns": [
        {"role": "user", "content": [IMAGE, text(QUESTION)]},
        {"role": "assistant", "content": [text("Red.")]},
        {"role": "user", "content": [IMAGE, text(NEXT)]},
    ],
    "no image": [{"role": "user", "content": [text(QUESTION)]}],
}


class Checkpoint:
    """A published checkpoint without weights. `size`: height and width of its images."""

    def __init__(self, name: str, folder: Path) -> None:
        write_files(name, folder)
        config = transformers.AutoConfig.from_pretrained(folder)
        family = family_class(config.model_type)(SimpleNamespace(config=config))
        family.check(config)
        opened = ModelFolder(name, folder, config.model_type, image_settings(folder, config.model_type))
        processor = load_processor(folder, config.model_type)
        if config.model_type == "lfm2_vl":
            processor.image_processor = upstream_processor(opened.processor)
        family.decoder = lambda: SimpleNamespace(context=1 << 20)
        generation = (
            transformers.GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").is_file() else ENDING
        )
        self.loaded = LoadedModel(opened, SimpleNamespace(config=config, generation_config=generation), family, processor)
        self.size = SIZES.get(name) or self.loaded._spec(None).default_size() or (448, 448)

    @cached_property
    def geometry(self) -> Geometry:
        return self.loaded._spec(self.size).geometry(*self.size)

    @cached_property
    def changed(self) -> dict[str, Any]:
        """The settings that a bundle of this size changes."""
        return self.loaded.changed_settings(self.geometry)

    def picture(self, seed: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*self.size, 3), dtype=np.uint8))

    def ids_by_transformers(self, kind: str) -> list[int]:
        """Return what `AutoProcessor.apply_chat_template` makes of a conversation."""
        processor, conversation = self.loaded.processor, CONVERSATIONS[kind]
        count = sum(part is IMAGE for turn in conversation for part in turn["content"])
        pictures = [self.picture(seed) for seed in range(count)]
        if self.loaded.folder.name in WRITTEN:
            given = {"images": pictures, "images_kwargs": self.changed} if count else {}
            made = processor(text=WRITTEN[self.loaded.folder.name][kind], **given)
        else:
            made = processor_inputs(processor, conversation, pictures, settings=self.changed)
        return list(map(int, np.ravel(made["input_ids"])))

    def ids_by_runtime(self, conversation: list[dict[str, Any]]) -> list[int]:
        """Return what the runtime makes of a conversation, with every visual token as its id."""
        return prompt_encoder(self.loaded, self.geometry).every_id(conversation)  # type: ignore[arg-type]


# Each has the processor, the template and the tokenizer of another one here.
LIKE_OTHERS = (
    "cosmos-reason1-7b",
    "internvl3_5-1b-hf",
    "mistral-small-3.1-24b-instruct-2503",
    "paligemma2-3b-pt-224",
    "smolvlm2-256m-video",
    "smolvlm2-500m-video",
)
CHECKED = [pytest.param(name, marks=pytest.mark.slow) if name in LIKE_OTHERS else name for name in NAMES]


@pytest.fixture(scope="module", params=CHECKED)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_prompts_are_those_of_the_processor(kind: str, checkpoint: Checkpoint) -> None:
    name = checkpoint.loaded.folder.name
    if name in WRITTEN and kind not in WRITTEN[name]:
        pytest.skip("the checkpoint has no chat template")
    if name.startswith("llava-onevision") and kind in ("two images", "two turns"):
        pytest.skip("transformers takes several images as one view each, a bundle always the views that it was made for")
    if name == "pixtral-12b" and kind in ("a system prompt", "two turns"):
        pytest.skip("its template adds lists of parts to strings, which fails")
    ids = checkpoint.ids_by_runtime(CONVERSATIONS[kind])
    assert ids == checkpoint.ids_by_transformers(kind)
    assert len(ids) > 12


def test_prompts_about_a_video_are_those_of_the_processor(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = checkpoint.loaded
    if not loaded.family.videos or loaded.family.own_video_prompts:
        pytest.skip("takes no video, or differs by design: docs/families.md")
    geometry = loaded.geometry(checkpoint.size, 4, 2.0)
    if loaded.folder.model_type == "smolvlm":
        monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", {4: "four"}.get)
    frames = [checkpoint.picture(seed) for seed in range(4)]
    patches = image_spec(loaded.settings(geometry)).patches(frames)
    conversation: list[Any] = [{"role": "user", "content": [{"type": "video"}, text(QUESTION)]}]
    made = processor_inputs(loaded.processor, conversation, video=PreparedVideo(geometry, frames, patches))["input_ids"]
    assert prompt_encoder(loaded, geometry).every_id(conversation) == made[0].tolist()


def test_pixels_are_those_of_the_processor(checkpoint: Checkpoint) -> None:
    if checkpoint.loaded.folder.model_type == "lfm2_vl":
        pytest.skip("its patches are padded: test_processors_lfm2_vl.py")
    settings, picture = checkpoint.loaded.settings(checkpoint.geometry), checkpoint.picture(0)
    processor = checkpoint.loaded.processor.image_processor
    expected = processor(images=[picture], return_tensors="np", **checkpoint.changed)["pixel_values"]
    if expected.ndim > 2:
        expected = cut(torch.from_numpy(expected.reshape(-1, *expected.shape[-3:])), checkpoint.geometry.patch).numpy()
    np.testing.assert_allclose(image_spec(settings).patches([picture]), expected, atol=1e-5)


def test_it_is_not_refused_by_its_files(checkpoint: Checkpoint) -> None:
    # Idefics2 has its template in processor_config.json, ViP-LLaVA and PaliGemma have none.
    folder = checkpoint.loaded.folder
    check_folder(folder)
    check_size(folder, checkpoint.size)
    assert template_in_files(folder.path) == (not folder.name.startswith(("paligemma", "vip-llava")))
    assert template_in_files(folder.path) == (chat_template(checkpoint.loaded.processor) is not None)


def test_a_template_for_text_alone_gives_way_to_the_processors(checkpoint: Checkpoint) -> None:
    # Qwen2.5-VL and LLaVA-OneVision have one without images in tokenizer_config.json.
    image = checkpoint.loaded.family.image_text(checkpoint.geometry)
    assert image.placeholder in checkpoint.loaded.chat_template(image)


def test_an_answer_of_mantis_ends_with_its_turn(tmp_path: Path) -> None:
    # Its chat code stops there; the generation_config.json of Llama 3's first weeks does not.
    loaded = Checkpoint("mantis-8b-siglip-llama3", tmp_path).loaded
    loaded.model.generation_config = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert loaded.end_tokens() == (128001, 128009)
    (tmp_path / "tokenizer_config.json").unlink()
    check_folder(loaded.folder)  # it needs no template in its files
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        check_folder(replace(loaded.folder, processor={}))


def test_a_template_that_leaves_out_the_question_is_refused(tmp_path: Path) -> None:
    # Pixtral-12B's reads chunk["content"], for which transformers has another form of messages.
    checkpoint = Checkpoint("pixtral-12b", tmp_path)
    checkpoint.loaded.model.generation_config = transformers.GenerationConfig.from_pretrained(tmp_path)
    prompt_encoder(checkpoint.loaded, checkpoint.geometry)
    template = chat_template(checkpoint.loaded.processor)
    assert template is not None
    checkpoint.loaded.processor.chat_template = template.replace('chunk["text"]', 'chunk["content"]')
    with pytest.raises(UnsupportedModelError, match="leaves out the text of a question"):
        prompt_encoder(checkpoint.loaded, checkpoint.geometry)


def test_settings_in_processor_config_come_first(tmp_path: Path) -> None:
    write_files("qwen2-vl-2b", tmp_path)
    own = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": own | {"image_mean": [0.5, 0.5, 0.5]}}))
    assert image_settings(tmp_path, "qwen2_vl")["image_mean"] == [0.5, 0.5, 0.5]
    loaded = load_processor(tmp_path, "qwen2_vl")
    assert list(loaded.image_processor.image_mean) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", CHECKED)
def test_a_class_that_is_not_named_is_that_of_the_family(name: str, tmp_path: Path) -> None:
    write_files(name, tmp_path)
    for file in (path for path in map(tmp_path.joinpath, ("preprocessor_config.json", "processor_config.json")) if path.is_file()):
        settings = json.loads(file.read_text())
        for holder in (settings, settings.get("image_processor", {})):
            for key in ("image_processor_type", "feature_extractor_type"):
                holder.pop(key, None)
        file.write_text(json.dumps(settings))
    kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
    loaded = type(load_processor(tmp_path, kind).image_processor).__name__
    without_pillow = {"lfm2_vl": "Lfm2VlImageProcessor"}
    assert image_settings(tmp_path, kind)["image_processor_type"] == without_pillow.get(kind, loaded.removesuffix("Pil"))


@pytest.mark.parametrize("size", [(448, 448), (896, 896), (640, 480), (300, 1000)])
def test_a_size_that_a_hint_names_works(size: tuple[int, int], tmp_path: Path) -> None:
    # Idefics2 splits into quarters, and only of some sizes do they become as large as the whole.
    spec_of = Checkpoint("idefics2-8b", tmp_path).loaded._spec
    with pytest.raises(UsageError, match="become other sizes") as caught:
        sized_geometry(spec_of, size)
    named = re.findall(r"(\d+)x(\d+)", caught.value.hint)
    assert named
    for height, width in named:
        geometry = sized_geometry(spec_of, (int(height), int(width)))
        assert abs(geometry.height / geometry.width / (size[0] / size[1]) - 1) < 0.05


def test_the_older_name_of_qwens_image_processor_is_known(tmp_path: Path) -> None:
    # Qwen2.5-VL's checkpoints of February 2025 have it; later ones have Qwen2VLImageProcessor.
    write_files("qwen2_5-vl-3b", tmp_path)
    shutil.copy(FILES / "qwen2_5-vl-7b-feb2025" / "preprocessor_config.json", tmp_path)
    settings = image_settings(tmp_path, "qwen2_5_vl")
    assert settings["image_processor_type"] == "Qwen2_5_VLImageProcessor"
    processor = load_processor(tmp_path, "qwen2_5_vl").image_processor
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8))
    expected = processor(images=[picture], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(image_spec(settings).patches([picture]), expected, atol=1e-5)
