"""The soak of examples/soak for ten seconds: the same server process, clients and checks. What is right is asserted, no times."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repository import ROOT

from edgeprune.bundle import Bundle
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.export.exporter import export_bundle
from edgeprune.plan import Cut, KeepPlan
from edgeprune.plan.presets import unpruned_plan
from edgeprune.plan.tiers import Tiers
from edgeprune.runtime import load
from edgeprune.runtime.generation.sampling import Sampler, Sampling

SOAK = ROOT / "examples" / "soak"


@pytest.fixture(scope="module")
def base(tiny: LoadedModel) -> KeepPlan:
    return unpruned_plan("qwen2_vl", 3, tiny.geometry((84, 112)))


@pytest.fixture(scope="module")
def tiered(tiny: LoadedModel, base: KeepPlan, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    # A cut that no question changes, so that prefixes are recalled, and cheap to export.
    plans = {
        name: base.with_cuts(Cut("input", "uniform", count)) for name, count in {"quality": 9, "balanced": 6, "fast": 3}.items()
    }
    return export_bundle(tiny, Tiers(plans), tmp_path_factory.mktemp("soak") / "bundle")


@pytest.mark.slow
def test_ten_seconds_lose_nothing_and_cross_nothing(tiered: Bundle, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "soak.py",
        tiered.path,
        "--minutes",
        10 / 60,
        "--json",
        tmp_path / "account.json",
        "--logs",
        tmp_path,
    ]
    small = ["--siege", 0, "--questions", 40, "--scenes", 12, "--inside", 10, "--every", 0.5, "--cache-bytes", 200_000]
    done = subprocess.run(list(map(str, [*command, *small])), cwd=SOAK, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    account = json.loads((tmp_path / "account.json").read_text())
    tally, results = account["tally"], account["tally"]["results"]
    assert tally["faults"] == {"lost": 0, "crossed": 0, "wrong": 0, "hung": 0} and tally["answers twice"] == 0
    assert account["agreement"]["differences"] == []
    assert sum(results.values()) == tally["requests"]
    assert all(results.get(name) for name in ("right", "cut", "gone", "refused")), results
    assert account["resources"]["samples"] > 0 and "lost, crossed, wrong, hung" in done.stdout


@pytest.mark.slow
def test_seconds_beside_hostile_clients(tiered: Bundle, tmp_path: Path, soaking: Any) -> None:
    pool = soaking("pool").drawn_pool(tiered.path, 1, scenes=12, questions=60, threads=1)
    found = soaking("siege").besieged(tiered.path, pool, tmp_path, minutes=0.1, threads=1, most=20.0)
    assert found["faults"] == [] and found["ratio"] > 0
    assert {"per_client", "max_pixels"} <= found["refused"].keys(), found["refused"]
    before, most = found["rss"]
    assert most - before < 500 << 20


@pytest.fixture
def soaking(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SOAK))
    return lambda name: import_module(f"soaking.{name}")


@pytest.fixture
def pool(soaking: Any) -> Any:
    """Return two questions about two pictures, of which each has its answers under two tiers."""
    parts = soaking("pool")
    entries = [
        parts.Entry(
            [("user", "What is it?", (n,))], {}, {tier: parts.Said(f"{tier} {n} it is", "end") for tier in ("best", "fast")}
        )
        for n in range(2)
    ]
    return parts.Pool(entries, ["data:,0", "data:,1"], ("best", "fast"), "tiny")


@pytest.mark.parametrize(
    ("text", "finish", "tier", "deadline", "result"),
    [
        ("best 0 it is", "end", "best", False, "right"),
        ("best 1 it is", "end", "best", False, "crossed"),
        ("best 0 it", "end", "best", False, "wrong"),
        ("best 0 it", "cancelled", "best", False, "lost"),
        ("best 0 it is", "length", "best", False, "wrong"),
        ("fast 0 it is", "end", "fast", False, "wrong"),  # nobody asked for less
        ("fast 0 it is", "end", "fast", True, "right"),
        ("fast 0", "deadline", "fast", True, "cut"),
        ("fast 0\ufffd", "deadline", "fast", True, "cut"),  # amid a character
        ("fast 0\ufffd", "end", "fast", True, "wrong"),
        ("", "deadline", None, True, "cut"),
        ("fast 1", "deadline", "fast", True, "wrong"),
    ],
)
def test_answers_are_judged(text: str, finish: str, tier: str | None, deadline: bool, result: str, pool: Any, soaking: Any) -> None:
    outcomes = soaking("outcomes")
    account: dict[str, Any] = {"finish_reason": finish, "reused": [], "tier": tier}
    assert outcomes.judged(outcomes.Outcome("test"), pool, pool.entries[0], text, account, deadline).result == result


def test_a_pool_comes_back_from_its_file(pool: Any, soaking: Any, tmp_path: Path) -> None:
    pool.save(tmp_path / "pool.json")
    assert asdict(soaking("pool").Pool.load(tmp_path / "pool.json")) == asdict(pool)


@pytest.mark.parametrize(
    ("status", "counted", "words"),
    [
        (200, 3, None),
        (200, 1, "the clients saw 1 more"),
        (200, 4, "the server counted 2 more, not 0 to 1"),
        (500, 1, "status 500: 1"),
    ],
)
def test_counts_are_compared(status: int, counted: int, words: str | None, soaking: Any) -> None:
    outcome = soaking("outcomes").Outcome
    found = [outcome("whole", statuses=[200]), outcome("whole", statuses=[200]), outcome("half", doubtful=1)]
    served = {200: 2, status: counted}
    after: dict[Any, float] = {
        ("edgeprune_http_requests_total", (("path", "/v1"), ("status", str(each)))): float(n) for each, n in served.items()
    }
    after[("edgeprune_answers_total", (("finish_reason", "end"),))] = float(served[200])
    told = soaking("account").agreement(found, {}, after)["differences"]
    assert not told if words is None else any(words in each for each in told)


def test_percentiles(soaking: Any) -> None:
    assert soaking("account").percentiles(range(1, 201)) == {"p50": 100.5, "p99": 198.0, "most": 200.0}
    assert soaking("account").percentiles([]) is None


def test_memory_that_grows_is_seen(soaking: Any) -> None:
    sample, resources = soaking("server").Sample, soaking("account").resources
    flat = [sample(float(n), 100, 5, 9) for n in range(100)]
    grown = [sample(float(n), 100 + n, 5, 9) for n in range(100)]
    filled = [sample(float(n), min(100 + n, 140), 5, 9) for n in range(100)]
    assert resources(flat)["rss"]["drift"] == 0.0 and resources(grown)["rss"]["drift"] == pytest.approx(80 / 114.5, rel=1e-3)
    assert resources(grown)["rss"]["later drift"] == pytest.approx(40 / 154.5, rel=1e-3)
    assert resources(filled)["rss"]["drift"] > 0.2 and resources(filled)["rss"]["later drift"] == 0.0
    assert resources(flat[:3])["rss"]["later drift"] == 0.0


@pytest.mark.parametrize("cuts", ["input", "deep"])
def test_the_bundle_of_the_long_run_has_plans_of_one_kind(cuts: str, base: KeepPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SOAK))
    found = Tiers(import_module("bundle").plans(cuts, base))
    assert list(found.plans) == ["quality", "balanced", "fast"]


def test_a_watcher_hears_of_an_answer_that_was_cancelled_before_it_began(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    # Or the server's answers and its responses would not add up.
    model, told = load(tiny_bundle.path, threads=1), list[str]()
    model.watch(lambda receipt: told.append(receipt.finish_reason))
    stream = model.stream(tiny_image, "What is it?")
    stream.cancel()
    assert list(stream) == [] and told == ["cancelled"]


@pytest.mark.parametrize(("top_p", "most"), [(1.0, 0), (0.9, 10)])  # the nucleus may end with one token or the other
def test_rounding_does_not_change_what_a_seed_draws(top_p: float, most: int) -> None:
    # A recalled prefix rounds otherwise, and of many tokens that are nearly as probable as one another the order changes.
    lot = np.random.default_rng(0)
    logits = lot.normal(scale=1e-5, size=500).astype(np.float32)
    others = logits + lot.normal(scale=1e-6, size=500).astype(np.float32)
    draws = [
        [Sampler(Sampling(temperature=1.0, top_p=top_p, seed=seed)).sample(each) for seed in range(300)]
        for each in (logits, others)
    ]
    assert sum(a != b for a, b in zip(*draws, strict=True)) <= most
