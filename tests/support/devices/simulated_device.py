"""A bundle prepared for the simulated device, and loaded from its engines there."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from typing import Any

from device_simulation import SimulatedDriver, simulated_plan, simulated_tensorrt

from edgeprune.bundle import Bundle, float32_graph
from edgeprune.runtime import Runtime, load
from edgeprune.runtime.backends.tensorrt.backend import TensorRTBackend
from edgeprune.runtime.backends.tensorrt.bindings import DeviceIdentity
from edgeprune.runtime.backends.tensorrt.profiles import ProfileLimits, shape_profiles
from edgeprune.runtime.backends.tensorrt.store import EngineRecord, Store, engine_key

ORIN = DeviceIdentity("10.3.0", "8.7")
SECRET = b"a device's own key, 32 bytes long"
LIMITS = ProfileLimits(context=256, turn=96, images=2, unpruned=True)


def prepare(bundle: Bundle, limits: ProfileLimits = LIMITS) -> Store:
    """Put engines of the simulated TensorRT into a bundle."""
    store = Store(bundle.path, SECRET)
    for graph, profiles in shape_profiles(bundle, limits).items():
        played = float32_graph(graph) if float32_graph(graph) in bundle.manifest.files else graph  # ONNX Runtime plays it
        plan = simulated_plan(bundle.file(played), asdict(bundle.manifest.graphs[graph]), profiles)
        key = engine_key(bundle, graph, ORIN, profiles, 3)
        digest = hashlib.sha256(plan).hexdigest()
        of = bundle.manifest.precision
        record = EngineRecord(graph, key, ORIN.tensorrt, ORIN.capability, of, limits, 3, len(plan), digest, 1.0)
        store.add(record, plan)
    return store


def on_device(bundle: Bundle, driver: SimulatedDriver, **changed: Any) -> Runtime:
    given: dict[str, Any] = {"store": Store(bundle.path, SECRET), "device": ORIN} | changed
    engine = TensorRTBackend(bundle, simulated_tensorrt(driver), driver, **given)
    return Runtime(replace(load(bundle.path)._pipeline, backend=engine))
