"""The method learned: what calibration records and derives, each against something that does not share its code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from learned_weights import input_cut
from recorded_scenes import GEOMETRY, Chosen, recorded

from edgeprune.calibration import calibrate as command
from edgeprune.calibration.calibrate import CalibrationResult
from edgeprune.calibration.data.samples import Sample, read_samples
from edgeprune.calibration.learn import run, training
from edgeprune.calibration.learn.closed import Settings, Sums, closed_form
from edgeprune.calibration.learn.heldout import MOST_TRIED, Choice, HeldOut, search
from edgeprune.calibration.learn.run import Learning, LearnRequest, Rival, learn
from edgeprune.calibration.learn.scenes import Listener, Scene, lost, probabilities
from edgeprune.calibration.learn.straight import Chooser, choice_loss, straight_through
from edgeprune.calibration.learn.training import Schedule, train
from edgeprune.calibration.replay.episodes import Recorder, ask
from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.cli import main
from edgeprune.cli.output.basic import show_calibration
from edgeprune.errors import UsageError
from edgeprune.io.progress import SILENT
from edgeprune.methods.base import InputView, represented, unit
from edgeprune.methods.divprune import DivPrune
from edgeprune.methods.learned import Learned, read, write
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.runtime.media.likeness import Likeness
from edgeprune.tabletop.dataset import write_dataset

REQUEST = LearnRequest(keep=5, least=5, rank=8, train=False, seed=0, max_tokens=3, fit="pad", device="cpu")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, 22, 6, kinds=("exists", "describe"))
    return read_samples(folder / "dataset.jsonl")


@pytest.fixture(scope="module")
def scene(tiny: LoadedModel, samples: list[Sample]) -> tuple[Listener, Scene]:
    return recorded(tiny, samples[:2])


@pytest.mark.parametrize("family", ["qwen2_vl", "paligemma", "lfm2_vl", "gemma3", "qwen3_vl"])
def test_the_decoder_says_again_what_it_answered(family: str, samples: list[Sample], tmp_path: Path) -> None:
    # The answers come from the runtime's own loop, token by token. All questions of an image are replayed at once.
    import importlib

    made = importlib.import_module(f"tiny_{family}")
    (tmp_path / family).mkdir()
    model = load_model(resolve_model(str(made.folder(tmp_path / family))))
    listener, found = recorded(model, samples[:2], model.geometry(made.SIZE))
    logits = listener.logits(found)
    table = model.family.decoder().embed_tokens
    rows = torch.split(logits, [1 + asked.answer.embeds.shape[1] for asked in found.asked])
    for asked, said in zip(found.asked, rows, strict=True):
        again = table(said[:-1].argmax(dim=-1))
        assert torch.allclose(again, asked.answer.embeds[0, :, : again.shape[1]], atol=1e-6)
    apart = torch.cat(list(listener.one_by_one(found.prefix, found.visual, found.asked)))
    assert torch.allclose(apart, logits, atol=1e-5)
    # Each question with tokens of its own, in one forward pass.
    chosen = [torch.tensor(some) for some in ([1, 3, 4], [0, 2])]
    seen = [Choice([number], [(0, None, some)]).shown(found, found.visual.embeds, None) for number, some in enumerate(chosen)]  # type: ignore[list-item]
    alone = [listener.logits(found.only([number]), chosen=some) for number, some in enumerate(chosen)]
    assert all(torch.allclose(*both, atol=1e-5) for both in zip(listener.answers(found.prefix, seen), alone, strict=True))


def test_tokens_behind_a_gate_are_as_good_as_gone(scene: tuple[Listener, Scene]) -> None:
    listener, found = scene
    chosen = torch.tensor([1, 4, 5, 9])
    gate = torch.zeros(12).index_fill(0, chosen, 1.0)
    without, behind = listener.logits(found, chosen=chosen), listener.logits(found, gate=gate)
    assert torch.allclose(without, behind, atol=1e-3)
    assert not torch.allclose(without, listener.logits(found), atol=1e-2)


def test_a_dropped_token_has_a_gradient(scene: tuple[Listener, Scene]) -> None:
    listener, found = scene
    gate = torch.zeros(12).index_fill(0, torch.tensor([1, 4]), 1.0).requires_grad_(True)
    (gradient,) = torch.autograd.grad(lost(found, listener.logits(found, gate=gate)).sum(), gate)
    # By the difference that a little of the token makes of which a little makes most.
    most = int((gradient.abs() * (gate.detach() == 0)).argmax())
    step = torch.zeros(12).index_fill(0, torch.tensor([most]), 1e-3)
    with torch.no_grad():
        before, after = (float(lost(found, listener.logits(found, gate=gate + by)).sum()) for by in (0 * step, step))
    assert float(gradient[most]) == pytest.approx((after - before) / 1e-3, rel=0.05)


def test_importance_is_what_a_longer_token_would_change(scene: tuple[Listener, Scene]) -> None:
    listener, found = scene
    said = listener.logits(found).argmax(dim=-1)

    def loss(by: float) -> float:
        visual = found.visual.embeds.clone()
        visual[0, 3] *= 1 + by
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(listener.logits(found, visual=visual).double(), said, reduction="sum"))

    slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
    assert float(found.importance[3].exp()) == pytest.approx(abs(slope) + 1e-4, rel=0.02)


def test_divergence_is_that_of_whole_distributions(scene: tuple[Listener, Scene]) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(5, 60, generator=generator) for _ in range(2))

    def found(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        likely, ids = probabilities(one)
        return lost(replace(scene[1], likely=likely, ids=ids), other)

    expected = torch.nn.functional.kl_div(other.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(found(one, other), expected, atol=1e-4)
    wide = (torch.cat([rows, torch.full((5, 100), -20.0)], dim=1) for rows in (one, other))
    assert torch.allclose(found(*wide), expected, atol=1e-3)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    write_dataset(folder, 20, 6, images=2, kinds=("picture", "which"))
    return read_samples(folder / "dataset.jsonl")


def test_images_of_one_question_are_a_scene_and_chosen_by_themselves(tiny: LoadedModel, pairs: list[Sample]) -> None:
    listener, found = recorded(tiny, pairs[:2])
    assert found.sizes == (12, 12) and len(found.asked) == 2
    for asked, said in zip(found.asked, torch.split(listener.logits(found), [each.tokens for each in found.asked]), strict=True):
        again = tiny.family.decoder().embed_tokens(said[:-1].argmax(dim=-1))
        assert torch.allclose(again, asked.answer.embeds[0, :, : again.shape[1]], atol=1e-6)
    seen = list[torch.Tensor]()

    def first(view: InputView, keep: int) -> torch.Tensor:
        seen.append(view.visual)
        return torch.arange(keep)

    with torch.no_grad():
        divergence = HeldOut(listener, [lambda: found], 48).divergence(Chosen(first), (3,))
        chosen = torch.tensor([0, 1, 2, 12, 13, 14])
        expected = float(lost(found, listener.logits(found, chosen=chosen)).sum()) / 2
    assert [len(tokens) for tokens in seen] == [12] * 4
    assert divergence == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("withdrawn", [False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "paligemma", "gemma3"])
def test_the_decoder_says_what_a_cut_that_weighs_answers(
    family: str, withdrawn: bool, samples: list[Sample], pairs: list[Sample], tmp_path: Path
) -> None:
    # The runtime has the counts as inputs and in its caches, image after image; here they are a bias over one forward pass.
    import importlib

    made = importlib.import_module(f"tiny_{family}")
    (tmp_path / family).mkdir()
    model = load_model(resolve_model(str(made.folder(tmp_path / family))))
    asked = samples[:1] if family == "paligemma" else pairs[:1]  # it takes one image
    listener, found = recorded(model, asked, model.geometry(made.SIZE))
    cut = Cut("input", "divprune", 3, options={"weigh": True})
    base = unpruned_plan(model.folder.model_type, model.decoder_shape().layers, model.geometry(made.SIZE))
    if withdrawn:
        base = base.with_cuts(Cut("layer", "vtw", 0, layer=base.layers - 1))
        listener = Listener.of(model.family.decoder(), base)
    recorder, images, _ = ask(reference_model(model, replace(base, cuts=(cut, *base.cuts))), asked[0], "pad", 6)
    said = torch.stack([torch.as_tensor(step.logits) for step in recorder.steps[images - 1 :]])

    choices, counts, start = list[torch.Tensor](), list[torch.Tensor](), 0
    for tokens in found.images(model.family.decoder().hidden):
        chosen = DivPrune(cut, base.geometry).select(InputView(tokens, tokens[:1]), 3)
        choices.append(chosen + start)
        counts.append(represented(unit(tokens), chosen))
        start += len(tokens)
    replayed = listener.logits(found, chosen=torch.cat(choices), logs=torch.cat(counts).log())
    same = 1  # rows are comparable as long as the pruned answer is the unpruned one
    while same < min(len(said), len(replayed)) and int(said[same - 1].argmax()) == int(found.ids[same - 1, 0]):
        same += 1
    assert torch.allclose(said[:same], replayed[:same].detach(), atol=1e-4)
    plain = listener.logits(found, chosen=torch.cat(choices))
    assert not torch.allclose(said[:same], plain[:same].detach(), atol=1e-4)


def planted(images: int = 12, width: int = 6) -> tuple[Sums, torch.Tensor]:
    """Return the sums of images whose tokens' importance is a linear function of them, plus a number of each image."""
    generator = torch.Generator().manual_seed(3)
    direction, scales = torch.randn(width, generator=generator), torch.logspace(-1, 1, width)
    sums = Sums()
    for _ in range(images):
        visual = torch.randn(40, width, generator=generator) * scales + 3
        sums.add(visual, visual @ direction + 10 * torch.randn(1, generator=generator))
    return sums, direction


def test_the_closed_form_finds_what_was_planted() -> None:
    sums, direction = planted()
    theta = closed_form(sums, Settings(ridge=1e-9), 4)["theta"]
    assert torch.allclose(theta / theta.norm(), (direction / direction.norm()).double(), atol=1e-3)
    # The exponent is the deviation of the score within images.
    assert float(theta @ sums.within @ theta / sums.count) == pytest.approx(0.5**2, rel=1e-3)


def test_whitening_makes_all_components_count_alike() -> None:
    sums, _ = planted()
    found = closed_form(sums, Settings(whitening=1.0), 4)
    centred = sums.products / sums.count - sums.mean[:, None] * sums.mean[None]
    spread = found["metric"].T @ centred @ found["metric"]
    assert torch.allclose(spread, torch.eye(4, dtype=spread.dtype), atol=1e-6)
    assert torch.allclose(sums.mean @ found["metric"] + found["metric_bias"], torch.zeros(4, dtype=spread.dtype), atol=1e-9)


def test_what_never_changes_counts_for_nothing() -> None:
    sums, generator = Sums(), torch.Generator().manual_seed(1)
    for _ in range(3):
        visual = torch.randn(30, 4, generator=generator)
        visual[:, 2] = 7.0
        sums.add(visual, visual[:, 0])
    found = closed_form(sums, Settings(), 3)
    assert torch.isfinite(found["theta"]).all() and abs(float(found["theta"][2])) < 1e-5
    assert found["metric"][2].abs().max() < 1e-3


def method_of(sums: Sums, keep: int, found: dict[str, torch.Tensor] | None = None) -> Learned:
    header = {"weights_sha256": "", "keeps": [1, 20], "question": 0.0, "position": 0.3}
    weights = write(closed_form(sums, Settings(), 4) | (found or {}), header)
    return Learned(Cut("input", "learned", keep, weights=weights), Geometry(4, 5, 1, 1))


def trainee_of(sums: Sums, seed: int = 0) -> Chooser:
    made = Chooser(method_of(sums, 1), sums.mean, sums.deviation, seed)
    with torch.no_grad():
        made.out.copy_(torch.linspace(-1, 1, len(made.out)))
    made.begin()
    return made


@pytest.mark.parametrize("keep", [1, 6, 20])
def test_training_makes_the_choices_of_the_method(keep: int) -> None:
    sums, _ = planted()
    made, visual = trainee_of(sums), torch.randn(20, 6, generator=torch.Generator().manual_seed(8)) * 2 + 3
    scores, places = made(visual, torch.arange(20))
    gate = straight_through(scores, places, keep, 1.0, lambda: torch.zeros(20))
    chosen = method_of(sums, keep, made.tensors()).select(InputView(visual, visual[:1]), keep)
    assert torch.nonzero(gate.detach().round())[:, 0].tolist() == chosen.tolist()
    assert gate.sum().item() == pytest.approx(keep)
    gate[0].backward()  # type: ignore[no-untyped-call]
    assert keep == 20 or made.theta.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_an_interrupted_training_ends_the_same(
    scene: tuple[Listener, Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    listener, found = scene
    sums = Sums()
    sums.add(found.visual.embeds[0], found.importance)
    scenes: list[Callable[[], Scene]] = [lambda: found, lambda: found.only([0])]

    def trained(state: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
        def progress(done: int, loss: float) -> None:
            if done == stop:
                raise KeyboardInterrupt

        made, schedule = Chooser(method_of(sums, 1), sums.mean, sums.deviation, 0), Schedule(3, (3, 5), 0)
        train(scenes, made, partial(choice_loss, listener, made, schedule), schedule, state, progress)
        return made.tensors()

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop=3)
    again = trained(tmp_path / "parts")
    assert all(torch.allclose(whole[name], again[name], atol=1e-6) for name in whole)


def test_a_search_takes_the_best_of_one_setting_after_the_other() -> None:
    counted = list[int]()
    wanted = Settings(exponent=1.0, ridge=0.02, whitening=1.0, question=0.0)

    def score(settings: Settings) -> float:
        return float(sum(abs(one - other) for one, other in zip(astuple(settings), astuple(wanted), strict=True)))

    assert search(score, counted.append) == (wanted, 0.0)
    assert counted == list(range(1, MOST_TRIED + 1))


def base_of(model: LoadedModel) -> KeepPlan:
    return unpruned_plan("qwen2_vl", 3, GEOMETRY)


def test_learning_from_start_to_end(tiny: LoadedModel, samples: list[Sample], tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    found = learn(tiny, samples, base_of(tiny), REQUEST, output, SILENT)
    assert (found.images, found.held_out, found.trained) == (17, 5, False)
    assert [each.divergence for each in found.rivals] == sorted(each.divergence for each in found.rivals)
    assert found.ahead == (found.divergence < found.rivals[0].divergence)
    header, tensors = read(found.weights)
    assert header["keeps"] == [5, 5] and header["weights_sha256"] == tiny.weights_sha256
    assert tensors["metric"].shape == (48, 8)
    assert not list(tmp_path.iterdir())  # what an interruption would need is gone


def test_question_and_position_may_count_or_not(tiny: LoadedModel, samples: list[Sample], tmp_path: Path) -> None:
    asked = [replace(REQUEST, position=False, question=question) for question in (True, False)]
    found = [learn(tiny, samples, base_of(tiny), each, tmp_path / "plan.json", SILENT, gate=False) for each in asked]
    assert found[0].divergence <= found[1].divergence
    header, tensors = read(found[1].weights)
    assert header["question"] == 0 and header["position"] == 0 and not tensors["asked"].any()


def test_what_was_seen_goes_with_the_weights(tiny: LoadedModel, samples: list[Sample], tmp_path: Path) -> None:
    weights = learn(tiny, samples, base_of(tiny), REQUEST, tmp_path / "plan.json", SILENT, gate=False).weights
    plan = base_of(tiny).with_cuts(Cut("input", "learned", 5, weights=weights))
    likeness, method = Likeness.of(plan), Learned(plan.cuts[0], GEOMETRY)
    assert likeness is not None
    pictures = list(dict.fromkeys(sample.images for sample in samples))
    tokens = [recorded(tiny, [sample for sample in samples if sample.images == each])[1].visual.embeds for each in pictures]
    places = torch.stack([method.places(InputView(each[0], each[0])).mean(dim=0) for each in tokens])
    rest = places[[number for number in range(len(places)) if number % 4 != 3]].double()
    torch.testing.assert_close(torch.from_numpy(likeness.mean), rest.mean(dim=0), rtol=1e-3, atol=1e-5)
    deviation = rest.std(dim=0, correction=0)
    least = 0.1 * deviation.square().mean().sqrt()
    torch.testing.assert_close(torch.from_numpy(likeness.deviation), deviation.clamp_min(least), rtol=1e-2, atol=1e-5)
    # An image is unlike them from half as far again as the farthest of those that were held out.
    assert max(likeness.distance(each.numpy()) for each in tokens[3::4]) == pytest.approx(1 / 1.5, rel=1e-3)
    assert likeness.distance(torch.zeros(1, 12, 48).numpy()) > 1


def test_learning_for_a_cut_that_weighs_from_one_image_and_from_two(
    tiny: LoadedModel, samples: list[Sample], pairs: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "FEWEST_STEPS", 2)
    monkeypatch.setattr(run, "EPOCHS", 0)
    mixed = [*samples[:20], *pairs[:20]]
    request = replace(REQUEST, train=True, weigh=True)
    found = learn(tiny, mixed, base_of(tiny), request, tmp_path / "plan.json", SILENT)
    assert (found.images, found.held_out) == (15, 5)  # 10 single ones and 10 pairs
    assert all(rival.options["weigh"] for rival in found.rivals)
    monkeypatch.setattr(run, "MERGING_EPOCHS", 0)
    merged = learn(tiny, mixed, base_of(tiny), replace(request, train=False, merge=True), tmp_path / "merged.json", SILENT)
    assert merged.unmerged is not None and merged.divergence <= merged.unmerged and "own" in read(merged.weights)[1]
    plain = learn(tiny, mixed, base_of(tiny), replace(request, weigh=False), tmp_path / "plain.json", SILENT)
    assert found.divergence != plain.divergence and "weigh" not in plain.rivals[0].options


def test_an_interrupted_recording_goes_on(
    tiny: LoadedModel, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(tiny, samples, base_of(tiny), REQUEST, tmp_path / "whole.json", SILENT, gate=False)
    ask, asked = Recorder.ask, list[str]()

    def interrupted(self: Recorder, sample: Sample, fit: str, **how: bool) -> Any:
        asked.append(sample.prompt)
        if len(asked) == 9:
            raise KeyboardInterrupt
        return ask(self, sample, fit, **how)

    monkeypatch.setattr(Recorder, "ask", interrupted)
    again = partial(learn, tiny, samples, base_of(tiny), REQUEST, tmp_path / "parts.json", SILENT, gate=False)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert again().weights == whole.weights
    assert len(asked) < len(samples) + 9


def test_what_a_search_chose_is_learned_again_from_all_samples(
    tiny: LoadedModel, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, base, ask, asked = tmp_path / "kept", base_of(tiny), Recorder.ask, list[str]()

    def counted(self: Recorder, sample: Sample, fit: str, **how: bool) -> Any:
        asked.append(sample.prompt)
        return ask(self, sample, fit, **how)

    few = [sample for sample in samples if sample.images in {each.images for each in samples[:40]}]
    first = learn(tiny, few, base, REQUEST, tmp_path / "p.json", SILENT, kept=kept, gate=False)
    found = base.with_cuts(Cut("input", "learned", REQUEST.keep, weights=first.weights), Cut("layer", "vtw", 0, 2))
    monkeypatch.setattr(Recorder, "ask", counted)
    options = SimpleNamespace(output=tmp_path / "p.json", seed=0, max_tokens=3, fit="pad", device="cpu", settings={"rank": 8})
    again = command._learned_again(options, tiny, samples, found, kept, SILENT)  # type: ignore[arg-type]
    assert 0 < len(asked) == len(samples) - len(few)  # what is recorded of the others serves again
    behind = base.with_cuts(Cut("layer", "vtw", 0, 2))
    whole = learn(tiny, samples, behind, REQUEST, tmp_path / "p.json", SILENT, kept=kept, gate=False)
    assert again.weights == [whole.weights] != [first.weights]
    assert [replace(cut, weights=None) for cut in again.cuts] == [replace(cut, weights=None) for cut in found.cuts]
    zero_shot = base.with_cuts(Cut("input", "divprune", 5))
    assert command._learned_again(options, tiny, samples, zero_shot, kept, SILENT) is zero_shot  # type: ignore[arg-type]


def test_images_that_are_alike_teach_nothing(tiny: LoadedModel, samples: list[Sample], tmp_path: Path) -> None:
    # Other names for the same picture.
    (picture,) = samples[0].images
    same = []
    for number in range(24):
        copy = tmp_path / f"{number}.png"
        copy.write_bytes(Path(str(picture)).read_bytes())
        same.append(replace(samples[0], image=copy))
    with pytest.raises(UsageError, match="show 1 different image; to learn"):
        learn(tiny, same, base_of(tiny), REQUEST, tmp_path / "plan.json", SILENT)


def test_questions_with_the_same_choice_go_through_together(scene: tuple[Listener, Scene]) -> None:
    listener, found = scene
    judge = HeldOut(listener, [lambda: found], 48)
    apart = iter([0, 1, 0, 1])

    def by_question(view: InputView, keep: int) -> torch.Tensor:
        return torch.arange(keep) + next(apart)

    first, second = (torch.arange(4) + by for by in (0, 1))
    with torch.no_grad():
        expected = 0.0
        for number, chosen in enumerate((first, second)):
            one = found.only([number])
            expected += float(lost(one, listener.logits(one, chosen=chosen)).sum()) / 2
    assert judge.divergence(Chosen(by_question), (4,)) == pytest.approx(expected, rel=1e-3)


def calibrate(*words: object) -> Any:
    return CliRunner().invoke(main, ["calibrate", *map(str, words)])


@pytest.fixture(scope="module")
def data(samples: list[Sample]) -> Path:
    return Path(str(samples[0].images[0])).parents[1] / "dataset.jsonl"


def test_the_command_writes_a_plan_that_can_be_exported(tiny: LoadedModel, data: Path, tmp_path: Path) -> None:
    output, kept = tmp_path / "plan.json", tmp_path / "kept"
    how = ("--method", "learned", "--budget", 0.42, "--max-tokens", 2, "--image-size", "84x112", "--fit", "pad")
    done = calibrate(tiny.folder.path, "--data", data, *how, "--statistics", kept, "-o", output)
    assert done.exit_code == 0, done.output
    plan = KeepPlan.load(output)
    assert plan.input is not None and (plan.input.method, plan.input.keep) == ("learned", 5)
    tiny.check_plan(plan)
    assert "on 5 held-out images" in done.output and "closed form" in done.output
    assert len(list(kept.rglob("*.safetensors"))) == 22
    # Another budget asks the model nothing again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "ask", None)
        other: tuple[object, ...] = (*how[:3], 0.2, *how[4:], "--statistics", kept, "--train", "--json")
        patch.setattr(training, "FEWEST_STEPS", 2)
        patch.setattr(run, "EPOCHS", 0)
        again = calibrate(tiny.folder.path, "--data", data, *other, "-o", tmp_path / "other.json")
    assert again.exit_code == 0, again.output
    learning = json.loads(again.stdout)["learning"]
    assert learning["held_out"] == 5 and learning["rivals"][0]["divergence"] <= learning["rivals"][1]["divergence"]
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == [
        "other.weights.safetensors",
        "plan.weights.safetensors",
    ]


def test_what_is_not_ahead_says_so(capsys: pytest.CaptureFixture[str], tiny: LoadedModel) -> None:
    rivals = (Rival("cdpruner", {"weight": 0.2}, 0.3), Rival("divprune", {}, 0.4))
    plan = base_of(tiny).with_cuts(input_cut("learned", 3, 48))
    learning = Learning(plan.weights[0], 30, 10, Settings(), False, 0.35, rivals)
    show_calibration(CalibrationResult(None, 40, plan=plan, output=Path("p.json"), learning=learning), as_json=False)
    command = "edgeprune export MODEL --method cdpruner --keep 0.25 --option weight=0.2 -o BUNDLE"
    assert f"learned is not ahead here. Take cdpruner: {command}" in capsys.readouterr().err
    ahead = replace(learning, divergence=0.2)
    show_calibration(CalibrationResult(None, 40, plan=plan, output=Path("p.json"), learning=ahead), as_json=False)
    assert "not ahead" not in capsys.readouterr().err


def test_mistakes_are_one_line_each(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    how = ("--method", "learned", "--image-size", "84x112", "-o", tmp_path / "plan.json")
    few = calibrate(tiny_folder, "--data", data, *how, "--budget", 0.25, "--limit", 6)
    assert few.exit_code == 2 and "different images; to learn which tokens matter takes 20." in few.output
    assert "learned needs a budget" in calibrate(tiny_folder, "--data", data, *how).output
    (tmp_path / "plan.weights.safetensors").write_bytes(b"")
    there = calibrate(tiny_folder, "--data", data, *how, "--budget", 0.25)
    assert there.exit_code == 2 and "plan.weights.safetensors exists already" in there.output
    bundle = CliRunner().invoke(main, ["export", str(tiny_folder), "-o", str(tmp_path / "b"), *map(str, how[:4]), "--keep", "0.25"])
    assert bundle.exit_code != 0 and "learned @ input has no weights." in bundle.output


def test_training_needs_attention_in_every_layer(samples: list[Sample], tmp_path: Path) -> None:
    import tiny_lfm2_vl

    (tmp_path / "model").mkdir()
    model = load_model(resolve_model(str(tiny_lfm2_vl.folder(tmp_path / "model"))))
    base = unpruned_plan(model.folder.model_type, model.decoder_shape().layers, model.geometry(tiny_lfm2_vl.SIZE))
    with pytest.raises(UsageError, match="Training needs attention in every layer"):
        learn(model, samples, base, replace(REQUEST, train=True), tmp_path / "plan.json", SILENT)
