"""Estimates from logs against the truth: a made-up subnet with a learning gate, and recorded answers of real models."""

import csv
import functools
import gzip
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prompting_nb.validators.replay import Event, ask_always, ask_anyone, ask_best, estimate
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
