"""Yuma consensus: invariances for any weights, and agreement with an implementation that follows the definitions word by word."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompting_nb.network.consensus import yuma


def by_definition(weights, stake, bonds, kappa, penalty, alpha):
    "The epoch of subtensor's documentation with plain loops: slow, and easy to check against the text."
    n, m = len(weights), len(weights[0])
    share = lambda row: [x / sum(row) if sum(row) > 0 else 0.0 for x in row]
    rows, S = [share(row) for row in weights], share(stake)
    high = [max(w for w in (rows[i][j] for i in range(n))
                if sum(S[i] for i in range(n) if rows[i][j] >= w) >= kappa - 1e-9) if sum(S) else 0.0 for j in range(m)]
    clip = [[min(rows[i][j], high[j]) for j in range(m)] for i in range(n)]
    incentive = share([sum(S[i] * clip[i][j] for i in range(n)) for j in range(m)])
    bought = [[(penalty * clip[i][j] + (1 - penalty) * rows[i][j]) * S[i] for j in range(m)] for i in range(n)]
    held = np.zeros((n, m))
    for j in range(m):
        new, old = share([bought[i][j] for i in range(n)]), share([bonds[i][j] for i in range(n)])
        held[:, j] = share([alpha * a + (1 - alpha) * b for a, b in zip(new, old)])
    dividends = share([sum(held[i][j] * incentive[j] for j in range(m)) for i in range(n)])
    return high, incentive, dividends, held


@st.composite
def subnets(draw):
    n, m = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    matrix = st.lists(st.lists(st.integers(0, 8).map(float), min_size=m, max_size=m), min_size=n, max_size=n)
    stake = draw(st.lists(st.integers(0, 8).map(float), min_size=n, max_size=n).filter(any))
    return draw(matrix), stake, draw(matrix), draw(st.sampled_from([0.3, 0.5, 0.8])), draw(st.sampled_from([0.0, 0.4, 1.0]))


@given(subnets(), st.sampled_from([0.1, 0.5, 1.0]))
@settings(max_examples=300, deadline=None)
def test_agrees_with_the_definition(subnet, alpha):
    weights, stake, bonds, kappa, penalty = subnet
    high, incentive, dividends, held = by_definition(weights, stake, bonds, kappa, penalty, alpha)
    found = yuma(weights, stake, bonds, kappa=kappa, bond_penalty=penalty, alpha=alpha)
    np.testing.assert_allclose(found.consensus, high, atol=1e-12)
    np.testing.assert_allclose(found.incentive, incentive, atol=1e-9)
    np.testing.assert_allclose(found.bonds, held, atol=1e-9)
    np.testing.assert_allclose(found.dividends, dividends, atol=1e-9)


@given(subnets())
@settings(max_examples=100, deadline=None)
def test_shares_sum_to_one_or_to_nothing(subnet):
    weights, stake, bonds, kappa, penalty = subnet
    found = yuma(weights, stake, bonds, kappa=kappa, bond_penalty=penalty)
    for share in (found.incentive, found.dividends, *found.bonds.T):
        assert share.min() >= 0 and share.sum() == pytest.approx(1) or not share.any()
    assert ((0 <= found.trust) & (found.trust <= 1 + 1e-12)).all()
    assert ((0 <= found.validator_trust) & (found.validator_trust <= 1 + 1e-12)).all()


def test_support_of_exactly_kappa_counts_whatever_the_rounding():
    "Ten validators with a tenth each: five of them are half, although floats add up to a little less."
    weights = np.zeros((10, 2))
    weights[:5, 0], weights[5:, 1] = 1, 1
    np.testing.assert_allclose(yuma(weights, [0.1] * 10).incentive, [0.5, 0.5])


def test_a_penalty_of_zero_buys_bonds_with_the_weights_as_they_were_set():
    weights, stake = [[1, 0], [1, 3], [1, 3]], [4, 3, 3]
    clipped, set_ = yuma(weights, stake, bond_penalty=1), yuma(weights, stake, bond_penalty=0)
    assert clipped.bonds[0, 0] < set_.bonds[0, 0]
    np.testing.assert_allclose(clipped.incentive, set_.incentive)


def test_the_arguments_are_not_changed():
    weights, stake, bonds = np.eye(3), np.ones(3), np.eye(3)
    yuma(weights, stake, bonds, permits=[True, False, True])
    assert (weights == np.eye(3)).all() and (stake == 1).all() and (bonds == np.eye(3)).all()


def test_without_stake_or_validators_nothing_is_agreed_on():
    weights = np.array([[1.0, 3.0], [2.0, 2.0]])
    for found in (yuma(weights, [0, 0]), yuma(weights, [1, 2], permits=[False, False]), yuma(np.zeros((0, 2)), [])):
        for name in ("consensus", "incentive", "dividends", "trust", "validator_trust", "bonds"):
            assert not getattr(found, name).any(), name
        assert found.bonds.shape == (len(found.dividends), 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bonds_that_cannot_be_are_refused(bad):
    with pytest.raises(ValueError, match="bonds should be finite numbers of at least 0"):
        yuma([[1.0, 1.0]], [1.0], bonds=[[0.5, bad]])
