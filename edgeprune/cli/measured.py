"""How measurements and diagnoses look: tables, or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgeprune.cli.show import show_facts, show_json, show_table

if TYPE_CHECKING:
    from edgeprune.device.doctor import Diagnosis
    from edgeprune.device.machine import Machine
    from edgeprune.runtime.benchmark import Benchmark, Measured, Spread

_MILLISECONDS = {
    "preprocess_ms": "preprocess ms",
    "vision_ms": "vision ms",
    "select_ms": "select ms",
    "prefill_ms": "prefill ms",
    "ttft_ms": "TTFT ms (p50 / p95)",
    "repeated_ttft_ms": "TTFT ms, image again",
    "ms_per_token": "ms per token",
    "tokens_per_second": "tokens per second",
}


def show_benchmark(result: Benchmark, as_json: bool) -> None:
    """Print what was measured and on what, pruned beside unpruned, with what pruning leaves of each cost."""
    if as_json:
        show_json(result.to_dict())
        return
    click.echo(_header(result) + "\n")
    ratios = result.ratios
    rows = [
        [words, _time(result.pruned, name), _time(result.unpruned, name), _ratio(ratios.get(name))]
        for name, words in _MILLISECONDS.items()
    ]
    rows += [
        ["KV cache KiB", *(f"{each.kv_bytes / 1024:.0f}" for each in (result.pruned, result.unpruned)), _ratio(ratios["kv_bytes"])],
        ["peak RSS MB", *(_megabytes(m.peak_rss_bytes) for m in _both(result)), _ratio(ratios.get("peak_rss_bytes"))],
        ["energy of an answer J", *(_joules(m.energy_j) for m in _both(result)), _ratio(ratios.get("energy_j"))],
        ["tokens generated", *(str(m.generated) for m in _both(result)), ""],
    ]
    show_table(["", "pruned", "unpruned", "ratio"], rows, as_json=False)
    _show_notes(result)


def show_diagnosis(diagnosis: Diagnosis, as_json: bool) -> None:
    """Print what the machine is, what can be done on it, what stands in the way, and what would spoil it."""
    if as_json:
        show_json(diagnosis.to_dict())
        return
    machine = diagnosis.machine
    if not machine.is_jetson:
        click.echo("This machine is no Jetson. What can be done here is listed all the same.\n")
    show_facts(_facts(machine), as_json=False)
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
    machine = result.machine
    parts = [
        machine.name,
        *(
            [f"power mode {machine.mode}", f"JetPack {machine.jetpack.name if machine.jetpack else 'unknown'}"]
            if machine.is_jetson
            else []
        ),
        f"clocks {_pinned(machine)}",
        f"TensorRT {machine.tensorrt or 'none'}",
        f"provider {result.provider}",
        f"threads {result.threads or 'by default'}",
        f"warm-up {result.warm_up}",
        f"repeats {result.repeats}",
    ]
    return ", ".join(parts)


def _show_notes(result: Benchmark) -> None:
    click.echo()
    for cut, before, after in result.pruned.cuts:
        click.echo(f"{cut}: {before} -> {after} visual tokens")
    if not result.pruned.cuts:
        click.echo("The plan has no cuts: nothing was pruned.")
    if not (result.pruned.reused and result.unpruned.reused):
        click.echo("image again: the tokenizer reads the first answer otherwise than it was written, so the caches were not reused")
    click.echo("image again: a second question about it in the same conversation")
    if result.pruned.energy_j is None:
        click.echo("energy: not measured: no sensor")
    else:
        click.echo(f"energy: {result.power_source}, {' + '.join(result.power_rails)}, idle power included")
    click.echo("peak RSS: of the whole process; unpruned answers came second, and memory is not given back")


def _facts(machine: Machine) -> dict[str, object]:
    memory = machine.memory
    jetson = {
        "module": machine.module or "unknown",
        "JetPack": machine.jetpack.name if machine.jetpack else "unknown",
        "L4T": machine.to_dict()["l4t"] or "unknown",
        "power mode": machine.mode,
        "clocks": _pinned(machine),
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


def _pinned(machine: Machine) -> str:
    return {True: "pinned", False: "not pinned", None: "unknown"}[machine.clocks_pinned]


def _both(result: Benchmark) -> tuple[Measured, Measured]:
    return result.pruned, result.unpruned


def _time(measured: Measured, name: str) -> str:
    value: float | Spread = getattr(measured, name)
    return f"{value:.2f}" if isinstance(value, float) else f"{value.p50:.2f} / {value.p95:.2f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _megabytes(value: int | None) -> str:
    return "unknown" if value is None else f"{value / 1e6:.1f}"


def _joules(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
