"""The examples and the README's code do what they say."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from repository import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import load_model, resolve_model
from edgeprune.cli import main
from edgeprune.tabletop.dataset import write_dataset


def run(*arguments: object) -> str:
    command = [sys.executable, *(str(argument) for argument in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_has_a_readme() -> None:
    folders = [path for path in (ROOT / "examples").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert folders
    assert all((folder / "README.md").is_file() for folder in folders)


def test_the_demo_asks_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # In this process, which may have traced the same decoder already.
    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "demo" / "demo.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "144 -> 36" in output and "✗" not in output
    with Image.open(tmp_path / "kept-label.png") as drawn:
        assert drawn.width > 700
    assert Bundle.load(tmp_path / "tabletop.bundle").plan.tokens_at_layer(0) == 36


def test_sampling_is_measured() -> None:
    def cells(text: str) -> list[list[str]]:
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]

    printed = cells(run("examples/sampling/sampling_time.py", "--vocabulary", 1000, "--tokens", 20))
    shown = cells((ROOT / "examples" / "sampling" / "README.md").read_text())
    assert [row[:2] for row in printed] == [row[:2] for row in shown]
    assert all(float(row[2]) <= float(row[3]) for row in printed[2:])


def test_the_picture_of_the_papers_shows_their_table(tmp_path: Path) -> None:
    module = runpy.run_path(str(ROOT / "examples" / "papers" / "draw.py"))
    table = module["table_of"]((ROOT / "docs" / "papers.md").read_text())
    with Image.open(ROOT / "docs" / "pareto.png") as kept:
        remedy = "python examples/papers/draw.py docs/papers.md docs/pareto.png"
        assert kept.info["Description"] == module["digest_of"](table), f"the table has changed: {remedy}"
    plans, columns = module["read_table"](table)
    shown = {"none", "plphp-30", "zspaprune-25", "fastv-50", "auto-25", "dyrate-map", "plphp-30-last-row", "random-cache-30"}
    assert shown <= set(plans)
    assert columns["read"][plans.index("none")] == 1.0 and columns["agreement"][plans.index("none")] is None
    module["draw"](plans, columns, tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.size == kept.size


@pytest.mark.slow
def test_providers_are_compared(tiny_bundle: Bundle, tmp_path: Path) -> None:
    sizes = tiny_bundle.plan.geometry
    write_dataset(tmp_path / "scenes", 3, 5000)
    for path in (tmp_path / "scenes" / "images").iterdir():
        with Image.open(path) as image:
            image.resize((sizes.width, sizes.height)).save(path)
    data = tmp_path / "scenes" / "dataset.jsonl"
    printed = run("examples/providers/compare.py", tiny_bundle.path, "--data", data, "--providers", "cpu", "cpu")
    assert printed.splitlines()[:2] == ["equal answers    3 of 3", "equal kept sets  3 of 3"]
    assert printed.splitlines()[2].startswith("differing tokens 0 of ")
    module = runpy.run_path(str(ROOT / "examples" / "providers" / "compare.py"))

    def answer(*kept: list[list[int]] | list[int]) -> SimpleNamespace:
        return SimpleNamespace(text="", receipt=SimpleNamespace(cuts=[SimpleNamespace(kept=np.array(each)) for each in kept]))

    one, other = answer([1, 2, 3], [[4, 5], [6, 7]]), answer([3, 2, 9], [[5, 4], [6, 8]])
    assert module["differing"](one, other) == (7, 2)
    assert module["report"]([(one, other), (one, one)]).splitlines()[1:] == ["equal kept sets  1 of 2", "differing tokens 2 of 14"]


@pytest.mark.slow
def test_ways_of_ranking_several_images_are_compared(tmp_path: Path) -> None:
    options = ("--methods", "fastv", "plphp")
    run("examples/several_images/overlap.py", tmp_path, *options, "--images", 2, "--scenes", 1)
    rows = json.loads((tmp_path / "overlap.json").read_text())
    assert [row["apart questions"] for row in rows] == [1.0, 1.0]
    assert all(row["apart"] < row["ahead"] and row["ahead questions"] < 0.6 for row in rows)
    write_dataset(tmp_path / "scenes", 1, 5)
    lines = [json.loads(line) for line in (tmp_path / "scenes" / "dataset.jsonl").read_text().splitlines()][:2]
    data = tmp_path / "scenes" / "pairs.jsonl"
    data.write_text("\n".join(json.dumps({**line, "image": [line["image"]] * 2}) for line in lines))
    run("examples/several_images/accuracy.py", tmp_path, *options, "--keep", 0.5, "--data", data)
    rows = json.loads((tmp_path / "accuracy.json").read_text())
    assert [row["turn"] != "" for row in rows] == [True, False]


@pytest.mark.slow
def test_training_runs_and_resumes(tmp_path: Path) -> None:
    command = ("examples/train_tabletop/train.py", tmp_path, "--rows", 2, "--pairs", 1, "--threads", 1, "--scenes", 16)
    run(*command, "--minutes", 0.02, "--tower-minutes", 0.01)
    output = run(*command, "--minutes", 0.03, "--tower-minutes", 0.01)
    assert "resumed at step" in output
    assert load_model(resolve_model(str(tmp_path))).geometry(None).tokens == 144


@pytest.mark.slow
def test_sizes_are_measured_and_memory_stays_flat(tmp_path: Path) -> None:
    # In a small process: a child's peak memory is not below what its parent had.
    output = run(
        "-c",
        "import runpy, json, dataclasses, pathlib;"
        "script = runpy.run_path('examples/sizes/sizes.py');"
        "script['SIZES']['test'] = script['Size'](640, 640, 3, 10, 2, 151936, False, 1, 64, 2);"
        f"print(json.dumps(dataclasses.asdict(script['measured']('test', 'int8', pathlib.Path({str(tmp_path)!r})))))",
    )
    row = json.loads(output)
    assert row["checkpoint"] > 0.39  # 0.8 GB in float32, beside the 1.2 GB that torch and transformers take
    assert 0.5 < row["memory"] < 1.6
    assert list(tmp_path.iterdir()) == []


def test_the_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, scenes = tmp_path / "table.bundle", tmp_path / "scenes"
    pruned = ["--method", "uniform", "--keep", "0.5"]
    for command in (["export", "tabletop", "-o", str(bundle), *pruned], ["tabletop", str(scenes), "--scenes", "1"]):
        assert CliRunner().invoke(main, command).exit_code == 0
    (scenes / "images" / "000000.png").rename(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:  # one after the other, as a reader would try them
        exec(compile(block, "README.md", "exec"), names)


def markdown(folder: str) -> list[Path]:
    pattern = "*.md" if folder == "." else "**/*.md"
    return list((ROOT / folder).glob(pattern))


@pytest.mark.parametrize(
    "page", sorted(str(path.relative_to(ROOT)) for folder in (".", "docs", "examples", "edgeprune") for path in markdown(folder))
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_table_of_families_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / "families" / "table.py"), run_name="__main__")
    assert ended.value.code == 0, ended.value.code


@pytest.mark.parametrize("shape", ["tiny", "tiny-smolvlm"])
def test_the_shapes_beside_peers_are_checkpoints(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "peers"))
    peers, writing = import_module("peers"), import_module("shapes.checkpoint")
    form, whole, alone = peers.SHAPES[shape], tmp_path / "whole", tmp_path / "alone"
    writing.write_checkpoint(form, whole)
    writing.write_for_transformers_4(form, whole, tmp_path / "older")
    writing.write_decoder_alone(form, whole, alone)
    decoder, told = AutoModelForCausalLM.from_pretrained(alone, output_loading_info=True)
    assert decoder.config.num_hidden_layers == form.layers
    assert not any(told[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    model = load_model(resolve_model(str(whole)))
    geometry = model.geometry((form.side, form.side))
    image, tokenizer = model.family.image_text(geometry), AutoTokenizer.from_pretrained(whole)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": peers.PROMPT}]}]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).replace(image.placeholder, image.text)
    tokens = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert len(tokens) - tokens.count(image.token) + geometry.tokens == peers.TEXT + form.entering
