"""What a report is made of: opened, and checked to belong together before anything is asked or drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeprune.bundle import Bundle
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.search.pareto import Curve
from edgeprune.errors import UsageError, require_extra
from edgeprune.plan import KeepPlan
from edgeprune.report.answers import Interview, interview
from edgeprune.runtime import load


@dataclass(frozen=True)
class Request:
    """What the user named. `target`: a plan or a bundle."""

    target: Path
    statistics: Path | None = None
    curve: Path | None = None
    image: Path | None = None
    prompts: tuple[str, ...] = ()
    fit: str = "exact"
    max_tokens: int = 128


@dataclass(frozen=True)
class Material:
    """The parts of one report; None where the user gave none."""

    name: str
    plan: KeepPlan
    bundle: Bundle | None = None
    statistics: Statistics | None = None
    curve: Curve | None = None
    interview: Interview | None = None


def gather(request: Request) -> Material:
    """Open everything and ask the questions; raise UsageError where parts are of different models or do not go together."""
    _check_questions(request)
    bundle = Bundle.load(request.target) if request.target.is_dir() else None
    plan = KeepPlan.load(request.target) if bundle is None else bundle.plan
    statistics = None if request.statistics is None else _open_statistics(request.statistics, plan, bundle)
    curve = None if request.curve is None else _open_curve(request.curve, plan)
    asked = None
    if request.image is not None:
        if bundle is None:
            raise UsageError(
                f"--image asks a bundle, and {request.target} is a plan.", hint="Export it: edgeprune export --plan PLAN"
            )
        runtime = load(bundle.path)
        asked = interview(runtime, request.image, request.prompts, fit=request.fit, max_tokens=request.max_tokens)
    return Material(request.target.name or str(request.target), plan, bundle, statistics, curve, asked)


def _check_questions(request: Request) -> None:
    example = 'For example: --image table.png --prompt "What is on the table?"'
    if request.image is None and request.prompts:
        raise UsageError("--prompt needs an image to ask about (--image).", hint=example)
    if request.image is not None and not 1 <= len(request.prompts) <= 2:
        raise UsageError(f"--image needs one --prompt, or two to compare, not {len(request.prompts)}.", hint=example)


def _open_statistics(path: Path, plan: KeepPlan, bundle: Bundle | None) -> Statistics:
    require_extra("export", "safetensors")
    statistics = Statistics.load(path)
    source = statistics.source
    _compare(path, "family", source.family, plan.family)
    _compare(path, "number of layers", source.layers, plan.layers)
    _compare(path, "geometry", source.geometry, plan.geometry)
    if bundle is not None:
        _compare(path, "number of KV heads", source.kv_heads, bundle.manifest.decoder.kv_heads)
        _compare(path, "model (sha256 of its weights)", source.weights_sha256, bundle.manifest.source.weights_sha256)
    if statistics.samples == 0:
        raise UsageError(f"{path} holds the statistics of no sample.", hint="Collect them: edgeprune calibrate MODEL --data FILE")
    return statistics


def _open_curve(path: Path, plan: KeepPlan) -> Curve:
    curve = Curve.load(path)
    if not curve.points:
        raise UsageError(f"The curve {path} has no points.")
    if curve.chosen is not None and not 0 <= curve.chosen < len(curve.points):
        raise UsageError(f"The curve {path} has no point {curve.chosen} to be chosen.")
    if curve.axis not in ("flops", "kv", "ttft_ms") or (
        curve.axis == "ttft_ms" and any(point.ttft_ms is None for point in curve.points)
    ):
        raise UsageError(f"The curve {path} does not know its points' cost along {curve.axis!r}.")
    for point in curve.points:
        _compare(path, "family", point.plan.family, plan.family)
        _compare(path, "number of layers", point.plan.layers, plan.layers)
    # A search also tries smaller images.
    if plan.geometry not in {point.plan.geometry for point in curve.points}:
        _compare(path, "geometry", curve.points[0].plan.geometry, plan.geometry)
    return curve


def _compare(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise UsageError(f"{path} is of another {what} than the plan: {found}, not {expected}.")
