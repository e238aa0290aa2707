"""Decode steps in place: one launch each, on caches that are longer than what is real, and the same answers as ONNX Runtime's."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_simulation import SCRATCH, SimulatedCudart, SimulatedDriver
from PIL import Image
from plans import BASE, PLANS, PROMPT
from simulated_device import on_device, prepare

from edgeprune.bundle import DECODER, Bundle
from edgeprune.bundle.graph_io import ROWS
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.errors import EdgePruneError
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import ranked_plan, unpruned_plan
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends.interface import BackendProxy, DecoderOutput
from edgeprune.runtime.backends.kv_cache import CAPACITY
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits, capacity_for
from edgeprune.tabletop import MODEL_FOLDER
from edgeprune.targets import TARGETS, Lowering

JETPACK = Lowering(TARGETS["jetpack6"], "fp32")
WEIGHING = BASE.with_cuts(Cut("input", "zspaprune", 5, options={"weigh": True}))
EVIT = BASE.with_cuts(Cut("vision", "evit", 6, layer=1))
WORDS = 7

Make = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def make(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function from a plan's name to its bundle with engines."""
    withdrawn = WEIGHING.with_cuts(Cut("layer", "vtw", 0, layer=2))
    plans = {**PLANS, "weighing, withdrawn": withdrawn, "none": BASE, "evit": EVIT}

    @cache
    def made(name: str) -> Bundle:
        bundle = export_bundle(tiny, plans[name], tmp_path_factory.mktemp("steps") / "bundle", lowering=JETPACK)
        prepare(bundle, ProfileLimits(context=600, turn=200, images=2, unpruned=True))
        return bundle

    return made


class Recorded(BackendProxy):
    """A backend that keeps the logits of all passes."""

    def __init__(self, backend: Any) -> None:
        super().__init__(backend)
        self.logits: list[np.ndarray] = []

    def forward(self, *given: Any, **named: Any) -> DecoderOutput:
        output = self._backend.forward(*given, **named)
        self.logits.append(output.logits)
        return output


def recorded(runtime: Runtime) -> tuple[Runtime, list[np.ndarray]]:
    backend = Recorded(runtime._pipeline.backend)
    return Runtime(replace(runtime._pipeline, backend=backend)), backend.logits


def talk(runtime: Runtime, image: Image.Image) -> list[Any]:
    """Hold two conversations whose answers take turns, with a second image in one of them; return what was said and read."""
    other = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    chats, said = (runtime.chat(), runtime.chat()), list[Any]()
    for asked in (((PROMPT, image), (PROMPT, other)), (("And the ball?", None), ("Is it here too?", image))):
        streams = [chat.ask(*question, max_tokens=WORDS) for chat, question in zip(chats, asked, strict=True)]
        for _ in range(WORDS + 1):
            said += [next(stream, "") for stream in streams]
        said += [(stream.receipt.decode_shares, stream.receipt.visual_reads, stream.receipt.kv_bytes) for stream in streams]
    return said


def agree(bundle: Bundle, image: Image.Image, driver: SimulatedDriver) -> None:
    """Compare what the device says with what ONNX Runtime says of caches that end with their last row."""
    (host, expected), (device, actual) = recorded(load(bundle.path)), recorded(on_device(bundle, driver))
    assert talk(host, image) == talk(device, image)
    for one, same in zip(expected, actual, strict=True):
        np.testing.assert_allclose(same, one, atol=2e-5)
    assert driver.calls.count(("launch",)) > 0


OTHERS = ("live classes", "cache, schedule", "weighing, withdrawn")


@pytest.mark.parametrize("name", ["everything", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_they_say_what_steps_on_growing_caches_say(make: Make, name: str, tiny_image: Image.Image) -> None:
    agree(make(name), tiny_image, SimulatedDriver())


@pytest.mark.slow
def test_a_family_with_windows_says_the_same(tmp_path: Path) -> None:
    tiny: Any = import_module("tiny_gemma3")
    model = load_model(resolve_model(str(tiny.folder(tmp_path))))
    base = unpruned_plan("gemma3", len(model.family.decoder().layers), model.geometry(tiny.SIZE))
    count = base.geometry.tokens
    bundle = export_bundle(model, ranked_plan(base, [count // 2] * base.layers), tmp_path / "bundle", lowering=JETPACK)
    prepare(bundle, ProfileLimits(context=600, turn=256, images=2))
    pixels = np.random.default_rng(0).integers(0, 256, (*tiny.SIZE, 3), dtype=np.uint8)
    agree(bundle, Image.fromarray(pixels), SimulatedDriver())


@pytest.mark.slow
def test_the_bundled_model_says_the_same(tmp_path: Path) -> None:
    model = load_model(resolve_model(str(MODEL_FOLDER)))
    base = unpruned_plan("qwen2_vl", len(model.family.decoder().layers), model.geometry((336, 336)))
    schedule = Cut("decode", "dyrate", 0, options={"form": "schedule", "steps": [1, 3], "shares": [0.5, 0.25]})
    plan = ranked_plan(base, [base.geometry.tokens // 3] * base.layers).with_cuts(schedule)
    bundle = export_bundle(model, plan, tmp_path / "bundle", lowering=JETPACK)
    prepare(bundle, ProfileLimits(context=600, turn=256, images=2))
    pixels = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    agree(bundle, Image.fromarray(pixels), SimulatedDriver())


def test_a_step_is_one_launch(make: Make, tiny_image: Image.Image) -> None:
    driver = SimulatedDriver()
    stream = on_device(make("live classes"), driver).stream(tiny_image, PROMPT, max_tokens=12)
    parts = [next(stream) for _ in range(3)]  # a prefill, and the steps by hand that come before the capture
    before = len(driver.calls)
    parts += list(stream)
    assert driver.calls[before:] == [("launch",), ("synchronize",)] * 9
    assert stream.receipt.launches == stream.receipt.to_dict()["launches"] == {"by hand": 2, "graph": 9}


def test_a_step_by_hand_copies_no_rows(make: Make, tiny_image: Image.Image) -> None:
    driver = SimulatedDriver()
    stream = on_device(make("none"), driver).stream(tiny_image, PROMPT, max_tokens=2)
    next(stream)
    before = len(driver.calls)
    "".join(stream)
    (table, *step) = [call[0] for call in driver.calls[before:]]  # the kernel's table is that of these caches
    assert table == "upload" and step == ["upload", "execute", "kernel", "download", "synchronize"]


def test_the_next_conversation_launches_the_same_graphs(make: Make, tiny_image: Image.Image) -> None:
    runtime = on_device(make("everything"), SimulatedDriver())
    counts = [runtime.generate(tiny_image, PROMPT, max_tokens=6).receipt.launches for _ in range(3)]
    assert counts == [{"by hand": 2, "graph": 3}, {"graph": 5}, {"graph": 5}]


def test_a_capacity_that_is_outgrown_is_followed_by_the_next(make: Make, tiny_image: Image.Image) -> None:
    bundle, driver = make("cache, schedule"), SimulatedDriver()
    prompt = PROMPT + " Now." * 40
    expected = load(bundle.path).generate(tiny_image, prompt, max_tokens=2 * CAPACITY)
    runtime = on_device(bundle, driver)
    answer = runtime.generate(tiny_image, prompt, max_tokens=2 * CAPACITY)
    assert answer.text == expected.text and answer.receipt.kv_bytes == expected.receipt.kv_bytes
    steps = answer.receipt.generated_tokens - 1
    assert steps > CAPACITY, "the answer is long enough to outgrow a capacity"
    captured = answer.receipt.launches["by hand"]  # two for each capacity
    assert captured in (4, 6) and answer.receipt.launches["graph"] == steps - captured
    assert [capacity_for(rows) for rows in (1, CAPACITY - 1, CAPACITY)] == [CAPACITY, CAPACITY, 2 * CAPACITY]


def test_rows_that_are_not_real_are_zeroed(make: Make, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimulatedDriver()
    runtime = on_device(make("none"), driver)
    monkeypatch.setattr(driver, "zero", lambda *_: None)  # memory that is not set is full of what is no number
    with pytest.raises(EdgePruneError, match="not numbers"):
        runtime.generate(tiny_image, PROMPT, max_tokens=4)


@pytest.mark.parametrize(
    "failing",
    [
        "cudaGraphInstantiate",
        "cuModuleLoadData",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("cudaStreamEndCapture", "cudaStreamBeginCapture")),
    ],
)
def test_steps_go_on_by_hand_where_capture_fails(make: Make, failing: str, tiny_image: Image.Image) -> None:
    bundle = make("everything")
    driver = SimulatedDriver(SimulatedCudart(failing={failing: 900}))
    runtime = on_device(bundle, driver)
    answers = [each.generate(tiny_image, PROMPT, max_tokens=6) for each in (load(bundle.path), runtime)]
    assert answers[0].text == answers[1].text
    assert answers[1].receipt.launches == {"by hand": 5}
    steps: Any = runtime._pipeline.backend
    assert failing in steps.why_by_hand
    steps.close()
    assert not driver.blocks and driver.closed


def test_nothing_is_captured_that_cuda_refuses(make: Make, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimulatedDriver()
    runtime = on_device(make("none"), driver)
    steps: Any = runtime._pipeline.backend._steps  # type: ignore[attr-defined]
    enqueue = steps._enqueue
    monkeypatch.setattr(steps, "_enqueue", lambda *given: (driver.allocate(256), enqueue(*given)))
    answer = runtime.generate(tiny_image, PROMPT, max_tokens=4)
    assert answer.receipt.launches == {"by hand": 3} and "cudaErrorStreamCaptureUnsupported (900)" in steps.failure


def test_graphs_are_captured_anew_when_scratch_memory_moves(make: Make, tiny_image: Image.Image) -> None:
    bundle, driver = make("evit"), SimulatedDriver()
    runtime = on_device(bundle, driver)
    expected = [load(bundle.path).generate(tiny_image, PROMPT, max_tokens=4, prune=prune).text for prune in (True, False)]
    receipts = []
    for prune in (True, False, True):  # the encoder without cuts is opened for the second, and needs more
        answer = runtime.generate(tiny_image, PROMPT, max_tokens=4, prune=prune)
        assert answer.text == expected[not prune]
        receipts.append(answer.receipt.launches)
    assert len(next(block for block in driver.blocks.values() if len(block) == SCRATCH["vision_unpruned.onnx"]))
    assert receipts[0] == receipts[1] == {"by hand": 2, "graph": 1}


def test_old_graphs_give_way(make: Make, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, driver = make("none"), SimulatedDriver()
    runtime: Any = on_device(bundle, driver)
    steps = runtime._pipeline.backend._steps
    del steps._free[2:]
    expected, chats = load(bundle.path).generate(tiny_image, PROMPT, max_tokens=4).text, []
    for _ in range(5):
        chats.append(runtime.chat())  # all are kept, so that every one has caches of its own
        assert "".join(chats[-1].ask(PROMPT, tiny_image, max_tokens=4)) == expected
        assert len(steps._places) <= 2 and len(driver.library.graphs) <= 2
    runtime._pipeline.backend.close()
    del chats
    gc.collect()
    assert not driver.blocks and driver.closed


def test_decoders_with_states_have_no_such_steps(tmp_path: Path) -> None:
    tiny: Any = import_module("tiny_lfm2_vl")
    model = load_model(resolve_model(str(tiny.folder(tmp_path))))
    plan: KeepPlan = unpruned_plan("lfm2_vl", len(model.family.decoder().layers), model.geometry(tiny.SIZE))
    bundle = export_bundle(model, plan, tmp_path / "bundle", lowering=JETPACK)
    prepare(bundle, ProfileLimits(context=600, turn=256))
    assert ROWS not in bundle.manifest.graphs[DECODER].inputs
    pixels = np.random.default_rng(0).integers(0, 256, (*tiny.SIZE, 3), dtype=np.uint8)
    runtimes = load(bundle.path), on_device(bundle, SimulatedDriver())
    answers = [each.generate(Image.fromarray(pixels), PROMPT, max_tokens=4) for each in runtimes]
    assert answers[0].text == answers[1].text and answers[1].receipt.launches == {}
