"""Mistakes that people made: each gets one line that says what is wrong and a remedy that works as it stands."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

import edgeprune.errors
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.errors import MissingExtraError, did_you_mean, install_command, require_extra, update_hint
from edgeprune.registry import METHODS, method_class, sites_of
from edgeprune.tabletop.dataset import write_dataset
from edgeprune.targets import TARGETS

HUB = "nobody/no-VL"  # tests are offline, and no cache has it
FASTV = ("--method", "fastv", "--keep", "0.5")
EXPORT = ("export", "tabletop", "-o", "b")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object, code: int = 2) -> str:
    """Return the one line that a refused command prints."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line


def check_command(line: str) -> None:
    """Check that the `edgeprune` command at the end of a message is one: its options and values parse."""
    found = re.search(r"edgeprune ([a-z]+ .*?)\.?$", line)
    assert found is not None, line
    name, *arguments = shlex.split(found[1])
    main.commands[name].make_context(name, arguments)


@pytest.fixture
def place(tiny_folder: Path, tiny_bundle: Bundle, tiny_image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that has a model, a bundle, pictures and a data set."""
    (tmp_path / "model").symlink_to(tiny_folder)
    (tmp_path / "table.bundle").symlink_to(tiny_bundle.path)
    tiny_image.save(tmp_path / "0.png")
    Image.new("RGB", (480, 640)).save(tmp_path / "camera.png")
    write_dataset(tmp_path / "scenes", 1, 0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Command, words of the message, words of the remedy, exit code. `edgeprune` commands in remedies must parse.
ASK = ("--image", "0.png", "--prompt", "What is it?")
DATA = ("--data", "scenes/dataset.jsonl")
PLAN = ("--method", "plphp", "--budget", "0.5", "-o", "p.json")
ZSPA, AUTO = ("--method", "zspaprune", "--keep", "0.5"), ("--method", "auto", "-o", "p.json")
EXPORT_TINY = "edgeprune export model -o"
MISTAKES: dict[str, tuple[tuple[str, ...], str, str, int]] = {
    "hub id": (("export", HUB, "-o", "b"), f"has nothing of {HUB}", "Unset HF_HUB_OFFLINE", 1),
    "hub id to calibrate": (("calibrate", HUB, *DATA, *PLAN), f"has nothing of {HUB}", "Unset HF_HUB_OFFLINE", 1),
    "hub id to eval": (("eval", HUB, *DATA), f"has nothing of {HUB}", "Unset HF_HUB_OFFLINE", 1),
    "folder that is not there": (("export", "./modle", "-o", "b"), "no model folder ./modle", "an id of the Hugging Face Hub", 2),
    "revision of a folder": (("export", "model", "-o", "b", "--revision", "v1"), "has no revisions", "Leave --revision out", 2),
    "revision of tabletop": ((*EXPORT, "--revision", "v1"), "has no revisions", "Leave --revision out", 2),
    "adapter of a bundle": (("eval", "table.bundle", *DATA, "--adapter", "a"), "is a bundle", "Leave --revision and --adapter", 2),
    "no adapter": (("export", "model", "-o", "b", "--adapter", "a"), "no adapter folder a", "adapter_config.json", 2),
    "model to run": (("run", "model", *ASK), "model is no bundle", EXPORT_TINY, 2),
    "model to verify": (("verify", "model"), "model is no bundle", EXPORT_TINY, 2),
    "model to bench": (("bench", "model"), "model is no bundle", EXPORT_TINY, 2),
    "model to inspect": (("inspect", "model"), "model is no bundle", EXPORT_TINY, 2),
    "model to build": (("build", "model"), "model is no bundle", EXPORT_TINY, 2),
    "bundle to export": (("export", "table.bundle", "-o", "b"), "is a bundle", "Give the transformers folder", 2),
    "bundle to calibrate": (("calibrate", "table.bundle", *DATA, *PLAN), "is a bundle", "Give the transformers folder", 2),
    "wrong bundle": (("run", "none.bundle", *ASK), "no bundle at none.bundle", "edgeprune export MODEL -o none.bundle", 2),
    "percent": (
        (*EXPORT, "--method", "fastv", "--keep", "50%"),
        "'50%' is no share",
        "Write it as 0.5.",
        2,
    ),
    "comma": ((*EXPORT, "--method", "fastv", "--keep", "0,5"), "'0,5' is no share", "Write it as 0.5.", 2),
    "percent to calibrate": (("calibrate", "model", *DATA, "--budget", "50%"), "'50%' is no share", "Write it as 0.5.", 2),
    "word": ((*EXPORT, "--method", "fastv", "--keep", "half"), "'half' is no share", "such as 0.25", 2),
    "layer -1": ((*EXPORT, *FASTV, "--layer", "-1"), "cannot act at layer -1", "Layers are 0 to 7.", 2),
    "layer -1 to calibrate": (
        ("calibrate", "tabletop", *DATA, "--method", "fastv", "--budget", "0.9", "-o", "p.json", "--layer", "-1"),
        "cannot act at layer -1",
        "Layers are 0 to 7.",
        2,
    ),
    "layer 0": (
        (*EXPORT, *FASTV, "--layer", "0"),
        "cannot act at site 'input'",
        "Give --layer 1 or more.",
        2,
    ),
    "method of the input": (
        (*EXPORT, "--method", "divprune", "--keep", "0.5", "--layer", "2"),
        "divprune cannot act at site 'layer'",
        "It acts at: input. Leave --layer out.",
        2,
    ),
    "FastV": (
        (*EXPORT, "--method", "FastV", "--keep", "0.5"),
        "Unknown method 'FastV'",
        "Did you mean fastv?",
        2,
    ),
    "PLPHP": (("calibrate", "model", *DATA, "--method", "PLPHP", *PLAN[2:]), "Unknown method 'PLPHP'", "Did you mean plphp?", 2),
    "option without a value": ((*EXPORT, *ZSPA, "--option", "core"), "'core' is no option", "NAME=VALUE", 2),
    "option misspelt": ((*EXPORT, *ZSPA, "--option", "cor=0.3"), "unknown option 'cor'", "Did you mean core?", 2),
    "option twice": ((*EXPORT, *ZSPA, "--option", "core=0.3", "--option", "core=0.4"), "given twice", "Give it once.", 2),
    "option out of range": ((*EXPORT, *ZSPA, "--option", "core=1.5"), "'core' cannot be 1.5", "number from 0 to 1", 2),
    "option no number": ((*EXPORT, *ZSPA, "--option", "core=much"), "must be of type float", "number from 0 to 1", 2),
    "option no choice": ((*EXPORT, *ZSPA, "--option", "relevance=poold"), "cannot be 'poold'", "Did you mean pooled?", 2),
    "option of budgets": (
        (*EXPORT, "--method", "fitprune", "--keep", "0.5", "--option", "stages=2"),
        "decides how many tokens stay",
        "edgeprune calibrate MODEL --data FILE --method fitprune --budget 0.5 --option stages=2 -o PLAN",
        2,
    ),
    "option of nothing": ((*EXPORT, "--option", "core=0.3"), "--option needs --method and --keep", "", 2),
    "option of a plan": ((*EXPORT, "--plan", "p.json", "--option", "core=0.3"), "already says what", "Give one of them.", 2),
    "option of auto": (("calibrate", "model", *DATA, *AUTO, "--option", "core=0.3"), "is for one method", "edgeprune methods", 2),
    "option to calibrate": (
        ("calibrate", "model", *DATA, *PLAN, "--option", "delt=0.3"),
        "unknown option",
        "Did you mean delta?",
        2,
    ),
    "option and flag": (
        ("calibrate", "model", *DATA, *PLAN, "--option", "rows=peak", "--rows", "text"),
        "'rows' of plphp is given twice",
        "Give it once.",
        2,
    ),
    "ranking of nothing": (
        ("calibrate", "model", *DATA, "--method", "zspaprune", *PLAN[2:], "--reduce", "max"),
        "--reduce is not for",
        "",
        2,
    ),
    "options of no method": (("methods", "zspaprun"), "Unknown method 'zspaprun'", "Did you mean zspaprune?", 2),
    "family": (("models", "qwen2vl"), "'qwen2vl' are not supported", "Did you mean qwen2_vl?", 1),
    "450x450": (("export", "model", "-o", "b", "--image-size", "450x450"), "does not divide", "--image-size 448x448 or 476x476", 2),
    "450x448": (("export", "model", "-o", "b", "--image-size", "450x448"), "does not divide", "448x448 or 476x448", 2),
    "orin": (
        (*EXPORT, "--target", "orin"),
        "'orin' is no target",
        "jetpack6 (Orin with JetPack 6.1 or 6.2)",
        2,
    ),
    "check orin": (("check", "table.bundle", "--target", "orin-nano"), "'orin-nano' is no target", "jetpack6 (", 2),
    "jetpack": ((*EXPORT, "--target", "jetpack-6"), "'jetpack-6' is no target", "jetpack6 (", 2),
    "manifest": (("inspect", "table.bundle/manifest.json"), "is the manifest of a bundle", "edgeprune inspect table.bundle", 2),
    "picture to inspect": (
        ("inspect", "0.png"),
        "0.png is no plan",
        "A plan is the JSON file that edgeprune",
        2,
    ),
    "folder as data": (("eval", "table.bundle", "--data", "scenes"), "scenes is a folder", "--data scenes/dataset.jsonl", 2),
    "aspect": (("run", "table.bundle", "--image", "camera.png", "--prompt", "x"), "640x480 image makes", "--fit pad", 2),
    "address": (
        ("run", "table.bundle", "--image", "http://example.com/a.png", "--prompt", "x"),
        "http://example.com/a.png is an address",
        "Nothing is downloaded here",
        2,
    ),
    "swapped": (
        ("run", "table.bundle", "--image", "What is it?", "--prompt", "0.png"),
        "There is no image 'What is it?'",
        "--image 0.png --prompt 'What is it?'",
        2,
    ),
    "picture as curve": (
        ("report", "table.bundle", "-o", "r.html", "--curve", "0.png"),
        "Cannot read the curve 0.png: it is not text.",
        "edgeprune calibrate MODEL --data SAMPLES --method auto -o PLAN --curve FILE",
        2,
    ),
    "bundle as times": (
        ("bench", "table.bundle", "--device-report", "table.bundle/processor/special_tokens.json"),
        "Cannot read device times",
        "edgeprune profile",
        2,
    ),
    "stages 0": (
        ("calibrate", "tabletop", *DATA, "--method", "fitprune", "--stages", "0"),
        "Option 'stages' cannot be 0",
        "1 or more",
        2,
    ),
    "threads -1": (("profile", "table.bundle", "-o", "t.json", "--threads", "-1"), "-1 is not in the range", "x>=1", 2),
    "seed -1": (
        (*EXPORT, "--method", "random", "--keep", "0.5", "--seed", "-1"),
        "-1 is not in the range",
        "x>=0",
        2,
    ),
    "no GPU": (("build", "table.bundle"), "an engine fits one GPU", "edgeprune build table.bundle --dry-run", 1),
    # These helped before.
    "keep 25": (
        (*EXPORT, "--method", "fastv", "--keep", "25"),
        "Keep ratio 25.0 is outside",
        "--keep 0.25 keeps 25 %",
        2,
    ),
    "layer 99": (
        (*EXPORT, *FASTV, "--layer", "99"),
        "fastv @ layer 99 lies beyond",
        "8 layers (0 to 7)",
        2,
    ),
    "two ratios": (
        (*EXPORT, *FASTV, *FASTV[2:], "--layer", "2"),
        "2 keep ratios but 1 layers",
        "Give one --layer",
        2,
    ),
    "needs budgets": (
        (*EXPORT, "--method", "plphp", "--keep", "0.5"),
        "plphp needs calibrated budgets",
        "edgeprune calibrate MODEL --data FILE --method plphp --budget 0.5 -o PLAN",
        2,
    ),
    "exists": (("export", "tabletop", "-o", "table.bundle"), "table.bundle exists already", "--force", 2),
    "one number": ((*EXPORT, "--image-size", "448"), "'448' is no image size", "Write height x width", 2),
    "bfloat16": (
        (*EXPORT, "--target", "onnxruntime", "--precision", "bf16"),
        "Target 'onnxruntime' has no bf16: ONNX Runtime's CPU has no products of bfloat16.",
        "the --target of a Jetson",
        2,
    ),
    "precision": (
        (*EXPORT, "--target", "cpu", "--precision", "fp16"),
        "has no fp16",
        "Choose --precision",
        2,
    ),
    "samples of int8": (
        (*EXPORT, "--precision", "int8", *DATA),
        "--data decides int4 weights and the scales of w8a8, fp8 and nvfp4, and the precision is int8",
        "Give --precision int4",
        2,
    ),
    "w8a8 without samples": (
        (*EXPORT, "--target", "jetpack6", "--precision", "w8a8"),
        "w8a8 rounds activations to 8 bits by scales that samples decide, and none are given",
        "--data samples.jsonl",
        2,
    ),
    "w8a8 on a CPU": (
        (*EXPORT, "--target", "cpu", "--precision", "w8a8", *DATA),
        "Target 'cpu' has no w8a8",
        "Choose --target cpu --precision int8",
        2,
    ),
    "fp8 on an Orin": (
        (*EXPORT, "--target", "jetpack6", "--precision", "fp8", *DATA),
        "Target 'jetpack6' has no fp8: Orin's GPU has no products of FP8",
        "Choose --precision w8a8, or the --target of a Thor: jetpack7",
        2,
    ),
    "nvfp4 on an Orin": (
        (*EXPORT, "--target", "jetpack6", "--precision", "nvfp4", *DATA),
        "Target 'jetpack6' has no nvfp4: Orin's GPU has no products of FP4",
        "Choose --precision int4, or the --target of a Thor: jetpack7",
        2,
    ),
    "nvfp4 without samples": (
        (*EXPORT, "--target", "jetpack7", "--precision", "nvfp4"),
        "nvfp4 rounds activations to 4 bits by scales that samples decide, and none are given",
        "Or round only the weights: --precision int4",
        2,
    ),
    "fit of nothing": ((*EXPORT, "--precision", "int4", "--fit", "pad"), "--fit is for the images of --data", "Leave out --fit", 2),
    "no image": (("run", "table.bundle", "--prompt", "x"), "There is no image to ask about", "For example: --image", 2),
    "keep of calibrate": (
        ("calibrate", "model", *DATA, "--method", "plphp", "--keep", "0.5", "-o", "p.json"),
        "--keep of calibrate is now --budget: a share of the method's cost.",
        "Write --budget 0.5",
        2,
    ),
    "kept of bench": (
        ("bench", "table.bundle", "--kept", "9,18"),
        "--kept of bench is now --visual-tokens",
        "--visual-tokens 9,18",
        2,
    ),
    "budget 25": (("calibrate", "model", *DATA, *PLAN[:3], "25", *PLAN[4:]), "Budget 25.0 is outside", "--budget 0.25 spends", 2),
    "no output": (("calibrate", "model", *DATA, *PLAN[:4]), "no file for the plan", "(-o)", 2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_its_remedy(mistake: str, place: Path) -> None:
    command, words, remedy, code = MISTAKES[mistake]
    before = sorted(place.rglob("*"))
    line = refused(*command, code=code)
    assert words in line and remedy in line
    if re.search(r"edgeprune [a-z]+ [\w./-]+ ", remedy):
        check_command(line)
    assert sorted(place.rglob("*")) == before


def test_remedies_do_what_they_say(place: Path) -> None:
    export = refused("run", "model", *ASK).partition("edgeprune ")[2]
    arguments = shlex.split(export)
    assert arguments[:4] == ["export", "model", "-o", f"{Path('model').resolve().name}.bundle"]
    Path("b").mkdir()  # so that nothing is exported here: all other checks have passed
    assert "b exists already" in refused(*arguments[:2], "-o", "b", *arguments[4:])
    assert run("inspect", refused("inspect", "table.bundle/manifest.json").rpartition(" ")[2]).exit_code == 0
    assert run("build", "table.bundle", "--dry-run").exit_code == 0
    swapped = refused("run", "table.bundle", "--image", "What is it?", "--prompt", "0.png").partition("order: ")[2]
    assert run("run", "table.bundle", *shlex.split(swapped), "--max-tokens", 1).exit_code == 0
    assert run("run", "table.bundle", "--image", "camera.png", "--prompt", "x", "--fit", "pad", "--max-tokens", 1).exit_code == 0


def test_commands_of_the_hub_in_remedies_are_its_own() -> None:
    from huggingface_hub.cli.auth import auth_login
    from huggingface_hub.cli.download import download

    assert {"repo_id", "revision"} <= set(inspect.signature(download).parameters) and callable(auth_login)


def test_a_missing_extra_is_installed_from_where_edgeprune_came(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkout = Path(edgeprune.errors.__file__).parents[1]
    assert update_hint() == f'Update EdgePrune: git -C "{checkout}" pull'
    with pytest.raises(MissingExtraError, match=re.escape(f'pip install -e "{checkout}[serve]"')):
        require_extra("serve", "a_package_that_is_not_there")
    monkeypatch.setattr(edgeprune.errors, "__file__", str(tmp_path / "edgeprune" / "errors.py"))
    records = {
        "{}": 'pip install "edgeprune[serve]"',
        '{"url": "file:///w/e.whl", "archive_info": {}}': 'pip install "edgeprune[serve] @ file:///w/e.whl"',
        '{"url": "https://h/e", "vcs_info": {"vcs": "git", "commit_id": "1a"}}': 'pip install "edgeprune[serve] @ git+https://h/e@1a"',
    }
    updates = (
        'Update EdgePrune: pip install -U "edgeprune"',
        "Install a newer EdgePrune: this one is file:///w/e.whl",
        'Update EdgePrune: pip install -U "edgeprune @ git+https://h/e"',
    )
    for (record, command), update in zip(records.items(), updates, strict=True):
        recorded = type("Recorded", (), {"read_text": staticmethod(lambda name, record=record: record)})
        monkeypatch.setattr("importlib.metadata.distribution", lambda name, recorded=recorded: recorded)
        assert (install_command("serve"), update_hint()) == (command, update)


def test_close_names_are_proposed() -> None:
    assert did_you_mean("FASTV", METHODS) == "Did you mean fastv? "
    assert did_you_mean("jetpack8", TARGETS) == "Did you mean jetpack7? "
    assert did_you_mean("abacus", METHODS) == ""


def test_sites_are_known_without_importing_a_method() -> None:
    assert {name: sites_of(name) for name in METHODS} == {name: method_class(name).sites for name in METHODS}


EARLY = (
    (*EXPORT, "--method", "fastv", "--keep", "25"),
    ("export", "tabletop", "-o", "0.png/b"),
    ("export", "model", "-o", "b", "--image-size", "28000x28000"),
    ("export", "no-template", "-o", "b"),
    ("export", "no-end", "-o", "b"),
    ("export", "no-token", "-o", "b"),
    (*EXPORT, *FASTV, "--layer", "99"),
    (*EXPORT, *ZSPA, "--option", "core=1.5"),
    ("calibrate", "tabletop", *DATA, *PLAN, "--option", "delta=2"),
    (*EXPORT, "--plan", "none.json"),
    (*EXPORT, "--tier", "a=none.json"),
    (*EXPORT, "--precision", "int4", "--data", "none.jsonl"),
    ("eval", "model", *DATA, "--method", "fastv", "--keep", "25"),
    ("eval", "no-end", *DATA),
    ("calibrate", "tabletop", *DATA, "--method", "plphp", "--budget", "25", "-o", "p.json"),
    ("calibrate", "tabletop", *DATA, "--method", "plphp", "--budget", "0.5", "-o", "nowhere/p.json"),
    ("calibrate", "tabletop", "--data", "none.jsonl", *PLAN),
    ("calibrate", "no-end", *DATA, *PLAN),
    ("calibrate", "tabletop", *DATA, "--method", "auto", "-o", "p.json", "--max-drop", "200%"),
    ("run", "table.bundle", *ASK, "--overlay", "0.png"),
    ("run", "table.bundle", *ASK, "--max-tokens", "0"),
    ("estimate", "no-template", "--device", "thor"),
    ("estimate", "tabletop", "--device", "toaster"),
    ("estimate", "tabletop", "--device", "thor", "--method", "fastv"),
    ("estimate", "table.bundle", "--device", "thor", "--keep", "0.5"),
)


def test_cheap_checks_come_before_torch(place: Path, tiny_folder: Path) -> None:
    import shutil

    for name in ("no-template", "no-end", "no-token"):
        shutil.copytree(tiny_folder, place / name)
    (place / "no-template" / "chat_template.jinja").unlink()
    generation = json.loads((place / "no-end" / "generation_config.json").read_text())
    (place / "no-end" / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": None}))
    config = json.loads((place / "no-token" / "config.json").read_text())
    (place / "no-token" / "config.json").write_text(json.dumps(config | {"image_token_id": 100_000}))
    # One process for all: its imports add up, and none of the commands may bring torch.
    code = (
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from edgeprune.cli import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    result = CliRunner().invoke(main, command)\n"
        "    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), (command, result.output)\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), command\n"
    )
    checkout = str(Path(edgeprune.errors.__file__).parents[1])
    command = [sys.executable, "-c", code, json.dumps(EARLY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": checkout})
    assert done.returncode == 0, done.stderr
