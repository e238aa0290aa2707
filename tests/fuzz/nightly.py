"""The nightly run: every target under both engines, each in a process that is watched; what breaks one ends only that one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fuzz.files import forget
from fuzz.findings import keep
from fuzz.state import State
from fuzz.targets import TARGETS

ENGINES = {"hypothesis": 0.04, "atheris": 0.96}  # shares of the cases: atheris is the faster one
_STALLED_S = 60.0  # without a new case, after which a process is ended
_AGAIN = 5  # times a process is started anew that ended early
_POLL_S = 0.25


@dataclass(frozen=True)
class Row:
    """What came of one target under one engine. `taken`: inputs that were valid; `slowest_ms`: of one case."""

    target: str
    engine: str
    cases: int
    taken: int
    seconds: float
    slowest_ms: float
    findings: int


def nightly(cases: int, folder: Path, names: Sequence[str] = (), engines: Sequence[str] = (), first: int = 0) -> list[Row]:
    """Run at least `cases` cases over all targets, or those of `names`; return what came of each, printed as it comes.

    Says what is left out, because a package is not installed, and gives its share to the rest. `folder` must be new or empty.
    """
    chosen = {name: TARGETS[name] for name in names or TARGETS}
    for name in [name for name, entry in chosen.items() if entry.missing]:
        print(f"Left out: {name}, as {', '.join(chosen.pop(name).missing)} is not installed.", flush=True)
    usable = [engine for engine in engines or ENGINES if importlib.util.find_spec(engine) is not None]
    for engine in [engine for engine in engines or ENGINES if engine not in usable]:
        print(f"Left out: {engine} is not installed. Install with: pip install {engine}", flush=True)
    whole = sum(entry.share for entry in chosen.values()) * sum(ENGINES[engine] for engine in usable)
    rows = []
    for engine in usable:
        for name, entry in chosen.items():
            part = -int(-cases * entry.share * ENGINES[engine] // whole)  # rounded up
            rows.append(_row(engine, name, part, folder, first))
            print(_line(rows[-1]), flush=True)
    return rows


def _row(engine: str, name: str, cases: int, folder: Path, first: int) -> Row:
    place = folder / f"{name}-{engine}"
    place.mkdir(parents=True)
    state, began = State(place / "state"), time.monotonic()
    for again in range(_AGAIN):
        left = cases - state.counts[0]
        if left <= 0:
            break
        part = left if engine == "atheris" else cases
        work = ["-m", "fuzz", "work", engine, name, str(part), str(place), str(first + 1000 * again)]
        why = watched([sys.executable, *work], place / "log", state)
        if why:
            keep(folder / "findings", name, state.case, why)
    found = len(list((folder / "findings").glob(f"{name}-*.case")))
    done, taken, slowest = state.counts
    return Row(name, engine, done, taken, round(time.monotonic() - began, 1), round(1e3 * slowest, 1), found)


def watched(command: Sequence[str], log_file: Path, state: State) -> str:
    """Run a process that notes its cases in `state`, and end it where it hangs; return why it ended, "" where that was right."""
    with log_file.open("ab") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        seen, since = state.counts[0], time.monotonic()
        while process.poll() is None:
            time.sleep(_POLL_S)
            if state.counts[0] != seen:
                seen, since = state.counts[0], time.monotonic()
            elif time.monotonic() - since > _STALLED_S:
                process.kill()
                process.wait()
                forget(process.pid)
                return f"No end after {_STALLED_S:g} s."
    forget(process.pid)
    if process.returncode == 0:
        return ""
    end = log_file.read_text(encoding="utf-8", errors="replace")[-6000:]
    return f"The process ended with {process.returncode}.\n{end}"


def report(rows: Sequence[Row], folder: Path) -> str:
    """Return the table and the JSON of a run, and write the JSON into its folder."""
    total = {"cases": sum(row.cases for row in rows), "seconds": round(sum(row.seconds for row in rows), 1)}
    total["findings"] = len(list((folder / "findings").glob("*.case")))
    data = json.dumps({"total": total, "targets": [asdict(row) for row in rows]})
    (folder / "report.json").write_text(data + "\n", encoding="utf-8")
    head = f"{'target':<14}{'engine':<12}{'cases':>9}{'taken':>8}{'seconds':>9}{'cases/s':>9}{'slowest':>10}{'findings':>10}"
    foot = f"{total['cases']} cases in {total['seconds']:.0f} s, {total['findings']} findings"
    return "\n".join([head, *map(_line, rows), foot, data])


def _line(row: Row) -> str:
    rate, share = row.cases / max(row.seconds, 0.1), 100 * row.taken / max(row.cases, 1)
    figures = f"{row.cases:>9}{share:>6.0f} %{row.seconds:>9.1f}{rate:>9.0f}{row.slowest_ms:>7.0f} ms{row.findings:>10}"
    return f"{row.target:<14}{row.engine:<12}{figures}"
