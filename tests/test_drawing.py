"""What draws of uids and estimates from logs depend on: the generator that is given, and nothing else."""

import json

import pytest
import torch

from prompting_nb.config import InputError
from prompting_nb.validators.replay import Event, ask_always, estimate, read_events
from prompting_nb.validators.selection import gumbel_top_k, narrowing, select, thompson, ucb

N = 200
SCORES = torch.linspace(0, 1, N)
SD = torch.full((N,), 0.2)
RULES = {
    "select": lambda **more: select(SCORES, 5, **{"epsilon": 0.5, **more}),
    "gumbel": lambda **more: gumbel_top_k(SCORES, 5, **{"epsilon": 0.5, **more}),
    "thompson": lambda **more: thompson(SCORES, SD, 5, **{"epsilon": 0.5, **more}),
    "ucb": lambda **more: ucb(SCORES, SD, 5, **{"epsilon": 0.5, **more}),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("newcomers", [None, range(9)], ids=["old", "newcomers"])
def test_a_rule_draws_from_its_generator_only(rule, newcomers):
    before, draw = torch.random.get_rng_state(), RULES[rule]
    for seed in range(5):
        one, two = (draw(newcomers=newcomers, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
        assert one.uids.equal(two.uids) and one.propensities.equal(two.propensities)
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("rule", RULES)
def test_only_available_uids_are_asked(rule):
    for seed in range(5):
        found = RULES[rule](available=range(10, 20), generator=torch.Generator().manual_seed(seed))
        assert set(found.uids.tolist()) <= set(range(10, 20))
    with pytest.raises(InputError, match="only 4 of 200 can be"):
        RULES[rule](available=range(4))


def test_of_equals_the_lower_uid_is_asked():
    assert select(torch.zeros(5000), 6, epsilon=0.0).uids.tolist() == list(range(6))
    assert select(torch.zeros(5000), 4999, epsilon=1.0, available=range(4999)).uids.shape == (4999,)


def test_no_propensity_is_zero_or_above_one():
    for rule in (gumbel_top_k(torch.tensor([0.0, 0.0, 50.0]), 1, generator=torch.Generator().manual_seed(0)),
                 thompson(torch.tensor([0.0, 9.0]), torch.zeros(2), 1),
                 thompson(torch.tensor([0.0, 9.0]), torch.zeros(2), 2)):  # fmt: skip
        assert 0 < rule.propensities.min() and rule.propensities.max() <= 1
    assert thompson(torch.tensor([0.0, 9.0]), torch.zeros(2), 1).uids.tolist() == [1]


def test_all_newcomers_fill_all_places():
    for draw in (select, gumbel_top_k):
        found = draw(torch.zeros(6), 2, epsilon=0.0, newcomers=[4, 5], generator=torch.Generator().manual_seed(1))
        assert sorted(found.uids.tolist()) == [4, 5] and found.propensities.tolist() == [1.0, 1.0]
        found = draw(torch.zeros(6), 1, epsilon=0.0, newcomers=[5], generator=torch.Generator().manual_seed(1))
        assert (found.uids.tolist(), found.propensities.tolist()) == ([5], [1.0])


def test_the_width_narrows_from_its_start():
    assert narrowing(0.0) == narrowing(12.0) == 1.3
    assert narrowing(192.0) == pytest.approx(0.65) and narrowing(1e9) == 0.65


def test_estimates_say_what_they_lack():
    with pytest.raises(InputError) as error:
        estimate([], ask_always([0]))
    assert str(error.value) == "the log has no events: there is nothing to estimate from"
    event = Event(0, "p", [0], [0.5], [1.0], [0.2, 0.1])
    with pytest.raises(InputError) as error:
        estimate([event], lambda event: torch.zeros(2))
    assert str(error.value) == "the policy asks nobody in any event of the log"


LINE = {"step": 0, "prompt": "p", "uids": [0], "propensities": [0.5], "rewards": [1.0], "scores": [0.2, 0.1]}


@pytest.mark.parametrize("wrong, reason", [
    ({"uids": [0, 1]}, "they belong together"), ({"uids": [2]}, "that have scores"),
    ({"propensities": [1.5]}, "that was asked"),
])  # fmt: skip
def test_an_event_that_does_not_fit_together_is_refused(tmp_path, wrong, reason):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(LINE) + "\n")
    assert [event.uids for event in read_events(path)] == [[0]]
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | wrong) + "\n")
    with pytest.raises(InputError) as error:
        read_events(path)
    assert str(error.value).startswith(f"{path}:2: no event: ") and str(error.value).endswith(reason)


def test_an_event_may_be_of_one_uid_that_everybody_is():
    event = Event(0, "p", [0], [1.0], [1.0], [0.2])
    assert estimate([event, event], ask_always([0])).snips == 1.0


def test_estimates_do_not_touch_the_generator_of_torch():
    before = torch.random.get_rng_state()
    events = [Event(step, "p", [step % 2], [0.5], [float(step % 3)], [0.2, 0.1]) for step in range(12)]
    first, again = (estimate(events, ask_always([0])) for _ in range(2))
    assert first == again and torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("draw", [
    lambda dice: gumbel_top_k(torch.zeros(8), 5, newcomers=[6, 7], generator=dice),
    lambda dice: thompson(torch.zeros(8), torch.ones(8), 5, newcomers=[6, 7], generator=dice),
], ids=["gumbel", "thompson"])  # fmt: skip
def test_newcomers_take_places_and_the_others_are_drawn_once_each(draw):
    for seed in range(20):
        found = draw(torch.Generator().manual_seed(seed))
        chance = dict(zip(found.uids.tolist(), found.propensities.tolist()))
        assert len(chance) == 5 and chance.pop(6) == chance.pop(7) == 1.0
        assert list(chance.values()) == pytest.approx([0.5] * 3, abs=0.15)  # three of six equals


def test_pictures_of_a_report_are_dark_in_dark_mode():
    from prompting_nb.loop.report import page_of

    assert "@media (prefers-color-scheme: dark)" in page_of("a run", "<img>") and "invert(1)" in page_of("a run", "<img>")
