"""`python -m fuzz run` for a nightly run, `python -m fuzz replay TARGET FILE` for one case."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from fuzz.targets import TARGETS


def main() -> int:
    """Do what the command line says; 1 where something was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run many cases under both engines")
    run.add_argument("--cases", type=int, default=1_000_000, help="in all (%(default)s)")
    run.add_argument("--target", action="append", choices=TARGETS, default=[], help="one of them only; again for more")
    run.add_argument("--engine", action="append", choices=("hypothesis", "atheris"), default=[], help="one of them only")
    run.add_argument("--seed", type=int, default=0, help="of the choices (%(default)s)")
    run.add_argument("-o", "--output", type=Path, help="folder of findings, logs and the report; a new one if not given")
    replay = commands.add_parser("replay", help="run one case again, as a finding has it")
    replay.add_argument("target", choices=TARGETS)
    replay.add_argument("file", type=Path)
    work = commands.add_parser("work", help="one process of a run, which starts it")
    for name, kind in (("engine", str), ("target", str), ("cases", int), ("folder", Path), ("seed", int)):
        work.add_argument(name, type=kind)
    asked = parser.parse_args()
    if asked.command == "work":
        from fuzz.working import work as worker

        worker(asked.engine, asked.target, asked.cases, asked.folder, asked.seed)
        return 0
    return _replay(asked.target, asked.file) if asked.command == "replay" else _run(asked)


def _replay(name: str, file: Path) -> int:
    from fuzz.target import attempt

    taken = attempt(TARGETS[name].make(), file.read_bytes())
    print("The input was taken." if taken else "The input was refused.")
    return 0


def _run(asked: argparse.Namespace) -> int:
    from fuzz.nightly import nightly, report

    folder = asked.output or Path(tempfile.mkdtemp(prefix="edgeprune-fuzz-"))
    rows = nightly(asked.cases, folder, asked.target, asked.engine, asked.seed)
    print(report(rows, folder))
    print(f"Findings, logs and the report: {folder}")
    return int(any(row.findings for row in rows))


if __name__ == "__main__":
    sys.exit(main())
