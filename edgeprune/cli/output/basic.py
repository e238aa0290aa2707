"""Print results as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from edgeprune.cli.output.progress import CommandProgress

if TYPE_CHECKING:
    from edgeprune.bundle import Bundle, Manifest
    from edgeprune.calibration.calibrate import CalibrationResult
    from edgeprune.calibration.learn.ranking import LearnedRanking
    from edgeprune.calibration.learn.run import Learning
    from edgeprune.calibration.search.pareto import Point
    from edgeprune.export.verification import ParityStage
    from edgeprune.plan import KeepPlan, Option
    from edgeprune.runtime import Stream


def show_calibration(result: CalibrationResult, as_json: bool) -> None:
    """Print a calibration: keep budgets, costs, PLPHP's classes, and the curve of a search; on stderr what was left out."""
    show_skipped(result.skipped)
    for reason in result.untried:
        click.echo(f"not tried: {reason}", err=True)
    if as_json:
        show_json(_calibration_data(result))
        return
    if result.plan is None:
        show_facts({"statistics": str(result.statistics), "samples": result.samples}, as_json=False)
        return
    for cut in result.plan.cuts:
        click.echo(f"{'cut':14} {cut}: keep {cut.keep}")
    show_facts(
        {"geometry": str(result.plan.geometry), "visual FLOPs": f"{result.flops:.1%}", "visual KV": f"{result.kv:.1%}"}, False
    )
    if result.classes:
        rows = [(c.layer, c.name, f"{c.share:.0%}", f"{c.gamma:.3f}", f"{c.stability:.0%}") for c in result.classes]
        show_table(("layer", "class", "keep", "attention to vision", "samples that agree"), rows, as_json=False)
    if result.tried:
        names = list(result.tried[0].options)
        trials = [(*(trial.options[name] for name in names), f"{trial.divergence:.3f}") for trial in result.tried]
        show_table((*names, "divergence, nats an answer"), trials, as_json=False)
    _show_search(result)
    click.echo(f"\nplan written to {result.output}; next: edgeprune export MODEL --plan {result.output} -o BUNDLE")


def _show_search(result: CalibrationResult) -> None:
    if result.learning is not None:
        show_learning(result)
    if result.ranking is not None:
        show_ranking(result)
    if result.curve is not None:
        best = [(p.name, f"{p.flops:.1%}", f"{p.kv:.1%}", f"{p.score:.1%}", *_facts_of(p)) for p in result.curve.front()]
        show_table(
            ("best plans", "visual FLOPs", "visual KV", "agreement", "facts: F1", "precision", "recall"), best, as_json=False
        )
    if result.times is not None:
        click.echo(f"times: {result.times.how}, {result.times.device}")


def show_learning(result: CalibrationResult) -> None:
    """Print how a learned selection compares with methods that learn nothing, and which one to take if it is not ahead."""
    learning, plan = result.learning, result.plan
    assert learning is not None and plan is not None
    how = "trained through the decoder" if learning.trained else "closed form"
    if learning.unmerged is not None:
        how += f", merging ({learning.unmerged:.3f} without)"
    rows = [("learned", how, f"{learning.divergence:.3f}")]
    rows += [(each.method, _options_text(each.options) or "as it comes", f"{each.divergence:.3f}") for each in learning.rivals]
    show_table((f"on {learning.held_out} held-out images", "options", "divergence, nats an answer"), rows, as_json=False)
    if not learning.ahead:
        best = learning.rivals[0]
        share = plan.tokens_entering_decoder / plan.tokens_from_encoder
        words = ["edgeprune export MODEL", f"--method {best.method}", f"--keep {share:.3g}", _options_text(best.options)]
        click.echo(f"learned is not ahead here. Take {best.method}: {' '.join(filter(None, words))} -o BUNDLE", err=True)


def show_ranking(result: CalibrationResult) -> None:
    """Print how a learned order of caches compares with those that learn nothing, and which to take if it is not ahead."""
    ranking, plan = result.ranking, result.plan
    assert ranking is not None and plan is not None
    if not ranking.answers:
        click.echo(
            "The learned order was not compared: no held-out answer has a second token, which an order could change.", err=True
        )
        return
    rows = [("learned", f"{ranking.divergence:.3f}")]
    rows += [(_order_text(each.options), f"{each.divergence:.3f}") for each in ranking.rivals]
    columns = (f"{ranking.share:.0%} of every cache, {ranking.answers} held-out answers", "divergence, nats an answer")
    show_table(columns, rows, as_json=False)
    if not ranking.ahead:
        best, method = _order_text(ranking.rivals[0].options), "dyrate" if plan.decode else "plphp"
        again = f"edgeprune calibrate MODEL --data FILE --method {method} --budget {ranking.share:.3g}"
        click.echo(f"The learned order is not ahead here. Take {best}: {again} {best} -o PLAN", err=True)


def _order_text(options: Mapping[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in options.items())


def _options_text(options: Mapping[str, Any]) -> str:
    return " ".join(f"--option {name}={'yes' if value is True else value}" for name, value in options.items())


def _learning_data(learning: Learning) -> dict[str, Any]:
    names = ("images", "held_out", "trained", "divergence", "ahead")
    found = {name: getattr(learning, name) for name in names}
    return {**found, "settings": asdict(learning.settings), "rivals": [asdict(rival) for rival in learning.rivals]}


def _ranking_data(ranking: LearnedRanking) -> dict[str, Any]:
    found = {name: getattr(ranking, name) for name in ("answers", "share", "divergence", "ahead")}
    return {**found, "rivals": [asdict(rival) for rival in ranking.rivals]}


def _facts_of(point: Point) -> list[str]:
    return ["-" if value is None else f"{value:.1%}" for value in (point.f1, point.precision, point.recall)]


def _calibration_data(result: CalibrationResult) -> dict[str, Any]:
    found: dict[str, Any] = {"statistics": None if result.statistics is None else str(result.statistics), "samples": result.samples}
    found["skipped"], found["untried"] = list(result.skipped), list(result.untried)
    found["tried"] = [asdict(trial) for trial in result.tried]
    found["learning"] = None if result.learning is None else _learning_data(result.learning)
    found["ranking"] = None if result.ranking is None else _ranking_data(result.ranking)
    if result.plan is not None:
        costs = {"flops": result.flops, "kv": result.kv}
        found |= {"output": str(result.output), "plan": result.plan.to_dict(), **costs}
        found["classes"] = [asdict(verdict) for verdict in result.classes]
    return found


def show_json(data: Any) -> None:
    """Print data as JSON."""
    click.echo(json.dumps(data, indent=2))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]], as_json: bool) -> None:
    """Print rows under column names."""
    if as_json:
        show_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


def show_options(method: str, ranking: Sequence[Option], calibration: Sequence[Option], as_json: bool) -> None:
    """Print the options of a method: those that decide which tokens stay, then those for how many."""
    rows = [
        [each.name, each.shown_default, "authors" if each.published else "ours", each.allowed, decides, each.meaning]
        for decides, options in (("which stay", ranking), ("how many", calibration))
        for each in options
    ]
    if rows or as_json:
        show_table(["option", "default", "by", "allowed", "decides", "meaning"], rows, as_json)
    else:
        click.echo(f"{method} has no options.")


def show_facts(facts: Mapping[str, object], as_json: bool) -> None:
    """Print names and values."""
    if as_json:
        show_json(dict(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name:14} {value}")


def show_export(bundle: Bundle, as_json: bool) -> None:
    """Print an exported bundle and the next commands."""
    show_bundle(bundle, as_json)
    if not as_json:
        click.echo("\nNext:")
        click.echo(f"  edgeprune verify {bundle.path}")
        click.echo(f'  edgeprune run {bundle.path} --image IMAGE --prompt "..." --overlay kept.png')
        if bundle.manifest.target == "onnxruntime" and bundle.manifest.precision in ("int8", "int4"):
            click.echo("\nThese graphs multiply in float32. On a CPU --target cpu multiplies integers, which is faster.")


def show_bundle(bundle: Bundle, as_json: bool) -> None:
    """Print the source, geometry, cuts and files of a bundle."""
    manifest, plan = bundle.manifest, bundle.plan
    if as_json:
        files = {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in manifest.files.items()}
        facts = {"bundle": str(bundle.path), "model": manifest.source.model, "family": manifest.source.family}
        facts |= {"revision": manifest.source.revision, "adapter": manifest.source.adapter}
        facts |= {"target": manifest.target, "precision": manifest.precision, "kv": manifest.kv}
        quantized, fitted = manifest.source.quantization, manifest.gptq
        plans = {
            "quantization": quantized and asdict(quantized),
            "gptq": fitted and asdict(fitted),
            "smoothing": manifest.smoothing and asdict(manifest.smoothing),
            "wide_products": manifest.wide_products,
            "plan": plan.to_dict(),
            "tiers": {name: tier_plan.to_dict() for name, tier_plan in bundle.tiers},
        }
        show_json({**facts, **plans, "opset": manifest.lowering.opset, "versions": manifest.versions, "files": files})
        return
    facts = {
        "bundle": str(bundle.path),
        "model": f"{manifest.source.model} ({manifest.source.family}, {manifest.decoder.layers} layers)",
        **{name: value for name in ("revision", "adapter") if (value := getattr(manifest.source, name))},
        "geometry": str(plan.geometry),
        "lowered": f"{manifest.precision} for {manifest.target}, opset {manifest.lowering.opset}"
        + (", KV cache of steps in 8 bits" if manifest.kv == "int8" else ""),
        **_quantized_layers(manifest),
        **_products(manifest),
        "size": f"{sum(record.bytes for record in manifest.files.values()) / 1e6:.1f} MB in {len(manifest.files)} files",
    }
    show_facts(facts, as_json=False)
    for name, tier_plan in bundle.tiers:
        click.echo(f"\n{'tier':14} {name}")
        _show_cuts(tier_plan)
    if not bundle.tiers:
        _show_cuts(plan)


def _products(manifest: Manifest) -> dict[str, str]:
    if manifest.lowering.products == "bfloat16":
        return {"products": "bfloat16, whose range is float32's: none was measured, and none stays in float32 for its size"}
    wide = manifest.wide_products
    return {"products": f"float16; in float32, being too large for it: {', '.join(wide)}"} if wide else {}


def _quantized_layers(manifest: Manifest) -> dict[str, str]:
    quantized = manifest.source.quantization
    if manifest.gptq is not None:
        return {"quantized": f"gptq; int4 weights fitted to {manifest.gptq.samples} samples"}
    if (smoothing := manifest.smoothing) is not None:
        lossy = f"; in float16, losing more than others: {', '.join(smoothing.lossy)}" if smoothing.lossy else ""
        rounded = f"{smoothing.rounded} matrices multiply 8-bit inputs"
        method = "smoothquant" if manifest.precision == "w8a8" else manifest.precision
        return {"quantized": f"{method}; {rounded}, with scales of {smoothing.samples} samples{lossy}"}
    if quantized is None:
        return {}
    counts = {"kept": quantized.kept, "quantized again": quantized.requantized, "dequantized": quantized.dequantized}
    layers = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return {"quantized": f"{quantized.method}; layers of the checkpoint: {layers}"}


def show_plan(plan: KeepPlan, as_json: bool) -> None:
    """Print a plan's model, geometry and cuts; as JSON, the plan itself."""
    if as_json:
        show_json(plan.to_dict())
        return
    show_facts({"family": f"{plan.family}, {plan.layers} layers", "geometry": str(plan.geometry)}, as_json=False)
    _show_cuts(plan)


def _show_cuts(plan: KeepPlan) -> None:
    tokens = plan.geometry.tokens
    for cut in plan.cuts:
        click.echo(f"{'cut':14} {cut}: keep {cut.keep} of {tokens} = {cut.keep / tokens:.0%}, remove {1 - cut.keep / tokens:.0%}")
    if not plan.cuts:
        click.echo(f"{'cut':14} none: every visual token is kept")
    else:
        click.echo(f"{'budgets':14} of each {'video' if plan.geometry.frames > 1 else 'image'} of a turn")


def show_verification(report: Sequence[ParityStage], as_json: bool) -> None:
    """Print the stages and the first that fails."""
    names = ("stage", "compared", "worst", "tolerance", "passed")
    rows = [
        (s.name, s.compared, *(("-", "-", "not compared") if s.worst is None else _verdict(s.worst, s.tolerance, s.passed)))
        for s in report
    ]
    failing = next((stage.name for stage in report if not stage.passed), None)
    if as_json:
        fields = ("compared", "worst", "tolerance", "passed")
        stages = [{"stage": s.name, **{field: getattr(s, field) for field in fields}} for s in report]
        show_json({"passed": failing is None, "first_failing_stage": failing, "stages": stages})
        return
    show_table(names, rows, as_json=False)
    click.echo("verified" if failing is None else f"FAILED: the first stage that differs is {failing!r}.")


def _verdict(worst: float, tolerance: float, passed: bool) -> tuple[str, str, str]:
    return (f"{worst:.2g}", f"{tolerance:.2g}", "yes" if passed else "NO")


def show_answer(stream: Stream, as_json: bool) -> str:
    """Print an answer as it is generated, then its receipt; return the answer."""
    with CommandProgress(quiet=as_json) as progress:
        progress.say("reading the question")
        first = next(stream, "")
    if as_json:
        text = first + "".join(stream)
        show_json({"text": text, "receipt": stream.receipt.to_dict()})
        return text
    click.echo(first, nl=False)
    text = first
    for piece in stream:
        click.echo(piece, nl=False)
        text += piece
    receipt = stream.receipt
    click.echo()
    for cut in receipt.cuts:
        click.echo(f"  {cut.cut}: {cut.before} -> {cut.after} visual tokens", err=True)
    if not receipt.pruned:
        click.echo(f"  not pruned: {receipt.reason}", err=True)
    if receipt.ranked_early:
        click.echo(f"  {receipt.ranked_early} of the images were ranked before the question: this model has states", err=True)
    if receipt.images_unlike:
        many, far = len(receipt.image_distances), max(receipt.image_distances)
        which = "the image looks" if many == 1 else f"{receipt.images_unlike} of {many} images look"
        click.echo(
            f"  {which} unlike those that the choice of tokens was learned from ({far:.1f} times the limit of distance)", err=True
        )
    if receipt.tier is not None:
        click.echo(f"  tier {receipt.tier} ({receipt.tier_reason})", err=True)
    times = receipt.times
    click.echo(
        f"  first token {times.ttft_ms:.1f} ms (preprocess {times.preprocess_ms:.1f}, vision {times.vision_ms:.1f}, "
        f"prefill {times.prefill_ms:.1f}), then {times.ms_per_token:.1f} ms a token; "
        f"KV cache {receipt.kv_bytes / 1024:.0f} KiB; finished by {receipt.finish_reason}",
        err=True,
    )
    return text


def show_skipped(skipped: Sequence[object]) -> None:
    """Print on stderr why samples were left out, and how many they are."""
    for error in skipped:
        click.echo(f"skipped: {error}", err=True)
    if skipped:
        click.echo(f"{len(skipped)} bad sample{'s' * (len(skipped) > 1)} skipped", err=True)
