"""The engine that builds nearly valid inputs: hypothesis steers the choices of a target's variants, and shrinks what breaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from fuzz.files import scratch
from fuzz.findings import Findings
from fuzz.mutations import ODD_TEXTS
from fuzz.target import Target

set_hypothesis_home_dir(scratch() / "hypothesis")  # else it writes where the tests are started
_BATCH = 1000  # hypothesis remembers all cases of a run
_SEEDS = st.integers(0, 2**32 - 1).map(Random)
_SETTINGS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.generate, Phase.shrink),
}


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Return the inputs of a target: mostly variants of valid ones, some twice changed, and now and then any JSON or bytes."""
    steered = st.builds(target.near, st.sampled_from(target.seeds), st.randoms(use_true_random=False))
    drawn = st.builds(target.near, st.sampled_from(target.seeds), _SEEDS)  # one draw of hypothesis's instead of dozens, each slow
    return st.one_of(steered, drawn, drawn, drawn, st.builds(target.near, drawn, _SEEDS), _anything())


def _anything() -> st.SearchStrategy[bytes]:
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD_TEXTS)
    nested = st.recursive(
        plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
    )
    return st.binary(max_size=200) | nested.map(lambda value: json.dumps(value).encode())


def run(target: Target, check: Callable[[bytes], None], cases: int, **more: Any) -> None:
    """Run so many cases; raise what the smallest case that breaks raises."""

    @settings(max_examples=cases, **_SETTINGS, **more)
    @given(inputs(target))
    def each(data: bytes) -> None:
        check(data)

    each()


def hunt(target: Target, findings: Findings, done: Callable[[], int], cases: int, first: int) -> None:
    """Run cases until there were so many, and keep every kind of what breaks. `done`: tells how many there were."""
    number = first
    while (left := cases - done()) > 0:
        number += 1
        smallest = b""

        def check(data: bytes) -> None:
            nonlocal smallest
            try:
                findings.check(data)
            except BaseException:
                smallest = data  # the last to break is the one that hypothesis ends with
                raise

        @seed(number)
        @settings(max_examples=min(_BATCH, left), print_blob=False, **_SETTINGS)
        @given(inputs(target))
        def each(data: bytes) -> None:
            check(data)

        try:
            each()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            findings.keep(smallest, error)
