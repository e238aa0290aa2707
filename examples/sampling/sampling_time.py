"""Measure what choosing a token takes beside the model, in processor time, by the options of sampling and the form of the logits.

python examples/sampling/sampling_time.py
python examples/sampling/sampling_time.py --vocabulary 32064 --tokens 200
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from edgeprune.runtime import Sampling
from edgeprune.runtime.generation.sampling import Sampler

OPTIONS = {
    "greedy": Sampling(),
    "greedy, repetition 1.05": Sampling(repetition_penalty=1.05),
    "temperature 1": Sampling(temperature=1.0, seed=0),
    "top_p 0.95": Sampling(temperature=1.0, top_p=0.95, seed=0),
    "top_p 0.5": Sampling(temperature=1.0, top_p=0.5, seed=0),
}


def forms(vocabulary: int) -> dict[str, np.ndarray]:
    """Return logits [vocabulary] by name: nearly equal, spread as a model's, and with one that has nearly all of the mass."""
    noise = np.random.default_rng(0).standard_normal(vocabulary, np.float32)
    peaked = 2 * noise
    peaked[vocabulary // 2] = 25
    return {"flat": noise / 100, "spread": 2 * noise, "peaked": peaked}


def token_times(logits: np.ndarray, sampling: Sampling, tokens: int) -> np.ndarray:
    """Return the milliseconds of processor time of each of `tokens` tokens of one answer, after the first."""
    sampler, times = Sampler(sampling), list[float]()
    sampler.begin(range(1000))  # ids of a prompt
    for _ in range(tokens + 1):
        started = time.thread_time()
        sampler.sample(logits)
        times.append(1e3 * (time.thread_time() - started))
    return np.array(times[1:])


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--vocabulary", type=int, default=151_936, help="Number of logits; by default that of Qwen2-VL.")
    options.add_argument("--tokens", type=int, default=100)
    given = options.parse_args()
    print("| options | logits | a token, ms: median | 99 of 100 |\n|---|---|---|---|")
    for form, logits in forms(given.vocabulary).items():
        for name, sampling in OPTIONS.items():
            times = token_times(logits, sampling, given.tokens)
            print(f"| {name} | {form} | {np.median(times):.2f} | {np.quantile(times, 0.99):.2f} |")


if __name__ == "__main__":
    main()
