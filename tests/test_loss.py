"""Losses: what the terms are, and with which words an input without a decision is refused."""

import math

import pytest
import torch

from prompting_nb.reward.loss import PairwiseLoss, RankingLoss

column = lambda *values: torch.tensor(values)[:, None]


def test_the_margin_of_a_ranking_is_proportional_to_the_difference_of_scores():
    loss = RankingLoss(margin=0.5)(column(1.0, 0.0), torch.tensor([3.0, 1.0]), torch.tensor([0, 0]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(1.0 - 0.5 * 2.0))))


def test_input_without_a_decision_is_refused():
    with pytest.raises(ValueError) as error:
        PairwiseLoss()(torch.zeros(0, 1), torch.zeros(0, 1))
    assert str(error.value) == "the loss of an empty batch is not defined: give at least one pair"
    with pytest.raises(ValueError) as error:
        RankingLoss()(column(1.0, 0.0), torch.tensor([1.0, 1.0]), torch.tensor([0, 0]))
    assert str(error.value) == "no prompt has two completions with different scores: there is nothing to rank"


def test_without_centring_the_level_of_rewards_does_not_matter():
    assert PairwiseLoss()(column(1e20), column(1e20)).item() == pytest.approx(math.log(2))


def test_margins_of_their_own_are_differences():
    "A pair's margin is the difference of the two numbers, whatever they have in common."
    rewards, scores = torch.tensor([[0.3], [-0.2], [0.1]]), torch.tensor([3.0, 2.0, 1.0])
    groups, margins = torch.zeros(3), torch.tensor([2.0, 1.5, 0.25])
    pairs = [(0, 1), (0, 2), (1, 2)]
    surplus = torch.stack([rewards[i] - rewards[j] - (margins[i] - margins[j]) for i, j in pairs])
    by_hand = -torch.nn.functional.logsigmoid(surplus).mean(0)
    loss = RankingLoss()
    assert torch.allclose(loss(rewards, scores, groups, margins), by_hand)
    assert torch.allclose(loss(rewards, scores, groups, margins + 7), loss(rewards, scores, groups, margins))
