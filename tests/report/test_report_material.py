"""What does not belong together, or cannot be read, is refused in one line before anything is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_report import PLAN, report
from tiny_models import TINY_GEOMETRY

from edgeprune.bundle import Bundle
from edgeprune.calibration.data.statistics import Statistics, StatisticsSource
from edgeprune.calibration.search.pareto import Curve, Point
from edgeprune.errors import UsageError
from edgeprune.report.gather import ReportOptions, load_inputs

SOURCE = StatisticsSource("qwen2_vl", 3, 2, "0" * 64, TINY_GEOMETRY, "last", "mean", False)
CURVE = Curve("flops", (Point("random", "random", 0.5, 0.5, 0.9, 40, PLAN),))


def refused(*arguments: object, code: int = 2) -> str:
    result = report(*arguments)
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.output
    return lines[0]


def test_refusals(tiny_bundle: Bundle, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", ("-o", tmp_path / "out.html")
    PLAN.save(plan)
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    assert "is a plan" in refused(plan, "--image", "i.png", "--prompt", "What?", *out)
    assert "one --prompt" in refused(tiny_bundle.path, "--image", "i.png", *out)
    assert "not 3" in refused(tiny_bundle.path, "--image", "i.png", *(("--prompt", "What?") * 3), *out)
    assert "(--image)" in refused(tiny_bundle.path, "--prompt", "What?", *out)
    assert "i.png" in refused(tiny_bundle.path, "--image", "i.png", "--prompt", "What?", *out)
    assert "Cannot read plan" in refused(tmp_path / "none.json", *out)
    assert "is no plan" in refused(tmp_path / "noise", *out)
    assert "no bundle" in refused(tmp_path, *out)
    assert "Cannot read statistics" in refused(plan, "--statistics", plan, *out)
    assert "Cannot read the curve" in refused(plan, "--curve", tmp_path / "noise", *out)
    Statistics.empty(SOURCE).save(tmp_path / "s")
    assert "sha256 of its weights" in refused(tiny_bundle.path, "--statistics", tmp_path / "s", *out)
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"family": "other"}, "family"), ({"layers": 4}, "layers"), ({"geometry": replace(TINY_GEOMETRY, width=84)}, "geometry")],
)
def test_data_of_another_model_are_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    Statistics.empty(replace(SOURCE, **change)).save(tmp_path / "s")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=words):
        load_inputs(ReportOptions(tmp_path / "plan.json", statistics=tmp_path / "s"))
    other = replace(CURVE.points[0], plan=replace(PLAN, cuts=(), **change))  # type: ignore[arg-type]
    replace(CURVE, points=(other,), chosen=None).save(tmp_path / "c")
    with pytest.raises(UsageError, match=words):
        load_inputs(ReportOptions(tmp_path / "plan.json", curve=tmp_path / "c"))


def test_empty_data_are_refused(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    Statistics.empty(SOURCE).save(tmp_path / "s")
    with pytest.raises(UsageError, match="no sample"):
        load_inputs(ReportOptions(tmp_path / "plan.json", statistics=tmp_path / "s"))
    broken = {
        "no points": replace(CURVE, points=(), chosen=None),
        "no point 9": replace(CURVE, chosen=9),
        "ttft_ms": replace(CURVE, axis="ttft_ms"),
    }
    for words, data in broken.items():
        data.save(tmp_path / "c")
        with pytest.raises(UsageError, match=words):
            load_inputs(ReportOptions(tmp_path / "plan.json", curve=tmp_path / "c"))
