"""Propensities against an independent computation, and what must hold for any draw."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from prompting_nb.config import InputError
from prompting_nb.validators.selection import annealed, gumbel_top_k, narrowing, select, thompson, ucb

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


SCORES = torch.tensor([0.1, 0.9, 0.4, 0.8, 0.3, 0.6])


def test_propensities_of_epsilon_greedy_by_hand():
    "1 - e + e k / m for the best, e k / m for others; newcomers share the first places."
    for epsilon in (0.1, 0.2, 0.3, 0.6, 0.7):  # in double precision, rounded once
        odds = select(SCORES, 3, epsilon=epsilon, generator=torch.Generator().manual_seed(4)).propensities
        assert odds.max() == torch.tensor(1 - epsilon + epsilon * 3 / 6)
    for chosen, chance in ((set([1, 3, 5]), 0.75), (set([0, 2, 4]), 0.25)):
        found = {}
        for seed in range(60):
            uids, odds = select(SCORES, 3, epsilon=0.5, generator=torch.Generator().manual_seed(seed))
            found |= dict(zip(uids.tolist(), odds.tolist()))
        assert {uid for uid, p in found.items() if p == pytest.approx(chance)} == chosen
    options = dict(epsilon=0.5, available=[0, 1, 3, 4, 5], newcomers=[0, 2, 4])  # 2 cannot be asked
    for seed in range(20):
        uids, odds = select(SCORES, 1, **options, generator=torch.Generator().manual_seed(seed))
        assert odds.item() == pytest.approx(0.35 if uids.item() in (0, 4) else 0.1)


def test_without_chance_the_best_come_first():
    assert select(SCORES, 3, epsilon=0).uids.tolist() == [1, 3, 5]
    assert select(torch.zeros(6), 2, epsilon=0).uids.tolist() == [0, 1]  # equal scores: the lower uid
    assert select(SCORES, 3, epsilon=0, newcomers=[4]).uids.tolist() == [4, 1, 3]
    assert select(SCORES, 2, epsilon=0, available=SCORES < 0.85).uids.tolist() == [3, 5]
    assert sorted(select(SCORES, 2, epsilon=0, newcomers=[0, 2, 4]).propensities.tolist()) == pytest.approx([2 / 3] * 2)
    assert select(SCORES, 6, epsilon=0.5).propensities.tolist() == [1.0] * 6
    drawn = select(SCORES, 3, epsilon=1.0, generator=torch.Generator().manual_seed(1)).uids
    assert drawn.tolist() == sorted(drawn.tolist(), key=lambda uid: -SCORES[uid])


@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_default_explores_as_documented(rule):
    "Only `select` asks a random set by default; a share epsilon of the others does when told."
    generator = torch.Generator().manual_seed(0)
    scores, floor = torch.tensor([0.0, 0.0, 50.0, 60.0]), []
    for _ in range(200):
        floor.append(RULES[rule](scores, 2, generator=generator).propensities.min().item())
    wanted = {"epsilon": 0.1 * 2 / 4, "gumbel": 1.0, "ucb": 1.0}
    assert rule == "thompson" or min(floor) == pytest.approx(wanted[rule])
    uids = [RULES[rule](scores, 2, epsilon=1.0, generator=generator).uids.tolist() for _ in range(200)]
    assert {uid for pair in uids for uid in pair} == {0, 1, 2, 3}
    assert all(p == 0.5 for p in RULES[rule](scores, 2, epsilon=1.0, generator=generator).propensities)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_generator_makes_a_choice_repeatable(rule):
    draws = [RULES[rule](SCORES, 3, epsilon=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4, 5, 6)]
    assert torch.equal(draws[0].uids, draws[1].uids) and torch.equal(draws[0].propensities, draws[1].propensities)
    assert any(not torch.equal(draws[0].uids, other.uids) for other in draws[2:])


@pytest.mark.parametrize("rule", sorted(RULES))
def test_what_is_malformed_is_named(rule):
    call, undefined = RULES[rule], SCORES.clone().index_fill(0, torch.tensor(2), torch.inf)
    for text, kind, wrong in (
        ("k must be at least 1, got 0", ValueError, lambda: call(SCORES, 0)),
        ("k = 7 uids should be asked but only 6 of 6", InputError, lambda: call(SCORES, 7)),
        ("only 2 of 6 can be", InputError, lambda: call(SCORES, 3, available=[1, 4])),
        ("available holds uids outside 0 to 5: \\[-1, 6\\]", ValueError, lambda: call(SCORES, 1, available=[-1, 1, 6])),
        ("newcomers holds uids outside 0 to 5: \\[6\\]", ValueError, lambda: call(SCORES, 1, newcomers=[6])),
        ("available as a mask needs a value for each of 6", ValueError, lambda: call(SCORES, 1, available=SCORES[:3] > 0)),
        ("epsilon must lie between 0 and 1, got 1.5", ValueError, lambda: call(SCORES, 1, epsilon=1.5)),
        ("epsilon must lie between 0 and 1, got -0.1", ValueError, lambda: call(SCORES, 1, epsilon=-0.1)),
    ):
        with pytest.raises(kind, match=text):
            wrong()
    if rule in ("epsilon", "gumbel"):
        with pytest.raises(ValueError, match="scores must be finite, uid 2 has inf"):
            call(undefined, 1)
        assert call(undefined, 1, available=[0, 1]).uids.item() < 2  # a uid that is not asked needs no score
    for rule in (thompson, ucb):
        assert rule(undefined, torch.zeros(6), 1, available=[0, 1]).uids.item() == 1


def test_widths_and_temperatures_are_checked():
    sd = SCORES.clone()
    for rule in (thompson, ucb):
        for wrong in (-sd, sd[:3], sd * torch.nan, sd / 0):
            with pytest.raises(ValueError, match="sd needs a finite value of 0 or more for each of 6 uids"):
                rule(SCORES, wrong, 2)
        with pytest.raises(ValueError, match="width must be at least 0, got -1"):
            rule(SCORES, sd, 2, width=-1)
        assert rule(SCORES, sd, 3, width=0).uids.tolist() == [1, 3, 5]
    with pytest.raises(ValueError, match="temperature must be greater than 0, got 0"):
        gumbel_top_k(SCORES, 2, temperature=0)
    assert gumbel_top_k(SCORES, 3, temperature=1e-4).uids.tolist() == [1, 3, 5]


def test_ucb_adds_widths():
    sd = torch.tensor([0.05, 0.05, 0.4, 0.05, 0.1, 0.1])
    assert ucb(SCORES, sd, 2).uids.tolist() == [1, 3]  # .95, .85 and .80
    assert ucb(SCORES, sd, 2, width=2).uids.tolist() == [2, 1]
    assert ucb(SCORES, sd, 2, newcomers=[0], available=[0, 1, 2], epsilon=0).uids.tolist() == [0, 1]


def test_newcomers_have_the_first_places_of_random_rules_too():
    sd = torch.full((6,), 0.2)
    for seed in range(20):
        uids, odds = thompson(SCORES, sd, 1, newcomers=[0, 2], generator=torch.Generator().manual_seed(seed))
        assert uids.item() in (0, 2) and odds.item() == pytest.approx(0.5)
        uids, odds = thompson(SCORES, sd, 6, newcomers=[0], generator=torch.Generator().manual_seed(seed))
        assert odds.tolist() == [1.0] * 6  # all are asked
        uids, odds = thompson(SCORES, sd, 3, newcomers=[0, 2], epsilon=0.4, generator=torch.Generator().manual_seed(seed))
        known = dict(zip(uids.tolist(), odds.tolist()))
        assert all(known[uid] == pytest.approx(0.6 + 0.4 * 3 / 6) for uid in {0, 2} & known.keys())


def test_schedules():
    assert [annealed(step) for step in (0, 30, 75, 1000)] == pytest.approx([1.0, 0.62, 0.05, 0.05])
    assert annealed(5, start=0.5, end=0.1, steps=10) == pytest.approx(0.3)
    assert [narrowing(answers) for answers in (0, 12, 48, 192, 1e6)] == pytest.approx([1.3, 1.3, 0.9192, 0.65, 0.65], abs=1e-4)
    assert narrowing(16, start=2.0, full=1.0, least=0.1) == pytest.approx(1.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_defaults_of_the_random_rules():
    sd = torch.full((6,), 0.2)
    certain = lambda scores, k, **more: thompson(scores, sd, k, **more)
    for rule, told in ((gumbel_top_k, {"temperature": 0.1, "epsilon": 0.0}), (certain, {"width": 1.0, "epsilon": 0.0}),
                       (select, {"epsilon": 0.1})):  # fmt: skip
        for seed in range(5):
            one, two = rule(SCORES, 3, generator=seeded(seed)), rule(SCORES, 3, **told, generator=seeded(seed))
            assert torch.equal(one.uids, two.uids) and torch.equal(one.propensities, two.propensities)
    assert ucb(SCORES, sd, 3, generator=seeded()).propensities.tolist() == [1.0] * 3


@pytest.mark.parametrize("rule", [
    lambda scores, **more: select(scores, 3, **more), lambda scores, **more: gumbel_top_k(scores, 3, **more),
    lambda scores, **more: thompson(scores, scores.flip(0), 3, **more), lambda scores, **more: ucb(scores, scores.flip(0), 3, **more),
], ids=["epsilon", "gumbel", "thompson", "ucb"])  # fmt: skip
def test_double_precision_whatever_the_scores_are(rule):
    for seed in range(3):
        one, two = (rule(scores, epsilon=0.3, generator=seeded(seed)) for scores in (SCORES, SCORES.double()))
        assert torch.equal(one.uids, two.uids) and torch.equal(one.propensities, two.propensities)
        assert (one.uids.dtype, one.propensities.dtype) == (torch.int64, torch.float32)


def test_bounds_are_added_in_double_precision():
    sd = torch.tensor([0.2, 0.0])  # in single precision 0.1 + 0.2 is what 0.3 is, in double precision less
    assert ucb(torch.tensor([0.1, 0.3]), sd, 1, epsilon=0).uids.tolist() == [1]
    bound = 1.1 * sd[0].item()
    for scores, wide in (([0.0, bound], sd), ([bound, 0.0], sd.flip(0))):  # equal bounds: the lower uid
        assert ucb(torch.tensor(scores, dtype=torch.float64), wide, 1, width=1.1).uids.tolist() == [0]


def test_a_mask_and_uids_say_the_same():
    mask = torch.tensor([False, True, False, True, True, False])
    for able in (mask, [4, 3, 1, 1], torch.tensor([[1.0, 3.0, 4.0]])):
        assert select(SCORES, 3, epsilon=0, available=able).uids.tolist() == [1, 3, 4]
    with pytest.raises(ValueError, match="^available holds uids that are not whole numbers$"):
        select(SCORES, 1, available=[1.5, 2.0])
    with pytest.raises(ValueError, match=r"^newcomers as a mask needs a value for each of 6 uids, got shape \(2, 3\)$"):
        select(SCORES, 1, newcomers=mask.view(2, 3))


def test_all_draws_behind_a_propensity_are_used(monkeypatch):
    "In pieces of any size: the estimate of a network that needs several is as good as that of a small one."
    mean, sd = torch.zeros(3000), torch.ones(3000)  # a piece is 21 rows: six, and one of two
    sizes, pieces = [], [(1, torch.float64)] + [(21, torch.float32)] * 6 + [(2, torch.float32)]
    for name in ("normal_", "exponential_"):
        draw = getattr(torch.Tensor, name)
        noting = lambda self, draw=draw, **more: sizes.append((len(self), self.dtype)) or draw(self, **more)
        monkeypatch.setattr(torch.Tensor, name, noting)
    gumbel_top_k(mean, 5, generator=seeded())
    assert sizes == pieces
    sizes.clear()
    found = thompson(mean, sd, 5, generator=seeded()).propensities
    assert sizes == pieces
    assert found.mean().item() == pytest.approx(5 / 3000, rel=0.5) and found.min() > 0
    sizes.clear()
    for size in (512, 513):  # 512 uids fill a piece exactly
        thompson(mean[:size], sd[:size], 5, generator=seeded())
    assert [size for size, _ in sizes] == [1, 128, 1, 127, 1]
    sizes.clear()
    thompson(torch.zeros(70_000), torch.ones(70_000), 2, generator=seeded())
    assert [size for size, _ in sizes] == [1] * 129


def test_a_share_is_left_to_chance_by_epsilon_exactly():
    "With epsilon e, the others' propensity is e k / m, and that of the best 1 - e more."
    scores = torch.tensor([0.0, 100.0, 200.0, -100.0])
    for rule in (lambda **more: gumbel_top_k(scores, 2, **more), lambda **more: thompson(scores, torch.ones(4), 2, **more)):
        known = {}
        for seed in range(40):
            found = rule(epsilon=0.4, generator=seeded(seed))
            known |= dict(zip(found.uids.tolist(), found.propensities.tolist()))
            assert found.uids.tolist() == sorted(found.uids.tolist(), key=lambda uid: -scores[uid])
        assert known == {1: pytest.approx(0.8), 2: pytest.approx(0.8), 0: pytest.approx(0.2), 3: pytest.approx(0.2)}


def test_scores_far_from_zero_keep_their_digits():
    "What counts is how scores differ, although propensities are estimated in single precision."
    for rule in (lambda scores, dice: gumbel_top_k(scores, 2, generator=dice),
                 lambda scores, dice: thompson(scores, torch.full((6,), 0.2), 2, generator=dice)):  # fmt: skip
        for seed in range(5):
            near, far = rule(SCORES.double(), seeded(seed)), rule(SCORES.double() + 1e6, seeded(seed))
            assert torch.equal(near.uids, far.uids)
            assert far.propensities.tolist() == pytest.approx(near.propensities.tolist(), rel=1e-3)


def test_a_single_place_has_a_propensity_too():
    for rule in (gumbel_top_k, lambda scores, k, **more: thompson(scores, torch.ones(len(scores)), k, **more)):
        equals = [rule(torch.zeros(4), 1, generator=seeded(seed)).propensities.item() for seed in range(20)]
        assert equals == pytest.approx([0.25] * 20, abs=0.12)
        for seed in range(20):  # who is not new is asked by chance only
            found = rule(SCORES, 1, newcomers=[0], epsilon=0.5, generator=seeded(seed))
            assert found.propensities.item() == pytest.approx(0.5 / 6 + 0.5 * (found.uids.item() == 0))
