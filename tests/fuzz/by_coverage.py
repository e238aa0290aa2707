"""The engine that follows coverage: atheris, libFuzzer for Python, on EdgePrune's own modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

from fuzz.findings import Findings
from fuzz.target import LIMIT_S, Target, attempt

_MEMORY_MIB = 3072
_LONGEST = 1 << 17  # bytes of a case


def made(make: Callable[[], Target]) -> Target:
    """Return a target whose modules tell what of them is run. Nothing of EdgePrune may have been imported before."""
    with atheris.instrument_imports(include=["edgeprune"]):
        target = make()
        for seed in target.seeds:
            attempt(target, seed)  # imports what is imported late
    return target


def hunt(target: Target, findings: Findings, cases: int, first: int, corpus: Path) -> None:
    """Run so many cases, and keep every kind of what breaks; libFuzzer ends the process then."""
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def check(data: bytes) -> None:
        try:
            findings.check(data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            findings.keep(data, error)

    def mutated(data: bytes, most: int, seed: int) -> Any:
        random = Random(seed)
        if random.randrange(3) == 0:
            return atheris.Mutate(data, most)
        return target.near(random.choice(target.seeds) if random.randrange(3) == 0 else data, random)[:most]

    options = [
        f"-runs={cases}",
        f"-seed={first + 1}",
        f"-max_len={_LONGEST}",
        f"-timeout={LIMIT_S:g}",
        f"-rss_limit_mb={_MEMORY_MIB}",
    ]
    options += [f"-artifact_prefix={corpus.parent}/", "-mutate_depth=2", "-print_final_stats=1"]
    atheris.Setup(["fuzz", *options, str(corpus)], check, custom_mutator=mutated)
    atheris.Fuzz()
