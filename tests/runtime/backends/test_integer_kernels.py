"""ONNX Runtime's products of integers against NumPy's, on whatever processor this is: `make test-arm` asks those of ARM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from edgeprune.runtime.backends.interface import CPU
from edgeprune.runtime.backends.onnxruntime import _session_options

ROWS, INPUTS, OUTPUTS = 145, 768, 64
RNG = np.random.default_rng(2)


def run(
    op: str,
    feeds: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    *,
    domain: str = "",
    **attributes: Any,
) -> list[Any]:
    """Run one node on the feeds and then the weights, as the runtime runs bundles of target "cpu"."""
    node = helper.make_node(op, [*feeds, *weights], list(outputs), domain=domain, **attributes)
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for name, x in feeds.items()]
    kept = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], op, inputs, [onnx.ValueInfoProto(name=name) for name in outputs], kept)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = _session_options(1, [CPU], exact=False, integers=True)
    answer: list[Any] = onnxruntime.InferenceSession(model, options, providers=[CPU]).run(None, dict(feeds))
    return answer


def test_products_of_bytes_are_exact() -> None:
    left = RNG.integers(0, 256, (ROWS, INPUTS), np.uint8)
    left[:5] = 255
    right = RNG.integers(-128, 128, (INPUTS, OUTPUTS), np.int8)
    right[:, :4] = -128
    zero = np.array(117, np.uint8)
    (product,) = run("MatMulInteger", {"a": left}, {"b": right, "z": zero}, ["y"])
    np.testing.assert_array_equal(product, (left.astype(np.int64) - 117) @ right.astype(np.int64))


def test_products_of_bytes_in_a_scan_are_exact_if_it_owns_the_weights() -> None:
    left = RNG.integers(200, 256, (3, ROWS, INPUTS), np.uint8)
    right = RNG.choice(np.array([127, -128, 100], np.int8), (INPUTS, OUTPUTS))
    entry, product = (
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), [ROWS, width])
        for name, kind, width in (("row", np.uint8, INPUTS), ("sum", np.int32, OUTPUTS))
    )
    multiply = helper.make_node("MatMulInteger", ["row", "b"], ["sum"])
    body = helper.make_graph([multiply], "body", [entry], [product], [numpy_helper.from_array(right, "b")])
    (sums,) = run("Scan", {"a": left}, {}, ["y"], body=body, num_scan_inputs=1)
    np.testing.assert_array_equal(sums, left.astype(np.int64) @ right.astype(np.int64))


def test_states_are_rounded_to_bytes_as_onnx_says() -> None:
    state = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
    state[3] *= 50
    rounded, scale, zero = run("DynamicQuantizeLinear", {"x": state}, {}, ["q", "s", "z"])
    expected = (state.max() - state.min()) / np.float32(255)
    assert scale == pytest.approx(expected, rel=2e-7)
    assert zero == np.rint(-state.min() / scale)
    np.testing.assert_array_equal(rounded, np.clip(np.rint(state / scale) + zero, 0, 255))


def test_int4_products_round_the_state_to_8_bits_by_blocks_or_by_rows() -> None:
    # On ARM ONNX Runtime takes KleidiAI's kernels, which are less exact (docs/cpu.md).
    state = RNG.standard_normal((ROWS, INPUTS)).astype(np.float32)
    bytes_ = RNG.integers(0, 256, (OUTPUTS, INPUTS // 128, 64), np.uint8)
    scales = RNG.random(OUTPUTS * INPUTS // 128).astype(np.float32)
    shape: dict[str, Any] = {"K": INPUTS, "N": OUTPUTS, "bits": 4, "block_size": 128, "domain": "com.microsoft"}
    product, reference = (
        run("MatMulNBits", {"x": state}, {"b": bytes_, "s": scales}, ["y"], accuracy_level=level, **shape)[0] for level in (4, 1)
    )
    error = float(np.sqrt(((product - reference) ** 2).mean() / (reference**2).mean()))
    print(f"int4 products differ from those of float32 states by {error:.4f} (root of the mean square)")
    assert 0.004 < error < 0.012
