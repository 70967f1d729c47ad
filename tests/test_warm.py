"Gates that learn from judged rankings before they ask anybody."

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from prompting_nb.config import InputError
from prompting_nb.validators.bayes import BayesianGatingModel
from prompting_nb.validators.gating import SentenceEmbedGatingModel
from prompting_nb.validators.warm import judged_answers, track_records

NETWORK = SimpleNamespace(hotkeys=["k0", "k1", "k2", "k3"])
NAMES = {"ann": "k2", "bob": "k0"}


def ranking(prompt, scores, names):
    return SimpleNamespace(prompt=prompt, scores=scores, names=names)


RANKINGS = [ranking(f"what is {n} plus 9", [0.9, 0.2], ["ann", "bob"]) for n in range(9)]
RANKINGS += [ranking(f"cook rice for {n}", [0.1, 0.8], ["ann", "bob"]) for n in range(9)]


def bayes(**gating):
    return BayesianGatingModel(NETWORK, {"gating": {"topics": 4, **gating}}, "minilm", num_uids=4)


def test_warm_is_as_good_as_having_asked():
    warm, asked = bayes(), bayes()
    known = warm.learn_from(iter(RANKINGS), NAMES)  # any iterable
    for one in RANKINGS:
        uids = torch.tensor([2, 0])
        asked.backward(asked(one.prompt)[uids], torch.tensor(one.scores), uids)
    asked.beliefs.prior_noise.fill_(0.02)  # where the estimate of the noise starts
    asked.reflect()
    torch.testing.assert_close(warm.head.weight, asked.head.weight)
    assert warm.seen == asked.seen == known.rankings == 18
    assert known.hotkeys == warm.known == {"k2": 18, "k0": 18}


def test_all_kinds_of_gates_learn(tmp_path):
    settings = {"gating": {"loss": "reward_mse", "optimizer": "adagrad", "learning_rate": 0.1}}
    for gate in (bayes(), SentenceEmbedGatingModel(NETWORK, settings, "minilm", num_uids=4)):
        gate.learn_from(RANKINGS, NAMES)
        scores = gate("what is 30 plus 12")
        assert scores[2] > scores[0] + 0.2
        gate.save(tmp_path / "gate.safetensors")
        other = type(gate)(NETWORK, gate.config, num_uids=4)
        other.load(tmp_path / "gate.safetensors")
        assert other.known == gate.known == {"k2": 18, "k0": 18}


@pytest.mark.parametrize("make", [bayes, lambda: SentenceEmbedGatingModel(NETWORK, {}, "minilm", num_uids=4)])
def test_an_empty_prompt_changes_nothing(make):
    gate = make()
    before = gate.head.weight.detach().clone()
    with pytest.raises(InputError, match="empty"):
        gate.learn_from([*RANKINGS, ranking("", [0.1, 0.2], ["ann", "bob"])], NAMES)
    assert torch.equal(gate.head.weight, before) and not gate.known


def test_what_is_left_out_is_counted(caplog):
    odd = [ranking("a", [0.5, math.nan, 7.0, None], ["k0", "k1", "k3", "k2"]), ranking("b", [0.2, 0.4, 0.9], ["k0", "k0", "eve"]),
           ranking("c", [0.1], None), ranking("d", [0.1], ["eve"])]
    gate = bayes(memory=1)
    with caplog.at_level(logging.WARNING):
        known = gate.learn_from(odd)
    assert (known.rankings, known.unnamed, known.ungraded, known.repeated, known.outside, known.forgotten) == (2, 1, 2, 2, 1, 1)
    assert known.strangers == {"eve": 2} and "2 answers of 1 name without a hotkey here (eve)" in str(known)
    assert "1 grade outside 0 to 1" in caplog.text
    assert gate.known == {"k0": 2, "k3": 1}


def test_nothing_to_learn_from():
    gate = bayes()
    known = gate.learn_from([])
    assert str(known) == "0 rankings with 0 answers of 0 hotkeys" and gate.seen == 0
    assert judged_answers(RANKINGS, {}, dict(enumerate(NETWORK.hotkeys)))[1].strangers == {"ann": 18, "bob": 18}


def test_track_records_have_the_best_first():
    found = track_records([ranking("a", [0.1, 0.9, None], ["x", "y", "z"]), ranking("b", [0.5, 0.1], ["x", "y"])])
    assert [(one.name, round(one.mean, 6), one.answers) for one in found] == [("y", 0.5, 2), ("x", 0.3, 2)]


@pytest.mark.parametrize("nobody", [None, "", math.nan])
def test_answers_without_a_name_are_counted(nobody):
    rows = [ranking("a", [0.9, 0.2], ["ann", nobody]), ranking("b", [0.5, 0.1], [nobody, nobody])]
    rows.append(ranking("c", [0.5, 0.1], ["eve", nobody]))
    gate = bayes()
    known = gate.learn_from(rows, NAMES)
    assert (known.rankings, known.unnamed, known.nameless, known.strangers) == (1, 1, 2, {"eve": 1})
    assert "1 ranking without names, 2 answers without a name" in str(known)
    assert gate.learn_from(rows).nameless == 2
    assert [one.name for one in track_records(rows)] == ["ann", "eve"]
