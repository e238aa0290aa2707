"""What others import: the public names of four modules, as a table that has to be changed by hand.

Programs on robots import these names. A new one is promised from then on, and goes into CHANGELOG.md. One that leaves, or gets
another name, stays for a release under its old name with a warning, and CHANGELOG.md says what replaces it.
"""

from __future__ import annotations
import __future__

import copy
import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_models import TINY_GEOMETRY

from edgeprune.bundle import Bundle
from edgeprune.errors import BundleError
from edgeprune.plan.presets import unpruned_plan

# In the order that ruff wants of __all__: constants, classes, functions.
TABLE = {
    "edgeprune.runtime": """
        NV12 Answer AnswerOptions Chat CutReceipt Feed FeedClosed FeedError FeedTimeout PreparedImage Receipt RequestLimits
        Runtime Sampling Shot Stream Times Turn load
    """,
    "edgeprune.plan": """
        CLASSES SITES Cut Geometry KeepPlan Option View Weights check_keep_ratio keep_count keep_count_up
    """,
    "edgeprune.bundle": """
        CHAT_TEMPLATE CHECKS DECODER EMBED EXPECTED MANIFEST PLAN PREDICTOR PREPROCESSOR ROUNDINGS SCHEMA_VERSION SELECTOR
        SPECIAL_TOKENS TOKENIZER VISION VISION_UNPRUNED Bundle DecoderShape GenerationDefaults GptqRecord GraphRecord ImageText
        LayerState Manifest Operations SmoothingRecord Source SourceQuantization Tensor
        files_of float32_graph held_as is_bundle own_weights_graph tier_plan tier_selector
    """,
    "edgeprune.errors": """
        BundleError EdgePruneError EngineError ImageError MissingExtraError NoBundleError PlanError UnsupportedModelError UsageError
        VerificationError did_you_mean install_command one_line renamed require_extra update_hint
    """,
}
RENAMED = {"edgeprune.runtime.Terms": "RequestLimits", "edgeprune.runtime.server.Limits": "ServerLimits"}  # for one release
WITHOUT_ALL = {"edgeprune.errors"}  # a file that imports none of our names: all it defines is its own


def public(module: ModuleType) -> set[str]:
    """Return what can be imported from a module without an underscore, but other modules and `annotations`."""
    held = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name for name, value in held.items() if not isinstance(value, ModuleType | type(__future__.annotations))}


@pytest.mark.parametrize("name", TABLE)
def test_the_public_names_are_those_of_the_table(name: str) -> None:
    module, promised = importlib.import_module(name), TABLE[name].split()
    assert sorted(public(module)) == sorted(promised)
    if name in WITHOUT_ALL:
        assert not hasattr(module, "__all__")
    else:
        assert module.__all__ == promised


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_works_and_says_the_new_one(old: str) -> None:
    module, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match=RENAMED[old]):
        value = getattr(importlib.import_module(module), name)
    assert value is getattr(importlib.import_module(module), RENAMED[old])
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        importlib.import_module(module).Nothing  # noqa: B018


def test_an_old_attribute_works_and_says_the_new_one() -> None:
    plan: Any = unpruned_plan("qwen2_vl", 2, TINY_GEOMETRY)
    with pytest.warns(DeprecationWarning, match=r"KeepPlan.alive is now KeepPlan.tokens_at_layer"):
        assert plan.alive(1) == 12
    with pytest.raises(AttributeError, match="KeepPlan has no attribute 'nothing'"):
        plan.nothing  # noqa: B018
    assert copy.deepcopy(plan) == plan


def test_the_old_way_to_open_a_bundle_works_and_says_the_new_one(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"Bundle.opening is now Bundle.open_while_verifying"):
        opened = Bundle.opening(tmp_path / "none", check="fast")
    with pytest.raises(BundleError, match="no bundle at"), opened:
        pass


@pytest.mark.parametrize("name", TABLE)
def test_every_public_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    for promised in TABLE[name].split():
        value = getattr(importlib.import_module(name), promised)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__.startswith("edgeprune.") and value.__doc__, promised


def test_every_error_is_in_the_tree_that_is_drawn() -> None:
    errors = importlib.import_module("edgeprune.errors")
    drawn = (errors.__doc__ or "").split()
    for name in TABLE["edgeprune.errors"].split():
        if inspect.isclass(getattr(errors, name)):
            assert issubclass(getattr(errors, name), errors.EdgePruneError)
            assert name in drawn
