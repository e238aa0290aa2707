"""The commands, as a user types them: what they print, what they refuse, and how they exit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.export.verification import TOLERANCES
from edgeprune.registry import FAMILIES, METHODS, options_of
from edgeprune.tabletop.dataset import write_dataset

COMMANDS = (
    "calibrate",
    "merge",
    "profile",
    "report",
    "export",
    "verify",
    "check",
    "build",
    "selftest",
    "estimate",
    "bench",
    "doctor",
    "run",
    "eval",
    "tabletop",
    "inspect",
    "models",
    "methods",
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object, code: int = 2) -> str:
    """Return the one line that a refused command prints."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0]


@pytest.fixture
def picture(tiny_image: Image.Image, tmp_path: Path) -> Path:
    tiny_image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_help_lists_every_command() -> None:
    output = run("--help").output
    assert all(command in output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.output


def test_help_stays_light() -> None:
    code = "import sys; from edgeprune.cli import main; main(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"'torch'", "'onnxruntime'", "'numpy'", "'rich'", "'transformers'"} & set(output.split("[")[-1].split(", "))


def test_methods_and_models_come_from_the_registry() -> None:
    assert {row["method"] for row in json.loads(run("methods", "--json").stdout)} == set(METHODS)
    assert {row["model_type"] for row in json.loads(run("models", "--json").stdout)} == set(FAMILIES)
    assert "FastV" in run("methods").output


def test_the_options_of_a_method_are_listed() -> None:
    listed = {row["option"]: row for row in json.loads(run("methods", "plphp", "--json").stdout)}
    assert [option.name for option in options_of("plphp", calibration=True)] == list(listed)
    assert (listed["rows"]["decides"], listed["allocate"]["decides"]) == ("which stay", "how many")
    assert (listed["spread"]["default"], listed["rows"]["by"]) == ("no", "ours")
    assert "fastv has no options." in run("methods", "fastv").output
    assert json.loads(run("methods", "fastv", "--json").stdout) == []


def test_underscores_are_accepted(tmp_path: Path) -> None:
    assert "no image size" in refused("export", "tabletop", "-o", tmp_path / "b", "--image_size", "big")


def test_inspect_shows_the_cuts(tiny_bundle: Bundle) -> None:
    result = run("inspect", tiny_bundle.path)
    assert "fastv @ layer 1: keep 6 of 12 = 50%, remove 50%" in result.output
    data = json.loads(run("inspect", tiny_bundle.path, "--json").stdout)
    assert [cut["keep"] for cut in data["plan"]["cuts"]] == [6, 3]


def test_run_answers_with_a_receipt(tiny_bundle: Bundle, picture: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "kept.png"
    command = ("run", tiny_bundle.path, "--image", picture, "--prompt", "What is it?", "--max-tokens", 4)
    result = run(*command, "--overlay", overlay)
    assert result.exit_code == 0, result.output
    assert "fastv @ layer 1: 12 -> 6 visual tokens" in result.stderr
    with Image.open(overlay) as drawn:
        assert drawn.width > 1000
    data = json.loads(run(*command, "--json").stdout)
    assert data["receipt"]["pruned"] is True
    assert json.loads(run(*command, "--json", "--no-prune").output)["receipt"]["pruned"] is False


def test_run_needs_image_and_prompt(tiny_bundle: Bundle, picture: Path) -> None:
    assert "--image" in refused("run", tiny_bundle.path, "--prompt", "What is it?")
    assert "--prompt" in refused("run", tiny_bundle.path, "--image", picture)
    assert "prompt is empty" in refused("run", tiny_bundle.path, "--image", picture, "--prompt", " ")


def test_run_refuses_bad_images(tiny_bundle: Bundle, picture: Path, tmp_path: Path) -> None:
    command = ("run", tiny_bundle.path, "--prompt", "What is it?", "--image")
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:200])
    Image.new("1", (12_000, 9_000)).save(tmp_path / "bomb.png")
    (tmp_path / "empty.png").write_bytes(b"")
    for image in (tmp_path / "none.png", broken, tmp_path / "bomb.png", tmp_path / "empty.png"):
        assert image.name in refused(*command, image)


def test_run_refuses_bad_sampling(tiny_bundle: Bundle, picture: Path) -> None:
    command = ("run", tiny_bundle.path, "--image", picture, "--prompt", "What?")
    for option, value in (("--max-tokens", 0), ("--temperature", -1), ("--top-p", 1.5)):
        refused(*command, option, value)


def test_broken_bundles_are_refused(altered_bundle: Path, tmp_path: Path) -> None:
    assert "no bundle" in refused("inspect", tmp_path / "none")
    (altered_bundle / "plan.json").write_text("{}")
    assert "sha256" in refused("inspect", altered_bundle, code=1)


def test_verify_passes_and_fails(tiny_bundle: Bundle, tiny_folder: Path) -> None:
    result = run("verify", tiny_bundle.path, "--against", tiny_folder)
    assert result.exit_code == 0, result.output
    assert "verified" in result.output
    data = json.loads(run("verify", tiny_bundle.path, "--against", tiny_folder, "--json").stdout)
    assert data["passed"] is True
    assert "other weights" in refused("verify", tiny_bundle.path, "--against", "tabletop", code=1)


def test_a_failed_verification_names_the_stage(tiny_bundle: Bundle, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOLERANCES["fp32"], "prefill", -1.0)
    result = run("verify", tiny_bundle.path, "--against", tiny_folder)
    assert result.exit_code == 1
    assert "FAILED: the first stage that differs is 'prefill'" in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "fastv", "--keep", "0"), "outside (0, 1]"),
        (("--method", "fastv", "--keep", "1.5"), "outside (0, 1]"),
        (("--method", "fastv"), "belong together"),
        (("--keep", "0.5"), "belong together"),
        (("--layer", "2"), "needs --method"),
        (("--site", "vision"), "--site needs --method"),
        (("--method", "evit", "--keep", "0.5"), "needs the number of a block"),
        (("--method", "evit", "--keep", "0.5", "--layer", "9"), "beyond the vision encoder's 2 blocks"),
        (("--method", "evit", "--keep", "0.5", "--layer", "1", "--site", "input"), "does not act at site 'input'"),
        (("--method", "magic", "--keep", "0.5"), "fastv, "),
        (("--method", "fastv", "--keep", "0.5", "--layer", "0"), "cannot act at site"),
        (("--method", "fastv", "--keep", "0.5", "--layer", "9"), "beyond the model's 3 layers"),
        (("--image-size", "50x50"), "does not divide"),
        (("--plan", "none.json"), "Cannot read plan"),
        (("--plan", "none.json", "--method", "fastv"), "already says"),
    ],
)
def test_export_refuses_bad_plans(options: tuple[str, ...], words: str, tiny_folder: Path, tmp_path: Path) -> None:
    size = () if "--image-size" in options or "--plan" in options else ("--image-size", "84x112")
    assert words in refused("export", tiny_folder, "-o", tmp_path / "out", *size, *options)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_bad_models(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no model folder" in refused("export", tmp_path / "none", "-o", out)
    (tmp_path / "bert").mkdir()
    assert "config.json" in refused("export", tmp_path / "bert", "-o", out)
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "bert" / "preprocessor_config.json").write_text("{}")
    line = refused("export", tmp_path / "bert", "-o", out, code=1)
    assert "bert" in line and "qwen2_vl" in line
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (tmp_path / "bert" / "pytorch_model.bin").write_bytes(b"")
    assert "pickle" in refused("export", tmp_path / "bert", "-o", out, code=1)
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "ours", "auto_map": {}}')
    assert "need code of their own" in refused("export", tmp_path / "bert", "-o", out, code=1)
    assert not out.exists()


def test_export_refuses_an_existing_output(tiny_folder: Path, tmp_path: Path) -> None:
    assert "--force" in refused("export", tiny_folder, "-o", tmp_path, "--image-size", "84x112")


def test_export_says_what_it_made(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = run("export", tiny_folder, "-o", out, "--image-size", "84x112", "--method", "uniform", "--keep", "0.5")
    assert result.exit_code == 0, result.output
    assert "uniform @ input: keep 6 of 12 = 50%, remove 50%" in result.output  # where calibrate cuts by default, too
    assert f"edgeprune verify {out}" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_ctrl_c_in_the_middle_of_export_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    code = "from edgeprune.cli import main; main()"
    command = [sys.executable, "-I", "-c", code, "export", str(tiny_folder), "-o", str(tmp_path / "out"), "--image-size", "84x112"]
    # Where these tests run in the background, a shell has Ctrl-C ignored for them and for all that they start.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()), "the export did not begin"
    errors = ""
    while process.returncode is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):  # Python drops an interrupt that arrives inside a finalizer: press again
            _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "Aborted!" in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_eval_compares_pruned_and_unpruned(tiny_bundle: Bundle, tiny_folder: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", 2, 0)
    data = ("--data", tmp_path / "data" / "dataset.jsonl", "--fit", "stretch", "--limit", 6, "--max-tokens", 4)
    result = run("eval", tiny_bundle.path, *data)
    assert result.exit_code == 0, result.output
    report = json.loads(run("eval", tiny_bundle.path, *data, "--json").stdout)
    assert {"pruned", "unpruned", "agreement", "visual_reads", "asked"} == set(report["kinds"]["size"])
    eager = run("eval", tiny_folder, *data, "--image-size", "84x112", "--json")
    assert "pruned" not in json.loads(eager.stdout)["kinds"]["size"]
    assert "frozen in" in refused("eval", tiny_bundle.path, *data, "--keep", "0.5")
    eager_cut = ("--image-size", "84x112", "--method", "fastv", "--keep", "0.5", "--layer")
    assert "pruned" in json.loads(run("eval", tiny_folder, *data, *eager_cut, 1, "--json").stdout)["kinds"]["size"]
    assert "cannot act at site" in refused("eval", tiny_folder, *data, *eager_cut, 0)


def test_eval_refuses_bad_data(tiny_bundle: Bundle, tmp_path: Path) -> None:
    refused("eval", tiny_bundle.path, "--data", tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png"}\n')
    assert "bad.jsonl:1" in refused("eval", tiny_bundle.path, "--data", tmp_path / "bad.jsonl")


@pytest.fixture
def some_bad(picture: Path) -> Path:
    """Return samples of which the third cannot be read, and the last cannot be asked."""
    (picture.parent / "cut.png").write_bytes(picture.read_bytes()[:300])
    sample = {"image": "picture.png", "prompt": "What?", "answer": ["red", 3], "kind": "colour"}
    lines = [sample, sample, {**sample, "image": "cut.png"}, sample, {**sample, "prompt": "a <|image_pad|>"}]
    path = picture.parent / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_eval_keeps_what_it_has_at_a_bad_sample(tiny_bundle: Bundle, some_bad: Path) -> None:
    result = run("eval", tiny_bundle.path, "--data", some_bad, "--max-tokens", 4, "--json")
    assert result.exit_code == 2 and f"{some_bad}:3: Cannot read" in result.stderr
    assert json.loads(result.stdout)["kinds"]["colour"]["asked"] == 2


def test_eval_skips_bad_samples(tiny_bundle: Bundle, some_bad: Path) -> None:
    result = run("eval", tiny_bundle.path, "--data", some_bad, "--skip-bad", "--max-tokens", 4, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["kinds"]["colour"]["asked"] == 3
    assert [message.split(": ")[0] for message in report["skipped"]] == [f"{some_bad}:3", f"{some_bad}:5"]
    assert result.stderr.rstrip().endswith("2 bad samples skipped")
    some_bad.write_text(some_bad.read_text().splitlines()[2])
    result = run("eval", tiny_bundle.path, "--data", some_bad, "--skip-bad")
    assert result.exit_code == 2 and "None of the samples" in result.stderr


def test_a_prompt_that_is_not_utf8_is_one_line(tiny_bundle: Bundle, picture: Path) -> None:
    assert "not UTF-8" in refused("run", tiny_bundle.path, "--image", picture, "--prompt", os.fsdecode(b"caf\xe9"))


def test_tabletop_writes_a_dataset(tmp_path: Path) -> None:
    result = run("tabletop", tmp_path / "data", "--scenes", 3, "--seed", 4)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "data" / "dataset.jsonl").read_text().splitlines()
    assert {"image", "prompt", "answer", "kind"} == set(json.loads(lines[0]))
    assert "--force" in refused("tabletop", tmp_path / "data", "--scenes", 3)
    refused("tabletop", tmp_path / "more", "--scenes", 0)
    assert run("tabletop", tmp_path / "pairs", "--scenes", 3, "--images", 2, "--kind", "which").exit_code == 0
    lines = (tmp_path / "pairs" / "dataset.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["image"]) for line in lines] == [2, 2, 2]
    assert "which, changed" in refused("tabletop", tmp_path / "more", "--images", 2, "--kind", "witch")


def test_models_says_which_method_acts_where() -> None:
    rows = json.loads(run("models", "idefics2", "--json").stdout)
    reasons = {(row["method"], row["site"]): row["applies"] for row in rows}
    assert reasons["plphp", "cache"] == "yes"
    assert "no place in the image" in reasons["visionzip", "input"]
    assert "video, which the family does not take" in reasons["evs", "input"]
    assert "qwen3_vl" in refused("models", "bert", code=1)
    shown = run("models", "idefics2").stdout
    assert len(shown.splitlines()) < 40 and "resampler" in shown  # a row for each method, not for each of its sites


def test_errors_are_json_where_the_output_is(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "none", "--json")
    found = json.loads(result.stderr)
    assert (result.exit_code, result.stdout, found["error"], found["exit_code"]) == (2, "", "NoBundleError", 2)
    assert "There is no bundle" in found["message"] and found["hint"].startswith("Make one with: edgeprune export")


@pytest.mark.parametrize(
    ("given", "named"),
    [(("--frames", "0"), "frames"), (("--fps", "2"), "--frames"), (("--frames", "4", "--fps", "0"), "--fps")],
)
def test_videos_have_frames_and_a_rate(given: tuple[str, ...], named: str, tmp_path: Path) -> None:
    assert named in refused("export", "tabletop", "-o", tmp_path / "out", *given)


def test_every_summary_is_one_whole_line() -> None:
    lines = CliRunner().invoke(main, ["--help"], terminal_width=80).output.partition("Commands:\n")[2].splitlines()
    assert len(lines) == len(main.commands)
    for line in lines:
        name, _, summary = line.strip().partition(" ")
        first = str(main.commands[name].help).partition("\n")[0]
        assert summary.strip() == first and first.endswith("."), line


def shown_options(name: str) -> list[click.Option]:
    return [option for option in main.commands[name].params if isinstance(option, click.Option) and not option.hidden]


def test_keep_means_one_thing() -> None:
    options = [(name, str(option.help)) for name in main.commands for option in shown_options(name) if "--keep" in option.opts]
    shared = {meaning for name, meaning in options if name != "compare"}
    assert shared == {"Share of all visual tokens that stay, in (0, 1]; repeatable."}
    assert dict(options)["compare"].startswith("Shares of all visual tokens that stay, averaged over the decoder's layers")


def test_options_stand_by_subject() -> None:
    shown = CliRunner().invoke(main, ["calibrate", "--help"]).output
    sections = ("Model:", "Samples:", "Plan:", "Ranking of caches:", "Search:", "Output:")
    places = [shown.index(f"\n{section}\n") for section in sections]
    assert places == sorted(places)
    assert "1%]" in shown and shown.count("--help") == 1
    every = {option.opts[0] for option in shown_options("calibrate")}
    assert all(option in shown for option in every)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_that_of_click(shell: str) -> None:
    assert "_EDGEPRUNE_COMPLETE" in CliRunner().invoke(main, ["completion", shell]).output
    completed = CliRunner().invoke(
        main,
        prog_name="edgeprune",
        env={"_EDGEPRUNE_COMPLETE": "bash_complete", "COMP_WORDS": "edgeprune export --method zs", "COMP_CWORD": "3"},
        standalone_mode=True,
    )
    assert "zspaprune" in completed.output


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("edgeprune export --method zspaprune --option re", ["plain,relevance=", "plain,reduce="]),
        ("edgeprune export --method zspaprune --option relevance=m", ["plain,relevance=mean", "plain,relevance=max"]),
        ("edgeprune export --method plphp --option al", []),
        ("edgeprune calibrate --method plphp --option al", ["plain,allocate=", "plain,alpha="]),
    ],
)
def test_options_of_the_method_complete(words: str, found: list[str]) -> None:
    env = {"_EDGEPRUNE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "5"}
    assert CliRunner().invoke(main, prog_name="edgeprune", env=env).output.split() == found


def test_export_asks_for_a_model() -> None:
    result = CliRunner().invoke(main, ["export", "-o", "b"])
    assert result.exit_code == 2 and "Missing argument 'MODEL'. For example: edgeprune export tabletop -o" in result.output


def test_a_misspelt_command_or_option_has_its_nearest_name() -> None:
    for words, nearest in (
        (["exprot", "tabletop"], "Did you mean export?"),
        (["export", "tabletop", "--methd", "fastv"], "'--method'"),
    ):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 2 and "Did you mean" in result.output and nearest in result.output
