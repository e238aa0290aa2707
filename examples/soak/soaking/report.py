"""The account as a table, and the memory as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MEBIBYTE = 1 << 20


def table(report: Mapping[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    rows = [
        ("figure", "value"),
        ("---", "---"),
        *_requests(report),
        *_memory(report["resources"]),
        *_cancels(report),
        *_siege(report),
    ]
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def _requests(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    tally, faults = report["tally"], report["tally"]["faults"]
    results = tally["results"]
    return [
        ("minutes", f"{report['minutes']:.1f}"),
        ("requests, and per second", f"{tally['requests']}, {tally['requests'] / (60 * report['minutes']):.1f}"),
        ("answers right to the letter", str(results.get("right", 0))),
        ("of them with something recalled", ", ".join(f"{what} {count}" for what, count in sorted(tally["recalled"].items()))),
        ("streams cancelled; what had come was right", str(tally["cancelled streams"])),
        ("answers that a deadline ended; what had come was right", str(results.get("cut", 0) - tally["cancelled streams"])),
        ("disconnects before, amid and after the body", str(tally["disconnects"])),
        (
            "bad requests, refused as they must be",
            f"{results.get('refused', 0)}, of {tally['bad kinds']} kinds and what is no HTTP",
        ),
        ("429; deadlines that passed in line", f"{results.get('full', 0)}; {results.get('late', 0)}"),
        (
            "**lost, crossed, wrong, hung**",
            "**" + ", ".join(str(faults[name]) for name in ("lost", "crossed", "wrong", "hung")) + "**",
        ),
        ("answers with the identity of another", str(tally["answers twice"])),
        ("differences between the server's counts and the clients'", "; ".join(report["agreement"]["differences"]) or "none"),
    ]


def _memory(resources: Mapping[str, Any]) -> list[tuple[str, str]]:
    rss = resources["rss"]
    early, middle, late = (rss[f"{tenth} tenth"] / MEBIBYTE for tenth in ("second", "sixth", "last"))
    return [
        ("resident memory, second tenth to last tenth", f"{early:.1f} to {late:.1f} MiB, **{100 * rss['drift']:+.2f} %**"),
        ("the same, sixth tenth to last tenth", f"{middle:.1f} to {late:.1f} MiB, **{100 * rss['later drift']:+.2f} %**"),
        (
            "threads, open files: second tenth, last tenth, most",
            "; ".join(_level(resources[name]) for name in ("threads", "files")),
        ),
    ]


def _level(level: Mapping[str, Any]) -> str:
    return f"{level['second tenth']:g}, {level['last tenth']:g}, {level['most']:g}"


def _cancels(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    served, inside = report["cancels"], report["inside"]
    rows = [
        ("client closes to server hears, ms", served["close to heard ms"]),
        (f"{served['early']['answers']} answers cancelled before their first token: heard to end, ms", served["early"]["ms"]),
        (f"{served['answers']} answers cancelled while decoding: **tokens after**", served["tokens after"]),
        ("their decode step, ms", served["step ms"]),
        ("heard to end, ms", served["heard to end ms"]),
        ("heard to end, decode steps", served["heard to end steps"]),
        ("client closes to end, ms", served["close to end ms"]),
        ("client closes to end, decode steps", served["close to end steps"]),
        (f"in the process, {inside['early']['answers']} before their first token: `cancel()` to end, ms", inside["early"]["ms"]),
        (f"in the process, {inside['answers']} while decoding: **tokens after**", inside["tokens after"]),
        ("their decode step, ms", inside["step ms"]),
        ("`cancel()` to end, ms", inside["ms"]),
        ("`cancel()` to end, decode steps", inside["steps"]),
    ]
    return [("cancelling", "p50 / p99 / most"), *((name, _spread(found)) for name, found in rows)]


def _siege(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    siege = report["siege"]
    if siege is None:
        return []
    before, most = (size / MEBIBYTE for size in siege["rss"])
    rows = [("ms at rest", "rest ms"), ("ms under attack", "attacked ms"), ("`/health` under attack, ms", "health ms")]
    return [
        (f"an honest client, {' and '.join(map(str, siege['answers']))} answers", "p50 / p99 / most"),
        *((name, _spread(siege[key])) for name, key in rows),
        ("its 99th percentile under attack over that at rest", f"**{siege['ratio']:.2f}**"),
        ("resident memory before the attack, and most", f"{before:.1f}, {most:.1f} MiB"),
    ]


def _spread(found: Mapping[str, float] | None) -> str:
    return "none" if found is None else " / ".join(f"{found[name]:.3g}" for name in ("p50", "p99", "most"))


def draw(samples: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw memory, threads and open files over time. Needs matplotlib (the extra "plot")."""
    from matplotlib.figure import Figure

    minutes = [each["seconds"] / 60 for each in samples]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    memory, counts = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    memory.plot(minutes, [each["rss"] / MEBIBYTE for each in samples], color="tab:blue", linewidth=1)
    memory.set_ylabel("resident memory, MiB")
    memory.set_ylim(bottom=0)
    for name, colour in (("threads", "tab:orange"), ("files", "tab:green")):
        counts.plot(
            minutes, [each[name] for each in samples], color=colour, linewidth=1, label=name if name == "threads" else "open files"
        )
    counts.set_ylim(bottom=0)
    counts.set_xlabel("minutes")
    counts.legend(loc="center", bbox_to_anchor=(0.5, 0.5), ncol=2, frameon=False)
    for axes in (memory, counts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
