"""Measure what a structured answer takes beside the model: for each token, the mask and the choice among what it leaves.

    python examples/structured/mask_time.py
    python examples/structured/mask_time.py --tokenizer path/to/tokenizer.json --end 151645

Without a tokenizer one of 151 643 byte-level tokens is made up, the size of Qwen2-VL's.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgeprune.runtime.generation.sampling import Sampler, Sampling
from edgeprune.runtime.text.grammar import GrammarCompiler

SIZE = 151_643
PARTS = ["Ġ", *"etaoinshrdlucmfwypvbgkjqxz" * 3, *"ETAOINSHRDLUCMFWYPVBGKJQXZ", *'0123456789"{}[]:,.-_']
OBJECT = {
    "type": "object",
    "properties": {
        "label": {"type": "string", "maxLength": 40},
        "x": {"type": "integer", "minimum": 0, "maximum": 1000},
        "sure": {"type": "boolean"},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["label", "x", "sure", "colours"],
    "additionalProperties": False,
}
QUESTIONS: dict[str, dict[str, Any]] = {
    "3 choices": {"choices": ["yes", "no", "left of the cube"]},
    "JSON object": {"json_schema": OBJECT},
    "any JSON": {"json_schema": {}},
}


def made_up(size: int) -> str:
    """Return the tokenizer.json of so many byte-level tokens, pieces of up to 12 characters, and an end token after them."""
    draw = random.Random(0)
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pieces, merges = list(dict.fromkeys(PARTS)), []
    while len(vocabulary) < size:
        left, right = draw.choice(pieces), draw.choice(pieces[:1000])
        if len(left + right) <= 12 and left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
            pieces.append(left + right)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    text: str = tokenizer.to_str()
    return text


def token_times(compiler: GrammarCompiler, width: int, ends: list[int], answers: int, **asked: Any) -> np.ndarray:
    """Return milliseconds of every token of answers to random logits, cut at 60 tokens."""
    draw, times = np.random.default_rng(0), list[float]()
    for _ in range(answers):
        sampling = Sampling(**asked)
        sampler = Sampler(sampling, compiler.constraint(sampling.choices, sampling.json_schema))
        for _ in range(60):
            logits = draw.standard_normal(width, np.float32)
            started = time.thread_time()  # all of it happens here; what else runs on the machine does not count
            token = sampler.sample(logits)
            times.append(1e3 * (time.thread_time() - started))
            if sampler.done or token in ends:
                break
    return np.array(times)


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokenizer", type=Path, help="A tokenizer.json.")
    options.add_argument("--end", type=int, default=SIZE, help="Id of its end token.")
    options.add_argument("--size", type=int, default=SIZE, help="Of the one that is made up.")
    options.add_argument("--answers", type=int, default=20)
    given = options.parse_args()
    end = given.end if given.tokenizer else given.size
    source = given.tokenizer.read_text(encoding="utf-8") if given.tokenizer else made_up(given.size)
    width = Tokenizer.from_str(source).get_vocab_size()
    compiler = GrammarCompiler(lambda: source, [end])
    started = time.perf_counter()
    compiler.constraint(*(lambda s: (s.choices, s.json_schema))(Sampling(choices=["yes"])))
    print(f"{width} tokens; the tokenizer is taken in once, {1e3 * (time.perf_counter() - started):.0f} ms")
    print("| answer | compiling, ms | a token, ms: median | 99 of 100 | longest |\n|---|---|---|---|---|")
    free = token_times(compiler, width, [end], given.answers)
    print(f"| free text | | {np.median(free):.2f} | {np.quantile(free, 0.99):.2f} | {free.max():.2f} |")
    for name, asked in QUESTIONS.items():
        started = time.perf_counter()
        compiler.constraint(*(lambda s: (s.choices, s.json_schema))(Sampling(**asked)))
        compiling = 1e3 * (time.perf_counter() - started)
        times = token_times(compiler, width, [end], given.answers, **asked)
        print(f"| {name} | {compiling:.1f} | {np.median(times):.2f} | {np.quantile(times, 0.99):.2f} | {times.max():.2f} |")


if __name__ == "__main__":
    main()
