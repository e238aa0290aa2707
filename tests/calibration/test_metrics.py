"""Every metric against values of the public scorer, which was run on the strings written here. None of its code is here.

VQA: EvolvingLMMs-Lab/lmms-eval 75571cf, tasks/vqav2/utils.py. ANLS: the same, api/metrics.py. Multiple choice: MMMU-Benchmark/MMMU
bb0b95a, mmmu/utils/eval_utils.py. Yes or no: RUCAIBox/POPE 3df3ba1, evaluate.py. Captions: salaniz/pycocoevalcap ad63453, with its
PTBTokenizer (Stanford CoreNLP 3.4.1).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.calibration.cider import CiderD, words
from edgeprune.calibration.data.samples import BadSampleError, Sample, Score
from edgeprune.calibration.evaluation import EVERY, UNPRUNED, EvalReport
from edgeprune.calibration.metrics import anls, metric_for, metric_names, parse_choice, vqa_accuracy, vqa_normal
from edgeprune.calibration.predictions import Prediction
from edgeprune.cli.options import METRICS
from edgeprune.cli.output.evaluate import show_evaluation
from edgeprune.errors import UsageError

NORMAL = {
    "The two dogs.": "2 dogs",
    "t-shirt": "t shirt",
    "1,000 dollars": "1000 dollars",
    "3.50 $": "3.50 $",
    "dont know": "don't know",
    "ten o'clock": "10 o'clock",
    "left/right": "left right",
    "it's red, white": "it's red white",
    "its": "its",
    "shes": "shes",
    "yall'd've": "y'all'd've",
    "well-lit (room)": "well lit room",
    "u.s.a.": "usa",
    "10.": "10",
    "none": "0",
    "A\tB\nC": "b c",
    "the": "",
}


@pytest.mark.parametrize("text", NORMAL)
def test_vqa_compares_normal_forms(text: str) -> None:
    assert vqa_normal(text) == NORMAL[text]


@pytest.mark.parametrize(
    ("text", "expected"), [("Dakota.", 1.0), ("a dakota", 1.0), ("clos culombu", 0.6), ("2", 0.3), ("cola", 0.0)]
)
def test_vqa_accuracy_leaves_each_person_out(text: str, expected: float) -> None:
    people = ["dakota"] * 4 + ["Clos culombu"] * 2 + ["two", "dakota digital", "mitsubishi", "Dakota"]
    assert vqa_accuracy(text, people) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("itc  limited", ["ITC Limited"], 1.0),
        ("$1,250.00", ["$1,250.0"], 8 / 9),
        ("12 March 1998", ["March 12, 1998", "1998"], 0.5),
        ("abcd", ["abxy"], 0.5),
        ("abcd", ["xyzd"], 0.0),
        ("", ["a"], 0.0),
        ("  a   b ", ["a b"], 1.0),
    ],
)
def test_anls(text: str, answers: list[str], expected: float) -> None:
    assert anls(text, answers) == pytest.approx(expected)


OPTIONS = ("a cat", "a dog", "an owl", "two dogs")
CHOSEN = {
    "B": "B",
    "B.": "B",
    "(B)": "B",
    "The answer is B": "B",
    "The answer is (C).": "C",
    "I think it is (A) or (B)": "B",
    "It must be D because there are two": "D",
    "Looking at the picture closely, I see an owl": "C",
}
# The public script draws a letter at random, or takes the article for one. "B. a dog" is lmms-eval's scienceqa, which has B.
OTHERWISE = {
    "b": "B",
    "B. a dog": "B",
    "B) a dog": "B",
    "A dog": "B",
    "an owl.": "C",
    "A man holds a dog": "B",
    "**Answer: C**": "C",
    "a bird": None,
    "": None,
}


@pytest.mark.parametrize("text", [*CHOSEN, *OTHERWISE])
def test_the_letter_that_is_chosen(text: str) -> None:
    assert parse_choice(text, OPTIONS) == {**CHOSEN, **OTHERWISE}[text]


def total(name: str, samples: list[Sample], texts: list[str]) -> dict[str, float]:
    metric, usable = metric_for(name, samples)
    points = sum((metric.score(sample, text) for sample, text in zip(usable, texts, strict=True)), Score())
    return {measure: function(points, len(usable)) for measure, function in metric.measures.items()}


def answered(*answers: str, options: tuple[str, ...] = ()) -> list[Sample]:
    return [Sample(Path("a.png"), "?", answer, options=options) for answer in answers]


def test_choices_are_by_letter_or_by_text() -> None:
    samples = [*answered("B", "a cat", options=OPTIONS), *answered("C")]
    assert total("choice", samples, ["(B)", "A cat.", "D"])["accuracy"] == pytest.approx(2 / 3)


def test_yes_or_no() -> None:
    said = ["Yes, there is a dog.", "No", "no, not here", "There is no dog. Yes.", "There is a dog in the image"]
    said += ["I do not see one", "NO", "Yes"]
    found = total("yes-no", answered("yes", "no", "yes", "no", "no", "no", "no", "yes"), said)
    expected = {"accuracy": 0.625, "precision": 0.5, "recall": 2 / 3, "f1": 4 / 7, "yes_ratio": 0.5}
    assert found == pytest.approx(expected)


CAPTIONS = [
    "A man's dog sits on the red couch.|A dog is sitting on a couch, looking at the camera.|The dog can't get off the sofa (red).",
    "Two cats lying on a bed - asleep.|A pair of cats sleep on the bed.",
    "A plate of food with rice and beans.|Rice & beans on a white plate.|A white plate topped with rice, beans and meat.",
    "A bus drives down the street.|A red double-decker bus at 3:30 p.m.",
]
REFERENCES = [captions.split("|") for captions in CAPTIONS]
SAID = ["A dog is sitting on a red couch.", "Two cats cats cats on a bed", "a plate topped with rice", "man"]


def test_cider_d() -> None:
    scorer = CiderD(REFERENCES)
    found = [scorer.score(text, references) for text, references in zip(SAID, REFERENCES, strict=True)]
    assert found == pytest.approx([2.39223075010758, 1.5521987722797022, 2.379809871416016, 0.0])
    samples = [Sample(Path(), "?", first, "", tuple(others)) for first, *others in REFERENCES]
    assert total("cider", samples, SAID) == {"cider": pytest.approx(1.5810598484508245)}


WORDS = {
    "A man's dog can't sit on the t-shirt, and it's 3:30 p.m.!": "a man 's dog ca n't sit on the t-shirt and it 's 3:30 p.m.",
    "Two cats (black & white) - lying on a couch...": "two cats -lrb- black & white -rrb- lying on a couch",
    'A red/blue "STOP" sign; isn\'t it?': "a red/blue stop sign is n't it",
    "I'm gonna eat a $5.50 hot-dog at McDonald's.": "i 'm gon na eat a $ 5.50 hot-dog at mcdonald 's",
    "A 1,000 ft. tall tower in the U.S. city": "a 1,000 ft. tall tower in the u.s. city",
    "cannot gimme 'hello' they've we're": "can not gim me hello they 've we 're",
    "It's 5 o'clock in the 1990's": "it 's 5 o'clock in the 1990 's",
    "kids playing w/ frisbee": "kids playing w / frisbee",
}


@pytest.mark.parametrize("text", WORDS)
def test_captions_have_the_words_of_stanfords_tokenizer(text: str) -> None:
    assert " ".join(words(text)) == WORDS[text]


def test_every_metric_is_offered() -> None:
    assert metric_names() == METRICS
    with pytest.raises(UsageError, match="no metric 'bleu'"):
        metric_for("bleu", answered("a"))


@pytest.mark.parametrize(
    ("name", "sample", "words"),
    [
        ("vqa", answered("red")[0], "answers of ten people, and there are 1"),
        ("choice", answered("a cow", options=OPTIONS)[0], "not one of the 'options' or its letter"),
        ("choice", answered("red")[0], "not a letter, and there are no 'options'"),
        ("yes-no", answered("maybe")[0], "neither yes nor no"),
        ("facts", answered(" . ")[0], "states no facts"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(name: str, sample: Sample, words: str) -> None:
    with pytest.raises(BadSampleError, match=words) as error:
        metric_for(name, [sample])
    assert error.value.hint
    skipped: list[BadSampleError] = []
    with pytest.raises(UsageError, match="fits none"):
        metric_for(name, [sample], skipped.append)
    assert len(skipped) == 1


def test_cider_needs_other_images() -> None:
    with pytest.raises(UsageError, match="one sample is too few"):
        metric_for("cider", answered("a cat"))


def said(text: str) -> Prediction:
    return Prediction(text, 1.0, (), 8, 1.0, 1.0)


def test_a_report_has_every_measure(capsys: pytest.CaptureFixture[str]) -> None:
    samples = answered("yes", "no")
    metric, _ = metric_for("yes-no", samples)
    report = EvalReport(pruned=False, metric=metric)
    for sample in samples:
        report.add(sample, {UNPRUNED: said("yes")})
    row = report.to_dict()["kinds"][EVERY]
    assert (row[UNPRUNED], row["precision"], row["yes_ratio"]) == (0.5, {UNPRUNED: 0.5}, {UNPRUNED: 1.0})
    show_evaluation(report, [], as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert "metric: yes-no" in lines and ["answers", '"yes"', "100.0%"] in [line.split()[-3:] for line in lines]


def test_cider_is_no_share(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [Sample(Path(), "?", first, "", tuple(others)) for first, *others in REFERENCES]
    metric, _ = metric_for("cider", samples)
    report = EvalReport(pruned=False, metric=metric)
    for sample, text in zip(samples, SAID, strict=True):
        report.add(sample, {UNPRUNED: said(text)})
    show_evaluation(report, [], as_json=False)
    assert ["all", "4", "1.581"] in [line.split() for line in capsys.readouterr().out.splitlines()]
