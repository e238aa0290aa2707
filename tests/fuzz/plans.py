"""Keep plans, tiers of them, and LightCompress's settings."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from edgeprune.calibration.interop.lightcompress import read_plan
from edgeprune.plan import Cut, Geometry, KeepPlan, View
from edgeprune.plan.presets import unpruned_plan
from edgeprune.plan.tiers import Tiers, budgets, cache_group, tokens_at_layer
from fuzz.conforming import check_type
from fuzz.files import in_file
from fuzz.mutations import json_variant, text_variant
from fuzz.target import Target, demand

_BASE = unpruned_plan("qwen2_vl", 8, Geometry(192, 192, 16, 1))
_VIEWS = (View(0, 0, 28, 28, 2, 2), View(0, 28, 28, 28, 2, 2, separators=1, time=1))
_LAYER = _BASE.with_cuts(Cut("layer", "fastv", 72, 2), Cut("layer", "pyramiddrop", 9, 5))
_WHOLE = KeepPlan(
    "qwen2_vl",
    3,
    Geometry(28, 56, 14, 1, _VIEWS, frames=2, fps=1.5),
    (
        Cut("vision", "tome", 8, 1),
        Cut("input", "random", 7, seed=3),
        Cut("layer", "fastv", 5, 1, options={"rate": 0.5}),
        *(Cut("cache", "plphp", 4, layer, options={"rows": "last", "spread": True}) for layer in range(3)),
        Cut("decode", "dyrate", 2, 0, options={"form": "schedule"}),
    ),
)
_FASTEST = _LAYER.with_cuts(Cut("input", "divprune", 72))
_SETTINGS = (
    "base: {seed: &seed 42}\nmodel: {type: Llava}\nsparse:\n  method: TokenReduction\n  special:\n    method: FastV\n"
    "    pruning_loc: 3\n    rate: 0.778  # a share\nsave:\n  save_trans: False\n",
    "special: {method: RandomPrune, metric: random, pruning_loc: 2, prune_ratio: 0.5}",
    "special: {method: PyramidDrop, layer_list: [2, 4], image_token_ratio_list: [0.5, 0.25]}",
    "sparse: {language: {method: TokenReduction, special: {method: SparseVLM, pruning_loc: [2, 6, 15], retained_tokens: 64, "
    "merge_flag: False}}}",
    "sparse: {vision: {method: TokenReduction, special: {method: VisionZip, dominant: 54, contextual: 10}}}",
    "quant: {token_reduction: {method: DivPrune, special: {reduction_ratio: 0.9}}}",
)
_YAML: tuple[str, ...] = (
    "&a ",
    "*a",
    "!!python/object:os.system ",
    "? ",
    "<<: *a",
    "- ",
    "\t",
    "0o17",
    "1:30:00",
    ".inf",
    "1_000",
    "|\n",
    "%YAML 9\n",
)
_YAML += ("[" * 300, "{a: " * 300, "9" * 5000, "!!binary x", "2001-99-99", "!!set {a}", "!!timestamp 1", "---\n", "\0", "\u2028")


_PAIR = {"all": _BASE.to_dict(), "some": _LAYER.to_dict()}


def _settle(plan: KeepPlan) -> None:
    check_type(plan, KeepPlan, "the plan")
    geometry = plan.geometry
    demand(
        min(geometry.height, geometry.width, geometry.patch, geometry.merge, geometry.frames, plan.layers) >= 1, "a size below 1"
    )
    demand(geometry.tokens >= 1, "no visual tokens")
    for layer in (0, plan.layers - 1):
        demand(0 <= plan.tokens_cached(layer) <= geometry.tokens, "a cache that holds more than there is")
        demand(
            0
            <= plan.tokens_at_layer(layer)
            <= plan.tokens_entering_decoder
            <= plan.tokens_from_encoder
            <= plan.encoding(0)
            <= geometry.tokens,
            "counts that grow",
        )
    demand(KeepPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan, "a plan that changes when it is written")
    demand(str(geometry).isprintable() and isinstance(plan.follows_attention, bool), "no words for it")


def _load(data: bytes) -> bool:
    plan = KeepPlan.load(in_file(data, "plan.json"))
    _settle(plan)
    for cut in plan.cuts:
        cut.settings(**{name: value for name, value in cut.options.items() if isinstance(value, (str, bool, float))})
    return True


def plans() -> Target:
    """Return the target of plan.json."""
    return Target(_load, tuple(json.dumps(plan.to_dict()).encode() for plan in (_BASE, _LAYER, _WHOLE)), json_variant)


def _load_tiers(data: bytes) -> bool:
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict):
        return False
    loaded = Tiers.of({name: KeepPlan.from_dict(each) for name, each in value.items()})
    every = [*loaded.plans.values()]
    for plan in every:
        _settle(plan)
    for cut in every[0].cuts:
        counts = budgets(every, cut)
        demand(list(counts) == sorted(counts, reverse=True), "tiers that keep more as they fall")
    demand(len(tokens_at_layer(every, 0)) == len(cache_group(every, 0)) == len(loaded.lower_tiers) + 1, "a tier that is lost")
    return True


def tiers() -> Target:
    """Return the target of plans that belong together."""
    lower = _LAYER.to_dict() | {"cuts": [{**cut, "keep": cut["keep"] // 2} for cut in _LAYER.to_dict()["cuts"]]}
    pairs: tuple[dict[str, Any], ...] = (
        {"quality": _LAYER.to_dict(), "fast": lower},
        {"all": _BASE.to_dict(), "some": _LAYER.to_dict()},
    )
    pairs += ({"a": _FASTEST.to_dict(), "b": _FASTEST.to_dict(), "c": _FASTEST.to_dict()},)
    return Target(_load_tiers, tuple(json.dumps(pair).encode() for pair in pairs), json_variant)


def _read_settings(data: bytes) -> bool:
    _settle(read_plan(in_file(data, "settings.yml"), _BASE))
    return True


def _yaml_variant(data: bytes, random: Random) -> bytes:
    text = data.decode("utf-8", "replace")
    for _ in range(random.choice((1, 1, 2, 3))):
        place = random.randrange(len(text) + 1)
        odd = text[:place] + random.choice(_YAML) + text[place:]
        lines = text.splitlines(keepends=True) or [""]
        line = random.randrange(len(lines))
        lines[line:line] = [random.choice(lines)]
        text = random.choice((odd, "".join(lines), text_variant(text, random), _other_number(text, random)))[:4000]
    return text.encode("utf-8", "surrogatepass")


def _other_number(text: str, random: Random) -> str:
    digits = [place for place, character in enumerate(text) if character.isdigit()]
    if not digits:
        return text
    place = random.choice(digits)
    return text[:place] + random.choice(("0", "1", "9", "-1", "1e9", "true", "null", "''", "[]", "{}", "0.1")) + text[place + 1 :]


def settings() -> Target:
    """Return the target of LightCompress's YAML."""
    return Target(_read_settings, tuple(text.encode() for text in _SETTINGS), _yaml_variant)
