"""Runs one command again and again in forked children, each of which meets a fault one step later, until one meets none.

Started by the tests as a process of its own, so that it has no threads when it forks:

    fault_driver.py FOLDER MODEL BUNDLE SCENARIO...

It prints a JSON object for each scenario and fault, with the number of faults and what went wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fault_points import FILLS, Points, fill, kill
from fault_scenarios import Scenario, scenario

from edgeprune.errors import EdgePruneError

FAULTS: dict[str, tuple[Callable[[str], None], Sequence[str]]] = {"kill": (kill, ()), "full": (fill, FILLS)}
_UNHANDLED, _UNMOVED, _MOST = 99, 50, 400


@dataclass
class Tally:
    """Faults that were injected, and what went wrong."""

    faults: int = 0
    wrong: list[str] = field(default_factory=list)

    def judge(self, where: str, command: Scenario, folder: Path, *, done: bool = False) -> None:
        """Note it when something is wrong with the folder."""
        try:
            command.check(folder, done=done)
        except Exception:
            self.wrong.append(f"{where}: {traceback.format_exc()}")


def child(command: Scenario, folder: Path, at: int, fault: str, log: Path) -> int:
    """Run a scenario in a child of its own with the fault at step `at`; return how it ended, as `os.waitstatus_to_exitcode`."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(file, 2)
    strike, events = FAULTS[fault]
    points, code = Points(folder, at, strike, events), 0
    try:
        points.arm()
        command.run(folder, points.step)
    except EdgePruneError as error:
        os.write(2, f"Error: {error}\n".encode())
        code = error.exit_code
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        code = _UNHANDLED
    os._exit(code if code or not points.struck else _UNMOVED)


def attempt(command: Scenario, folder: Path, at: int, fault: str, tally: Tally) -> bool:
    """Try one fault; return False when the scenario came to its end without it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command.prepare(folder)
    log = folder.with_name("log")
    code, said = child(command, folder, at, fault, log), log.read_text()
    if code == 0:
        return False
    tally.faults += 1
    where = f"{fault} at step {at}"
    if code != (-signal.SIGKILL if fault == "kill" else 1) or (code == 1 and said.count("\n") != 1):
        tally.wrong.append(f"{where}: ended with {code}: {said}")
    tally.judge(where, command, folder)
    if fault == "full":
        tally.wrong += [f"{where}: left {leftovers(folder)}"] if leftovers(folder) else []
    where += ", after the second run"
    code = child(command, folder, _MOST, fault, log)
    if code != 0:
        tally.wrong.append(f"{where}: ended with {code}: {log.read_text()}")
    tally.judge(where, command, folder, done=True)
    left = leftovers(folder, ".partial")  # from which a calibration goes on: it stays after a fault, and goes with the run after it
    tally.wrong += [f"{where}: left {left}"] if left else []
    return True


def leftovers(folder: Path, *suffixes: str) -> list[str]:
    """Return the temporary files and folders that are still there."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if path.suffix in (".tmp", ".old", *suffixes))


def tries(fault: str, name: str, work: Path, model: Path, bundle: Path) -> Tally:
    """Try a fault at every step of a scenario, one after the other."""
    command, tally, at = scenario(name, model, bundle), Tally(), 0
    while at < _MOST and not tally.wrong[5:] and attempt(command, work, at, fault, tally):
        at += 1
    return tally


def main(folder: str, model: str, bundle: str, *names: str) -> None:
    """Try every fault at every step of the scenarios that are named."""
    work = Path(folder).resolve() / "work"
    for name in names:
        for fault in FAULTS:
            print(json.dumps({name: {fault: asdict(tries(fault, name, work, Path(model), Path(bundle)))}}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
