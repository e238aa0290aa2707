"""One process of a nightly run: one target under one engine."""

from __future__ import annotations

from pathlib import Path

from fuzz.state import State
from fuzz.targets import TARGETS


def work(engine: str, name: str, cases: int, folder: Path, first: int) -> None:
    """Run cases of a target; counts go to `state` in `folder`, findings to `findings` beside it. `first`: seeds the choices."""
    state, found = State(folder / "state"), folder.parent / "findings"
    if engine == "atheris":
        from fuzz import by_coverage

        target = by_coverage.made(TARGETS[name].make)
    else:
        target = TARGETS[name].make()
    from fuzz.findings import Findings

    findings = Findings(name, target, found, state, alarm=engine != "atheris")
    if engine == "atheris":
        by_coverage.hunt(target, findings, cases, first, folder / "corpus")
    else:
        from fuzz import by_properties

        by_properties.hunt(target, findings, lambda: state.counts[0], cases, first)
