"""The benchmark: exactly the tokens asked for, contenders in turns, ratios within rounds, honest notes, and the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image
from recordings_jetson import orin_nano

import edgeprune.benchmark.run
import edgeprune.errors
from edgeprune.benchmark.chart import draw
from edgeprune.benchmark.profile import step_nodes
from edgeprune.benchmark.results import Spread, Startup, ratios, spreads
from edgeprune.benchmark.run import WARM_UP, Benchmark, benchmark
from edgeprune.benchmark.startup import measure_startup
from edgeprune.benchmark.variants import BenchmarkPrompt, Variant
from edgeprune.bundle import Bundle
from edgeprune.cli.commands.measure import bench
from edgeprune.cli.output.measure import show_benchmark
from edgeprune.device.machine import Machine
from edgeprune.device.power import Power
from edgeprune.device.profile import DeviceProfile
from edgeprune.device.roofline import Peaks
from edgeprune.errors import EdgePruneError, ImageError, MissingExtraError, UsageError, install_command
from edgeprune.io.progress import NotedCount, Silent
from edgeprune.runtime.telemetry.receipt import Receipt

TOKENS, REPEATS, CONTEXTS = 5, 3, (40, 60)
ENTRY = 2 * 4 * 2 * 8  # bytes of one token's keys and values in one layer
PEAKS = Peaks({"fp32": 1e11, "int8": 4e11}, 2e10, 1)
START = Startup(200.0, 3.0, 100.0, 30.0, 20.0, 90_000_000, 100_000_000)


class Constant:
    """A power source of two watts."""

    name = "INA3221"
    closed = False

    def read(self) -> Power:
        return Power(2000, ("VDD_IN",))

    def close(self) -> None:
        self.closed = True


def started(*arguments: object, **options: object) -> Startup:
    return START


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return orin_nano().machine(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "device.json"
    DeviceProfile("somewhere", "measured", 12, 4.0, (1.0, 2.0, 3.0, 4.0, 5.0), PEAKS).save(path)
    return path


@pytest.fixture(scope="module")
def result(tiny_bundle: Bundle, machine: Machine, report: Path) -> Benchmark:
    return quick(
        tiny_bundle.path, machine, report, compare=("none", "random", "uniform"), contexts=CONTEXTS, tokens=TOKENS, repeats=REPEATS
    )


def quick(path: Path, machine: Machine, report: Path, **options: Any) -> Benchmark:
    common: dict[str, Any] = {"machine": machine, "device_report": report, "power": Constant(), "startup": started}
    return benchmark(path, **{"tokens": 2, "repeats": 1, "threads": 1, **common, **options})


def test_all_generate_exactly_what_was_asked(result: Benchmark) -> None:
    assert [each.name for each in result.variants] == ["pruned", "none", "random", "uniform"]
    assert {each.generated for each in result.variants} == {TOKENS}


def test_the_cuts_are_those_of_the_plan(result: Benchmark, tiny_bundle: Bundle) -> None:
    first, second = (str(cut) for cut in tiny_bundle.plan.cuts)
    assert result.of("pruned").cuts == ((first, 12, 6), (second, 6, 3))
    assert all(each.cuts == () for each in result.variants[1:])


def test_chosen_without_looking_is_as_much_work(result: Benchmark) -> None:
    assert (result.visual_tokens, result.equal_work_tokens) == (12, 7)  # 12, 6 and 3 of the three layers
    assert [each.visual_tokens for each in result.variants] == [7, 12, 7, 7]


def test_caches_hold_what_was_let_in(result: Benchmark) -> None:
    whole = result.of("none").costs["kv_bytes"].p50
    assert whole - result.of("pruned").costs["kv_bytes"].p50 == ENTRY * (6 + 9)
    for name in ("random", "uniform"):
        assert whole - result.of(name).costs["kv_bytes"].p50 == ENTRY * 3 * (12 - 7)
    assert result.of("none").decode_kv_bytes == whole


def test_stages_are_measured_and_a_second_question_finds_its_caches(result: Benchmark) -> None:
    for each in result.variants:
        assert all(each.costs[name].p50 > 0 for name in ("preprocess_ms", "vision_ms", "prefill_ms", "ms_per_token"))
        assert each.costs["select_ms"] == Spread(0.0, 0.0)  # no cut at the input
        assert each.costs["ttft_ms"].p50 <= each.costs["ttft_ms"].p95
        assert each.reused and each.costs["repeated_ttft_ms"].p50 > 0


def test_ratios_are_medians_of_the_rounds_own() -> None:
    rows, base = (
        [{"a": 1.0, "b": 0.0}, {"a": 30.0, "b": 0.0}, {"a": 5.0, "b": 0.0}],
        [{"a": 2.0, "b": 0.0}, {"a": 30.0}, {"a": 100.0}],
    )
    assert ratios(rows, base) == {"a": 0.5}  # and not 5 / 30; b is nothing to divide by
    assert spreads(rows)["a"].p50 == 5


def test_the_baseline_is_the_first_that_is_named(result: Benchmark, tiny_bundle: Bundle, machine: Machine, report: Path) -> None:
    assert set(result.of("none").ratios.values()) == {1.0}
    other = quick(tiny_bundle.path, machine, report, compare=("uniform", "none"))
    assert other.request.baseline == "uniform" and set(other.of("uniform").ratios.values()) == {1.0}
    assert other.of("none").ratios["kv_bytes"] > 1
    alone = quick(tiny_bundle.path, machine, report, compare=())
    assert alone.request.baseline == "pruned" and len(alone.variants) == 1


def test_contexts_are_reached_exactly(result: Benchmark) -> None:
    for each in result.variants:
        assert [(at.context, at.keys) for at in each.contexts] == [(40, 40), (60, 60)]
        assert each.contexts[1].kv_bytes - each.contexts[0].kv_bytes == ENTRY * 3 * 20
    assert all(at.ratio == 1 for at in result.of("none").contexts)


@pytest.mark.parametrize(("context", "words"), [(5, "more than"), (500, "takes 512")])
def test_a_context_that_cannot_be_is_refused(context: int, words: str, tiny_bundle: Bundle, machine: Machine, report: Path) -> None:
    with pytest.raises(UsageError, match=words):
        quick(tiny_bundle.path, machine, report, contexts=(40, context))


def test_energy_is_power_times_time(result: Benchmark) -> None:
    assert (result.power_source, result.power_rails) == ("INA3221", ("VDD_IN",))
    for each in result.variants:
        seconds = (each.costs["ttft_ms"].p50 + (TOKENS - 1) * each.costs["ms_per_token"].p50) / 1e3
        assert 0 < each.costs["energy_j"].p50 < 2 * (20 * seconds + 5)


def test_contenders_take_turns(tiny_bundle: Bundle, machine: Machine, report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answer = BenchmarkPrompt.answer

    def listen(self: BenchmarkPrompt, contender: Variant) -> Receipt:
        asked.append(contender.name)
        return answer(self, contender)

    monkeypatch.setattr(BenchmarkPrompt, "answer", listen)
    rounds: list[int] = []

    class Rounds(Silent):
        def count(self, what: str, total: int) -> NotedCount:
            counted = super().count(what, total)
            return counted if what != "rounds" else lambda done, note="": rounds.append(done)

    quick(tiny_bundle.path, machine, report, compare=("none", "random"), repeats=3, progress=Rounds())
    forwards = ["pruned", "none", "random"]
    assert asked[3 * WARM_UP :] == [*forwards, *forwards[::-1], *forwards]
    assert rounds == [1, 2, 3]


def test_no_sensor_means_no_energy(tiny_bundle: Bundle, machine: Machine, report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgeprune.benchmark.run, "find_power_source", lambda: None)
    measured = quick(tiny_bundle.path, machine, report, power=None)
    assert (measured.power_source, measured.power_rails) == (None, ())
    assert "energy_j" not in measured.of("pruned").costs


def test_a_source_that_was_found_is_closed(
    tiny_bundle: Bundle, machine: Machine, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, given = Constant(), Constant()
    monkeypatch.setattr(edgeprune.benchmark.run, "find_power_source", lambda: found)
    quick(tiny_bundle.path, machine, report, power=None)
    quick(tiny_bundle.path, machine, report, power=given)
    assert found.closed and not given.closed


@pytest.mark.parametrize(("tokens", "repeats"), [(1, 3), (0, 3), (4, 0)])
def test_nothing_to_measure_is_refused(tokens: int, repeats: int, tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="2 tokens or more"):
        benchmark(tiny_bundle.path, tokens=tokens, repeats=repeats)


def test_an_image_and_a_prompt_are_taken_as_they_are(tiny_bundle: Bundle, machine: Machine, report: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 200), "red").save(tmp_path / "tall.png")
    with pytest.raises(ImageError, match="stretch"):
        quick(tiny_bundle.path, machine, report, image=tmp_path / "tall.png")
    with pytest.raises(UsageError, match="prompt is empty"):
        quick(tiny_bundle.path, machine, report, prompt="")
    stretched = quick(tiny_bundle.path, machine, report, image=tmp_path / "tall.png", fit="stretch")
    assert stretched.visual_tokens == 12


def test_every_contender_starts_in_a_process_of_its_own(
    altered_bundle: Path, tiny_bundle: Bundle, machine: Machine, report: Path
) -> None:
    asked: list[tuple[Path, str]] = []

    def listen(path: Path, name: str, *arguments: object, **options: object) -> Startup:
        asked.append((path, name))
        return replace(START, import_ms=float(len(asked)))

    measured = quick(tiny_bundle.path, machine, report, compare=("none", str(altered_bundle)), startup=listen)
    assert asked == [(tiny_bundle.path, "pruned"), (tiny_bundle.path, "none"), (altered_bundle, "pruned")]
    assert [each.startup and each.startup.import_ms for each in measured.variants] == [1, 2, 3]
    assert measured.of(str(altered_bundle)).cuts == measured.of("pruned").cuts


def test_a_fresh_process_answers_twice(tiny_bundle: Bundle) -> None:
    start = measure_startup(tiny_bundle.path, "random", BenchmarkPrompt("What is it?", 3, "exact"), threads=1)
    assert min(start.import_ms, start.read_ms, start.load_ms, start.first_ttft_ms, start.second_ttft_ms) > 0
    assert start.peak_rss_bytes and start.loading_rss_bytes and start.peak_rss_bytes > 20_000_000
    with pytest.raises(EdgePruneError, match="process of its own"):
        measure_startup(tiny_bundle.path / "nowhere", "pruned", BenchmarkPrompt("What is it?", 3, "exact"))


def test_memory_beside_what_it_must_hold(result: Benchmark) -> None:
    own = result.of("pruned")
    assert own.rss_ratio == 100_000_000 / (own.weight_bytes + own.costs["kv_bytes"].p50)
    assert replace(own, startup=None).rss_ratio is None


def test_the_report_is_plain_data(result: Benchmark, tiny_bundle: Bundle) -> None:
    data = json.loads(json.dumps(result.to_dict()))
    assert (data["bundle"], data["baseline"], data["equal_work_tokens"]) == (str(tiny_bundle.path), "none", 7)
    assert data["peaks"]["operations"]["int8"] == 4e11 and data["peaks_from"].endswith("device.json")
    assert list(data["contenders"]) == ["pruned", "none", "random", "uniform"]
    own = data["contenders"]["pruned"]
    assert (
        own["costs"]["ttft_ms"]["p95"] > 0
        and own["startup"]["load_ms"] == 100
        and own["roofline"]["arithmetic"] == ["fp32", "fp32"]
    )


def test_the_table(result: Benchmark, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    show_benchmark(result, as_json=False)
    output = capsys.readouterr().out
    first, second, _, header = output.splitlines()[:4]
    assert first.startswith("pruned: ") and " ms to the first token (" in first and "none), then" in first
    assert second.startswith("Beside uniform, which chooses without looking at equal work, the first token takes ")
    for words in ("Orin Nano", "25W (mode 1)", "JetPack 6.2", "clocks not pinned", "TensorRT 10.3.0", "provider cpu", "threads 1"):
        assert words in header
    for words in ("TTFT ms", "at 40 keys", "KV cache KiB", "energy: INA3221, VDD_IN", "12 -> 6 visual tokens", "half of none"):
        assert words in output
    for words in ("nodes in a step", "vision encoder  ", "prefill  ", "decode step  "):
        assert any(line.startswith(words) for line in output.splitlines()), words
    assert {each.step_nodes for each in result.variants} == {step_nodes(tiny_bundle)} and " ms" in output
    for words in ("7 of 12 visual tokens", "device.json", "fp32 100 GFLOPS, int8 400 GOPS, 20.0 GB/s", "100 (3)", "30.0 (20.0)"):
        assert words in output


def test_the_notes_say_what_was_not_measured(result: Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    costs = {name: value for name, value in result.of("pruned").costs.items() if name != "energy_j"}
    start = replace(START, peak_rss_bytes=None)
    bare = replace(result.of("pruned"), costs=costs, cuts=(), reused=False, roofline=None, startup=start)
    show_benchmark(replace(result, variants=(bare,), peaks=None), as_json=False)
    output = capsys.readouterr().out
    for words in ("not measured: no sensor", "nothing was pruned", "caches were not reused", "unknown", "no peaks known"):
        assert words in output
    assert "at 40 keys, roofline" not in output


def test_a_picture_is_drawn(result: Benchmark, tmp_path: Path) -> None:
    draw(result, tmp_path / "bench.png")
    short = replace(result, request=replace(result.request, contexts=()))
    draw(short, tmp_path / "short.png")
    with Image.open(tmp_path / "bench.png") as whole, Image.open(tmp_path / "short.png") as one:
        assert whole.width == 2 * one.width > 1000


def test_the_command(tiny_bundle: Bundle, report: Path, tmp_path: Path) -> None:
    command = [str(tiny_bundle.path), "--tokens", "3", "--repeats", "1", "--threads", "1", "--device-report", str(report)]
    plot = tmp_path / "bench.svg"
    result = CliRunner().invoke(bench, [*command, "--compare", "", "--contexts", "40", "--plot", str(plot), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["contenders"]["pruned"]["generated"] == 3 and data["contexts"] == [40]
    assert plot.read_text().count("pruned") and data["machine"]["python"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--contexts", "200,many"), "no numbers of tokens"),
        (("--compare", "resize"), "compare small.bundle"),
        (("--plot", "picture.gif"), "Cannot draw"),
        (("--repeats", "0"), "1 round or more"),
    ],
)
def test_the_command_refuses(options: tuple[str, ...], words: str, tiny_bundle: Bundle) -> None:
    result = CliRunner().invoke(bench, [str(tiny_bundle.path), *options])
    assert isinstance(result.exception, UsageError) and words in str(result.exception)


def test_without_matplotlib_a_plot_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgeprune.errors, "_is_installed", lambda package: False)
    result = CliRunner().invoke(bench, ["nowhere", "--plot", "bench.png"])
    assert isinstance(result.exception, MissingExtraError) and install_command("plot") in str(result.exception)
