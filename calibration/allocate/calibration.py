"""The calibrate stage: samples and a method go in, a plan with frozen budgets comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgeprune.calibration.allocate.decode_rate import Theatre
from edgeprune.calibration.allocate.dyrate import EPOCHS, FORMS, dyrate_options
from edgeprune.calibration.collect.run import Request, collect, collect_on_ray, source_of
from edgeprune.calibration.data.samples import Sample
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.replay.episodes import Episodes
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.errors import PlanError, UsageError
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import ranked_plan

LONG_ENOUGH = 4  # decode steps; shorter answers have nothing for DyRate to learn


@dataclass(frozen=True)
class RateRequest:
    """How DyRate's rate is made: the form, the first layer whose cache shrinks, and whether the share may grow again."""

    form: str = "predictor"
    layer: int = 0
    monotone: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UsageError(f"Unknown form {self.form!r}.", hint=f"Forms are: {', '.join(FORMS)}.")


class Counting(Protocol):
    """Where long work says how far it is: `count` begins something and returns the function that is told how much of it is done."""

    def count(self, what: str, total: int) -> Callable[[int], None]:
        """Begin."""
        ...


@dataclass
class Calibration:
    """A model under calibration: the samples, how to measure them, where the statistics are kept, and a Ray cluster or none."""

    loaded: LoadedModel
    samples: Sequence[Sample]
    request: Request
    statistics_path: Path
    progress: Counting
    ray_address: str | None = None

    def statistics(self) -> Statistics:
        """Return the statistics: those at the path when they are of this model and request, or newly collected ones."""
        if self.statistics_path.is_file():
            found = Statistics.load(self.statistics_path)
            found.check(source_of(self.loaded, self.request))
            return found
        index, count = self.request.shard
        done = self.progress.count("samples", len(self.samples[index - 1 :: count]))
        if self.ray_address is not None:
            return collect_on_ray(self.loaded.folder, self.samples, self.request, self.statistics_path, self.ray_address, done)
        return collect(self.loaded, self.samples, self.request, self.statistics_path, done)

    def rate(self, share: float, base: KeepPlan, request: RateRequest, *, prior: bool = False) -> KeepPlan:
        """Return `base` with a DyRate cut whose decode steps read `share` of the visual cache on average.

        Caches that `base` does not rank yet are ranked, whole, as the request for statistics says.
        """
        if not 0.0 < share <= 1.0:
            raise PlanError(f"Keep ratio {share} is outside (0, 1].")
        if not base.cache_cuts:
            statistics = self.statistics()
            base = ranked_plan(base, None, statistics.prior() if prior else None, **statistics.source.ranking)
        theatre = Theatre(
            Episodes(self.loaded, base, self.request.max_tokens, self.request.device), request.layer, monotone=request.monotone
        )
        recorded = self.progress.count("answers", len(self.samples))
        answers = theatre.record(self.samples, self.request.fit, LONG_ENOUGH, recorded)
        trained = self.progress.count("training", EPOCHS * len(answers))
        options = dyrate_options(theatre, answers, share, request.form, request.seed, trained)
        return base.with_cuts(Cut("decode", "dyrate", 0, request.layer, options=options))
