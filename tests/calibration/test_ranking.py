"""The learned ranking of caches: what calibration records and derives, against something that does not share its code."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from learned_weights import input_cut

from edgeprune.calibration.calibrate import CalibrationResult
from edgeprune.calibration.collect.run import CollectOptions
from edgeprune.calibration.data.samples import Sample, read_samples
from edgeprune.calibration.learn.ranking import RIDGE, LayerSums, LearnedRanking, add_recording, learn_ranking
from edgeprune.calibration.learn.run import Rival
from edgeprune.calibration.replay.episodes import Recorder, divergence
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.cli import main
from edgeprune.cli.output.basic import show_calibration
from edgeprune.errors import UsageError
from edgeprune.io.progress import SILENT
from edgeprune.methods.ranking import write
from edgeprune.methods.weights import unpack
from edgeprune.plan import Geometry, KeepPlan, Weights
from edgeprune.plan.presets import ranked_plan, unpruned_plan
from edgeprune.tabletop.dataset import write_dataset

GEOMETRY = Geometry(84, 112, 14, 2)  # 12 tokens
BASE = unpruned_plan("qwen2_vl", 3, GEOMETRY)
REQUEST = CollectOptions(GEOMETRY, rows="learned", reduce="max", max_tokens=4, fit="pad")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, 20, 6, kinds=("exists",))
    return folder


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[Sample]:
    return read_samples(folder / "dataset.jsonl")


class Kept(LayerSums):
    """Sums that keep what is added."""

    def add(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        self.rows, self.targets = rows, targets


def test_targets_and_features_are_those_of_transformers(tiny: LoadedModel, samples: list[Sample]) -> None:
    recorder = Recorder(tiny, BASE, 4, "cpu")
    (recording,) = recorder.record(samples[0], "pad")
    assert recording.steps == 3
    found = [Kept() for _ in range(3)]
    add_recording(found, recorder, recording, "max")
    segments = [*recorder.segments(recording), recording.answer]
    before, tokens = segments[0].embeds.shape[1], segments[1].embeds.shape[1]
    tiny.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = tiny.model.model.language_model(
                inputs_embeds=torch.cat([part.embeds for part in segments], dim=1),
                position_ids=torch.cat([part.positions for part in segments], dim=1)[:, None],
                output_attentions=True,
                output_hidden_states=True,
            )
    finally:
        tiny.model.set_attn_implementation("sdpa")
    asked = before + tokens + segments[2].embeds.shape[1]  # where the answer begins
    for layer, each in enumerate(found):
        attention = output.attentions[layer][0].unflatten(0, (2, 3))[..., before : before + tokens]  # [KV heads, group, S, V]
        highest = attention[:, :, asked - 1 :].amax(dim=(1, 2))
        peak = attention[:, :, before + tokens : asked].amax(dim=(1, 2))
        torch.testing.assert_close(each.targets.T, torch.log(highest + 1 / 12), rtol=1e-4, atol=1e-5)
        block = tiny.model.model.language_model.layers[layer]
        values = block.self_attn.v_proj(block.input_layernorm(output.hidden_states[layer][0]))[before : before + tokens]
        expected = torch.cat([values, torch.log(peak.T + 1 / 12)], dim=1)
        torch.testing.assert_close(each.rows, expected, rtol=1e-4, atol=1e-5)


def test_weights_are_the_least_squares_within_images() -> None:
    generator = np.random.default_rng(5)
    images = [(generator.normal(size=(9, 4)), generator.normal(size=(9, 2))) for _ in range(3)]
    for rows, _ in images:
        rows[:, 3] = 7.0  # says nothing
    sums = LayerSums()
    for rows, targets in images:
        sums.add(torch.from_numpy(rows) + 100 * generator.normal(), torch.from_numpy(targets))
    centred = np.concatenate([rows - rows.mean(axis=0) for rows, _ in images])
    targets = np.concatenate([each - each.mean(axis=0) for _, each in images])
    penalty = np.diag(np.sqrt(RIDGE * np.square(centred).sum(axis=0)))
    best, *_ = np.linalg.lstsq(np.concatenate([centred, penalty]), np.concatenate([targets, np.zeros((4, 2))]), rcond=None)
    np.testing.assert_allclose(sums.solution().numpy(), best, rtol=1e-5, atol=1e-5)


def test_nothing_to_see_gives_no_weight() -> None:
    sums = LayerSums()
    sums.add(torch.ones(9, 4), torch.ones(9, 2))
    assert sums.solution().tolist() == [[0.0, 0.0]] * 4


def test_the_weights_name_their_model(tiny: LoadedModel, samples: list[Sample], tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    weights = learn_ranking(tiny, samples[:3], BASE, REQUEST, 0.5, output, SILENT).weights
    header, tensors = unpack(weights, "")
    assert header["weights_sha256"] == tiny.weights_sha256
    assert tensors["ranking"].shape == (3, 2 * 8 + 2, 2)
    assert learn_ranking(tiny, samples[:3], BASE, REQUEST, 0.5, output, SILENT).weights == weights
    with pytest.raises(UsageError, match="weights of one method"):
        learn_ranking(tiny, samples, BASE.with_cuts(input_cut("learned", 5, 48)), REQUEST, 0.5, output, SILENT)


def test_held_out_images_judge_and_are_learned_from_too(tiny: LoadedModel, samples: list[Sample], tmp_path: Path) -> None:
    # Judged by caches that are cut for the runtime's own loop; learned from by one pass over all images.
    learning = learn_ranking(tiny, samples[:8], BASE, REQUEST, 0.5, tmp_path / "plan.json", SILENT)
    recorder, sums = Recorder(tiny, BASE, 4, "cpu"), [LayerSums() for _ in range(3)]
    numbers = [0, 1, 2, 4, 5, 6, 3, 7]  # every fourth comes last
    recordings = [recorder.record(samples[number], "pad")[0] for number in numbers]
    for number, recording in enumerate(recordings):
        if number == 6:
            judged = torch.stack([each.solution() for each in sums])
        add_recording(sums, recorder, recording, "max")
    found = unpack(learning.weights, "")[1]["ranking"]
    torch.testing.assert_close(found, torch.stack([each.solution() for each in sums]).float(), rtol=1e-4, atol=1e-6)

    def moved(**options: Any) -> float:
        plan, total = ranked_plan(BASE, [6, 6, 6], **options), 0.0
        for sample, recording in zip((samples[3], samples[7]), recordings[6:], strict=True):
            ids = [int(row.argmax()) for row in recorder.replay(recording).logits[0]]
            first = int(recorder.teacher_forced_logits(sample, [], "pad")[0].argmax())
            said = [first, *ids[: recording.steps - 1]]
            whole = recorder.teacher_forced_logits(sample, said, "pad")
            total += float(divergence(whole, Recorder(tiny, plan, 1, "cpu").teacher_forced_logits(sample, said, "pad")).sum())
        return total / 2

    own = moved(rows="learned", reduce="max", weights=write(judged, {"weights_sha256": tiny.weights_sha256}))
    assert (learning.answers, learning.share) == (2, 0.5)
    assert learning.divergence == pytest.approx(own, rel=1e-3)
    assert [each.divergence for each in learning.rivals] == sorted(each.divergence for each in learning.rivals)
    assert {(each.options["rows"], each.options["reduce"]) for each in learning.rivals} == set(
        itertools.product(("last", "text", "peak"), ("mean", "max"))
    )
    assert learning.rivals[0].divergence == pytest.approx(moved(**learning.rivals[0].options), rel=1e-3)
    assert learning.ahead == (learning.divergence < learning.rivals[0].divergence)


@pytest.mark.parametrize("stop", [3, 7])
def test_an_interrupted_run_goes_on(
    stop: float, tiny: LoadedModel, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before the held-out images and among them.
    whole = learn_ranking(tiny, samples[:8], BASE, REQUEST, 0.5, tmp_path / "whole.json", SILENT)
    asked, plain = list[Sample](), Recorder.record

    def record(self: Recorder, sample: Sample, fit: str) -> Any:
        if len(asked) == stop:
            raise KeyboardInterrupt
        asked.append(sample)
        return plain(self, sample, fit)

    monkeypatch.setattr(Recorder, "record", record)
    with pytest.raises(KeyboardInterrupt):
        learn_ranking(tiny, samples[:8], BASE, REQUEST, 0.5, tmp_path / "plan.json", SILENT)
    assert [path.suffix for path in tmp_path.iterdir()] == [".ranking"]
    asked.clear()
    done, stop = stop, float("inf")
    again = learn_ranking(tiny, samples[:8], BASE, REQUEST, 0.5, tmp_path / "plan.json", SILENT)
    assert again == whole and not list(tmp_path.iterdir())
    assert len(asked) == 8 - done
    asked.clear()
    other = replace(REQUEST, reduce="mean")
    learn_ranking(tiny, samples[:8], BASE, other, 0.5, tmp_path / "plan.json", SILENT)
    assert len(asked) == 8


def test_an_order_that_is_not_ahead_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    rivals = Rival("plphp", {"rows": "peak", "reduce": "max"}, 0.1), Rival("plphp", {"rows": "last", "reduce": "mean"}, 0.3)
    plan = ranked_plan(BASE, [3, 3, 3])

    def shown(own: float, answers: int) -> tuple[str, str]:
        ranking = LearnedRanking(Weights("none"), answers, 0.25, own, rivals)
        show_calibration(CalibrationResult(None, 8, plan, Path("p.json"), ranking=ranking), as_json=False)
        printed = capsys.readouterr()
        return printed.out, printed.err

    table, warning = shown(0.2, 5)
    assert "25% of every cache, 5 held-out answers" in table and "--rows last --reduce mean" in table
    assert warning.endswith("--method plphp --budget 0.25 --rows peak --reduce max -o PLAN\n")
    assert shown(0.05, 5)[1] == ""
    table, warning = shown(0.0, 0)
    assert "held-out" not in table and "no held-out answer has a second token" in warning


def calibrate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["calibrate", *map(str, arguments)])


def test_the_command_learns_and_later_cuts_keep_the_ranking(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    common = (tiny_folder, "--data", folder / "dataset.jsonl", "--image-size", "84x112", "--fit", "pad", "--max-tokens", 9)
    first, second = tmp_path / "cache.json", tmp_path / "rate.json"
    ranked = ("--rows", "learned", "--reduce", "max")
    made = calibrate(*common, *ranked, "--method", "plphp", "--budget", 0.5, "-o", first, "--json")
    assert made.exit_code == 0, made.output
    plan = KeepPlan.load(first)
    assert [cut.options for cut in plan.cache_cuts] == [{"rows": "learned", "reduce": "max", "spread": False}] * 3
    assert first.with_suffix(".weights.safetensors").is_file() and len(plan.weights) == 1
    said = json.loads(made.output)
    assert said["kv"] == pytest.approx(0.5, abs=0.1)
    assert (said["ranking"]["answers"], said["ranking"]["share"], len(said["ranking"]["rivals"])) == (5, 0.5, 6)
    made = calibrate(*common, "--method", "dyrate", "--form", "schedule", "--budget", 0.5, "--onto", first, "-o", second)
    assert made.exit_code == 0, made.output
    assert KeepPlan.load(second).weights == plan.weights
    again = calibrate(*common, *ranked, "--method", "plphp", "--budget", 0.5, "-o", first.with_name("cache.json"))
    assert again.exit_code == 2 and "exists" in again.output
    refused = calibrate(*common, *ranked, "--method", "auto", "--target-kv", 0.5, "-o", tmp_path / "auto.json")
    assert refused.exit_code == 2 and "--rows learned is not for auto" in refused.output
    refused = calibrate(*common, *ranked, "--method", "fitprune", "--budget", 0.5, "-o", tmp_path / "f.json")
    assert refused.exit_code == 2 and "--rows learned is not for fitprune" in refused.output
    refused = calibrate(*common, *ranked, "--statistics", tmp_path / "s")
    assert refused.exit_code == 2 and "--rows learned is not for statistics alone" in refused.output


def test_too_few_images_are_refused(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    few = folder / "few.jsonl"
    few.write_text("\n".join((folder / "dataset.jsonl").read_text().splitlines()[:3]) + "\n")
    how = ("--rows", "learned", "--method", "plphp", "--budget", 0.5)
    made = calibrate(tiny_folder, "--data", few, *how, "-o", tmp_path / "p.json")
    assert made.exit_code == 2 and "takes 20" in made.output
