"""What one pass over the calibration samples leaves behind: sums from which many plans can be allocated.

Sums are kept in fixed point, so that adding is exact: the statistics of two shards, added in any order, are those of the whole, bit
for bit. Their size does not depend on the number of samples.
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

SCHEMA_VERSION = 1
SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75)  # of a layer's visual cache, whose cost is measured
STEPS = 128  # decode steps told apart; later ones count as the last
GAMMA_BINS = 200  # of the vision attention score, over [0, 1]
ALPHAS = 101  # FitPrune's tolerance 0.00, 0.01 ... 1.00
_ONE = 2.0**32  # fixed point: a sum of a million values up to 2000 still fits 63 bits


@dataclass(frozen=True)
class StatisticsSource:
    """What statistics belong to: only those of one model, geometry and ranking can be added, or used for its plans.

    `rows`, `reduce` and `spread`: how the caches were ranked (see `edgeprune.methods.plphp`).
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
        """The options of the cache cuts."""
        return {"rows": self.rows, "reduce": self.reduce, "spread": self.spread}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every sum."""
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
            "fitprune": (ALPHAS, layers),
        }


@dataclass(frozen=True)
class Statistics:
    """Sums over `samples` samples, as fixed-point integers by name.

    `gamma` [layers, GAMMA_BINS]: how often a sample's vision attention score fell into a bin.
    `cache_kl`, `cache_flips` [layers, SHARES]: with that share of one layer's visual cache left, the sum over the answer's
    tokens of the KL divergence in nats from the unpruned model, and of changed choices. `coverage` [layers, kv heads, SHARES]:
    the share of the answer's attention to vision that this part of the cache receives. `habit` [layers, kv heads, V]: the answer's
    attention to each place of the image, of its attention to vision. `split` [STEPS, layers, 4] and `steps`
    [STEPS]: attention to system prompt, image, instruction and generated text at each decode step, and how many answers came
    that far. `withdrawn_kl` [layers]: KL of the first answer token with no visual tokens from that layer on. `fitprune` [ALPHAS,
    layers]: tokens that FitPrune leaves in each layer at each tolerance.
    """

    source: StatisticsSource
    samples: int = 0
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def empty(cls, source: StatisticsSource) -> Statistics:
        """Return the statistics of no sample."""
        return cls(source, 0, {name: np.zeros(shape, np.int64) for name, shape in source.shapes().items()})

    def with_sample(self, values: Mapping[str, np.ndarray]) -> Statistics:
        """Return the statistics with one more sample, given its value of every sum."""
        return Statistics(
            self.source, self.samples + 1, {n: s + np.rint(values[n] * _ONE).astype(np.int64) for n, s in self.sums.items()}
        )

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of both sets of samples; raise UsageError when they are of different sources."""
        self.check(other.source)
        return Statistics(self.source, self.samples + other.samples, {name: s + other.sums[name] for name, s in self.sums.items()})

    def check(self, source: StatisticsSource) -> None:
        """Raise UsageError unless the statistics are of this source, naming what differs."""
        mine, theirs = asdict(self.source), asdict(source)
        for name, value in mine.items():
            if value != theirs[name]:
                raise UsageError(
                    f"These statistics are of another {name.replace('_', ' ')}: {value}, not {theirs[name]}.",
                    hint="Collect them again for this model, image size and ranking.",
                )

    def total(self, name: str) -> np.ndarray:
        """Return a sum as floats."""
        total: np.ndarray = self.sums[name] / _ONE
        return total

    def mean(self, name: str) -> np.ndarray:
        """Return a sum divided by the number of samples."""
        if self.samples == 0:
            raise UsageError("There are no samples in these statistics.")
        return self.total(name) / self.samples

    def attention_split(self) -> np.ndarray:
        """Return the mean attention split [STEPS, layers, 4] at each decode step; NaN for steps that no answer reached."""
        counts = self.total("steps")[:, None, None]
        split: np.ndarray = np.full((STEPS, self.source.layers, 4), np.nan)
        np.divide(self.total("split"), counts, out=split, where=counts > 0)
        return split

    def prior(self) -> list[list[list[int]]]:
        """Return for each layer and KV head the places of the image, the most attended first."""
        order = np.argsort(-self.sums["habit"], axis=-1, kind="stable")
        return [[head.tolist() for head in layer] for layer in order]

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.numpy import save

        header = {"schema_version": SCHEMA_VERSION, "samples": self.samples, "source": asdict(self.source)}
        write_bytes(path, save(dict(self.sums), {"edgeprune": json.dumps(header)}))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read a file of statistics; raise UsageError when it is none, or of another schema."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("edgeprune", "{}"))
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no iterator of its own
        except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"Cannot read statistics {path}: {error}.") from error
        version = header.get("schema_version") if isinstance(header, dict) else None
        if version != SCHEMA_VERSION:
            raise UsageError(f"{path} has statistics of schema {version}, this EdgePrune reads {SCHEMA_VERSION}.")
        return cls._parsed(path, header, sums)

    @classmethod
    def _parsed(cls, path: Path, header: dict[str, Any], sums: dict[str, np.ndarray]) -> Statistics:
        try:
            Geometry.from_dict(header["source"]["geometry"])
            source, samples = from_json(StatisticsSource, header["source"], "source"), header["samples"]
            if type(samples) is not int or not 0 <= samples < 2**31:
                raise ValueError("samples must be a count")
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is malformed: {error!r}.", hint="Collect the statistics again.") from error
        found = cls(source, samples, sums)
        shapes = {name: array.shape for name, array in sums.items()}
        if shapes != source.shapes() or any(array.dtype != np.int64 for array in sums.values()):
            raise UsageError(f"{path} lacks sums, or has them in another shape or type.", hint="Collect the statistics again.")
        return found


def merge_files(parts: Sequence[Path], output: Path) -> Statistics:
    """Write the sum of several files of statistics to another one and return it."""
    merged = Statistics.load(parts[0])
    for part in parts[1:]:
        merged = merged + Statistics.load(part)
    merged.save(output)
    return merged
