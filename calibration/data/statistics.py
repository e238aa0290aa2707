"""Statistics of one pass over the calibration samples: sums from which many plans can be allocated.

Sums are stored in fixed point, so that addition is exact: the statistics of shards, added in any order, equal those of all samples
bit for bit. Their size does not depend on the number of samples. Sums that are measured together are a part, and statistics may
lack parts, because some cost far more than others (PARTS).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import UsageError
from edgeprune.io.files import write_bytes
from edgeprune.io.typed_json import from_json
from edgeprune.plan import Geometry

SCHEMA_VERSION = 2  # 1 had other rules of FitPrune and VTW
SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75)  # keep ratios of a layer's visual cache whose cost is measured
STEPS = 128  # decode steps with separate sums; later steps are added to the last
GAMMA_BINS = 200  # histogram bins of the vision attention score over [0, 1]
TOLERANCES = tuple(step / 64 for step in range(65))  # FitPrune's
# The sums that are measured together, by the name of the part; in forward passes a sample, for a decoder of L layers:
# attention 2, caches about 3 L of the answer alone, withdrawals about L / 4, fitprune as many as there are tolerances.
PARTS = {
    "attention": ("gamma", "coverage", "habit", "split", "steps"),
    "caches": ("cache_kl", "cache_flips"),
    "withdrawals": ("withdrawn_kl",),
    "fitprune": ("fitprune",),
}
FINGERPRINTS = 1 << 63  # fingerprints are added modulo this
_SCALE = 2.0**32  # of the fixed point: a sum of a million values up to 2000 still fits 63 bits


@dataclass(frozen=True)
class StatisticsSource:
    """The model, geometry and ranking that statistics were collected with. They must match to add statistics or derive plans.

    `rows`, `reduce` and `spread`: the ranking of the caches (see `edgeprune.methods.plphp`).
    """

    family: str
    layers: int
    kv_heads: int
    weights_sha256: str
    geometry: Geometry
    rows: str
    reduce: str
    spread: bool

    @property
    def ranking(self) -> dict[str, Any]:
        """The ranking options of the cache cuts."""
        return {"rows": self.rows, "reduce": self.reduce, "spread": self.spread}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every sum, by name."""
        layers, shares = self.layers, len(SHARES)
        return {
            "gamma": (layers, GAMMA_BINS),
            "cache_kl": (layers, shares),
            "cache_flips": (layers, shares),
            "coverage": (layers, self.kv_heads, shares),
            "habit": (layers, self.kv_heads, self.geometry.tokens),
            "split": (STEPS, layers, 4),
            "steps": (STEPS,),
            "withdrawn_kl": (layers,),
            "fitprune": (len(TOLERANCES), layers),
        }


@dataclass(frozen=True)
class Statistics:
    """Sums over `samples` samples, as fixed-point integers by name.

    - `gamma` [layers, GAMMA_BINS]: histogram of the samples' vision attention scores.
    - `cache_kl`, `cache_flips` [layers, SHARES]: KL divergence in nats from the unpruned model and number of changed tokens, summed
      over the answer, with this keep ratio of one layer's visual cache.
    - `coverage` [layers, KV heads, SHARES]: share of the answer's attention to visual tokens that these kept tokens receive.
    - `habit` [layers, KV heads, V]: share of the answer's attention to visual tokens that each image position receives.
    - `split` [STEPS, layers, 4], `steps` [STEPS]: attention to system prompt, image, instruction and generated text at each decode
      step, and the number of answers that reached the step.
    - `withdrawn_kl` [layers]: KL(withdrawn || unpruned) at the first answer token, without visual tokens from this layer on.
    - `fitprune` [TOLERANCES, layers]: tokens that enter each layer by FitPrune at each tolerance.

    `fingerprint`: the sum of the samples' fingerprints, modulo 2^63, by which parts of the same samples are told.
    """

    source: StatisticsSource
    samples: int = 0
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)
    fingerprint: int = 0

    @classmethod
    def empty(cls, source: StatisticsSource, parts: Sequence[str] = tuple(PARTS)) -> Statistics:
        """Return some parts of statistics over zero samples."""
        names = [name for part in parts for name in PARTS[part]]
        return cls(source, 0, {name: np.zeros(source.shapes()[name], np.int64) for name in names})

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that were collected, of PARTS."""
        return tuple(part for part, names in PARTS.items() if set(names) <= set(self.sums))

    def with_sample(self, values: Mapping[str, np.ndarray], fingerprint: int = 0) -> Statistics:
        """Return the statistics with one more sample; `values`: its contribution to every sum, by name."""
        sums = {name: total + np.rint(values[name] * _SCALE).astype(np.int64) for name, total in self.sums.items()}
        return Statistics(self.source, self.samples + 1, sums, (self.fingerprint + fingerprint) % FINGERPRINTS)

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of both sets of samples; raise UsageError if their sources or parts differ."""
        self.check(other.source)
        if self.parts != other.parts:
            raise UsageError(f"These statistics have the parts {', '.join(self.parts)}, others {', '.join(other.parts)}.")
        sums = {name: total + other.sums[name] for name, total in self.sums.items()}
        return Statistics(self.source, self.samples + other.samples, sums, (self.fingerprint + other.fingerprint) % FINGERPRINTS)

    def with_parts(self, other: Statistics) -> Statistics:
        """Return the statistics with the parts of others over the same samples, which the caller has checked."""
        return Statistics(self.source, self.samples, {**self.sums, **other.sums}, self.fingerprint)

    def check(self, source: StatisticsSource) -> None:
        """Raise UsageError that names the first difference unless the statistics have this source."""
        expected = asdict(source)
        for name, value in asdict(self.source).items():
            if value != expected[name]:
                raise UsageError(
                    f"These statistics are of another {name.replace('_', ' ')}: {value}, not {expected[name]}.",
                    hint="Collect them again for this model, image size and ranking.",
                )

    def total(self, name: str) -> np.ndarray:
        """Return a sum as floats."""
        total: np.ndarray = self.sums[name] / _SCALE
        return total

    def mean(self, name: str) -> np.ndarray:
        """Return a sum divided by the number of samples; raise UsageError if there are none."""
        if self.samples == 0:
            raise UsageError("There are no samples in these statistics.")
        return self.total(name) / self.samples

    def attention_split(self) -> np.ndarray:
        """Return the mean attention shares [STEPS, layers, 4] at each decode step; NaN for steps that no answer reached."""
        counts = self.total("steps")[:, None, None]
        split: np.ndarray = np.full((STEPS, self.source.layers, 4), np.nan)
        np.divide(self.total("split"), counts, out=split, where=counts > 0)
        return split

    def prior(self) -> list[list[list[int]]]:
        """Return the image positions for each layer and KV head, most attended first."""
        order = np.argsort(-self.sums["habit"], axis=-1, kind="stable")
        return [[head.tolist() for head in layer] for layer in order]

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically."""
        from safetensors.numpy import save

        header = {
            "schema_version": SCHEMA_VERSION,
            "samples": self.samples,
            "fingerprint": self.fingerprint,
            "source": asdict(self.source),
        }
        write_bytes(path, save(dict(self.sums), {"edgeprune": json.dumps(header)}))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read a statistics file; raise UsageError if it is unreadable, malformed or of another schema version."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("edgeprune", "{}"))
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open is not iterable
        except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"Cannot read statistics {path}: {error}.") from error
        version = header.get("schema_version") if isinstance(header, dict) else None
        if version != SCHEMA_VERSION:
            hint = "Collect them again." if version == 1 else ""
            raise UsageError(f"{path} has statistics of schema {version}, this EdgePrune reads {SCHEMA_VERSION}.", hint=hint)
        return cls._parse(path, header, sums)

    @classmethod
    def _parse(cls, path: Path, header: dict[str, Any], sums: dict[str, np.ndarray]) -> Statistics:
        try:
            Geometry.from_dict(header["source"]["geometry"])
            source, samples = from_json(StatisticsSource, header["source"], "source"), header["samples"]
            fingerprint = header.get("fingerprint", 0)
            if type(samples) is not int or not 0 <= samples < 2**31:
                raise ValueError("samples must be a count")
            if type(fingerprint) is not int or not 0 <= fingerprint < FINGERPRINTS:
                raise ValueError("fingerprint must be a sum")
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is malformed: {error!r}.", hint="Collect the statistics again.") from error
        found = cls(source, samples, sums, fingerprint)
        whole = {name: source.shapes()[name] for part in found.parts for name in PARTS[part]}
        shapes = {name: array.shape for name, array in sums.items()}
        if not whole or shapes != whole or any(array.dtype != np.int64 for array in sums.values()):
            raise UsageError(f"{path} lacks sums, or has them in another shape or type.", hint="Collect the statistics again.")
        return found


def merge_files(parts: Sequence[Path], output: Path) -> Statistics:
    """Add the statistics of several files, write the sum to `output` and return it."""
    merged = Statistics.load(parts[0])
    for part in parts[1:]:
        merged = merged + Statistics.load(part)
    merged.save(output)
    return merged
