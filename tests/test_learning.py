"""Learning that shows itself: steps that follow from the data, margins that never turn a pair round, and what was cut or became equal."""

import random
import warnings

import pytest
import torch
from datasets import Dataset
from test_reward import kind_words, toy, toys  # noqa: F401

from prompting_nb.config import InputError
from prompting_nb.reward.batches import drop_equal
from prompting_nb.reward.evaluation import evaluate
from prompting_nb.reward.model import RewardModel
from prompting_nb.reward.preferences import Ranking, parse_ranking, rankings_of
from prompting_nb.reward.training import LEAST_STEPS, MOST_EPOCHS, History, TrainConfig, choose_steps, train

THINGS = "apple pear plum grape fig hammer saw drill nail file".split()


def small_set(count):
    "Pairs in which a fruit is better than a tool, of about a dozen tokens."
    rng = random.Random(0)
    return [{"prompt": f"Name a thing to eat, number {n}.", "chosen": f"I would take the {rng.choice(THINGS[:5])}, {n}.",
             "rejected": f"I would take the {rng.choice(THINGS[5:])}, {n}."} for n in range(count)]  # fmt: skip


def test_a_small_set_learns():
    "107 pairs took one step once, and were ordered no better than by chance."
    torch.manual_seed(0)
    model, rows = RewardModel("minilm", device="cpu", depth=2), small_set(127)
    history = train(model, Dataset.from_list(rows[:107]), TrainConfig(bf16=False), progress=False)
    assert len(history.steps) >= 50 and history.epochs > 1
    assert evaluate(model, rankings_of(rows[107:])).accuracy > 0.9
    first, last = history.trend()
    assert last < first and "steps in" in history.summary() and "went down, from 0.5" in history.summary()


def rows_of(count, tokens):
    return [Ranking(str(n), ["a", "b"], [1.0, 0.0]) for n in range(count)], [[[n] * tokens, [n] * (tokens - 1)] for n in range(count)]


@pytest.mark.parametrize("count, tokens", [(1, 5), (7, 5), (30, 9), (107, 19), (500, 40), (5000, 100)])
def test_steps_follow_from_the_data(count, tokens):
    from prompting_nb.reward.training import plan_batches

    rankings, rows = rows_of(count, tokens)
    chosen = choose_steps(TrainConfig(), rankings, rows)
    steps = len(plan_batches(rankings, rows, chosen))
    assert steps >= LEAST_STEPS or chosen.epochs == MOST_EPOCHS
    assert steps <= 2.5 * LEAST_STEPS or (chosen.epochs, chosen.tokens_per_batch) == (1, 4096)
    assert choose_steps(TrainConfig(epochs=2), rankings, rows).epochs == 2
    assert choose_steps(TrainConfig(tokens_per_batch=77), rankings, rows).tokens_per_batch == 77
    given = TrainConfig(epochs=1, tokens_per_batch=4096)
    assert choose_steps(given, rankings, rows) == given


def test_a_summary_says_when_nothing_was_learnt():
    losses = lambda *values: History(steps=[{"loss": value} for value in values]).summary()
    assert "did not go down, from 0.690 to 0.700" in losses(0.69, 0.7) and "too few to say" in losses(0.69)


@pytest.mark.parametrize("margin", [0, -1.5, 4])
def test_a_recorded_margin_is_one_of_the_loss(toys, margin):  # noqa: F811
    "The loss of a pair with a margin m is -log sigmoid(chosen - rejected - m), by default; a weight multiplies it."
    row = {"prompt": "what is", "chosen": "good day", "rejected": "no", "margin": margin}
    for weight, wanted in ((None, 1.0), (0.0, 0.0), (0.5, 0.5)):
        model = toy(toys, "bert", dropout=0.0)
        chosen, rejected = model.score("what is", ["good day", "no"]).flatten().double()
        config = TrainConfig(epochs=1, margin=weight, centring=0.25, bf16=False)
        [step] = train(model, [row], config, progress=False).steps
        loss = -torch.nn.functional.logsigmoid(chosen - rejected - wanted * margin) + 0.25 * (chosen + rejected) ** 2
        assert step["loss"] == pytest.approx(loss.item(), rel=1e-4) and step["pairs"] == 1
        after = model.score("what is", ["good day", "no"]).flatten()
        assert after[0] - after[1] > chosen - rejected  # it learns that the chosen one is better


def test_differences_of_scores_are_margins_where_asked(toys):  # noqa: F811
    rankings = [parse_ranking({"prompt": "what is", "responses": ["good day", "no"], "scores": [3, 1]})]
    found = []
    for weight in (None, 0.5):
        [step] = train(toy(toys, "bert", dropout=0.0), rankings, TrainConfig(epochs=1, margin=weight, bf16=False), progress=False).steps
        found.append((step["loss"], step["margin"]))
    (plain, ahead), (wide, _) = found
    softplus = lambda x: torch.nn.functional.softplus(torch.tensor(-x)).item()
    assert plain == pytest.approx(softplus(ahead), rel=1e-4) and wide == pytest.approx(softplus(ahead - 1.0), rel=1e-4)


def test_pairs_that_cutting_makes_equal_are_dropped_and_counted(toys):  # noqa: F811
    long = "good " * 40
    rankings = [Ranking("what is", [long + "sun", long + "day"], [1.0, 0.0]), *kind_words(6, random.Random(0))]
    model = toy(toys, "bert", max_length=20)
    with pytest.warns(UserWarning, match="1 pair dropped: equal after cutting"):
        history = train(model, rankings, TrainConfig(max_steps=1, bf16=False), progress=False)
    assert history.equal == 1 and history.cuts["completions"] == 2 and history.cuts["share_of_completions"] == pytest.approx(2 / 32)
    assert history.to_dict()["cuts"]["max_length"] == 20
    with pytest.raises(InputError, match="nothing to learn: 1 pair dropped"):
        train(toy(toys, "bert", max_length=20), rankings[:1], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train(toy(toys, "bert"), rankings[1:], TrainConfig(max_steps=1, bf16=False), progress=False)


def test_equal_rows_leave_the_other_pairs():
    one = Ranking("p", ["a", "b", "c"], [1.0, 2.0, 3.0], list("xyz"), None, [0.0, 1.0, 2.0])
    left, rows, dropped = drop_equal([one], [[[1], [1], [2]]])
    assert (left, rows, dropped) == ([Ranking("p", ["a", "c"], [1.0, 3.0], ["x", "z"], None, [0.0, 2.0])], [[[1], [2]]], 1)


def test_training_takes_rows_data_sets_and_files(toys, tmp_path):  # noqa: F811
    rows = [{"prompt": "what is", "chosen": "good day", "rejected": "no"}, {"prompt": "good", "chosen": "sun", "rejected": "no day"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    config, losses = TrainConfig(max_steps=2, bf16=False), []
    for data in (rows, Dataset.from_list(rows), tmp_path / "rows.parquet", [parse_ranking(row) for row in rows]):
        history = train(toy(toys, "bert", dropout=0.0), data, config, eval_rankings=data, progress=False)
        losses.append([step["loss"] for step in history.steps])
    assert losses[0] == losses[1] == losses[2] == losses[3] and history.evaluations
    with pytest.raises(InputError, match="there is nothing to evaluate: no prompt has two"):
        train(toy(toys, "bert"), rows, config, eval_rankings=[Ranking("p", ["a", "b"], [1.0, 1.0])], progress=False)


def test_rankings_without_a_decision_are_counted(toys):  # noqa: F811
    rankings = [Ranking("what is", ["good", "sun"], [1.0, 1.0]), *kind_words(6, random.Random(0))]
    with pytest.warns(UserWarning, match="1 ranking left out, whose completions all have one score"):
        history = train(toy(toys, "bert"), rankings, TrainConfig(max_steps=1, bf16=False), progress=False)
    assert history.undecided == history.to_dict()["undecided"] == 1
