"""Tokens a second, and times to the first token, of one client and of several at once.

The clients are threads of one process, which ask as the workers of `edgeprune serve --parallel N` do.

python examples/serving/clients.py table.bundle table.png --clients 1,4 --tokens 64 --threads 2
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from edgeprune.runtime import Runtime, load

# Of different lengths, so that no two conversations have caches of one length.
PROMPTS = (
    "Describe the scene.",
    "Describe everything that can be seen in this picture, from the left to the right, with the colour of each object.",
    "Describe the objects.",
    "Describe the scene in as many words as it takes, and say where each of the objects is.",
)


@dataclass(frozen=True)
class Answered:
    """When the tokens of one answer came, in seconds, and the time to the first of them in milliseconds."""

    times: Sequence[float]
    ttft_ms: float


def ask(model: Runtime, image: Path, prompt: str, tokens: int) -> Answered:
    """Ask once."""
    started, times = time.monotonic(), list[float]()
    stream = model.stream(image, prompt, max_tokens=tokens)
    for _ in stream:
        times.append(time.monotonic())
    times = times[: stream.receipt.generated_tokens]  # the last piece has no token
    return Answered(times, 1e3 * (times[0] - started))


def measure(model: Runtime, image: Path, clients: int, tokens: int, seconds: float) -> tuple[list[Answered], float]:
    """Have so many clients ask again and again; return their answers and how many seconds all of them took."""
    answers, started = list[Answered](), time.monotonic()

    def go_on(number: int) -> None:
        while time.monotonic() - started < seconds:
            answers.append(ask(model, image, PROMPTS[number % len(PROMPTS)], tokens))

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.monotonic() - started


def rate_of_all(answers: Sequence[Answered], clients: int) -> float:
    """Return the tokens a second while so many answers were between their first and their last token; nan if never."""
    events = [(moment, 0) for answer in answers for moment in answer.times[1:]]  # a first token is prefill
    events += [(answer.times[0], 1) for answer in answers] + [(answer.times[-1], -1) for answer in answers]
    running, tokens, lasted, before = 0, 0, 0.0, 0.0
    for moment, change in sorted(events):
        if running == clients:
            tokens, lasted = tokens + (change == 0), lasted + moment - before
        running, before = running + change, moment
    return tokens / lasted if lasted else float("nan")


def report(model: Runtime, image: Path, clients: Sequence[int], tokens: int, seconds: float) -> None:
    """Print one line for each number of clients."""
    print("clients  tokens/s while all answer  tokens/s in all  TTFT ms, median  longest  answers")
    for prompt in PROMPTS:
        ask(model, image, prompt, 2)  # the picture is encoded once
    for count in clients:
        answers, took = measure(model, image, count, tokens, seconds)
        firsts, whole = [answer.ttft_ms for answer in answers], sum(len(answer.times) for answer in answers) / took
        rates = f"{rate_of_all(answers, count):25.1f} {whole:16.1f}"
        print(f"{count:7} {rates} {median(firsts):16.0f} {max(firsts):8.0f} {len(answers):8}", flush=True)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--clients", default="1,4", help="numbers of clients, separated by commas")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of clients")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime")
    parser.add_argument("--turns", action="store_true", help="steps take turns instead of sharing passes")
    given = parser.parse_args()
    clients = [int(count) for count in given.clients.split(",")]
    with load(given.bundle, threads=given.threads, parallel=1 if given.turns else max(clients)) as model:
        report(model, given.image, clients, given.tokens, given.seconds)


if __name__ == "__main__":
    main()
