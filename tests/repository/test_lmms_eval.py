"""examples/lmms_eval: bundles under lmms-eval, in its own process and through `edgeprune serve`, beside `edgeprune eval`.

The slow tests run the genuine lmms-eval, which `make lmms-eval` installs into an environment of its own.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from loopback import free_port
from PIL import Image
from repository import ROOT

from edgeprune.cli import main
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime import load

EXAMPLE = ROOT / "examples" / "lmms_eval"
PYTHON = ROOT / "build" / "lmms-eval" / "bin" / "python"
NAME = "fastv @ layer 2 keep 72/144"
MODEL = "edgeprune_lmms_eval.model"


def test_the_entry_point_names_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    [(group, points)] = toml.loads((EXAMPLE / "pyproject.toml").read_text())["project"]["entry-points"].items()
    assert group == "lmms_eval.models"  # ModelRegistryV2.load_entrypoint_manifests of lmms-eval 0.7.3
    module, _, function = points["edgeprune"].partition(":")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", SimpleNamespace(ModelManifest=dict))
    monkeypatch.setitem(sys.modules, "lmms_eval.models", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lmms_eval", SimpleNamespace())
    assert getattr(import_module(module), function)() == {"model_id": "edgeprune", "chat_class_path": f"{MODEL}.EdgePrune"}


@pytest.fixture
def translation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return import_module("edgeprune_lmms_eval.translation")


def test_tasks_are_greedy_unless_they_sample(translation: ModuleType) -> None:
    options = translation.answer_options
    assert options({}) == {"temperature": 0.0, "max_tokens": 1024, "stop": []}
    assert options({"do_sample": False, "temperature": 0.7, "top_p": 0.0, "top_k": 5}) == options({})
    assert options({"temperature": 0.0, "top_p": 1.0, "num_beams": 1, "image_aspect_ratio": "pad", "seed": 4}) == options({})
    assert options({"do_sample": True}) == options({}) | {"temperature": 1.0}
    assert options({"temperature": 0.7, "top_p": 0.9, "seed": 4}) == options({}) | {"temperature": 0.7, "top_p": 0.9, "seed": 4}
    assert options({"repetition_penalty": 1.2})["repetition_penalty"] == 1.2


def test_tasks_limit_and_end_answers(translation: ModuleType) -> None:
    options = translation.answer_options
    assert options({"max_new_tokens": 16})["max_tokens"] == 16
    assert options({"until": ["Q:", "", "\n\n"]})["stop"] == ["Q:", "\n\n"]
    assert options({"until": "Q:"})["stop"] == ["Q:"]
    assert options({"until": None})["stop"] == []


@pytest.mark.parametrize("setting", [{"num_beams": 5}, {"n": 2}, {"stop_sequences": ["\n"]}])
def test_settings_without_a_counterpart_are_refused(translation: ModuleType, setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(setting))):
        translation.answer_options(setting)


def test_pictures_and_texts_keep_their_order(translation: ModuleType) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    parts = [{"type": "image", "url": second}, {"type": "text", "text": "or"}, {"type": "image", "url": first}]
    said = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    file = {"type": "image", "url": "a.png"}
    asked, answer, last = translation.turns([{"role": "user", "content": parts}, said, {"role": "user", "content": [file]}])
    assert [asked.text[0], *asked.text[1:]] == [second, "or", first]
    assert (answer.role, answer.text, last.text) == ("assistant", ["Yes."], [Path("a.png")])
    with pytest.raises(UsageError, match="has video"):
        translation.turns([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


def test_a_plan_is_named_by_methods_and_budgets(translation: ModuleType, tiny_plan: KeepPlan) -> None:
    assert translation.plan_name(tiny_plan) == "fastv @ layer 1 keep 6/12; random @ layer 2 keep 3/12"
    unpruned = unpruned_plan("qwen2_vl", 3, tiny_plan.geometry)
    assert translation.plan_name(unpruned) == "no pruning"
    assert translation.plan_name(unpruned.with_cuts(*cache_cuts(3, [6, 4, 4]))) == "plphp @ cache 0 to 2 keep 4 to 6/12"


def cache_cuts(layers: int, keeps: list[int]) -> list[Any]:
    from edgeprune.plan import Cut

    return [Cut("cache", "plphp", keep, layer) for layer, keep in zip(range(layers), keeps, strict=True)]


def test_without_a_server_there_is_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLE / "served.py"),
        "--url",
        f"http://127.0.0.1:{free_port()}",
        "--output_path",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("No server of EdgePrune answers") and "edgeprune serve" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_questions_without_an_answer_are_not_scored(tmp_path: Path) -> None:
    check = runpy.run_path(str(EXAMPLE / "served.py"))["check_answers"]
    result, samples = tmp_path / "1_results.json", tmp_path / "1_samples_tabletop.jsonl"
    result.write_text("{}")
    samples.write_text('{"resps": "yes"}\n{"resps": "no"}\n')
    (tmp_path / "0_samples_tabletop.jsonl").write_text("[LMMS_EVAL_REQUEST_FAILED after 5 retries] of another run\n")
    check(result)
    assert result.exists()
    samples.write_text('{"resps": "yes"}\n{"resps": "[LMMS_EVAL_REQUEST_FAILED after 5 retries] Error code: 400 - too wide"}\n')
    with pytest.raises(SystemExit, match=r"1 of 2 questions were not answered .*1_failed\.json.*Error code: 400 - too wide"):
        check(result)
    assert not result.exists()


# With lmms-eval itself


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, kept_traces: None) -> Path:
    """Return a folder with a bundle, scenes, pairs of scenes, and what `edgeprune eval` predicts and reports of both."""
    if not PYTHON.exists():
        pytest.skip("lmms-eval is not installed: make lmms-eval")
    folder = tmp_path_factory.mktemp("lmms-eval")
    commands = (
        ("tabletop", folder / "scenes", "--scenes", 3),
        ("tabletop", folder / "pairs", "--scenes", 2, "--images", 2),
        ("export", "tabletop", "-o", folder / "table.bundle", "--method", "fastv", "--keep", 0.5),
    )
    for command in commands:
        edgeprune(*command)
    for data in ("scenes", "pairs"):
        options = ("--data", folder / data / "dataset.jsonl", "--metric", "exact", "--predictions", folder / f"{data}.jsonl")
        (folder / f"{data}.json").write_text(edgeprune("eval", folder / "table.bundle", *options, "--json"))
    return folder


def edgeprune(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def run(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    caches = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [str(PYTHON), *(str(word) for word in command)]
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=os.environ | caches)


def lmms_eval(work: Path, out: str, *options: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return the result and, by task, the samples of a run of the model edgeprune."""
    tasks = ("--include_path", EXAMPLE / "tasks", "--log_samples", "--output_path", out)
    done = run(work, "-m", "lmms_eval", "--model", "edgeprune", *tasks, *options)
    assert done.returncode == 0 and (work / out).exists(), done.stdout + done.stderr
    return written(work / out)


def written(out: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    [result] = out.glob("*/*_results.json")
    stem = result.name.removesuffix("_results.json")
    samples = {
        path.stem.removeprefix(f"{stem}_samples_"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in out.glob("*/*_samples_*.jsonl")
    }
    return json.loads(result.read_text()), samples


def predicted(work: Path, data: str, variant: str) -> list[str]:
    lines = [json.loads(line) for line in (work / f"{data}.jsonl").read_text().splitlines()]
    return [line[variant]["text"] for line in lines]


def accuracy(work: Path, data: str, variant: str) -> float:
    return float(json.loads((work / f"{data}.json").read_text())["kinds"]["all"][variant])


def said(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: int(sample["doc_id"]))]


@pytest.mark.slow
def test_lmms_eval_scores_as_edgeprune_does(work: Path) -> None:
    result, samples = lmms_eval(work, "pruned", "--model_args", "pretrained=table.bundle", "--tasks", "tabletop,tabletop_pairs")
    assert result["config"]["model_backend"] == f"{MODEL}.EdgePrune[{NAME}] (chat)"
    assert (result["model_source"], result["model_name"]) == ("edgeprune", "table.bundle")
    assert result["throughput"]["avg_visual_kv_share"] == pytest.approx(0.625)  # 2 of 8 layers have all tokens, 6 have half
    for task, data in (("tabletop", "scenes"), ("tabletop_pairs", "pairs")):
        assert said(samples[task]) == predicted(work, data, "pruned")
        assert result["results"][task]["exact_match,none"] == pytest.approx(accuracy(work, data, "pruned"))
    # The order of the pictures is seen in the answers.
    questions = [json.loads(line) for line in (work / "pairs" / "dataset.jsonl").read_text().splitlines()]
    with load(work / "table.bundle") as model:
        swapped = [model.generate([work / "pairs" / name for name in q["image"][::-1]], q["prompt"]).text for q in questions]
    assert swapped != said(samples["tabletop_pairs"])


@pytest.mark.slow
def test_lmms_eval_answers_without_pruning(work: Path) -> None:
    result, samples = lmms_eval(work, "unpruned", "--model_args", "pretrained=table.bundle,prune=false", "--tasks", "tabletop")
    assert result["config"]["model_backend"] == f"{MODEL}.EdgePrune[no pruning] (chat)"
    assert said(samples["tabletop"]) == predicted(work, "scenes", "unpruned") != predicted(work, "scenes", "pruned")
    assert result["results"]["tabletop"]["exact_match,none"] == pytest.approx(accuracy(work, "scenes", "unpruned"))


@pytest.mark.slow
def test_lmms_eval_limits_and_ends_answers(work: Path) -> None:
    settings = ("--gen_kwargs", "max_new_tokens=3,until=be,temperature=5")  # do_sample is false in the task
    _, samples = lmms_eval(work, "short", "--model_args", "pretrained=table.bundle", "--tasks", "tabletop", *settings)
    questions = [json.loads(line) for line in (work / "scenes" / "dataset.jsonl").read_text().splitlines()]
    with load(work / "table.bundle") as model:
        answers = [model.generate(work / "scenes" / q["image"], q["prompt"], max_tokens=3, stop=["be"]) for q in questions]
    assert said(samples["tabletop"]) == [answer.text.strip() for answer in answers]
    counted = [sample["token_counts"][0]["output_tokens"] for sample in samples["tabletop"]]
    assert counted == [answer.receipt.generated_tokens for answer in answers] and max(counted) == 3
    assert {answer.receipt.finish_reason for answer in answers} == {"end", "length", "stop"}


REFUSALS = """
import os
from edgeprune_lmms_eval.model import EdgePrune
from lmms_eval.api.instance import Instance

def refused(call, *arguments):
    try:
        call(*arguments)
    except SystemExit as error:
        print(error.code)

for arguments in ("", "pretrained=no.bundle", "pretrained=table.bundle,keep=0.5", "pretrained=table.bundle,prune=2"):
    refused(EdgePrune.create_from_arg_string, arguments, {"batch_size": "1"})
for more in ({"batch_size": "8"}, {"device": "cuda"}):
    refused(EdgePrune.create_from_arg_string, "pretrained=table.bundle", more)
model = EdgePrune("table.bundle")
task = Instance("loglikelihood", (), 0, {"task": "mmmu", "doc_id": 0, "repeats": 1})
refused(model.loglikelihood, [task])
refused(model.generate_until_multi_round, [task])
os.environ["WORLD_SIZE"] = "2"
refused(EdgePrune, "table.bundle")
"""


@pytest.mark.slow
def test_the_model_refuses_in_one_line(work: Path) -> None:
    done = run(work, "-c", REFUSALS)
    assert done.returncode == 0, done.stderr
    expected = (
        "edgeprune: No bundle is named. Name it: --model_args pretrained=table.bundle",
        "edgeprune: There is no bundle at no.bundle. Make one with: edgeprune export MODEL -o no.bundle",
        "edgeprune: There is no model argument 'keep'.",
        "edgeprune: prune must be true or false, not 2.",
        "edgeprune: Questions are answered one at a time.",
        "edgeprune: A bundle cannot be moved to cuda.",
        "edgeprune: mmmu compares the probabilities of given answers.",
        "edgeprune: mmmu asks in several rounds.",
        "edgeprune: A bundle answers in one process.",
    )
    for line, beginning in zip(done.stdout.splitlines(), expected, strict=True):
        assert line.startswith(beginning)


@pytest.mark.slow
def test_a_picture_that_does_not_fit_ends_the_run_with_one_line(work: Path) -> None:
    odd = work / "odd"
    shutil.copytree(work / "scenes", odd / "scenes")
    with Image.open(odd / "scenes" / "images" / "000001.png") as scene:
        scene.resize((300, 192)).save(odd / "scenes" / "images" / "000001.png")
    options = ("--model", "edgeprune", "--model_args", "pretrained=../table.bundle", "--tasks", "tabletop")
    done = run(odd, "-m", "lmms_eval", *options, "--include_path", EXAMPLE / "tasks")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("edgeprune: tabletop, document ") and line.endswith("or fit=stretch (distorts it).")


@pytest.fixture
def server(work: Path) -> Iterator[str]:
    """Yield the address of `edgeprune serve --fit pad` with the bundle."""
    command = [sys.executable, "-m", "edgeprune", "serve", "table.bundle", "--fit", "pad", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=work, env=environment, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[2]
        process.terminate()


@pytest.mark.slow
def test_lmms_eval_scores_a_server_as_edgeprune_does(work: Path, server: str) -> None:
    options = ("--tasks", "tabletop,tabletop_pairs", "--include_path", EXAMPLE / "tasks", "--output_path", "served")
    done = run(work, EXAMPLE / "served.py", "--url", server, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == f"tabletop at {server}: {NAME}"
    result, samples = written(work / "served")
    assert result["config"]["model_backend"] == "lmms_eval.models.chat.openai.OpenAICompatible (chat)"
    for task, data in (("tabletop", "scenes"), ("tabletop_pairs", "pairs")):
        assert said(samples[task]) == predicted(work, data, "pruned")
        assert result["results"][task]["exact_match,none"] == pytest.approx(accuracy(work, data, "pruned"))
    [card] = (work / "served").glob("*/*_server.json")
    assert json.loads(card.read_text())["edgeprune"]["cuts"] == [{"cut": "fastv @ layer 2", "keep": 72}]
