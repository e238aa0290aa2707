"""The `edgeprune calibrate` command: options, the calibration run and its output files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from edgeprune.calibration.allocate.budgets import LayerClass, classify
from edgeprune.calibration.allocate.dyrate import DecodeRateOptions, fit_decode_rate
from edgeprune.calibration.allocate.recipes import STATISTICAL, plan_for_budget
from edgeprune.calibration.collect.run import CollectOptions, ProgressReporter, draw_samples, load_or_collect
from edgeprune.calibration.data.samples import Sample, read_samples
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.interop.lightcompress import read_plan
from edgeprune.calibration.search.auto import DropExceededError, Goal, check_goal, find_plan
from edgeprune.calibration.search.objectives import Agreement, flops_share, kv_share, roofline_times
from edgeprune.calibration.search.pareto import Curve
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.device.profile import DeviceProfile
from edgeprune.errors import UsageError
from edgeprune.plan import KeepPlan
from edgeprune.plan.presets import unpruned_plan

AUTO, DYRATE, PLPHP = "auto", "dyrate", "plphp"
_SETTINGS = {  # the options of each method
    "evit": ("layer",),
    "fastv": ("layer",),
    "fitprune": ("stages",),
    "plphp": ("allocate", "delta", "prior"),
    "random": ("site",),
    "uniform": ("site",),
    "zspaprune": ("core", "relevance"),
    "dyrate": ("layer", "form", "follow", "prior"),
}
_ALLOCATION = ("site", "layer", "allocate", "delta", "prior", "stages", "core", "relevance", "form", "follow")
_SEARCH = ("max_drop", "target_flops", "target_kv", "target_ttft", "target_reads", "times", "curve")


class Progress(ProgressReporter, Protocol):
    """A progress reporter that also shows status messages."""

    def say(self, what: str) -> None:
        """Show a status message."""
        ...


@dataclass(frozen=True)
class CalibrateOptions:
    """The command's options by name; None for options that were not given."""

    model: str
    data: Path
    method: str | None
    keep: float | None
    output: Path | None
    statistics: Path | None
    force: bool
    limit: int | None
    seed: int
    rows: str
    reduce: str
    spread: bool
    max_tokens: int
    image_size: tuple[int, int] | None
    device: str
    shard: tuple[int, int] | None
    ray_address: str | None
    trust_remote_code: bool
    fit: str
    site: str | None
    layer: int | None
    allocate: str | None
    delta: float | None
    prior: bool
    stages: int | None
    core: float | None
    relevance: str | None
    form: str | None
    follow: bool
    onto: Path | None
    max_drop: float | None
    target_flops: float | None
    target_kv: float | None
    target_ttft: float | None
    target_reads: float | None
    device_name: str | None
    times: Path | None
    curve: Path | None

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the options among `names` that the user gave."""
        return {name: getattr(self, name) for name in names if getattr(self, name) not in (None, False)}

    def check(self) -> None:
        """Raise UsageError for options that do not belong together."""
        if self.method is None:
            if self.statistics is None:
                raise UsageError(
                    "Neither --method nor --statistics says what to make.", hint="For example: --method plphp --keep 0.5 -o p.json"
                )
            unused = {"--keep": self.keep, "--output": self.output, "--onto": self.onto}
        elif self.output is None:
            raise UsageError("There is no file for the plan (-o).")
        elif self.shard is not None:
            raise UsageError("A shard gives statistics, not a plan.", hint="Leave --method out, and merge the shards first.")
        else:
            unused = {"--keep": self.keep} if self.method == AUTO else {}
            if self.method != AUTO and self.keep is None:
                raise UsageError(f"{self.method} needs a budget.", hint="For example: --keep 0.5")
        self._check_foreign([name for name, value in unused.items() if value is not None])
        if self.output is not None and self.output.exists() and not self.force:
            raise UsageError(f"{self.output} exists already.", hint="Give another output, or --force to replace it.")

    def _check_foreign(self, unused: list[str]) -> None:
        foreign = [name for name in self.given(_ALLOCATION) if name not in _SETTINGS.get(self.method or "", ())]
        foreign += [] if self.method == AUTO else list(self.given(_SEARCH))
        options = [*(f"--{name.replace('_', '-')}" for name in foreign), *unused]
        if options:
            raise UsageError(f"{options[0]} is not for {self.method or 'statistics alone'}.")
        if self.device_name is not None and self.target_ttft is None:
            hint = "Devices are cpu and cuda; others go with --target-ttft."
            raise UsageError(f"Unknown device {self.device_name!r}.", hint=hint)


@dataclass(frozen=True)
class CalibrationResult:
    """A plan with its costs, or the path of statistics without a plan. `flops`, `kv`: shares of the unpruned model's cost."""

    statistics: Path | None
    samples: int
    plan: KeepPlan | None = None
    output: Path | None = None
    flops: float = 1.0
    kv: float = 1.0
    classes: tuple[LayerClass, ...] = ()
    curve: Curve | None = None
    times: DeviceProfile | None = None


def run_calibrate(options: CalibrateOptions, progress: Progress) -> CalibrationResult:
    """Collect statistics, or make and save a plan, as the options specify."""
    options.check()
    samples = draw_samples(read_samples(options.data, need_answers=False), options.limit, options.seed)
    folder = resolve_model(options.model, trust_remote_code=options.trust_remote_code)
    progress.say("loading the model")
    loaded = load_model(folder)
    geometry = loaded.geometry(options.image_size)
    unpruned = unpruned_plan(folder.model_type, loaded.decoder_shape().layers, geometry)
    request = CollectOptions(
        geometry,
        options.rows,
        options.reduce,
        options.spread,
        options.shard or (1, 1),
        options.max_tokens,
        options.fit,
        options.device,
    )
    path = options.statistics or options.output.with_suffix(".statistics.safetensors")  # type: ignore[union-attr]  # checked
    if options.method == AUTO:
        return _search_plan(options, loaded, samples, request, path, unpruned, progress)
    statistics = partial(load_or_collect, loaded, samples, request, path, progress, options.ray_address)
    if options.method is None:
        return CalibrationResult(path, statistics().samples)
    base = unpruned if options.onto is None else read_plan(options.onto, unpruned)
    loaded.check_plan(base)
    plan = _allocate(options, base, statistics, partial(fit_decode_rate, loaded, samples, request, progress))
    loaded.check_plan(plan)
    classes = _classes(options, statistics)
    return _save_plan(
        options, loaded, plan, CalibrationResult(path if path.is_file() else None, len(samples), classes=tuple(classes))
    )


def _allocate(
    options: CalibrateOptions, base: KeepPlan, statistics: Callable[[], Statistics], fit_rate: Callable[..., KeepPlan]
) -> KeepPlan:
    method, keep = str(options.method), float(options.keep or 0.0)
    settings = options.given(_ALLOCATION)
    if method == DYRATE:
        rate = DecodeRateOptions(
            keep, settings.get("form", "predictor"), settings.get("layer", 0), not options.follow, options.seed
        )
        collected = None if base.cache_cuts else statistics()
        return fit_rate(base, rate, collected.prior() if collected is not None and options.prior else None)
    return plan_for_budget(method, keep, base, statistics() if method in STATISTICAL else None, **settings)


def _classes(options: CalibrateOptions, statistics: Callable[[], Statistics]) -> list[LayerClass]:
    if options.method != PLPHP or options.allocate not in (None, "classes"):
        return []
    keep = float(options.keep or 0.0)
    return classify(statistics(), keep, options.delta if options.delta is not None else min(keep, 1 - keep) / 2)


def _search_plan(
    options: CalibrateOptions,
    loaded: LoadedModel,
    samples: list[Sample],
    request: CollectOptions,
    path: Path,
    unpruned: KeepPlan,
    progress: Progress,
) -> CalibrationResult:
    # Every second sample is held out: statistics and scores must not come from the same samples.
    drop = 0.01 if options.max_drop is None else options.max_drop
    goal = Goal(drop, options.target_flops, options.target_kv, options.target_ttft, options.target_reads)
    times = _times(options, loaded, unpruned)
    check_goal(goal, loaded, unpruned, times, len(samples[1::2]))  # fail before anything is measured
    progress.say("answering without pruning")
    held_out = Agreement(loaded, unpruned, samples[1::2], max_tokens=request.max_tokens, fit=request.fit, device=request.device)
    statistics = load_or_collect(loaded, samples[::2], request, path, progress, options.ray_address)
    fit_rate = partial(fit_decode_rate, loaded, samples[::2], request, progress)
    try:
        plan, curve = find_plan(loaded, statistics, fit_rate, held_out, unpruned, goal, times, progress.say)
    except DropExceededError as error:
        if options.curve is not None:
            error.curve.save(options.curve)
        raise
    if options.curve is not None:
        curve.save(options.curve)
    return _save_plan(options, loaded, plan, CalibrationResult(path, len(samples), curve=curve, times=times))


def _times(options: CalibrateOptions, loaded: LoadedModel, unpruned: KeepPlan) -> DeviceProfile | None:
    if options.times is not None and options.device_name is not None:
        raise UsageError("Times are either measured or computed.", hint="Give --times or a target --device, not both.")
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
