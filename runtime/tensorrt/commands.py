"""What `edgeprune build` does, from its options to the engines in the bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.bundle import Bundle
from edgeprune.bundle.signing import Trusted
from edgeprune.device.machine import Machine, read_machine
from edgeprune.errors import UsageError
from edgeprune.runtime.tensorrt.api import cuda, identity, tensorrt
from edgeprune.runtime.tensorrt.building import Settings
from edgeprune.runtime.tensorrt.jobs import Done, Job, build_jobs, check_memory, jobs_of
from edgeprune.runtime.tensorrt.ranges import Limits
from edgeprune.runtime.tensorrt.store import Identity, Store


@dataclass(frozen=True)
class BuildRequest:
    """A bundle, how long things may get in its engines, how they are built, and whose engines may be taken."""

    bundle: Bundle
    limits: Limits
    settings: Settings
    reuse: tuple[Path, ...] = ()
    ignore_memory: bool = False

    @classmethod
    def of(
        cls,
        bundle: Path,
        *,
        reuse: tuple[Path, ...] = (),
        ignore_memory: bool = False,
        level: int = 3,
        workspace: int = 512,
        require_signature: Trusted = (),
        **limits: Any,
    ) -> BuildRequest:
        """Return the request of a command line; `workspace` in MiB. Raises BundleError and UsageError.

        `require_signature`: public keys, of which one must have signed the bundle.
        """
        for other in reuse:
            Bundle.load(other)
        opened = Bundle.load(bundle, require_signature=require_signature)
        target = opened.manifest.lowering.target
        if target.blocked:
            raise UsageError(
                f"{bundle} was exported for {target.modules}: TensorRT does not read its graphs.",
                hint="Export it with the --target of the JetPack on the device.",
            )
        return cls(opened, Limits(**limits), Settings(workspace << 20, level), reuse, ignore_memory)


def planned(request: BuildRequest) -> tuple[BuildRequest, list[Job]]:
    """Return a request and what it would build, with no look at the device."""
    return request, jobs_of(request.bundle, request.limits, request.settings)


def build_bundle(
    request: BuildRequest,
    advance: Callable[[str, str, float], None] = lambda graph, phase, done: None,
    *,
    trt: Any = None,
    device: Identity | None = None,
    machine: Machine | None = None,
    secret: bytes | None = None,
    configure: Callable[[Any], None] = lambda config: None,
) -> list[Done]:
    """Build the engines that a bundle lacks on this device.

    What is not given is that of this machine: TensorRT's module, what engines fit, its memory and its key. Raises EngineError.
    """
    here = machine or read_machine()
    trt = trt or tensorrt(here)
    device = device or identity(trt, cuda())
    store = Store(request.bundle.path, secret)
    store.tidy()
    jobs = jobs_of(request.bundle, request.limits, request.settings, device, store)
    others = [Store(other, secret) for other in request.reuse]
    if not request.ignore_memory:
        check_memory(jobs, request.settings, here.memory)
    return build_jobs(
        trt, request.bundle, jobs, device, request.settings, store, others=others, advance=advance, configure=configure
    )
