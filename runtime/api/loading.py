"""Load a bundle from disk into a `Runtime`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from edgeprune.bundle import PREPROCESSOR, SELECTOR, Bundle, tier_selector
from edgeprune.bundle.signing import TrustedKeys
from edgeprune.errors import UsageError
from edgeprune.processors import read_image_spec
from edgeprune.runtime.api.session import Runtime
from edgeprune.runtime.backends.interface import Backend
from edgeprune.runtime.backends.providers import open_backend
from edgeprune.runtime.backends.shared import FifoLock, GuardedBackend
from edgeprune.runtime.generation.pipeline import EnergyReader, Pipeline, SharedState
from edgeprune.runtime.generation.request import RequestLimits
from edgeprune.runtime.media.likeness import Likeness
from edgeprune.runtime.text.prompt import PromptEncoder

CACHE_BYTES = 128 << 20


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    parallel: int = 1,
    provider: str = "cpu",
    cache_bytes: int = CACHE_BYTES,
    max_kv_bytes: int | None = None,
    energy: bool = False,
    warm_up: bool = False,
    on_phase: Callable[[str], None] | None = None,
    check: str = "full",
    require_signature: TrustedKeys = (),
    trust: TrustedKeys = (),
) -> Runtime:
    """Load the bundle in the folder `path` after checking every file against its manifest.

    >>> with edgeprune.runtime.load("table.bundle") as model:
    ...     print(model.generate("table.png", "What does the label say?"))

    * `threads`: intra-op threads of ONNX Runtime; None for all cores.
    * `parallel`: answers at a time whose decode steps run together, where the bundle allows (see docs/server.md); more take turns.
    * `provider`: what computes: "cpu", "cuda", "ort-tensorrt" or "openvino" (all by ONNX Runtime), or "tensorrt" (the engines that
      `edgeprune build` made). There is no fallback to another.
    * `cache_bytes`: size of the cache of image embeddings and prefixes; 0 for none.
    * `max_kv_bytes`: limit of each conversation's KV cache, in bytes.
    * `energy`: measure joules where the machine has sensors.
    * `warm_up`: answer twice per tier before returning (see `Runtime.warm_up`).
    * `on_phase`: called with "loading", "warming" and "ready" as each phase begins.
    * `check`: "full" reads every file; "fast" skips files that are unchanged since this user's last full check.
    * `require_signature`: public keys as paths or PEM bytes, one of which must have signed the bundle.
    * `trust`: public keys likewise, for "tensorrt": one of them must have signed the engines (`edgeprune build --sign`), which then
      may be of another board. Without it engines are loaded that this device built.

    Raises NoBundleError if there is no bundle at `path`, BundleError for a missing or altered file or a signature that is not as
    required, EngineError if the provider is not available here, and UsageError for invalid limits.
    """
    report_phase = on_phase or (lambda phase: None)
    RequestLimits(max_kv_bytes=max_kv_bytes)  # raises UsageError for an invalid limit
    if parallel < 1:
        raise UsageError(f"parallel must be 1 or more, not {parallel}.")
    if cache_bytes < 0:
        raise UsageError(f"cache_bytes must be 0 or more, not {cache_bytes}.")
    report_phase("loading")
    state = SharedState(cache_bytes, _energy_counter() if energy else None)
    with Bundle.open_while_verifying(Path(path), check=check, require_signature=require_signature) as bundle:
        backend = open_backend(bundle, provider, threads, trust, parallel=parallel)
        runtime = Runtime(_pipeline(bundle, backend, state, max_kv_bytes))
    if warm_up:
        report_phase("warming")
        runtime.warm_up()
    report_phase("ready")
    return runtime


def runtime_on(bundle: Bundle, backend: Backend) -> Runtime:
    """Return the runtime of an opened bundle on a given backend, without a cache of images."""
    return Runtime(_pipeline(bundle, backend, SharedState(), None))


def _pipeline(bundle: Bundle, backend: Backend, state: SharedState, max_kv_bytes: int | None) -> Pipeline:
    manifest, lock = bundle.manifest, FifoLock()
    selectors = [name for name in (SELECTOR, *map(tier_selector, manifest.tiers[1:])) if name in manifest.graphs]
    guarded = GuardedBackend(backend, lock)
    return Pipeline(
        backend=guarded,
        prompts=PromptEncoder.of(bundle),
        image_spec=read_image_spec(bundle.file(PREPROCESSOR)),
        eos_token_ids=manifest.end_tokens,
        generation=manifest.generation,
        decoder=manifest.decoder,
        plan=bundle.plan,
        name=manifest.source.model,
        tiers=bundle.tiers,
        input_cut_ignores_prompt=bool(selectors) and not any("prompt_embeds" in manifest.graphs[name].inputs for name in selectors),
        max_kv_bytes=max_kv_bytes,
        lock=lock,
        shared_steps=guarded.shared_steps,
        state=state,
        likeness=Likeness.of(bundle.plan),
    )


def _energy_counter() -> EnergyReader | None:
    from edgeprune.device.power import EnergyCounter, find_power_source

    source = find_power_source()
    return None if source is None else EnergyCounter(source)
