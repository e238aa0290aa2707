"""`calibrate --method learned`: record the samples, learn a selection, and compare it with methods that learn nothing.

Every fourth image, or every fourth group of images that are asked about together, is held out. They choose the settings, and are
the gate: what is learned has to be closer to the unpruned model there than every method without learning, in each of its variants.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune.calibration.data.journal import Journal
from edgeprune.calibration.data.samples import Sample, asked_digest, check_images, digest
from edgeprune.calibration.learn.asking import WEIGHTS, WORTH, fitted
from edgeprune.calibration.learn.closed import Settings, Sums, closed_form
from edgeprune.calibration.learn.heldout import MOST_TRIED, HeldOut, search
from edgeprune.calibration.learn.merging import EPOCHS as MERGING_EPOCHS
from edgeprune.calibration.learn.merging import Merger, adding_nothing, merging_loss
from edgeprune.calibration.learn.scenes import Asked, Listener, Scene, measured
from edgeprune.calibration.learn.straight import EPOCHS, Chooser, choice_loss
from edgeprune.calibration.learn.training import Schedule, Trainee, train
from edgeprune.calibration.replay.episodes import Recorder
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import UsageError
from edgeprune.io.progress import Progress
from edgeprune.methods.learned import Learned, write
from edgeprune.model import Segment
from edgeprune.plan import Cut, KeepPlan, Weights
from edgeprune.registry import method_class, options_of
from edgeprune.runtime.media.likeness import distance, image_place

HELD_OUT = 4  # every fourth image
MOST_HELD_OUT = 24
POSITIONS = (0.1, 0.2)  # shares of the position that a search compares with none
# Methods without learning that need no signal of the vision encoder; the baselines are not among them.
FIRST_IMAGES, FINALISTS = 6, 3
RIVALS = ("cdpruner", "dart", "divprune", "zspaprune")
UNLIKE = 1.5  # times as far as the farthest held-out image, an image is unlike them
LEAST_DEVIATION = 0.1  # that a dimension counts as, of the root mean square of all of them
_TINY = 1e-6
_FORM = 4  # of what is recorded


@dataclass(frozen=True)
class LearnRequest:
    """What is learned: a selection of `keep` visual tokens, and of `least` for weights that tiers share.

    `weigh`, `merge`: for a cut with these options. `question`, `position`: whether what is asked, and where tokens are, may count.
    """

    keep: int
    least: int
    rank: int
    train: bool
    seed: int
    max_tokens: int
    fit: str
    device: str
    weigh: bool = False
    merge: bool = False
    question: bool = True
    position: bool = True

    @property
    def cut_options(self) -> dict[str, bool]:
        """The options of the cut."""
        return {name: True for name in ("weigh", "merge") if getattr(self, name)}

    @property
    def keeps(self) -> tuple[int, ...]:
        """The numbers of tokens that are judged."""
        return tuple(dict.fromkeys((self.keep, self.least)))

    @classmethod
    def of(cls, keep: int, least: int, settings: Mapping[str, Any], **common: Any) -> LearnRequest:
        """Return a request by the method's options; those that `settings` leave out have their defaults. `common`: the rest."""
        chosen = {option.name: option.default for option in options_of("learned", calibration=True)} | dict(settings)
        cut = {name: chosen[name] for name in ("weigh", "merge", "question", "position")}
        return cls(keep, least, chosen["rank"], chosen["train"], **cut, **common)


@dataclass(frozen=True)
class Rival:
    """A selection and its divergence from the unpruned model on the held-out images, in nats an answer."""

    method: str
    options: Mapping[str, Any]
    divergence: float


@dataclass(frozen=True)
class Learning:
    """Learned weights, and how they compare. `images` were learned from, `held_out` others; `rivals` are in order.

    `trained`: whether training the choice helped. `unmerged`: the divergence before the option merge was learned, if it was.
    """

    weights: Weights
    images: int
    held_out: int
    settings: Settings
    trained: bool
    divergence: float
    rivals: tuple[Rival, ...]
    unmerged: float | None = None

    @property
    def ahead(self) -> bool:
        """Whether what was learned is closer to the unpruned model than every rival."""
        return self.divergence < self.rivals[0].divergence


def learn(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    base: KeepPlan,
    request: LearnRequest,
    output: Path,
    progress: Progress,
    *,
    kept: Path | None = None,
    gate: bool = True,
) -> Learning:
    """Learn a selection of the visual tokens that enter the decoder under `base`.

    The cuts of `base` are in the vision encoder. Behind one that withdraws all visual tokens inside the decoder, what is learned
    suits a decoder that looks at them no longer.

    `kept`: a folder where what is recorded stays, for other requests over these images. Without one it stays beside `output` only
    if the run is interrupted, and the same request goes on from there. `gate`: also measure rivals. Raises UsageError for
    samples of too few images, or of images that are alike.
    """
    loaded.model.requires_grad_(False)
    if request.train and loaded.family.stateful:
        raise UsageError(
            f"Training needs attention in every layer: most of a {loaded.folder.model_type} have {loaded.family.stateful} instead.",
            hint="Leave --train out: the closed form needs none.",
        )
    encoded = replace(base, cuts=base.vision_cuts)
    parts = [name for name in ("train", "weigh", "merge", "question", "position") if getattr(request, name)]
    parts += [str(cut.layer) for cut in base.layer_cuts]
    recorded, asked = _digest(loaded, encoded, request), asked_digest(samples)
    folder = output.with_name(f".{output.name}.{recorded}.learning") if kept is None else kept / recorded
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(loaded, encoded, request.max_tokens, request.device)
    listener = Listener(recorder.decoder)
    scenes = _record(recorder, listener, samples, request.fit, folder, progress)
    how = f"{asked}.{request.keep}.{request.least}.{request.rank}.{request.seed}{'.'.join(['', *parts])}"
    state = folder / f"training.{how}.safetensors"
    # What was measured to find the settings, which training and merging do not change.
    name = digest(asked, request.keeps, request.rank, request.weigh, base.to_dict())
    journal = Journal(folder / f"settings.{name}.jsonl")
    listener = Listener.of(loaded.family.decoder(), base) if base.layer_cuts else listener
    found = _learn(loaded, listener, scenes, base, request, state, journal, progress, gate=gate)
    for left in (state, _merging_state(state)):
        left.unlink(missing_ok=True)
    if kept is None:
        shutil.rmtree(folder)
    return found


def _learn(
    loaded: LoadedModel,
    listener: Listener,
    scenes: Sequence[Path],
    base: KeepPlan,
    request: LearnRequest,
    state: Path,
    journal: Journal,
    progress: Progress,
    *,
    gate: bool,
) -> Learning:
    load = [partial(Scene.load, path, request.device) for path in scenes]
    held = load[HELD_OUT - 1 :: HELD_OUT][:MOST_HELD_OUT]
    rest = [scene for number, scene in enumerate(load) if number % HELD_OUT != HELD_OUT - 1]
    width = loaded.family.decoder().hidden
    judge = HeldOut(listener, held, width)
    header: dict[str, Any] = {"weights_sha256": loaded.weights_sha256, "keeps": [request.least, request.keep]}
    course = _Course(listener, base, request, rest, judge, _sums(rest, width), header, journal, progress)
    rank = min(request.rank, width)
    best, lowest, settings = course.searched(rank)
    trained, unmerged = False, None
    if request.train:
        best, lowest, trained = course.trained(best, lowest, settings, state)
    if request.merge:
        unmerged = lowest
        best, lowest = course.merged(best, lowest, settings, _merging_state(state))
    rivals = _rivals(judge, base, request, request.keeps, progress) if gate else ()
    header["seen"] = seen(rest, held, width, best)
    weights = write(best, {**header, "question": settings.question, "position": settings.position})
    return Learning(weights, len(rest), len(held), settings, trained, lowest, rivals, unmerged)


@dataclass(frozen=True)
class _Course:
    # What is learned from, and the judge of what is learned. `header`: what all weights state.
    listener: Listener
    base: KeepPlan
    request: LearnRequest
    scenes: Sequence[Callable[[], Scene]]
    judge: HeldOut
    sums: Sums
    header: Mapping[str, Any]
    journal: Journal
    progress: Progress

    def method(self, tensors: dict[str, torch.Tensor], settings: Settings) -> Learned:
        found = write(tensors, {**self.header, "question": settings.question, "position": settings.position})
        options = self.request.cut_options if "own" in tensors else {}
        return Learned(Cut("input", "learned", self.request.keep, options=options, weights=found), self.base.geometry)

    def divergence(self, tensors: dict[str, torch.Tensor], settings: Settings) -> float:
        return self.judge.divergence(self.method(tensors, settings), self.request.keeps, weigh=self.request.weigh)

    def judged(self, tensors: Callable[[], dict[str, torch.Tensor]], settings: Settings) -> tuple[float, float]:
        # The divergence under settings that a search compares, in nats an answer and in nats a token.
        key = "settings", *astuple(settings)
        if self.journal.get(*key) is None:
            method = self.method(tensors(), settings)
            self.journal.put(self.judge.divergences(method, self.request.keeps, weigh=self.request.weigh), *key)
        answer, token = self.journal.get(*key)
        return answer, token

    def tried(self, settings: Settings) -> float:
        # The divergence of the closed form with some settings.
        rank = min(self.request.rank, len(self.sums.mean))
        return self.judged(lambda: closed_form(self.sums, settings, rank), settings)[0]

    def searched(self, rank: int) -> tuple[dict[str, torch.Tensor], float, Settings]:
        # The closed form with the best settings, what questions ask for and where tokens are, as far as these are worth it, and
        # its divergence.
        questions = self.request.question * len(WEIGHTS)
        positions = self.request.position * (1 + self.request.question) * len(POSITIONS)
        counted = self.progress.count("comparing settings", MOST_TRIED + questions + positions)
        settings, lowest = search(self.tried, counted)
        best = closed_form(self.sums, settings, rank)
        forms = [(best, settings)]
        if self.request.question:
            tensors, found, asking = self.asked(best, settings, lambda done: counted(MOST_TRIED + done))
            forms.append((tensors, asking))
            if found <= WORTH * lowest:
                best, lowest, settings = tensors, found, asking
        if not self.request.position:
            return best, lowest, settings
        placed = self.positioned(forms, settings, lambda done: counted(MOST_TRIED + questions + done))
        return placed or (best, lowest, settings)

    def asked(
        self, best: dict[str, torch.Tensor], settings: Settings, counted: Callable[[int], None]
    ) -> tuple[dict[str, torch.Tensor], float, Settings]:
        # The closed form with what questions ask for, by the best weight, and the divergence.
        tensors = fitted(self.scenes, len(best["theta"]), best, settings.exponent).added_to(best, settings.exponent)
        found = dict[float, float]()
        for number, weight in enumerate(WEIGHTS, start=1):
            found[weight], _ = self.judged(lambda: tensors, replace(settings, question=weight))
            counted(number)
        weight = min(found, key=found.__getitem__)
        return tensors, found[weight], replace(settings, question=weight)

    def positioned(
        self, forms: Sequence[tuple[dict[str, torch.Tensor], Settings]], settings: Settings, counted: Callable[[int], None]
    ) -> tuple[dict[str, torch.Tensor], float, Settings] | None:
        # Of some forms the best one with a share of the position, and its divergence; None if `settings` are better. What tells
        # objects apart answers questions about them and costs descriptions some words, and these are most of the nats an answer:
        # so every answer counts alike here.
        def divergences(tensors: dict[str, torch.Tensor], form: Settings) -> tuple[float, float]:
            return self.judged(lambda: tensors, form)

        (without,) = (divergences(tensors, form)[1] for tensors, form in forms if form == settings)
        tried = [(tensors, replace(form, position=share)) for tensors, form in forms for share in POSITIONS]
        found = list[tuple[float, float]]()
        for number, (tensors, form) in enumerate(tried, start=1):
            found.append(divergences(tensors, form))
            counted(number)
        best = min(range(len(tried)), key=lambda number: found[number][1])
        if found[best][1] >= without:
            return None
        return tried[best][0], found[best][0], tried[best][1]

    def trained(
        self, best: dict[str, torch.Tensor], lowest: float, settings: Settings, state: Path
    ) -> tuple[dict[str, torch.Tensor], float, bool]:
        # The choice trained further, its divergence, and whether that is lower; otherwise what was given.
        chooser = Chooser(self.method(best, settings), self.sums.mean, self.sums.deviation, self.request.seed)
        self._train("training", chooser, partial(choice_loss, self.listener, chooser), EPOCHS, state)
        tensors = best | chooser.tensors()
        found = self.divergence(tensors, settings)
        return (tensors, found, True) if found < lowest else (best, lowest, False)

    def merged(
        self, best: dict[str, torch.Tensor], lowest: float, settings: Settings, state: Path
    ) -> tuple[dict[str, torch.Tensor], float]:
        # The choice with a map that merges, or, if that is not better, with one that adds nothing; and the divergence.
        merger = Merger(self.sums, self.request.seed)
        loss = partial(merging_loss, self.listener, merger, self.method(best, settings))
        self._train("learning to merge", merger, loss, MERGING_EPOCHS, state)
        tensors = best | merger.averaged_tensors()
        found = self.divergence(tensors, settings)
        return (tensors, found) if found < lowest else (best | adding_nothing(tensors), lowest)

    def _train(self, what: str, trainee: Trainee, loss: Callable[..., torch.Tensor], epochs: int, state: Path) -> None:
        request = self.request
        schedule = Schedule.of(epochs, len(self.scenes), trainee.batch, self.request.keeps, request.seed, weigh=request.weigh)
        counted = self.progress.count(f"{what}, steps", schedule.steps)
        train(
            self.scenes,
            trainee,
            partial(loss, schedule),
            schedule,
            state,
            lambda done, lost: counted(done, f"loss {lost:.3f} nats"),
        )


def seen(
    rest: Sequence[Callable[[], Scene]], held: Sequence[Callable[[], Scene]], width: int, tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Return what the images were like, for `edgeprune.runtime.media.likeness`: `mean` and `deviation` of the places of those that
    were learned from, and a `limit` of the distance from them by the held-out ones.
    """
    metric, bias = (tensors[name].float().cpu().numpy() for name in ("metric", "metric_bias"))

    def places(scenes: Sequence[Callable[[], Scene]]) -> np.ndarray:
        tokens = [each.float().cpu().numpy() for load in scenes for each in load().images(width)]
        return np.stack([image_place(each, metric, bias) for each in tokens])

    known = places(rest)
    mean, deviation = known.mean(axis=0), known.std(axis=0)
    # What hardly varies among a few images may vary more among others, and by rounding.
    deviation = np.maximum(deviation, max(LEAST_DEVIATION * float(np.sqrt(np.square(deviation).mean())), _TINY))
    farthest = max(_TINY, *(distance(place, mean, deviation) for place in places(held)))
    return {"mean": mean.tolist(), "deviation": deviation.tolist(), "limit": UNLIKE * farthest}


def _sums(scenes: Sequence[Callable[[], Scene]], width: int) -> Sums:
    sums = Sums()
    for load in scenes:
        scene = load()
        for visual, importance in zip(scene.images(width), torch.split(scene.importance, list(scene.sizes)), strict=True):
            sums.add(visual, importance)
    return sums


def _merging_state(state: Path) -> Path:
    return state.with_suffix(".merging.safetensors")


def _rivals(judge: HeldOut, base: KeepPlan, request: LearnRequest, keeps: Sequence[int], progress: Progress) -> tuple[Rival, ...]:
    # All variants on a few images, then the best of them on all.
    variants = _variants(weigh=request.weigh)
    counted = progress.count("comparing methods that learn nothing", len(variants) + FINALISTS)

    def compare(compared: Sequence[Rival], images: int | None, before: int) -> list[Rival]:
        found = []
        for number, each in enumerate(compared, start=1):
            cut = Cut("input", each.method, request.keep, options=each.options)
            method = method_class(each.method)(cut, base.geometry)
            found.append(replace(each, divergence=judge.divergence(method, keeps, images, weigh=request.weigh)))
            counted(before + number)
        return sorted(found, key=lambda rival: rival.divergence)

    best = compare([Rival(method, options, 0.0) for method, options in variants], FIRST_IMAGES, 0)[:FINALISTS]
    return tuple(compare(best, None, len(variants)))


def _variants(*, weigh: bool) -> list[tuple[str, dict[str, Any]]]:
    # The defaults of each rival's options, and each option that calibration compares at each of its other values.
    variants: list[tuple[str, dict[str, Any]]] = []
    given: dict[str, Any] = {"weigh": True} if weigh else {}
    for method in RIVALS:
        variants.append((method, given))
        for option in options_of(method):
            variants += [(method, {option.name: value, **given}) for value in option.tries if value != option.default]
    return variants


def _record(
    recorder: Recorder, listener: Listener, samples: Sequence[Sample], fit: str, folder: Path, progress: Progress
) -> list[Path]:
    # Writes a scene for each image; those of an interrupted run are there already.
    groups: dict[Any, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.images, []).append(sample)
    counted = progress.count("answering without pruning, images", len(groups))
    paths, different = list[Path](), set[bytes]()
    for number, group in enumerate(groups.values()):
        name = asked_digest(group)
        place = folder / name
        if not place.is_dir():
            for index, scene in enumerate(_scenes_of(recorder, listener, group, fit)):
                scene.save(folder / f"{name}.{index:03}.safetensors")
            place.mkdir()  # all of them are written
        found = sorted(folder.glob(f"{name}.*.safetensors"))
        different |= {hashlib.sha256(tokens).digest() for path in found for tokens in _tokens_of(path)}
        paths += found
        counted(number + 1)
    check_images(len(different), "To the model the samples show")
    return paths


def _tokens_of(path: Path) -> list[bytes]:
    scene = Scene.load(path, "cpu")
    return [tokens.numpy().tobytes() for tokens in scene.images(scene.visual.embeds.shape[2])]


def _scenes_of(recorder: Recorder, listener: Listener, samples: Sequence[Sample], fit: str) -> list[Scene]:
    # Questions whose visual tokens and text before them are the same share a scene: all about the same images.
    shown: list[tuple[Segment, Segment, torch.Tensor, list[Asked]]] = []
    recorder.see(len(samples[0].images))
    for sample in samples:
        (recording,) = recorder.ask(sample, fit, together=True)
        prefix, visual, prompt = recorder.segments(recording)
        asked = Asked(prompt, recording.answer, recorder.embedded(sample.prompt))
        for before, tokens, _, questions in shown:
            if _same(before, prefix) and _same(tokens, visual):
                questions.append(asked)
                break
        else:
            order = torch.from_numpy(recording.prefill.visual_indices).to(visual.embeds.device)
            shown.append((prefix, visual, order, [asked]))
    images = shown[0][1].embeds.shape[1] // recorder.plan.tokens_from_encoder
    return [measured(listener, prefix, visual, tuple(asked), images, order) for prefix, visual, order, asked in shown]


def _same(one: Segment, other: Segment) -> bool:
    return torch.equal(one.embeds, other.embeds) and torch.equal(one.positions, other.positions)


def _digest(loaded: LoadedModel, base: KeepPlan, request: LearnRequest) -> str:
    # The name of a folder, so that what was recorded otherwise is not taken.
    return digest(_FORM, loaded.weights_sha256, base.to_dict(), request.max_tokens, request.fit)
