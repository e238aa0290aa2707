"""Reports: one page that holds everything, says no more than its data, and escapes what came from outside."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tiny_models import TINY_GEOMETRY

from edgeprune.bundle import Bundle
from edgeprune.calibration.data.statistics import PARTS, SHARES, Statistics, StatisticsSource
from edgeprune.calibration.replay.reference import reference_model
from edgeprune.calibration.search.pareto import Curve, Point
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.cli import main
from edgeprune.plan import Cut, KeepPlan
from edgeprune.report import charts
from edgeprune.report.canvas import tooltip
from edgeprune.report.gather import ReportInputs, collect_answers
from edgeprune.report.page import render, sections_of
from edgeprune.runtime import Receipt, Runtime, load

SCHEDULE = {"form": "schedule", "steps": [0, 2], "shares": [1.0, 0.5]}
PLAN = KeepPlan(
    "qwen2_vl",
    3,
    TINY_GEOMETRY,
    (
        Cut("input", "random", 10, seed=4),
        Cut("layer", "fastv", 6, 1),
        *(Cut("cache", "plphp", keep, layer) for layer, keep in enumerate((8, 5, 3))),
        Cut("decode", "dyrate", 0, 0, options=SCHEDULE),
    ),
)
LIVE = replace(
    PLAN, cuts=(*PLAN.cuts[:-1], Cut("decode", "dyrate", 0, options={"form": "map", "attention": [0.5], "shares": [0, 1.0]}))
)
NAMES = {"budgets", "statistics", "curve", "answers"}


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    source = StatisticsSource("qwen2_vl", 3, 2, "0" * 64, TINY_GEOMETRY, "last", "mean", False)
    random, found = np.random.default_rng(0), Statistics.empty(source)
    for _ in range(4):
        values = {name: random.uniform(size=shape) for name, shape in source.shapes().items()}
        values["gamma"] = np.zeros_like(values["gamma"])
        values["gamma"][np.arange(3), random.integers(0, 200, 3)] = 1.0
        values["steps"] = (np.arange(len(values["steps"])) < 7).astype(float)
        values["split"][7:] = 0.0
        values["coverage"] = np.broadcast_to(np.asarray(SHARES), values["coverage"].shape)
        found = found.with_sample(values)
    return found


@pytest.fixture(scope="module")
def curve(tiny_plan: KeepPlan) -> Curve:
    fastv = replace(PLAN, cuts=PLAN.cuts[1:2])
    points = [Point("fastv", "fastv", 0.5 + n / 10, 0.6, 0.8 + n / 50, 40, fastv) for n in range(3)]
    points += [Point("random", "random", 0.5, 0.5, 0.7, 40, replace(PLAN, cuts=PLAN.cuts[:1]))]
    points += [Point("random + fastv", "composed", 0.45, 0.4, 0.9, 40, PLAN), Point("tiny", "tiny", 0.3, 0.4, 0.5, 40, tiny_plan)]
    return Curve("flops", tuple(points), 4)


def page_of(material: ReportInputs) -> str:
    return render(material, sections_of(material))


def found_sections(page: str) -> set[str]:
    return set(re.findall(r'<section id="(\w+)">', page))


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *(str(argument) for argument in arguments)])


class Tags(HTMLParser):
    """Collects what a page opens and what it points to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.targets: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]


@pytest.fixture(scope="module")
def whole_page(statistics: Statistics, curve: Curve, tiny: LoadedModel, tiny_image: Image.Image) -> str:
    runtime = Runtime(reference_model(tiny, PLAN))
    asked = collect_answers(runtime, tiny_image, ["What is it?", "<script>alert(1)</script> & 'so'?"], max_tokens=6)
    return page_of(ReportInputs('<img src="x">', PLAN, None, statistics, curve, asked))


def test_no_stage_is_reused_from_the_question_before(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    receipts = list[Receipt]()
    runtime = load(tiny_bundle.path, threads=1)
    runtime.watch(receipts.append)
    asked = collect_answers(runtime, tiny_image, ["What is it?", "And what is that?"], max_tokens=2).asked
    assert [receipt.pruned for receipt in receipts] == [True, False] * 3  # the first pair warms up
    assert [receipt.reused for receipt in receipts[2:]] == [()] * 4
    for question in asked:
        rows = {name: values for name, *values in question.facts}
        assert all(value != "0.0 ms" for value in rows["vision encoder"])
        assert rows["visual KV cache kept"][1] == "100% of all" != rows["visual KV cache kept"][0]


def test_nothing_is_loaded_from_outside(whole_page: str) -> None:
    without = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[^"]*"', "", whole_page)
    assert "http:" not in without and "https:" not in without
    assert "@import" not in without and not re.search(r"url\((?!#)", without)
    tags = Tags(whole_page)
    assert not tags.names & {"script", "link", "iframe", "object", "embed", "base", "form", "metadata"}
    assert tags.targets and all(target.startswith(("#", "data:image/png;base64,")) for target in tags.targets)


def test_ids_are_unique(whole_page: str) -> None:
    ids = Tags(whole_page).ids
    assert len(ids) == len(set(ids))


def test_what_came_from_outside_is_escaped(whole_page: str) -> None:
    assert "<script" not in whole_page and '<img src="x">' not in whole_page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#39;so&#39;?" in whole_page
    hostile = replace(PLAN, family="<i>", cuts=(Cut("layer", "<b>$x_1^", 6, 1, options={"<u>": "</style>"}),))
    point = Point("<s>", "<q> $\\frac$", 0.5, 0.5, 0.9, 4, hostile)
    page = page_of(ReportInputs("a", hostile, curve=Curve("flops", (point,))))
    assert not Tags(page).names & {"i", "u", "s", "q"}
    assert "&lt;q&gt; $\\frac$" in page and page.count("</style>") == 1


@pytest.mark.parametrize("given", [(), ("statistics",), ("curve",), ("statistics", "curve")])
def test_a_section_is_there_exactly_when_its_data_is(given: tuple[str, ...], statistics: Statistics, curve: Curve) -> None:
    data = {"statistics": statistics, "curve": curve}
    page = page_of(ReportInputs("plan.json", PLAN, None, *(data[name] if name in given else None for name in data)))  # type: ignore[arg-type]
    assert found_sections(page) == {"budgets", *given}
    assert ("Attention that the kept tokens cover" in page) == ("statistics" in given)
    assert "<img" not in page


def test_charts_of_parts_that_were_not_collected_are_left_out(statistics: Statistics) -> None:
    for part, shown, missing in (("attention", "quartiles", "share kept"), ("caches", "share kept", "quartiles")):
        some = replace(statistics, sums={name: statistics.sums[name] for name in PARTS[part]})
        page = page_of(ReportInputs("p", PLAN, statistics=some))
        assert tips(page, shown) and not tips(page, missing)
        assert ("Attention that the kept tokens cover" in page) == (part == "attention")


def test_every_section_is_on_the_whole_page(whole_page: str) -> None:
    assert found_sections(whole_page) == NAMES


def test_a_plan_without_cuts_has_a_page() -> None:
    page = page_of(ReportInputs("none", replace(PLAN, cuts=())))
    assert "every visual token is kept" in page
    assert "What each step of an answer reads" not in page


def tips(page: str, words: str) -> list[str]:
    return [text for text in re.findall(r"<title>([^<]*)</title>", page) if words in text]


def test_budgets_have_two_bars_a_layer() -> None:
    svg = charts.budgets(PLAN)
    assert tips(svg, "in prefill") == [f"layer {n}: {count} in prefill" for n, count in enumerate((10, 6, 6))]
    assert tips(svg, "in the KV cache") == [f"layer {n}: {count} in the KV cache" for n, count in enumerate((8, 5, 3))]
    bar = r"<title>layer \d: \d+ in the KV cache</title>\s*<path d=\"M [\d.]+ [\d.]+ \nL .*\nL [\d.]+ ([\d.]+)"
    heights = [float(y) for y in re.findall(bar, svg)]
    assert len(heights) == 3 and heights == sorted(heights)  # y grows downwards: 8, 5, 3
    assert (heights[2] - heights[1]) / (heights[1] - heights[0]) == pytest.approx(2 / 3, rel=1e-3)


def test_coverage_is_interpolated_at_the_stored_share(statistics: Statistics) -> None:
    page = page_of(ReportInputs("p", PLAN, statistics=statistics))
    assert tips(page, "KV head") == [f"layer {n}, KV head {h}: {k / 12:.0%}" for h in range(2) for n, k in enumerate((8, 5, 3))]
    partly = replace(PLAN, cuts=PLAN.cuts[:3])
    assert len(tips(page_of(ReportInputs("p", partly, statistics=statistics)), "KV head")) == 2


def test_the_statistics_charts_hold_the_numbers(statistics: Statistics) -> None:
    page = page_of(ReportInputs("p", PLAN, statistics=statistics))
    means = statistics.mean("gamma") @ ((np.arange(200) + 0.5) / 200)
    shown = [re.fullmatch(r"layer (\d): mean ([\d.]+)%, quartiles .*", tip) for tip in tips(page, "quartiles")]
    assert [int(found[1]) for found in shown if found] == [0, 1, 2]
    np.testing.assert_allclose([float(found[2]) / 100 for found in shown if found], means, atol=0.00051)  # rounded
    lines = tips(page, "7 steps: from")
    assert [line.partition(",")[0] for line in lines] == ["system prompt", "image", "instruction", "generated text"]
    first = np.nanmean(statistics.attention_split()[0], axis=0)
    assert [f"from {value:.0%} to" in line for value, line in zip(first, lines, strict=True)] == [True] * 4
    cost = statistics.mean("cache_kl")
    cells = [text.split(": ") for text in tips(page, "share kept")]
    assert [where for where, _ in cells] == [f"layer {n}, share kept {share:.0%}" for share in SHARES for n in range(3)]
    np.testing.assert_allclose([float(value) for _, value in cells], cost.T.ravel(), atol=0.006)


def test_quartiles_are_those_of_the_histogram() -> None:
    source = StatisticsSource("qwen2_vl", 3, 2, "0" * 64, TINY_GEOMETRY, "last", "mean", False)
    found = Statistics.empty(source)
    for score in range(200):
        values = {name: np.zeros(shape) for name, shape in source.shapes().items()}
        values["gamma"][:, score] = 1.0
        found = found.with_sample(values)
    page = page_of(ReportInputs("p", PLAN, statistics=found))
    assert len(tips(page, "mean 50.0%, quartiles 25.0% and 75.0%")) == 3
    assert "Where the answer looks" not in page  # no answer had a decode step


def test_the_curve_has_every_point_once_and_the_chosen_one_ringed(curve: Curve) -> None:
    svg = charts.trade_off(curve, PLAN)
    assert len(tips(svg, "over 40 samples")) == len(curve.points)
    assert tips(svg, "front") == ["front of 2 points"]
    assert tips(svg, "chosen") == ["chosen: this plan: random + fastv (composed)"]
    for group in ("fastv", "random", "composed", "tiny"):
        assert len(re.findall(rf">{group}</text>", svg)) == 1
    other = charts.trade_off(replace(curve, chosen=0), PLAN)
    assert tips(other, "chosen") == ["chosen: fastv"] and len(tips(other, "this plan")) == 1


def test_the_front_is_listed_with_the_plans_own_costs(curve: Curve) -> None:
    page = page_of(ReportInputs("p", PLAN, curve=curve))
    assert "chosen, this plan" in page and "90.0%" in page
    assert "time to first token" not in page
    timed = replace(curve, axis="ttft_ms", points=tuple(replace(point, ttft_ms=12.5) for point in curve.points))
    assert "12.5 ms" in page_of(ReportInputs("p", PLAN, curve=timed))


def test_the_decode_chart_shows_the_schedule_and_what_answers_read(
    whole_page: str, tiny: LoadedModel, tiny_image: Image.Image
) -> None:
    assert tips(whole_page, "schedule over 10 steps")
    read = tips(whole_page, "answer 1, step")
    assert read[:3] == ["answer 1, step 0: 100%", "answer 1, step 1: 100%", "answer 1, step 2: 50%"]
    assert "chosen anew at every step" in page_of(ReportInputs("p", LIVE))
    asked = collect_answers(Runtime(reference_model(tiny, LIVE)), tiny_image, ["What is it?"], max_tokens=4)
    assert len(tips(page_of(ReportInputs("p", LIVE, interview=asked)), "answer 1, step")) == len(asked.asked[0].decode_shares) > 0


def test_two_prompts_stand_side_by_side(whole_page: str) -> None:
    captions = re.findall(r"<strong>(.*?)</strong> <span>(.*?)</span>", whole_page)
    assert [title for title, _ in captions] == ["input, 12 tokens"] + [
        n for n in ("random @ input", "fastv @ layer 1", "KV caches") for _ in "12"
    ]
    assert captions[1][1] == "answer 1: kept 10 of 12 (83%)"
    assert captions[6][1] == "answer 2: each KV head keeps 3 to 8 of 12 (44%)"
    assert "10 of 10 kept for both questions" in whole_page
    assert whole_page.count("3 KV caches") == 2 and "6 to 10 → 3 to 8 visual tokens in every head" in whole_page


def test_pictures_are_made_of_the_returned_indices(tiny: LoadedModel, tiny_image: Image.Image) -> None:
    runtime = Runtime(reference_model(tiny, PLAN))
    receipt = runtime.generate(tiny_image, "What is it?", max_tokens=1).receipt
    picture = np.asarray(runtime.panels(tiny_image, receipt)[1].picture).astype(int)
    height, width = picture.shape[0] // 3, picture.shape[1] // 4
    cells = picture[: 3 * height, : 4 * width].reshape(3, height, 4, width, 3)[:, 4:-4, :, 4:-4]
    coloured = np.ptp(cells, axis=-1).max(axis=(1, 3)) > 0
    assert set(np.flatnonzero(coloured)) == set(receipt.cuts[0].kept.tolist())


def test_the_command_reports_a_bundle(
    tiny_bundle: Bundle, tiny_image: Image.Image, statistics: Statistics, curve: Curve, tmp_path: Path
) -> None:
    tiny_image.save(tmp_path / "picture.png")
    own = replace(statistics, source=replace(statistics.source, weights_sha256=tiny_bundle.manifest.source.weights_sha256))
    own.save(tmp_path / "own.safetensors")
    curve.save(tmp_path / "curve.json")
    out = tmp_path / "report.html"
    data = ("--statistics", tmp_path / "own.safetensors", "--curve", tmp_path / "curve.json")
    question = ("--image", tmp_path / "picture.png", "--prompt", "<b>What?", "--max-tokens", 3)
    result = report(tiny_bundle.path, *data, *question, "-o", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"report": str(out), "sections": "budgets, statistics, curve, answers"}
    page = out.read_text()
    assert found_sections(page) == NAMES and "&lt;b&gt;What?" in page
    assert page.count("<img") == 1 + len(tiny_bundle.plan.cuts)
    assert "12 → 6 visual tokens" in page and f"opset {tiny_bundle.manifest.lowering.opset}" in page


def test_charts_are_the_same_every_time() -> None:
    assert charts.budgets(PLAN) == charts.budgets(PLAN)
    assert tooltip("") not in charts.budgets(PLAN)


def test_importing_stays_torch_free_and_without_global_figures() -> None:
    code = "import sys, edgeprune.report.page; print(*sys.modules)"
    modules = set(subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert "matplotlib.figure" in modules
    assert not {"torch", "transformers", "onnx", "safetensors", "matplotlib.pyplot"} & modules


def test_the_answer_without_pruning_stands_beside_the_other(whole_page: str, tiny: LoadedModel, tiny_image: Image.Image) -> None:
    assert whole_page.count("<p>Without pruning</p>") == 2
    unpruned = Runtime(reference_model(tiny, replace(PLAN, cuts=())))
    (question,) = collect_answers(unpruned, tiny_image, ["What is it?"], max_tokens=2).asked
    assert question.unpruned is None and {row[2] for row in question.facts} == {""}
    page = page_of(
        ReportInputs("p", replace(PLAN, cuts=()), interview=collect_answers(unpruned, tiny_image, ["What?"], max_tokens=2))
    )
    assert "Without pruning" not in page and "not pruned" in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_report_in_a_browser(whole_page: str, scheme: str, width: int, browser: Any, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed").Axe()
    (tmp_path / "report.html").write_text(whole_page)
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.goto((tmp_path / "report.html").as_uri())
    assert axe.run(page).response["violations"] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    drawn = page.evaluate("[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)")
    assert min(drawn) > 7  # pixels: the smallest letters of a chart, on a phone too
    page.close()
