"""Tables of pruning methods and model families, and which method applies at which site of which family.

A new method or family is one file and one line here. Modules are imported on use: listing is fast, and the runtime needs no torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from typing import Any

from edgeprune.errors import UnsupportedModelError, UsageError, did_you_mean
from edgeprune.plan import SITES, Option

METHODS = {
    "cdpruner": "edgeprune.methods.cdpruner:CDPruner",
    "dart": "edgeprune.methods.dart:DART",
    "divprune": "edgeprune.methods.divprune:DivPrune",
    "dyrate": "edgeprune.methods.dyrate:DyRate",
    "evit": "edgeprune.methods.evit:EViT",
    "evs": "edgeprune.methods.evs:EVS",
    "fastv": "edgeprune.methods.fastv:FastV",
    "fitprune": "edgeprune.methods.fitprune:FitPrune",
    "learned": "edgeprune.methods.learned:Learned",
    "plphp": "edgeprune.methods.plphp:PLPHP",
    "pyramiddrop": "edgeprune.methods.pyramiddrop:PyramidDrop",
    "random": "edgeprune.methods.random:Random",
    "sparsevlm": "edgeprune.methods.sparsevlm:SparseVLM",
    "uniform": "edgeprune.methods.uniform:Uniform",
    "visionzip": "edgeprune.methods.visionzip:VisionZip",
    "vtw": "edgeprune.methods.vtw:VTW",
    "zspaprune": "edgeprune.methods.zspaprune:ZSPAPrune",
}

# By `model_type` of a transformers config.json.
FAMILIES = {
    "gemma3": "edgeprune.families.gemma3:Gemma3",
    "idefics2": "edgeprune.families.idefics2:Idefics2",
    "idefics3": "edgeprune.families.idefics3:Idefics3",
    "internvl": "edgeprune.families.internvl:InternVL",
    "lfm2_vl": "edgeprune.families.lfm2_vl:Lfm2VL",
    "llava": "edgeprune.families.llava:Llava",
    "llava_next": "edgeprune.families.llava_onevision:LlavaNext",
    "llava_onevision": "edgeprune.families.llava_onevision:LlavaOneVision",
    "mistral3": "edgeprune.families.mistral3:Mistral3",
    "paligemma": "edgeprune.families.paligemma:PaliGemma",
    "qwen2_5_vl": "edgeprune.families.qwen2_5_vl:Qwen25VL",
    "qwen2_vl": "edgeprune.families.qwen2_vl:Qwen2VL",
    "qwen3_5": "edgeprune.families.qwen3_5:Qwen35",
    "qwen3_vl": "edgeprune.families.qwen3_vl:Qwen3VL",
    "smolvlm": "edgeprune.families.idefics3:SmolVLM",
    "vipllava": "edgeprune.families.llava:VipLlava",
}

TASK = "image-text-to-text"  # the task of every family in transformers and optimum

_EXTERNAL_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_allowed: set[str] = set()


def allow_method(reference: str) -> None:
    """Allow `method_class` to import an external method, "package.module:Class", and so to run its code.

    Only the user may allow one; its name in a plan or bundle is not enough. Imports nothing. Raises UsageError for other names.
    """
    if not _EXTERNAL_NAME.fullmatch(reference):
        raise UsageError(f"{reference!r} is no method of your own.", hint="Write package.module:Class.")
    _allowed.add(reference)


def method_class(name: str) -> Any:
    """Return the class of a method in METHODS or of an allowed external one; raise UsageError for any other name."""
    if name in METHODS:
        return _resolve(METHODS[name])
    if not _EXTERNAL_NAME.fullmatch(name):
        raise unknown_method(name, METHODS, "or package.module:Class")
    if name not in _allowed:
        raise UsageError(f"{name} is code from outside EdgePrune.", hint=f"Have it run, if you trust it: --own-method {name}")
    return _external_class(name)


def unknown_method(name: str, known: Iterable[str], *others: str) -> UsageError:
    """Return the error for a method that is not among the known ones; `others`: what else may be given."""
    return UsageError(
        f"Unknown method {name!r}.", hint=f"{did_you_mean(name, known)}Methods are: {', '.join((*sorted(known), *others))}."
    )


def sites_of(name: str) -> tuple[str, ...]:
    """Return the sites of a method in METHODS. Its file is parsed, not imported: it needs torch."""
    (value,) = _declared(name, "sites")
    sites: tuple[str, ...] = ast.literal_eval(value)
    return sites


def options_of(name: str, *, calibration: bool = False) -> tuple[Option, ...]:
    """Return the options of a method's cuts; with `calibration` also those of `edgeprune calibrate` that decide how many stay.

    The file of a method in METHODS is parsed, not imported. An external method has the `options` of its class.
    """
    if name not in METHODS:
        return tuple(getattr(method_class(name), "options", ()))
    found: list[Option] = []
    for attribute in ("options", "calibration_options")[: 1 + calibration]:
        for value in _declared(name, attribute):
            found += [_option(call) for call in getattr(value, "elts", ())]
    return tuple(found)


def _option(call: ast.expr) -> Option:
    assert isinstance(call, ast.Call)
    named = {each.arg: ast.literal_eval(each.value) for each in call.keywords if each.arg}
    return Option(*map(ast.literal_eval, call.args), **named)


def _declared(name: str, attribute: str) -> list[ast.expr]:
    # The values that the class of a method in METHODS gives to an annotated attribute: one or none.
    body = [node for node in _class_body(METHODS[name]) if isinstance(node, ast.AnnAssign)]
    return [node.value for node in body if node.value is not None and _sets(node.target, attribute)]


def has_chat_template(model_type: str, processor_class: str = "") -> bool:
    """Return whether a family has a chat template of its own, for all checkpoints or for those that name this processor.

    Its file is parsed, not imported: it needs torch.
    """
    assigned = [node for node in _class_body(FAMILIES[model_type]) if isinstance(node, ast.Assign)]
    named = [node.value for node in assigned if any(_sets(target, "outside_chats") for target in node.targets)]
    if any(isinstance(key, ast.Constant) and key.value == processor_class for value in named for key in getattr(value, "keys", ())):
        return True
    return any(_sets(target, "chat_template") for node in assigned for target in node.targets)


def _class_body(reference: str) -> list[ast.stmt]:
    module, _, name = reference.partition(":")
    (body,) = (node.body for node in _parsed(module).body if isinstance(node, ast.ClassDef) and node.name == name)
    return body


def _sets(target: ast.expr, attribute: str) -> bool:
    return isinstance(target, ast.Name) and target.id == attribute


def family_class(model_type: str) -> Any:
    """Return the class of a model family; raise UnsupportedModelError if the type is not supported."""
    check_family(model_type)
    return _resolve(FAMILIES[model_type])


def check_family(model_type: str) -> None:
    """Raise UnsupportedModelError if the type is not supported. Imports nothing."""
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"Models of type {model_type!r} are not supported.",
            hint=f"{did_you_mean(model_type, FAMILIES)}Supported: {', '.join(sorted(FAMILIES))}.",
        )


def summary_of(reference: str) -> str:
    """Return the first line of a registered module's docstring. The file is parsed, not imported, as it may need torch."""
    return (ast.get_docstring(_parsed(reference.partition(":")[0])) or "").splitlines()[0].rstrip(".")


def _parsed(module: str) -> ast.Module:
    package, _, name = module.rpartition(".")
    return ast.parse(files(package).joinpath(f"{name}.py").read_text(encoding="utf-8"))


def _external_class(reference: str) -> Any:
    path, _, name = reference.partition(":")
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # a missing dependency of the module
        raise UsageError(f"There is no module {error.name}.", hint="Is its folder in PYTHONPATH?") from error
    found = getattr(module, name, None)
    if not (hasattr(found, "sites") and hasattr(found, "needs")):
        raise UsageError(f"{path} has no class {name} with `sites` and `needs`.", hint="CONTRIBUTING.md says what a method is.")
    return found


def _resolve(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Applicability:
    """A method at a site. `reason`: why it does not apply there; empty if it does. `layers`: those it is limited to, if so.

    `own_site`: whether the method acts at this site in any family.
    """

    method: str
    site: str
    reason: str
    layers: str = ""
    own_site: bool = True


def applicability(family: Any) -> list[Applicability]:
    """Return an entry for every method and site, for a family class or an instance."""
    return [
        Applicability(
            method, site, unsupported_reason(method, site, family), _limit(method, site, family), site in method_class(method).sites
        )
        for method in sorted(METHODS)
        for site in SITES
    ]


def attention_needed(method: str) -> str:
    """Return whose attention the method ranks by at site "layer": "previous", "next", or "" for none."""
    return str(getattr(method_class(method), "attention", "previous"))


def _limit(method: str, site: str, family: Any) -> str:
    if not family.stateful:
        return ""
    if site == "cache":
        return "of layers with attention"
    where = {"previous": "after a layer with attention", "next": "before a layer with attention", "": ""}
    return where[attention_needed(method)] if site == "layer" else ""


def unsupported_reason(method: str, site: str, family: Any) -> str:
    """Return why a method cannot act at a site of a family; empty if it can."""
    kind = method_class(method)
    if site not in kind.sites:
        return f"acts at: {', '.join(kind.sites)}"
    if site == "vision" and family.no_encoder_cuts_reason:
        return f"needs an encoder whose tokens can leave: {family.no_encoder_cuts_reason}"
    if site == "decode" and family.stateful:
        return f"needs a KV cache in every layer: most have {family.stateful} instead"
    for signal in kind.needs:
        if signal not in family.signals:
            return f"needs the signal {signal!r}" + (f": {family.no_signals_reason}" if family.no_signals_reason else "")
    if getattr(kind, "videos_only", False) and not family.videos:
        return "needs a video, which the family does not take"
    return ""
