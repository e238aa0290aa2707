"""How long a process takes to its first answers, and the memory it needs: measured in a fresh one for each contender.

What is in memory already (files in the system's cache) stays there: this is a start after an earlier one, not after a boot.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeprune.benchmark.results import Startup
from edgeprune.benchmark.variants import PRUNED, BenchmarkPrompt, builtin_variant, bundle_variant
from edgeprune.bundle import Manifest
from edgeprune.device.memory import peak_rss, reset_peak_rss
from edgeprune.errors import EdgePruneError
from edgeprune.runtime.api.loading import load

# The clock runs before anything of ours, or numpy, is there.
_PROGRAM = """
import time
began = time.perf_counter()
import edgeprune.runtime
imported = time.perf_counter() - began
from edgeprune.benchmark.startup import report
report(1e3 * imported)
"""
_PIECE = 1 << 22  # bytes read at once


def measure_startup(
    path: Path,
    name: str,
    question: BenchmarkPrompt,
    image: Path | None = None,
    *,
    threads: int | None = None,
    provider: str = "cpu",
) -> Startup:
    """Return what a new process needs for two answers of one contender: a bundle (PRUNED), or a word that compares it.

    Raises EdgePruneError when the process ends without saying, for want of memory perhaps.
    """
    asked = {"path": str(path), "name": name, "image": None if image is None else str(image), "question": asdict(question)}
    request = json.dumps({**asked, "threads": threads, "provider": provider})
    result = subprocess.run([sys.executable, "-c", _PROGRAM], input=request, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    if result.returncode != 0 or not lines:
        words = (result.stderr.strip().splitlines() or [f"it ended with {result.returncode}"])[-1]
        raise EdgePruneError(f"{path} does not answer in a process of its own: {words}.", hint="Is there memory enough for two?")
    return Startup(**json.loads(lines[-1]))


def report(import_ms: float) -> None:
    """Measure what standard input asks for, in this process, and print it as JSON."""
    print(json.dumps(asdict(_measured(import_ms, json.load(sys.stdin)))))


def _measured(import_ms: float, asked: Mapping[str, Any]) -> Startup:
    path, name = Path(asked["path"]), asked["name"]
    image = None if asked["image"] is None else Path(asked["image"])
    read_files(path)  # so that neither of the two below waits for the disk
    started = time.perf_counter()
    read_files(path)
    read = time.perf_counter()
    runtime = load(path, threads=asked["threads"], provider=asked["provider"], cache_bytes=0)
    loaded = time.perf_counter()
    loading = peak_rss()
    own = bundle_variant(PRUNED, path, runtime, image)
    asking, question = own if name == PRUNED else builtin_variant(own, name), BenchmarkPrompt(**asked["question"])
    reset_peak_rss()  # where the kernel does not let us, the peak is that of loading too
    first, second = (question.answer(asking).times.ttft_ms for _ in range(2))
    return Startup(import_ms, 1e3 * (read - started), 1e3 * (loaded - read), first, second, loading, peak_rss())


def read_files(path: Path) -> int:
    """Read every file that a bundle's manifest lists, to no purpose; return how many bytes they are."""
    total = 0
    buffer = bytearray(_PIECE)
    for name in Manifest.load(path).files:
        with (path / name).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total
