"""Kept traces: what is read is what would be traced, and whatever a trace depends on makes another one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
import trace_cache
from tiny_models import TINY_GEOMETRY
from torch import nn

from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.export import tracing
from edgeprune.export.tracing import trace_embedding, trace_selector
from edgeprune.model import input_selector
from edgeprune.plan import Cut
from edgeprune.plan.presets import unpruned_plan
from edgeprune.targets import PLAIN, TARGETS, Lowering

FRESH = tracing.traced


class Rescaled(nn.Linear):
    """A linear layer whose factor is no parameter."""

    def __init__(self, factor: object = 2.0) -> None:
        super().__init__(2, 2)
        self.factor = factor


Rescaled.__module__ = "edgeprune.stand_in"  # as if its sources were in the key


class Counted:
    """The cache in a folder of its own, which counts what it traces anew."""

    def __init__(self, place: Path) -> None:
        self.place, self.traced = place, 0

    def __call__(self, graph: Any, opset: int) -> ir.Model:
        def fresh(graph: Any, opset: int) -> ir.Model:
            self.traced += 1
            return FRESH(graph, opset)

        return trace_cache.recall(self.place, fresh, graph, opset)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(tmp_path / "traces")
    monkeypatch.setattr(tracing, "traced", counted)
    return counted


def graph_of(module: nn.Module, rows: int = 1) -> Any:
    return tracing._Graph(module.eval(), (torch.ones(rows, 2),), None, ["x"], ["y"])


def key(module: nn.Module, rows: int = 1, opset: int = 20) -> str:
    return trace_cache.key(graph_of(module, rows), opset)


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("lowering", [PLAIN, Lowering(TARGETS["jetpack7.2"], "fp16"), Lowering(TARGETS["cpu"], "int8")])
def test_what_is_read_is_written_as_a_fresh_trace_is(
    tiny: LoadedModel, lowering: Lowering, cache: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = unpruned_plan("qwen2_vl", 3, TINY_GEOMETRY).with_cuts(Cut("input", "divprune", 5))
    folders = [tmp_path / name for name in ("first", "second", "fresh")]
    for folder in folders:
        folder.mkdir()
        if folder.name == "fresh":
            monkeypatch.setattr(tracing, "traced", FRESH)
        trace_embedding(tiny.family.decoder(), lowering, folder / "embedding.onnx")
        trace_selector(tiny.family.decoder(), plan, {}, lowering, folder / "selector.onnx")
    assert cache.traced == 2
    first, second, fresh = map(written, folders)
    assert first == second == fresh
    assert len(first) == 4


def test_weights_are_those_of_the_model_at_hand(cache: Counted) -> None:
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = nn.Linear(2, 2)
        read = cache(graph_of(module), 20).graph.initializers
        assert torch.equal(read["weight"].const_value.raw, module.weight)  # type: ignore[union-attr]
    assert cache.traced == 1


def test_all_that_a_trace_depends_on_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    first = key(Rescaled())
    assert key(Rescaled()) == first
    others = [key(Rescaled(3.0)), key(Rescaled(2)), key(Rescaled(), rows=2), key(Rescaled(), opset=21), key(nn.Linear(2, 2))]
    others += [key(Rescaled(torch.ones(1))), key(Rescaled(torch.zeros(1))), key(Rescaled({"a": (1, 2)})), key(Rescaled().double())]
    monkeypatch.setattr(trace_cache, "version", lambda package: "0")
    others.append(key(Rescaled()))
    assert len({first, *others}) == 11


def test_the_plan_is_in_the_key(tiny: LoadedModel) -> None:
    plan = unpruned_plan("qwen2_vl", 3, TINY_GEOMETRY)
    cuts = (Cut("input", "divprune", 5), Cut("input", "divprune", 6), Cut("input", "random", 5), Cut("input", "random", 5, seed=2))
    selectors = [input_selector(plan.with_cuts(cut), 48) for cut in cuts]
    assert len({key(selector) for selector in selectors}) == 4


def test_sources_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "edgeprune_double"
    package.mkdir()
    for name, source in {"__init__": "", "top": "from edgeprune_double import under\n", "under": "x = 1\n", "apart": ""}.items():
        (package / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for name, source in (
        ("under", "x = 1\n"),
        ("under", "x = 2\n"),
        ("apart", "y = 1\n"),
        ("top", "import edgeprune_double.under\n"),
    ):
        (package / f"{name}.py").write_text(source)
        trace_cache.sources.cache_clear()
        found.append(trace_cache.sources("edgeprune_double.top"))
    trace_cache.sources.cache_clear()
    assert found[0] != found[1] == found[2] != found[3]


def test_a_trace_knows_the_sources_of_methods_families_and_decoder() -> None:
    names = trace_cache.modules()
    assert {"edgeprune.methods.fastv", "edgeprune.families.qwen2_vl", "edgeprune.model.attention", "edgeprune.plan"} <= set(names)


def test_classes_of_a_test_are_traced_anew(cache: Counted) -> None:
    class Own(nn.Linear):
        pass

    for _ in range(2):
        cache(graph_of(Own(2, 2)), 20)
    assert cache.traced == 2
    assert not cache.place.exists()


@pytest.mark.parametrize("broken", [b"", b"no digest", b"0" * 4000])
def test_a_broken_trace_is_made_anew(broken: bytes, cache: Counted) -> None:
    graph = graph_of(nn.Linear(2, 2))
    cache(graph, 20)
    (path,) = cache.place.glob("*.onnx")
    whole = path.read_bytes()
    path.write_bytes(broken or whole[:-1])
    cache(graph, 20)
    assert cache.traced == 2
    assert path.read_bytes() == whole
    assert not list(cache.place.glob("*.part"))


def test_two_who_want_a_trace_make_it_once(cache: Counted) -> None:
    graph = graph_of(nn.Linear(2, 2))
    workers = [threading.Thread(target=cache, args=(graph, 20)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert cache.traced == 1


def test_the_environment_says_where_traces_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for named, place in {"": trace_cache.FOLDER, "off": None, "/elsewhere": Path("/elsewhere")}.items():
        monkeypatch.setenv("EDGEPRUNE_TRACE_CACHE", named)
        assert trace_cache.folder() == place
