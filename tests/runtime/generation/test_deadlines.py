"""The tier that a deadline chooses, simulated: outliers, machines that change, tiers that nobody measured yet."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from edgeprune.runtime.generation.request import UNFINISHED, LatencyEstimate, choose_tier

WORK = (400, 200, 100)  # visual tokens over the layers, by tier
SIZES = (4, 2, 1)
PROPORTIONAL = (400.0, 200.0, 100.0)  # ms of a prefill
MOSTLY_FIXED = (160.0, 130.0, 115.0)


@dataclass
class Machine:
    """A machine with the times `prefill_ms` by tier, which answers with 10 tokens of 2 ms. `late`: the numbers of late answers."""

    prefill_ms: tuple[float, ...]
    estimate: LatencyEstimate = field(default_factory=LatencyEstimate)
    tiers: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)

    def ask(self, deadline_ms: float, times: int = 1, *, slower: float = 1.0) -> list[int]:
        """Ask with a deadline, and return the tiers that were chosen. `slower`: factor on the times of these answers."""
        for _ in range(times):
            expected = self.estimate.expected_ms(WORK, 1, 10, encoding_ms=20.0)
            tier, reason = choose_tier(expected, deadline_ms, SIZES, None)
            for skipped in range(tier if reason == "deadline" else 0):
                self.estimate.skip(skipped)
            prefill = slower * self.prefill_ms[tier]
            if prefill <= deadline_ms:
                self.estimate.update(tier, prefill, 2.0, 10)
            elif deadline_ms >= expected[tier]:  # the deadline stopped the prefill
                self.estimate.update(tier, UNFINISHED * deadline_ms, 0.0, 0)
            if prefill + 20.0 > deadline_ms:
                self.late.append(len(self.tiers))
            self.tiers.append(tier)
        return self.tiers[-times:]


@pytest.mark.parametrize("times", [PROPORTIONAL, MOSTLY_FIXED])
def test_a_long_deadline_gets_the_best_tier_from_the_first_answer_on(times: tuple[float, ...]) -> None:
    assert Machine(times).ask(60_000, 20) == [0] * 20


@pytest.mark.parametrize(("deadline_ms", "best"), [(450.0, 0), (250.0, 1), (150.0, 2)])
def test_a_deadline_gets_the_best_tier_that_meets_it(deadline_ms: float, best: int) -> None:
    machine = Machine(PROPORTIONAL)
    tiers = machine.ask(deadline_ms, 40)
    assert tiers[2:] == [best] * 38
    assert machine.late == []


def test_tiers_that_cost_nearly_the_same_are_found_out() -> None:
    machine = Machine(MOSTLY_FIXED)
    machine.ask(200.0, 60)  # the first bound of the best tier is 460 ms
    assert machine.late == []
    machine.ask(600.0, 1)  # there is time to measure it
    assert machine.ask(200.0, 20) == [0] * 20


def test_the_only_tier_in_time_is_taken_and_the_last_where_none_is() -> None:
    assert set(Machine(PROPORTIONAL).ask(130.0, 50)) == {2}
    machine = Machine(PROPORTIONAL)
    assert set(machine.ask(50.0, 50)) == {2}  # what cannot be met measures nothing
    assert machine.ask(450.0, 3)[-1] == 0


@pytest.mark.parametrize("before", [0, 1, 2, 5])
@pytest.mark.parametrize("slower", [10.0, 1000.0])
def test_one_slow_answer_is_forgotten(before: int, slower: float) -> None:
    machine = Machine(PROPORTIONAL)
    machine.ask(60_000, before)
    machine.ask(60_000, slower=slower)
    tiers = machine.ask(500.0, 30)
    assert sum(tier != 0 for tier in tiers) <= (0 if before else 5)
    assert tiers[5:] == [0] * 25


def test_a_slow_decode_step_is_forgotten() -> None:
    machine = Machine(PROPORTIONAL)
    machine.ask(500.0, 5)
    machine.estimate.update(0, 400.0, 500.0, 10)
    assert machine.ask(500.0, 10) == [0] * 10


def test_a_machine_that_becomes_slower_is_followed() -> None:
    machine = Machine(PROPORTIONAL)
    assert machine.ask(500.0, 20)[-1] == 0
    tiers = machine.ask(500.0, 30, slower=2.0)
    assert tiers[5:] == [1] * 25
    assert len(machine.late) <= 5
    before = len(machine.late)
    assert machine.ask(500.0, 30, slower=4.0)[8:] == [2] * 22
    assert len(machine.late) - before <= 8


def test_a_machine_that_becomes_faster_is_followed() -> None:
    machine = Machine(PROPORTIONAL)
    machine.ask(500.0, 100, slower=4.0)
    assert machine.tiers[-1] == 2
    tiers = machine.ask(500.0, 30)
    assert tiers[15:] == [0] * 15
    assert not [number for number in machine.late if number >= 100]


def test_a_tier_that_is_slower_than_the_others_say_is_seldom_tried() -> None:
    machine = Machine((5000.0, 200.0, 100.0))  # it swaps, say
    machine.ask(900.0, 200)
    assert len(machine.late) <= 200 // 16 + 4
    assert set(machine.tiers[-10:]) <= {0, 1}


def test_estimates_are_medians() -> None:
    estimate = LatencyEstimate()

    def expected(images: int, most: int) -> list[float]:
        return estimate.expected_ms((2, 1), images, most, 1.0)

    assert expected(1, 10) == [50.0, 25.0]
    estimate.update(0, 100.0, 5.0, 20)
    assert expected(2, 10) == [2 * 100.0 + 5.0 * 10] * 2
    assert expected(1, 50) == [100.0 + 5.0 * 20] * 2  # as long as answers were, not as they may be
    for prefill, token in ((300.0, 0.0), (200.0, 7.0), (None, 9.0)):
        estimate.update(0, prefill, token, 0)
    assert expected(1, 50) == [200.0 + 7.0 * 20] * 2
    estimate.update(1, 60.0, 0.0, 0)
    assert expected(1, 50) == [200.0 + 7.0 * 20, 60.0 + 7.0 * 20]
    estimate.update(1, 10_000.0, 0.0, 0)
    assert expected(1, 50)[1] == 60.0 + 7.0 * 20
