"""Layers with states instead of a KV cache: prefixes, several turns, and what a state cannot do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny_lfm2_vl
import tiny_qwen3_5
from device_simulation import SimulatedDriver
from PIL import Image
from simulated_device import on_device, prepare

from edgeprune.bundle import Bundle
from edgeprune.bundle.manifest import Manifest
from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.device.workload import workload_of
from edgeprune.errors import BundleError, UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import Cut
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends.compare import RecordingBackend
from edgeprune.runtime.backends.kv_cache import KvCache
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits

PROMPTS = ["What colour is the cube?", "How many balls are there?", "And the table?"]
KINDS = {"lfm2_vl": tiny_lfm2_vl, "qwen3_5": tiny_qwen3_5}


@pytest.fixture(scope="module", params=KINDS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle whose cuts leave prefixes the same for every question."""
    tiny, name = KINDS[request.param], request.param
    loaded = load_model(resolve_model(str(tiny.folder(tmp_path_factory.mktemp(name)))))
    plan = unpruned_plan(name, 4, loaded.geometry(tiny.SIZE)).with_cuts(Cut("input", "divprune", 8))
    return export_bundle(loaded, plan, tmp_path_factory.mktemp("bundles") / name)


@pytest.fixture
def image(bundle: Bundle) -> Image.Image:
    geometry = bundle.plan.geometry
    pixels = np.random.default_rng(1).integers(0, 256, (geometry.height, geometry.width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("prune", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_prefix_is_gone_on_from_again_and_again(bundle: Bundle, image: Image.Image, prune: bool) -> None:
    cold, warm = load(bundle.path, cache_bytes=0), load(bundle.path)
    expected = [cold.generate(image, prompt, prune=prune, max_tokens=10) for prompt in PROMPTS]
    warm.generate(image, PROMPTS[0], prune=prune, max_tokens=2)
    streams = [warm.chat(prune=prune).ask(prompt, image, max_tokens=10) for prompt in PROMPTS]
    for _ in range(10):  # all at once: their states must not be one another's
        for stream in streams:
            next(stream, "")
    assert [stream.text + "".join(stream) for stream in streams] == [answer.text for answer in expected]
    assert [stream.receipt.kv_bytes for stream in streams] == [answer.receipt.kv_bytes for answer in expected]
    assert all("prefix" in stream.receipt.reused for stream in streams)


def test_a_stored_prefix_holds_the_states_at_its_end(bundle: Bundle, image: Image.Image) -> None:
    runtime = load(bundle.path)
    recorder = RecordingBackend(runtime._pipeline.backend)
    asked = Runtime(replace(runtime._pipeline, backend=recorder))
    asked.generate(image, PROMPTS[0], max_tokens=1)
    asked.generate(image, PROMPTS[1], max_tokens=1)
    (first, _), (rest, before), (again, same) = recorder.inputs
    assert first.suffix.embeds.shape[1] == 1 and rest.suffix.embeds.shape[1] > 1 < again.suffix.embeds.shape[1]
    for one, other in zip(before.states, same.states, strict=True):
        np.testing.assert_array_equal(one, other)
    assert before.length == same.length


def test_the_states_of_a_prefix_matter(bundle: Bundle, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    cold, warm = load(bundle.path, cache_bytes=0), load(bundle.path)
    warm.generate(image, PROMPTS[0], max_tokens=2)
    copied = KvCache.copy_prefix

    def emptied(cache: KvCache, length: int) -> KvCache:
        return replace(copied(cache, length), states=tuple(np.zeros_like(state) for state in cache.states))

    monkeypatch.setattr(KvCache, "copy_prefix", emptied)
    warm.forget()
    warm.generate(image, PROMPTS[0], max_tokens=2)
    recorder, other = RecordingBackend(warm._pipeline.backend), RecordingBackend(cold._pipeline.backend)
    Runtime(replace(warm._pipeline, backend=recorder)).generate(image, PROMPTS[1], max_tokens=1)
    Runtime(replace(cold._pipeline, backend=other)).generate(image, PROMPTS[1], max_tokens=1)
    assert np.abs(recorder.steps[-1].logits - other.steps[-1].logits).max() > 1e-3


def test_turns_on_a_device_are_those_of_the_host(bundle: Bundle, image: Image.Image) -> None:
    prepare(bundle, ProfileLimits(context=512, turn=256, images=2, unpruned=True))
    chats = [load(bundle.path, cache_bytes=0).chat(), on_device(bundle, SimulatedDriver()).chat()]
    for number, prompt in enumerate(PROMPTS):
        host, device = (chat.ask(prompt, image if number != 1 else None, max_tokens=6) for chat in chats)
        assert "".join(host) == "".join(device)


def test_no_token_is_borrowed(bundle: Bundle, image: Image.Image) -> None:
    runtime = load(bundle.path, cache_bytes=0)
    prompts = runtime._pipeline.prompts
    pad = prompts.tokenizer.decode([prompts.image.token], skip_special=False)
    plain = replace(prompts.image, text=pad)
    if bundle.manifest.image.text.count(pad) > 1:
        pytest.skip("there is text between its tiles")
    template = (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] or '" + plain.placeholder + "' }}{% endfor %}{% endfor %}"
    )
    changed = replace(prompts, image=plain, template=type(prompts.template)(template))
    with pytest.raises(UsageError, match="two images without text between them"):
        Runtime(replace(runtime._pipeline, prompts=changed)).generate([image, image], PROMPTS[0], max_tokens=2)


def test_the_manifest_names_the_states(bundle: Bundle) -> None:
    shape = bundle.manifest.decoder
    assert shape.attention_layers == (1, 3) and {state.layer for state in shape.states} == {0, 2}
    record = bundle.manifest.graphs["onnx/decoder.onnx"]
    assert record.inputs["past_state.0.0"].shape == record.outputs["present_state.0.0"].shape == shape.states[0].shape
    assert "past_key_values.0.key" not in record.inputs and "past_key_values.1.key" in record.inputs


def test_the_workload_counts_the_caches_there_are(bundle: Bundle) -> None:
    work, shape = workload_of(bundle, text_tokens=10, generated=4), bundle.manifest.decoder
    assert work.kv_bytes(4) == 2 * (8 + 10 + 4) * 2 * shape.kv_heads * shape.head_dim * 4


def test_states_of_no_layer_are_malformed(bundle: Bundle) -> None:
    text = (bundle.path / "manifest.json").read_text().replace('"layer": 2', '"layer": 9')
    with pytest.raises(BundleError, match="malformed"):
        Manifest.parse(bundle.path, text.encode())
