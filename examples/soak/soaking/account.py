"""The account of a run: what the clients saw, what the server counted, and whether the two agree."""

from __future__ import annotations

import bisect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from soaking.outcomes import CUT, FAULTS, GONE, RIGHT, Outcome
from soaking.server import Sample, labelled

# What a request may have got whose sender did not wait for it.
UNSEEN = {"200", "400", "429", "499", "503"}
Counts = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def outcomes(paths: Sequence[Path]) -> list[Outcome]:
    """Return what the clients wrote down."""
    return [Outcome(**json.loads(line)) for path in paths for line in path.read_text().splitlines()]


def tallied(found: Sequence[Outcome]) -> dict[str, Any]:
    """Return counts of requests by what came of them, and the first faults in words."""
    results = Counter(each.result for each in found)
    manners: dict[str, Counter[str]] = {}
    for each in found:
        manners.setdefault(each.manner.partition(":")[0], Counter())[each.result] += 1
    ids = [each.answer_id for each in found if each.answer_id]
    return {
        "requests": len(found),
        "exchanges": sum(len(each.statuses) + each.unseen + each.doubtful for each in found),
        "results": dict(results),
        "manners": {name: dict(counts) for name, counts in sorted(manners.items())},
        "recalled": Counter(what for each in found if each.result == RIGHT for what in each.reused),
        "cancelled streams": sum(each.result == CUT and each.closed is not None for each in found),
        "disconnects": results[GONE],
        "bad requests": sum(each.manner.startswith(("bad", "garbage")) for each in found),
        "bad kinds": len({each.manner for each in found if each.manner.startswith("bad")}),
        "answers twice": len(ids) - len(set(ids)),
        "faults": {name: results[name] for name in FAULTS},
        "told": [f"{each.manner}: {each.result}: {each.note}" for each in found if each.result in FAULTS][:40],
    }


def agreement(found: Sequence[Outcome], before: Counts, after: Counts) -> dict[str, Any]:
    """Compare the responses that the clients saw with those that the server counted; `differences` says what does not agree."""
    counts = {key: value - before.get(key, 0.0) for key, value in after.items()}
    requests = "edgeprune_http_requests_total"
    watched = [labelled(counts, requests, "status", [("path", path)]) for path in ("/health", "/metrics")]
    served = Counter(labelled(counts, requests, "status"))
    for each in watched:
        served.subtract(each)
    served = +served
    seen = Counter(str(status) for each in found for status in each.statuses)
    unseen, doubtful = sum(each.unseen for each in found), sum(each.doubtful for each in found)
    excess = {status: served[status] - seen[status] for status in sorted({*served, *seen})}
    more = sum(excess.values())
    wrong = [f"status {status}: the clients saw {-count} more" for status, count in excess.items() if count < 0]
    wrong += [
        f"status {status}: {count} that nobody waited for" for status, count in excess.items() if count > 0 and status not in UNSEEN
    ]
    if not unseen <= more <= unseen + doubtful:
        wrong.append(f"the server counted {more} more, not {unseen} to {unseen + doubtful}")
    ended = labelled(counts, "edgeprune_answers_total", "finish_reason")
    told = Counter(each.finish for each in found if each.finish)
    wrong += [
        f"answers that ended by {why}: {ended.get(why, 0)} and {count} seen"
        for why, count in told.items()
        if ended.get(why, 0) < count
    ]
    answered = sum(count for why, count in ended.items() if why != "error")
    if answered != served["200"]:
        wrong.append(f"{answered} answers and {served['200']} responses with status 200")
    figures = {"served": dict(served), "seen": dict(seen), "unseen": unseen, "doubtful": doubtful, "ended": ended}
    return {**figures, "rejected": labelled(counts, "edgeprune_rejected_total", "reason"), "differences": wrong}


def resources(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return how memory, threads and open files went, by medians of tenths of the time: the last over the second (`drift`) and over
    the sixth (`later drift`): what fills once is in the first alone, what leaks is in both.
    """
    tenth = max(1, len(samples) // 10)
    parts = [samples[number * tenth :][:tenth] or samples for number in (1, 5)]
    found: dict[str, Any] = {"samples": len(samples)}
    for name in ("rss", "threads", "files"):
        values = [getattr(each, name) for each in samples]
        early, middle, late = (median(getattr(each, name) for each in part) for part in (*parts, samples[-tenth:]))
        found[name] = {
            "second tenth": early,
            "sixth tenth": middle,
            "last tenth": late,
            "drift": late / early - 1,
            "later drift": late / middle - 1,
            "least": min(values),
            "most": max(values),
        }
    return found


def cancels(found: Sequence[Outcome], path: Path) -> list[dict[str, Any]]:
    """Return the server's notes of cancelled answers, with the moment when the client went away."""
    left: dict[int, list[float]] = {}
    for each in found:
        if each.port is not None and each.closed is not None:
            left.setdefault(each.port, []).append(each.closed)
    matched = []
    for line in path.read_text().splitlines():
        note = json.loads(line)
        times = sorted(left.get(note["port"], ()))
        at = bisect.bisect_right(times, note["heard"]) - 1  # ports come round again
        if at >= 0:
            matched.append(note | {"closed": times[at]})
    return matched


def latencies(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return percentiles of what the end of a cancelled answer took: before its first token, and at its decode steps."""
    early, stepping = [note for note in notes if not note["at"]], [note for note in notes if note["at"] and note["step_ms"]]
    return {
        "early": {"answers": len(early), "ms": percentiles([1e3 * (note["ended"] - note["heard"]) for note in early])},
        "answers": len(stepping),
        "tokens after": percentiles([note["tokens"] - note["at"] for note in notes if note["at"]]),
        "step ms": percentiles([note["step_ms"] for note in stepping]),
        "close to heard ms": percentiles([1e3 * (note["heard"] - note["closed"]) for note in notes]),
        **_two("heard to end", stepping, "heard"),
        **_two("close to end", stepping, "closed"),
    }


def _two(name: str, notes: Sequence[Mapping[str, Any]], since: str) -> dict[str, Any]:
    took = [1e3 * (note["ended"] - note[since]) for note in notes]
    steps = [ms / note["step_ms"] for ms, note in zip(took, notes, strict=True)]
    return {f"{name} ms": percentiles(took), f"{name} steps": percentiles(steps)}


def latencies_inside(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return percentiles of cancelling within a process."""
    early, stepping = [note for note in notes if not note["at"]], [note for note in notes if note["at"] and note["step_ms"]]
    return {
        "early": {"answers": len(early), "ms": percentiles([note["ms"] for note in early])},
        "answers": len(stepping),
        "tokens after": percentiles([note["after"] for note in stepping]),
        "step ms": percentiles([note["step_ms"] for note in stepping]),
        "ms": percentiles([note["ms"] for note in stepping]),
        "steps": percentiles([note["ms"] / note["step_ms"] for note in stepping]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return the median, the 99th percentile (the least value that 99 % do not exceed) and the most."""
    if not values:
        return None
    ranked = sorted(values)
    rank = -(-99 * len(ranked) // 100) - 1
    return {"p50": float(median(ranked)), "p99": float(ranked[rank]), "most": float(ranked[-1])}


def drawn(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return samples as JSON data, with seconds from the first."""
    return [asdict(each) | {"seconds": each.seconds - samples[0].seconds} for each in samples]
