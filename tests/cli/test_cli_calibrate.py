"""The commands calibrate, merge and profile: files in, files out, and one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgeprune.bundle import Bundle
from edgeprune.calibration.calibrate import CalibrationResult
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.cli import main
from edgeprune.cli.output.basic import show_calibration
from edgeprune.device.profile import DeviceProfile
from edgeprune.plan import KeepPlan
from edgeprune.registry import options_of
from edgeprune.tabletop.dataset import write_dataset

SETTLED = ("--option", "relevance=pooled", "--option", "norm=0")
SIZE = ("--image-size", "84x84", "--max-tokens", "6")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, 1, 7)
    lines = (folder / "dataset.jsonl").read_text().splitlines()
    unanswered = [{key: value for key, value in json.loads(line).items() if key != "answer"} for line in lines]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, unanswered[-5:])))
    return folder / "prompts.jsonl"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def test_many_plans_from_one_pass(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    statistics = tmp_path / "s.safetensors"
    common = ("calibrate", tiny_folder, "--data", data, *SIZE, "--statistics", statistics)
    output = done(*common, "--method", "plphp", "--budget", 0.5, "-o", tmp_path / "a.json").output
    assert "samples that agree" in output and "attentive" in output
    assert Statistics.load(statistics).parts == ("attention",)
    done(*common, "--method", "fitprune", "--budget", 0.7, "--stages", 1, "-o", tmp_path / "b.json")
    done(*common, "--method", "vtw", "--option", "first=2", "--option", "eta=100", "-o", tmp_path / "d.json")  # needs no budget
    assert [cut.layer for cut in KeepPlan.load(tmp_path / "d.json").cuts] == [2]
    assert Statistics.load(statistics).parts == ("attention", "withdrawals", "fitprune")  # each plan took what it needs
    written = statistics.stat().st_mtime_ns
    result = done(
        *common, "--method", "plphp", "--budget", 0.4, "--allocate", "even", "--prior", "-o", tmp_path / "c.json", "--json"
    )
    assert json.loads(result.output)["kv"] == pytest.approx(3 / 9)
    assert statistics.stat().st_mtime_ns == written
    assert KeepPlan.load(tmp_path / "c.json").cache_cuts[0].options["prior"]


def test_cuts_are_added_onto_a_plan(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("1.json", "2.json", "3.json"))
    common = ("calibrate", tiny_folder, "--data", data, *SIZE)
    done(*common, "--method", "zspaprune", "--budget", 0.8, "--core", 0.2, *SETTLED, "-o", first)
    done(*common, "--method", "plphp", "--budget", 0.5, "--allocate", "even", "--onto", first, "-o", second)
    done(*common, "--method", "dyrate", "--form", "schedule", "--budget", 0.5, "--onto", second, "-o", third)
    plan = KeepPlan.load(third)
    assert [cut.site for cut in plan.cuts] == ["input", "cache", "cache", "cache", "decode"]
    assert plan.tokens_entering_decoder == 7 and [plan.tokens_cached(layer) for layer in range(3)] == [3, 3, 3]


def test_options_are_compared_and_the_best_is_in_the_plan(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    enough = data.with_name("twenty.jsonl")
    enough.write_text((data.read_text() + "\n") * 4)
    common = ("calibrate", tiny_folder, *SIZE, "--method", "cdpruner", "--budget", 0.5, "-o", tmp_path / "p.json", "--force")
    few = call(*common, "--data", data)
    assert few.exit_code == 2 and "To choose weight of cdpruner takes 20 samples; there are 5." in few.output
    found = json.loads(done(*common, "--data", enough, "--json").output)
    (option,) = (each for each in options_of("cdpruner") if each.tries)
    assert {trial["options"][option.name] for trial in found["tried"]} == {option.default, *option.tries}
    assert KeepPlan.load(tmp_path / "p.json").cuts[0].options == found["tried"][0]["options"]
    assert found["tried"][0]["divergence"] <= found["tried"][-1]["divergence"]
    settled = done(*common, "--data", data, "--option", f"{option.name}={option.default}", "--json")
    assert json.loads(settled.output)["tried"] == []


def test_live_classes_are_calibrated(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    common = ("calibrate", tiny_folder, "--data", data, *SIZE, "--statistics", tmp_path / "s", "--method", "plphp", "--force")
    shown = done(*common, "--budget", 0.5, "--option", "classes=live", "-o", tmp_path / "p.json").output
    assert "plphp @ decode 0" in shown and "samples that agree" in shown
    done(*common, "--option", "r=0.5", "--option", "alpha=0.99", "--option", "delta=0.1", "-o", tmp_path / "q.json")
    kept = sorted(KeepPlan.load(tmp_path / "q.json").tokens_cached(layer) for layer in range(3))
    assert kept == [3, 4, 4]  # the lowest quarter of three layers is one, and none is attentive
    both = call(*common, "--budget", 0.5, "--option", "r=0.4", "-o", tmp_path / "r.json")
    assert both.exit_code == 2 and "--budget chooses r" in both.output


def test_shards_merge_to_the_whole(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    common = ("calibrate", tiny_folder, "--data", data, *SIZE)
    for shard in (1, 2):
        done(*common, "--shard", f"{shard}/2", "--statistics", tmp_path / str(shard))
    done(*common, "--statistics", tmp_path / "whole")
    assert "5" in done("merge", tmp_path / "1", tmp_path / "2", "-o", tmp_path / "merged").output
    merged, whole = (Statistics.load(tmp_path / name) for name in ("merged", "whole"))
    assert all((sums == whole.sums[name]).all() for name, sums in merged.sums.items())


def test_profile_writes_times(tiny_bundle: Bundle, tmp_path: Path) -> None:
    shown = done("profile", tiny_bundle.path, "-o", tmp_path / "t.json", "--repeats", 2, "--threads", 1).output
    assert "ms from an image to the first token, unpruned" in shown and "prefill, 50% of the visual tokens" in shown
    assert "GFLOPS" in shown and "(" not in shown
    times = DeviceProfile.load(tmp_path / "t.json")
    assert (times.how, times.tokens, len(times.prefill_ms)) == ("measured", 12, 5)


def test_a_calibrated_plan_is_measured(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    done("calibrate", tiny_folder, "--data", data, *SIZE, "--method", "divprune", "--budget", 0.5, "-o", tmp_path / "p.json")
    result = call("eval", tiny_folder, "--data", data, "--plan", tmp_path / "p.json", "--json")
    assert result.exit_code == 2 and "no text 'answer'" in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "Neither --method nor --statistics"),
        (("--method", "plphp", "--budget", 0.5), "no file for the plan"),
        (("--method", "plphp", "-o", "p.json"), "needs a budget"),
        (("--method", "vtw", "--budget", "0.5", "--option", "eta=0.1", "-o", "p.json"), "With a budget eta of vtw decides nothing"),
        (("--method", "magic", "--budget", 0.5, "-o", "p.json"), "Unknown method 'magic'"),
        (("--method", "divprune", "--budget", 0, "-o", "p.json"), "outside (0, 1]"),
        (("--method", "divprune", "--budget", 0.5, "--core", 0.5, "-o", "p.json"), "divprune has the unknown option 'core'"),
        (("--method", "divprune", "--budget", 0.5, "--max-drop", "1%", "-o", "p.json"), "--max-drop is not for divprune"),
        (("--method", "fastv", "--budget", 0.2, "-o", "p.json"), "cannot reach 20%"),
        (("--method", "auto", "--budget", 0.5, "-o", "p.json"), "--budget is not for auto"),
        (("--method", "auto", "--target-flops", "0.5", "--target-kv", "0.5", "-o", "p.json"), "one target"),
        (("--method", "auto", "-o", "p.json"), "needs 20 samples"),
        (("--method", "auto", "--target-ttft", "5 minutes", "-o", "p.json"), "no time"),
        (("--method", "auto", "--target-ttft", "50ms", "-o", "p.json"), "needs a device"),
        (("--method", "plphp", "--budget", 0.5, "--shard", "1/2", "-o", "p.json"), "merge the shards first"),
        (("--shard", "2", "--statistics", "s"), "'2' is no shard"),
        (("--statistics", "s", "--rows", "first"), "'last', 'text', 'peak'"),
        (("--statistics", "s", "--device", "abacus"), "Unknown device 'abacus'"),
        (("--method", "auto", "--target-ttft", "50ms", "--device", "abacus", "-o", "p.json"), "orin-nano"),
        (("--statistics", "s", "--device", "cpu", "--device", "cuda"), "several devices"),
    ],
)
def test_mistakes_get_one_line(
    options: tuple[object, ...], words: str, tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("calibrate", tiny_folder, "--data", data, *SIZE, *options)
    assert result.exit_code in (1, 2), result.output
    assert words in result.output and "Traceback" not in result.output
    assert not list(tmp_path.glob("*.json"))


def test_an_unreachable_time_is_said_before_anything_is_measured(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    enough = data.with_name("enough.jsonl")
    enough.write_text((data.read_text() + "\n") * 8)
    options = ("--method", "auto", "--target-ttft", "0.0001ms", "--device", "orin-nano", "-o", tmp_path / "p.json")
    result = call("calibrate", tiny_folder, "--data", enough, *SIZE, *options)
    assert result.exit_code == 1 and "pruning cannot pass" in result.output


def test_an_existing_plan_is_kept(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("mine")
    common = ("calibrate", tiny_folder, "--data", data, *SIZE, "--method", "divprune", "--budget", 0.5, "-o", tmp_path / "p.json")
    assert "exists already" in call(*common).output
    assert (tmp_path / "p.json").read_text() == "mine"
    done(*common, "--force")


def test_statistics_of_another_model_are_refused(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    done("calibrate", tiny_folder, "--data", data, *SIZE, "--statistics", tmp_path / "s")
    result = call(
        "calibrate", tiny_folder, "--data", data, "--image-size", "84x112", "--statistics", tmp_path / "s", "--method", "plphp",
        "--budget", 0.5, "-o", tmp_path / "p.json",
    )  # fmt: skip
    assert result.exit_code == 2 and "another geometry" in result.output


def test_a_missing_image_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"image": "gone.png", "prompt": "What?"}')
    result = call("calibrate", tiny_folder, "--data", tmp_path / "d.jsonl", *SIZE, "--statistics", tmp_path / "s")
    assert result.exit_code == 2 and "gone.png" in result.output


def test_a_bad_sample_ends_or_is_skipped(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    lines = data.read_text().splitlines()
    images = [str(data.parent / json.loads(line)["image"]) for line in lines]
    (tmp_path / "cut.png").write_bytes(Path(images[0]).read_bytes()[:300])
    good = [{**json.loads(line), "image": image} for line, image in zip(lines, images, strict=True)][:2]
    bad = [{**sample, "image": "cut.png"} for sample in good]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(map(json.dumps, [good[0], *bad, good[1]])))
    common = ("calibrate", tiny_folder, "--data", mixed, *SIZE, "--statistics", tmp_path / "s")
    result = call(*common)
    assert result.exit_code == 2 and f"{mixed}:2: Cannot read" in result.output
    (partial,) = tmp_path.glob(".s.*.partial")
    assert Statistics.load(partial).samples == 1
    result = done(*common, "--skip-bad", "--json")
    assert [message.split(": ")[0] for message in json.loads(result.stdout)["skipped"]] == [f"{mixed}:2", f"{mixed}:3"]
    assert Statistics.load(tmp_path / "s").samples == 2 and "2 bad samples skipped" in result.stderr


def test_one_sample_is_enough_for_statistics(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    done("calibrate", tiny_folder, "--data", data, *SIZE, "--limit", 1, "--statistics", tmp_path / "s")
    assert Statistics.load(tmp_path / "s").samples == 1


def test_methods_that_were_not_tried_are_no_bad_samples(capsys: pytest.CaptureFixture[str]) -> None:
    result = CalibrationResult(None, 40, untried=("fitprune: its statistics take longer",))
    show_calibration(result, as_json=False)
    assert capsys.readouterr().err == "not tried: fitprune: its statistics take longer\n"
    show_calibration(result, as_json=True)
    assert json.loads(capsys.readouterr().out)["untried"] == list(result.untried)
