"""Random conversations in several threads with one loaded model, compared with the same conversations one at a time.

    python examples/soak/conversations.py soak.bundle other.bundle --questions 2000 --threads 3 --seed 1

Each bundle has a process of its own, so that a crash or a hang is counted instead of ending the run. Exits with 1 if there is one,
or if an answer differs.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import edgeprune.runtime
from edgeprune.errors import EdgePruneError
from edgeprune.runtime import Chat, Runtime
from edgeprune.runtime.api.options import AnswerOptions

WORDS = ("what", "colour", "is", "the", "cube", "ball", "left", "of", "nearest", "label", "and", "how", "many", "gripper")
PICTURES = 6  # different ones; conversations share them, and so what was computed for them
CACHE_BYTES = 2 << 20  # small, so that entries also make room


@dataclass(frozen=True)
class Load:
    """How much is asked: so many `questions` in conversations of at most so many `turns`, each with at most so many `images`."""

    questions: int
    threads: int = 3
    seed: int = 0
    turns: int = 4
    images: int = 3


@dataclass(frozen=True)
class Question:
    """One turn. `images`: numbers of pictures. `read`: pieces after which the stream is closed, None for all of them."""

    prompt: str
    images: tuple[int, ...]
    options: AnswerOptions
    read: int | None


@dataclass(frozen=True)
class Script:
    """One conversation."""

    prune: bool
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a question: the answer, why it ended and what was stored of the images; or the error that refused it."""

    text: str
    ended: str
    stored: int


@dataclass(frozen=True)
class Account:
    """The counts of one bundle. `reused`: answers for which something was recalled. `ended`: how the process ended."""

    bundle: str
    conversations: int = 0
    questions: int = 0
    refused: int = 0
    reused: int = 0
    different: int = 0
    first_difference: str = ""
    ended: str = "done"

    @property
    def passed(self) -> bool:
        """Whether every conversation ended, and as it does alone."""
        return self.ended == "done" and self.questions > 0 and not self.different


def scripts(load: Load, tiers: Sequence[str]) -> list[Script]:
    """Return the random conversations."""
    draw, left, found = random.Random(load.seed), load.questions, list[Script]()
    while left:
        turns = min(left, draw.randint(1, load.turns))
        prune = draw.random() < 0.8
        images = [min(load.images, draw.choice((1, 1, 1, 2, 3) if number == 0 else (0, 0, 0, 1, 2))) for number in range(turns)]
        asked = [_question(draw, count, tiers if prune else ()) for count in images]
        found.append(Script(prune, tuple(asked)))
        left -= turns
    return found


def _question(draw: random.Random, images: int, tiers: Sequence[str]) -> Question:
    options: AnswerOptions = {"max_tokens": draw.randint(1, 8)}
    if draw.random() < 0.4:
        options |= {"temperature": draw.choice((0.5, 1.0)), "top_p": draw.choice((1.0, 0.9, 0.5)), "seed": draw.randrange(100)}
    if draw.random() < 0.2:
        options["stop"] = [draw.choice("aeiou "), "th"]
    if tiers and draw.random() < 0.5:
        options["tier"] = draw.choice(tiers)
    prompt = " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))
    shown = tuple(draw.randrange(PICTURES) for _ in range(images))
    return Question(prompt, shown, options, draw.randint(0, 4) if draw.random() < 0.15 else None)


def pictures(model: Runtime, seed: int) -> list[Image.Image]:
    """Return random pictures of the bundle's own size."""
    draw, geometry = np.random.default_rng(seed), model.plan.geometry
    return [Image.fromarray(draw.integers(0, 256, (geometry.height, geometry.width, 3), dtype=np.uint8)) for _ in range(PICTURES)]


def hold(model: Runtime, script: Script, shown: Sequence[Image.Image]) -> list[Outcome]:
    """Hold one conversation and return what came of its questions."""
    chat = model.chat(prune=script.prune)
    return [_asked(chat, question, [shown[number] for number in question.images]) for question in script.questions]


def _asked(chat: Chat, question: Question, images: Sequence[Image.Image]) -> Outcome:
    try:
        stream = chat.ask(question.prompt, images or None, **question.options)
        for number, _ in enumerate(stream, start=1):
            if number == question.read:
                stream.close()
        return Outcome(stream.text, stream.receipt.finish_reason, stream.receipt.visual_stored)
    except EdgePruneError as error:
        return Outcome("", str(error), 0)


def in_threads(work: Sequence[Callable[[], list[Outcome]]], threads: int) -> list[list[Outcome]]:
    """Return what each piece of work returns, done by several threads; raise the first error."""
    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(lambda piece: piece(), work))


def compare(bundle: Path, load: Load) -> Account:
    """Hold the conversations with a bundle, alone without a cache and then at once with one, and count."""
    alone, shared = (edgeprune.runtime.load(bundle, threads=1, cache_bytes=size) for size in (0, CACHE_BYTES))
    reused, lock = [0], threading.Lock()

    def count(receipt: object) -> None:
        with lock:
            reused[0] += bool(getattr(receipt, "reused", ()))

    shared.watch(count)
    asked, shown = scripts(load, alone.tiers), pictures(alone, load.seed)
    expected = [hold(alone, script, shown) for script in asked]
    found = in_threads([lambda script=script: hold(shared, script, shown) for script in asked], load.threads)  # type: ignore[misc]
    pairs = [
        (script, number, one, other)
        for script, before, after in zip(asked, expected, found, strict=True)
        for number, (one, other) in enumerate(zip(before, after, strict=True))
    ]
    different = [pair for pair in pairs if pair[2] != pair[3]]
    return Account(
        bundle.name,
        len(asked),
        len(pairs),
        sum(one.ended not in ("end", "stop", "length", "cancelled") for _, _, one, _ in pairs),
        reused[0],
        len(different),
        "" if not different else "question {1} of {0}: {2} alone, {3} at once".format(*different[0]),
    )


def _child(bundle: Path, load: Load, out: Path) -> None:
    faulthandler.enable()
    out.write_text(json.dumps(asdict(compare(bundle, load))))


def run(bundle: Path, load: Load, minutes: float) -> Account:
    """Return the account of a bundle, from a process of its own that may take so many minutes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "account.json"
        child = multiprocessing.get_context("spawn").Process(target=_child, args=(bundle, load, out))
        child.start()
        child.join(60 * minutes)
        if child.is_alive():
            child.kill()
            child.join()
            return Account(bundle.name, ended="hung")
        if child.exitcode or not out.is_file():
            return Account(bundle.name, ended=f"crashed with {child.exitcode}")
        return Account(**json.loads(out.read_text()))


def main() -> None:
    """Hold the conversations, print a table, and exit with 1 where something went wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundles", type=Path, nargs="+")
    options.add_argument("--questions", type=int, default=1000, help="For each bundle.")
    options.add_argument("--threads", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--turns", type=int, default=4, help="Of a conversation, at most.")
    options.add_argument("--images", type=int, default=3, help="Of a turn, at most.")
    options.add_argument("--minutes", type=float, default=60, help="After which a bundle's process counts as hung.")
    given = options.parse_args()
    print("| bundle | conversations | questions | refused | reused | different | process |\n|---|---|---|---|---|---|---|")
    accounts, load = [], Load(given.questions, given.threads, given.seed, given.turns, given.images)
    for bundle in given.bundles:
        account = run(bundle, load, given.minutes)
        accounts.append(account)
        row = account.bundle, account.conversations, account.questions, account.refused, account.reused, account.different
        print(f"| {' | '.join(map(str, row))} | {account.ended} |", flush=True)
    for account in accounts:
        if account.first_difference:
            print(f"{account.bundle}: {account.first_difference}")
    sys.exit(not all(account.passed for account in accounts))


if __name__ == "__main__":
    main()
