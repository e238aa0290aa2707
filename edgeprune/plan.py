"""Keep plans: which cuts prune the visual tokens of a model, and how many tokens each keeps.

A plan belongs to one model shape and one image geometry; every count in it is a constant of the exported graphs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.errors import PlanError
from edgeprune.files import write_text

SCHEMA_VERSION = 1
SITES = ("input", "layer")


@dataclass(frozen=True)
class Geometry:
    """The image size a graph is made for, in patches and in visual tokens.

    `patch` and `merge` are the processor's patch size in pixels and the patches merged along each side of a visual token.
    """

    height: int
    width: int
    patch: int
    merge: int

    @property
    def rows(self) -> int:
        """Visual tokens along the height."""
        return self.height // (self.patch * self.merge)

    @property
    def columns(self) -> int:
        """Visual tokens along the width."""
        return self.width // (self.patch * self.merge)

    @property
    def tokens(self) -> int:
        """Visual tokens of one image."""
        return self.rows * self.columns

    def __str__(self) -> str:
        return f"{self.width}x{self.height} px = {self.rows} x {self.columns} visual tokens"


@dataclass(frozen=True)
class Cut:
    """One place where visual tokens leave.

    `site` "input" acts before decoder layer 0, "layer" before decoder layer `layer` (1 or more). `keep` tokens stay, chosen by
    `method`; `seed` matters to methods that draw lots.
    """

    site: str
    method: str
    keep: int
    layer: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise PlanError(f"Unknown site {self.site!r}.", hint=f"Sites are: {', '.join(SITES)}.")
        if (self.site == "input") != (self.layer == 0):
            raise PlanError(f"A cut at site {self.site!r} cannot act before layer {self.layer}.")
        if self.keep < 1:
            raise PlanError(f"A cut must keep at least one token, not {self.keep}.")

    def __str__(self) -> str:
        where = "input" if self.site == "input" else f"layer {self.layer}"
        return f"{self.method} @ {where}"


@dataclass(frozen=True)
class KeepPlan:
    """An ordered list of cuts for one model shape (`family`, `layers`) and one geometry; no cuts means no pruning."""

    family: str
    layers: int
    geometry: Geometry
    cuts: tuple[Cut, ...] = field(default=())

    def __post_init__(self) -> None:
        alive, last = self.geometry.tokens, -1
        for cut in self.cuts:
            if cut.layer <= last:
                raise PlanError(f"The cuts must stand in the order of their layers, one a layer; {cut} does not.")
            if cut.layer >= self.layers:
                raise PlanError(f"{cut} lies beyond the model's {self.layers} layers (0 to {self.layers - 1}).")
            if cut.keep > alive:
                raise PlanError(f"{cut} keeps {cut.keep} tokens, but only {alive} are left there.")
            alive, last = cut.keep, cut.layer

    def alive(self, layer: int) -> int:
        """Return how many visual tokens decoder layer `layer` sees."""
        counts = [self.geometry.tokens, *(cut.keep for cut in self.cuts if cut.layer <= layer)]
        return counts[-1]

    def save(self, path: Path) -> None:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def load(cls, path: Path) -> KeepPlan:
        """Read a plan; raise PlanError when the file is no plan of this schema."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise PlanError(f"Cannot read plan {path}: {error.strerror}.") from error
        except json.JSONDecodeError as error:
            raise PlanError(f"Plan {path} is not JSON (line {error.lineno}: {error.msg}).") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KeepPlan:
        """Return the plan in JSON data; raise PlanError when it is malformed or too new."""
        if not isinstance(data, Mapping) or data.get("schema_version") != SCHEMA_VERSION:
            found = data.get("schema_version") if isinstance(data, Mapping) else None
            raise PlanError(f"Plan schema version is {found}, this EdgePrune reads {SCHEMA_VERSION}.")
        try:
            return cls(
                family=str(data["family"]),
                layers=int(data["layers"]),
                geometry=Geometry(**data["geometry"]),
                cuts=tuple(Cut(**cut) for cut in data["cuts"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"Malformed plan: {error}.") from error


def keep_count(tokens: int, keep: float) -> int:
    """Return how many of `tokens` a keep ratio in (0, 1] leaves: rounded down, at least one."""
    if not 0.0 < keep <= 1.0:
        raise PlanError(f"Keep ratio {keep} is outside (0, 1].", hint="--keep 0.25 keeps 25 % and removes 75 %.")
    return max(1, int(tokens * keep + 1e-9))
