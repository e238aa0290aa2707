"""Print an estimate: first in plain words whether it fits and how long it takes, then stages and memory beside no pruning."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.output.basic import show_facts, show_json, show_table
from edgeprune.device.roofline import estimate
from edgeprune.device.workload import PRECISIONS

if TYPE_CHECKING:
    from edgeprune.device.jetson import Module
    from edgeprune.device.roofline import Estimate, Interval, MemoryEstimate
    from edgeprune.device.workload import Workload

_NOTE = "A roofline of peak numbers, not a measurement; how far off it was: docs/roofline.md"


def show_estimate(work: Workload, module: Module, bundle_precision: str | None, as_json: bool) -> None:
    """Print what a workload costs on a module, beside the same without pruning; `bundle_precision`: None for a model."""
    pruned, unpruned = estimate(work, module), estimate(work.unpruned(), module)
    said = verdict(work, module, pruned)
    if as_json:
        request = {"verdict": said, "device": module.name, "precision": work.precision.name, "bundle_precision": bundle_precision}
        tokens = {"visual_tokens": work.tower.tokens, "text_tokens": work.text_tokens, "tokens": work.generated}
        show_json({**request, **tokens, "pruned": _to_json(pruned), "unpruned": _to_json(unpruned)})
        return
    click.echo(f"{said}\n{_NOTE}\n")
    assumed = "" if bundle_precision in (None, work.precision.name) else f", assumed: the bundle is {bundle_precision}"
    facts = {
        "device": f"{module.title}: {module.tflops():.1f} TFLOPS dense FP16, {module.bandwidth:g} GB/s, {module.ram} GiB",
        "workload": f"{work.tower.tokens} visual tokens, {work.text_tokens} of the question, {work.generated} of the answer",
        "precision": f"{work.precision.name}{assumed}",
    }
    show_facts(facts, as_json=False)
    click.echo()
    show_table(["stage", "ms", "limit", "unpruned ms", "limit"], _time_rows(pruned, unpruned), as_json=False)
    click.echo()
    show_table(["memory", "MB", "unpruned MB"], _memory_rows(pruned.memory, unpruned.memory), as_json=False)


def verdict(work: Workload, module: Module, found: Estimate) -> str:
    """Return in one line whether a workload fits in a module's memory, with the remedy if not, and how long an answer takes."""
    memory, ram = found.memory, f"{module.ram} GiB"
    peak = f"about {memory.at_peak.middle / 1e9:.1f} GB at peak"
    if memory.fits == "yes":
        fit = f"Fits in {ram}: {peak}."
    elif memory.fits == "perhaps":
        fit = f"May fit in {ram}: {peak}, and the system takes {_span(memory.system, 1e-9)} GB.{_remedy(work, module)}"
    else:
        fit = f"Does not fit in {ram}: {peak}.{_remedy(work, module)}"
    return f"{fit} First token {_rounded(found.ttft_ms)} ms, then {_rounded(found.token_ms)} ms a token."


def _remedy(work: Workload, module: Module) -> str:
    # The widest of the narrower precisions that fits, or else the last of them if it may.
    narrower = [each for each in PRECISIONS.values() if each.layers < work.precision.layers and module.has(each.arithmetic)]
    memories = {each.name: estimate(replace(work, precision=each), module).memory for each in narrower}
    fitting = {name: memory for name, memory in memories.items() if memory.fits == "yes"} or dict(list(memories.items())[-1:])
    for name, memory in fitting.items():
        if memory.fits != "no":
            fits = "it fits" if memory.fits == "yes" else "it may"
            return f" With --precision {name} {fits}: about {memory.at_peak.middle / 1e9:.1f} GB."
    return ""


def _rounded(span: Interval) -> str:
    # Both ends to two digits, or one number if they are then equal.
    ends = [f"{float(f'{end:.1e}'):.15g}" for end in (span.low, span.high)]
    return " to ".join(dict.fromkeys(ends))


def _time_rows(pruned: Estimate, unpruned: Estimate) -> list[list[str]]:
    rows = []
    for stage in pruned.stages:
        other = unpruned.stage(stage.name)
        unpruned_cells = ["-", ""] if other is None else [_span(other.ms), other.limit]
        rows.append(["decode, a token" if stage.name == "decode" else stage.name, _span(stage.ms), stage.limit, *unpruned_cells])
    rows.insert(-1, ["first token", _span(pruned.ttft_ms), "", _span(unpruned.ttft_ms), ""])
    return rows


def _memory_rows(pruned: MemoryEstimate, unpruned: MemoryEstimate) -> list[list[str]]:
    both = pruned, unpruned
    return [
        *([part, *(f"{memory.weight_parts[part] / 1e6:.1f}" for memory in both)] for part in pruned.weight_parts),
        ["weights", *(f"{memory.weights / 1e6:.1f}" for memory in both)],
        ["runtime", *(_span(memory.runtime, 1e-6) for memory in both)],
        ["at rest", *(_span(memory.at_rest, 1e-6) for memory in both)],
        ["KV cache", *(f"{memory.kv / 1e6:.1f}" for memory in both)],
        ["activations", *(f"{memory.activations / 1e6:.1f}" for memory in both)],
        ["at peak", *(_span(memory.at_peak, 1e-6) for memory in both)],
        ["system, beside it", *(_span(memory.system, 1e-6) for memory in both)],
        ["needed", *(_span(memory.needed, 1e-6) for memory in both)],
        ["the module has", *(f"{memory.ram / 1e6:.0f}" for memory in both)],
        ["token embedding, in its file", *(f"{memory.embedding / 1e6:.1f}" for memory in both)],
        ["file cache, given back", *(f"{memory.file_cache / 1e6:.1f}" for memory in both)],
    ]


def _span(value: Interval, scale: float = 1.0) -> str:
    digits = 2 if value.high * scale < 1 else 1 if value.high * scale < 100 else 0
    return f"{value.low * scale:.{digits}f} to {value.high * scale:.{digits}f}"


def _to_json(result: Estimate) -> dict[str, Any]:
    memory = result.memory
    sums = {"at_rest": memory.at_rest, "at_peak": memory.at_peak, "needed": memory.needed}
    totals = {"weights": memory.weights, **{name: asdict(span) for name, span in sums.items()}, "fits": memory.fits}
    return {
        "stages": [asdict(stage) for stage in result.stages],
        "ttft_ms": asdict(result.ttft_ms),
        "token_ms": asdict(result.token_ms),
        "memory": {**asdict(memory), **totals},
    }
