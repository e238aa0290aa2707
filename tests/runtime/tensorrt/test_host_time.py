"""What a decode step costs the host, measured with TensorRT and CUDA that do nothing: calls, and CPU time a token.

`pytest tests/runtime/tensorrt/test_host_time.py -s` prints the numbers of a decoder of 28 layers.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from idle_device import idle_driver, idle_tensorrt
from PIL import Image
from simulated_device import ORIN, SECRET, prepare
from tiny_models import TINY_GEOMETRY, model_folder, qwen2_vl_config

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import Cut
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import Runtime
from edgeprune.runtime.api.loading import runtime_on
from edgeprune.runtime.backends.tensorrt.backend import TensorRTBackend
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits
from edgeprune.runtime.backends.tensorrt.store import Store
from edgeprune.targets import TARGETS, Lowering

LAYERS, TOKENS, PROMPT = 28, 200, "What colour is the cube?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from transformers import Qwen2VLForConditionalGeneration

    config = qwen2_vl_config({"num_hidden_layers": LAYERS})
    model = load_model(resolve_model(str(model_folder(tmp_path_factory.mktemp("deep"), Qwen2VLForConditionalGeneration, config))))
    plan = unpruned_plan("qwen2_vl", LAYERS, TINY_GEOMETRY).with_cuts(Cut("layer", "fastv", 6, layer=4))
    made = export_bundle(model, plan, tmp_path_factory.mktemp("host") / "bundle", lowering=Lowering(TARGETS["jetpack6"], "fp32"))
    prepare(made, ProfileLimits(context=1024))
    return made


def test_a_token_takes_few_calls_and_little_time(bundle: Bundle, tiny_image: Image.Image) -> None:
    driver, calls = idle_driver()
    backend = TensorRTBackend(bundle, idle_tensorrt(calls), driver, Store(bundle.path, SECRET), ORIN)
    runtime = Runtime(replace(runtime_on(bundle, backend)._pipeline, eos_token_ids=()))
    times = []
    for _ in range(3):
        stream = runtime.stream(tiny_image, PROMPT, max_tokens=TOKENS)
        for _ in range(20):
            next(stream)
        before, started = Counter(calls), time.thread_time()
        for _ in range(100):
            next(stream)
        print(stream.receipt.launches)
        times.append((time.thread_time() - started) * 10)
        made = Counter({name: count / 100 for name, count in (calls - before).items()})
        "".join(stream)
    print(f"\n{sum(made.values()):.2f} calls and {min(times):.3f} ms of CPU a token: {dict(made)}")
