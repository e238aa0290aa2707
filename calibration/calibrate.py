"""The `edgeprune calibrate` command: the calibration run and its output files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from edgeprune.calibration.allocate.budgets import LayerClass, class_rule, classify, vtw_plan
from edgeprune.calibration.allocate.dyrate import DecodeRateOptions, fit_decode_rate
from edgeprune.calibration.allocate.recipes import STATISTICAL, parts_needed, plan_for_budget
from edgeprune.calibration.collect.run import CollectOptions, load_or_collect
from edgeprune.calibration.data.journal import Journal
from edgeprune.calibration.data.samples import Sample, asked_digest, check_images, digest, split
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.interop.lightcompress import read_plan
from edgeprune.calibration.learn.ranking import LearnedRanking, learn_ranking
from edgeprune.calibration.learn.run import Learning, LearnRequest, learn
from edgeprune.calibration.options import AUTO, DYRATE, LEARNED, PLPHP, VTW, CalibrateOptions, CalibrationRequest
from edgeprune.calibration.replay.episodes import usable_samples
from edgeprune.calibration.search.auto import DropExceededError, check_goal, find_plan
from edgeprune.calibration.search.objectives import Agreement, flops_share, kv_share, roofline_times
from edgeprune.calibration.search.pareto import Curve
from edgeprune.calibration.search.tuning import Trial, tune
from edgeprune.checkpoint.loading import LoadedModel, load_model
from edgeprune.device.profile import DeviceProfile
from edgeprune.errors import UsageError
from edgeprune.io.files import write_bytes
from edgeprune.io.progress import Progress
from edgeprune.plan import Cut, KeepPlan, Weights, keep_count
from edgeprune.plan.presets import unpruned_plan
from edgeprune.registry import family_class

_FITPRUNE_NOT_TRIED = "fitprune: its statistics take longer than the search; --method fitprune --statistics FILE collects them"
_LEARNED: tuple[dict[str, Any], ...] = ({}, {"weigh": True}, {"weigh": True, "merge": True})  # of a search
MOST_JUDGING = 120  # samples, about as many, that judge the plans of a search; all others are learned from
_MEASURED = 1  # form of what a search has measured and learned
LEARNED_SHARES = 0.5, 0.1  # what a search learns for if its target is no share of the work
_BEFORE_WITHDRAWAL = 1.5  # an input cut keeps up to so many times the target's share if a withdrawal follows


@dataclass(frozen=True)
class CalibrationResult:
    """A plan with its costs, or the path of statistics without a plan.

    `flops`, `kv`: shares of the unpruned model's cost. `skipped`: why samples were left out. `tried`: the options that were
    compared, best first. `learning`: what the method learned found; `ranking`: a learned order of caches. `untried`: the methods
    that a search left out, and why.
    """

    statistics: Path | None
    samples: int
    plan: KeepPlan | None = None
    output: Path | None = None
    flops: float = 1.0
    kv: float = 1.0
    classes: tuple[LayerClass, ...] = ()
    curve: Curve | None = None
    times: DeviceProfile | None = None
    skipped: tuple[str, ...] = ()
    tried: tuple[Trial, ...] = ()
    learning: Learning | None = None
    untried: tuple[str, ...] = ()
    ranking: LearnedRanking | None = None


def run_calibrate(calibration: CalibrationRequest, progress: Progress) -> CalibrationResult:
    """Collect statistics, or make and save a plan, as the options specify."""
    options, folder = calibration.options, calibration.folder
    check_statistics(options.method, folder.model_type)
    progress.say("loading the model")
    loaded = load_model(folder)
    geometry = loaded.geometry(options.image_size)
    unpruned = unpruned_plan(folder.model_type, loaded.decoder_shape().layers, geometry)
    request = CollectOptions(
        geometry,
        **options.ranking,
        shard=options.shard or (1, 1),
        max_tokens=options.max_tokens,
        fit=options.fit,
        device=options.device,
    )
    samples, skipped = list(calibration.samples), list(calibration.skipped)
    if options.skip_bad:
        samples = usable_samples(loaded, unpruned, samples, options.fit, skipped.append, progress)
    result = _calibrate(options, loaded, samples, request, unpruned, progress)
    return replace(result, skipped=(*map(str, skipped), *result.skipped))


def check_statistics(method: str | None, model_type: str) -> None:
    """Raise UsageError for a method that needs statistics of a family most of whose layers have no attention."""
    if method in (None, AUTO, DYRATE, *STATISTICAL) and family_class(model_type).stateful:
        raise UsageError(
            f"Statistics are of attention in every layer, and most of a {model_type} have none.",
            hint="Use a method without statistics: --method divprune or fastv, say.",
        )


def _calibrate(
    options: CalibrateOptions,
    loaded: LoadedModel,
    samples: list[Sample],
    request: CollectOptions,
    unpruned: KeepPlan,
    progress: Progress,
) -> CalibrationResult:
    path = options.statistics_path
    if options.method == AUTO:
        return _search_plan(options, loaded, samples, request, path, unpruned, progress)
    if options.method is None:
        return CalibrationResult(path, load_or_collect(loaded, samples, request, path, progress, options.ray_address).samples)
    base = unpruned if options.onto is None else read_plan(options.onto, unpruned)
    loaded.check_plan(base)
    if options.method == LEARNED:
        return _learn_plan(options, loaded, samples, base, progress)
    ranking: LearnedRanking | None = None
    if options.learns_ranking and not base.cache_cuts:
        assert options.output is not None and options.spent is not None
        ranking = learn_ranking(loaded, samples, base, request, options.spent, options.output, progress)
        request = replace(request, weights=ranking.weights)

    def statistics(*parts: str) -> Statistics:
        return load_or_collect(loaded, samples, replace(request, parts=parts), path, progress, options.ray_address)

    allocate = partial(
        _allocate, options, base, request.weights, statistics, partial(fit_decode_rate, loaded, samples, request, progress)
    )
    tried: list[Trial] = []
    if options.to_try:
        progress.say("answering without pruning")
        judge = Agreement(loaded, unpruned, samples, max_tokens=request.max_tokens, fit=request.fit, device=request.device)
        progress.say("comparing options")
        tried = tune(options.to_try, allocate, judge, progress.count)
    plan = allocate(tried[0].options if tried else {})
    loaded.check_plan(plan)
    found = path if path.is_file() else None
    result = CalibrationResult(
        found, len(samples), classes=tuple(_classes(options, statistics)), tried=tuple(tried), ranking=ranking
    )
    return _save_plan(options, loaded, plan, result)


def _learn_plan(
    options: CalibrateOptions, loaded: LoadedModel, samples: list[Sample], base: KeepPlan, progress: Progress
) -> CalibrationResult:
    assert options.output is not None and options.budget is not None
    keep = keep_count(base.tokens_from_encoder, options.budget)
    bare = _learned_onto(base)
    request = _learn_request(options, keep, keep)
    cut = Cut("input", LEARNED, keep, options=request.cut_options)
    base.with_cuts(cut)  # refuses later cuts before anything is learned
    learning = learn(loaded, samples, bare, request, options.output, progress, kept=options.statistics)
    plan = base.with_cuts(replace(cut, weights=learning.weights))
    loaded.check_plan(plan)
    return _save_plan(options, loaded, plan, CalibrationResult(None, len(samples), learning=learning))


def _learned_onto(plan: KeepPlan) -> KeepPlan:
    # The cuts of a plan that a selection is learned behind. Others act on what it leaves.
    return replace(plan, cuts=(*plan.vision_cuts, *(cut for cut in plan.layer_cuts if cut.withdraws)))


def _learn_request(options: CalibrateOptions, keep: int, least: int) -> LearnRequest:
    common: dict[str, Any] = {"seed": options.seed, "max_tokens": options.max_tokens, "fit": options.fit, "device": options.device}
    return LearnRequest.of(keep, least, options.settings, **common)


def _learned_candidates(
    options: CalibrateOptions, loaded: LoadedModel, samples: list[Sample], unpruned: KeepPlan, folder: Path, progress: Progress
) -> tuple[list[Cut], str]:
    # Cuts of the method learned for a search, each with some of its options, or why there are none. `folder`: keeps what is
    # recorded and learned.
    assert options.output is not None
    share = options.goal().flops
    shares = LEARNED_SHARES if share is None else (min(1.0, _BEFORE_WITHDRAWAL * share), share)
    most, least = (keep_count(unpruned.tokens_from_encoder, each) for each in shares)
    cuts, why_not = list[Cut](), ""
    try:
        check_images(len({str(sample.image) for sample in samples}), "The samples show")  # before the model is asked
        for chosen in _LEARNED:
            request = replace(_learn_request(options, most, least), **chosen)
            name = digest(_MEASURED, loaded.weights_sha256, unpruned.to_dict(), asdict(request), asked_digest(samples))
            path = folder / f"learned.{name}.safetensors"
            if not path.is_file():
                learning = learn(loaded, samples, unpruned, request, options.output, progress, kept=folder, gate=False)
                assert learning.weights.content is not None
                write_bytes(path, learning.weights.content)
            cuts.append(Cut("input", LEARNED, 1, options=request.cut_options, weights=Weights.of(path.read_bytes())))
    except UsageError as error:
        cuts, why_not = [], f"learned: {error.message}"
    return cuts, why_not


def _learned_again(
    options: CalibrateOptions, loaded: LoadedModel, samples: list[Sample], plan: KeepPlan, folder: Path, progress: Progress
) -> KeepPlan:
    # The plan that a search found, its learned selection learned from all samples: it was chosen without those
    # that judged. Nothing is left to judge the new one, but more samples make it no worse (docs/learned.md).
    cut = plan.input
    if cut is None or cut.weights is None:
        return plan
    assert options.output is not None
    progress.say("learning again, from all samples")
    request = replace(_learn_request(options, cut.keep, cut.keep), weigh="weigh" in cut.options, merge="merge" in cut.options)
    weights = learn(loaded, samples, _learned_onto(plan), request, options.output, progress, kept=folder, gate=False).weights
    return replace(plan, cuts=tuple(replace(each, weights=weights) if each is cut else each for each in plan.cuts))


def _allocate(
    options: CalibrateOptions,
    base: KeepPlan,
    weights: Weights | None,
    statistics: Callable[..., Statistics],
    fit_rate: Callable[..., KeepPlan],
    chosen: Mapping[str, Any],
) -> KeepPlan:
    # `weights`: of a learned ranking. `chosen`: options that calibration compared, beside those that the user gave.
    method, spent = str(options.method), float(options.spent or 0.0)
    settings = {**options.allocation, **chosen}
    if method == DYRATE:
        rate = DecodeRateOptions(
            spent, settings.get("form", "predictor"), settings.get("layer", 0), not settings.get("follow"), options.seed
        )
        parts = () if base.cache_cuts else parts_needed(method, settings)
        return fit_rate(base, rate, statistics(*parts).prior() if parts else None)
    parts = parts_needed(method, settings, options.budget)
    if method == VTW and options.budget is None:
        return vtw_plan(statistics(*parts), base, **settings)
    if weights is not None:
        settings["weights"] = weights
    if method == PLPHP and not parts:
        return plan_for_budget(method, spent, base, ranking=options.ranking, **settings)
    return plan_for_budget(method, spent, base, statistics(*parts) if parts else None, **settings)


def _classes(options: CalibrateOptions, statistics: Callable[..., Statistics]) -> list[LayerClass]:
    settings = options.settings
    if options.method != PLPHP or settings.get("allocate", "classes") != "classes":
        return []
    collected = statistics("attention")
    return classify(collected, class_rule(collected, options.budget, settings))


def _search_plan(
    options: CalibrateOptions,
    loaded: LoadedModel,
    samples: list[Sample],
    request: CollectOptions,
    path: Path,
    unpruned: KeepPlan,
    progress: Progress,
) -> CalibrationResult:
    learned_from, judged_by = split(samples, MOST_JUDGING)
    goal, times = options.goal(), _times(options, loaded, unpruned)
    check_goal(goal, loaded, unpruned, times, len(judged_by))  # fail before anything is measured
    assert options.output is not None
    folder = options.output.with_name(f".{options.output.name}.search")  # an interrupted search goes on from it
    asked: dict[str, Any] = {"max_tokens": request.max_tokens, "fit": request.fit, "device": request.device}
    measured = digest(_MEASURED, loaded.weights_sha256, unpruned.to_dict(), asked, asked_digest(judged_by))
    journal = Journal(folder / f"measured.{measured}.jsonl")
    held_out = Agreement(loaded, unpruned, judged_by, **asked, progress=progress, journal=journal)
    request = replace(request, parts=() if options.target_kv is None else ("attention", "caches"))
    statistics = None
    if request.parts or path.is_file():
        statistics = load_or_collect(loaded, learned_from, request, path, progress, options.ray_address)
    why_not = [] if statistics is not None and "fitprune" in statistics.parts else [_FITPRUNE_NOT_TRIED]
    fit_rate = partial(fit_decode_rate, loaded, learned_from, request, progress)
    learned, why_not_learned = _learned_candidates(options, loaded, learned_from, unpruned, folder, progress)
    try:
        plan, curve = find_plan(loaded, statistics, fit_rate, held_out, unpruned, goal, times, progress, learned)
    except DropExceededError as error:
        if options.curve is not None:
            error.curve.save(options.curve)
        raise
    if options.curve is not None:
        curve.save(options.curve)
    plan = _learned_again(options, loaded, samples, plan, folder, progress)
    shutil.rmtree(folder, ignore_errors=True)
    untried = (*why_not, *([why_not_learned] if why_not_learned else []))
    kept = None if statistics is None else path
    found = CalibrationResult(kept, len(samples), curve=curve, times=times, untried=untried)
    return _save_plan(options, loaded, plan, found)


def _times(options: CalibrateOptions, loaded: LoadedModel, unpruned: KeepPlan) -> DeviceProfile | None:
    if options.times is not None:
        times = DeviceProfile.load(options.times)
        if times.tokens != unpruned.geometry.tokens:
            raise UsageError(f"{options.times} was measured with {times.tokens} visual tokens, not {unpruned.geometry.tokens}.")
        return times
    return None if options.device_name is None else roofline_times(loaded, unpruned.geometry, options.device_name)


def _save_plan(options: CalibrateOptions, loaded: LoadedModel, plan: KeepPlan, result: CalibrationResult) -> CalibrationResult:
    assert options.output is not None
    plan.save(options.output)
    parts = loaded.family.decoder()
    unpruned = unpruned_plan(plan.family, plan.layers, loaded.geometry(options.image_size))
    return replace(result, plan=plan, output=options.output, flops=flops_share(parts, plan, unpruned), kv=kv_share(plan, unpruned))
