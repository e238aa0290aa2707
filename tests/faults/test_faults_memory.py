"""Memory that runs out while an answer is made: said in one line, and everybody goes on."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.errors import EngineError
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends import onnxruntime as ort
from edgeprune.runtime.backends import onnxruntime_steps

PROMPT = "What colour is the cube?"
ERRORS: list[Exception] = [
    RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 9"),
    RuntimeError("[ONNXRuntimeError] : 1 : FAIL : std::bad_alloc"),
    MemoryError(),
]


@pytest.fixture
def runtime(tiny_bundle: Bundle) -> Runtime:
    return load(tiny_bundle.path, threads=1, cache_bytes=0)


def fail_at(monkeypatch: pytest.MonkeyPatch, at: int, error: Exception) -> None:
    """Have the run of a graph that comes `at` next fail."""
    whole, runs = onnxruntime_steps.run, list[int]()

    def run(*given: Any, **named: Any) -> Any:
        runs.append(1)
        if len(runs) == at + 1:
            raise error
        return whole(*given, **named)

    monkeypatch.setattr(ort, "run", run)


@pytest.mark.parametrize("error", ERRORS, ids=["arena", "bad_alloc", "numpy"])
@pytest.mark.parametrize("at", [0, 1, 2, 4])  # the vision encoder, prefill, decode steps
def test_an_answer_without_memory_ends_alone(
    at: int, error: Exception, runtime: Runtime, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = runtime.generate(tiny_image, PROMPT, max_tokens=8).text
    other, chat = runtime.stream(tiny_image, PROMPT, max_tokens=8), runtime.chat()
    said = next(other)
    with monkeypatch.context() as patched:
        fail_at(patched, at, error)
        stream = chat.ask(PROMPT, tiny_image, max_tokens=8)
        with pytest.raises(EngineError, match="Memory ran out in the"):
            list(stream)
        assert stream.receipt.finish_reason == "error"
    assert said + "".join(other) == expected
    again = chat.ask(PROMPT, tiny_image, max_tokens=8)
    assert "".join(again) == again.text and again.receipt.finish_reason in ("end", "length")
    assert runtime.generate(tiny_image, PROMPT, max_tokens=8).text == expected


def test_other_errors_stay_what_they_are(runtime: Runtime, tiny_image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 1, RuntimeError("another"))
    with pytest.raises(RuntimeError, match="another"):
        runtime.generate(tiny_image, PROMPT)
