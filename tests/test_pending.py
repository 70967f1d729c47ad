"Rewards that come late, in any order, in parts or never; and explanations and prices, which stand beside the gate."

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prompting_nb.config import InputError
from prompting_nb.validators.bayes import BayesianGatingModel
from prompting_nb.validators.cost import Prices, aiq, cost_curve, hull
from prompting_nb.validators.explain import explain
from prompting_nb.validators.gating import SentenceEmbedGatingModel
from prompting_nb.validators.pending import Pending
from prompting_nb.validators.policies import MeanPerUid
from prompting_nb.validators.selection import select, thompson

NETWORK = SimpleNamespace(hotkeys=["k0", "k1", "k2", "k3"])
PROMPTS = [f"what is {n} plus 9" for n in range(6)]


def bayes():
    return BayesianGatingModel(NETWORK, {"gating": {"topics": 4}}, "minilm", num_uids=4)


def test_in_any_order_it_is_the_same_as_at_once():
    late, prompt = bayes(), bayes()
    pending, worth = Pending(late), torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    ids = [pending.add(text, [0, 2]) for text in PROMPTS]
    for n in (4, 0, 5, 2, 1, 3):
        assert pending.reward(ids[n], {0: float(worth[n, 0]), 2: None}) == 1
        assert pending.reward(ids[n], {2: float(worth[n, 2])}) == 1
    for n in (4, 0, 5, 2, 1, 3):
        for uid in (0, 2):
            prompt.backward(prompt(PROMPTS[n])[[uid]], worth[n, [uid]], [uid])
    torch.testing.assert_close(late.head.weight, prompt.head.weight)
    assert len(pending) == 0 and pending.counts == {"learned": 12, "repeated": 0, "gone": 0}


def test_rewards_follow_the_hotkey_that_was_asked():
    gate = bayes()
    pending = Pending(gate)
    number = pending.add(PROMPTS[0], [0, 1])
    moved = SimpleNamespace(hotkeys=["new", "k0", "k2", "k3"])  # k1 left, k0 is at uid 1
    gate.resync(NETWORK, moved)
    assert pending.reward(number, {0: 0.9, 1: 0.1}) == 1
    assert pending.counts["gone"] == 1 and gate(PROMPTS[0])[1] > gate(PROMPTS[0])[0] and len(pending) == 0


def test_what_does_not_fit_is_counted_and_nothing_wrong_is_learned():
    gate = bayes()
    pending = Pending(gate, size=2)
    first = pending.add(PROMPTS[0], torch.tensor([0, 1]), "first")
    with pytest.raises(InputError, match="waits for its rewards already"):
        pending.add(PROMPTS[1], [2], "first")
    with pytest.raises(ValueError, match="uid 1 is not"):
        pending.reward(first, {0: 0.5, 1: math.nan})
    assert gate.seen == 0
    assert pending.reward(first, {0: 0.5}) == 1 and pending.reward(first, {0: 0.5}) == 0
    pending.add(PROMPTS[1], [0])
    last = pending.add(PROMPTS[2], [1, 2, 3])  # the first one has to make room
    assert pending.reward(first, {1: 0.5}) == 0
    pending.drop(last)
    wanted = {"learned": 1, "repeated": 1, "expired": 1, "unknown": 1, "dropped": 3}
    assert {name: count for name, count in pending.counts.items() if count} == wanted
    with pytest.raises(InputError, match="at least one"):
        Pending(gate, size=0)


@pytest.mark.parametrize("make", [bayes, lambda: SentenceEmbedGatingModel(NETWORK, {}, "minilm", num_uids=4)])
def test_a_batch_is_encoded_at_once(make, monkeypatch):
    gate, sizes = make(), []
    encode = gate.encoder._encode
    monkeypatch.setattr(gate.encoder, "_encode", lambda texts: sizes.append(len(texts)) or encode(texts))
    choose = lambda prompt: select(gate(prompt), 2)
    batch = Pending(gate).ask(PROMPTS, choose)
    assert sizes[0] == 6 and sum(sizes) == 6
    assert [asked.prompt for asked in batch] == PROMPTS and len({asked.id for asked in batch}) == 6


def test_policies_wait_too():
    policy = MeanPerUid(NETWORK)
    pending = Pending(policy)
    (asked,) = pending.ask(["a"], lambda prompt: policy.choose(prompt, 2))
    uid = int(asked.selection.uids[0])
    assert pending.reward(asked.id, {uid: 0.9}) == 1 and policy.beliefs.at(torch.ones(1)).mean[uid] > 0.6


def test_an_explanation_agrees_with_the_gate():
    gate = bayes()
    for text in PROMPTS * 2:
        gate.backward(gate(text)[[0, 1, 3]], torch.tensor([0.9, 0.2, 0.6]))
    why = explain(gate, PROMPTS[0], k=2)
    mean, sd = gate.posterior(PROMPTS[0])
    counts = torch.zeros(4)
    draw = torch.Generator().manual_seed(5)
    for _ in range(1500):
        counts[thompson(mean, sd, 2, generator=draw).uids] += 1 / 1500
    for row in why.rows:
        assert abs(row.mean - mean[row.uid]) < 1e-4 and abs(row.sd - sd[row.uid]) < 1e-4
        assert abs(row.chance - counts[row.uid]) < 0.06 and row.hotkey == f"k{row.uid}"
        assert row.answers == (0 if row.uid == 2 else 6)
    assert sum(row.chance for row in why.rows) == pytest.approx(2, abs=1e-3)
    assert json.loads(json.dumps(why.to_dict()))["uids"][0]["reason"] == "good"
    assert "k0" in str(why) and "k0" in why._repr_html_()
    assert len(explain(gate, PROMPTS[0], most=2).rows) == 2
    assert explain(bayes(), PROMPTS[0]).topics == {}  # nothing learned yet
    with pytest.raises(InputError, match="only a gate with a posterior"):
        explain(SentenceEmbedGatingModel(NETWORK, {}, "minilm", num_uids=4), "a")


def test_a_worth_and_a_budget():
    worth = Prices({"k0": 1.0, "k1": 4.0}, worth=10.0)
    adjusted = worth.adjust(torch.tensor([0.5, 0.7, 0.7]), dict(enumerate(["k0", "k1", "stranger"])))
    torch.testing.assert_close(adjusted, torch.tensor([0.4, 0.3, 0.3]))
    assert worth.paid(["k0", "stranger"]) == 2.5 and worth.weight == 0.1
    budget = Prices({"k0": 1.0, "k1": 4.0}, budget=2.0)
    draw, paid = np.random.default_rng(0), []
    for _ in range(3000):
        scores = torch.tensor(draw.normal([0.4, 0.6], 0.15))
        paid.append(budget.paid([f"k{int(budget.adjust(scores, {0: 'k0', 1: 'k1'}).argmax())}"]))
    assert np.mean(paid[1000:]) == pytest.approx(2.0, abs=0.1)
    for wrong, text in ((dict(), "either"), (dict(worth=1, budget=1), "either"), (dict(worth=-1.0), "greater than 0")):
        with pytest.raises(InputError, match=text):
            Prices({"k0": 1.0}, **wrong)
    for prices in ({}, {"k0": -1.0}, {"k0": math.inf}):
        with pytest.raises(InputError, match="finite and at least 0"):
            Prices(prices, worth=1.0)


def test_the_curve_goes_from_the_best_to_the_cheapest():
    draw = np.random.default_rng(0)
    grades, price = draw.random((50, 4)), np.array([1.0, 2.0, 4.0, 8.0])
    points = cost_curve(grades, grades, price)
    assert points[0].grade == pytest.approx(grades.max(1).mean()) and points[-1].cost == 1.0
    assert all(a.cost >= b.cost - 1e-9 for a, b in zip(points, points[1:]))
    upper = hull(points)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(upper, upper[1:])]
    assert slopes == sorted(slopes, reverse=True) and min(slopes) > 0
    assert aiq(points, 1, 8) > max(grades.mean(0))
    assert cost_curve(grades, grades, np.ones(4))[0].cost == 1.0  # all cost the same
    with pytest.raises(InputError, match="should be"):
        cost_curve(grades, grades[:, :3], price)
