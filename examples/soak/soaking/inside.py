"""Cancelling within a process: from `stream.cancel()` to the end of the iteration, while several threads generate."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from edgeprune.runtime import Runtime, load
from edgeprune.tabletop.questions import DESCRIBE_PROMPT


def cancelled(bundle: Path, seed: int, *, readers: int, answers: int, threads: int) -> list[Mapping[str, Any]]:
    """Return for each cancelled answer its milliseconds, the tokens that came after, and its median step in milliseconds."""
    model = load(bundle, threads=threads)
    found: list[Mapping[str, Any]] = []
    running = [
        threading.Thread(target=_read, args=(model, random.Random(f"{seed} {number}"), answers, found)) for number in range(readers)
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return found


def _read(model: Runtime, lot: random.Random, answers: int, found: list[Mapping[str, Any]]) -> None:
    geometry = model.plan.geometry
    for _ in range(answers):
        colour = tuple(lot.randrange(256) for _ in range(3))
        image = Image.new("RGB", (geometry.width, geometry.height), colour)
        # An answer that does not end by itself too soon: any text goes on for as long as it may.
        stream = model.stream(image, DESCRIBE_PROMPT, temperature=1.5, seed=lot.randrange(1000), max_tokens=256)
        said: dict[str, Any] = {}

        def cancel(stream: Any = stream, said: dict[str, Any] = said) -> None:
            said["at"], said["when"] = stream.receipt.generated_tokens, time.monotonic()
            stream.cancel()

        timer = threading.Timer(lot.uniform(0, 0.15), cancel)
        timer.start()
        for _piece in stream:
            pass
        ended, receipt = time.monotonic(), stream.receipt
        timer.cancel()
        timer.join()
        if receipt.finish_reason == "cancelled" and said:
            ms = max(0.0, 1e3 * (ended - said["when"]))
            found.append({"ms": ms, "after": receipt.generated_tokens - said["at"], "step_ms": receipt.times.ms_per_token} | said)
