"""Predictions of an evaluation as JSON lines, one a sample, from which an interrupted evaluation goes on.

A line has the number of the sample and what was asked, and by variant (pruned, unpruned) the answer, its points and its costs.
"run" says of which model, metric, settings and sample it is: a line of others is refused, never mixed with new ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.calibration.data.samples import Sample
from edgeprune.errors import UsageError
from edgeprune.io.files import append_line, check_output
from edgeprune.io.typed_json import from_json
from edgeprune.runtime import Answer

_DIGITS = 16  # of a sha256
_ANEW = "Give another file, or remove this one to begin anew."


@dataclass(frozen=True)
class Prediction:
    """One answer and what it cost; times in ms. `visual_kv` and `visual_reads`: shares of all visual KV entries."""

    text: str
    ttft_ms: float
    decode_ms: tuple[float, ...]
    kv_bytes: int
    visual_kv: float
    visual_reads: float
    finish_reason: str = ""

    @classmethod
    def of(cls, answer: Answer) -> Prediction:
        """Return the prediction of a finished answer."""
        receipt = answer.receipt
        shares = (receipt.visual_kv_share, receipt.visual_read_share)
        decode = tuple(round(each, 4) for each in receipt.times.decode_ms)
        return cls(answer.text, round(receipt.times.ttft_ms, 4), decode, receipt.kv_bytes, *shares, receipt.finish_reason)


class Predictions:
    """A file of predictions that grows by a line a sample. `found`: those that it has, by the number of the sample.

    `run`: model, metric and settings, as texts. A last line that was cut short is dropped. Raises UsageError for a file that is
    none of predictions, or of another run or other samples.
    """

    def __init__(self, path: Path, run: Mapping[str, str], samples: Sequence[Sample]) -> None:
        check_output(
            path, force=True, inputs=[image for sample in samples[:1] for image in sample.images if isinstance(image, Path)]
        )
        self._path, self._run = path, dict(run)
        self.found: dict[int, dict[str, Prediction]] = {}
        self._digests = [_digest(sample) for sample in samples]
        content = _read(path)
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            self._take(f"{path}:{number}", line)
        if len(whole) < len(content):
            self._check_cut(content[len(whole) :])
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def _take(self, where: str, line: bytes) -> None:
        try:
            data = json.loads(line)
            number, run = int(data["sample"]), dict(data["run"])
            answers = {variant: from_json(Prediction, _costs(data[variant])) for variant in data["variants"]}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UsageError(f"{where} is no prediction of edgeprune eval.", hint=_ANEW) from error
        expected = {**self._run, "data": self._digests[number] if 0 <= number < len(self._digests) else run.get("data")}
        for name, value in expected.items():
            if run.get(name) != value:
                said = f" ({run.get(name)}, not {value})" if name != "data" else f" (sample {number})"
                raise UsageError(f"{where} is of other {_PLURALS.get(name, name)}{said}.", hint=_ANEW)
        self.found[number] = answers

    def _check_cut(self, rest: bytes) -> None:
        # What is dropped must be the beginning of a prediction, not a line of somebody's own file.
        if not rest.startswith(_BEGINNING[: len(rest)]):
            raise UsageError(f"The last line of {self._path} is no prediction of edgeprune eval.", hint=_ANEW)

    def write(self, number: int, sample: Sample, answers: Mapping[str, Prediction], points: Mapping[str, float]) -> None:
        """Append the line of one sample. `points`: what each answer scores alone."""
        asked = {"prompt": sample.prompt, "images": [str(image) for image in sample.images], "kind": sample.kind}
        variants = {variant: {"points": points[variant], **asdict(answer)} for variant, answer in answers.items()}
        line = {"sample": number, **asked, "answers": list(sample.answers), "variants": list(variants), **variants}
        line["run"] = {**self._run, "data": self._digests[number]}
        append_line(self._path, json.dumps(line, ensure_ascii=False))
        self.found[number] = dict(answers)


_BEGINNING = b'{"sample": '
_PLURALS = {"model": "models", "metric": "metrics"}


def _costs(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "points"}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.", hint="Give a file to write the predictions to.") from error


def _digest(sample: Sample) -> str:
    content = json.dumps([sample.prompt, sample.answers, sample.kind, sample.options, sample.image_names])
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:_DIGITS]
