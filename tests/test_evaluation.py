"""Reward evaluation: each measure against figures worked out by hand, ties included."""

import json
import math

import numpy as np
import pytest
import torch

from prompting_nb.config import InputError
from prompting_nb.reward import evaluation
from prompting_nb.reward.evaluation import (
    Answers,
    accuracy_by_length,
    best_of_k,
    best_of_k_accuracy,
    calibration,
    confusion_by_length,
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
from prompting_nb.reward.tokens import Cuts, Row
from prompting_nb.show import Bar, html_table

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


@pytest.mark.filterwarnings("error")  # without a spread there is a division by 0
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


def many(count=60, seed=3):
    "Rankings of two to five completions with lengths, and scores that are right more often than not."
    dice, rankings, scores = np.random.default_rng(seed), [], []
    for number in range(count):
        judged = dice.normal(size=dice.integers(2, 6)).round(1)
        texts = ["a" * length for length in dice.integers(1, 30, len(judged))]
        rankings.append(Ranking(f"p{number}", texts, judged.tolist()))
        scores.append((judged + dice.normal(size=len(judged))).round(1).tolist())
    return scores, rankings


def test_defaults_show_on_data_of_some_size():
    scores, rankings = many()
    found, every = evaluate_scores(scores, rankings), pairwise_accuracy(scores, rankings)
    shorter = pairwise_accuracy(scores, rankings, shorter_only=True)
    assert every == pairwise_accuracy(scores, rankings, False, samples=1000, level=0.95, seed=0) != shorter
    assert found.interval == every[1:3] != evaluate_scores(scores, rankings, seed=1).interval
    assert (found.shorter_accuracy, found.n_shorter) == (shorter.value, shorter.n_pairs)
    counts = count_right(scores, rankings)
    counts = counts[counts[:, 1] > 0]
    drawn = counts[np.random.default_rng(0).integers(len(counts), size=(1000, len(counts)))].sum(axis=1)
    assert every[1:3] == tuple(np.quantile(drawn[:, 0] / drawn[:, 1], [(1 - 0.95) / 2, (1 + 0.95) / 2]))
    assert found.random == best_of_k(scores, rankings, k=1) < found.best_of < found.oracle
    assert (found.ece, found.bins) == calibration(margins(scores, rankings), 10) != calibration(margins(scores, rankings), 11)
    assert found.by_length == accuracy_by_length(scores, rankings, (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0))
    assert found.margins == margins(scores, rankings).tolist() and found.confusion == confusion_by_length(scores, rankings)
    assert (found.equal, found.cuts) == (0, None)


def test_pairs_of_equal_length_have_no_shorter_one():
    assert count_right([[1.0, 0.0]], [Ranking("p", ["a", "b"], [1.0, 0.0])], shorter_only=True).tolist() == [[0, 0]]
    one = calibration(np.array([1.0]))  # a single pair is divided by one
    assert one[0] == pytest.approx(1 - 1 / (1 + math.exp(-1)))


def test_equal_uncertainties_keep_their_order_among_many():
    dice = np.random.default_rng(0)
    right, unsure = dice.normal(size=400), dice.integers(0, 3, 400)
    order = sorted(range(400), key=lambda i: unsure[i])
    assert rejection_curve(right, unsure, (0.1, 0.2)) == [
        (0.1, np.mean(right[order[:40]] > 0)), (0.2, np.mean(right[order[:80]] > 0))]  # fmt: skip


def test_who_preferred_the_longer():
    rankings = [Ranking("p", ["aaa", "bb", "c", "dd"], [4.0, 3.0, 2.0, 1.0])]  # aaa>bb, c, dd; bb>c, dd; c>dd
    assert confusion_by_length([[4.0, 3.0, 2.0, 1.0]], rankings) == {
        "judge longer, scores longer": 4, "judge longer, scores shorter": 0, "judge shorter, scores longer": 0,
        "judge shorter, scores shorter": 1, "equal length or score": 1}  # fmt: skip
    assert confusion_by_length([[0.0, 1.0, 2.0, 3.0], [2.0, 2.0, 2.0, 0.0]], rankings * 2) == {
        "judge longer, scores longer": 1, "judge longer, scores shorter": 4, "judge shorter, scores longer": 1,
        "judge shorter, scores shorter": 1, "equal length or score": 5}  # fmt: skip
    with pytest.raises(ValueError, match="shorter"):
        confusion_by_length([], rankings)


@pytest.mark.parametrize("scores, reason", [
    (SCORES[:2], "3 rankings have 2 lists of scores"),
    ([SCORES[0], [1.0], SCORES[2]], "ranking 1 of 2 completions needs a finite score for each, got [1.0]"),
    ([SCORES[0], [1.0, math.nan], SCORES[2]], "ranking 1 of 2 completions needs a finite score for each, got [1.0, nan]"),
    ([[0.5] * 9, *SCORES[1:]], f"ranking 0 of 3 completions needs a finite score for each, got {[0.5] * 8}"),
])  # fmt: skip
def test_scores_that_do_not_fit_are_refused(scores, reason):
    with pytest.raises(InputError) as error:
        evaluate_scores(scores, RANKINGS)
    assert str(error.value) == reason
    with pytest.raises(InputError) as error:
        evaluate(longer_wins, RANKINGS[2:])
    assert str(error.value) == "there is nothing to evaluate: no prompt has two completions with different scores"


def test_what_a_model_reads_alike_counts_as_equal():
    "Scores of equal rows differ by rounding only; rows that were cut differently are not equal."

    class Reader:
        max_length = 2

        def encode_texts(self, prompts, completions):
            return [Row(map(ord, text[:2]), cut=max(0, len(text) - 2)) for text in completions]

        def __call__(self, prompts, completions):
            return [number / 1024 for number in range(len(completions))]

    rankings = [Ranking("p", ["aab", "aac", "aadd", "x"], [3.0, 2.0, 1.0, 0.0]), RANKINGS[1]]
    found = evaluate(Reader(), rankings)
    assert [1024 * margin for margin in found.margins] == [0, -2, -3, -2, -3, -1, -1]
    assert found.accuracy == 0.5 / 7 and found.equal == 3
    assert found.cuts == Cuts(texts=6, completions=3, tokens=4, max_length=2)
    assert found.to_dict()["cuts"] == found.cuts.to_dict()


def test_bars_of_an_evaluation():
    found = evaluate_scores(SCORES, RANKINGS)
    low, high = found.interval
    assert found._repr_html_() == html_table("Reward evaluation", ("what", "value", "note"), [
        ("pairs in the right order", Bar(0.375, 0.375), f"of 4; 95 % interval {low:.3f} to {high:.3f}"),
        ("where the shorter answer is better", Bar(1 / 3, 1 / 3), "of 3"),
        ("judge's score of the best reward", Bar(1.0, 1.0), "over 3 prompts"),
        ("of a completion taken by chance", Bar(found.random, found.random), ""), ("of the judge's own choice", Bar(5 / 3, 1.0), ""),
        ("calibration error (ECE)", Bar(found.ece, found.ece), "0 is best")])  # fmt: skip


def test_rows_of_one_prompt_are_drawn_together():
    "Ten pairs of a prompt, which a judge mixes up together, are no ten prompts."
    ten = [Ranking("p", ["a", "b"], [1.0, 0.0])] * 10 + [Ranking("q", ["a", "b"], [1.0, 0.0])] * 10
    scores = [[1.0, 0.0]] * 10 + [[0.0, 1.0]] * 10
    found = pairwise_accuracy(scores, ten)
    assert (found.value, found.low, found.high, found.n_pairs) == (0.5, 0.0, 1.0, 20)
    assert evaluate_scores(scores, ten).n_prompts == 2
