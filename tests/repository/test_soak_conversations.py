"""Conversations of examples/soak on tiny models: in three threads every answer is the one that it is alone.

`pytest tests/repository/test_soak_conversations.py -m slow --questions 2000` asks so many of each family's bundle.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import LoadedModel, load_model, resolve_model
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.plan.tiers import Tiers
from edgeprune.registry import FAMILIES

SOAK = ROOT / "examples" / "soak"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SOAK))
    yield import_module("conversations")
    sys.modules.pop("conversations")


def everywhere(base: KeepPlan) -> KeepPlan:
    """Return a plan with cuts before the decoder, between its layers and in a cache."""
    tokens = base.geometry.tokens
    cuts = Cut("input", "divprune", tokens - 2), Cut("layer", "fastv", tokens // 2, layer=1)
    return base.with_cuts(*cuts, Cut("cache", "plphp", tokens // 4, layer=base.layers - 1))


def withdrawn(base: KeepPlan) -> KeepPlan:
    """Return a plan after whose first layer no visual token is left."""
    return base.with_cuts(Cut("layer", "vtw", 0, layer=1))


def test_conversations_at_once_are_those_alone(soak: Any, tiny_bundle: Bundle) -> None:
    account = soak.compare(tiny_bundle.path, soak.Load(30, seed=1))
    assert account.passed, account
    assert account.questions == 30
    assert account.reused and not account.refused


def test_whatever_differs_crashes_or_hangs_is_counted(soak: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    assert not soak.Account("none").passed
    assert not soak.Account("differs", questions=5, different=1).passed
    crashed = soak.run(tmp_path / "nowhere", soak.Load(1), 1)
    assert (crashed.ended, crashed.passed) == ("crashed with 1", False)
    hung = soak.run(tiny_bundle.path, soak.Load(1), 0.0001)
    assert (hung.ended, hung.passed) == ("hung", False)


def test_an_error_in_a_thread_is_raised(soak: Any) -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        soak.in_threads([fail] * 5, 3)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [everywhere, withdrawn])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family(name: str, plan: Any, soak: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tiny = import_module(f"tiny_{name}")
    loaded = load_model(resolve_model(str(tiny.folder(tmp_path))))
    bundle = export_bundle(loaded, plan(whole(loaded, name, tiny.SIZE)), tmp_path / "bundle")
    most = {"turns": 1, "images": 1} if getattr(tiny, "ONE_TURN", False) else {}
    account = soak.run(bundle.path, soak.Load(request.config.getoption("--questions"), seed=1, **most), 30)
    print(f"\n{name}, {plan.__name__}: {account}")
    assert account.passed, account


@pytest.mark.slow
def test_tiers(tiny: LoadedModel, soak: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base = whole(tiny, "qwen2_vl", (84, 112))
    tiers = {name: base.with_cuts(Cut("input", "uniform", keep)) for name, keep in (("quality", 9), ("fast", 3))}
    bundle = export_bundle(tiny, Tiers.of(tiers), tmp_path / "bundle")
    account = soak.run(bundle.path, soak.Load(request.config.getoption("--questions"), seed=2), 30)
    print(f"\ntiers: {account}")
    assert account.passed, account


def whole(loaded: LoadedModel, name: str, size: tuple[int, int]) -> KeepPlan:
    return unpruned_plan(name, len(loaded.family.decoder().layers), loaded.geometry(size))
