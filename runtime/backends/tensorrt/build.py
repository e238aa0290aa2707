"""Plan, check and run the engine builds of a bundle (`edgeprune build`).

An existing engine for the same TensorRT version, GPU, precision and profiles is kept. An engine of an equal graph is copied from
another bundle, such as one with other keep budgets.
"""

from __future__ import annotations

import hashlib
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.bundle import DECODER, Bundle, files_of, held_as
from edgeprune.bundle.signing import TrustedKeys, read_private_key, sign_engines
from edgeprune.device.cudart import load_cudart
from edgeprune.device.machine import Machine, read_machine
from edgeprune.device.memory import NO_ZRAM, Memory
from edgeprune.errors import EngineError, UsageError
from edgeprune.runtime.backends.tensorrt.bindings import DeviceIdentity, identity, tensorrt
from edgeprune.runtime.backends.tensorrt.builder import BuilderSettings, build_engine
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits, ShapeProfile, shape_profiles
from edgeprune.runtime.backends.tensorrt.store import EngineRecord, Store, engine_key, keep_timings, read_timings, timing_cache

# Peak resident memory of TensorRT-RTX builds, fitted to decoders with 3 to 1400 MB of weights (docs/tensorrt.md): a constant, and
# copies of the weights (parsed, laid out for kernels, serialized). Kernels are timed with one copy on the GPU; how many there are
# at once on a Jetson was not measured.
BASE_BYTES, COPIES, GPU_COPIES = 600 << 20, 3.5, 1
GPU_PARTS = ("weights on the GPU", "workspace on the GPU")

# The first GPUs that multiply a precision's type: Ampere (Xavier is 7.2), Ada (Orin is 8.7) and Blackwell, with what to say of it.
_CAPABILITIES = {
    "bf16": ((8, 0), "bfloat16", "Orin (SM 8.7) and later", "fp16"),
    "fp8": ((8, 9), "FP8", "Thor (SM 11.0) and other GPUs since SM 8.9", "w8a8"),
    "nvfp4": ((10, 0), "FP4", "Thor (SM 11.0) and other GPUs since SM 10.0", "int4"),
}

JETPACK_TRTEXEC = "/usr/src/tensorrt/bin/trtexec"  # not in PATH


@dataclass(frozen=True)
class BuildJob:
    """One engine that the bundle needs. `weights`: bytes of the graph. `ready`: the engine exists already."""

    graph: str
    limits: ProfileLimits
    profiles: tuple[ShapeProfile, ...]
    weights: int
    key: str = ""
    ready: bool = False

    def peak_parts(self, settings: BuilderSettings) -> dict[str, int]:
        """Return the estimated parts of the build's peak memory in bytes. GPU_PARTS names those of the GPU."""
        on_gpu = GPU_COPIES * self.weights
        parts = (BASE_BYTES, int(COPIES * self.weights) - on_gpu, on_gpu, settings.workspace)
        return dict(zip(("TensorRT", "copies of the weights", *GPU_PARTS), parts, strict=True))

    def peak_bytes(self, settings: BuilderSettings) -> int:
        """Return the estimated peak memory of the build in bytes."""
        return sum(self.peak_parts(settings).values())

    def gpu_bytes(self, settings: BuilderSettings) -> int:
        """Return what of the peak is memory of the GPU, which cannot be swapped."""
        parts = self.peak_parts(settings)
        return sum(parts[name] for name in GPU_PARTS)


@dataclass(frozen=True)
class BuildResult:
    """An engine and its origin: "built", "kept" (it existed) or "taken" (copied from another bundle)."""

    record: EngineRecord
    how: str


def plan_jobs(
    bundle: Bundle,
    limits: ProfileLimits,
    settings: BuilderSettings,
    identity: DeviceIdentity | None = None,
    store: Store | None = None,
) -> list[BuildJob]:
    """Return the engines that a bundle needs. Without an identity the jobs have no key; without a store none is ready."""
    jobs = []
    for graph, profiles in shape_profiles(bundle, limits).items():
        weights = sum(record.bytes for name, record in bundle.manifest.files.items() if name in files_of(graph))
        key = "" if identity is None else engine_key(bundle, graph, identity, profiles, settings.level)
        ready = store is not None and _found(store, graph, key) is not None
        jobs.append(BuildJob(graph, limits, profiles, weights, key, ready))
    return jobs


def build_jobs(
    trt: Any,
    bundle: Bundle,
    jobs: Sequence[BuildJob],
    identity: DeviceIdentity,
    settings: BuilderSettings,
    store: Store,
    *,
    others: Sequence[Store] = (),
    advance: Callable[[str, str, float], None] = lambda graph, phase, done: None,
    configure: Callable[[Any], None] = lambda config: None,
) -> list[BuildResult]:
    """Build the engines that do not exist. Finished engines survive an interruption.

    `others`: stores of other bundles to copy engines with equal keys from. `advance`: called with graph, phase and fraction done.
    """
    results = []
    for job in jobs:
        kept = _found(store, job.graph, job.key)
        taken = None if kept else next((record for other in others if (record := _take(other, job, store)) is not None), None)
        if kept is not None:
            results.append(BuildResult(kept, "kept"))
        elif taken is not None:
            results.append(BuildResult(taken, "taken"))
        else:
            results.append(BuildResult(_build(trt, bundle, job, identity, settings, store, advance, configure), "built"))
    return results


def check_memory(jobs: Sequence[BuildJob], settings: BuilderSettings, memory: Memory, *, jetson: bool = True) -> None:
    """Raise EngineError when the largest build does not fit.

    The whole has to fit into available memory and swap on disks; zram is memory itself and adds nothing. `jetson`: GPU and CPU
    share the memory, so the GPU's part has to fit into what is available, without swap.
    """
    pending = [job for job in jobs if not job.ready]
    if not pending or memory.available is None:
        return
    largest = max(pending, key=lambda job: job.weights)
    needed, on_gpu = largest.peak_bytes(settings), largest.gpu_bytes(settings) if jetson else 0
    available, swap = memory.available << 20, (memory.disk_swap_free or 0) << 20
    if on_gpu <= available and needed <= available + swap:
        return
    shared = f", {on_gpu / 1e9:.1f} of them on the GPU, where swap does not count" if jetson else ""
    swapped = f", with {swap / 1e9:.1f} GB of swap on disks" if swap else ""
    raise EngineError(
        f"Building {largest.graph} takes about {needed / 1e9:.1f} GB{shared}, and {available / 1e9:.1f} GB are free{swapped}.",
        hint=_more_memory(memory.zram_total or 0 if jetson else 0, max(needed - available - swap, 0) if on_gpu <= available else 0),
    )


def _more_memory(zram: int, missing: int) -> str:
    # `zram`: MiB of it that JetPack made. `missing`: bytes of swap that would do, 0 if swap does not help.
    swap = f" add swap on a disk ({missing / 1e9:.1f} GB or more)," if missing else ""
    remedy = (
        f"Close other programs (a desktop: sudo systemctl isolate multi-user.target),{swap} export with --precision int8 or int4, "
    )
    off = (
        f" The {zram / 1024:.1f} GiB of zram are this memory too, and no such swap. Switch it off first: {NO_ZRAM}" if zram else ""
    )
    return f"{remedy}or try it with --ignore-memory.{off}"


def answering_parts(bundle: Bundle, jobs: Sequence[BuildJob]) -> dict[str, int]:
    """Return the bytes of the engines and of the KV caches and states at their limits.

    An engine is counted as its weights. Scratch memory is not known before the build, and the outputs of a step are small.
    """
    engines = {job.graph: job.weights for job in jobs}
    inputs, (decoder,) = bundle.manifest.graphs[DECODER].inputs, [job for job in jobs if job.graph == DECODER]
    caches = 0
    for name, tensor in inputs.items():
        if "past_" in name:
            limits = [profile[name][2] for profile in decoder.profiles if name in profile]
            shapes = limits or [tuple(map(int, tensor.shape))]
            caches += max(map(math.prod, shapes)) * np.dtype(held_as(tensor.type)).itemsize
    return {**engines, "KV caches": caches}


def trtexec_command(bundle: Bundle, job: BuildJob, settings: BuilderSettings) -> str:
    """Return the `trtexec` command line that builds the same engine, to look at: plans of others are not loaded."""
    command = [JETPACK_TRTEXEC if "JetPack" in bundle.manifest.lowering.target.modules else "trtexec"]
    command += [f"--onnx={bundle.file(job.graph)}", f"--saveEngine={Path(job.graph).stem}.plan", "--stronglyTyped"]
    command += [f"--builderOptimizationLevel={settings.level}", f"--memPoolSize=workspace:{settings.workspace >> 20}M"]
    command += [f"--timingCacheFile={timing_cache()}", "--skipInference", *([] if settings.tf32 else ["--noTF32"])]
    for number, profile in enumerate(job.profiles):
        if profile:
            command += [f"--profile={number}"] if len(job.profiles) > 1 else []
            command += [f"--{end}Shapes={_shapes(profile, index)}" for index, end in enumerate(("min", "opt", "max"))]
    return shlex.join(command)


def _shapes(profile: ShapeProfile, end: int) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shapes[end]))}" for name, shapes in profile.items())


def _build(
    trt: Any,
    bundle: Bundle,
    job: BuildJob,
    identity: DeviceIdentity,
    settings: BuilderSettings,
    store: Store,
    advance: Callable[[str, str, float], None],
    configure: Callable[[Any], None],
) -> EngineRecord:
    started = time.perf_counter()
    built = build_engine(
        trt,
        bundle.file(job.graph),
        job.profiles,
        settings,
        timings=read_timings(),
        configure=configure,
        advance=lambda phase, done: advance(job.graph, phase, done),
    )
    record = EngineRecord(
        graph=job.graph,
        key=job.key,
        tensorrt=identity.tensorrt,
        capability=identity.capability,
        precision=bundle.manifest.precision,
        limits=job.limits,
        level=settings.level,
        bytes=len(built.serialized_engine),
        sha256=hashlib.sha256(built.serialized_engine).hexdigest(),
        seconds=time.perf_counter() - started,
        sms=identity.sms,
        processor=identity.processor,
    )
    store.add(record, built.serialized_engine)
    keep_timings(built.timings)
    return record


def _check_capability(bundle: Bundle, device: DeviceIdentity) -> None:
    precision = bundle.manifest.precision
    least, kind, machines, instead = _CAPABILITIES.get(precision, ((0, 0), "", "", ""))
    if tuple(map(int, device.capability.split("."))) < least:
        raise EngineError(
            f"This GPU (SM {device.capability}) has no {kind}: {bundle.path} is {precision}, for {machines}.",
            hint=f"Export it with --precision {instead}.",
        )


def _found(store: Store, graph: str, key: str) -> EngineRecord | None:
    # A record that this device did not sign must not stop the build that will replace it.
    try:
        return store.find(graph, key)
    except EngineError:
        return None


def _take(other: Store, job: BuildJob, store: Store) -> EngineRecord | None:
    # Copies the engine of another bundle, if it has one that fits.
    record = _found(other, job.graph, job.key)
    if record is not None:
        with other.mapped(record) as plan, memoryview(plan) as content:
            store.add(record, content)
    return record


@dataclass(frozen=True)
class BuildRequest:
    """The arguments of one build.

    `reuse`: other bundles whose engines may be copied. `ignore_memory`: skip the memory check. `sign`: a fleet's private key, in a
    PEM file, that signs the engines for other boards like this one.
    """

    bundle: Bundle
    limits: ProfileLimits
    settings: BuilderSettings
    reuse: tuple[Path, ...] = ()
    ignore_memory: bool = False
    sign: Path | None = None

    @classmethod
    def of(
        cls,
        bundle: Path,
        *,
        reuse: tuple[Path, ...] = (),
        ignore_memory: bool = False,
        sign: Path | None = None,
        level: int = 3,
        workspace: int = 512,
        require_signature: TrustedKeys = (),
        **limits: Any,
    ) -> BuildRequest:
        """Load the bundle and return its request. `workspace` is in MiB. Raises BundleError and UsageError.

        `require_signature`: trusted public keys. One of them must have signed the bundle.
        """
        if sign is not None:
            read_private_key(sign)  # raises before a long build
        for other in reuse:
            Bundle.load(other)
        opened = Bundle.load(bundle, require_signature=require_signature)
        target = opened.manifest.lowering.target
        if target.blocked:
            raise UsageError(
                f"{bundle} was exported for {target.modules}: TensorRT does not read its graphs.",
                hint="Export it with the --target of the JetPack on the device.",
            )
        settings = BuilderSettings(workspace << 20, level, tf32=opened.manifest.precision != "fp32")
        return cls(opened, ProfileLimits(**limits), settings, reuse, ignore_memory, sign)


def plan_build(request: BuildRequest) -> tuple[BuildRequest, list[BuildJob]]:
    """Return a request and its jobs without querying the device."""
    return request, plan_jobs(request.bundle, request.limits, request.settings)


def build_bundle(
    request: BuildRequest,
    advance: Callable[[str, str, float], None] = lambda graph, phase, done: None,
    *,
    trt: Any = None,
    device: DeviceIdentity | None = None,
    machine: Machine | None = None,
    secret: bytes | None = None,
    configure: Callable[[Any], None] = lambda config: None,
) -> list[BuildResult]:
    """Build the missing engines of a bundle, and sign all of them if asked to. Raises EngineError.

    `trt`, `device`, `machine` and `secret` default to those of this machine.
    """
    machine = machine or read_machine()
    trt = trt or tensorrt(machine)
    device = device or identity(trt, load_cudart())
    _check_capability(request.bundle, device)
    store = Store(request.bundle.path, secret)
    store.remove_stale()
    jobs = plan_jobs(request.bundle, request.limits, request.settings, device, store)
    others = [Store(other, secret) for other in request.reuse]
    if not request.ignore_memory:
        check_memory(jobs, request.settings, machine.memory, jetson=machine.is_jetson)
    results = build_jobs(
        trt, request.bundle, jobs, device, request.settings, store, others=others, advance=advance, configure=configure
    )
    if request.sign is not None:
        _sign(request.bundle, store, request.sign)
    return results


def _sign(bundle: Bundle, store: Store, key: Path) -> None:
    for record in store.records():
        if not (record.sms and record.processor):  # which boards it is for is what a signature says
            raise EngineError(
                f"The record of the engine of {record.graph} is of an older version, and does not say for which boards it is.",
                hint=f"Delete {bundle.path / record.file} and build again.",
            )
    sign_engines(bundle.path, key)
