"""What plans cost, added up by hand, and the largest plan within a budget."""

from __future__ import annotations

import pytest

from edgeprune.calibration.search.candidates import encoder_plan
from edgeprune.calibration.search.objectives import RooflineTimes, flops_share, kv_share, predicted_ttft, roofline_times
from edgeprune.calibration.search.pareto import Budget
from edgeprune.checkpoint.loading import LoadedModel
from edgeprune.device.jetson import MODULES
from edgeprune.device.profile import DeviceProfile
from edgeprune.errors import PlanError, UsageError
from edgeprune.plan import Cut, Geometry, KeepPlan
from edgeprune.plan.presets import ranked_plan, unpruned_plan

GEOMETRY = Geometry(560, 560, 14, 2)  # 20 x 20
WHOLE = unpruned_plan("qwen2_vl", 3, GEOMETRY)
TIMES = DeviceProfile("somewhere", "measured", 400, 40.0, (10.0, 20.0, 30.0, 40.0, 60.0))


def test_flops_follow_the_living_tokens(tiny: LoadedModel) -> None:
    parts = tiny.family.decoder()
    half = WHOLE.with_cuts(Cut("input", "random", 200))
    assert 0.3 < flops_share(parts, half, WHOLE) < 0.5  # attention falls with the square
    late = WHOLE.with_cuts(Cut("layer", "fastv", 200, layer=2))
    assert flops_share(parts, half, WHOLE) < flops_share(parts, late, WHOLE) < 1.0
    assert flops_share(parts, WHOLE.with_cuts(Cut("layer", "vtw", 0, layer=1)), WHOLE) == pytest.approx(1 / 3)


def test_kv_counts_what_is_stored() -> None:
    assert kv_share(ranked_plan(WHOLE, [100, 200, 300]), WHOLE) == 0.5


def test_ttft_adds_up_by_hand() -> None:
    assert predicted_ttft(TIMES, WHOLE) == 100.0
    # Layer 0 with all tokens (60), the others with half (30): 40 + 40.
    assert predicted_ttft(TIMES, WHOLE.with_cuts(Cut("layer", "fastv", 200, layer=1))) == pytest.approx(80.0)


def test_a_cut_inside_the_encoder_saves_blocks_and_prefill() -> None:
    # Of two blocks the second sees half (40 * 3 / 4), and so does every layer (30).
    assert predicted_ttft(TIMES, WHOLE.with_cuts(Cut("vision", "evit", 200, layer=1)), blocks=2) == pytest.approx(60.0)


def test_the_weights_of_an_encoder_are_read_for_few_tokens_too() -> None:
    times = RooflineTimes("somewhere", "roofline", 400, 40.0, (10.0, 20.0, 30.0, 40.0, 60.0), vision_least_ms=35.0)
    half = WHOLE.with_cuts(Cut("vision", "evit", 200, layer=1))
    assert predicted_ttft(times, WHOLE, blocks=2) == 100.0
    assert predicted_ttft(times, half, blocks=2) == pytest.approx(35.0 + 30.0)  # 3 / 4 of 40 ms would be less


def test_two_cuts_inside_the_encoder_share_what_leaves() -> None:
    plan = encoder_plan(WHOLE, "evit", (4, 8), 0.25)
    assert [(cut.layer, cut.keep) for cut in plan.vision_cuts] == [(4, 200), (8, 100)]
    # 4 blocks see all, 4 half, 4 a quarter: 40 * 7 / 12; and a quarter in prefill.
    assert predicted_ttft(TIMES, plan, blocks=12) == pytest.approx(40 * 7 / 12 + 20)


def test_milliseconds_become_the_largest_plan_within_them() -> None:
    def fastv(share: float) -> KeepPlan:
        if share < 1 / 3:
            raise PlanError("layer 0 sees every token")
        return WHOLE.with_cuts(Cut("layer", "fastv", max(1, int((share * 3 - 1) / 2 * 400)), layer=1))

    def ms(plan: KeepPlan) -> float:
        return predicted_ttft(TIMES, plan)

    # 80 ms leave 40 for prefill: 60 / 3 in layer 0, 30 in the others, so half of the tokens.
    assert Budget("ttft_ms", 80.0).plan(fastv, ms).tokens_at_layer(1) in (199, 200)
    assert Budget("ttft_ms", 100.0).plan(fastv, ms).tokens_at_layer(1) == 400
    with pytest.raises(PlanError, match=r"takes 66\.0 ms"):
        Budget("ttft_ms", 66.0).plan(fastv, ms)


def test_the_roofline_knows_its_devices(tiny: LoadedModel) -> None:
    times = roofline_times(tiny, Geometry(84, 112, 14, 2), "orin-nano")
    assert times.how == "roofline" and times.ttft_ms > 0
    assert list(times.prefill_ms) == sorted(times.prefill_ms)
    assert 0 < times.vision_least_ms <= times.vision_ms
    faster = roofline_times(tiny, Geometry(84, 112, 14, 2), "thor")
    assert faster.ttft_ms < times.ttft_ms
    with pytest.raises(UsageError, match="orin-nano"):
        roofline_times(tiny, GEOMETRY, "toaster")
    assert {"agx-orin", "orin-nano", "orin-nx", "thor"} <= set(MODULES)
