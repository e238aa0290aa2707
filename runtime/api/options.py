"""The keywords of an answer as one type, so that type checkers refuse a misspelt one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from edgeprune.errors import UsageError
from edgeprune.runtime.generation.request import RequestLimits
from edgeprune.runtime.generation.sampling import Sampling


class AnswerOptions(TypedDict, total=False):
    """The keywords of an answer, for type checkers: the fields of RequestLimits and of Sampling, all of them optional."""

    tier: str | None
    deadline_ms: float | None
    max_kv_bytes: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    max_tokens: int
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    stop: Sequence[str]
    choices: Sequence[str] | None
    json_schema: Mapping[str, Any] | None
    skip_special_tokens: bool


def parse_options(options: AnswerOptions) -> tuple[Sampling, RequestLimits]:
    """Return the options by subject. Raises UsageError for an unknown name, and for a value that is out of range."""
    limits, sampling = RequestLimits.__dataclass_fields__, Sampling.__dataclass_fields__
    unknown = [name for name in options if name not in limits and name not in sampling]
    if unknown:
        raise UsageError(f"There is no option {unknown[0]!r}.", hint=f"Options are: {', '.join([*sampling, *limits])}.")
    given: dict[str, Any] = {**options}
    return (
        Sampling(**{name: value for name, value in given.items() if name in sampling}),
        RequestLimits(**{name: value for name, value in given.items() if name in limits}),
    )
