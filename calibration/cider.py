"""CIDEr-D: how well a caption says what people say of an image (Vedantam, Zitnick and Parikh, CVPR 2015, arXiv:1411.5726).

A caption is a vector of its n-grams, each weighted by how often it occurs in the caption, and by how few images have it in a
reference (TF-IDF). The score of a caption is the mean cosine with the vectors of the image's references, over n from 1 to 4, times
ten. CIDEr-D takes n-grams that a caption repeats only as often as the reference has them, and captions of another length than the
reference's lose by a Gaussian (section 7 of the paper).

As in the authors' code, term frequencies are counts, an n-gram of no reference counts as one of a single image, and the length
is that in pairs of words. Published values rest on the words of Stanford's tokenizer, which is a Java program. `words` has its
rules for English captions: it splits contractions and possessives, keeps hyphens, numbers and abbreviations whole, and drops
punctuation.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_LONGEST, _SIGMA = 4, 6.0  # n-grams, and the standard deviation of the Gaussian in words
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TWO_WORDS = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3}  # the letters of the first
_ABBREVIATIONS = "mr|mrs|ms|dr|prof|st|ft|mt|jr|sr|vs|etc|inc|co|corp|ltd|ave|blvd|rd|jan|feb|aug|sept|oct|nov|dec"
_WORD = re.compile(
    rf"""
    (?:[^\W\d_]\.){{2,}}                                    # p.m., u.s.
    | (?:{_ABBREVIATIONS})\.                                # st. mary's
    | no\.(?=\s*\d)                                         # no. 5
    | \d+(?:[.,:/-]\d+)*(?:[^\W\d_]+)?(?:-[^\W_]+)*         # 1,000 and 3:30 and 1/2 and 2nd and 4-way
    | o'clock
    | [^\W_]+(?:[-/.&](?=[^\W_])[^\W_]+)*                   # t-shirt and red/blue
    | '(?:s|m|d|re|ve|ll)\b
    | [()\[\]{{}}&$%\#+=/@*<>~^|\\]
    """,
    re.VERBOSE,
)
_NEGATION = re.compile(r"(?<=[^\W\d_])n't\b")
_APOSTROPHES = str.maketrans({"\N{RIGHT SINGLE QUOTATION MARK}": "'", "\N{LEFT SINGLE QUOTATION MARK}": "'"})

Ngrams = Mapping[tuple[str, ...], float]


class CiderD:
    """CIDEr-D against the references of a set of images, which say how rare an n-gram is.

    `references`: those of each image, two images or more.
    """

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        images = [{ngram for text in texts for ngram in _ngrams(words(text))} for texts in references]
        self._images = len(images)
        self._with = Counter(ngram for image in images for ngram in image)

    def score(self, caption: str, references: Sequence[str]) -> float:
        """Return the score of a caption, from 0 to 10, against the references of its image."""
        return sum(self._similarity(words(caption), words(text)) for text in references) / len(references)

    def _similarity(self, caption: list[str], reference: list[str]) -> float:
        apart = max(len(caption) - 1, 0) - max(len(reference) - 1, 0)
        candidates, truths = self._weights(caption), self._weights(reference)
        total = 0.0
        for length in range(1, _LONGEST + 1):
            candidate, truth = (
                {key: value for key, value in vector.items() if len(key) == length} for vector in (candidates, truths)
            )
            norms = _norm(candidate) * _norm(truth)
            overlap = sum(min(value, truth.get(ngram, 0.0)) * truth.get(ngram, 0.0) for ngram, value in candidate.items())
            total += overlap / norms if norms else 0.0
        return 10 * total / _LONGEST * math.exp(-(apart**2) / (2 * _SIGMA**2))

    def _weights(self, text: list[str]) -> Ngrams:
        counts = _ngrams(text)
        return {ngram: count * math.log(self._images / max(self._with[ngram], 1)) for ngram, count in counts.items()}


def words(text: str) -> list[str]:
    """Return the words of an English caption in lower case, without punctuation."""
    text = _NEGATION.sub(" n't ", text.translate(_APOSTROPHES).lower())
    found = []
    for piece in re.split(r"( n't )", text):
        if piece == " n't ":
            found.append("n't")
            continue
        for word in _WORD.findall(piece):
            first = _TWO_WORDS.get(word, len(word))
            found += [part for part in (_BRACKETS.get(word, word[:first]), word[first:]) if part]
    return found


def _ngrams(text: list[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(text[start : start + length]) for length in range(1, _LONGEST + 1) for start in range(len(text) - length + 1)
    )


def _norm(vector: Ngrams) -> float:
    return math.sqrt(sum(value**2 for value in vector.values()))
