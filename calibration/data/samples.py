"""Samples in JSON Lines format (image, prompt, answer and optional kind), and the scoring of answers.

`image` is a path relative to the file, or a list of paths: several images, or the frames of a video. `answer` is a text or a
number, or a list of those, each of which is accepted. `options`: those of a multiple choice, whose letters begin with A. A byte
order mark is allowed. Published files of other forms: `edgeprune.calibration.data.formats`.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.bundle.integrity import sha256_of
from edgeprune.errors import EdgePruneError, UsageError
from edgeprune.io.files import is_file, is_folder
from edgeprune.io.typed_json import is_text
from edgeprune.tabletop.questions import DESCRIBE, parse_description

MIN_IMAGES = 20  # that it takes to learn which tokens matter
_EXAMPLE = 'A line is {"image": "a.png", "prompt": "What is it?", "answer": "a cup", "kind": "object"}.'


class StoredImage(BytesIO):
    """An image inside a file that holds many: a binary file object whose bytes are loaded whenever they are read."""

    def __init__(self, name: str, load: Callable[[], bytes]) -> None:
        super().__init__()
        self.name = self._shown = name
        self._load = load

    def __repr__(self) -> str:
        return self._shown

    def read(self, size: int | None = -1, /) -> bytes:
        """Return all bytes of the image."""
        return self._load()


SampleImage = Path | StoredImage


@dataclass(frozen=True)
class Sample:
    """One prompt about one or more images, with the reference answer.

    `accepted`: other answers that are right too. `options`: those of a multiple choice. `where`: file and line, for messages.
    """

    image: SampleImage | tuple[SampleImage, ...]
    prompt: str
    answer: str
    kind: str = ""
    accepted: tuple[str, ...] = ()
    where: str = field(default="", compare=False)
    options: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[SampleImage, ...]:
        """The images in order."""
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers that are right."""
        return (self.answer, *self.accepted)

    @property
    def image_names(self) -> list[str]:
        """The names of the images, by which samples are known again: a moved folder is the same data, and nothing is read."""
        return [getattr(image, "name", "") for image in self.images]

    def error(self, error: EdgePruneError) -> BadSampleError:
        """Return the error of this sample for what went wrong with it."""
        return BadSampleError(f"{self.where or self.images[0]}: {error.message}", hint=error.hint)


@dataclass(frozen=True)
class WeightSamples:
    """Samples that weights are fitted to, and the `sha256` of their file. `fit`: how an image of another aspect is brought in."""

    samples: tuple[Sample, ...]
    sha256: str
    fit: str = "exact"

    @classmethod
    def read(cls, path: Path, fit: str) -> WeightSamples:
        """Read a file as `read_samples` does; its samples need no answers."""
        return cls(tuple(read_samples(path, need_answers=False)), sha256_of(path), fit)


class BadSampleError(UsageError):
    """A sample that cannot be used; the message begins with its file and line."""


OnBadSample = Callable[[BadSampleError], None]


@dataclass(frozen=True)
class Score:
    """Points of one answer, or added up over several: one point for a short answer, one per fact for a description.

    `correct`: those that are both `stated` in the answer and `true`. A short answer states one thing, and one is true of it.
    """

    correct: float = 0.0
    stated: float = 0.0
    true: float = 0.0

    def __add__(self, other: Score) -> Score:
        return Score(self.correct + other.correct, self.stated + other.stated, self.true + other.true)

    @property
    def precision(self) -> float:
        """The share of stated facts that are true. An answer that says little may reach 1."""
        return self.correct / self.stated if self.stated else 0.0

    @property
    def recall(self) -> float:
        """The share of true facts that are stated."""
        return self.correct / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall; for short answers the share of right ones."""
        either = self.stated + self.true
        return 2 * self.correct / either if either else 0.0


def read_samples(
    path: Path, limit: int | None = None, *, need_answers: bool = True, on_bad: OnBadSample | None = None
) -> list[Sample]:
    """Return the samples of a JSONL file; image paths are relative to the file.

    Without `need_answers`, answers are optional: calibration compares with the unpruned model instead. Raises BadSampleError for
    the first line that is no sample or names an image that is not there; with `on_bad`, such lines are given to it and left out.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"The limit must be 1 or more samples, not {limit}.")
    samples: list[Sample] = []
    for number, line in _lines(path):
        if len(samples) == limit:
            break
        try:
            samples.append(_parse_sample(path, number, line, need_answers))
        except BadSampleError as error:
            if on_bad is None:
                raise
            on_bad(error)
    if not samples:
        raise UsageError(f"{path} has no samples.", hint=_EXAMPLE)
    return samples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Numbered lines that are not blank. They are not decoded as a whole: one bad line must not hide the others.
    if is_folder(path):
        found = sorted(path.glob("*.jsonl"))
        hint = f"Give the file in it: --data {shlex.quote(str(found[0]))}" if found else f"Give a file of JSON lines. {_EXAMPLE}"
        raise UsageError(f"{path} is a folder.", hint=hint)
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"Cannot read samples {path}: {reason}.", hint="Check the path.") from error
    for number, line in enumerate(content.split(b"\n"), start=1):  # not splitlines: texts may hold other separators of lines
        if line.strip():
            yield number, line


def check_images(images: int, what: str) -> None:
    """Raise UsageError unless there are enough different images to learn from; `what` begins the message."""
    if images < MIN_IMAGES:
        raise UsageError(
            f"{what} {images} different image{'' if images == 1 else 's'}; to learn which tokens matter takes {MIN_IMAGES}.",
            hint="Give more images, or take a method that learns nothing: --method zspaprune",
        )


def draw_samples(samples: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """Return `limit` samples drawn at random by `seed`, in file order; all samples without a limit."""
    if limit is None or limit >= len(samples):
        return list(samples)
    drawn = np.random.default_rng(seed).choice(len(samples), limit, replace=False)
    return [samples[index] for index in sorted(drawn)]


def split(samples: Sequence[Sample], most: int) -> tuple[list[Sample], list[Sample]]:
    """Return samples to learn from and others that judge, of other images, so that nothing is judged by what it is taken from.

    The images that judge are every second one, or fewer at equal distances if theirs would be more than about `most` samples. If
    all samples are about the same images, single samples are taken like images.
    """
    every, alone = max(2, math.ceil(len(samples) / most)), len({sample.images for sample in samples}) < 2
    keys: list[Any] = [number if alone else sample.images for number, sample in enumerate(samples)]
    judging = set(list(dict.fromkeys(keys))[every - 1 :: every])
    keyed = list(zip(keys, samples, strict=True))
    return [sample for key, sample in keyed if key not in judging], [sample for key, sample in keyed if key in judging]


def digest(*content: Any) -> str:
    """Return a name of 12 letters and digits for JSON data, by which files of the same work are known again."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def asked_digest(samples: Sequence[Sample]) -> str:
    """Return a `digest` of what is asked: the bytes of the images and the prompts, in order.

    A moved folder is the same data, and an image that was changed in place is another.
    """
    return digest([[*map(_sha256_of_image, sample.images), sample.prompt] for sample in samples])


def _sha256_of_image(image: SampleImage) -> str:
    if isinstance(image, StoredImage):
        return hashlib.sha256(image.read()).hexdigest()
    try:
        status = image.stat()
        return _sha256_of_file(image, status.st_size, status.st_mtime_ns)
    except OSError:  # a bad sample: told when it is asked
        return ""


@functools.cache
def _sha256_of_file(path: Path, size: int, changed: int) -> str:
    return sha256_of(path)


def score(sample: Sample, text: str) -> Score:
    """Score an answer: descriptions fact by fact, all others by exact match with an accepted answer.

    Case, spaces and final punctuation are ignored.
    """
    if sample.kind == DESCRIBE:
        return score_facts(sample, text)
    match = float(normalize(text) in map(normalize, sample.answers))
    return Score(match, 1.0, 1.0)


def score_facts(sample: Sample, text: str) -> Score:
    """Score a description fact by fact."""
    stated, true = parse_description(text), parse_description(sample.answer)
    return Score(len(stated & true), len(stated), len(true))


def _parse_sample(path: Path, number: int, line: bytes, need_answers: bool) -> Sample:
    where = f"{path}:{number}"
    try:
        data: Any = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise BadSampleError(f"{where} is not UTF-8 (byte {error.start + 1}).", hint="Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"{where} is not JSON ({getattr(error, 'msg', None) or error}).", hint=_EXAMPLE) from error
    if not isinstance(data, dict):
        raise BadSampleError(f"{where} is not a JSON object.", hint=_EXAMPLE)
    prompt, kind = _text(where, "prompt", data.get("prompt")), _text(where, "kind", data.get("kind", ""))
    if not prompt.strip():
        raise BadSampleError(f"{where} has an empty 'prompt'.", hint="Ask something about the image.")
    answers = _answers(where, data.get("answer")) if need_answers or "answer" in data else ("",)
    options = tuple(_text(where, "options", each) for each in data.get("options") or ())
    return Sample(_images(path, where, data.get("image")), prompt, answers[0], kind, answers[1:], where, options)


def _answers(where: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) and value else [value]
    numbers = [isinstance(each, (int, float)) and not isinstance(each, bool) for each in values]
    return tuple(
        json.dumps(each) if is_number else _text(where, "answer", each) for each, is_number in zip(values, numbers, strict=True)
    )


def _text(where: str, key: str, value: Any) -> str:
    if isinstance(value, str) and not is_text(value):  # JSON can escape what no encoding can write
        raise BadSampleError(f"{where} has half of a surrogate pair in {key!r}, which is no character.", hint="Write it as UTF-8.")
    if not isinstance(value, str):
        raise BadSampleError(f"{where} has no text {key!r}.", hint=_EXAMPLE)
    return value


def _images(path: Path, where: str, value: Any) -> Path | tuple[Path, ...]:
    names = [_text(where, "image", name) for name in (value if isinstance(value, list) and value else [value])]
    for name in names:
        if "://" in name:
            hint = "Nothing is downloaded: fetch it, then name the file."
            raise BadSampleError(f"{where} names the address {name}.", hint=hint)
        if not is_file(path.parent / name):
            hint = f"Paths are relative to {path.parent}."
            raise BadSampleError(f"{where} names the image {name}, which is not there.", hint=hint)
    images = tuple(path.parent / name for name in names)
    return images if isinstance(value, list) else images[0]


def normalize(text: str) -> str:
    """Return a short answer as it is compared: in lower case, with single spaces, and without final punctuation."""
    return " ".join(text.lower().split()).rstrip(".!")
