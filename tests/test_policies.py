"Classical bandits as policies: they learn, they follow hotkeys, and they ask only who is there."

from types import SimpleNamespace

import pytest
import torch

from prompting_nb.config import InputError
from prompting_nb.validators.policies import Bandit, BestFixed, LinTS, LinUCB, MeanPerUid, NearestAnswers, ask

N, K = 8, 2
SEED = torch.Generator().manual_seed(0)
VECTORS = {f"{kind} {n}": torch.nn.functional.normalize(torch.eye(4)[kind] + 0.05 * torch.randn(4, generator=SEED), dim=0)
           for kind in (0, 1) for n in range(30)}
SKILL = torch.rand(2, N, generator=torch.Generator().manual_seed(5))
NETWORK = SimpleNamespace(hotkeys=[f"k{uid}" for uid in range(N)])
PROMPTS = torch.stack([*VECTORS.values()])
encoder = VECTORS.__getitem__
MAKE = {
    "LinTS": lambda **more: LinTS(NETWORK, encoder, PROMPTS, components=2, **more),
    "learned": lambda **more: LinTS(NETWORK, encoder, PROMPTS, components=2, learned_prior=True, **more),
    "LinUCB": lambda **more: LinUCB(NETWORK, encoder, PROMPTS, components=2, **more),
    "nearest": lambda **more: NearestAnswers(NETWORK, encoder, neighbours=8, steps=30, **more),
    "mean": lambda **more: MeanPerUid(NETWORK, **more),
}


def play(policy, prompts, available=None):
    got = []
    for prompt in prompts:
        uids = ask(policy, prompt, K, available).uids
        policy.learn(prompt, uids, SKILL[int(prompt[0]), uids])
        got.append(uids)
    return torch.stack(got)


@pytest.mark.parametrize("name", MAKE)
def test_a_policy_learns_whom_to_ask(name):
    policy = MAKE[name]()
    assert isinstance(policy, Bandit)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [[*VECTORS][i] for i in order * 2]
    asked = play(policy, prompts)[-30:]
    got = torch.stack([SKILL[int(p[0]), uids].mean() for p, uids in zip(prompts[-30:], asked)]).mean()
    best, fixed = SKILL.topk(K, 1).values.mean(), SKILL.mean(0).topk(K).values.mean()
    assert got > (fixed - 0.05 if name == "mean" else best - 0.08) and (name == "mean" or best - 0.08 > SKILL.mean() + 0.15)


@pytest.mark.parametrize("name", MAKE)
def test_only_those_that_are_there_are_asked(name):
    there = [1, 4, 6]
    assert set(play(MAKE[name](), [*VECTORS][:30], there).flatten().tolist()) == set(there)


@pytest.mark.parametrize("name", MAKE)
def test_what_is_known_follows_the_hotkey(name):
    policy = MAKE[name]()
    play(policy, [*VECTORS] * 2)
    score = lambda prompt: policy.scores(prompt) if name == "nearest" else (
        policy.beliefs.at(torch.ones(1)).mean if name == "mean" else policy.ridge.posterior(prompt).mean)
    before = score("1 3").clone()
    hotkeys = [*NETWORK.hotkeys[::-1][:-1], "new"]  # k0 left
    policy.resync(NETWORK, SimpleNamespace(hotkeys=hotkeys))
    after = score("1 3")
    torch.testing.assert_close(after[:-1], before.flip(0)[:-1])
    assert after[-1] == torch.inf if name == "nearest" else torch.isfinite(after[-1])
    if name == "nearest":
        assert 7 in ask(policy, "1 3", K).uids.tolist() or policy.seen < policy.steps  # newcomers first


def test_an_answer_that_comes_again_counts_once_in_a_ridge():
    once, again = MAKE["LinTS"](), MAKE["LinTS"]()
    uids, rewards = torch.tensor([0, 3]), torch.tensor([0.9, 0.1])
    once.learn("0 1", uids, rewards)
    for value in (torch.tensor([0.2, 0.4]), rewards):
        again.learn("0 1", uids, value)
    for one, two in zip(once.ridge.posterior("0 2"), again.ridge.posterior("0 2")):
        torch.testing.assert_close(one, two)


def test_ridge_is_ridge_regression():
    policy = LinTS(NETWORK, encoder, PROMPTS, components=2, ridge=2.0, noise=0.04, start=0.3)
    phi, y = policy.ridge.features(PROMPTS[:5]), torch.tensor([0.1, 0.9, 0.4, 0.5, 0.6])
    for prompt, reward in zip(VECTORS, y):
        policy.learn(prompt, torch.tensor([2]), reward[None])
    inverse = torch.linalg.inv(phi.T @ phi + 2.0 * torch.eye(3))
    start = torch.tensor([0.3, 0, 0])
    weight = start + inverse @ phi.T @ (y - phi @ start)
    mean, sd = policy.ridge.posterior("1 7")
    of = policy.ridge.features(VECTORS["1 7"][None])[0]
    torch.testing.assert_close(mean[2], of @ weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(sd[2], 0.2 * (of @ inverse @ of).sqrt(), atol=1e-5, rtol=0)


def test_the_best_fixed_choice_has_many_spellings():
    ranking = SimpleNamespace(prompt="a", scores=[0.1, 0.7], names=["k5", "k1"])
    for worth in ({"k1": 0.7, "k5": 0.1}, [ranking], [0.0, 0.7, 0, 0, 0, 0.1]):
        policy = BestFixed(NETWORK, worth)
        assert ask(policy, "", 2).uids.tolist()[:1] == [1] and 5 in ask(policy, "", 2).uids.tolist()
        assert ask(policy, "", 1, [0, 5]).uids.tolist() == [5]
        policy.resync(NETWORK, SimpleNamespace(hotkeys=["k1", "k0"]))
        assert ask(policy, "", 1).uids.tolist() == [0]


def test_scores_alone_are_enough_and_nothing_is_refused():
    scored = SimpleNamespace(scores=lambda prompt: [0.1, 0.9, 0.5])
    assert ask(scored, "", 2, epsilon=0).uids.tolist() == [1, 2]
    assert ask(scored, "", 1, available=[0, 2], epsilon=0).uids.tolist() == [2]
    with pytest.raises(InputError, match="SimpleNamespace has neither"):
        ask(SimpleNamespace(), "", 1)


@pytest.mark.parametrize("name", MAKE)
def test_nothing_wrong_is_learned(name):
    policy = MAKE[name]()
    nan, inf = float("nan"), float("inf")
    for uids, rewards in (([0, 1], [0.5, nan]), ([0], [inf]), ([2, 2], [0.1, 0.2]), ([N], [0.5]), ([-1], [0.5]), ([0, 1], [0.5])):
        with pytest.raises(ValueError, match="rewards"):
            policy.learn("0 1", torch.tensor(uids), torch.tensor(rewards))
    uids = ask(policy, "0 1", K).uids
    policy.learn("0 1", uids, torch.tensor([1, 0]))  # whole numbers are rewards, too
    assert ask(policy, "0 1", K).propensities.isfinite().all()
    with pytest.raises(InputError, match="only 1 of"):
        ask(policy, "0 1", 2, [3])


def test_a_ridge_that_is_none_is_refused():
    for wrong in (dict(ridge=0.0), dict(noise=-1.0), dict(half_life=float("nan"))):
        with pytest.raises(InputError, match="a ridge regression needs"):
            LinTS(NETWORK, encoder, PROMPTS, **wrong)
    with pytest.raises(InputError, match="some prompts"):
        LinTS(NETWORK, encoder, [])
