"""Startup time and memory of a new process up to its second answer, measured in a subprocess for each variant.

Files stay in the page cache: this measures a restart, not a start after boot.
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
from edgeprune.bundle.signing import TrustedKeys
from edgeprune.device.memory import peak_rss, reset_peak_rss
from edgeprune.errors import EdgePruneError
from edgeprune.runtime.api.loading import load

# The clock starts before edgeprune or numpy is imported.
_PROGRAM = """
import time
began = time.perf_counter()
import edgeprune.runtime
imported = time.perf_counter() - began
from edgeprune.benchmark.startup import report
report(1e3 * imported)
"""
_CHUNK_BYTES = 1 << 22  # per read


def measure_startup(
    path: Path,
    name: str,
    question: BenchmarkPrompt,
    image: Path | None = None,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    trust: TrustedKeys = (),
) -> Startup:
    """Measure a new process for two answers of one variant; `name` is PRUNED or one of BUILTIN.

    Raises EdgePruneError if the process fails, for example for lack of memory.
    """
    options = {"path": str(path), "name": name, "image": None if image is None else str(image), "question": asdict(question)}
    keys = [key.decode() if isinstance(key, bytes) else Path(key).read_text(encoding="utf-8") for key in trust]
    request = json.dumps({**options, "threads": threads, "provider": provider, "trust": keys})
    result = subprocess.run([sys.executable, "-c", _PROGRAM], input=request, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    if result.returncode != 0 or not lines:
        reason = (result.stderr.strip().splitlines() or [f"it ended with {result.returncode}"])[-1]
        raise EdgePruneError(f"{path} does not answer in a process of its own: {reason}.", hint="Is there memory enough for two?")
    return Startup(**json.loads(lines[-1]))


def report(import_ms: float) -> None:
    """Measure the request on standard input in this process and print the result as JSON."""
    print(json.dumps(asdict(_measure(import_ms, json.load(sys.stdin)))))


def _measure(import_ms: float, request: Mapping[str, Any]) -> Startup:
    path, name = Path(request["path"]), request["name"]
    image = None if request["image"] is None else Path(request["image"])
    read_files(path)  # fill the page cache, so that neither measurement below waits for the disk
    started = time.perf_counter()
    read_files(path)
    read = time.perf_counter()
    trust = [key.encode() for key in request["trust"]]
    runtime = load(path, threads=request["threads"], provider=request["provider"], cache_bytes=0, trust=trust)
    loaded = time.perf_counter()
    loading = peak_rss()
    own = bundle_variant(PRUNED, path, runtime, image)
    variant, question = own if name == PRUNED else builtin_variant(own, name), BenchmarkPrompt(**request["question"])
    reset_peak_rss()  # if the kernel does not allow it, the peak includes loading
    first, second = (question.answer(variant).times.ttft_ms for _ in range(2))
    return Startup(import_ms, 1e3 * (read - started), 1e3 * (loaded - read), first, second, loading, peak_rss())


def read_files(path: Path) -> int:
    """Read every file that a bundle's manifest lists, discard the data, and return the number of bytes."""
    total = 0
    buffer = bytearray(_CHUNK_BYTES)
    for name in Manifest.load(path).files:
        with (path / name).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total
