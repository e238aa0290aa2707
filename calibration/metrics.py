"""Metrics of an evaluation: what an answer scores, and the measures that follow from the sum of all scores.

| name | measure | as in |
|---|---|---|
| exact | share of answers that equal an accepted one; case, spaces and final punctuation are ignored | |
| vqa | VQA accuracy over the answers of ten people | GT-Vision-Lab/VQA, as lmms-eval's vqav2 applies it |
| anls | 1 - normalized edit distance to the nearest accepted answer, 0 below 0.5 | the DocVQA challenge |
| choice | share of right letters | MMMU, ScienceQA |
| yes-no | accuracy; precision, recall and F1 of "yes"; share of "yes" | RUCAIBox/POPE, evaluate.py |
| facts | F1, precision and recall of facts: what stands between commas and full stops, as in TableTop's descriptions | |
| cider | CIDEr-D (`edgeprune.calibration.cider`) | pycocoevalcap |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edgeprune.calibration.cider import CiderD
from edgeprune.calibration.data.samples import BadSampleError, OnBadSample, Sample, Score, normalize, score, score_facts
from edgeprune.errors import UsageError
from edgeprune.tabletop.questions import DESCRIBE, parse_description

YES, NO = "yes", "no"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FEWEST_PEOPLE = 4  # with fewer no answer reaches 100 %
_NEAREST = 0.5  # ANLS

# VQA's normalization, in the words of its page: digits for number words, no articles, apostrophes where contractions lack them.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_COUNTED)}}
_ARTICLES = ("a", "an", "the")
_CONTRACTED = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't shan't
    shouldn't wasn't weren't won't wouldn't couldn't've hadn't've mightn't've shouldn't've wouldn't've not've could've
    might've must've should've would've he'd he'd've he's it'd it'd've it'll she'd've they'd they'd've they'll they're
    they've we'd've we've you'd you'd've you'll you're you've that's there'd there'd've there're there's y'all y'all'll
    y'all'd've how'd how'll how's what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll ma'am o'clock 'twas 'ow's'at
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED.split() for place, sign in enumerate(word) if sign == "'"
}

Measures = Mapping[str, Callable[[Score, int], float]]


@dataclass(frozen=True)
class Metric:
    """A metric. `score`: the points of an answer to a sample. `misfit`: why a sample cannot be scored, None if it can.

    `measures`: functions of the sum of the points and of the number of answers, by name; the first is the metric itself. `percent`:
    whether they are shares.
    """

    name: str
    score: Callable[[Sample, str], Score]
    misfit: Callable[[Sample], str | None] = lambda sample: None
    measures: Measures = field(default_factory=lambda: {"accuracy": _share})
    percent: bool = True

    def value(self, points: Score, answers: int) -> float:
        """Return the metric itself."""
        return next(iter(self.measures.values()))(points, answers)

    def measures_of(self, kind: str) -> Measures:
        """Return the measures of one kind of prompt; without a named metric, those of facts for descriptions."""
        return _FACTS if self.name == DEFAULT and kind == DESCRIBE else self.measures


def metric_names() -> tuple[str, ...]:
    """Return the names of all metrics."""
    return (*_METRICS, "cider")


def metric_for(name: str | None, samples: Sequence[Sample], on_bad: OnBadSample | None = None) -> tuple[Metric, list[Sample]]:
    """Return the metric for samples, and the samples that it can score. None: exact, and facts for descriptions.

    Raises UsageError for samples of which none can be scored, and BadSampleError for the first that cannot; with `on_bad`, such
    samples are given to it and left out.
    """
    if name is not None and name not in metric_names():
        raise UsageError(f"There is no metric {name!r}.", hint=f"Metrics are: {', '.join(metric_names())}.")
    metric = AS_BEFORE if name is None else _METRICS.get(name) or _cider(samples)
    usable = []
    for sample in samples:
        reason = metric.misfit(sample)
        if reason is None:
            usable.append(sample)
            continue
        error = sample.error(BadSampleError(f"--metric {name} does not fit: {reason}.", hint=_remedy(sample)))
        if on_bad is None:
            raise error
        on_bad(error)
    if not usable:
        raise UsageError(f"--metric {name} fits none of the samples.", hint="Choose another metric, or leave --metric out.")
    return metric, usable


def _remedy(sample: Sample) -> str:
    if sample.options:
        return "Use --metric choice."
    return "Use --metric exact, or give --skip-bad to leave such samples out."


def _share(points: Score, answers: int) -> float:
    return points.correct / answers if answers else 0.0


def _point(value: float) -> Score:
    return Score(value, 1.0, 1.0)


# VQA accuracy


def vqa_normal(text: str) -> str:
    """Return an answer as VQA's evaluation compares it."""
    text = re.sub(r"[\n\t]", " ", text).strip()
    found, in_number = text, re.search(r"\d,\d", text) is not None
    for mark in _MARKS:
        at_an_edge = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if at_an_edge or in_number else " ")
    found = re.sub(r"\.(?!\d)", "", found)
    words = (_NUMBERS.get(word, word) for word in found.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """Return VQA accuracy: min(people who gave the answer / 3, 1), averaged over the sets of all people but one."""
    said = vqa_normal(text)
    agree = [vqa_normal(answer) == said for answer in answers]
    return sum(min((sum(agree) - one) / 3, 1.0) for one in agree) / len(agree)


def _too_few_people(sample: Sample) -> str | None:
    people = len(sample.answers)
    return None if people >= _FEWEST_PEOPLE else f"VQA accuracy compares the answers of ten people, and there are {people}"


# ANLS


def anls(text: str, answers: Sequence[str]) -> float:
    """Return the normalized Levenshtein similarity to the nearest of the answers, and 0 for one below 0.5.

    Case and runs of spaces are ignored, except in the length that the distance is divided by, as in the challenge's script.
    """
    nearest = max(_similarity(text, answer) for answer in answers)
    return nearest if nearest >= _NEAREST else 0.0


def _similarity(text: str, answer: str) -> float:
    longest = max(len(text), len(answer))
    return 1 - _edits(*(" ".join(each.lower().split()) for each in (text, answer))) / longest if longest else 1.0


def _edits(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for number, sign in enumerate(first, start=1):
        before, row[0] = row[0], number
        for place, other in enumerate(second, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (sign != other))
    return row[-1]


# Multiple choice


def parse_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """Return the letter that an answer chooses, None if it chooses none.

    In this order: the letter alone, in any case; the text of an option alone; "A." or "A)" or "A:" or "(A)" at the beginning; the
    last letter after "answer", "option" or "choice"; the last of "(A)"; the last letter that stands alone ("A" or "I" before a word
    of small letters does not); the one option whose text occurs.
    """
    letters = _LETTERS[: len(options) or None]
    group, said = f"[{letters}]", text.strip()
    if alone := re.fullmatch(rf"\W*({group})\W*", said, re.IGNORECASE):
        return alone[1].upper()
    same = [letter for letter, option in zip(letters, options, strict=False) if normalize(option) == normalize(said)]
    if len(same) == 1:
        return same[0]
    patterns = (
        rf"^[*_\s]*(?:\(({group})\)|({group})[*_]*[.):,])",
        rf"\b(?i:answer|option|choice)\b(?i:\s+is|\s*:|\s+would\s+be|\s+must\s+be)*[\s(*_\"']*({group})(?![\w'])(?!\s[a-z])",
        rf"\(({group})\)",
        rf"(?<![\w'])(?!(?:A|I)\s+[a-z])({group})(?![\w'])",
    )
    for number, pattern in enumerate(patterns):
        found = ["".join(each.groups(default="")) for each in re.finditer(pattern, said)]
        if found:
            return found[0 if number == 0 else -1]
    spaced = f" {_words(said)} "
    named = [letter for letter, option in zip(letters, options, strict=False) if f" {_words(option)} " in spaced]
    return named[0] if len(named) == 1 else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[\w'.%-]*\w[\w'%]*", text.lower()))


def right_letter(sample: Sample) -> str | None:
    """Return the letter of the right option: the sample's answer if that is one, else the letter of the option that it equals."""
    letters = _LETTERS[: len(sample.options) or None]
    if len(sample.answer) == 1 and sample.answer in letters:
        return sample.answer
    same = [letter for letter, option in zip(letters, sample.options, strict=False) if option == sample.answer]
    return same[0] if len(same) == 1 else None


def _score_choice(sample: Sample, text: str) -> Score:
    return _point(float(parse_choice(text, sample.options) == right_letter(sample)))


def _no_letter(sample: Sample) -> str | None:
    if right_letter(sample) is not None:
        return None
    allowed = "one of the 'options' or its letter" if sample.options else "a letter, and there are no 'options'"
    return f"the answer {sample.answer!r} is not {allowed}"


# Yes or no


def says_yes(text: str) -> bool:
    """Return whether an answer counts as "yes", as POPE reads it: any whose first sentence has no word "No", "no" or "not"."""
    return not {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split())


def _score_yes(sample: Sample, text: str) -> Score:
    said, true = says_yes(text), normalize(sample.answer) == YES
    return Score(float(said and true), float(said), float(true))


def _neither(sample: Sample) -> str | None:
    return None if normalize(sample.answer) in (YES, NO) else f"the answer {sample.answer!r} is neither yes nor no"


def _yes_accuracy(points: Score, answers: int) -> float:
    return (answers - points.stated - points.true + 2 * points.correct) / answers if answers else 0.0


_YES_NO: Measures = {
    "accuracy": _yes_accuracy,
    "precision": lambda points, answers: points.precision,
    "recall": lambda points, answers: points.recall,
    "f1": lambda points, answers: points.f1,
    "yes_ratio": lambda points, answers: points.stated / answers if answers else 0.0,
}

# Facts, and captions


def _no_facts(sample: Sample) -> str | None:
    return None if parse_description(sample.answer) else "the answer states no facts"


def _cider(samples: Sequence[Sample]) -> Metric:
    if len(samples) < 2:
        raise UsageError("CIDEr-D weighs words by the images that have them: one sample is too few.", hint="Give two or more.")
    scorer = CiderD(sample.answers for sample in samples)
    return Metric(
        "cider", lambda sample, text: _point(scorer.score(text, sample.answers)), measures={"cider": _share}, percent=False
    )


_FACTS: Measures = {
    "f1": lambda points, answers: points.f1,
    "precision": lambda points, answers: points.precision,
    "recall": lambda points, answers: points.recall,
}
DEFAULT = "exact, and facts for descriptions"
AS_BEFORE = Metric(DEFAULT, score, measures={"accuracy": lambda points, answers: points.f1})
_METRICS = {
    "exact": Metric("exact", lambda sample, text: _point(float(normalize(text) in map(normalize, sample.answers)))),
    "vqa": Metric("vqa", lambda sample, text: _point(vqa_accuracy(text, sample.answers)), _too_few_people),
    "anls": Metric("anls", lambda sample, text: _point(anls(text, sample.answers)), measures={"anls": _share}),
    "choice": Metric("choice", _score_choice, _no_letter),
    "yes-no": Metric("yes-no", _score_yes, _neither, _YES_NO),
    "facts": Metric("facts", score_facts, _no_facts, _FACTS),
}
