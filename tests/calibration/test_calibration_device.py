"""Calibration on a GPU: what it makes beside the model's tensors has to be where they are. A simulated device refuses the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plans import PLANS, PROMPT
from simulated_torch import SimulatedTensor, simulated_device
from tiny_models import TINY_GEOMETRY

from edgeprune.calibration.allocate import decode_rate, dyrate
from edgeprune.calibration.allocate.decode_rate import PolicyReplay
from edgeprune.calibration.collect import run as collecting
from edgeprune.calibration.collect.run import CollectOptions
from edgeprune.calibration.data.samples import Sample, read_samples
from edgeprune.calibration.learn import ranking, run, training
from edgeprune.calibration.learn.closed import Settings
from edgeprune.calibration.learn.ranking import LearnedRanking, learn_ranking
from edgeprune.calibration.learn.run import Learning, LearnRequest, learn
from edgeprune.calibration.replay.episodes import Recorder, Recording
from edgeprune.calibration.replay.reference import reference_model
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.io.progress import SILENT
from edgeprune.methods.learned import read
from edgeprune.plan import Geometry
from edgeprune.plan.presets import ranked_plan, unpruned_plan
from edgeprune.runtime import Answer, Runtime
from edgeprune.tabletop.dataset import write_dataset

GEOMETRY = Geometry(84, 84, 14, 2)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_dataset(folder, 4, 6, kinds=("exists", "describe"))
    return read_samples(folder / "dataset.jsonl")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with simulated_device(monkeypatch) as name:
        yield name


def loaded_on(folder: Path, device: str) -> LoadedModel:
    # Of its own: a model stays where it was put.
    model = load_model(resolve_model(str(folder)))
    model.model.to(device)
    return model


def test_the_simulated_device_refuses_tensors_of_two_devices(device: str) -> None:
    there, here = torch.ones(3, device=device), torch.ones(3)
    assert isinstance(there, SimulatedTensor) and (there + 1).tolist() == [2, 2, 2]
    assert (there + torch.tensor(1.0)).cpu().numpy().tolist() == [2, 2, 2]  # a number may come from anywhere
    assert (torch.eye(3, device=device) @ there).tolist() == [1, 1, 1]
    for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()], lambda: there.numpy()):
        with pytest.raises((RuntimeError, TypeError), match=r"same device|Tensor\.cpu"):
            mixed()


@pytest.mark.parametrize("name", PLANS)
def test_every_site_on_another_device(name: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8))

    def answer(device: str) -> Answer:
        return Runtime(reference_model(loaded_on(tiny_folder, device), PLANS[name], device)).generate(picture, PROMPT, max_tokens=4)

    here = answer("cpu")
    with simulated_device(monkeypatch) as device:
        there = answer(device)
    assert here.text == there.text
    pairs = zip(here.receipt.cuts, there.receipt.cuts, strict=True)
    assert all(np.array_equal(one.kept, other.kept) for one, other in pairs)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let learning take one setting, three steps of training, and few images."""
    monkeypatch.setattr(run, "search", lambda score, counted: (Settings(), score(Settings())))
    monkeypatch.setattr(run, "check_images", lambda different, what: None)
    for name, value in {"FEWEST_STEPS": 3, "MOST_STEPS": 3}.items():
        monkeypatch.setattr(training, name, value)
    monkeypatch.setattr(training, "SAVE_EVERY", 2)
    monkeypatch.setattr(run, "HELD_OUT", 2)


def learned(folder: Path, samples: list[Sample], device: str, kept: Path) -> Learning:
    model = loaded_on(folder, device)
    base = unpruned_plan("qwen2_vl", model.decoder_shape().layers, GEOMETRY)
    request = LearnRequest(4, 3, rank=8, train=True, seed=0, max_tokens=3, fit="stretch", device=device, weigh=True, merge=True)
    return learn(model, samples, base, request, kept / "plan.json", SILENT, kept=kept, gate=False)


@pytest.mark.usefixtures("short")
def test_learned_weights_on_another_device(
    tiny_folder: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = learned(tiny_folder, samples, "cpu", tmp_path / "here")
    with simulated_device(monkeypatch) as device:
        there = learned(tiny_folder, samples, device, tmp_path / "there")
    assert there.divergence == pytest.approx(here.divergence, abs=1e-6)
    (_, ours), (_, theirs) = read(there.weights), read(here.weights)
    # Rounding moves where L-BFGS stops: by 2e-3 on a CPU with AVX2, by less than 1e-4 with AVX512.
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-2 if name in ("asked", "theta") else 1e-4) for name in theirs)


@pytest.mark.device
@pytest.mark.usefixtures("short")
def test_learned_weights_on_a_gpu(tiny_folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU and a CUDA build of torch")
    here, there = (learned(tiny_folder, samples, device, tmp_path / device) for device in ("cpu", "cuda"))
    assert there.divergence == pytest.approx(here.divergence, rel=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
@pytest.mark.filterwarnings("ignore:.*to a meta parameter:UserWarning")  # of torch's own device of this name
def test_training_goes_on_on_another_device(
    tiny_folder: Path, samples: list[Sample], device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    saved = training._save

    def save_and_stop(path: Path, step: int, trainee: training.Trainee, optimizer: torch.optim.Optimizer) -> None:
        saved(path, step, trainee, optimizer)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 1)
        patch.setattr(training, "_save", save_and_stop)
        with pytest.raises(Interrupted):
            learned(tiny_folder, samples, device, tmp_path)
    assert learned(tiny_folder, samples, device, tmp_path).divergence >= 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*to a meta parameter:UserWarning")  # of torch's own device of this name
def test_a_learned_order_goes_on_on_another_device(
    tiny_folder: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ranked(device: str) -> LearnedRanking:
        model = loaded_on(tiny_folder, device)
        base = unpruned_plan("qwen2_vl", model.decoder_shape().layers, GEOMETRY)
        request = CollectOptions(GEOMETRY, rows="learned", reduce="max", max_tokens=3, fit="stretch", device=device)
        return learn_ranking(model, samples, base, request, 0.5, tmp_path / "plan.json", SILENT)

    monkeypatch.setattr(collecting, "check_device", lambda device: None)
    monkeypatch.setattr(ranking, "HELD_OUT", 2)
    here, asked, record = ranked("cpu"), list[Sample](), Recorder.record

    def interrupted(self: Recorder, sample: Sample, fit: str) -> tuple[Recording, ...]:
        asked.append(sample)
        if len(asked) == len(samples):
            raise KeyboardInterrupt
        return record(self, sample, fit)

    with simulated_device(monkeypatch) as device:
        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "record", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ranked(device)
        there = ranked(device)
    assert there.answers == here.answers
    assert there.divergence == pytest.approx(here.divergence, abs=1e-4)


@pytest.mark.parametrize("form", ["schedule", "map"])  # a schedule is made of a trained predictor
def test_decode_rates_on_another_device(
    form: str, tiny_folder: Path, samples: list[Sample], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_decode_rates(form, tiny_folder, samples, device, monkeypatch)


@pytest.mark.device
@pytest.mark.parametrize("form", dyrate.FORMS)
def test_decode_rates_on_a_gpu(form: str, tiny_folder: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU and a CUDA build of torch")
    check_decode_rates(form, tiny_folder, samples, "cuda", monkeypatch)


def check_decode_rates(form: str, folder: Path, samples: list[Sample], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dyrate, "WARM_STEPS", 2)
    monkeypatch.setattr(dyrate, "EPOCHS", 1)
    for module in (dyrate, decode_rate):
        monkeypatch.setattr(module, "fit_budget", lambda spend, budget, low, high: spend(low) * 0.0)
    plan = ranked_plan(unpruned_plan("qwen2_vl", 3, TINY_GEOMETRY))
    replay = PolicyReplay(Recorder(loaded_on(folder, device), plan, 8, device), 0, monotone=True)
    answers = replay.record(samples[:1], "stretch", 2, lambda done: None)
    options = dyrate.dyrate_options(replay, answers, 0.5, form, 0, SILENT)
    assert options["form"] == form and options["shares"]
