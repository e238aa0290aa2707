"""Ask two providers the same about the same images, and compare their answers and the tokens that they keep.

python examples/providers/compare.py BUNDLE --data scenes/dataset.jsonl --providers cpu cuda
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeprune.calibration.data.samples import read_samples
from edgeprune.runtime import Answer, load


def differing(one: Answer, other: Answer) -> tuple[int, int]:
    """Return how many indices an answer kept in all its cuts, and how many of them the other answer did not keep."""
    kept = lost = 0
    for ours, theirs in zip(one.receipt.cuts, other.receipt.cuts, strict=True):
        # A cut of a cache keeps a set for each head.
        for mine, yours in zip(np.atleast_2d(ours.kept), np.atleast_2d(theirs.kept), strict=True):
            kept, lost = kept + len(mine), lost + len(np.setdiff1d(mine, yours))
    return kept, lost


def report(pairs: Sequence[tuple[Answer, Answer]]) -> str:
    """Return what is equal in pairs of answers, in three lines."""
    counts = [differing(*pair) for pair in pairs]
    total, lost = (sum(column) for column in zip(*counts, strict=True))
    answers = sum(one.text == other.text for one, other in pairs)
    sets = sum(count == 0 for _, count in counts)
    return (
        f"equal answers    {answers} of {len(pairs)}\nequal kept sets  {sets} of {len(pairs)}\ndiffering tokens {lost} of {total}"
    )


def main() -> None:
    """Parse the command line, ask and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--providers", nargs=2, default=("cpu", "cuda"))
    parser.add_argument("--prompt", default="Describe the scene.")
    given = parser.parse_args()
    images = list(dict.fromkeys(sample.image for sample in read_samples(given.data)))
    answers = []
    for provider in given.providers:
        with load(given.bundle, provider=provider) as model:
            answers.append([model.generate(image, given.prompt, max_tokens=40) for image in images])
    print(report(list(zip(*answers, strict=True))))


if __name__ == "__main__":
    main()
