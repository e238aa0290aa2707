"""Ask a bundle of EdgePrune; its receipts tell the times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from question import Ask, Cost, Question, answer, asked

from edgeprune.runtime import load as load_bundle
from edgeprune.runtime.api.session import Runtime


def load(question: Question) -> Ask:
    """Return what answers about an image."""
    runtime = load_bundle(question.folder, threads=question.threads)
    endless = Runtime(replace(runtime._pipeline, eos_token_ids=()))  # as `edgeprune bench` does: all answers are as long

    def ask(image: Path) -> Cost:
        pixels = np.asarray(Image.open(image).convert("RGB"))
        receipt = endless.generate(pixels, question.prompt, max_tokens=question.tokens).receipt
        times = receipt.times
        return Cost(
            ttft_ms=times.ttft_ms,
            vision_ms=times.preprocess_ms + times.vision_ms + times.select_ms,
            prefill_ms=times.prefill_ms,
            ms_per_token=times.ms_per_token,
            tokens=receipt.generated_tokens,
            entered=receipt.text_tokens + runtime.plan.tokens_entering_decoder,
        )

    return ask


if __name__ == "__main__":
    answer(asked(), load, "edgeprune", "onnxruntime")
