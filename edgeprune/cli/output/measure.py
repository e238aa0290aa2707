"""Print benchmarks and diagnoses as tables or JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgeprune.cli.output.basic import show_facts, show_json, show_table

if TYPE_CHECKING:
    from edgeprune.benchmark.results import VariantResult
    from edgeprune.benchmark.run import Benchmark
    from edgeprune.device.doctor import Diagnosis
    from edgeprune.device.machine import Machine
    from edgeprune.device.profile import DeviceProfile

_COSTS = {
    "preprocess_ms": "preprocess ms",
    "vision_ms": "vision ms",
    "select_ms": "select ms",
    "prefill_ms": "prefill ms",
    "ttft_ms": "TTFT ms",
    "recalled_ttft_ms": "image recalled ms",
    "repeated_ttft_ms": "image again ms",
    "ms_per_token": "ms per token",
    "tokens_per_second": "tokens a second",
    "energy_j": "energy J",
}
_TAILS = ("ttft_ms", "recalled_ttft_ms", "repeated_ttft_ms", "ms_per_token")
_RATES = {"fp32": "GFLOPS", "fp16": "GFLOPS"}
Row = list[str]


def show_benchmark(result: Benchmark, as_json: bool) -> None:
    """Print a benchmark and its machine: a column per variant, with ratios to the baseline."""
    if as_json:
        show_json(result.to_dict())
        return
    click.echo(f"{verdict(result)}\n\n{_header(result)}")
    names = [variant.name for variant in result.variants]
    tables = {
        "an answer": _cost_rows(result),
        "its size": _size_rows(result),
        "share of the roofline": _roofline_rows(result),
        "in a new process": _startup_rows(result),
    }
    for title, rows in tables.items():
        if rows:
            click.echo()
            show_table([f"{title:21}", *names], rows, as_json=False)
    _show_growth(result)
    _show_notes(result)


def verdict(result: Benchmark) -> str:
    """Return what a benchmark says in two lines: the first token and the next ones, beside the baseline and beside `uniform`."""
    own, baseline = result.variants[0], result.request.baseline
    lines = [
        f"{own.name}: {own.costs['ttft_ms'].p50:.1f} ms to the first token{_beside(own.ratios.get('ttft_ms'), baseline)}, then "
        f"{own.costs['ms_per_token'].p50:.2f} ms a token{_beside(own.ratios.get('ms_per_token'), baseline)}."
    ]
    uniform = next((variant for variant in result.variants if variant.name == "uniform"), None)
    if uniform is not None and own.cuts:
        extra = own.costs["ttft_ms"].p50 - uniform.costs["ttft_ms"].p50
        word = "more" if extra >= 0 else "less"
        lines.append(
            f"Beside uniform, which chooses without looking at equal work, the first token takes {abs(extra):.1f} ms {word}."
        )
    elif not own.cuts:
        lines.append("The plan has no cuts: nothing was pruned.")
    return "\n".join(lines)


def _beside(ratio: float | None, baseline: str) -> str:
    if ratio is None:
        return ""
    change = abs(1 - ratio)
    return f" ({'as' if change < 0.005 else f'{change:.0%} ' + ('less than' if ratio < 1 else 'more than')} {baseline})"


def show_profile(times: DeviceProfile, as_json: bool) -> None:
    """Print the times of a device: the vision encoder, and prefill by the number of visual tokens."""
    if as_json:
        show_json(asdict(times))
        return
    shares = [f"{part / (len(times.prefill_ms) - 1):.0%} of the visual tokens" for part in range(len(times.prefill_ms))]
    counts = [round(times.tokens * part / (len(times.prefill_ms) - 1)) for part in range(len(times.prefill_ms))]
    rows = [["vision encoder", str(times.tokens), f"{times.vision_ms:.2f}"]]
    rows += [
        [f"prefill, {share}", str(count), f"{ms:.2f}"] for share, count, ms in zip(shares, counts, times.prefill_ms, strict=True)
    ]
    click.echo(f"{times.device}: {times.ttft_ms:.1f} ms from an image to the first token, unpruned\n")
    show_table(["part", "visual tokens", "ms"], rows, as_json=False)
    if times.peaks is not None:
        rates = [f"{name} {rate / 1e9:.0f} {_RATES.get(name, 'GOPS')}" for name, rate in times.peaks.operations.items()]
        click.echo(f"\npeaks: {', '.join(rates)}, {times.peaks.bandwidth / 1e9:.1f} GB/s")


def show_diagnosis(diagnosis: Diagnosis, as_json: bool) -> None:
    """Print a machine's facts, features with remedies, and warnings."""
    if as_json:
        show_json(diagnosis.to_dict())
        return
    machine = diagnosis.machine
    if not machine.is_jetson:
        click.echo("This machine is no Jetson. What can be done here is listed all the same.\n")
    show_facts(_machine_facts(machine), as_json=False)
    click.echo()
    for ability in diagnosis.abilities:
        click.echo(f"{'yes' if ability.able else 'no':4}{ability.name}: {ability.reason}")
        if ability.remedy:
            click.echo(f"      {ability.remedy}")
    for caution in diagnosis.cautions:
        click.echo(f"\nnote: {caution.what}")
        if caution.remedy:
            click.echo(f"      {caution.remedy}")


def _header(result: Benchmark) -> str:
    machine, request = result.machine, result.request
    jetson = [f"power mode {machine.mode}", f"JetPack {machine.jetpack.name if machine.jetpack else 'unknown'}"]
    parts = [
        machine.name,
        *(jetson if machine.is_jetson else []),
        f"clocks {_clock_state(machine)}",
        f"TensorRT {machine.tensorrt or 'none'}",
        f"provider {request.provider}",
        f"threads {request.threads or 'by default'}",
        f"repeats {request.repeats} after a warm-up",
    ]
    return ", ".join(parts)


def _cost_rows(result: Benchmark) -> list[Row]:
    rows = []
    for name, label in _COSTS.items():
        if name not in result.variants[0].costs:
            continue
        cells = (
            f"{variant.costs[name].p50:.2f}{_format_ratio(result, variant, variant.ratios.get(name))}"
            for variant in result.variants
        )
        rows.append([label, *cells])
        if name in _TAILS:
            rows.append(["  p95", *(f"{variant.costs[name].p95:.2f}" for variant in result.variants)])
        if name == "ms_per_token":
            rows += [*_context_rows(result), *_overhead_rows(result)]
    return rows


def _overhead_rows(result: Benchmark) -> list[Row]:
    shares = [variant.costs.get("overhead") for variant in result.variants]
    return [["  beside the graph", *(f"{share.p50:.1%}" if share else "unknown" for share in shares)]] if any(shares) else []


def _context_rows(result: Benchmark) -> list[Row]:
    rows = []
    for index, context in enumerate(result.request.contexts):
        points = [(variant, variant.contexts[index]) for variant in result.variants]
        rows.append(
            [
                f"  at {context} keys",
                *(f"{one.ms_per_token.p50:.2f}{_format_ratio(result, variant, one.ratio)}" for variant, one in points),
            ]
        )
    return rows


def _format_ratio(result: Benchmark, figures: VariantResult, ratio: float | None) -> str:
    return "" if ratio is None or figures.name == result.request.baseline else f" ({ratio:.2f}x)"


def _size_rows(result: Benchmark) -> list[Row]:
    variants = result.variants
    caches = [(variant, variant.costs["kv_bytes"].p50 / 1024) for variant in variants]
    return [
        ["KV cache KiB", *(f"{size:.0f}{_format_ratio(result, variant, variant.ratios['kv_bytes'])}" for variant, size in caches)],
        ["visual tokens", *(f"{variant.visual_tokens:.1f}".removesuffix(".0") for variant in variants)],
        ["tokens generated", *(str(variant.generated) for variant in variants)],
    ]


def _roofline_rows(result: Benchmark) -> list[Row]:
    lines = [variant.roofline for variant in result.variants]
    if None in lines:
        return []
    rows = [
        ["TTFT, roofline", *(f"{line.ttft:.0%}" for line in lines if line)],
        ["token, roofline", *(f"{line.token:.0%}" for line in lines if line)],
    ]
    for index, context in enumerate(result.request.contexts):
        shares = [variant.contexts[index].roofline or 0.0 for variant in result.variants]
        rows.append([f"  at {context} keys", *(f"{share:.0%}" for share in shares)])
    return rows


def _startup_rows(result: Benchmark) -> list[Row]:
    starts = [variant.startup for variant in result.variants if variant.startup]
    return [
        ["import ms", *(f"{start.import_ms:.0f}" for start in starts)],
        ["load ms (read)", *(f"{start.load_ms:.0f} ({start.read_ms:.0f})" for start in starts)],
        ["peak RSS MB", *(_megabytes(variant) for variant in result.variants)],
        ["first TTFT (2nd)", *(f"{start.first_ttft_ms:.1f} ({start.second_ttft_ms:.1f})" for start in starts)],
    ]


def _show_growth(result: Benchmark) -> None:
    if not result.growth:
        return
    click.echo("\nThe first token with evenly chosen visual tokens and no cuts:")
    rows = [
        [str(point.kept), f"{point.ttft_ms.p50:.1f}", f"{point.prefill_ms.p50:.1f}", f"{point.prefill_ms.p95:.1f}"]
        for point in result.growth
    ]
    show_table(["visual tokens", "TTFT ms", "prefill ms", "  p95"], rows, as_json=False)
    if line := result.line:
        click.echo(
            f"prefill: {line.ms_at_none:.1f} ms and {line.ms_per_token:.3f} ms per token; none is farther than {line.farthest:.0%} "
            "from that line"
        )


def _show_notes(result: Benchmark) -> None:
    click.echo()
    own_result = result.variants[0]
    for cut, before, after in own_result.cuts:
        click.echo(f"{cut}: {before} -> {after} visual tokens")
    if not own_result.cuts:
        click.echo("The plan has no cuts: nothing was pruned.")
    click.echo(f"(0.50x): half of {result.request.baseline}, as the median over the rounds")
    if {"random", "uniform"} & {variant.name for variant in result.variants}:
        click.echo(
            f"random, uniform: {result.equal_work_tokens} of {result.visual_tokens} visual tokens in every layer, the plan's work"
        )
    if not all(variant.reused for variant in result.variants):
        click.echo(
            "image again: the caches were not reused, because the chat template does not repeat the answer as it was written"
        )
    if "energy_j" in own_result.costs:
        click.echo(f"energy: {result.power_source}, {' + '.join(result.power_rails)}, idle power included")
    else:
        click.echo("energy: not measured: no sensor")
    click.echo(_peaks_note(result))
    click.echo("What each figure covers: docs/benchmark.md")


def _peaks_note(result: Benchmark) -> str:
    peaks = result.peaks
    if peaks is None:
        return f"roofline: no peaks known for provider {result.request.provider}; give --device-report"
    rates = [f"{name} {rate / 1e9:.0f} {_RATES.get(name, 'GOPS')}" for name, rate in peaks.operations.items()]
    lines = ", ".join(sorted({" and ".join(variant.roofline.arithmetic) for variant in result.variants if variant.roofline}))
    threads = "all threads" if peaks.threads is None else f"threads {peaks.threads}"
    origin = "measured here" if result.peaks_from == "measured" else f"of {result.peaks_from}"
    return (
        f"roofline: peaks {origin}: {', '.join(rates)}, {peaks.bandwidth / 1e9:.1f} GB/s ({threads}); weights multiplied as {lines}"
    )


def _machine_facts(machine: Machine) -> dict[str, object]:
    memory = machine.memory
    jetson = {
        "module": machine.module or "unknown",
        "JetPack": machine.jetpack.name if machine.jetpack else "unknown",
        "L4T": machine.to_dict()["l4t"] or "unknown",
        "power mode": machine.mode,
        "clocks": _clock_state(machine),
    }
    return {
        "device": machine.name,
        **(jetson if machine.is_jetson else {}),
        "CUDA": machine.cuda or "not found",
        "TensorRT": machine.tensorrt or "not found",
        "Python": machine.to_dict()["python"],
        "memory": f"{memory.available or '?'} of {memory.total or '?'} MiB free, swap {memory.swap_total or 0} MiB",
        **({"CMA": f"{memory.cma_free or 0} of {memory.cma_total} MiB free"} if memory.cma_total else {}),
    }


def _clock_state(machine: Machine) -> str:
    return {True: "pinned", False: "not pinned", None: "unknown"}[machine.clocks_pinned]


def _megabytes(figures: VariantResult) -> str:
    peak, ratio = figures.startup.peak_rss_bytes if figures.startup else None, figures.rss_ratio
    return "unknown" if peak is None or ratio is None else f"{peak / 1e6:.1f} ({ratio:.1f}x)"
