"""Bayesian gates through random histories of a subnet, questions that come again, and a restart."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from prompting_nb.config import InputError
from prompting_nb.validators.bayes import BayesianGatingModel, follow, posterior
from prompting_nb.validators.rows import save_rows
from prompting_nb.validators.selection import narrowing, thompson

CAPACITY = 6
MESSAGES = ["what is two plus nine", "how do I cook rice", "a trip to Rome", "why does my knee hurt", "sort a list"]
metagraphs = st.dictionaries(st.integers(0, CAPACITY - 1), st.integers(0, 8), min_size=1, max_size=CAPACITY).filter(
    lambda held: len(set(held.values())) == len(held))


def subnet(held):
    return SimpleNamespace(hotkeys=[f"key{key}" for key in held.values()], uids=list(held))


@pytest.fixture(scope="module")
def encoder():
    return BayesianGatingModel(subnet({0: 0}), model_name="minilm", num_uids=1).encoder


def make(encoder, held, num_uids=CAPACITY, **gating):
    gate = BayesianGatingModel(subnet(held), {"gating": {"model_name": "minilm", "topics": 4, **gating}}, num_uids=num_uids)
    gate.encoder = encoder
    return gate


def row(gate, uid):
    "All that is known of a uid: posterior, sums, and its remembered answers."
    known = gate.beliefs
    answers = {key: asked.rewards[asked.uids == uid].tolist() for key, asked in gate.memory.questions.items()}
    return [gate.head.weight[uid].detach().clone(), known.covariances[uid].clone(), known.squares[uid].clone(),
            known.products[uid].clone()], {key: value for key, value in answers.items() if value}


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0])) and one[1] == other[1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(history=st.lists(metagraphs, min_size=2, max_size=5), seed=st.integers(0, 99))
def test_what_is_known_follows_the_hotkey(encoder, history, seed, tmp_path_factory):
    generator = torch.Generator().manual_seed(seed)
    gate = make(encoder, history[0])
    path = tmp_path_factory.mktemp("gates") / "gate.safetensors"
    for step, (before, now) in enumerate(zip(history, history[1:])):
        for _ in range(4):
            uids = torch.tensor(list(before))[torch.rand(len(before), generator=generator) < 0.8]
            if len(uids):
                message = MESSAGES[int(torch.randint(len(MESSAGES), (), generator=generator))]
                gate.backward(gate(message)[uids], torch.rand(len(uids), generator=generator))
        known = {key: row(gate, uid) for uid, key in before.items()}
        nobody = [uid for uid in range(CAPACITY) if uid not in before]
        if step % 2:  # restarted from disk in between
            gate.save(path)
            gate = make(encoder, now)
            if not set(before.values()) & set(now.values()):
                with pytest.raises(InputError, match="none is among"):
                    gate.load(path)
                return
            gate.load(path)
        else:
            gate.resync(subnet(before), subnet(now))
        for uid in range(CAPACITY):
            if uid in now and now[uid] in known:
                assert same(row(gate, uid), known[now[uid]])
            elif uid in now or uid not in nobody:
                (mean, covariance, squares, products), answers = row(gate, uid)
                assert torch.equal(mean, gate.beliefs.prior.mean)
                assert torch.equal(covariance, gate.beliefs.prior.covariance)
                assert not squares.any() and not products.any() and not answers


def test_step_by_step_is_as_good_as_all_at_once(encoder):
    gate = make(encoder, {uid: uid for uid in range(4)}, num_uids=4)
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        uids = torch.randperm(4, generator=generator)[:2]
        gate.backward(gate(f"{MESSAGES[step % 5]} {step % 13}")[uids], torch.rand(2, generator=generator))
    known = gate.beliefs
    means, covariances = posterior(known.prior, known.squares, known.products)
    torch.testing.assert_close(gate.head.weight.detach(), means, atol=2e-3, rtol=0)
    torch.testing.assert_close(known.covariances, covariances, atol=1e-3, rtol=0)


def test_the_same_answer_twice_counts_once(encoder):
    once, twice = (make(encoder, {0: 0, 1: 1}, num_uids=2) for _ in range(2))
    for gate, times in ((once, 1), (twice, 3)):
        for _ in range(times):
            gate.backward(gate(MESSAGES[0]), torch.tensor([1.0, 0.2]))
    torch.testing.assert_close(once.head.weight, twice.head.weight)
    torch.testing.assert_close(once.beliefs.covariances, twice.beliefs.covariances)


@pytest.mark.parametrize("size", [1, 3, CAPACITY])
def test_told_or_not_the_uids_are_the_same(encoder, size):
    "Few scores have a sparse gradient, many a dense one; of either the order counts."
    held = {uid: uid for uid in range(CAPACITY)}
    told, not_told = make(encoder, held), make(encoder, held)
    generator = torch.Generator().manual_seed(size)
    for step in range(12):
        uids, rewards = torch.randperm(CAPACITY, generator=generator)[:size], torch.rand(size, generator=generator)
        one = told.backward(told(f"{MESSAGES[step % 5]} {step}")[uids], rewards, uids.tolist() if step % 2 else uids)
        assert one == not_told.backward(not_told(f"{MESSAGES[step % 5]} {step}")[uids], rewards)
    assert torch.equal(told.head.weight, not_told.head.weight)
    assert all(same(row(told, uid), row(not_told, uid)) for uid in range(CAPACITY))
    assert not torch.equal(told.head.weight, make(encoder, held).head.weight)


def test_only_the_memory_counts(encoder):
    gate = make(encoder, {0: 0}, num_uids=1, memory=3)
    for step in range(10):
        gate.backward(gate(f"question number {step}"), torch.tensor([float(step)]) / 10)
    assert len(gate.memory) == 3
    gate.reflect()
    assert gate.beliefs.squares[0, 0, 0].item() == pytest.approx(3)


@pytest.mark.parametrize("reward", [torch.nan, torch.inf, -torch.inf])
def test_what_cannot_be_learned_leaves_everything(encoder, reward):
    gate = make(encoder, {0: 0, 1: 1}, num_uids=2)
    before = row(gate, 0)
    for scores, rewards, text in ((gate("abc"), [reward, 0.0], "finite"), (gate("abc"), [1.0], "got 1"),
                                  (gate("abc")[[0, 0]], [1.0, 1.0], "different uids"),
                                  (gate("abc").detach(), [1.0, 1.0], "no gradient")):
        with pytest.raises(ValueError, match=text):
            gate.backward(scores, torch.tensor(rewards))
    for uids in ([0, 0], [0, 2], [-1, 0], [0], [[0, 1]]):
        with pytest.raises(ValueError, match="different uids from 0 to 1"):
            gate.backward(gate("abc"), torch.tensor([1.0, 1.0]), uids)
    with pytest.raises(ValueError, match="do not come from"):
        gate.backward(make(encoder, {0: 0, 1: 1}, num_uids=2)("abc"), torch.ones(2))
    with pytest.raises(ValueError, match="do not come from"):
        gate.backward(make(encoder, {0: 0, 1: 1}, num_uids=2)("abc"), torch.ones(2), [0, 1])
    assert same(row(gate, 0), before) and gate.seen == 0


def test_a_uid_that_times_out_is_asked_less_and_a_newcomer_early(encoder):
    gate = make(encoder, {uid: uid for uid in range(6)})
    generator = torch.Generator().manual_seed(0)
    asked = []
    for step in range(150):
        if step == 75:
            gate.resync(None, subnet({uid: uid for uid in range(5)} | {5: 8}))
        scores, sd = gate.posterior(f"{MESSAGES[step % 5]} {step}")
        uids, propensities = thompson(scores, sd, 2, width=narrowing(step * 2 / 6), epsilon=0.1, generator=generator)
        rewards = torch.where(uids == 0, 0.0, torch.where(uids == 5, 0.9, 0.6))  # uid 0 never answers in time
        gate.backward(scores[uids], rewards)
        asked.append(uids.tolist())
        assert (propensities >= 0.1 * 2 / 6 - 1e-6).all()
    count = lambda uid, steps: sum(uid in uids for uids in steps)
    assert 0 < count(0, asked[20:]) < count(1, asked[20:]) / 2
    assert count(5, asked[75:85]) >= 2


def test_a_mismatch_says_what_differs(encoder, tmp_path):
    make(encoder, {0: 0}).save(tmp_path / "gate")
    for gating, text in (({"num_uids": 9}, "num_uids is 6 there and 9 here"), ({"topics": 5}, "topics is 4 there and 5 here")):
        with pytest.raises(InputError, match=text):
            make(encoder, {0: 0}, **{"num_uids": CAPACITY, **gating}).load(tmp_path / "gate")


def test_a_gate_says_how_many_hotkeys_it_found(encoder, tmp_path, caplog):
    make(encoder, {0: 0, 1: 1}).save(tmp_path / "gate")
    make(encoder, {3: 0, 1: 1}).load(tmp_path / "gate")
    assert caplog.messages == []
    make(encoder, {0: 0, 1: 5, 2: 6}).load(tmp_path / "gate")
    assert caplog.messages == ["gate has rows for 1 of 3 hotkeys; the others start anew"]


def test_growth_beyond_capacity_changes_nothing(encoder):
    gate = make(encoder, {0: 0, 1: 1}, num_uids=2)
    gate.backward(gate("abc"), torch.tensor([0.9, 0.1]))
    before = row(gate, 0)
    for previous, now in (({0: 0, 1: 1}, {0: 1, 2: 0}), ({0: 0, 2: 1}, {0: 1})):
        with pytest.raises(InputError, match="3 uids.*num_uids = 2"):
            gate.resync(subnet(previous), subnet(now))
    assert same(row(gate, 0), before) and gate.hotkeys == {0: "key0", 1: "key1"}


RESTART = """
import sys, torch
from types import SimpleNamespace
from prompting_nb.validators.bayes import BayesianGatingModel
gate = BayesianGatingModel(SimpleNamespace(hotkeys=["key0", "key1"]), {"gating": {"topics": 4}}, "minilm", 2)
gate.load(sys.argv[1])
gate.backward(gate("how do I boil eggs"), torch.tensor([0.7, 0.1]))
print(*gate("a trip to Oslo").tolist())
"""


def test_a_restart_changes_nothing(encoder, tmp_path):
    gate = make(encoder, {0: 0, 1: 1}, num_uids=2)
    for step in range(12):
        gate.backward(gate(f"{MESSAGES[step % 5]} {step}"), torch.tensor([0.2, 0.8]))
    gate.save(tmp_path / "gate")
    done = subprocess.run([sys.executable, "-c", RESTART, str(tmp_path / "gate")], capture_output=True, text=True, check=True)
    gate.backward(gate("how do I boil eggs"), torch.tensor([0.7, 0.1]))
    assert [float(value) for value in done.stdout.split()] == pytest.approx(gate("a trip to Oslo").tolist(), abs=1e-4)


def answered(encoder, steps, reward, **gating):
    gate = make(encoder, {uid: uid for uid in range(3)}, num_uids=3, **gating)
    for step in range(steps):
        gate.backward(gate(f"{MESSAGES[step % 5]} {step}")[[0, 1]], reward(step), [0, 1])
    return gate


def test_a_gate_with_a_half_life_follows_a_miner_that_changes(encoder):
    change = lambda step: torch.tensor([0.9 if step < 80 else 0.2, 0.5]) + 0.02 * (-1) ** step
    firm, fickle = (answered(encoder, 100, change, half_life=h) for h in (0, 20))
    (was, _, _), (now, _, _) = firm(MESSAGES[0]), fickle(MESSAGES[0])
    assert was > 0.7 and now < 0.45
    mean, sd = fickle.posterior(MESSAGES[0])
    assert sd[2] > sd[:2].max() and firm.posterior(MESSAGES[0]).sd[0] < sd[0]  # it must be confirmed for ever


def test_step_by_step_with_a_half_life_is_as_good_as_all_at_once(encoder):
    gate = answered(encoder, 30, lambda step: torch.tensor([0.2 + 0.02 * step, 0.5]), half_life=15)
    mean, covariances = gate.head.weight.clone(), gate.beliefs.covariances.clone()
    log = gate.memory.answers(gate.features)
    found = follow(gate.beliefs.prior, log._replace(ages=log.ages - 1), 3, gate.beliefs.keep)
    torch.testing.assert_close(found[0], mean.detach(), atol=5e-3, rtol=0)
    torch.testing.assert_close(found[1], covariances, atol=1e-3, rtol=0)


def test_with_a_half_life_the_same_question_counts_again(encoder):
    sure = [answered(encoder, 0, None, half_life=h) for h in (0, 1000)]
    for gate in sure:
        for _ in range(4):
            gate.backward(gate(MESSAGES[0])[[0]], torch.tensor([0.7]), [0])
    assert [len(gate.memory) for gate in sure] == [1, 4]
    assert sure[1].posterior(MESSAGES[0]).sd[0] < sure[0].posterior(MESSAGES[0]).sd[0]


def test_what_is_forgotten_is_so_after_a_restart_too(encoder, tmp_path):
    gate = answered(encoder, 30, lambda step: torch.tensor([0.2 + 0.02 * step, 0.5]), half_life=15)
    gate.save(tmp_path / "gate")
    again = make(encoder, {uid: uid for uid in range(3)}, num_uids=3, half_life=15)
    again.load(tmp_path / "gate")
    for one in (gate, again):
        one.backward(one("one more")[[2]], torch.tensor([0.3]), [2])
        one.reflect()
    torch.testing.assert_close(gate.head.weight, again.head.weight)
    assert torch.equal(gate.beliefs.fences, again.beliefs.fences) and gate.memory.clock == again.memory.clock


def test_a_file_from_before_there_were_fences_is_read(encoder, tmp_path):
    gate = answered(encoder, 12, lambda step: torch.tensor([0.9, 0.5]))
    tensors = gate.beliefs.tensors() | gate.memory.tensors() | {"centres": gate.centres}
    old = {name: value for name, value in tensors.items() if name not in ("fences", "log_at")}
    save_rows(tmp_path / "gate", old, gate._identity(), gate.hotkeys, seen="12", review="20")
    again = make(encoder, {uid: uid for uid in range(3)}, num_uids=3)
    again.load(tmp_path / "gate")
    assert torch.equal(again(MESSAGES[1]), gate(MESSAGES[1])) and not again.known
    again.reflect()
    torch.testing.assert_close(again.beliefs.fences, torch.tensor([-0.1, 1.5]))


def test_a_wild_reward_moves_little(encoder):
    usual = lambda step: torch.tensor([0.6, 0.5]) + 0.05 * (-1) ** step
    wild = lambda step: usual(step) + torch.tensor([900.0 * (step == 40), 0.0])
    quiet, loud = answered(encoder, 60, usual), answered(encoder, 60, wild)
    assert (quiet(MESSAGES[0]) - loud(MESSAGES[0])).abs().max() < 0.05
    loud.reflect()
    assert (quiet(MESSAGES[0]) - loud(MESSAGES[0])).abs().max() < 0.05
    assert max(question.rewards.max() for question in loud.memory.questions.values()) > 900  # as it came


def test_a_silent_change_is_logged_once_and_can_be_forgotten(encoder, caplog):
    noise = torch.Generator().manual_seed(0)
    change = lambda step: torch.tensor([0.9 if step < 60 else 0.3, 0.5]) + 0.1 * torch.randn(2, generator=noise)
    with caplog.at_level("WARNING"):
        gate = answered(encoder, 75, change)
    assert [text for text in caplog.messages if "has it changed" in text] == ["uid 0 (key0) earns less than was expected: has it changed?"]
    assert gate.watch.alarmed == [0]
    gate.forget("key0")
    mean, sd = gate.posterior(MESSAGES[0])
    assert torch.isclose(sd[0], sd[2]) and not gate.watch.alarmed
    with pytest.raises(InputError, match="no uid has the hotkey 'key9'"):
        gate.forget("key9")


def test_a_question_asked_twice_keeps_all_answers_without_a_half_life(encoder, tmp_path):
    start = make(encoder, {uid: uid for uid in range(3)}, num_uids=3, half_life=50)
    for uids, rewards in (([0, 1], [0.9, 0.2]), ([2], [0.6]), ([1], [0.4])):
        start.backward(start(MESSAGES[0])[uids], torch.tensor(rewards), uids)
    start.backward(start(MESSAGES[1])[[0]], torch.tensor([0.3]), [0])
    start.save(tmp_path / "gate")
    gate = make(encoder, {uid: uid for uid in range(3)}, num_uids=3)
    gate.load(tmp_path / "gate")
    kept = [dict(zip(q.uids.tolist(), q.rewards.tolist())) for q in gate.memory.questions.values()]
    assert [{uid: round(reward, 3) for uid, reward in row.items()} for row in kept] == [{0: 0.9, 2: 0.6, 1: 0.4}, {0: 0.3}]
    gate.backward(gate(MESSAGES[0])[[2]], torch.tensor([0.7]), [2])
    assert len(gate.memory) == 2, "it is recognized"


@pytest.mark.parametrize("before, after", [(0, 20), (20, 0), (20, 90), (20, 20)])
def test_what_was_saved_with_another_half_life_is_reviewed(before, after, encoder, tmp_path, caplog):
    rewards = lambda step: torch.tensor([0.9 if step < 60 else 0.2, 0.5]) + 0.02 * (-1) ** step
    gate = answered(encoder, 80, rewards, half_life=before)
    gate.save(tmp_path / "gate")
    again = make(encoder, {uid: uid for uid in range(3)}, num_uids=3, half_life=after)
    with caplog.at_level("INFO"):
        again.load(tmp_path / "gate")
    assert ("half-life of" in caplog.text) == (before != after)
    loaded, sd = again.posterior(MESSAGES[0])
    again.reflect()
    reviewed, sd_now = again.posterior(MESSAGES[0])
    if before != after:
        torch.testing.assert_close(loaded, reviewed, atol=0.02, rtol=0)
        torch.testing.assert_close(sd, sd_now, atol=0.02, rtol=0)
