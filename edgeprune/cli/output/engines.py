"""Print checks and builds of engines as tables or JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeprune.cli.output.basic import show_facts, show_json, show_table
from edgeprune.device.roofline import RUNTIME_BYTES, Interval
from edgeprune.errors import install_command

if TYPE_CHECKING:
    from edgeprune.benchmark.selftest import SelfTest
    from edgeprune.export.checking import CheckReport
    from edgeprune.runtime.backends.tensorrt.build import BuildJob, BuildRequest, BuildResult
    from edgeprune.runtime.backends.tensorrt.profiles import ShapeProfile, Shapes


def show_jobs(request: BuildRequest, jobs: Sequence[BuildJob], as_json: bool) -> None:
    """Print the engines to build: profiles, memory of each build, equivalent trtexec commands, and memory while they answer."""
    from edgeprune.runtime.backends.tensorrt.build import answering_parts, trtexec_command

    answering = answering_parts(request.bundle, jobs)
    settings, commands = request.settings, [trtexec_command(request.bundle, job, request.settings) for job in jobs]
    if as_json:
        entries = [
            {
                "graph": job.graph,
                "profiles": job.profiles,
                "peak_bytes": job.peak_bytes(settings),
                "peak_parts": job.peak_parts(settings),
                "trtexec": command,
            }
            for job, command in zip(jobs, commands, strict=True)
        ]
        answers = {"parts": answering, "runtime": asdict(RUNTIME_BYTES)}
        show_json({"bundle": str(request.bundle.path), "engines": entries, "answering": answers})
        return
    for job, command in zip(jobs, commands, strict=True):
        facts = {
            "engine": job.graph,
            "weights": f"{job.weights / 1e6:.1f} MB",
            "memory": f"{job.peak_bytes(settings) / 1e9:.1f} GB at most: {_sum_of(job.peak_parts(settings))}",
        }
        show_facts(facts, as_json=False)
        for number, profile in enumerate(job.profiles):
            for names, shapes in _group_inputs(profile):
                click.echo(f"  profile {number}  {names:44} {' | '.join('x'.join(map(str, shape)) for shape in shapes)}")
        click.echo(f"  {command}\n")
    _show_answering(answering)


def _sum_of(parts: Mapping[str, int]) -> str:
    return " + ".join(f"{size / 1e9:.1f} {name}" for name, size in parts.items())


def _show_answering(parts: Mapping[str, int]) -> None:
    # The sum while engines answer, without what only a built engine knows.
    whole = RUNTIME_BYTES + Interval(sum(parts.values()), sum(parts.values()))
    rows = [[name, f"{size / 1e6:.1f}"] for name, size in parts.items()]
    rows += [
        [name, f"{span.low / 1e6:.0f} to {span.high / 1e6:.0f}"] for name, span in (("runtime", RUNTIME_BYTES), ("sum", whole))
    ]
    show_table(["while they answer", "MB"], rows, as_json=False)
    click.echo("One block of scratch memory comes on top, as large as the largest engine needs: known once they are built.")


def _group_inputs(profile: ShapeProfile) -> Iterator[tuple[str, Shapes]]:
    # Inputs with equal shapes, such as the KV caches of all layers, share a line.
    by_shapes: dict[Shapes, list[str]] = {}
    for name, shapes in profile.items():
        by_shapes.setdefault(shapes, []).append(name)
    for shapes, names in by_shapes.items():
        yield names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), shapes


def show_engines(bundle: Path, done: Sequence[BuildResult], key: Path | None, as_json: bool) -> None:
    """Print the bundle's engines and how each was obtained. `key`: the private key that signed them, if one did."""
    if as_json:
        engines = [{**asdict(result.record), "how": result.how} for result in done]
        show_json({"bundle": str(bundle), "engines": engines, "signed": key is not None})
        return
    rows = [
        [result.record.graph, result.how, f"{result.record.seconds:.1f} s", f"{result.record.bytes / 1e6:.1f} MB"]
        for result in done
    ]
    show_table(["graph", "engine", "built in", "size"], rows, as_json=False)
    click.echo(f'\nNext:\n  edgeprune selftest {bundle}\n  edgeprune run {bundle} --provider tensorrt --image IMAGE --prompt "..."')
    if key is not None:
        click.echo(f"On equal boards, with a copy of this folder, both with --trust {key.with_suffix('.pub').name}")


def show_check(report: CheckReport, as_json: bool) -> None:
    """Print the findings of the lint, the results of trial builds, and the verdict."""
    if as_json:
        trials = None if report.trials is None else [asdict(trial) for trial in report.trials]
        findings = [asdict(finding) for finding in report.findings]
        show_json({"target": report.target.name, "passed": report.passed, "findings": findings, "builds": trials})
        return
    for finding in report.findings:
        where = " ".join(
            part for part in (finding.graph, finding.node, f"({finding.operator})" if finding.operator else "") if part
        )
        click.echo(f"{finding.severity}: {where}: {finding.reason} {finding.remedy}")
    if report.trials is not None:
        names = ["graph", "parsed", "built", "peak memory", "engine"]
        rows = [
            [
                trial.graph,
                *(
                    ["refused: " + trial.error, "", "", ""]
                    if trial.error
                    else [
                        f"{trial.parse_seconds:.2f} s",
                        f"{trial.build_seconds:.1f} s",
                        f"{trial.peak_bytes / 1e6:.0f} MB",
                        f"{trial.plan_bytes / 1e6:.1f} MB",
                    ]
                ),
            ]
            for trial in report.trials
        ]
        show_table(names, rows, as_json=False)
    click.echo(_verdict(report))


def _verdict(report: CheckReport) -> str:
    name, errors = report.target.name, sum(finding.severity == "error" for finding in report.findings)
    refused = sum(bool(trial.error) for trial in report.trials or ())
    if not report.passed:
        return f"\n{name}: {errors} errors in the lint, {refused} graphs refused by the builder."
    if report.target.tensorrt is None:
        return f"\n{name}: nothing stands in the way."
    if report.trials is None:
        return f"\n{name}: nothing found by the lint. Not tried: {install_command('check')} brings NVIDIA's builder."
    return f"\n{name}: nothing found by the lint, every graph was built by TensorRT-RTX."


def show_selftest(report: SelfTest, as_json: bool) -> None:
    """Print the comparisons, the times, and the verdict."""
    if as_json:
        show_json(report.to_dict())
        return
    machine = report.machine["machine"]
    show_facts({"machine": machine["device"], **report.bundle, "cuts": ", ".join(report.bundle["cuts"]) or "none"}, as_json=False)
    rows = [[c.name, c.words, f"{c.worst:.2g}", f"{c.allowed:.2g}", "yes" if c.passed else "NO"] for c in report.checks]
    show_table(["check", "compared", "worst", "allowed", "passed"], rows, as_json=False)
    names = list(next(iter(report.times.values())))
    show_table(
        ["ms", *names],
        [[backend, *(f"{times[name]:.1f}" for name in names)] for backend, times in report.times.items()],
        as_json=False,
    )
    click.echo("\nEvery check passed." if report.passed else "\nThe engines do not compute what the graphs say.")
