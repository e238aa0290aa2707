"""Keep plans: the cuts that prune a model's visual tokens, and the keep budget of each.

A plan belongs to one model shape and one image geometry; every count in it is a constant of the exported graphs, and is of each
image: a turn of n images keeps n times as many tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import PlanError, renamed
from edgeprune.io.files import write_bytes, write_text
from edgeprune.io.typed_json import from_json, read_json
from edgeprune.plan.geometry import MAX_LAYERS, Geometry
from edgeprune.plan.options import Option, settled
from edgeprune.plan.weights import Weights, read_weights, weights_path

SCHEMA_VERSION, OLDEST_SCHEMA = 3, 2  # 2 had no weights
CLASSES = "classes"  # the form of a decode cut by which each layer has a class
SITES = ("vision", "input", "layer", "cache", "decode")  # in the order in which a plan lists its cuts

_SHA256 = re.compile(r"[0-9a-f]{64}")
_WHAT = "A plan is the JSON file that edgeprune calibrate writes, and a bundle is a folder."
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
    """One place where visual tokens are dropped. `method` chooses the `keep` tokens that stay (at "decode": at least `keep`).

    Sites: "vision" drops whole visual tokens, with all patches merged into them, before block `layer` (1 or more) of the vision
    encoder, the same number in every view. "input" acts before decoder layer 0. "layer" acts before decoder layer `layer` (1 or
    more). "cache" prunes the KV cache of `layer` at the end of prefill, separately for each KV head. "decode" reads fewer entries
    of the caches of `layer` and all later layers while tokens are generated. `seed` is for randomised methods; `options` are
    the method's settings. `weights`: what the method learned from the model, for one that does.
    """

    site: str
    method: str
    keep: int
    layer: int = 0
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise PlanError(f"Unknown site {self.site!r}.", hint=f"Sites are: {', '.join(SITES)}.")
        between = self.site in ("vision", "layer")
        if self.layer < 0 or (self.site == "input" and self.layer != 0) or (between and self.layer == 0):
            least = "1 or more" if between else "0" if self.site == "input" else "0 or more"
            raise PlanError(f"A cut at site {self.site!r} cannot act at layer {self.layer}.", hint=f"Its layer is {least}.")
        if self.keep < 0 or (self.site in ("vision", "input") and self.keep == 0):
            raise PlanError(f"{self} cannot keep {self.keep} tokens.")
        if self.seed < 0:
            raise PlanError(f"{self} cannot draw by the seed {self.seed}.", hint="A seed is 0 or more.")
        if not isinstance(self.options, Mapping):
            raise PlanError(f"The options of {self} must be names and values.")

    @property
    def withdraws(self) -> bool:
        """Whether no visual token is left from this layer of the decoder on."""
        return self.site == "layer" and self.keep == 0

    def __str__(self) -> str:
        return f"{self.method} @ {self.site if self.site == 'input' else f'{self.site} {self.layer}'}"

    def settings(self, *declared: Option, **defaults: Any) -> dict[str, Any]:
        """Return the values of all `declared` options: the cut's, or else the default.

        `defaults`: options without a declaration, of the type of their default. Raises PlanError for an option that is not among
        them, or a value that is not allowed.
        """
        return settled(str(self), self.options, (*declared, *(Option(name, value, "") for name, value in defaults.items())))


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
            if cut.site != "vision" and cut.layer >= self.layers:  # the plan does not have the encoder's depth
                raise beyond_layers(str(cut), self.layers)
        if len(self.weights) > 1:
            raise PlanError("The cuts of a plan name different weights.", hint="Only one of them may be learned.")
        self._check_counts()
        self._check_decode()
        inside = [cut for cut in self.cuts if cut.site in ("layer", "cache", "decode")]
        if self.weighs and (later := next((cut for cut in inside if not cut.withdraws), None)):
            raise PlanError(
                f"{self.input} weighs the tokens that it keeps; {later} would drop some of them.",
                hint="Leave out either the option weigh or the later cuts.",
            )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return getattr(self, renamed("KeepPlan", name, _RENAMED))

    def _check_counts(self) -> None:
        current = self.geometry.tokens
        for cut in self.cuts:
            available = self.tokens_at_layer(cut.layer) if cut.site == "cache" else current
            if cut.keep > available:
                raise PlanError(f"{cut} keeps {cut.keep} tokens, but only {available} are left there.")
            current = cut.keep if cut.site in ("vision", "input", "layer") else current

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
        """Cuts inside the vision encoder."""
        return tuple(cut for cut in self.cuts if cut.site == "vision")

    @property
    def input(self) -> Cut | None:
        """The cut before decoder layer 0, if any."""
        return next((cut for cut in self.cuts if cut.site == "input"), None)

    @property
    def weighs(self) -> bool:
        """Whether the decoder attends to a visual token by how many it stands for (option weigh of the input cut)."""
        return self.input is not None and bool(self.input.options.get("weigh"))

    @property
    def layer_cuts(self) -> tuple[Cut, ...]:
        """Cuts between decoder layers."""
        return tuple(cut for cut in self.cuts if cut.site == "layer")

    @property
    def cache_cuts(self) -> tuple[Cut, ...]:
        """Cuts of KV caches."""
        return tuple(cut for cut in self.cuts if cut.site == "cache")

    @property
    def decode(self) -> Cut | None:
        """The cut that acts during decode steps, if any."""
        return next((cut for cut in self.cuts if cut.site == "decode"), None)

    @property
    def follows_attention(self) -> bool:
        """Whether what the decode cut reads follows attention instead of a schedule."""
        return self.decode is not None and self.decode.options.get("form") != "schedule"

    @property
    def has_classes(self) -> bool:
        """Whether the decode cut gives every layer a class of its own after each prompt (`edgeprune.methods.plphp`)."""
        return self.decode is not None and self.decode.options.get("form") == CLASSES

    @property
    def has_rate_predictor(self) -> bool:
        """Whether a graph predicts the rate of the decode cut at each step."""
        return self.follows_attention and not self.has_classes

    @property
    def weights(self) -> list[Weights]:
        """The weights that cuts have learned: at most one."""
        return list(dict.fromkeys(cut.weights for cut in self.cuts if cut.weights is not None))

    @property
    def tokens_from_encoder(self) -> int:
        """Visual tokens that leave the vision encoder."""
        return [self.geometry.tokens, *(cut.keep for cut in self.vision_cuts)][-1]

    @property
    def tokens_entering_decoder(self) -> int:
        """Visual tokens that enter the decoder."""
        return self.input.keep if self.input else self.tokens_from_encoder

    @property
    def ranks_in_decoder(self) -> bool:
        """Whether visual tokens are ranked inside the decoder, where methods look at the text."""
        return any(cut.keep for cut in (*self.layer_cuts, *self.cache_cuts))

    def encoding(self, block: int) -> int:
        """Return the number of visual tokens in block `block` of the vision encoder."""
        return [self.geometry.tokens, *(cut.keep for cut in self.vision_cuts if cut.layer <= block)][-1]

    def tokens_at_layer(self, layer: int) -> int:
        """Return the number of visual tokens in decoder layer `layer` during prefill."""
        return [self.tokens_entering_decoder, *(cut.keep for cut in self.layer_cuts if cut.layer <= layer)][-1]

    def tokens_cached(self, layer: int) -> int:
        """Return the number of visual tokens in the KV cache of decoder layer `layer` after prefill."""
        return next((cut.keep for cut in self.cache_cuts if cut.layer == layer), self.tokens_at_layer(layer))

    def cache_group(self, layer: int) -> tuple[int, int]:
        """Return a key that is equal for layers whose visual caches have the same length throughout generation."""
        limited = self.decode is not None and layer >= self.decode.layer
        return self.tokens_cached(layer), (1 + layer if self.has_classes else 1) if limited else 0

    def place_layers(self, local: Sequence[int]) -> dict[int, int]:
        """Return, for each of the layers `local`, the first of them whose caches hold the same tokens in every tier."""
        first: dict[Any, int] = {}
        return {layer: first.setdefault(self._same_tokens(layer), layer) for layer in local}

    def _same_tokens(self, layer: int) -> tuple[int, int | None, bool]:
        # A cache cut gives each head tokens of its own, in an order of their own.
        ranked = layer if any(cut.layer == layer for cut in self.cache_cuts) else None
        return sum(cut.layer <= layer for cut in self.layer_cuts), ranked, self.decode is not None and layer >= self.decode.layer

    def with_cuts(self, *cuts: Cut) -> KeepPlan:
        """Return this plan with the cuts added, in plan order."""
        ordered = sorted((*self.cuts, *cuts), key=lambda cut: (SITES.index(cut.site), cut.layer))
        return replace(self, cuts=tuple(ordered))

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically, and the weights of its cuts beside it."""
        for weights in self.weights:
            if weights.content is None:
                raise PlanError("The weights of the plan are not at hand.", hint="Take the plan's own file.")
            write_bytes(weights_path(path), weights.content)
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data, with the sha256 of weights in their place."""
        bare = replace(self, cuts=tuple(replace(cut, weights=None) for cut in self.cuts))
        data = {"schema_version": SCHEMA_VERSION, **asdict(bare)}
        for cut, written in zip(self.cuts, data["cuts"], strict=True):
            written["weights"] = None if cut.weights is None else cut.weights.sha256
        return data

    @classmethod
    def load(cls, path: Path) -> KeepPlan:
        """Read a plan and the weights of its cuts; raise PlanError if the file is not a valid plan of this schema."""
        try:
            return cls.from_dict(read_json(path))._with_weights(path)
        except PlanError as error:
            raise PlanError(f"{path}: {error.message}", hint=error.hint) from error
        except OSError as error:
            raise PlanError(f"Cannot read plan {path}: {error.strerror or error}.", hint=_WHAT) from error
        except UnicodeDecodeError as error:
            raise PlanError(f"{path} is no plan: it is not even text.", hint=_WHAT) from error
        except json.JSONDecodeError as error:
            raise PlanError(f"Plan {path} is not JSON (line {error.lineno}: {error.msg}).", hint=_WHAT) from error
        except ValueError as error:
            raise PlanError(f"Plan {path} cannot be read: {error}.", hint=_WHAT) from error

    def _with_weights(self, path: Path) -> KeepPlan:
        found = {weights: read_weights(path, weights) for weights in self.weights}
        return replace(self, cuts=tuple(replace(cut, weights=found[cut.weights]) if cut.weights else cut for cut in self.cuts))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KeepPlan:
        """Build a plan from JSON data; raise PlanError if it is malformed or of another schema version.

        Of weights it knows no more than their sha256.
        """
        if not isinstance(data, Mapping) or data.get("schema_version") not in range(OLDEST_SCHEMA, SCHEMA_VERSION + 1):
            found = data.get("schema_version") if isinstance(data, Mapping) and "cuts" in data else None
            if found is None:
                raise PlanError("This is no plan: it has no cuts, or no schema version.", hint=_WHAT)
            raise PlanError(f"Plan schema version is {found}, this EdgePrune reads {OLDEST_SCHEMA} to {SCHEMA_VERSION}.")
        try:
            fields = {name: value for name, value in data.items() if name != "schema_version"}
            cuts = fields.pop("cuts", None)
            plan = from_json(cls, {**fields, "geometry": asdict(Geometry.from_dict(fields.get("geometry", {})))}, "plan")
            if not 1 <= plan.layers <= MAX_LAYERS or not isinstance(cuts, (list, tuple)) or len(cuts) > 4 * MAX_LAYERS:
                raise ValueError("plan lacks its list of cuts, or has no layers or far too many")
            return replace(plan, cuts=tuple(_cut(cut, f"cut {number}") for number, cut in enumerate(cuts)))
        except ValueError as error:
            raise PlanError(f"Malformed plan: {error}.") from error


def _cut(data: Any, name: str) -> Cut:
    # In JSON the weights of a cut are the sha256 of their file.
    named = data.get("weights") if isinstance(data, Mapping) else None
    if named is None:
        return from_json(Cut, data, name)
    if not isinstance(named, str) or not _SHA256.fullmatch(named):
        raise ValueError(f"{name}.weights must be a sha256")
    return replace(from_json(Cut, {**data, "weights": None}, name), weights=Weights(named))


def beyond_layers(cut: str, layers: int) -> PlanError:
    """Return the error for a cut that lies beyond the decoder's layers."""
    return PlanError(f"{cut} lies beyond the model's {layers} layers (0 to {layers - 1}).")


def check_keep_ratio(keep: float) -> None:
    """Raise PlanError unless a keep ratio is in (0, 1]."""
    if not 0.0 < keep <= 1.0:
        raise PlanError(f"Keep ratio {keep} is outside (0, 1].", hint="--keep 0.25 keeps 25 % and removes 75 %.")


def keep_count(tokens: int, keep: float, method: str = "") -> int:
    """Return the keep budget of a method for a keep ratio in (0, 1]: rounded as its authors do, at least one."""
    check_keep_ratio(keep)
    return max(1, _ROUNDING.get(method, _down)(tokens * keep))


def _down(count: float) -> int:
    return int(count + 1e-9)


def _up(count: float) -> int:
    return math.ceil(count - 1e-9)


# How the authors' code makes a count of a share, where it does not round down: `round` in FastV's fastv_forward and DivPrune's
# DivPrune, `ceil` in EViT's Attention and in the DART of TensorRT Edge-LLM.
_ROUNDING: dict[str, Callable[[float], int]] = {"dart": _up, "divprune": round, "evit": _up, "fastv": round}


def keep_count_up(tokens: int, share: float) -> int:
    """Return the keep budget for a share, rounded up: at least one token for a share above zero."""
    return math.ceil(tokens * share - 1e-6)
