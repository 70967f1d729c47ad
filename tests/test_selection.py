"""Propensities against an independent computation, and what must hold for any draw."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from prompting_nb.validators.selection import gumbel_top_k, select, thompson, ucb

RULES = {
    "epsilon": lambda scores, k, **given: select(scores, k, **given),
    "gumbel": lambda scores, k, **given: gumbel_top_k(scores, k, **given),
    "thompson": lambda scores, k, **given: thompson(scores, scores.abs() + 0.1, k, **given),
    "ucb": lambda scores, k, **given: ucb(scores, scores.abs() + 0.1, k, **given),
}


def exact(cdf, density, grid, k):
    "P(uid among the k largest), by integrating over its own value the chance that fewer than k others exceed it."
    step = float(grid[1] - grid[0])
    below = cdf(grid)  # (nodes, m)
    out = []
    for u in range(below.shape[1]):
        fewer = torch.zeros(len(grid), k, dtype=torch.float64)
        fewer[:, 0] = 1.0
        for i in range(below.shape[1]):
            if i != u:
                above = 1 - below[:, i:i + 1]
                fewer = (1 - above) * fewer + above * torch.nn.functional.pad(fewer, (1, 0))[:, :k]
        out.append((fewer.sum(1) * density(grid)[:, u]).sum() * step)
    return torch.stack(out)


def stated(draw, size, rounds):
    "Mean and spread of the propensity stated for each uid, over the draws in which it was asked, and how often."
    seen = [[] for _ in range(size)]
    for _ in range(rounds):
        uids, propensities = draw()
        for uid, p in zip(uids.tolist(), propensities.tolist()):
            seen[uid].append(p)
    return [torch.tensor(values) for values in seen]


def check(truth, draw, rounds):
    "Stated propensities and frequencies agree with the truth, for every uid that is asked often enough to tell."
    seen = stated(draw, len(truth), rounds)
    for wanted, values in zip(truth.tolist(), seen):
        if wanted > 0.02:
            assert values.mean().item() == pytest.approx(wanted, rel=0.05)
            assert len(values) / rounds == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / rounds) ** 0.5 + 1e-3)


def test_thompson_states_what_the_integral_says():
    torch.manual_seed(0)
    mean, sd = torch.randn(12).double() * 0.2, torch.rand(12).double() * 0.3 + 0.02
    grid = torch.linspace(-2, 2, 4001, dtype=torch.float64)[:, None]
    normal = torch.distributions.Normal(mean, sd)
    truth = exact(normal.cdf, lambda x: normal.log_prob(x).exp(), grid, 3)
    assert truth.sum().item() == pytest.approx(3, abs=1e-3)
    check(truth, lambda: thompson(mean, sd, 3), 800)


def test_gumbel_states_what_the_integral_says():
    torch.manual_seed(1)
    scores = torch.randn(12).double() * 0.2
    grid = torch.linspace(-12, 30, 8001, dtype=torch.float64)[:, None]
    logits = scores / 0.1
    cdf = lambda x: (-(logits - x).exp()).exp()
    truth = exact(cdf, lambda x: (logits - x).exp() * cdf(x), grid, 3)
    assert truth.sum().item() == pytest.approx(3, abs=1e-3)
    check(truth, lambda: gumbel_top_k(scores, 3, temperature=0.1), 800)


def test_propensities_of_a_large_network_hardly_vary():
    torch.manual_seed(2)
    mean, sd = torch.randn(4096) * 0.1, torch.full((4096,), 0.1)
    seen = stated(lambda: thompson(mean, sd, 10), 4096, 60)
    often = [values for values in seen if len(values) >= 15]
    assert often
    for values in often:
        assert values.std() / values.mean() < 0.1  # the standard error of one stated propensity


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(RULES)), st.integers(1, 12), st.integers(0, 2**32), st.floats(0, 1), st.data())
def test_every_rule_keeps_to_its_limits(rule, size, seed, epsilon, data):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(size, generator=generator)
    available = data.draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True))
    newcomers = data.draw(st.lists(st.integers(0, size - 1), unique=True))
    k = data.draw(st.integers(1, len(available)))
    uids, propensities = RULES[rule](scores, k, epsilon=epsilon, available=available, newcomers=newcomers,
                                     generator=generator)
    assert len(set(uids.tolist())) == k and set(uids.tolist()) <= set(available)  # who does not serve is never asked
    assert ((propensities > 0) & (propensities <= 1 + 1e-6)).all()
    assert (propensities >= epsilon * k / len(available) - 1e-6).all()  # less, but not never
    if epsilon == 0:
        new = set(newcomers) & set(available)
        assert len(new & set(uids.tolist())) == min(k, len(new))  # a newcomer is asked first
