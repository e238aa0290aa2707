"""Read LightCompress's token-reduction settings (YAML) as keep plans, and plan files of either format.

LightCompress (ModelTC, formerly llmc) prunes in eager PyTorch. A configuration names one method and its parameters under `sparse`,
`token_reduction` or `special`. The whole file or one of these blocks is accepted. Parameters have the meaning that LightCompress's
code gives them (see `lightcompress_methods`). Of the sections on its model, data and output, only `base.seed` is read. Settings
that a plan cannot express raise a PlanError that names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.calibration.interop.lightcompress_methods import NO_EQUAL, READERS, MethodSettings, format_value
from edgeprune.errors import PlanError, require_extra
from edgeprune.plan import KeepPlan

SUFFIXES = (".yml", ".yaml")
_OTHER_SECTIONS = {"base", "model", "calib", "eval", "save", "ignored_layers", "opencompass"}  # sections unrelated to pruning
_EXAMPLE = "For example: special: {method: FastV, pruning_loc: 3, rate: 0.778}"
_ANY = "TokenReduction"  # LightCompress's base class of all methods
_PARTS = ("vision", "language", "video_gen")


def is_lightcompress(path: Path) -> bool:
    """Return whether a plan file is LightCompress YAML. It has no token counts: these depend on model and image size."""
    return path.suffix.lower() in SUFFIXES


def read_plan(path: Path, base: KeepPlan) -> KeepPlan:
    """Read a plan file: a keep plan (JSON), or LightCompress settings (YAML), whose cuts are added to `base`."""
    return read_lightcompress(path, base) if is_lightcompress(path) else KeepPlan.load(path)


def read_lightcompress(path: Path, base: KeepPlan) -> KeepPlan:
    """Return `base` with the cuts of a LightCompress file.

    `base`: the unpruned plan of the model and image size. Raises PlanError with a one-line message that names the file if the
    settings are malformed or not supported.
    """
    require_extra("export", "yaml")
    try:
        return _plan(_parse(path.read_text(encoding="utf-8")), base)
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error.message}", hint=error.hint) from error


def _parse(text: str) -> Any:
    import yaml

    try:
        _refuse_duplicates(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise PlanError(f"this is not YAML ({where}{problem or str(error).splitlines()[0]}).") from error
    except (RecursionError, ValueError, AttributeError, KeyError, TypeError) as error:  # raised by PyYAML for unusual values
        raise PlanError(f"this YAML cannot be read ({type(error).__name__}).") from error


def _refuse_duplicates(root: Any) -> None:
    # PyYAML silently keeps the last of duplicate names.
    pending, visited = [root], set[int]()
    while pending:
        node = pending.pop()
        if id(node) in visited or not hasattr(node, "value") or isinstance(node.value, str):
            continue
        visited.add(id(node))
        names = [item[0].value for item in node.value if isinstance(item, tuple) and isinstance(item[0].value, str)]
        duplicate = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if duplicate is not None:
            raise PlanError(f"{duplicate!r} stands twice in one block (line {node.start_mark.line + 1}).")
        for item in node.value:
            pending.extend(item if isinstance(item, tuple) else (item,))


@dataclass(frozen=True)
class _Request:
    # The parsed file, not yet checked against a model. `part`: the part of the model that is pruned.
    method: str
    settings: Mapping[str, Any]
    part: str | None = None
    seed: int = 0


def _plan(data: Any, base: KeepPlan) -> KeepPlan:
    request = _parse_request(data)
    if request.method in NO_EQUAL:
        raise PlanError(f"{request.method} has no equal here: {NO_EQUAL[request.method]}.", hint=_known_methods_hint())
    if request.method not in READERS:
        raise PlanError(f"unknown method {format_value(request.method)}.", hint=_known_methods_hint())
    reader = READERS[request.method]
    if request.part not in (None, reader.part):
        raise PlanError(f"{request.method} under {request.part!r} has no equal here.", hint=f"It is read under {reader.part!r}.")
    unknown = [name for name in request.settings if name not in reader.names]
    if unknown:
        raise PlanError(
            f"{request.method} has no setting {format_value(unknown[0])}.",
            hint=f"Settings of {request.method}: {', '.join(reader.names)}.",
        )
    block = MethodSettings(request.method, request.settings, base.tokens_entering_decoder, base.layers, request.seed)
    return replace(base, cuts=reader.cuts(block))  # in file order; the plan checks the order


def _known_methods_hint() -> str:
    return f"Methods that are read: {', '.join(READERS)}."


def _parse_request(data: Any) -> _Request:
    outer = _mapping(data, "the file")
    if "sparse" not in outer and "quant" not in outer:
        return _unwrap(outer, None, 0)
    if "sparse" in outer and "quant" in outer:
        raise PlanError("of 'sparse' and 'quant' LightCompress reads only the second.", hint="Leave one of them out.")
    section = "sparse" if "sparse" in outer else "quant"
    _refuse_others(outer, {section, *_OTHER_SECTIONS}, "a section that is not known")
    inner = _mapping(outer[section], section)
    if section == "quant":
        _refuse_others(inner, {"token_reduction"}, "no part of a keep plan", "Leave it out, and quantize with --precision.")
    seed = _mapping(outer.get("base", {}), "base").get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise PlanError(f"base.seed must be a whole number of 0 or more, not {format_value(seed)}.")
    parts = [name for name in _PARTS if name in inner]
    if not parts:
        return _unwrap(inner, None, seed)
    _refuse_others(inner, {parts[0]}, f"not read beside {parts[0]!r}")
    return _unwrap(_mapping(inner[parts[0]], parts[0]), parts[0], seed)


def _unwrap(block: Mapping[str, Any], part: str | None, seed: int) -> _Request:
    if "token_reduction" in block:
        _refuse_others(block, {"token_reduction"}, "not read beside 'token_reduction'")
        block = _mapping(block["token_reduction"], "token_reduction")
    settings = block
    if "special" in block:
        _refuse_others(block, {"method", "special"}, "not read beside 'special'")
        settings = _mapping(block["special"], "special")
    names = [part["method"] for part in (block, settings) if part.get("method", _ANY) != _ANY]
    if not names:
        raise PlanError("there is no token-reduction method.", hint=_EXAMPLE)
    if not isinstance(names[0], str) or names[0] != names[-1]:
        raise PlanError(f"the method must be one name, not {' and '.join(map(format_value, names))}.", hint=_EXAMPLE)
    return _Request(names[0], {name: value for name, value in settings.items() if name != "method"}, part, seed)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PlanError(f"{name} must be names and values, not {format_value(value)}.", hint=_EXAMPLE)
    return value


def _refuse_others(block: Mapping[str, Any], known: set[str], why: str, hint: str = "Leave it out.") -> None:
    other = next((name for name in block if name not in known), None)
    if other is not None:
        raise PlanError(f"{format_value(other)} is {why}.", hint=hint)
