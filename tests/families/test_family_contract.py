"""What every family must keep: answers as transformers gives them, bundles that are verified, graphs that every target builds.

Each runs on a tiny random configuration (`tiny_NAME.py`). The oracle is transformers' own `generate` on its own processor's pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from device_simulation import SimulatedDriver
from learned_weights import input_cut
from PIL import Image
from simulated_device import on_device, prepare

from edgeprune.bundle import DECODER, VISION, Bundle
from edgeprune.bundle.graph_io import ROWS
from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, load_outline, resolve_model
from edgeprune.checkpoint.processor import chat_template, processor_inputs
from edgeprune.device.onnx_file import read_graph
from edgeprune.device.workload import ModelSizes, workload
from edgeprune.errors import UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.export.sizes import sizes_of
from edgeprune.export.tracing import trace_decoder, trace_vision
from edgeprune.export.verification import verify
from edgeprune.lint.check import lint
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.registry import FAMILIES, applicability
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends.compare import RecordingBackend
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits, decoder_ranges, shapes_of
from edgeprune.runtime.backends.tensorrt.trial import substitute_capability, try_build
from edgeprune.runtime.generation.pipeline import Pipeline
from edgeprune.runtime.text.prompt import ImagePlaceholders
from edgeprune.targets import PLAIN, TARGETS, Lowering

WORDS = 16
PROMPTS = ("What colour is the cube?", "And the ball?")
NAMES = sorted([*FAMILIES, "paligemma2"])
families = pytest.mark.parametrize("name", NAMES)
# Built in `make test`, one of a kind: others have SigLIP's encoder as gemma3, CLIP's as llava, or Qwen's.
ENCODERS = ("gemma3", "idefics2", "internvl", "lfm2_vl", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl")
# Whose bundles are verified in `make test`. The bundled model is a Qwen2-VL; the others come with `make test-all`.
VERIFIED = ("internvl", "qwen3_5")
# Decoders of the others are llava's but for biases, widths and planes; those with windows or states are built below.
DECODERS = ("llava", "qwen3_vl")
BUILT = ("gemma3", "paligemma2", "qwen3_5")  # by `make test-all`


def slow_unless(quick: Callable[[str], bool]) -> pytest.MarkDecorator:
    """Return the mark that runs a test for every family, for those that are not `quick` only with `--all`."""
    names = [name if quick(name) else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
    return pytest.mark.parametrize("name", names)


once_per_encoder = slow_unless(lambda name: name in ENCODERS)
once_per_kind = slow_unless(lambda name: name in VERIFIED)
video_kinds = slow_unless(lambda name: name == "llava_onevision")
once_per_decoder = slow_unless(lambda name: name in DECODERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a family's name to the folder of its tiny model, written once."""

    @cache
    def written(name: str) -> Path:
        path: Path = tiny(name).folder(tmp_path_factory.mktemp(name))
        return path

    return written


@pytest.fixture
def model(name: str, folders: Any) -> LoadedModel:
    return load_model(resolve_model(str(folders(name))))


def tiny(name: str) -> Any:
    return import_module(f"tiny_{name}")


def picture(name: str, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*tiny(name).SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def whole(loaded: LoadedModel, name: str, size: tuple[int, int] | None = None) -> KeepPlan:
    geometry = loaded.geometry(size or tiny(name).SIZE)
    return unpruned_plan(loaded.folder.model_type, len(loaded.family.decoder().layers), geometry)


@dataclass(frozen=True)
class Said:
    """An answer: its tokens, and the logits of the first of them."""

    tokens: list[int]
    logits: np.ndarray


def said_by_transformers(
    loaded: LoadedModel,
    model: Pipeline,
    messages: list[Any],
    images: list[Image.Image],
    clip: dict[str, torch.Tensor] | None = None,
) -> Said:
    """Return what `generate` adds to a conversation about images, or about one video: `clip`, as the model takes it."""
    by_processor = chat_template(loaded.processor) is not None and (len(images) < 2 or loaded.family.several_as_one)
    if by_processor and clip is None:
        tokens = ids_by_processor(loaded, model, messages, images)
    else:
        tokens = torch.tensor([ids_by_tokenizer(loaded, model, messages, len(images) or 1)])
    kinds = (tokens == model.image.token).long() * (1 if clip is None else 2)
    accepted = inspect.signature(loaded.model.forward).parameters
    # PaliGemma's say what is prompt (0) and what is answer, not what is an image.
    others = 0 * kinds if loaded.folder.model_type == "paligemma" else kinds
    typed = {kind: made for kind, made in {"mm_token_type_ids": kinds, "token_type_ids": others}.items() if kind in accepted}
    given = clip or (tiny(model.plan.family).inputs(loaded.folder.path, images) if images else {})
    found: list[torch.Tensor] = []
    hook = loaded.model.register_forward_hook(lambda _, given, made: found.append(made.logits[0, -1]))
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        generated = loaded.model.generate(tokens, attention_mask=mask, **typed, **given, max_new_tokens=WORDS, do_sample=False)
    hook.remove()
    said: list[int] = generated[0, tokens.shape[1] :].tolist()
    return Said(said[: said.index(2)] if 2 in said else said, found[0].numpy())


def ids_by_processor(loaded: LoadedModel, model: Pipeline, messages: list[Any], images: list[Image.Image]) -> torch.Tensor:
    """Return the tokens [1, n] of a prompt by transformers' processor."""
    settings = loaded.changed_settings(model.plan.geometry)
    own = getattr(tiny(model.plan.family), "image_processor", None)  # where load_processor has none
    kept = loaded.processor.image_processor if own is None else own(loaded.folder.path)
    with mock.patch.object(loaded.processor, "image_processor", kept):
        tokens: torch.Tensor = processor_inputs(loaded.processor, messages, images, settings=settings)["input_ids"]
    return tokens


def ids_by_tokenizer(loaded: LoadedModel, model: Pipeline, messages: list[Any], images: int) -> list[int]:
    """Return the tokens of a prompt that no processor makes here: of a video, for which it needs torchvision.

    transformers' tokenizer puts its own first token unless the prompt has it.
    """
    layout, tokenizer = ImagePlaceholders(model.image, model.plan.geometry, model.tokenizer), loaded.tokenizer
    template = loaded.chat_template(model.image)
    prompt = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    begun = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    spans = [sum(view.tokens for view in views) for views in layout.spans] * images
    ids: list[int] = []
    for token in tokenizer(layout.expand(prompt), add_special_tokens=not begun).input_ids:
        ids += [token] * (spans.pop(0) if token == model.image.token else 1)
    assert not spans
    return ids


class Asked:
    """A conversation with the eager reference that keeps the first logits of each answer."""

    def __init__(self, reference: Pipeline) -> None:
        self.reference, self.recorder = reference, RecordingBackend(reference.backend)
        self.chat = Runtime(replace(reference, backend=self.recorder)).chat()

    def ask(self, prompt: str, pictures: list[Image.Image]) -> tuple[str, np.ndarray]:
        """Return the answer and its first logits."""
        stream = self.chat.ask(prompt, pictures or None, max_tokens=WORDS)
        text = "".join(stream)
        first = self.recorder.steps[-stream.receipt.generated_tokens]
        return text, first.logits

    def check(self, prompt: str, pictures: list[Image.Image], said: Said) -> str:
        """Ask, and compare with what transformers said; return the answer."""
        text, logits = self.ask(prompt, pictures)
        assert float(np.abs(logits - said.logits).max()) <= 1e-4 * float(np.abs(said.logits).max())
        assert text == self.reference.tokenizer.decode(said.tokens)
        return text


def turn(prompt: str, images: int) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": prompt}]}


@families
@pytest.mark.parametrize("images", [1, 2])
def test_answers_equal_transformers(name: str, model: LoadedModel, images: int) -> None:
    if images > 1 and getattr(tiny(name), "ONE_TURN", False):
        pytest.skip("the family has one image")
    reference = reference_model(model, whole(model, name))
    pictures = [picture(name, seed) for seed in range(images)]
    Asked(reference).check(PROMPTS[0], pictures, said_by_transformers(model, reference, [turn(PROMPTS[0], images)], pictures))


@families
def test_several_turns_equal_transformers(name: str, model: LoadedModel) -> None:
    if getattr(tiny(name), "ONE_TURN", False):
        pytest.skip("the family has one turn")
    reference = reference_model(model, whole(model, name))
    asked, pictures = Asked(reference), [picture(name, 0), picture(name, 1)]
    messages: list[Any] = []
    for prompt, shown in zip((*PROMPTS, "And here?"), (pictures[:1], [], pictures[1:]), strict=True):
        messages.append(turn(prompt, len(shown)))
        said = said_by_transformers(model, reference, messages, pictures[: 1 + len(messages) // 4])
        answer = asked.check(prompt, shown, said)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


@families
def test_text_alone_equals_transformers(name: str, model: LoadedModel) -> None:
    if getattr(tiny(name), "ONE_TURN", False):
        pytest.skip("the family always has an image")
    reference = reference_model(model, whole(model, name))
    Asked(reference).check(PROMPTS[0], [], said_by_transformers(model, reference, [turn(PROMPTS[0], 0)], []))


def clip_of(loaded: LoadedModel, name: str, model: Pipeline, frames: list[Image.Image]) -> dict[str, torch.Tensor]:
    """Return a video as transformers' model takes it. Its video processors need torchvision, so the pixels are ours."""
    patches, geometry = torch.from_numpy(model.image_spec.patches(frames)), model.plan.geometry
    if name.startswith("qwen"):
        grid = [[len(geometry.layout), geometry.height // geometry.patch, geometry.width // geometry.patch]]
        seconds = {"second_per_grid_ts": torch.tensor([2 / geometry.fps])} if name == "qwen2_5_vl" else {}
        return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor(grid), **seconds}
    views = len(frames)
    side = round((len(patches) / views) ** 0.5)
    whole = patches.view(views, side, side, 3, geometry.patch, geometry.patch).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return (
        {"pixel_values_videos": whole[None]}
        if name == "llava_onevision"
        else {"pixel_values": whole[None] if name == "smolvlm" else whole}
    )


@families
def test_videos_equal_transformers(name: str, model: LoadedModel) -> None:
    if not model.family.videos:
        with pytest.raises(UsageError, match="take no video"):
            model.geometry(tiny(name).SIZE, 4, 2.0)
        return
    geometry = model.geometry(tiny(name).SIZE, 4, 2.0)
    reference = reference_model(model, unpruned_plan(name, len(model.family.decoder().layers), geometry))
    frames = [picture(name, seed) for seed in range(4)]
    messages: list[Any] = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": PROMPTS[0]}]}]
    clip = clip_of(model, name, reference, frames)
    Asked(reference).check(PROMPTS[0], frames, said_by_transformers(model, reference, messages, [], clip))


@video_kinds
def test_a_pruned_video_bundle_is_verified(name: str, model: LoadedModel, tmp_path: Path) -> None:
    if not model.family.videos:
        pytest.skip("the family takes no video")
    geometry = model.geometry(tiny(name).SIZE, 4, 2.0)
    views = geometry.layout
    base = unpruned_plan(name, len(model.family.decoder().layers), geometry)
    first = Cut("input", "uniform" if views[-1].separators else "evs", geometry.tokens - 3)
    layers = model.decoder_shape().attention_layers
    plan = base.with_cuts(
        first, Cut("layer", "fastv", geometry.tokens // 2, layer=layers[0] + 1), Cut("cache", "plphp", 3, layer=layers[-1])
    )
    bundle = export_bundle(model, plan, tmp_path / "bundle")
    stages = {stage.name: stage for stage in verify(bundle, model)}
    assert [(stage.name, stage.worst) for stage in stages.values() if not stage.passed] == []
    if not model.family.own_video_prompts and name != "smolvlm":  # transformers needs num2words for it
        assert "one video" in stages["prompts"].compared and stages["unpruned text"].worst == 0
    runtime, frames = load(bundle.path), [picture(name, seed) for seed in range(4)]
    answer = runtime.generate(frames, PROMPTS[0], max_tokens=4)
    assert [cut.after for cut in answer.receipt.cuts] == [cut.keep for cut in plan.cuts]
    assert runtime.draw(frames, answer.receipt).width > 384
    with pytest.raises(UsageError, match="not 1 at once"):
        runtime.generate(frames[0], PROMPTS[0])


def pruned(loaded: LoadedModel, name: str, size: tuple[int, int] | None = None) -> KeepPlan:
    """Return a plan with cuts at every site but the last."""
    plan, first = whole(loaded, name, size), in_encoder(loaded, name, "evit", size)
    layers = loaded.decoder_shape().attention_layers
    tokens, left = plan.geometry.tokens, plan.with_cuts(*first).tokens_from_encoder
    ranked = "visionzip" if loaded.family.signals else "divprune"
    cuts = [
        Cut("input", ranked, left - 2),
        Cut("layer", "fastv", tokens // 2, layer=layers[0] + 1),
        Cut("cache", "plphp", tokens // 4, layer=layers[-1]),
    ]
    return plan.with_cuts(*first, *cuts[: plan.layers])


def in_encoder(loaded: LoadedModel, name: str, method: str, size: tuple[int, int] | None = None) -> list[Cut]:
    """Return a cut inside the vision encoder that takes a token or more of every view, where the family has such cuts."""
    layout = whole(loaded, name, size).geometry.layout
    keep = max(1, int(0.8 * layout[0].tokens)) * len(layout)
    return [] if loaded.family.no_encoder_cuts_reason else [Cut("vision", method, keep, layer=1)]


@once_per_kind
def test_a_pruned_bundle_is_verified(name: str, model: LoadedModel, tmp_path: Path) -> None:
    bundle = export_bundle(model, pruned(model, name), tmp_path / "bundle")
    stages = verify(bundle, model)
    assert [(stage.name, stage.worst) for stage in stages if not stage.passed] == []
    check_sizes(bundle, model)
    runtime = load(bundle.path)
    answer = runtime.generate(picture(name, 0), PROMPTS[0], max_tokens=4)
    assert answer.receipt.pruned and [cut.after for cut in answer.receipt.cuts] == [cut.keep for cut in bundle.plan.cuts]
    prepare(bundle, ProfileLimits(context=512, turn=256, images=2, unpruned=True))
    assert on_device(bundle, SimulatedDriver()).generate(picture(name, 0), PROMPTS[0], max_tokens=4).text == answer.text
    unpruned = runtime.generate(picture(name, 0), PROMPTS[0], max_tokens=4, prune=False)
    assert (
        unpruned.text
        == Runtime(reference_model(model, whole(model, name))).generate(picture(name, 0), PROMPTS[0], max_tokens=4).text
    )
    try:
        drawn = runtime.draw(picture(name, 0), answer.receipt)
        assert drawn.width > 384
    except UsageError as error:
        assert "no place" in str(error) and not model.family.signals


def check_sizes(bundle: Bundle, model: LoadedModel) -> None:
    """Compare what the model without its weights would cost with what its bundle does."""
    sizes = sizes_of(load_outline(model.folder), bundle.plan, PLAIN), ModelSizes.of(bundle)
    found, expected = (workload(each, bundle.plan, text_tokens=9, generated=4) for each in sizes)
    if model.folder.model_type == "idefics2":  # where latents are few, their queries in the first layer are constants
        assert found.tower_bytes == pytest.approx(expected.tower_bytes, rel=0.01)
        expected = replace(expected, tower=found.tower)
    assert found == expected
    # The bytes of a roofline are at most those that the graphs have.
    stored = {graph: sum(read_graph(bundle.file(graph)).bytes.values()) for graph in (VISION, DECODER)}
    assert 0 < expected.tower_bytes <= stored[VISION] and 0 < expected.layer_bytes + expected.head_bytes <= stored[DECODER]


@once_per_encoder
@pytest.mark.parametrize("target", [pytest.param("jetpack6", marks=pytest.mark.slow), "jetpack7.2"])
def test_its_encoder_is_built(name: str, target: str, model: LoadedModel, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    lowering, plan = Lowering(TARGETS[target], "fp16"), pruned(model, name)
    trace_vision(model.family, plan, lowering, tmp_path / "vision.onnx")
    assert [finding for finding in lint(tmp_path / "vision.onnx", lowering.target) if finding.severity == "error"] == []
    assert try_build(tmp_path / "vision.onnx", "vision", [{}], substitute_capability(lowering.target)).error == ""


@once_per_decoder
def test_its_fused_decoder_has_no_finding(name: str, model: LoadedModel, tmp_path: Path) -> None:
    # What is not fused is taken apart the same way for all: test_builds.py.
    lowering, graph = Lowering(TARGETS["jetpack7.2"], "fp16"), tmp_path / "decoder.onnx"
    trace_decoder(model.family.decoder(), model.family.position_axes, pruned(model, name), lowering, graph)
    assert [finding for finding in lint(graph, lowering.target) if finding.severity == "error"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2_vl", *BUILT])
@pytest.mark.parametrize("target", ["jetpack6", "jetpack7.2"])
def test_decoders_with_windows_or_states_are_built(name: str, target: str, model: LoadedModel, tmp_path: Path) -> None:
    # Those without are built for every method in test_builds.py.
    pytest.importorskip("tensorrt_rtx")
    lowering, graph, plan = Lowering(TARGETS[target], "fp16"), tmp_path / "decoder.onnx", pruned(model, name)
    record = trace_decoder(model.family.decoder(), model.family.position_axes, plan, lowering, graph)
    assert [finding for finding in lint(graph, lowering.target) if finding.severity == "error"] == []
    # The builder fails on Qwen3.5's loops where a text step may have a prefix (docs/families.md).
    limits = ProfileLimits(context=256, turn=64, images=2, unpruned=name != "qwen3_5")
    dynamic = {key: at.shape for key, at in record.inputs.items() if any(isinstance(axis, str) for axis in at.shape)}
    ranges = decoder_ranges((plan,), limits, model.decoder_shape().attention_layers, steps=ROWS in record.inputs)
    profiles = [{key: shapes_of(shape, each) for key, shape in dynamic.items()} for each in ranges]
    assert try_build(graph, "decoder", profiles, substitute_capability(lowering.target)).error == ""


@slow_unless(lambda name: name == "llava")
def test_its_graphs_for_cpus_are_verified(name: str, model: LoadedModel, tmp_path: Path) -> None:
    bundle = export_bundle(model, pruned(model, name), tmp_path / "bundle", lowering=Lowering(TARGETS["cpu"], "int8"))
    assert [(stage.name, stage.worst) for stage in verify(bundle, model) if not stage.passed] == []


@families
def test_every_method_applies_or_says_why_not(name: str, model: LoadedModel) -> None:
    base, shown = whole(model, name), picture(name, 0)
    for field in applicability(model.family):
        if field.reason or field.site == "decode" or field.method == "evs":  # test_dyrate.py, test_methods_evs.py
            continue
        layer = {"input": 0, "vision": 1}.get(field.site, model.decoder_shape().attention_layers[1])
        keep = 0 if field.method == "vtw" else base.geometry.tokens // 2
        if field.site == "vision":
            keep = in_encoder(model, name, field.method)[0].keep
        cut = Cut(field.site, field.method, keep, layer=layer)
        if field.method == "learned":
            cut = input_cut(field.method, keep, model.family.decoder().hidden, model=model.folder.source().weights_sha256)
        plan = base.with_cuts(cut)
        receipt = Runtime(reference_model(model, plan)).generate(shown, PROMPTS[0], max_tokens=2).receipt
        assert [cut.after for cut in receipt.cuts] == [keep], field
