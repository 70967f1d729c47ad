"""Reward evaluation: each measure against figures worked out by hand, ties included."""

import json
import math

import numpy as np
import pytest
import torch

from prompting_nb.reward import evaluation
from prompting_nb.reward.evaluation import (
    Answers,
    accuracy_by_length,
    best_of_k,
    best_of_k_accuracy,
    calibration,
    count_right,
    evaluate,
    evaluate_scores,
    longer_wins,
    margins,
    pairwise_accuracy,
    rejection_curve,
    table,
    ties_score,
    zero_shot_cosine,
)
from prompting_nb.reward.preferences import Ranking

RANKINGS = [
    Ranking("p", ["aa", "b", "ccc"], [3.0, 2.0, 1.0]),  # pairs: aa>b, aa>ccc, b>ccc
    Ranking("q", ["d", "ee"], [1.0, 0.0]),
    Ranking("r", ["f", "g"], [1.0, 1.0]),  # nothing was decided
]
SCORES = [[2.0, 2.0, 3.0], [1.0, 0.0], [0.0, 5.0]]  # half, wrong, wrong; right


def test_pairs_in_the_right_order_ties_count_half():
    assert count_right(SCORES, RANKINGS).tolist() == [[0.5, 3], [1, 1], [0, 0]]
    assert count_right(SCORES, RANKINGS, shorter_only=True).tolist() == [[0, 2], [1, 1], [0, 0]]
    with pytest.raises(ValueError, match="shorter"):
        count_right(SCORES[:2], RANKINGS)


def test_accuracy_and_its_interval():
    found = pairwise_accuracy(SCORES, RANKINGS)
    assert (found.value, found.n_pairs) == (1.5 / 4, 4)
    counts = np.array([[0.5, 3], [1, 1]])  # prompts are drawn anew, those without a pair left out
    drawn = counts[np.random.default_rng(0).integers(2, size=(1000, 2))].sum(axis=1)
    assert (found.low, found.high) == tuple(np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]))
    assert pairwise_accuracy(SCORES, RANKINGS, level=0.2, seed=3, samples=50) != found
    assert pairwise_accuracy(SCORES, RANKINGS, True)[::3] == (1 / 3, 3)
    one = pairwise_accuracy([[1.0, 0.0]], RANKINGS[1:2])
    assert one == (1.0, 1.0, 1.0, 1)
    none = pairwise_accuracy(SCORES[2:], RANKINGS[2:])
    assert none.n_pairs == 0 and all(map(math.isnan, none[:3]))


def test_margins_of_decided_pairs():
    assert margins(SCORES, RANKINGS).tolist() == [0.0, -1.0, -1.0, 1.0]
    empty = margins([], [])
    assert empty.shape == (0,) and empty.dtype == float
    with pytest.raises(ValueError, match="shorter"):
        margins(SCORES[:1], RANKINGS)


def test_calibration_compares_confidence_with_accuracy():
    error, bins = calibration(np.array([0.0, 0.0, 1.0, -1.0, 1.0, 50.0]), bins=5)
    sure = 1 / (1 + math.exp(-1))  # .731, in the third bin of .5 .6 .7 .8 .9 1
    assert [(round(b.low, 6), round(b.high, 6), b.n_pairs) for b in bins] == [(0.5, 0.6, 2), (0.7, 0.8, 3), (0.9, 1.0, 1)]
    assert [b.accuracy for b in bins] == [0.5, pytest.approx(2 / 3), 1.0]  # a tie is half right
    assert [b.confidence for b in bins] == pytest.approx([0.5, sure, 1.0])
    assert error == pytest.approx(3 * abs(sure - 2 / 3) / 6)
    assert calibration(np.array([])) == (0.0, [])
    assert len(calibration(np.linspace(0, 6, 500))[1]) == 10


def test_best_of_k_is_an_expectation_over_draws_and_ties():
    judged = [Ranking("p", ["a", "b", "c"], [6.0, 3.0, 0.0])]
    assert best_of_k([[3.0, 2.0, 1.0]], judged) == best_of_k([[3.0, 2.0, 1.0]], judged, 3) == 6.0
    assert best_of_k([[3.0, 2.0, 1.0]], judged, 9) == 6.0
    assert best_of_k([[1.0, 2.0, 3.0]], judged, 1) == pytest.approx(3.0)
    assert best_of_k([[3.0, 2.0, 1.0]], judged, 2) == pytest.approx((6 + 6 + 3) / 3)
    assert best_of_k([[3.0, 3.0, 1.0]], judged) == 4.5
    assert best_of_k([[1.0, 1.0], [2.0, 1.0]], [RANKINGS[1], RANKINGS[1]]) == 0.75
    with pytest.raises(ValueError, match="shorter"):
        best_of_k([], judged)


def test_the_correct_answer_first():
    assert best_of_k_accuracy([[1.0, 2.0], [3.0, 3.0], [1.0, 0.0]], [1, 0, 1]) == pytest.approx(1.5 / 3)
    with pytest.raises(ValueError, match="shorter"):
        best_of_k_accuracy([[1.0]], [])


@pytest.mark.parametrize("right, wrong, alone, expected", [
    ([3.0, 2.0], [0.0], ([3.0], [0.0]), 1.0 + 0.01 * math.tanh(1)),  # gap 2 and 3, spread 1
    ([3.0, 2.0], [0.0], ([0.5], [0.0]), 0.8 + 0.01 * math.tanh(-0.5)),  # least is that of the twin: .5
    ([3.0, 2.0], [1.5], ([9.0], [0.0]), 0.6 + 0.01 * math.tanh(-0.5)),  # the gap of .5 is below the spread
    ([3.0, 2.0], [2.5], ([0.0], [1.0]), 0.01 * math.tanh(-2)),
    ([2.0, 2.0], [0.0], ([1.0], [0.0]), 1.01), ([1.0, 1.0], [1.0], ([1.0], [1.0]), 0.0),
    ([3.0, 2.0], [2.0], ([1.0], [0.0]), 0.3 + 0.01 * math.tanh(-1)),
])  # fmt: skip
def test_ties_score_by_hand(right, wrong, alone, expected):
    assert ties_score([Answers(right, wrong)], [Answers(*alone)]) == pytest.approx(expected)
    twice = ties_score([Answers(right, wrong), Answers([2.0, 2.0], [0.0])], [Answers(*alone), Answers([1.0], [0.0])])
    assert twice == pytest.approx((expected + 1.01) / 2)


def test_accuracy_by_how_much_longer_the_chosen_is():
    ranking = Ranking("p", ["aaaa", "bb", "b", "cccccccc"], [4.0, 3.0, 3.0, 1.0])
    found = accuracy_by_length([[2.0, 2.0, 1.0, 2.0]], [ranking])
    # log ratios: 4:2 tie, 4:1 right, 4:8 tie, 2:8 tie, 1:8 wrong
    assert [(round(b.ratio, 6), b.n_pairs, b.accuracy) for b in found] == [
        (0.125, 1, 0.0), (0.25, 1, 0.5), (0.5, 1, 0.5), (2.0, 1, 0.5), (4.0, 1, 1.0)]  # fmt: skip
    one, two = accuracy_by_length([[2.0, 2.0, 1.0, 2.0]], [ranking], edges=(1.0,))
    assert (round(one.ratio, 6), one.n_pairs, one.accuracy) == (0.25, 3, pytest.approx(1 / 3))
    assert (round(two.ratio, 6), two.n_pairs, two.accuracy) == (round(8 ** 0.5, 6), 2, 0.75)
    with pytest.raises(ValueError, match="shorter"):
        accuracy_by_length([], [ranking])


def test_the_surest_pairs_first():
    right = np.array([1.0, 0.0, -1.0, 2.0])
    assert rejection_curve(right, np.array([4, 2, 3, 1]), (0.25, 0.5, 0.75, 1.0)) == [
        (0.25, 1.0), (0.5, 0.75), (0.75, 0.5), (1.0, 0.625)]  # fmt: skip
    assert rejection_curve(right, np.zeros(4), (0.01, 0.5)) == [(0.01, 1.0), (0.5, 0.75)]  # equal ones keep their order
    assert [share for share, _ in rejection_curve(right, right)] == pytest.approx([n / 10 for n in range(1, 11)])


def test_scorers_to_beat(monkeypatch):
    assert longer_wins(["p", "p"], ["", "abc"]) == [0, 3]
    asked = []

    def embed(encoder, texts, batch_size):
        asked.append((encoder, texts, batch_size))
        return torch.tensor([[3.0, 4.0], [6.0, 8.0], [4.0, -3.0]])[: len(texts)]

    monkeypatch.setattr(evaluation, "embed", embed)
    scorer = zero_shot_cosine("encoder", 7)
    assert scorer(["p", "p"], ["a", "b"]) == pytest.approx([1.0, 0.0], abs=1e-6)
    assert asked == [("encoder", ["p", "a", "b"], 7)]
    zero_shot_cosine("encoder")(["p"], ["p"])
    assert asked[1:] == [("encoder", ["p"], 32)] and scorer([], []) == []


def test_an_evaluation_holds_every_measure():
    found = evaluate_scores(SCORES, RANKINGS, bins=4, seed=2)
    every, shorter = (pairwise_accuracy(SCORES, RANKINGS, only, seed=2) for only in (False, True))
    ece, bins = calibration(margins(SCORES, RANKINGS), 4)
    assert (found.accuracy, found.interval, found.n_pairs) == (every.value, (every.low, every.high), 4)
    assert (found.shorter_accuracy, found.n_shorter, found.n_prompts) == (shorter.value, 3, 3)
    assert (found.ece, found.bins) == (ece, bins)
    assert found.best_of == best_of_k(SCORES, RANKINGS) == (1 + 1 + 1) / 3
    assert (found.random, found.oracle) == (pytest.approx((2 + 0.5 + 1) / 3), (3 + 1 + 1) / 3)
    assert evaluate_scores(SCORES, RANKINGS) == evaluate_scores(SCORES, RANKINGS, bins=10, seed=0)


def test_an_evaluation_as_json():
    none = evaluate_scores(SCORES[2:], RANKINGS[2:]).to_dict()
    assert none["accuracy"] is None and none["shorter_accuracy"] is None and none["n_pairs"] == 0 and none["bins"] == []
    values = evaluate_scores(SCORES, RANKINGS).to_dict()
    assert values == json.loads(json.dumps(values)) and set(values) == set(none)
    assert set(values) == {"accuracy", "interval", "n_prompts", "n_pairs", "shorter_accuracy", "n_shorter", "ece", "bins",
                           "best_of", "random", "oracle", "confusion", "equal", "cuts"}  # fmt: skip
    assert values["accuracy"] == 1.5 / 4 and values["interval"] == list(pairwise_accuracy(SCORES, RANKINGS)[1:3])
    assert values["bins"][0] == calibration(margins(SCORES, RANKINGS))[1][0]._asdict()


def test_a_model_is_asked_as_it_is_told(monkeypatch):
    class Model(torch.nn.Module):
        def score(self, prompts, completions, **options):
            self.asked = prompts, completions, options
            return [float(len(c)) for c in completions]

    monkeypatch.setattr(evaluation, "RewardModel", Model)
    model = Model()
    by_length = evaluate(longer_wins, RANKINGS)
    assert evaluate(model, RANKINGS, 5, True, True) == by_length
    prompts, completions, options = model.asked
    assert prompts == ["p"] * 3 + ["q"] * 2 + ["r"] * 2 and completions == ["aa", "b", "ccc", "d", "ee", "f", "g"]
    assert options == {"batch_size": 5, "progress": True, "bf16": True}
    evaluate(model, RANKINGS)
    assert model.asked[2] == {"batch_size": 32, "progress": False, "bf16": False}


def test_a_table_of_evaluations():
    found = evaluate_scores(SCORES, RANKINGS)
    low, high = found.interval
    assert table({"a model": found}).splitlines() == [
        "         accuracy  95 % interval   shorter preferred  best of all",
        f"a model     0.375  {low:.3f} to {high:.3f}              0.333        1.000"]  # fmt: skip
    assert table({}) == "  accuracy  95 % interval   shorter preferred  best of all"


def test_an_evaluation_in_a_notebook():
    html = evaluate_scores(SCORES, RANKINGS)._repr_html_()
    low, high = pairwise_accuracy(SCORES, RANKINGS)[1:3]
    for text in (">Reward evaluation<", ">what<", ">value<", ">note<", ">pairs in the right order<",
                 f">of 4; 95 % interval {low:.3f} to {high:.3f}<", ">where the shorter answer is better<", ">of 3<",
                 "judge&#x27;s score of the best reward<", ">over 3 prompts<", ">of a completion taken by chance<",
                 "of the judge&#x27;s own choice<", ">calibration error (ECE)<", ">0 is best<"):  # fmt: skip
        assert text in html, text
    assert "XX" not in html
