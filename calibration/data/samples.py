"""Samples in JSON Lines format (image, prompt, answer and optional kind), and the scoring of answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import UsageError
from edgeprune.io.typed_json import is_text
from edgeprune.tabletop.questions import DESCRIBE, parse_description


@dataclass(frozen=True)
class Sample:
    """One prompt about one image, with the reference answer."""

    image: Path
    prompt: str
    answer: str
    kind: str = ""


@dataclass(frozen=True)
class Score:
    """`correct` of `total` points: one point for a short answer, one per stated fact for a description.

    `recall`: the share of true facts that were stated; 1 or 0 for a short answer.
    """

    correct: float
    total: float
    recall: float


def read_samples(path: Path, limit: int | None = None, *, need_answers: bool = True) -> list[Sample]:
    """Return the samples of a JSONL file; image paths are relative to the file. Raise UsageError that names the invalid line.

    Without `need_answers`, answers are optional: calibration compares with the unpruned model instead.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also split at other line separators inside texts
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read samples {path}: {error}.") from error
    if limit is not None and limit < 1:
        raise UsageError(f"The limit must be 1 or more samples, not {limit}.")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    samples = [_parse_sample(path, number, line, need_answers) for number, line in numbered[:limit]]
    if not samples:
        raise UsageError(f"{path} has no samples.", hint='A line is {"image": ..., "prompt": ..., "answer": ..., "kind": ...}.')
    return samples


def score(sample: Sample, text: str) -> Score:
    """Score an answer: descriptions fact by fact, all others by exact match, ignoring case, spaces and final punctuation."""
    if sample.kind == DESCRIBE:
        stated, true = parse_description(text), parse_description(sample.answer)
        correct = len(stated & true)
        return Score(correct, max(len(stated), 1), correct / max(len(true), 1))
    match = float(_normalize(text) == _normalize(sample.answer))
    return Score(match, 1.0, match)


def _parse_sample(path: Path, number: int, line: str, need_answers: bool) -> Sample:
    where = f"{path}:{number}"
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({getattr(error, 'msg', None) or error}).") from error
    if not isinstance(data, dict):
        raise UsageError(f"{where} is not a JSON object.")
    if not need_answers:
        data.setdefault("answer", "")
    for key in ("image", "prompt", "answer"):
        if not is_text(data.get(key)):
            raise UsageError(f"{where} has no text {key!r}.")
    image, kind = path.parent / data["image"], data.get("kind", "")
    if not _is_file(image):
        raise UsageError(f"{where} names the image {data['image']}, which is not there.")
    if not is_text(kind):
        raise UsageError(f"{where} has a kind that is no text.")
    return Sample(image, data["prompt"], data["answer"], kind)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # an invalid file name
        return False


def _normalize(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".!")
