"""Estimates from logs against the truth: a made-up subnet with a learning gate, and recorded answers of real models."""

import csv
import functools
import gzip
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prompting_nb.config import InputError
from prompting_nb.validators.replay import Event, ask_always, ask_anyone, ask_best, estimate, line_and_uid, read_events
from prompting_nb.validators.selection import gumbel_top_k, select

ROOT = Path(__file__).resolve().parent.parent
RECORDED = Path(os.environ.get("ALPACAEVAL", ROOT / "../shared/data/alpacaeval")) / "prompts-scores.csv.gz"


def log(grades, scores, draw, k, noise, dice, learn=0.0):
    """A log with one event for each row of `grades` `(events, n)`.

    `scores` `(n,)` or `(events, n)` is what the gate says; a gate that learns moves each score towards the rewards.
    """
    events, scores = [], scores.clone()
    for step, grade in enumerate(grades):
        now = scores if scores.dim() == 1 else scores[step]
        uids, propensities = draw(now, k, generator=dice)
        rewards = grade[uids] + noise * torch.randn(k, generator=dice)
        events.append(Event(step, str(step), uids.tolist(), propensities.tolist(), rewards.tolist(), now.tolist()))
        if learn:
            scores[uids] += learn * (rewards - scores[uids])
    return events


def earned(events, grades, rule):
    "What a rule would really have earned on the prompts of a log."
    wanted = torch.stack([rule(event) for event in events])
    return ((wanted * grades).sum() / wanted.sum()).item()


@pytest.mark.parametrize("draw", [
    pytest.param(functools.partial(select, epsilon=0.3), id="epsilon"),
    pytest.param(functools.partial(gumbel_top_k, temperature=0.2), id="gumbel"),
])
def test_intervals_hold_the_truth_while_the_gate_learns(draw):
    "Over 30 subnets of 10 uids: IPS and DR are right on average, intervals hold the truth nearly as often as they say."
    misses, held = {"ips": [], "dr": []}, {"ips": [], "snips": [], "dr": []}
    for seed in range(30):
        dice = torch.Generator().manual_seed(seed)
        skill = torch.rand(3, 10, generator=dice)
        grades = skill[torch.randint(3, (250,), generator=dice)]  # (events, uids)
        events = log(grades, torch.full((10,), 0.5), draw, 3, 0.1, dice, learn=0.05)
        for rule in (ask_best(3), ask_always([0, 1, 2]), ask_anyone(3)):
            found, truth = estimate(events, rule), earned(events, grades, rule)
            for kind in held:
                low, high = getattr(found, f"{kind}_interval")
                held[kind].append(low <= truth <= high)
            for kind in misses:
                misses[kind].append(getattr(found, kind) - truth)
    for kind, values in misses.items():
        values = torch.tensor(values)
        assert abs(values.mean()) < 4 * values.std() / len(values)**0.5, kind
    for kind, values in held.items():
        assert sum(values) / len(values) > 0.9, (kind, sum(values) / len(values))
    assert torch.tensor(misses["dr"]).square().mean() < torch.tensor(misses["ips"]).square().mean()


def test_doubly_robust_survives_a_model_that_is_wrong():
    "With a reward model that says 5 for everybody, DM is far off; over 40 logs DR is not."
    misses, held = [], []
    for seed in range(40):
        dice = torch.Generator().manual_seed(seed)
        grades = torch.rand(8, generator=dice).expand(500, 8)
        draw = functools.partial(select, epsilon=0.5)
        events = log(grades, torch.rand(8, generator=dice), draw, 3, 0.1, dice)
        found = estimate(events, ask_always([1, 2]), fit=lambda events: lambda event: torch.full((8,), 5.0))
        truth = grades[0, [1, 2]].mean().item()
        assert found.dm == pytest.approx(5.0)
        misses.append(found.dr - truth)
        held.append(found.dr_interval[0] < truth < found.dr_interval[1])
    misses = torch.tensor(misses)
    assert abs(misses.mean()) < 4 * misses.std() / len(misses)**0.5 and misses.std() < 1
    assert sum(held) >= 36


def test_propensities_that_are_wrong_show_in_what_is_covered():
    "Half the propensities double the weights, and twice them halve these: the share that is covered is then not 1."
    dice = torch.Generator().manual_seed(1)
    grades = torch.rand(8, generator=dice).expand(400, 8)
    draw = functools.partial(select, epsilon=0.5)
    events = log(grades, torch.rand(8, generator=dice), draw, 3, 0.1, dice)
    assert estimate(events, ask_anyone(3)).covered == pytest.approx(1, abs=0.15)
    wrong = [replace(event, propensities=[min(1.0, 2 * p) for p in event.propensities]) for event in events]
    assert estimate(wrong, ask_anyone(3)).covered < 0.8 and "never asked" in estimate(wrong, ask_anyone(3)).warning


# three events, one or two uids asked; asking uid 0 always gives the weights 2, 4 and 0
SMALL = [Event(0, "a", [0], [0.5], [1.0], [0.1, 0.2]), Event(1, "b", [0, 1], [0.25, 0.8], [0.5, 0.9], [0.3, 0.2]),
         Event(2, "c", [1], [0.5], [0.2], [0.2, 0.4])]


def constant(value):
    "A model that predicts one value for both uids."
    return lambda events: lambda event: torch.full((2,), value)


def test_estimates_by_hand():
    "IPS = (2 * 1 + 4 * 0.5) / 3; SNIPS divides by 6; DR = 0.4 + (2 * 0.6 + 4 * 0.1) / 3."
    found = estimate(SMALL, ask_always([0]), fit=constant(0.4))
    assert (found.ips, found.snips, found.dm, found.dr) == pytest.approx((4 / 3, 4 / 6, 0.4, 0.4 + 1.6 / 3))
    assert found.covered == pytest.approx(6 / 3) and found.answers == 4
    tops = {"ips": ([2, 2, 0], [1, 1, 1]), "snips": ([2, 2, 0], [2, 4, 0]), "dr": ([1.6, 0.8, 0.4], [1, 1, 1])}
    for kind, (top, bottom) in tops.items():
        top, bottom = torch.tensor(top, dtype=torch.float64), torch.tensor(bottom, dtype=torch.float64)
        value = (top.sum() / bottom.sum()).item()
        half = 1.96 * ((top - value * bottom) / bottom.mean()).std(correction=0).item() / 2**0.5  # n - 1 = 2
        assert getattr(found, f"{kind}_interval") == pytest.approx((value - half, value + half)), kind


def test_effective_sample_size():
    "(sum w)^2 / sum w^2: weights 2 and 4 are worth 1.8 answers; equal weights are worth their number."
    assert estimate(SMALL, ask_always([0])).effective_sample_size == pytest.approx(6**2 / 20)
    for n in (1, 40):
        same = [replace(SMALL[0], step=step) for step in range(n)]
        assert estimate(same, ask_always([0])).effective_sample_size == pytest.approx(n)
    assert estimate(SMALL, ask_always([1])).effective_sample_size == pytest.approx((1.25 + 2)**2 / (1.25**2 + 4))


def test_no_event_is_judged_by_a_model_that_saw_it():
    "A model that knows the rewards of its own events only, and 0 elsewhere, is worth nothing: DR is IPS."
    seen = []

    def remember(events):
        seen.append({event.step for event in events})
        known = {event.step: event.rewards[0] for event in events}
        return lambda event: torch.full((2,), known.get(event.step, 0.0))

    events = [replace(SMALL[0], step=step, rewards=[0.5 + step / 100]) for step in range(23)]
    found = estimate(events, ask_always([0]), fit=remember)
    assert found.dm == 0 and found.dr == pytest.approx(found.ips)
    assert len(seen) == 5 and {len(steps) for steps in seen} == {18, 19}
    left_out = [step for steps in seen for step in set(range(23)) - steps]
    assert sorted(left_out) == list(range(23))
    assert sorted(set(range(23)) - seen[0]) != list(range(0, 23, 5))  # folds are drawn by chance
    seen.clear()
    estimate(events[:1], ask_always([0]), fit=remember)
    assert seen == [{0}]  # one event has nothing else to learn from


def test_missing_rewards_and_propensities():
    silent = [replace(SMALL[0], rewards=[None]), *SMALL[1:]]
    assert estimate(silent, ask_always([0])).ips == pytest.approx((0 + 2) / 3)
    assert estimate(silent, ask_always([0]), missing=1.0) == estimate(SMALL, ask_always([0]))
    blind = [replace(SMALL[0], propensities=[None]), *SMALL[1:]]
    found = estimate(blind, ask_always([0]), fit=constant(0.4))
    assert found.ips == pytest.approx(2 / 2) and found.answers == 3 and found.dm == pytest.approx(0.4)
    assert "1 of 3 events have no propensities" in found.warning
    blind = [replace(event, propensities=[None] * len(event.uids)) for event in SMALL]
    found = estimate(blind, ask_always([0]))
    assert math.isnan(found.dr) and "3 of 3 events" in found.warning and "only about" not in found.warning


@pytest.mark.parametrize("answers, few", [(29, True), (30, False)])
def test_a_log_of_few_answers_warns(answers, few):
    same = [Event(step, "", [0], [1.0], [0.5], [0.0] * 12) for step in range(answers)]
    warning = estimate(same, ask_always([0])).warning
    assert warning == (f"the log is worth only {answers} answers of this policy: too few to say anything" if few else None)


def test_a_log_that_never_asks_names_the_uids():
    same = [Event(step, "", [0], [1.0], [0.5], [0.0] * 12) for step in range(40)]
    warning = estimate(same, ask_always([0, 3])).warning
    assert "only about 50% of what this policy would ask" in warning and "(uids 3 never at all)" in warning
    warning = estimate(same, ask_anyone(6)).warning
    assert "(uids 1, 2, 3, 4, 5, 6, 7, 8 ... never at all)" in warning
    both = same + [replace(event, uids=[3]) for event in same]  # asked, but not when it would have been
    assert "never at all" not in estimate(both, ask_always([0, 3])).warning


def test_policies_ask_only_who_can_be_asked():
    event = Event(0, "", [0], [1.0], [0.5], [0.1, 0.9, 0.5, 0.7], available=[0, 2, 3])
    assert ask_best(2)(event).tolist() == [0, 0, 1, 1]
    assert ask_anyone(2)(event).tolist() == pytest.approx([2 / 3, 0, 2 / 3, 2 / 3])
    assert ask_best(2)(replace(event, available=None)).tolist() == [0, 1, 0, 1]
    assert ask_always([1, 2])(event).tolist() == [0, 1, 1, 0]


def test_the_model_of_rewards_by_hand():
    "The line through the scores, and of what is left a mean for each uid shrunk by five answers."
    events = [Event(i, "", [i % 2], [0.5], [0.3 + 0.5 * (i % 4 > 1) + 0.2 * (i % 2)], [float(i % 4 > 1)] * 2)
              for i in range(40)]
    predicted = line_and_uid(events)(replace(events[0], scores=[1.0, 1.0, 1.0]))  # 0.4 + 0.5 * score +- 0.1
    shrunk = 0.1 * 20 / 25
    assert predicted.tolist() == pytest.approx([0.9 - shrunk, 0.9 + shrunk, 0.9])
    flat = [replace(event, scores=[0.7, 0.7], rewards=[0.4]) for event in events]
    assert line_and_uid(flat)(flat[0]).tolist() == pytest.approx([0.4, 0.4])
    assert line_and_uid(flat)(events[0]).tolist() == pytest.approx([0.4, 0.4])  # equal scores tell nothing


WRONG = {
    "0 uids": {"uids": [], "propensities": [], "rewards": []}, "2 propensities": {"uids": [1], "rewards": [0.1]},
    "1 rewards": {"rewards": [0.1]}, "different": {"uids": [2, 2]}, "among the 3": {"uids": [2, 3]},
    "lie among": {"uids": [-1, 2]}, "only [0, 1] could be": {"available": [0, 1]}, "could be": {"available": [0, 2, 3]},
    "finite": {"rewards": [math.nan, 0]}, "not be 0": {"propensities": [0.9, 0]},
    "between 0 and 1": {"propensities": [1.1, 0.1]}, "KeyError: 'scores'": {"scores": ...}, "TypeError": {"rewards": [0, "x"]},
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_line_is_named(tmp_path, text):
    path = tmp_path / "events.jsonl"
    good = dict(step=0, prompt="?", uids=[2, 0], propensities=[0.9, 1], rewards=[0.8, None], scores=[0.1, 0.2, 0.9], more=1)
    path.write_text(json.dumps(good))
    assert read_events(path) == [Event(0, "?", [2, 0], [0.9, 1], [0.8, None], [0.1, 0.2, 0.9])]
    wrong = {key: value for key, value in {**good, **WRONG[text]}.items() if value is not ...}
    path.write_text(json.dumps(good) + "\n" + json.dumps(wrong) + "\n")
    with pytest.raises(InputError) as error:
        read_events(path)
    assert str(error.value).startswith(f"{path}:2: no event: ") and text in str(error.value)


def test_old_logs_without_propensities_are_read(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps(dict(step=0, prompt="?", uids=[2, 0], rewards=[0.8, None], scores=[0.1, 0.2, 0.9])))
    event, = read_events(path)
    assert event.propensities == [None, None] and not event.weighable and event.candidates.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="no events"):
        estimate([], ask_best(1))
    with pytest.raises(InputError, match="the policy asks nobody"):
        estimate([event], lambda event: torch.zeros(3))


def test_an_estimate_in_words():
    found = estimate(SMALL, ask_always([0]), fit=constant(0.4))
    assert str(found).startswith("DR 0.933 [") and "  IPS 1.333 [" in str(found) and "  SNIPS 0.667 [" in str(found)
    assert str(found).endswith(f"  DM 0.400  ESS 2 of 4\nwarning: {found.warning}")
    assert "warning" not in str(replace(found, warning=None))
    for kind in ("dr", "ips", "snips"):
        low, high = getattr(found, f"{kind}_interval")
        assert f"{kind.upper()} {getattr(found, kind):.3f} [{low:.3f}, {high:.3f}]" in str(found)


@pytest.fixture(scope="module")
def recorded():
    "Scores `(prompts, models)` of real models whose answers were all judged."
    if not RECORDED.is_file():
        pytest.skip(f"no recorded answers at {RECORDED}: set ALPACAEVAL to the folder that holds {RECORDED.name}")
    with gzip.open(RECORDED, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("prompt", "source")]
    kept = [[float(row[name]) for name in names] for row in rows if all(row[name] for name in names)]
    return torch.tensor(kept)


def test_recorded_models(recorded):
    """Logs of 400 recorded prompts, three of 56 models asked at each by a gate that knows their means on 40 others.

    Of 20 logs, for four rules: DR's interval holds what the rule would really have earned in at least nine of ten, DR
    is right on average, and nearer to the truth than the mean of the logged rewards.
    """
    held, misses, naive, warnings = [], [], [], 0
    n = recorded.shape[1]
    for seed in range(20):
        dice = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(recorded), generator=dice)
        belief, grades = recorded[order[:40]].mean(0), recorded[order[40:440]]
        draw = functools.partial(select, epsilon=0.5)
        events = log(grades, belief, draw, 3, 0.0, dice)
        worst = belief.argsort()[:3].tolist()
        middle = belief.argsort()[n // 2 - 5:n // 2 + 5].tolist()
        for rule in (ask_best(3), ask_anyone(3), ask_always(middle), ask_always(worst + middle)):
            found, truth = estimate(events, rule), earned(events, grades, rule)
            warnings += found.warning is not None
            held.append(found.dr_interval[0] <= truth <= found.dr_interval[1])
            misses.append(found.dr - truth)
            pairs = [(rule(e)[uid].item(), r) for e in events for uid, r in zip(e.uids, e.rewards)]
            naive.append(sum(w * r for w, r in pairs) / sum(w for w, _ in pairs) - truth)
    misses, naive = torch.tensor(misses), torch.tensor(naive)
    assert warnings <= 0.1 * len(held)  # these logs can answer; chance may make one look as if it could not
    print(f"held {sum(held) / len(held):.2f}, root mean squared error {misses.square().mean().sqrt():.3f}, "
          f"of the naive mean {naive.square().mean().sqrt():.3f}, warnings {warnings} of {len(held)}")
    assert sum(held) / len(held) >= 0.9
    assert abs(misses.mean()) < 4 * misses.std() / len(misses)**0.5
    assert misses.square().mean() < naive.square().mean()


def test_estimates_to_the_last_digit():
    "Rewards and propensities are as exact as the log has them."
    found = estimate(SMALL, ask_always([1]), fit=constant(0.25))
    ips = (0.9 / 0.8 + 0.2 / 0.5) / 3
    assert found.ips == pytest.approx(ips, rel=1e-12)
    assert found.snips == pytest.approx(3 * ips / (1 / 0.8 + 2), rel=1e-12)
    assert found.dr == pytest.approx(0.25 + ((0.9 - 0.25) / 0.8 + (0.2 - 0.25) / 0.5) / 3, rel=1e-12)
    one = estimate(SMALL[:1], ask_always([0]), fit=constant(0.25))  # one event has an interval of no width
    assert (one.ips, one.ips_interval, one.snips) == (2.0, (2.0, 2.0), 1.0)
    two = estimate([SMALL[0], replace(SMALL[1], rewards=[0.75, 0.9])], ask_always([0]))  # tops 2 and 3
    assert two.ips_interval == pytest.approx((2.5 - 1.96 * 0.5, 2.5 + 1.96 * 0.5), rel=1e-12)
    assert estimate([Event(0, "", [0], [1 + 1e-6], [1.0], [0.0])], ask_always([0])).covered == pytest.approx(1, abs=1e-5)
    few = lambda event: torch.tensor([0.1, 0.9])
    assert estimate([replace(SMALL[0], propensities=[1.0])] * 40, few).effective_sample_size == pytest.approx(40)


def test_a_reward_is_expected_to_the_last_digit():
    events = [Event(i, "", [i % 2], [0.5], [0.3 + 0.5 * (i % 4 > 1) + 0.2 * (i % 2)], [0.01 * (i % 4 > 1)] * 2)
              for i in range(40)]  # scores that hardly differ still have a slope: 50
    shrunk = 0.1 * 20 / 25
    assert line_and_uid(events)(replace(events[0], scores=[0.01] * 2)).tolist() == pytest.approx([0.9 - shrunk, 0.9 + shrunk], rel=1e-12)
    grown = line_and_uid(events)(replace(events[0], scores=[0.01] * 5))
    assert grown.tolist() == pytest.approx([0.9 - shrunk, 0.9 + shrunk, 0.9, 0.9, 0.9], rel=1e-12)
    smaller = [replace(events[0], scores=[0.0] * 4), *events]  # uids 2 and 3 are gone since
    assert line_and_uid(smaller)(events[0]).shape == (2,)


def test_folds_are_five_and_drawn_from_seed_0():
    dice = torch.Generator().manual_seed(0)
    events = log(torch.rand(6, generator=dice).expand(40, 6), torch.rand(6, generator=dice), select, 2, 0.3, dice)
    found = estimate(events, ask_anyone(2))
    assert found == estimate(events, ask_anyone(2), folds=5, seed=0)
    assert found.dr != estimate(events, ask_anyone(2), seed=1).dr and found.dr != estimate(events, ask_anyone(2), folds=6).dr
    with pytest.raises(InputError) as error:
        estimate([events[0], replace(events[1], rewards=[0.5])], ask_anyone(2))
    assert str(error.value) == "event 1 of the log: 2 uids, 2 propensities, 1 rewards: they belong together"


def test_warnings_word_for_word():
    same = [Event(step, "", [0], [1.0], [0.5], [0.0] * 12) for step in range(3)]
    unknown = "1 of 4 events have no propensities and count only in DM: log what `selection` returns"
    rare = ("the log speaks for only about 50% of what this policy would ask: the other uids were never asked in such a case"
            " (uids 3 never at all); explore more when logging")  # fmt: skip
    few = "the log is worth only 3 answers of this policy: too few to say anything"
    found = estimate([*same, replace(same[0], propensities=[None])], ask_always([0, 3]))
    assert found.warning == f"{unknown}; {rare}; {few}"
    for many, uids in ((9, "1, 2, 3, 4, 5, 6, 7, 8"), (10, "1, 2, 3, 4, 5, 6, 7, 8 ...")):
        assert f"(uids {uids} never at all)" in estimate(same, ask_always(list(range(many)))).warning
    both = same + [replace(event, uids=[3]) for event in same]
    assert "in such a case; explore more" in estimate(both, ask_always([0, 3])).warning
    blind = [replace(event, propensities=[None]) for event in same]
    assert estimate(blind, ask_always([0, 3])).warning == unknown.replace("1 of 4", "3 of 3")


@pytest.mark.parametrize("k", [3, 0])
def test_policies_refuse_more_uids_than_could_be_asked(k):
    event = Event(7, "", [0], [1.0], [0.5], [0.1, 0.9, 0.5], available=[0, 2])
    for make in (ask_best, ask_anyone):
        assert make(2)(event).tolist() == [1.0, 0.0, 1.0] and make(1)(event).sum() == 1
        with pytest.raises(InputError) as error:
            make(k)(event)
        assert str(error.value) == f"a policy cannot ask {k} of the 2 uids that could be asked in step 7"
    for uids in ([0, 3], [-1]):
        with pytest.raises(InputError) as error:
            ask_always(uids)(event)
        assert str(error.value) == f"uids {uids} should lie among the 3 of step 7"


LINE = {"step": 0, "prompt": "?", "uids": [2, 0], "propensities": [0.9, 0.1], "rewards": [0.8, None],
        "scores": [0.1, 0.2, 0.9], "statuses": [200, 200]}  # fmt: skip


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def said(warned):
    return [str(record.message) for record in warned]


def test_the_files_of_a_folder_with_rewards_that_came_late(tmp_path):
    write(tmp_path / "events.000001.jsonl", LINE)
    write(tmp_path / "events.jsonl", {**LINE, "step": 1, "statuses": [200, 408]}, {**LINE, "step": 2, "rewards": [None, None]})
    with pytest.warns(UserWarning) as warned:
        events = read_events(str(tmp_path))
    assert [(event.step, event.rewards) for event in events] == [(0, [0.8, None]), (1, [0.8, None]), (2, [None, None])]
    assert said(warned) == [f"{tmp_path}: 3 answers without a reward yet"]  # that of status 408 is no answer
    late = tmp_path / "rewards.jsonl"
    write(late, {"step": 2, "rewards": {"0": 0.5, "2": 0.25}}, {"step": 9, "rewards": {"0": 1, "1": 1}},
          {"step": 0, "rewards": {"2": 0.1, "1": 0.9, "0": "0.6"}}, {"step": 0, "rewards": {"0": 0.7}})  # fmt: skip
    with pytest.warns(UserWarning) as warned:
        events = read_events(tmp_path)
    assert [event.rewards for event in events] == [[0.8, 0.6], [0.8, None], [0.25, 0.5]]  # what is there stays
    assert said(warned) == [f"{late}: 3 rewards for no answer of the events read"]
    with pytest.warns(UserWarning) as warned:
        events = read_events(str(tmp_path / "events.jsonl"))  # a file has the rewards beside it
    assert [event.rewards for event in events] == [[0.8, None], [0.25, 0.5]]
    assert said(warned) == [f"{late}: 6 rewards for no answer of the events read"]


def test_a_file_without_a_reward_that_waits_warns_of_nothing(tmp_path, recwarn):
    write(tmp_path / "events.jsonl", {**LINE, "rewards": [0.8, 0.1]})
    assert read_events(tmp_path / "events.jsonl")[0].rewards == [0.8, 0.1]
    write(tmp_path / "rewards.jsonl", {"step": 0, "rewards": {}})
    assert read_events(tmp_path)[0].rewards == [0.8, 0.1] and not recwarn.list
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        read_events(tmp_path / "empty")
    assert str(error.value) == f"cannot read {tmp_path / 'empty'}: it holds no log of events"


@pytest.mark.parametrize("line, reason", [
    ("[]", "TypeError: "), ('{"rewards": {}}', "KeyError: 'step'"), ('{"step": 0, "rewards": [1]}', "AttributeError: "),
    ('{"step": 0, "rewards": {"0": NaN}}', "ValueError: a reward is not finite"), ("{", "JSONDecodeError: "),
    ('{"step": [], "rewards": {}}', "TypeError: "),
])  # fmt: skip
def test_late_rewards_that_cannot_be_read_are_named(tmp_path, line, reason):
    write(tmp_path / "events.jsonl", {**LINE, "rewards": [0.8, 0.1]})
    (tmp_path / "rewards.jsonl").write_text('{"step": 0, "rewards": {}}\n' + line + "\n")
    with pytest.raises(InputError) as error:
        read_events(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'rewards.jsonl'}:2: no late rewards: {reason}")


@pytest.mark.parametrize("change, problem", [
    ({"uids": []}, "0 uids, 2 propensities, 2 rewards: they belong together"),
    ({"uids": [2, 2]}, "uids [2, 2] should be different and lie among the 3 that have scores"),
    ({"available": [0, 1]}, "uids [2, 0] were asked, but only [0, 1] could be"),
    ({"propensities": [0.9, 0]}, "propensities [0.9, 0] should lie between 0 and 1, and not be 0 for a uid that was asked"),
    ({"rewards": [math.inf, 0]}, "rewards [inf, 0] should be finite numbers or null"),
    ({"scores": ...}, "KeyError: 'scores'"),
])  # fmt: skip
def test_what_is_wrong_with_an_event_word_for_word(tmp_path, change, problem):
    path = tmp_path / "events.jsonl"
    write(path, {key: value for key, value in {**LINE, **change}.items() if value is not ...})
    with pytest.raises(InputError) as error:
        read_events(path)
    assert str(error.value) == f"{path}:1: no event: {problem}"
