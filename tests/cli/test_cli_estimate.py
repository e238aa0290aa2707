"""The command estimate: its verdict, its tables, its JSON, bundles and models, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.cli.output.estimate import verdict
from edgeprune.device.jetson import module_named
from edgeprune.device.roofline import estimate
from edgeprune.device.workload import PRECISIONS, workload_of

FASTV = ("--image-size", "84x112", "--method", "fastv", "--keep", "0.5", "--layer", "1", "--keep", "0.25", "--layer", "2")


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


def test_the_verdict_comes_first(tiny_bundle: Bundle) -> None:
    verdict, note, *_ = call(tiny_bundle.path, "--device", "orin-nano").output.splitlines()
    times = r"First token [\d.]+ to [\d.]+ ms, then [\d.]+ to [\d.]+ ms a token\."
    assert re.fullmatch(rf"Fits in 8 GiB: about 1\.5 GB at peak\. {times}", verdict)
    assert "not a measurement" in note
    assert data(tiny_bundle, "--device", "orin-nano")["verdict"] == verdict


@pytest.mark.parametrize(
    ("parameters", "precision", "said"),
    [
        (1_500_000_000, "fp16", "Fits in 8 GiB: about 4.5 GB at peak. First token"),
        (
            2_500_000_000,
            "fp16",
            "May fit in 8 GiB: about 6.5 GB at peak, and the system takes 1.0 to 2.5 GB. "
            "With --precision int8 it fits: about 4.0 GB. First token",
        ),
        (4_500_000_000, "bf16", "Does not fit in 8 GiB: about 10.5 GB at peak. With --precision int4 it fits: about 3.8 GB. First"),
        (4_500_000_000, "fp16", "Does not fit in 8 GiB: about 10.5 GB at peak. With --precision int4 it fits: about 3.8 GB. First"),
        (8_000_000_000, "fp16", "Does not fit in 8 GiB: about 17.5 GB at peak. With --precision int4 it may: about 5.6 GB. First"),
        (30_000_000_000, "fp16", "Does not fit in 8 GiB: about 61.5 GB at peak. First token"),
        (30_000_000_000, "int4", "Does not fit in 8 GiB: about 17.0 GB at peak. First token"),
    ],
)
def test_what_does_not_fit_has_a_remedy_if_there_is_one(tiny_bundle: Bundle, parameters: int, precision: str, said: str) -> None:
    work = workload_of(tiny_bundle, text_tokens=7, generated=5, precision=precision)
    work = replace(work, decoder=replace(work.decoder, parameters=parameters))
    module = module_named("orin-nano")
    assert verdict(work, module, estimate(work, module)).startswith(said)
    if "With --precision" in said:
        named = said.split("--precision ")[1].split()[0]
        narrower = estimate(replace(work, precision=PRECISIONS[named]), module).memory
        assert narrower.fits == ("yes" if "it fits" in said else "perhaps")


def test_a_model_is_estimated_as_its_bundle_is(tiny_folder: Path, tiny_bundle: Bundle) -> None:
    expected = data(tiny_bundle, "--device", "thor")
    result = call(tiny_folder, "--device", "thor", "--json", *FASTV)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found.pop("bundle_precision") is None and expected.pop("bundle_precision") == "fp32"
    assert found == expected
    text = call(tiny_folder, "--device", "thor", "--precision", "int4", *FASTV).output
    assert text.startswith("Fits in 128 GiB") and re.search(r"precision +int4\n", text)


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--revision", "main"), "its model is frozen in"),
        (("--adapter", "lora"), "its model is frozen in"),
        (("--method", "fastv", "--keep", "0.5"), "its plan is frozen in"),
        (("--image-size", "448x448"), "its plan is frozen in"),
    ],
)
def test_a_bundle_has_its_model_and_plan(tiny_bundle: Bundle, arguments: tuple[str, ...], said: str) -> None:
    result = call(tiny_bundle.path, "--device", "thor", *arguments)
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing",), "There is no model folder nothing"),
        (("tabletop", "--method", "fastv"), "--method and --keep belong together"),
        (("tabletop", "--method", "fastv", "--keep", "0.5", "--layer", "99"), "beyond the model's 8 layers"),
        (("tabletop", "--image-size", "100x100"), "does not divide into"),
        (("tabletop", "--device", "toaster"), "Unknown device 'toaster'"),
    ],
)
def test_mistakes_about_models_are_those_of_export(arguments: tuple[str, ...], said: str) -> None:
    result = call("--device", "thor", *arguments)
    assert result.exit_code == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_broken_graph_is_named(altered_bundle: Path) -> None:
    (altered_bundle / "onnx" / "decoder.onnx").write_bytes(b"nothing")
    result = call(altered_bundle, "--device", "orin-nano")
    assert result.exit_code == 1 and "decoder.onnx" in result.stderr


def test_help_lists_the_options() -> None:
    output = call("--help").output
    assert all(option in output for option in ("--device", "--text-tokens", "--tokens", "--precision", "--keep", "--json"))
