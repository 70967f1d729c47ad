"""Priorities: stake, and a bounded bonus for callers who ask seldom."""

import math

import pytest

from prompting_nb.baseminer.blacklist import Caller
from prompting_nb.baseminer.priority import StakePriority, restedness


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_restedness_is_the_mean_gap_as_a_share():
    assert restedness((), 50.0, 10.0) == 0.0
    assert restedness([40.0], 45.0, 10.0) == 0.5
    assert restedness([20.0, 40.0], 30.0, 10.0) == 0.5
    assert restedness([0.0], 45.0, 10.0) == 1.0 and restedness([50.0], 45.0, 10.0) == 0.0


def test_stake_times_a_bounded_bonus():
    clock = Clock()
    priority = StakePriority(default=0.5, idle_factor=2.0, rest=10.0, history=2, clock=clock)
    rich, poor = Caller("rich", 1, 100.0), Caller("poor", 2, 10.0)
    assert (priority(None), priority(Caller("stranger"))) == (0.5, 0.5)
    assert (priority(rich), priority(poor)) == (100.0, 10.0)  # the first request reflects the stake
    clock.now += 5
    assert priority(rich) == 200.0  # half rested: half of the bonus
    clock.now += 5
    assert priority(rich) == 200.0  # two requests in ten seconds
    clock.now += 5
    assert priority(rich) == 200.0  # only the latest two count
    clock.now += 1000
    assert priority(rich) == 300.0


def test_settings_have_bounds_and_defaults():
    usual = StakePriority()
    assert (usual.default, usual.idle_factor, usual.rest, usual.log.length, usual.log.max_callers) == (0.0, 1.0, 60.0, 8, 8192)
    assert StakePriority(history=1, rest=0.5, idle_factor=0.0, max_callers=3).log.max_callers == 3
    nan, inf = math.nan, math.inf
    for wrong in ({"history": 0}, {"rest": 0.0}, {"rest": nan}, {"idle_factor": -0.1}, {"idle_factor": nan},
                  {"default": inf}, {"default": nan}, {"rest": inf}, {"idle_factor": inf}):  # fmt: skip
        with pytest.raises(ValueError, match="a priority needs history >= 1, rest > 0, idle_factor >= 0 and finite values, not"):
            StakePriority(**wrong)
