"""Keep plans: which cuts prune the visual tokens of a model, and how many tokens each keeps.

A plan belongs to one model shape and one image geometry; every count in it is a constant of the exported graphs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import PlanError, renamed
from edgeprune.io.files import write_text
from edgeprune.io.typed_json import from_json, read_json
from edgeprune.plan.geometry import MAX_LAYERS, Geometry

SCHEMA_VERSION = 2
SITES = ("vision", "input", "layer", "cache", "decode")  # in the order in which a plan lists its cuts

_RENAMED = {  # old public names, which work for one release
    "live": "follows_attention",
    "encoded": "tokens_from_encoder",
    "seen": "tokens_entering_decoder",
    "alive": "tokens_at_layer",
    "stored": "tokens_cached",
    "cache_stage": "cache_group",
}


@dataclass(frozen=True)
class Cut:
    """One place where visual tokens leave.

    `site` "vision": before block `layer` (1 or more) of the vision encoder, whole visual tokens with all patches that are merged
    into them, as many of every view. "input": before decoder layer 0. "layer": before decoder layer `layer` (1 or more), for all
    later ones. "cache": at the end of prefill, from the KV cache of `layer` alone, each KV head its own. "decode": while tokens are
    generated, from the caches of `layer` and all later ones. `keep` tokens stay (at "decode": at least), chosen by `method`; `seed`
    matters to methods that draw lots; `options` are the method's own settings.
    """

    site: str
    method: str
    keep: int
    layer: int = 0
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise PlanError(f"Unknown site {self.site!r}.", hint=f"Sites are: {', '.join(SITES)}.")
        between = self.site in ("vision", "layer")
        if self.layer < 0 or (self.site == "input" and self.layer != 0) or (between and self.layer == 0):
            raise PlanError(f"A cut at site {self.site!r} cannot act at layer {self.layer}.")
        if self.keep < 0 or (self.site in ("vision", "input") and self.keep == 0):
            raise PlanError(f"{self} cannot keep {self.keep} tokens.")
        if not isinstance(self.options, Mapping):
            raise PlanError(f"The options of {self} must be names and values.")

    def __str__(self) -> str:
        return f"{self.method} @ {self.site if self.site == 'input' else f'{self.site} {self.layer}'}"

    def settings(self, **defaults: Any) -> dict[str, Any]:
        """Return the method's settings: `defaults`, and over them the cut's options; raise PlanError for one that is no setting."""
        for name, value in self.options.items():
            if name not in defaults:
                known = f"Options of {self.method}: {', '.join(defaults)}." if defaults else f"{self.method} has no options."
                raise PlanError(f"{self} has the unknown option {name!r}.", hint=known)
            expected = type(defaults[name])
            if not isinstance(value, (int, float) if expected is float else expected) or isinstance(value, bool) != (
                expected is bool
            ):
                raise PlanError(f"Option {name!r} of {self} must be of type {expected.__name__}, not {value!r}.")
        return {**defaults, **self.options}


@dataclass(frozen=True)
class KeepPlan:
    """An ordered list of cuts for one model shape (`family`, `layers`) and one geometry; no cuts means no pruning."""

    family: str
    layers: int
    geometry: Geometry
    cuts: tuple[Cut, ...] = field(default=())

    def __post_init__(self) -> None:
        places = [(SITES.index(cut.site), cut.layer) for cut in self.cuts]
        for cut, before, place in zip(self.cuts[1:], places, places[1:], strict=False):
            if place <= before:
                raise PlanError(f"The cuts must stand in the order of their sites and layers, one at each; {cut} does not.")
        for cut in self.cuts:
            if cut.site != "vision" and cut.layer >= self.layers:  # how deep the encoder is, the plan does not say
                raise PlanError(f"{cut} lies beyond the model's {self.layers} layers (0 to {self.layers - 1}).")
        self._check_counts()
        self._check_decode()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return getattr(self, renamed("KeepPlan", name, _RENAMED))

    def _check_counts(self) -> None:
        alive = self.geometry.tokens
        for cut in self.cuts:
            left = self.tokens_at_layer(cut.layer) if cut.site == "cache" else alive
            if cut.keep > left:
                raise PlanError(f"{cut} keeps {cut.keep} tokens, but only {left} are left there.")
            alive = cut.keep if cut.site in ("vision", "input", "layer") else alive

    def _check_decode(self) -> None:
        if self.decode is None:
            return
        ranked = {cut.layer for cut in self.cache_cuts}
        missing = next((layer for layer in range(self.decode.layer, self.layers) if layer not in ranked), None)
        if missing is not None:
            raise PlanError(
                f"{self.decode} needs a cache cut in every layer from {self.decode.layer} on; layer {missing} has none.",
                hint="A cache cut may keep every token: it ranks them, so that a smaller budget is a prefix.",
            )

    @property
    def vision_cuts(self) -> tuple[Cut, ...]:
        """The cuts inside the vision encoder."""
        return tuple(cut for cut in self.cuts if cut.site == "vision")

    @property
    def input(self) -> Cut | None:
        """The cut before layer 0, if any."""
        return next((cut for cut in self.cuts if cut.site == "input"), None)

    @property
    def layer_cuts(self) -> tuple[Cut, ...]:
        """The cuts between layers."""
        return tuple(cut for cut in self.cuts if cut.site == "layer")

    @property
    def cache_cuts(self) -> tuple[Cut, ...]:
        """The cuts of KV caches."""
        return tuple(cut for cut in self.cuts if cut.site == "cache")

    @property
    def decode(self) -> Cut | None:
        """The cut that acts while tokens are generated, if any."""
        return next((cut for cut in self.cuts if cut.site == "decode"), None)

    @property
    def follows_attention(self) -> bool:
        """Whether the rate of the decode cut follows attention, step by step, instead of a schedule."""
        return self.decode is not None and self.decode.options.get("form") != "schedule"

    @property
    def tokens_from_encoder(self) -> int:
        """Visual tokens that leave the vision encoder."""
        return [self.geometry.tokens, *(cut.keep for cut in self.vision_cuts)][-1]

    @property
    def tokens_entering_decoder(self) -> int:
        """Visual tokens that enter the decoder."""
        return self.input.keep if self.input else self.tokens_from_encoder

    def encoding(self, block: int) -> int:
        """Return how many visual tokens block `block` of the vision encoder sees."""
        return [self.geometry.tokens, *(cut.keep for cut in self.vision_cuts if cut.layer <= block)][-1]

    def tokens_at_layer(self, layer: int) -> int:
        """Return how many visual tokens decoder layer `layer` sees in prefill."""
        return [self.tokens_entering_decoder, *(cut.keep for cut in self.layer_cuts if cut.layer <= layer)][-1]

    def tokens_cached(self, layer: int) -> int:
        """Return how many visual tokens the KV cache of decoder layer `layer` holds after prefill."""
        return next((cut.keep for cut in self.cache_cuts if cut.layer == layer), self.tokens_at_layer(layer))

    def cache_group(self, layer: int) -> tuple[int, bool]:
        """Return what all layers have in common whose visual caches are of one length throughout generation."""
        return self.tokens_cached(layer), self.decode is not None and layer >= self.decode.layer

    def with_cuts(self, *cuts: Cut) -> KeepPlan:
        """Return this plan with these cuts added at their places."""
        ordered = sorted((*self.cuts, *cuts), key=lambda cut: (SITES.index(cut.site), cut.layer))
        return replace(self, cuts=tuple(ordered))

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
            return cls.from_dict(read_json(path))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"Cannot read plan {path}: {getattr(error, 'strerror', None) or error}.") from error
        except json.JSONDecodeError as error:
            raise PlanError(f"Plan {path} is not JSON (line {error.lineno}: {error.msg}).") from error
        except ValueError as error:
            raise PlanError(f"Plan {path} cannot be read: {error}.") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KeepPlan:
        """Return the plan in JSON data; raise PlanError when it is malformed or too new."""
        if not isinstance(data, Mapping) or data.get("schema_version") != SCHEMA_VERSION:
            found = data.get("schema_version") if isinstance(data, Mapping) else None
            raise PlanError(f"Plan schema version is {found}, this EdgePrune reads {SCHEMA_VERSION}.")
        try:
            given = {name: value for name, value in data.items() if name != "schema_version"}
            listed = given.pop("cuts", None)
            plan = from_json(cls, {**given, "geometry": asdict(Geometry.from_dict(given.get("geometry", {})))}, "plan")
            if not 1 <= plan.layers <= MAX_LAYERS or not isinstance(listed, (list, tuple)) or len(listed) > 4 * MAX_LAYERS:
                raise ValueError("plan lacks its list of cuts, or has no layers or far too many")
            return replace(plan, cuts=tuple(from_json(Cut, cut, f"cut {number}") for number, cut in enumerate(listed)))
        except ValueError as error:
            raise PlanError(f"Malformed plan: {error}.") from error


def check_keep_ratio(keep: float) -> None:
    """Raise PlanError unless a keep ratio is in (0, 1]."""
    if not 0.0 < keep <= 1.0:
        raise PlanError(f"Keep ratio {keep} is outside (0, 1].", hint="--keep 0.25 keeps 25 % and removes 75 %.")


def keep_count(tokens: int, keep: float) -> int:
    """Return how many of `tokens` a keep ratio in (0, 1] leaves: rounded down, at least one."""
    check_keep_ratio(keep)
    return max(1, int(tokens * keep + 1e-9))


def keep_count_up(tokens: int, share: float) -> int:
    """Return how many of `tokens` a share keeps: rounded up, so that a share above zero never keeps nothing."""
    return math.ceil(tokens * share - 1e-6)
