"""Tokens a second, and times to the first token, of one client and of several at once, which ask `edgeprune serve`.

python examples/serving/clients.py table.bundle table.png --clients 1,4 --tokens 64 --threads 2
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from serving import question, server

# Of different lengths, so that no two conversations have caches of one length.
PROMPTS = (
    "Describe the scene.",
    "Describe everything that can be seen in this picture, from the left to the right, with the colour of each object.",
    "Describe the objects.",
    "Describe the scene in as many words as it takes, and say where each of the objects is.",
)


@dataclass(frozen=True)
class Answered:
    """One answer: its number of tokens, the time to the first, the time in line included, and the mean time of the others."""

    tokens: int
    ttft_ms: float
    token_ms: float


def ask(url: str, image: Path, prompt: str, tokens: int) -> Answered:
    """Ask once and return what the server's receipt says."""
    body = json.dumps({"messages": question(image, prompt), "max_tokens": tokens}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        answer: Any = json.load(response)
    receipt = answer["edgeprune"]
    times = receipt["times_ms"]
    return Answered(answer["usage"]["completion_tokens"], receipt["queue_ms"] + times["ttft"], times["per_token"])


def measure(url: str, image: Path, clients: int, tokens: int, seconds: float) -> tuple[list[Answered], float]:
    """Have so many clients ask again and again; return their answers and how many seconds all of them took."""
    answers, started = list[Answered](), time.monotonic()

    def go_on(number: int) -> None:
        while time.monotonic() - started < seconds:
            answers.append(ask(url, image, PROMPTS[number % len(PROMPTS)], tokens))

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.monotonic() - started


def report(bundle: Path, image: Path, clients: Sequence[int], tokens: int, seconds: float, options: Sequence[str]) -> None:
    """Print one line for each number of clients."""
    print("clients  tokens/s in steps  tokens/s in all  ms a token  TTFT ms, median  longest  answers")
    with server(bundle, options=("--parallel", str(max(clients)), "--per-client", str(max(clients)), *options)) as url:
        for prompt in PROMPTS:
            ask(url, image, prompt, 2)  # the picture is encoded once
        for count in clients:
            answers, took = measure(url, image, count, tokens, seconds)
            token_ms, firsts = median(answer.token_ms for answer in answers), [answer.ttft_ms for answer in answers]
            rates = f"{1e3 * count / token_ms:17.1f} {sum(answer.tokens for answer in answers) / took:16.1f}"
            print(f"{count:7} {rates} {token_ms:11.2f} {median(firsts):16.0f} {max(firsts):8.0f} {len(answers):8}", flush=True)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--clients", default="1,4", help="numbers of clients, separated by commas")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of clients")
    parser.add_argument("--threads", help="of the server")
    given = parser.parse_args()
    options = ("--threads", given.threads) if given.threads else ()
    report(given.bundle, given.image, [int(count) for count in given.clients.split(",")], given.tokens, given.seconds, options)


if __name__ == "__main__":
    main()
