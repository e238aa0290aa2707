"""Every method at every site, lowered for every target, through NVIDIA's own parser and builder.

A plan has one cut at each site, so that a few plans have every method. `make test` builds each
of them for one target; `make test-all` builds each method by itself for every target and compute capability.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from drawn_samples import samples
from learned_weights import drawn_ranking, input_cut
from tiny_models import TINY_GEOMETRY

from edgeprune.bundle import DECODER, PREDICTOR, SELECTOR, VISION, GraphRecord
from edgeprune.bundle.graph_io import ROWS
from edgeprune.calibration.replay.ranges import input_roundings
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.export.tracing import trace_decoder, trace_predictor, trace_selector, trace_vision
from edgeprune.lint.check import lint
from edgeprune.model import signals_for
from edgeprune.plan import CLASSES, Cut, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.registry import METHODS, method_class
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits, decoder_ranges, shapes_of
from edgeprune.runtime.backends.tensorrt.trial import Trial, substitute_capability, try_build
from edgeprune.targets import TARGETS, Lowering

pytest.importorskip("tensorrt_rtx", reason='needs NVIDIA\'s builder: pip install "edgeprune[check]"')

BASE = unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY)
WIDTH = 128  # of the visual tokens of the model "even"
RANKED: dict[str, Any] = {"rows": "peak", "reduce": "max", "spread": True, "prior": [list(range(12))] * 2}
CACHES = BASE.with_cuts(*(Cut("cache", "plphp", keep, layer) for layer, keep in enumerate((7, 5))))
PREDICTOR_OPTIONS = {"form": "predictor", "weight": [[0.1] * 9] * 2, "bias": [0.5, 0.0], "shares": [1.0, 0.4]}
FORMS = {
    "schedule": {"form": "schedule", "steps": [1, 3], "shares": [0.5, 0.25]},
    "map": {"form": "map", "attention": [0.2, 0.4], "shares": [0.3, 0.6, 1.0]},
    "predictor": PREDICTOR_OPTIONS,
    CLASSES: {"form": CLASSES, "thresholds": [0.2, 0.5], "shares": [0.25, 0.5, 1.0]},
}
WEIGHING = "zspaprune, weigh @ input"
LIMITS = ProfileLimits(context=256, turn=64, images=2, unpruned=True)
# TensorRT's targets that differ in nothing but their version share their graphs.
LOWERED = ("jetpack6", "jetpack7.2")
BUILT = [name for name, target in TARGETS.items() if target.tensorrt is not None]


def plans() -> Iterator[tuple[str, KeepPlan]]:
    yield "none", BASE
    for name in METHODS:
        for site in method_class(name).sites:
            if name == "evs":
                continue  # takes no images: see test_methods_evs.py
            if site == "vision":
                yield f"{name} @ vision", BASE.with_cuts(Cut("vision", name, 6, layer=1))
            elif site == "input":
                yield f"{name} @ input", BASE.with_cuts(input_cut(name, 5, WIDTH))
            elif site == "layer":
                yield f"{name} @ layer", BASE.with_cuts(Cut("layer", name, 0 if name == "vtw" else 5, layer=1))
            elif site == "cache":
                yield f"{name} @ cache", BASE.with_cuts(*(Cut("cache", name, keep, layer) for layer, keep in enumerate((7, 5))))
            else:
                forms = {form: options for form, options in FORMS.items() if (form == CLASSES) == (name == "plphp")}
                yield from (
                    (f"{name} {form} @ decode", CACHES.with_cuts(Cut("decode", name, 0, options=options)))
                    for form, options in forms.items()
                )
    yield WEIGHING, BASE.with_cuts(Cut("input", "zspaprune", 5, options={"weigh": True}))
    yield "learned, merge and weigh @ input", BASE.with_cuts(input_cut("learned", 5, WIDTH, merge=True, weigh=True))
    yield "plphp, all options @ cache", BASE.with_cuts(Cut("cache", "plphp", 5, 0, options=RANKED))
    ranking = drawn_ranking(2, 2, 32)  # of the layers and heads of the model "even"
    yield "plphp, learned @ cache", BASE.with_cuts(Cut("cache", "plphp", 5, 0, options={"rows": "learned"}, weights=ranking))


def methods_at(site: str) -> list[str]:
    return [name for name in METHODS if site in method_class(name).sites and name != "evs"]


def composed() -> Iterator[tuple[str, KeepPlan]]:
    # Plans with cuts at all sites which together have every method at every site.
    sites = {site: methods_at(site) for site in ("vision", "input", "layer", "cache")}
    for index in range(max(map(len, sites.values()))):
        vision, first, layer, cache = (names[index % len(names)] for names in sites.values())
        form = list(FORMS)[index % len(FORMS)]
        cuts = [
            Cut("vision", vision, 11, layer=1),
            input_cut(first, 10, WIDTH),
            Cut("layer", layer, 0 if layer == "vtw" else 8, layer=1),
        ]
        cuts += [Cut("cache", cache, 9), Cut("cache", cache, 0 if layer == "vtw" else 4, layer=1)]
        decode = Cut("decode", "plphp" if form == CLASSES else "dyrate", 0, layer=1, options=FORMS[form])
        yield f"{vision}, {first}, {layer}, {cache}, {form}", BASE.with_cuts(*cuts, decode)


COMPOSED = dict(composed())
# PyramidDrop multiplies by the next layer's weights a second time: quantized ones must not be shared.
SHARED = next(name for name in COMPOSED if "pyramiddrop" in name)
PLANS = dict(plans())


def traced(model: LoadedModel, plan: KeepPlan, lowering: Lowering, folder: Path) -> Iterator[tuple[str, Path, GraphRecord]]:
    """Write the graphs that a plan changes."""
    parts, needed = model.family.decoder(), signals_for(plan, model.family)
    signals: dict[str, Any] = {}
    if not plan.cuts or plan.vision_cuts or needed:
        vision = trace_vision(model.family, plan, lowering, folder / "vision.onnx")
        signals = {name: vision.outputs[name].shape for name in needed}
        yield VISION, folder / "vision.onnx", vision
    if plan.input is not None:
        selector = trace_selector(parts, plan, signals, lowering, folder / "selector.onnx")
        yield SELECTOR, folder / "selector.onnx", selector
    if plan.has_rate_predictor:
        yield PREDICTOR, folder / "predictor.onnx", trace_predictor(plan, lowering, folder / "predictor.onnx")
    if plan.input is None or len(plan.cuts) > 1 or plan.weighs:
        yield DECODER, folder / "decoder.onnx", trace_decoder(parts, 3, plan, lowering, folder / "decoder.onnx")


def profiles(name: str, record: GraphRecord, plan: KeepPlan) -> list[dict[str, Any]]:
    wanted: list[Any] = [{"words": (1, 8, 64)}]
    if name == DECODER:
        wanted = list(decoder_ranges((plan,), LIMITS, steps=ROWS in record.inputs))
    dynamic = {key: at.shape for key, at in record.inputs.items() if any(isinstance(axis, str) for axis in at.shape)}
    return [{key: shapes_of(shape, ranges) for key, shape in dynamic.items()} for ranges in wanted]


def test_the_composed_plans_have_every_method_at_every_site() -> None:
    found = {(cut.site, cut.method) for plan in COMPOSED.values() for cut in plan.cuts}
    assert found == {(cut.site, cut.method) for plan in PLANS.values() for cut in plan.cuts}
    forms = {cut.options["form"] for plan in COMPOSED.values() for cut in plan.cuts if cut.site == "decode"}
    assert forms == set(FORMS)


# Each for one target, in turns; `make test` builds one of them for the newer one.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "target"),
    [(plan, LOWERED[index % 2]) for index, plan in enumerate(COMPOSED)],
)
def test_every_method_is_built(even: LoadedModel, plan: str, target: str, tmp_path: Path) -> None:
    refuse_nothing(even, COMPOSED[plan], Lowering(TARGETS[target], "fp16"), tmp_path, builds=1)


@pytest.mark.parametrize("target", [pytest.param("jetpack6", marks=pytest.mark.slow), "jetpack7.2"])
@pytest.mark.parametrize(
    "plan", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("plphp, all options @ cache", WEIGHING))]
)
def test_every_graph_is_built_for_every_target(even: LoadedModel, plan: str, target: str, tmp_path: Path) -> None:
    refuse_nothing(even, PLANS[plan], Lowering(TARGETS[target], "fp16"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", LOWERED)
@pytest.mark.parametrize("plan", list(PLANS))
def test_every_method_is_built_by_itself(even: LoadedModel, plan: str, target: str, tmp_path: Path) -> None:
    refuse_nothing(even, PLANS[plan], Lowering(TARGETS[target], "fp16"), tmp_path)


SLOW = [(precision, target) for precision in ("fp32", "int8", "bf16", "w8a8") for target in LOWERED] + [("int4", "jetpack7.2")]
SLOW += [("fp8", "jetpack7"), ("fp8", "jetpack7.2")]


@pytest.mark.parametrize(
    ("precision", "target"),
    [
        ("int4", "jetpack6"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW),
    ],
)
def test_every_precision_is_built(even: LoadedModel, precision: str, target: str, tmp_path: Path) -> None:
    kind = Lowering(TARGETS[target], precision).inputs
    roundings = input_roundings(even, BASE, samples(tmp_path, 0, 2), kind=kind).found if kind else {}
    refuse_nothing(even, COMPOSED[SHARED], Lowering(TARGETS[target], precision, roundings=roundings), tmp_path, builds=1)


def refuse_nothing(model: LoadedModel, plan: KeepPlan, lowering: Lowering, folder: Path, builds: int = 2) -> None:
    """Lint the graphs of a plan for all targets that share them, and build them for at most `builds` compute capabilities."""
    alike = [TARGETS[name] for name in BUILT if TARGETS[name].opset == lowering.target.opset]
    alike = [target for target in alike if lowering.precision != "fp8" or target.has_fp8]
    for name, path, record in traced(model, plan, lowering, folder):
        ranges = profiles(name, record, plan)
        for target in alike:
            found = lint(path, target, [profile for profile in ranges if profile], name=name)
            assert [finding for finding in found if finding.severity == "error"] == []
        for capability in sorted({substitute_capability(target, lowering.precision) for target in alike})[:builds]:
            trial = built_once(path, name, ranges, capability)
            assert not trial.error, f"{name} for {capability}: {trial.error}"
            assert trial.plan_bytes > 0 and trial.peak_bytes > 0


def built_once(path: Path, name: str, ranges: list[dict[str, Any]], capability: str) -> Trial:
    """Return what the builder says of a graph; a graph that was built before in this process is not built again."""
    content = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}*")))).hexdigest()
    key = (content, repr(ranges), capability)
    if key not in _TRIALS:
        _TRIALS[key] = try_build(path, name, ranges, capability)
    return _TRIALS[key]


_TRIALS: dict[tuple[str, str, str], Trial] = {}


def test_targets_of_one_opset_share_their_graphs() -> None:
    for name in BUILT:
        lowered = TARGETS["jetpack6" if TARGETS[name].opset == TARGETS["jetpack6"].opset else "jetpack7.2"]
        same = replace(TARGETS[name], name=lowered.name, tensorrt=lowered.tensorrt, modules=lowered.modules)
        assert same == lowered
