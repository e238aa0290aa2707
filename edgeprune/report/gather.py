"""Load the inputs of a report, check that they belong together, and collect a bundle's answers with overlay pictures."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.calibration.data.statistics import Statistics
from edgeprune.calibration.search.pareto import Curve
from edgeprune.errors import UsageError, require_extra
from edgeprune.io.files import is_folder
from edgeprune.plan import KeepPlan
from edgeprune.report.text import format_counts
from edgeprune.runtime import Answer, Receipt, Runtime, load
from edgeprune.runtime.media.images import ImageSource, read_image

_MAX_SIDE = 640  # pixels along the longer side of a picture in the page
_ENDED = {"end": "complete", "stop": "ended by a stop text", "length": "cut at its longest length"}


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI (`source`), with title and caption."""

    title: str
    caption: str
    source: str


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with its answer, overlay pictures, and the share kept at each decode step.

    `unpruned`: the answer without pruning, None if nothing was pruned. `facts`: rows of a name, the value with pruning, and the
    value without it, "" where there is none.
    """

    prompt: str
    text: str
    unpruned: str | None
    facts: tuple[tuple[str, str, str], ...]
    pictures: tuple[Picture, ...]
    decode_shares: tuple[float, ...]


@dataclass(frozen=True)
class AnswerSet:
    """One or two questions about one image. `shared`: overlap of the tokens that two questions kept, one line per picture."""

    asked: tuple[AnsweredQuestion, ...]
    shared: tuple[str, ...]


@dataclass(frozen=True)
class ReportOptions:
    """The user's options. `target`: a plan or a bundle."""

    target: Path
    statistics: Path | None = None
    curve: Path | None = None
    image: Path | None = None
    prompts: tuple[str, ...] = ()
    fit: str = "exact"
    max_tokens: int = 128


@dataclass(frozen=True)
class ReportInputs:
    """The loaded inputs of a report; None for those that the user did not give."""

    name: str
    plan: KeepPlan
    bundle: Bundle | None = None
    statistics: Statistics | None = None
    curve: Curve | None = None
    interview: AnswerSet | None = None


def load_inputs(request: ReportOptions) -> ReportInputs:
    """Load all inputs and ask the questions; raise UsageError if inputs are of different models or do not belong together."""
    _check_questions(request)
    bundle = Bundle.load(request.target) if is_folder(request.target) else None
    plan = KeepPlan.load(request.target) if bundle is None else bundle.plan
    statistics = None if request.statistics is None else _open_statistics(request.statistics, plan, bundle)
    curve = None if request.curve is None else _open_curve(request.curve, plan)
    answers = None
    if request.image is not None:
        if bundle is None:
            command = f"edgeprune export MODEL --plan {shlex.quote(str(request.target))} -o BUNDLE"
            raise UsageError(f"--image asks a bundle, and {request.target} is a plan.", hint=f"Export it: {command}")
        runtime = load(bundle.path)
        answers = collect_answers(runtime, request.image, request.prompts, fit=request.fit, max_tokens=request.max_tokens)
    return ReportInputs(request.target.name or str(request.target), plan, bundle, statistics, curve, answers)


def collect_answers(
    runtime: Runtime, image: ImageSource, prompts: Sequence[str], *, fit: str = "exact", max_tokens: int = 128
) -> AnswerSet:
    """Ask a model each prompt about an image, with and without pruning, and collect the answers.

    Nothing is reused, so that each shows what it takes.
    """
    picture = read_image(image)
    for prune in (True, False):  # warm-up: the first run of a session is slower
        runtime.generate(picture, prompts[0], prune=prune, fit=fit, max_tokens=1)

    def ask(prompt: str, prune: bool) -> Answer:
        runtime.forget()
        return runtime.generate(picture, prompt, prune=prune, fit=fit, max_tokens=max_tokens)

    answers, whole = list[Answer](), list[Answer | None]()
    for prompt in prompts:
        answers.append(ask(prompt, True))
        whole.append(ask(prompt, False) if answers[-1].receipt.pruned else None)
    panels = [runtime.panels(picture, answer.receipt, fit=fit) for answer in answers]
    questions = [
        _answered(prompt, answer, unpruned, [Picture(p.title, p.caption, data_uri(p.picture)) for p in drawn])
        for prompt, answer, unpruned, drawn in zip(prompts, answers, whole, panels, strict=True)
    ]
    return AnswerSet(tuple(questions), _shared_lines([answer.receipt for answer in answers]))


def data_uri(picture: Image.Image) -> str:
    """Return a picture as a PNG data URI, with its longer side at most 640 pixels."""
    smaller = picture.copy()
    smaller.thumbnail((_MAX_SIDE, _MAX_SIDE))
    file = io.BytesIO()
    smaller.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _answered(prompt: str, answer: Answer, whole: Answer | None, pictures: Sequence[Picture]) -> AnsweredQuestion:
    receipt, unpruned = answer.receipt, {} if whole is None else dict(_costs(whole.receipt))
    facts = [(name, value, "") for name, value in (*_cut_facts(receipt), *_likeness_facts(receipt))]
    facts += [(name, value, unpruned.get(name, "")) for name, value in _costs(receipt)]
    text = None if whole is None else whole.text
    return AnsweredQuestion(prompt, answer.text, text, tuple(facts), tuple(pictures), tuple(receipt.decode_shares))


def _costs(receipt: Receipt) -> list[tuple[str, str]]:
    times, steps = receipt.times, len(receipt.visual_reads)
    read = f"{receipt.visual_read_share:.0%} of all, over {steps} step{'s' * (steps != 1)}"
    return [
        ("first token after", f"{times.ttft_ms:.1f} ms"),
        ("image preparation", f"{times.preprocess_ms:.1f} ms"),
        ("vision encoder", f"{times.vision_ms:.1f} ms"),
        ("choice of tokens", f"{times.select_ms:.1f} ms"),
        ("prefill", f"{times.prefill_ms:.1f} ms"),
        ("each further token", f"{times.ms_per_token:.1f} ms" if times.decode_ms else "there was none"),
        ("visual KV cache kept", f"{receipt.visual_kv_share:.0%} of all"),
        ("visual KV cache read", read),
        ("KV cache with the text", f"{receipt.kv_bytes / 1024:.0f} KiB"),
        ("prompt", f"{receipt.visual_tokens} visual and {receipt.text_tokens} text tokens"),
        ("answer", f"{receipt.generated_tokens} tokens, {_ENDED.get(receipt.finish_reason, receipt.finish_reason)}"),
    ]


def _cut_facts(receipt: Receipt) -> list[tuple[str, str]]:
    if not receipt.pruned:
        return [("not pruned", receipt.reason)]
    (cuts,) = receipt.cuts_by_image(1)
    facts = [(cut.cut, f"{cut.before} → {cut.after} visual tokens") for cut in cuts.tokens]
    if cuts.caches:
        before, after = format_counts([cut.before for cut in cuts.caches]), format_counts([cut.after for cut in cuts.caches])
        facts.append((f"{len(cuts.caches)} KV caches", f"{before} → {after} visual tokens in every head"))
    return facts


def _likeness_facts(receipt: Receipt) -> list[tuple[str, str]]:
    warning = "unlike those that the choice of tokens was learned from: calibrate with images like it"
    verdict = f"1 is the limit; {warning}" if receipt.images_unlike else "1 is the limit"
    return [("distance from the calibration's images", f"{far:.2f} ({verdict})") for far in receipt.image_distances]


def _shared_lines(receipts: Sequence[Receipt]) -> tuple[str, ...]:
    if len(receipts) != 2 or not all(receipt.pruned for receipt in receipts):
        return ()
    one, other = (receipt.cuts_by_image(1)[0] for receipt in receipts)
    pairs = zip(one.tokens, other.tokens, strict=True)
    lines = [f"{_mean_overlap(a.kept, b.kept):.0f} of {a.after} kept for both questions" for a, b in pairs]
    if one.caches:
        common = [_mean_overlap(a.kept, b.kept) for a, b in zip(one.caches, other.caches, strict=True)]
        kept = np.mean([cut.after for cut in one.caches])
        lines.append(f"{np.mean(common):.1f} of {kept:.1f} kept for both questions, mean over the caches")
    return tuple(lines)


def _mean_overlap(first: np.ndarray, second: np.ndarray) -> float:
    rows = zip(np.atleast_2d(first), np.atleast_2d(second), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) for a, b in rows]))


def _check_questions(request: ReportOptions) -> None:
    example = 'For example: --image table.png --prompt "What is on the table?"'
    if request.image is None and request.prompts:
        raise UsageError("--prompt needs an image to ask about (--image).", hint=example)
    if request.image is not None and not 1 <= len(request.prompts) <= 2:
        raise UsageError(f"--image needs one --prompt, or two to compare, not {len(request.prompts)}.", hint=example)


def _open_statistics(path: Path, plan: KeepPlan, bundle: Bundle | None) -> Statistics:
    require_extra("export", "safetensors")
    statistics = Statistics.load(path)
    source = statistics.source
    _require_equal(path, "family", source.family, plan.family)
    _require_equal(path, "number of layers", source.layers, plan.layers)
    _require_equal(path, "geometry", source.geometry, plan.geometry)
    if bundle is not None:
        _require_equal(path, "number of KV heads", source.kv_heads, bundle.manifest.decoder.kv_heads)
        _require_equal(path, "model (sha256 of its weights)", source.weights_sha256, bundle.manifest.source.weights_sha256)
    if statistics.samples == 0:
        raise UsageError(
            f"{path} holds the statistics of no sample.",
            hint="Collect them: edgeprune calibrate MODEL --data FILE --statistics NEW",
        )
    if not {"attention", "caches"} & set(statistics.parts):
        raise UsageError(
            f"{path} has statistics of {', '.join(statistics.parts)} alone, and there is no chart of them.",
            hint="Collect all: edgeprune calibrate MODEL --data FILE --statistics NEW",
        )
    return statistics


def _open_curve(path: Path, plan: KeepPlan) -> Curve:
    curve = Curve.load(path)
    if not curve.points:
        raise UsageError(f"The curve {path} has no points.")
    if curve.chosen is not None and not 0 <= curve.chosen < len(curve.points):
        raise UsageError(f"The curve {path} has no point {curve.chosen} to be chosen.")
    if curve.axis not in ("flops", "kv", "ttft_ms") or (
        curve.axis == "ttft_ms" and any(point.ttft_ms is None for point in curve.points)
    ):
        raise UsageError(f"The curve {path} does not know its points' cost along {curve.axis!r}.")
    for point in curve.points:
        _require_equal(path, "family", point.plan.family, plan.family)
        _require_equal(path, "number of layers", point.plan.layers, plan.layers)
    # A search also tries smaller images, so one matching geometry is enough.
    if plan.geometry not in {point.plan.geometry for point in curve.points}:
        _require_equal(path, "geometry", curve.points[0].plan.geometry, plan.geometry)
    return curve


def _require_equal(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise UsageError(f"{path} is of another {what} than the plan: {found}, not {expected}.")
