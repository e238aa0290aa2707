"""The benchmark: exactly the tokens asked for, both modes in turns, honest notes, and the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from recordings_jetson import orin_nano

import edgeprune.runtime.benchmark
from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.cli.measured import show_benchmark
from edgeprune.device.machine import Machine
from edgeprune.device.power import Power
from edgeprune.errors import ImageError, UsageError
from edgeprune.runtime import Runtime
from edgeprune.runtime.benchmark import WARM_UP, Benchmark, benchmark

TOKENS, REPEATS = 5, 3


class Constant:
    """A power source of two watts."""

    name = "INA3221"
    closed = False

    def read(self) -> Power:
        return Power(2000, ("VDD_IN",))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return orin_nano().machine(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def source() -> Constant:
    return Constant()


@pytest.fixture(scope="module")
def result(tiny_bundle: Bundle, machine: Machine, source: Constant) -> Benchmark:
    return benchmark(tiny_bundle.path, tokens=TOKENS, repeats=REPEATS, threads=1, machine=machine, power=source)


def test_both_modes_generate_exactly_what_was_asked(result: Benchmark) -> None:
    assert (result.pruned.generated, result.unpruned.generated) == (TOKENS, TOKENS)


def test_the_cuts_are_those_of_the_plan(result: Benchmark, tiny_bundle: Bundle) -> None:
    first, second = (str(cut) for cut in tiny_bundle.plan.cuts)
    assert result.pruned.cuts == ((first, 12, 6), (second, 6, 3))
    assert result.unpruned.cuts == ()


def test_times_add_up(result: Benchmark) -> None:
    for measured in (result.pruned, result.unpruned):
        parts = (measured.preprocess_ms, measured.vision_ms, measured.prefill_ms, measured.ms_per_token)
        assert all(part > 0 for part in parts)
        assert measured.select_ms == 0  # no cut at the input
        assert measured.ttft_ms.p50 <= measured.ttft_ms.p95
        assert measured.tokens_per_second > 0


def test_a_second_question_does_without_the_image(result: Benchmark) -> None:
    assert result.unpruned.repeated_ttft_ms.p50 > 0
    assert isinstance(result.unpruned.reused, bool)


def test_pruning_shortens_the_cache(result: Benchmark) -> None:
    assert result.unpruned.kv_bytes - result.pruned.kv_bytes == 2 * 4 * 2 * 8 * (6 + 9)
    assert result.ratios["kv_bytes"] == result.pruned.kv_bytes / result.unpruned.kv_bytes


def test_ratios_are_of_what_was_measured(result: Benchmark) -> None:
    assert result.ratios["ttft_ms"] == result.pruned.ttft_ms.p50 / result.unpruned.ttft_ms.p50
    assert "select_ms" not in result.ratios
    silent = replace(result, pruned=replace(result.pruned, energy_j=None))
    assert "energy_j" in result.ratios and "energy_j" not in silent.ratios


def test_energy_is_power_times_time(result: Benchmark, source: Constant) -> None:
    assert (result.power_source, result.power_rails, source.closed) == ("INA3221", ("VDD_IN",), False)
    for measured in (result.pruned, result.unpruned):
        assert measured.energy_j is not None
        seconds = (measured.ttft_ms.p50 + (TOKENS - 1) * measured.ms_per_token) / 1e3
        assert 0 < measured.energy_j < 2 * (20 * seconds + 5)


def test_the_modes_take_turns(tiny_bundle: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    generate = Runtime.generate

    def listen(self: object, *arguments: object, prune: bool, **options: object) -> object:
        asked.append(prune)
        return generate(self, *arguments, prune=prune, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Runtime, "generate", listen)
    rounds: list[int] = []
    benchmark(tiny_bundle.path, tokens=2, repeats=2, machine=machine, progress=rounds.append)
    assert asked == [True] * WARM_UP + [False] * WARM_UP + [True, False, False, True]
    assert rounds == [1, 2]


def test_no_sensor_means_no_energy(tiny_bundle: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgeprune.runtime.benchmark, "find_power_source", lambda: None)
    measured = benchmark(tiny_bundle.path, tokens=2, repeats=1, machine=machine)
    assert (measured.power_source, measured.pruned.energy_j, measured.power_rails) == (None, None, ())


def test_a_source_that_was_found_is_closed(tiny_bundle: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Constant()
    monkeypatch.setattr(edgeprune.runtime.benchmark, "find_power_source", lambda: found)
    benchmark(tiny_bundle.path, tokens=2, repeats=1, machine=machine)
    assert found.closed


@pytest.mark.parametrize(("tokens", "repeats"), [(1, 3), (0, 3), (4, 0)])
def test_nothing_to_measure_is_refused(tokens: int, repeats: int, tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="2 tokens or more"):
        benchmark(tiny_bundle.path, tokens=tokens, repeats=repeats)


def test_an_image_and_a_prompt_are_taken_as_they_are(tiny_bundle: Bundle, machine: Machine, tmp_path: Path) -> None:
    Image.new("RGB", (60, 200), "red").save(tmp_path / "tall.png")
    with pytest.raises(ImageError, match="stretch"):
        benchmark(tiny_bundle.path, image=tmp_path / "tall.png", machine=machine)
    with pytest.raises(UsageError, match="prompt is empty"):
        benchmark(tiny_bundle.path, prompt="", machine=machine)
    stretched = benchmark(tiny_bundle.path, image=tmp_path / "tall.png", fit="stretch", tokens=2, repeats=1, machine=machine)
    assert stretched.visual_tokens == 12


def test_the_table(result: Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    show_benchmark(result, as_json=False)
    output = capsys.readouterr().out
    header = output.splitlines()[0]
    for words in (
        "Orin Nano",
        "25W (mode 1)",
        "JetPack 6.2",
        "clocks not pinned",
        "TensorRT 10.3.0",
        "provider cpu",
        "threads 1",
    ):
        assert words in header
    assert f"warm-up {WARM_UP}" in header
    for words in ("TTFT ms (p50 / p95)", "KV cache KiB", "energy: INA3221, VDD_IN", "12 -> 6 visual tokens"):
        assert words in output


def test_the_notes_say_what_was_not_measured(result: Benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    bare = replace(result.pruned, energy_j=None, peak_rss_bytes=None, cuts=(), reused=False)
    show_benchmark(replace(result, pruned=bare, unpruned=bare), as_json=False)
    output = capsys.readouterr().out
    for words in ("not measured: no sensor", "nothing was pruned", "caches were not reused", "unknown"):
        assert words in output


def test_the_command(tiny_bundle: Bundle) -> None:
    command = ["bench", str(tiny_bundle.path), "--tokens", "3", "--repeats", "1", "--threads", "1"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "tokens generated" in result.output
    data = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert data["pruned"]["generated"] == 3
    assert data["machine"]["python"] and data["ratios"]["kv_bytes"] < 1
    refused = CliRunner().invoke(main, [*command, "--repeats", "0"])
    assert refused.exit_code == 2
