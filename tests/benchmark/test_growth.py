"""How the first token grows with the tokens that are kept, and what a decode step takes beside its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from edgeprune.benchmark.results import Spread
from edgeprune.benchmark.run import benchmark
from edgeprune.benchmark.sweeps import KeptPoint, line_through, sweep_kept_tokens
from edgeprune.benchmark.variants import PROMPT, PRUNED, BenchmarkPrompt, bundle_variant
from edgeprune.bundle import Bundle
from edgeprune.cli.commands.measure import bench
from edgeprune.errors import UsageError
from edgeprune.runtime import load
from edgeprune.runtime.backends.providers import TENSORRT
from edgeprune.runtime.telemetry.receipt import Times

QUESTION = BenchmarkPrompt(PROMPT, 4, "exact")


def at(kept: int, ms: float) -> KeptPoint:
    return KeptPoint(kept, kept + 10, Spread(ms + 5, ms + 5), Spread(ms, ms))


def test_each_count_enters_the_decoder(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    own = bundle_variant(PRUNED, tiny_bundle.path, load(tiny_bundle.path))
    entered, engine = list[int](), own.runtime._pipeline.backend
    step = engine.forward

    def listened(tokens: Any, cache: Any, **given: Any) -> Any:
        entered.append(tokens.prefix.embeds.shape[1])
        return step(tokens, cache, **given)

    monkeypatch.setattr(engine, "forward", listened)
    grown = sweep_kept_tokens(own, QUESTION, [3, 12], 1)
    text = min(entered) - 3
    assert sorted(entered) == [text + 3, text + 3, text + 12, text + 12]
    assert [point.kept for point in grown] == [3, 12] and grown[1].tokens - grown[0].tokens == 9


def test_more_than_there_are_is_refused(tiny_bundle: Bundle) -> None:
    own = bundle_variant(PRUNED, tiny_bundle.path, load(tiny_bundle.path))
    with pytest.raises(UsageError, match=r"has 12 visual tokens; 13 of them.*--image-size"):
        sweep_kept_tokens(own, QUESTION, [3, 13], 1)


def test_engines_keep_their_visual_tokens_to_themselves(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="stay on the device"):
        benchmark(tiny_bundle.path, kept=[3], provider=TENSORRT)


def test_a_line_is_found_and_what_bends_away_is_told() -> None:
    straight = line_through([at(10, 50.0), at(20, 70.0), at(40, 110.0)])
    assert straight is not None and straight.ms_per_token == pytest.approx(2.0) and straight.ms_at_none == pytest.approx(10.0)
    assert straight.farthest < 1e-9
    bent = line_through([at(10, 50.0), at(20, 70.0), at(40, 220.0)])
    assert bent is not None and bent.farthest > 0.1
    assert line_through([at(10, 50.0), at(20, 70.0)]) is None


def test_what_a_step_takes_beside_its_graph(tiny_bundle: Bundle, tiny_image: Image.Image) -> None:
    times = load(tiny_bundle.path).generate(tiny_image, "Where is the cup?", max_tokens=8).receipt.times
    assert len(times.graph_ms) == len(times.decode_ms) > 2
    assert all(0 < graph < whole for graph, whole in zip(times.graph_ms, times.decode_ms, strict=True))
    assert Times(decode_ms=[11.0, 12.0, 26.0], graph_ms=[10.0, 10.0, 20.0]).overhead == pytest.approx(0.2)
    assert Times(decode_ms=[11.0]).overhead is None


def test_the_command_tells_and_draws_it(tiny_bundle: Bundle, tmp_path: Path) -> None:
    command = [str(tiny_bundle.path), "--tokens", "2", "--repeats", "1", "--threads", "1", "--compare", ""]
    result = CliRunner().invoke(bench, [*command, "--visual-tokens", "3,6,12", "--plot", str(tmp_path / "bench.svg")])
    assert result.exit_code == 0, result.output
    assert "evenly chosen visual tokens" in result.output and "beside the graph" in result.output
    assert "visual tokens in the decoder" in (tmp_path / "bench.svg").read_text()
