"""Ask each question alone, and then several at once, whose decode steps share passes; compare the answers.

python examples/serving/companions.py table.bundle --data scenes/dataset.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from edgeprune.calibration.data.samples import read_samples
from edgeprune.runtime import Runtime, load

DESCRIBE = "Describe the scene."
Asked = tuple[str, str]  # an image and a prompt


def alone(model: Runtime, asked: Sequence[Asked]) -> list[str]:
    """Return the answers to questions that are asked one after the other."""
    return [model.generate(image, prompt, max_tokens=64).text for image, prompt in asked]


def at_once(model: Runtime, asked: Sequence[Asked], parallel: int) -> list[str]:
    """Return the answers to questions of which so many are asked at once, with their first tokens at hand before any goes on."""
    answers = list[str]()
    for start in range(0, len(asked), parallel):
        group = asked[start : start + parallel]
        begun = Barrier(len(group))

        def answer(each: Asked, begun: Barrier = begun) -> str:
            stream = model.stream(*each, max_tokens=64)
            next(stream)
            begun.wait()
            list(stream)
            return stream.text

        with ThreadPoolExecutor(parallel) as threads:
            answers += threads.map(answer, group)
    return answers


def main() -> None:
    """Parse the command line, ask and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parallel", type=int, default=4)
    given = parser.parse_args()
    samples = [sample for sample in read_samples(given.data) if sample.prompt != DESCRIBE]
    images = list(dict.fromkeys(str(sample.image) for sample in samples))
    short = [(str(sample.image), sample.prompt) for sample in samples]
    with load(given.bundle, parallel=given.parallel) as model:
        for name, asked in (("questions", short), ("descriptions", [(image, DESCRIBE) for image in images])):
            answers = alone(model, asked), at_once(model, asked, given.parallel)
            same = sum(map(str.__eq__, *answers))
            print(f"{name:12}  {same} of {len(asked)} answered the same", end="")
            if name == "questions":
                right = [sum(map(str.__eq__, found, (sample.answer for sample in samples))) for found in answers]
                print(f"; right {right[0]} alone, {right[1]} at once", end="")
            print()


if __name__ == "__main__":
    main()
