"""The keep plans that LightCompress's methods and settings correspond to.

N is the number of visual tokens. Layers count from 0 in both tools. Read from llmc/compression/token_reduction in April 2026:

FastV, RandomPrune      keep round(N (1 - `rate`)) tokens before layer `pruning_loc`; RandomPrune's ratio is `prune_ratio`
PyramidDrop             keep int(N `image_token_ratio_list[i]`) tokens before layer `layer_list[i]`: a keep ratio of all tokens
SparseVLM               cut after layer `pruning_loc`, that is before the next; counts come from a table, see `_sparsevlm_counts`
DivPrune                keep round(N (1 - `reduction_ratio`)) tokens at the input
VisionZip               keep `dominant` plus `contextual` tokens, or shares of N, at the input

Three departures come from our methods: random tokens are drawn once instead of per image; kept tokens retain their positions,
where LightCompress renumbers those of PyramidDrop; and the tokens of all views of an image are ranked together.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import PlanError
from edgeprune.plan import Cut

NO_EQUAL = {
    "DART": "there it cuts between layers and ranks by their keys, here it acts at the input (--method dart --layer 0)",
    "DyCoke": "it merges the tokens of video frames",
    "FastVID": "it merges the tokens of video frames",
    "FasterVLM": "it ranks by the class token of a CLIP encoder; nearest is --method visionzip",
    "HoliTom": "it merges the tokens of video frames",
    "MustDrop": "it merges tokens inside the vision encoder",
    "PruneVid": "it merges the tokens of video frames",
    "ToMe": "it merges tokens inside the vision encoder",
    "VisPruner": "it ranks by the class token of a CLIP encoder; nearest is --method visionzip",
}
# SparseVLM: tokens kept after layers 2, 6 and 15 by the nominal number of retained tokens, and the keep ratio after a single layer
# by the retained number of 2880 tokens, LightCompress's row keys.
_SPARSEVLM_LAYERS = [2, 6, 15]
_SPARSEVLM_COUNTS = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
_SPARSEVLM_RATIOS = {960: 0.3333, 640: 0.2222, 320: 0.1111, 160: 0.0555}
_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxlevel = 2


def format_value(value: Any) -> str:
    """Return a value of the file, shortened for an error message."""
    return _SHORT_REPR.repr(value)


@dataclass(frozen=True)
class MethodSettings:
    """A method's settings from the file, the seed, and the number of visual tokens and layers of the model.

    The accessors raise PlanError for missing or invalid settings.
    """

    method: str
    settings: Mapping[str, Any]
    tokens: int
    layers: int
    seed: int

    def value(self, name: str) -> Any:
        """Return a required setting."""
        if name not in self.settings:
            raise PlanError(f"{self.method} needs the setting {name!r}.")
        return self.settings[name]

    def share(self, name: str) -> float:
        """Return a number strictly between 0 and 1."""
        return _share(self.value(name), name)

    def flag(self, name: str, default: bool) -> bool:
        """Return a Boolean setting."""
        value = self.settings.get(name, default)
        if not isinstance(value, bool):
            raise PlanError(f"{name} must be true or false, not {format_value(value)}.")
        return value

    def several(self, name: str) -> list[Any]:
        """Return a non-empty list."""
        value = self.value(name)
        if not isinstance(value, list) or not value:
            raise PlanError(f"{name} must be a list, not {format_value(value)}.")
        return value

    def place(self, value: Any, name: str, *, after: bool = False) -> int:
        """Return the layer before which to cut, given the layer that LightCompress cuts before, or `after`."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise PlanError(f"{name} must be the number of a layer, not {format_value(value)}.")
        first, last = (0, self.layers - 2) if after else (1, self.layers - 1)
        if not first <= value <= last:
            raise PlanError(
                f"{name} {value} is no place to cut in a model of {self.layers} layers.", hint=f"Give {first} to {last}."
            )
        return value + after

    def left(self, count: int) -> int:
        """Return a keep budget; raise PlanError if it is below 1."""
        if count < 1:
            raise PlanError(f"these numbers keep none of the image's {self.tokens} visual tokens.", hint="Remove a smaller share.")
        return count


def _share(value: Any, name: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise PlanError(f"{name} must be a number, not {format_value(value)}.")
    if not 0.0 < value < 1.0:
        raise PlanError(f"{name} {value} is outside (0, 1).")
    return float(value)


def _fastv(block: MethodSettings) -> tuple[Cut, ...]:
    layer = block.place(block.value("pruning_loc"), "pruning_loc")
    return (Cut("layer", "fastv", block.left(round(block.tokens * (1 - block.share("rate")))), layer),)


def _random(block: MethodSettings) -> tuple[Cut, ...]:
    metric = block.value("metric")
    if metric != "random":
        raise PlanError(f"the metric {format_value(metric)} has no equal here.", hint="Read is metric: random.")
    layer = block.place(block.value("pruning_loc"), "pruning_loc")
    keep = block.left(round(block.tokens * (1 - block.share("prune_ratio"))))
    return (Cut("layer", "random", keep, layer, block.seed),)


def _pyramiddrop(block: MethodSettings) -> tuple[Cut, ...]:
    layers, shares = block.several("layer_list"), block.several("image_token_ratio_list")
    if len(layers) != len(shares):
        raise PlanError(
            f"layer_list has {len(layers)} entries and image_token_ratio_list {len(shares)}.", hint="Give one for each."
        )
    places = [block.place(layer, "layer_list") for layer in layers]
    keeps = [block.left(int(block.tokens * _share(share, "image_token_ratio_list"))) for share in shares]
    return tuple(Cut("layer", "pyramiddrop", keep, place) for keep, place in zip(keeps, places, strict=True))


def _sparsevlm(block: MethodSettings) -> tuple[Cut, ...]:
    if block.flag("merge_flag", True):
        raise PlanError("merge_flag: dropped tokens are not merged here.", hint="Say merge_flag: False to drop them.")
    if not block.flag("prune_flag", True):
        raise PlanError("prune_flag: False has no equal here.", hint="Leave it out.")
    layers = block.several("pruning_loc") if "pruning_loc" in block.settings else _SPARSEVLM_LAYERS
    places = [block.place(layer, "pruning_loc", after=True) for layer in layers]
    alive, cuts = block.tokens, list[Cut]()
    for count, place in zip(_sparsevlm_counts(block, layers), places, strict=True):
        alive = block.left(min(count, alive - 1))  # every cut drops at least one token
        cuts.append(Cut("layer", "sparsevlm", alive, place))
    return tuple(cuts)


def _sparsevlm_counts(block: MethodSettings, layers: list[Any]) -> tuple[int, ...]:
    # Absolute counts for 192, 128 or 64 retained tokens, regardless of N; for a single layer also keep ratios of N.
    retained, row = _retained_tokens(block)
    if layers == _SPARSEVLM_LAYERS and retained in _SPARSEVLM_COUNTS:
        return _SPARSEVLM_COUNTS[retained]
    if len(layers) == 1 and retained in _SPARSEVLM_COUNTS:
        return (retained,)
    if len(layers) == 1 and row in _SPARSEVLM_RATIOS:
        return (round(_SPARSEVLM_RATIOS[row] * block.tokens),)
    if layers != _SPARSEVLM_LAYERS and len(layers) != 1:
        raise PlanError("SparseVLM's numbers exist for the pruning_loc [2, 6, 15] or for one layer.")
    ratios = "" if layers == _SPARSEVLM_LAYERS else ", or for a reduction_ratio of 0.6667, 0.7778, 0.8889 or 0.9444"
    raise PlanError(
        f"SparseVLM's numbers exist for 192, 128 or 64 retained tokens{ratios}; this retains {retained} of {block.tokens}.",
        hint="Use another reduction_ratio, another image size, or a single layer.",
    )


def _retained_tokens(block: MethodSettings) -> tuple[int, int | None]:
    if "retained_tokens" not in block.settings:
        kept = 1 - block.share("reduction_ratio")
        return round(block.tokens * kept), round(2880 * kept)
    retained = block.value("retained_tokens")
    if "reduction_ratio" in block.settings:
        raise PlanError("retained_tokens and reduction_ratio say the same.", hint="Leave one of them out.")
    if not isinstance(retained, int) or isinstance(retained, bool):
        raise PlanError(f"retained_tokens must be a whole number, not {format_value(retained)}.")
    return retained, None


def _divprune(block: MethodSettings) -> tuple[Cut, ...]:
    return (Cut("input", "divprune", block.left(round((1 - block.share("reduction_ratio")) * block.tokens))),)


def _visionzip(block: MethodSettings) -> tuple[Cut, ...]:
    if block.flag("merge_only", False):
        raise PlanError("merge_only has no equal here.", hint="Leave it out.")
    dominant, contextual = (_visionzip_count(block, name) for name in ("dominant", "contextual"))
    counted = {isinstance(block.value(name), int) for name in ("dominant", "contextual")}
    if len(counted) > 1:
        raise PlanError("dominant and contextual must be two counts of tokens, or two shares.")
    if block.flag("prune_only", False):
        if counted == {False}:
            raise PlanError("prune_only is read beside counts of tokens alone.", hint="Leave it out, or give counts.")
        return (Cut("input", "visionzip", dominant, options={"contextual": 0.0}),)
    keep = dominant + contextual
    share = (contextual + 0.5) / keep  # the method rounds down to exactly `contextual`
    return (Cut("input", "visionzip", keep, options={"contextual": share}),)


def _visionzip_count(block: MethodSettings, name: str) -> int:
    # LLaVA's blocks give counts, Qwen's give shares of N. A contextual share keeps at least one token.
    value = block.value(name)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise PlanError(f"{name} {value} must be 1 or more, or a share in (0, 1).")
        return value
    count = int(_share(value, name) * block.tokens)
    return max(count, 1) if name == "contextual" else block.left(count)


@dataclass(frozen=True)
class Reader:
    """Converts one method's settings to cuts. `names`: the valid settings. `part`: the part of the model that they apply to."""

    cuts: Callable[[MethodSettings], tuple[Cut, ...]]
    names: tuple[str, ...]
    part: str = "language"


READERS = {
    "DivPrune": Reader(_divprune, ("reduction_ratio",)),
    "FastV": Reader(_fastv, ("pruning_loc", "rate")),
    "PyramidDrop": Reader(_pyramiddrop, ("layer_list", "image_token_ratio_list")),
    "RandomPrune": Reader(_random, ("metric", "pruning_loc", "prune_ratio")),
    "SparseVLM": Reader(_sparsevlm, ("pruning_loc", "reduction_ratio", "retained_tokens", "prune_flag", "merge_flag")),
    "VisionZip": Reader(_visionzip, ("dominant", "contextual", "prune_only", "merge_only"), "vision"),
}
