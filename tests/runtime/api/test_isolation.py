"""The runtime needs neither torch nor transformers, and the command line starts light. In subprocesses: pytest has both."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgeprune.bundle import Bundle

HEAVY = {"torch", "transformers", "optimum", "onnx", "onnxscript", "safetensors"}


def loaded_after(code: str) -> set[str]:
    """Return the top-level modules that are loaded after running code in a fresh interpreter."""
    report = "\nimport sys; print('MODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-I", "-c", code + report]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(output.split("MODULES ")[1].split())


@pytest.mark.parametrize(
    "module",
    [
        "runtime",
        "runtime.backends.tensorrt.backend",
        "runtime.backends.tensorrt.build",
        "device.doctor",
        "bundle",
        "plan",
        "registry",
        "targets",
        "tabletop.dataset",
        "calibration.evaluation",
    ],
)
def test_importing_stays_torch_free(module: str) -> None:
    assert not loaded_after(f"import edgeprune.{module}") & HEAVY


def test_answering_stays_torch_free(tiny_bundle: Bundle) -> None:
    code = f"""
import numpy, edgeprune.runtime
model = edgeprune.runtime.load({str(tiny_bundle.path)!r})
answer = model.generate(numpy.zeros((84, 112, 3), numpy.uint8), "What is it?", max_tokens=3)
assert answer.receipt.pruned
"""
    modules = loaded_after(code)
    assert "onnxruntime" in modules
    assert not modules & HEAVY


def test_help_loads_nothing_heavy() -> None:
    modules = loaded_after("from edgeprune.cli import main\nmain(['--help'], standalone_mode=False)")
    assert not modules & (HEAVY | {"onnxruntime", "numpy", "PIL", "rich", "tokenizers"})
