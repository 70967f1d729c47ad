"Rewards that come late, in any order, in parts or never; and explanations and prices, which stand beside the gate."

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prompting_nb.config import InputError
from prompting_nb.loop.network import Network
from prompting_nb.loop.tasks import Worker
from prompting_nb.validators.bayes import BayesianGatingModel
from prompting_nb.validators.cost import Prices, aiq, cost_curve, hull
from prompting_nb.validators.explain import Explanation, explain
from prompting_nb.validators.gating import SentenceEmbedGatingModel
from prompting_nb.validators.pending import Pending, later
from prompting_nb.validators.policies import LinTS, MeanPerUid
from prompting_nb.validators.selection import select, thompson
from prompting_nb.validators.validator import Policy, Validator, default_gate

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


def test_numbers_are_never_given_twice_and_rewards_reach_their_own_question():
    policy = MeanPerUid(NETWORK)
    pending = Pending(policy)
    assert pending.add("a", [0], id=3) == 3 and pending.add("b", [1]) == 4
    with pytest.raises(InputError, match="waits for its rewards already"):
        pending.add("c", [2], id=4)
    assert pending.reward(4, {"1": 0.9}) == 1, "uids from JSON are texts"
    assert pending.add("d", [1]) == 5 and pending.reward(4, {1: 0.1}) == 0
    for uids, hotkeys in (([0, 0], None), ([7], None), ([0, 1], ["k0"])):
        with pytest.raises(InputError, match="different uids with a hotkey each"):
            pending.add("e", uids, hotkeys=hotkeys)
    for wrong in ({0.5: 1.0}, {"one": 1.0}, {0: float("inf")}):
        with pytest.raises((TypeError, ValueError)):
            pending.reward(3, wrong)
    state = pending.state()
    with pytest.raises((KeyError, TypeError, ValueError)):
        pending.restore({"open": [[1, "x"]], "number": 0, "counts": {}})
    assert pending.state() == state, "what cannot be read changes nothing"


def test_prices_that_buy_nothing_are_refused():
    for wrong, text in ((dict(worth=math.nan), "finite and greater than 0"), (dict(budget=math.inf), "finite and greater than 0"),
                        (dict(budget=0.5), "buys nothing"), (dict(worth=1.0, rate=math.nan), "rate")):
        with pytest.raises(InputError, match=text):
            Prices({"k0": 1.0, "k1": 4.0}, **wrong)
    with pytest.raises(InputError, match="finite and at least 0"):
        Prices({"k0": "1"}, worth=1.0)
    assert Prices({"k0": 1.0}, budget=2.0).paid([]) == 0.0

# ---------------------------------------------------------------- in a validator


def yes(prompt):
    return "Yes, please do."


def broken(prompt):
    raise RuntimeError("out of memory")


@pytest.fixture(scope="module")
def small_network():
    workers = [Worker("ann", yes), Worker("bob", lambda _: "No."), Worker("cy", yes), Worker("dot", broken)]
    with Network(workers) as network:
        yield network


def opened(network, judge, **more):
    policy = more.pop("policy", Policy(k=2, timeout=30))
    return Validator(network.wallet, network.client, judge, policy=policy, allow_private=True, **more)


def test_a_validator_takes_rewards_by_event_in_any_order_or_never(small_network):
    with opened(small_network, later) as validator:
        events = [validator.step(text) for text in PROMPTS]
        asked = {uid for event in events[:2] for uid in event.uids}
        assert asked == {1, 2, 3, 4}, "who waits for a reward is no newcomer any more"
        for event in events:  # an answer that failed is worth 0 at once
            assert event.rewards == [0.0 if text is None else None for text in event.completions]
        waiting = sum(reward is None for event in events for reward in event.rewards)
        assert sum(validator.pending.waiting().values()) == waiting
        before = validator.gate.seen
        both = [event for event in events if event.rewards == [None, None]][::-1]
        assert len(both) >= 2
        for event in both:
            found = {uid: 0.9 for uid, reward in zip(event.uids, event.rewards) if reward is None}
            first = min(found)
            assert validator.reward(event.step, {first: 0.8}) == 1
            assert validator.reward(event.step, found) == len(found) - 1  # the other, and one again
        assert validator.pending.counts["repeated"] == len(both) and validator.gate.seen > before
        assert validator.reward(99, {1: 0.5}) == 0 and validator.pending.counts["unknown"] == 1
        with pytest.raises(ValueError, match="finite"):
            validator.reward(events[0].step, {events[0].uids[0]: math.nan})
        learned = Counter(validator.averages.counts)
        assert sum(learned.values()) == 12 - waiting + validator.pending.counts["learned"]
        state = json.loads(json.dumps(validator.pending.state()))
        again = Pending(validator.gate)
        again.restore(state)
        assert again.open == validator.pending.open and again.waiting() == validator.pending.waiting()


def test_late_rewards_teach_what_rewards_at_once_do(small_network):
    with opened(small_network, later) as late, opened(small_network, lambda _, texts: [0.7 if t else 0.0 for t in texts]) as now:
        for n, text in enumerate(PROMPTS):
            for validator in (late, now):
                validator.generator.manual_seed(n)
            one, other = late.step(text), now.step(text)
            assert one.uids == other.uids and one.hotkeys == other.hotkeys
            late.reward(one.step, {uid: 0.7 for uid, reward in zip(one.uids, one.rewards) if reward is None})
        assert late.averages.values == now.averages.values and late.averages.counts == now.averages.counts
        torch.testing.assert_close(late.gate(PROMPTS[0]), now.gate(PROMPTS[0]))


def test_a_validator_chooses_by_price_and_says_so(small_network):
    hotkeys = {neuron.uid: neuron.hotkey for neuron in small_network.client.subnets.metagraph(1)}
    dear = {hotkeys[1]: 10.0, hotkeys[2]: 1.0, hotkeys[3]: 10.0, hotkeys[4]: 10.0}
    judge = lambda _, texts: [0.0 if t is None else 0.9 if t.startswith("Yes") else 0.8 for t in texts]
    policy = Policy(k=1, timeout=30)
    with opened(small_network, judge, policy=policy, prices=Prices(dear, worth=10.0)) as validator:
        events = [validator.step(f"{text}, {n}") for n in range(5) for text in PROMPTS]
        assert [event.prices for event in events] == [[dear[event.hotkeys[0]]] for event in events]
        last = Counter(uid for event in events[-15:] for uid in event.uids)
        assert last[2] >= 12, "the cheap one is worth more: 0.8 - 1/10 against 0.9 - 10/10"
        assert {event.why.rows[0].reason for event in events[-15:] if event.uids == [2]} == {"cheap"}
        assert {event.why.rows[0].reason for event in events[:4]} == {"new"}
    with opened(small_network, judge, policy=policy) as validator:
        events = [validator.step(f"{text}, {n}") for n in range(5) for text in PROMPTS]
        assert events[-1].prices is None and sum(event.uids == [2] for event in events[-15:]) < 5


def test_the_explanation_of_a_choice_is_one_value_in_round_event_and_log(small_network):
    with opened(small_network, lambda _, texts: [0.5 if t else 0.0 for t in texts]) as validator:
        rounds = [validator.route(text) for text in PROMPTS]
        validator.ask(rounds[0])
        event = validator.learn(rounds[0])
        assert event.why is rounds[0].why and [row.uid for row in event.why.rows] == event.uids
        logged = json.loads(event.to_json())["why"]
        assert Explanation.from_dict(logged | {"prompt": event.prompt}) == event.why
        for row, chance, sd in zip(event.why.rows, event.propensities, event.sd):
            assert (row.hotkey, row.reason) == (event.hotkeys[event.uids.index(row.uid)], "new")
            assert row.chance == pytest.approx(chance, abs=1e-4) and row.sd == pytest.approx(sd, abs=1e-4)
    gate = default_gate(small_network.client.subnets.metagraph(1), kind="sentence")
    with opened(small_network, lambda _, texts: [0.5] * len(texts), gate=gate) as validator:
        why = validator.step(PROMPTS[0]).why
        assert [row.sd for row in why.rows] == [None, None] and not why.topics and "answers" not in str(why)


def test_a_batch_is_asked_at_once_and_learned_in_order(small_network):
    with opened(small_network, lambda _, texts: [0.5 if t else 0.0 for t in texts]) as validator:
        events = validator.batch(PROMPTS)
        assert [event.step for event in events] == list(range(6)) and validator.steps == 6
        assert [event.prompt for event in events] == PROMPTS and validator.batch([]) == []


class Own:
    "A policy of one's own: it chooses, learns and follows the hotkeys in its own way, and has no `hotkeys`."

    def __init__(self):
        self.told = []

    def scores(self, prompt):
        return torch.zeros(4)

    def learn(self, prompt, uids, rewards):
        self.told.append((prompt, uids.tolist(), [round(reward, 3) for reward in rewards.tolist()]))

    def resync(self, before, now):
        "Nothing is kept."


def test_a_policy_without_hotkeys_learns_late_too():
    own = Own()
    pending = Pending(own)
    with pytest.raises(InputError, match="nobody says which hotkeys"):
        pending.add("a", [0])
    first = pending.add("a", [0, 1], hotkeys=["k0", "k1"])
    assert pending.reward(first, {0: 0.4}) == 1 and own.told == [("a", [0], [0.4])]
    pending.add("b", [3], hotkeys=["k1"])  # it moved, as the later question says
    assert pending.reward(first, {1: 0.7}) == 1 and own.told[-1] == ("a", [3], [0.7])
    again = Pending(own)
    again.restore(json.loads(json.dumps(pending.state())))
    assert again.reward(1, {3: 0.2}) == 1 and own.told[-1] == ("b", [3], [0.2])


def test_a_metagraph_says_who_is_where():
    own = Own()
    pending = Pending(own, metagraph=NETWORK)
    number = pending.add("a", [0, 1])
    pending.resync(NETWORK, SimpleNamespace(hotkeys=["new", "k0", "k2", "k3"]))
    assert pending.reward(number, {0: 0.9, 1: 0.1}) == 1
    assert own.told == [("a", [1], [0.9])] and pending.counts["gone"] == 1
    batch = pending.ask(["b", "c"], lambda prompt: select(own.scores(prompt), 2))
    assert [asked.prompt for asked in batch] == ["b", "c"] and len(pending) == 2


def test_a_linear_bandit_says_its_hotkeys():
    vectors = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    policy = LinTS(NETWORK, dict(zip(PROMPTS, vectors)).__getitem__, vectors, components=2)
    pending = Pending(policy)
    number = pending.add(PROMPTS[0], [2])
    policy.resync(NETWORK, SimpleNamespace(hotkeys=["k2", "k0", "k1", "k3"]))
    assert pending.reward(number, {2: 0.9}) == 1
    assert policy.ridge.posterior(PROMPTS[0]).mean.argmax() == 0


def test_rewards_that_single_precision_cannot_hold_change_nothing(small_network):
    with opened(small_network, later) as validator:
        event = next(e for e in map(validator.step, PROMPTS) if None in e.rewards)
        uid = event.uids[event.rewards.index(None)]
        before = dict(validator.averages.values), validator.gate.seen
        for wrong in (1e39, -1e39, math.inf, math.nan):
            with pytest.raises(ValueError, match="finite"):
                validator.reward(event.step, {uid: wrong})
        assert (validator.averages.values, validator.gate.seen) == before
        assert sum(validator.pending.waiting().values()) and validator.reward(event.step, {uid: 0.5}) == 1


def test_a_gate_that_refuses_leaves_the_averages_alone(small_network, monkeypatch):
    with opened(small_network, later) as validator:
        event = next(e for e in map(validator.step, PROMPTS) if None in e.rewards)
        uid, before = event.uids[event.rewards.index(None)], dict(validator.averages.values)
        with monkeypatch.context() as broken:
            broken.setattr(validator.gate, "backward", lambda *_: (_ for _ in ()).throw(ValueError("no")))
            with pytest.raises(ValueError, match="no"):
                validator.reward(event.step, {uid: 0.5})
        assert validator.averages.values == before and validator.reward(event.step, {uid: 0.5}) == 1


def test_a_validator_that_follows_the_chain_tells_what_waits(small_network):
    with opened(small_network, later) as validator:
        assert validator.pending.holders == dict(enumerate(validator.metagraph.hotkeys))
        validator.pending.holders = {}
        validator.sync()
        assert validator.pending.holders == dict(enumerate(validator.metagraph.hotkeys))
