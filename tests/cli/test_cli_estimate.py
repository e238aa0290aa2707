"""The command estimate: its tables, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgeprune.bundle import Bundle
from edgeprune.cli import main


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["estimate", *(str(argument) for argument in arguments)])


def data(bundle: Bundle, *arguments: object) -> dict[str, Any]:
    result = call(bundle.path, *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_stages_and_memory_are_shown(tiny_bundle: Bundle) -> None:
    result = call(tiny_bundle.path, "--device", "orin-nano")
    assert result.exit_code == 0, result.output
    for shown in ("Orin Nano 8GB", "102 GB/s", "vision encoder", "prefill", "first token", "decode, a token", "launches"):
        assert shown in result.output
    for shown in ("weights", "KV cache", "at peak", "file cache", "8 GiB", "not a measurement", "docs/roofline.md"):
        assert shown in result.output
    assert "fp16, assumed: the bundle is fp32" in result.output
    assert "selection" not in result.output  # the plan cuts between layers


def test_json_has_the_plan_beside_no_pruning(tiny_bundle: Bundle) -> None:
    found = data(tiny_bundle, "--device", "orin-nano", "--text-tokens", 9, "--tokens", 5)
    assert found["device"] == "orin-nano" and (found["precision"], found["bundle_precision"]) == ("fp16", "fp32")
    assert (found["visual_tokens"], found["text_tokens"], found["tokens"]) == (12, 9, 5)
    pruned, whole = found["pruned"], found["unpruned"]
    assert [stage["name"] for stage in pruned["stages"]] == ["vision encoder", "prefill", "decode"]
    assert pruned["stages"][0] == whole["stages"][0]
    for end in ("low", "high"):
        assert pruned["ttft_ms"][end] <= whole["ttft_ms"][end]
        assert pruned["token_ms"][end] <= whole["token_ms"][end]
    assert pruned["memory"]["kv"] == 2 * 2 * 8 * 2 * (12 + 6 + 3 + 3 * (9 + 5))
    assert whole["memory"]["kv"] == 2 * 2 * 8 * 2 * 3 * (12 + 9 + 5)
    assert pruned["memory"]["fits"] == "yes"


def test_precisions_weigh_differently(tiny_bundle: Bundle) -> None:
    weights = [
        data(tiny_bundle, "--device", "thor", "--precision", precision)["pruned"]["memory"]["weights"]
        for precision in ("fp32", "fp16", "int8", "int4")
    ]
    assert weights == sorted(weights, reverse=True) and weights[0] == 2 * weights[1]
    result = call(tiny_bundle.path, "--device", "thor", "--precision", "fp32")
    assert "assumed" not in result.output


def test_a_lowered_bundle_keeps_its_precision(altered_bundle: Path) -> None:
    manifest = altered_bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"precision": "fp32"', '"precision": "int4"'))
    result = call(altered_bundle, "--device", "orin-nx")
    assert "int4" in result.output and "assumed" not in result.output
    assert "int8, assumed: the bundle is int4" in call(altered_bundle, "--device", "orin-nx", "--precision", "int8").output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "toaster"), "orin-nano, orin-nano-25w"),
        (("--device", "thor", "--tokens", 0), "at least one token"),
        (("--device", "thor", "--text-tokens", -1), "at least one token"),
        (("--device", "thor", "--precision", "int2"), "int2"),
        ((), "--device"),
    ],
)
def test_mistakes_are_named(tiny_bundle: Bundle, arguments: tuple[object, ...], said: str) -> None:
    result = call(tiny_bundle.path, *arguments)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.output


def test_a_broken_graph_is_named(altered_bundle: Path) -> None:
    (altered_bundle / "onnx" / "decoder.onnx").write_bytes(b"nothing")
    result = call(altered_bundle, "--device", "orin-nano")
    assert result.exit_code == 1 and "decoder.onnx" in result.stderr


def test_help_lists_the_options() -> None:
    output = call("--help").output
    assert all(option in output for option in ("--device", "--text-tokens", "--tokens", "--precision", "--json"))
