"""The judge: whom it flatters, ties, what it is told of itself, and judges of other libraries."""

import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from rich.console import Console
from sklearn.isotonic import IsotonicRegression

from prompting_nb.config import InputError
from prompting_nb.loop.network import Network
from prompting_nb.loop.report import Recorder, knowledge, make_folder, print_tables
from prompting_nb.loop.run import Holder, Loop, Trace
from prompting_nb.loop.tasks import Arena, Worker
from prompting_nb.validators.audits import AuditedPolicy, Auditor, Audits, choice_value, gain
from prompting_nb.validators.bayes import BayesianGatingModel
from prompting_nb.validators.judge import CrossEncoderScorer, Judge, reward_answers, reward_with, watched_by
from prompting_nb.validators.offsets import Offsets, Usual, drift
from prompting_nb.validators.policies import LinTS, MeanPerUid
from prompting_nb.validators.simulate import Delay, GatePolicy, Lazy, Replace, Subnet, made_up, run_policy, simulate
from prompting_nb.validators.validator import Policy, Validator
from prompting_nb.validators.watch import Watch, agreement, by_author, decided
from toys import letter_tokenizer, save_model


class Numbers:
    "Scores a completion by the number before its first space."

    def score(self, prompts, completions):
        return torch.tensor([[float(text.split()[0])] for text in completions])


def graded(prompts=66, people=5, seed=0, flattery=0.2):
    "Scores, grades and names: the scorer errs by author as much as by text."
    draw = np.random.default_rng(seed)
    bias = flattery * draw.standard_normal(people)
    grades = draw.random((prompts, people))
    scores = grades - bias + 0.1 * draw.standard_normal(grades.shape)
    return scores, grades, [[f"5Hotkey{i}" for i in range(people)]] * prompts


def test_offsets_are_what_the_formula_says():
    draw = np.random.default_rng(3)
    errors = {f"5{i}": (draw.standard_normal() + draw.standard_normal(n)) / 5 for i, n in enumerate((66, 66, 12, 3, 2))}
    b = np.array([d.mean() for d in errors.values()])
    v = np.array([d.var(ddof=1) / len(d) for d in errors.values()])
    tau2 = max(b.var(ddof=1) - v.mean(), 1e-4)
    found = Offsets(errors)
    for hotkey, wanted in zip(errors, b * tau2 / (tau2 + v)):
        assert found[hotkey] == pytest.approx(wanted, abs=1e-12)
    assert found["5Stranger"] == 0 and [row.hotkey for row in found.table()][0] == min(errors, key=found.__getitem__)


def test_equal_means_are_shrunk_to_almost_nothing():
    sizes = []
    for seed in range(10):
        draw = np.random.default_rng(seed)
        rows = Offsets({f"5{i}": 0.5 * draw.standard_normal(10) for i in range(20)}).table()
        sizes.append([np.mean([abs(row.value) for row in rows]), np.mean([abs(row.mean) for row in rows])])
    shrunk, means = np.mean(sizes, axis=0)
    assert shrunk < 0.4 * means


def test_intervals_hold_the_true_offsets():
    held = []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        truth = 0.15 * draw.standard_normal(16)
        found = Offsets({f"5{i}": t + 0.3 * draw.standard_normal(20) for i, t in enumerate(truth)})
        rows = found.by_hotkey()
        held += [rows[f"5{i}"].low <= t <= rows[f"5{i}"].high for i, t in enumerate(truth)]
    assert 0.9 < np.mean(held) < 0.99


def test_correction_brings_rewards_closer_to_grades_that_were_not_used():
    scores, grades, names = graded(200)
    fair = Judge.fitted(Numbers(), scores[:66], grades[:66], names[:66])
    error = {True: [], False: []}
    for fair.correct in error:
        for row, right, who in zip(scores[66:], grades[66:], names[66:]):
            error[fair.correct].append(fair("", [f"{s} x" for s in row], who).numpy() - right)
    assert np.square(error[True]).mean() < 0.8 * np.square(error[False]).mean()


def test_texts_that_tell_little_beyond_their_author_count_for_little():
    "Grades of unseen answers are met better than by offsets alone, and as well as by the true slope."
    draw, people = np.random.default_rng(5), 12
    skill = 0.5 + 0.15 * draw.standard_normal(people)
    text = 0.15 * draw.standard_normal((300, people))
    scores = skill + 0.1 * draw.standard_normal(people) + text
    grades = (skill + 0.3 * text + 0.1 * draw.standard_normal(text.shape)).clip(0, 1)
    names = [[f"5Hotkey{i}" for i in range(people)]] * len(text)
    fair = Judge.fitted(Numbers(), scores[:66], grades[:66], names[:66])
    assert fair.offsets.slope < 0.8
    old = Judge(fair.model, fair.scores, fair.grades, fair.ties, Offsets(fair.offsets.errors))  # as from an older file
    missed = {judge: [] for judge in ("fair", "old")}
    for name, judge in (("fair", fair), ("old", old)):
        for row, right, who in zip(scores[66:], grades[66:], names[66:]):
            missed[name].append(judge("", [f"{s} x" for s in row], who).numpy() - right)
    assert np.square(missed["fair"]).mean() < 0.9 * np.square(missed["old"]).mean()
    stranger = fair("", ["0.3 x", "0.7 x"], ["5New", "5New"])
    assert stranger.tolist() == fair("", ["0.3 x", "0.7 x"]).tolist(), "nothing is known of a new one"
    assert fair.correction("5Hotkey0", 0.2) > fair.correction("5Hotkey0", 0.8)
    fair.correct = False
    assert fair.correction("5Hotkey0", 0.2) == 0


def test_a_slope_is_what_a_regression_with_intercepts_says():
    draw = np.random.default_rng(6)
    rewards = {f"5{i}": draw.random(n) + i for i, n in enumerate((66, 40, 3, 1))}
    errors = {key: 0.1 * i - 0.6 * r + 0.3 * draw.standard_normal(len(r)) for i, (key, r) in enumerate(rewards.items())}
    found = Offsets(errors, rewards)
    who = np.repeat(np.arange(4), (66, 40, 3, 1))
    design = np.column_stack([np.concatenate(list(rewards.values())), np.eye(4)[who]])
    least = np.linalg.lstsq(design, np.concatenate(list(errors.values())), rcond=None)[0][0]
    assert found.slope == pytest.approx(1 + least, abs=0.02) and 0.3 < found.slope < 0.6
    assert Offsets({key: -value for key, value in errors.items()}, rewards).slope == 1, "rewards are never stretched"
    assert found.correction("50", rewards["50"].mean()) == pytest.approx(found["50"])


def test_audits_teach_a_slope_too():
    draw = np.random.default_rng(7)
    audits = Audits(Judge(Numbers()), lambda _, text: float(text.split()[1]), first=60)
    for _ in range(60):
        texts = [f"{0.5 + 0.1 * draw.standard_normal():.4f} {grade}" for grade in (0.3, 0.6)]
        audits("x", texts, ["5A", "5B"])
    assert audits.offsets.slope < 0.2
    low, high = audits("x", ["0.4 0.3", "0.6 0.3"], ["5A", "5A"]).tolist()
    assert low == pytest.approx(0.3, abs=0.03) and high == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("nobody", [None, "", float("nan")])
def test_an_answer_without_a_name_teaches_nothing_about_anybody(nobody, tmp_path):
    scores, grades, names = graded(30)
    some = [[nobody if i == n % 5 else name for i, name in enumerate(row)] for n, row in enumerate(names)]
    judge = Judge.fitted(Numbers(), scores, grades, some)
    assert set(judge.offsets.errors) == set(names[0]) and all(len(rows) == 24 for rows in judge.offsets.errors.values())
    assert judge("", ["0.5 x"], [nobody]).tolist() == judge("", ["0.5 x"]).tolist()
    judge.save(tmp_path / "judge.json")
    assert Judge.load(tmp_path / "judge.json", Numbers()).offsets.errors == judge.offsets.errors
    means = by_author(grades, some)
    assert all(np.isnan(row[n % 5]) and np.isfinite(row).sum() == 4 for n, row in enumerate(means))
    assert by_author(grades[:2], [[nobody] * 5, []])[1] == pytest.approx([np.nan] * 5, nan_ok=True)


@pytest.mark.parametrize("odd", [["5A"], ["5A", "5B", "5C"]])
def test_names_that_do_not_fit_change_nothing(odd):
    judge, rows = Judge(Numbers()), [[0.1, 0.2], [0.3, 0.4]]
    for names in ([["5A", "5B"], odd], [["5A", "5B"]]):
        for work in (judge.know, lambda scores, grades, names: by_author(grades, names), judge.offsets.learn):
            with pytest.raises(InputError, match="name"):
                work(rows, rows, names)
    with pytest.raises(InputError, match="finite"):
        judge.offsets.learn(rows, [[0.1, 0.2], [0.3, float("nan")]], [["5A", "5B"]] * 2)
    with pytest.raises(InputError, match="prompt 1 has no names for 2 and 1 answers"):
        judge.offsets.learn(rows, [[0.1, 0.2], [0.3]], [["5A", "5B"], None])
    with pytest.raises(InputError, match="each grade needs a prediction"):
        agreement([[0.1]], [[0.1, 0.2]])
    assert len(judge.offsets) == 0 and judge.watch == Watch()


def test_corrected_rewards_are_not_cut_and_missing_answers_stay_zero():
    judge = Judge(Numbers(), offsets=Offsets({"5Up": [0.5] * 9, "5Down": [-0.5] * 9}))
    rewards = judge("", ["0.9 x", "0.1 x", None, ""], ["5Up", "5Down", "5Up", "5Down"]).tolist()
    assert rewards == pytest.approx([1.4, -0.4, 0, 0], abs=0.01)


def test_the_raw_score_breaks_ties_of_the_curve_and_nothing_else():
    scores, grades, _ = graded()
    judge = Judge.fitted(Numbers(), scores, grades)
    flat = IsotonicRegression(out_of_bounds="clip").fit(scores.ravel(), grades.ravel())
    x = np.linspace(scores.min() - 1, scores.max() + 1, 500)
    assert (np.diff(flat.predict(x)) == 0).any() and (np.diff(judge.expected(x)) > 0).all()
    assert np.abs(judge.expected(x) - flat.predict(x)).max() <= 1e-3
    assert judge.expected(x).min() >= 0 and judge.expected(x).max() <= 1
    texts = [f"{value} x" for value in x]
    assert (judge("", texts).diff() >= 0).all()
    for far in (np.geomspace(1, 1e300, 40), np.linspace(x.max(), 1000 * x.max(), 300)):
        assert (np.diff(judge.expected(far)) > 0).all() and (np.diff(judge.expected(-far)) < 0).all()
    new, worth, _ = graded(seed=1)
    assert agreement([judge.expected(row) for row in new], worth) > agreement([flat.predict(row) for row in new], worth)


_CLOSE, _HUGE = [0.3, 0.3 + 1e-12, 0.3 - 1e-12, 0.3], [1e308, 1.7e308, -1e308, -1.7e308]


@pytest.mark.parametrize("scores", [[10, 20, 10, 11], [5e5, 1e6, -1e6, -2e6], _CLOSE, _HUGE, [3, 3, 3, 3]])
@pytest.mark.parametrize("flat", [0.0, 0.1, 1.0])
def test_order_within_a_plateau_is_that_of_the_raw_scores(scores, flat):
    "Also in float32, at both ends of the curve and however far away; equal scores have equal rewards."
    low = [*np.linspace(0, 0.7, 8), 10, 20]
    judge = Judge.fitted(Numbers(), [low], [[flat] * 8 + [max(flat, 0.9)] * 2])
    class Exact(Numbers):
        def score(self, prompts, completions):
            return np.array([[float(text.split()[0])] for text in completions])

    judge.model = Exact()
    exact = judge("", [f"{score!r} x" for score in np.array(scores, dtype=float).tolist()]).numpy()
    right = np.greater.outer(scores, scores).astype(int) - np.less.outer(scores, scores)
    assert (np.sign(np.subtract.outer(exact, exact)) == right).all() and exact.dtype == np.float32
    assert 0 <= exact.min() and exact.max() <= 1


def test_a_saved_judge_is_the_same(tmp_path):
    scores, grades, names = graded()
    judge = Judge.fitted(Numbers(), scores, grades, names, correct=False)
    judge.save(tmp_path / "judge.json")
    again = Judge.load(tmp_path / "judge.json", Numbers())
    assert again.offsets.errors == judge.offsets.errors and again.offsets.rewards == judge.offsets.rewards
    assert again.watch == judge.watch and not again.correct
    texts, who = ["0.1 x", "0.7 y"], ["5Hotkey1", "5Hotkey2"]
    for judge.correct in (True, False):
        again.correct = judge.correct
        assert again("", texts, who).tolist() == judge("", texts, who).tolist()


@pytest.mark.parametrize("usual", [None, Usual(), Usual(spread=0.2, hotkeys=1, variance=0.02, answers=3)])
def test_a_saved_judge_keeps_what_is_usual(tmp_path, usual):
    "One graded answer counts as much as before, and audits go on with what was assumed."
    judge = Judge(Numbers(), offsets=Offsets({"5A": [0.3]}, usual=usual))
    judge.save(tmp_path / "judge.json")
    again = Judge.load(tmp_path / "judge.json", Numbers())
    assert again.offsets.usual == usual and again.offsets["5A"] == judge.offsets["5A"]
    assert Audits(again, lambda *_: None).offsets.usual == (usual or Usual())
    state = json.loads((tmp_path / "judge.json").read_text())
    del state["usual"]  # as earlier versions wrote it
    (tmp_path / "old.json").write_text(json.dumps(state))
    assert Judge.load(tmp_path / "old.json", Numbers()).offsets.usual is None


_CURVE = '{"scores": [0, 1], "grades": [0, 1], "correct": true, "watch": {}, '


@pytest.mark.parametrize("text", ["", "[]", "{}", _CURVE + '"ties": 5, "errors": {}}', _CURVE + '"ties": null, "errors": {"5A": ["x"]}}',
                                  _CURVE + '"ties": null, "errors": {}, "usual": {"spread": NaN}}',
                                  _CURVE + '"ties": null, "errors": {}, "usual": {"odd": 1}}',
                                  _CURVE + '"ties": null, "errors": {}, "usual": 5}'])
def test_a_file_that_holds_no_judge_is_named(tmp_path, text):
    (tmp_path / "judge.json").write_text(text)
    with pytest.raises(InputError, match="judge.json holds no judge"):
        Judge.load(tmp_path / "judge.json", Numbers())


def test_the_watch_sees_that_the_author_says_as_much_as_the_text():
    scores, grades, names = graded(flattery=0.05)
    assert Judge.fitted(Numbers(), scores, grades, names).findings() == []
    draw = np.random.default_rng(1)
    worth = np.clip(np.linspace(0.1, 0.9, 5) + 0.05 * draw.standard_normal((66, 5)), 0, 1)
    (finding,) = Judge.fitted(Numbers(), worth + 0.3 * draw.standard_normal(worth.shape), worth, names).findings()
    assert "who answered predicts" in finding
    predicted = by_author(worth, names)
    others = np.delete(worth, 7, axis=0).mean(0)
    assert predicted[7] == pytest.approx(others.tolist()), "the prompt itself is left out"


def test_who_answered_and_the_text_are_compared_on_the_same_pairs():
    "Pairs of strangers count for neither, and a handful of pairs is no evidence."
    scores, grades, names = graded(60, flattery=0.0)
    order = np.sort(grades, axis=1)
    two = [None] * 58 + [["A", "B", None, None, None]] * 2
    judge = Judge.fitted(Numbers(), scores, order, two)
    assert judge.watch.by_who == 1 and judge.watch.pairs == 2 and judge.findings() == []
    assert judge.watch.by_text in (0, 0.5, 1), "of two pairs"
    half = [row if n < 30 else None for n, row in enumerate(names)]
    wrong = np.where(np.arange(60)[:, None] < 30, scores, -scores)  # on the nameless prompts the text misleads
    judge = Judge(Numbers(), [-2, 2], [0, 1])
    judge.know(wrong, grades, half)
    assert judge.watch.by_text > 0.8 and judge.watch.pairs == decided([grades[0]] * 30, grades[:30]) == 300
    assert judge.findings() == []
    few = Watch(by_text=0.5, by_who=0.9)
    assert few.findings(), "a file of an earlier version does not say of how many pairs"


def test_what_a_calibration_finds_is_logged(caplog):
    draw = np.random.default_rng(1)
    worth = np.clip(np.linspace(0.1, 0.9, 5) + 0.05 * draw.standard_normal((66, 5)), 0, 1)
    with caplog.at_level(logging.WARNING):
        judge = Judge.fitted(Numbers(), worth + 0.3 * draw.standard_normal(worth.shape), worth, [[*"abcde"]] * 66)
    assert [record.getMessage() for record in caplog.records] == [f"the judge: {finding}" for finding in judge.findings()] != []


def test_the_watch_logs_once_that_scores_leave_the_range(caplog):
    scores, grades, names = graded()
    judge = Judge.fitted(Numbers(), scores, grades)
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            judge("", ["0.5 x", "0.4 x"])
        assert not caplog.records and judge.findings() == []
        for _ in range(20):
            judge("", ["99 x", "-50 x", "0.5 x"])
    assert len(caplog.records) == 1 and "outside the range" in caplog.text
    (finding,) = judge.findings()
    assert "40 of 100 raw scores" in finding and "(20 below, 20 above)" in finding


def test_the_watch_counts_no_trials():
    "A search for an answer that the judge cannot take adds nothing but the scores that are used."
    by_length = lambda _, texts: [[float("nan") if text == "BAD" else len(text)] for text in texts]
    judge = Judge(SimpleNamespace(score=by_length), watch=Watch(5, 6))  # the plain answers are outside
    for _ in range(50):
        found = reward_answers(judge, "", ["fives", "BAD", "sixsix"], [*"abc"])
    assert found.refused == [1] and watched_by(judge) == [100, 0, 0] and judge.findings() == []


@pytest.mark.parametrize("restart", [None, "file", "events"])
@pytest.mark.parametrize("score", [9.0, -9.0])
def test_the_watch_sees_a_change_after_a_long_time_inside(tmp_path, caplog, score, restart):
    "As well after a restart in the middle of it; a score now and then is none."
    judge, written = Judge(Numbers(), watch=Watch(0, 1)), []
    for n in range(2000):
        judge.watch.look([score if n % 200 == 0 else 0.5] + [0.5] * 4)
        written.append(watched_by(judge))
    assert not judge.watch.left_range and judge.findings() == []
    judge.watch.look([score] * 8)
    written.append(watched_by(judge))
    assert not judge.watch.left_range
    before = judge
    if restart == "file":
        judge.save(tmp_path / "judge.json")
        judge = Judge.load(tmp_path / "judge.json", Numbers())
    elif restart == "events":
        judge = Judge(Numbers(), watch=Watch(0, 1))
        for counts in written:
            judge.watch.go_on(*counts)
    assert judge.watch == before.watch
    with caplog.at_level(logging.WARNING):
        judge.watch.look([score] * 60)
        judge.watch.look([score] * 60)
    assert judge.watch.left_range and len(caplog.records) == 1
    (finding,) = judge.findings()
    assert "of the latest 200" in finding


def test_counts_of_an_earlier_version_go_on(tmp_path):
    judge = Judge(Numbers(), watch=Watch(0, 1, seen=500, above=3))
    judge.save(tmp_path / "judge.json")
    state = json.loads((tmp_path / "judge.json").read_text())
    del state["watch"]["latest"], state["watch"]["pairs"]
    (tmp_path / "judge.json").write_text(json.dumps(state))
    again = Judge.load(tmp_path / "judge.json", Numbers())
    assert again.watch == Watch(0, 1, seen=500, above=3)
    again.watch.go_on(10, 0, 4)  # of a judge that began anew
    assert watched_by(again) == [10, 0, 4] and again.watch.left_range


def test_the_watch_sees_an_offset_that_drifts():
    draw = np.random.default_rng(2)
    steady, moved = 0.2 * draw.standard_normal(60), 0.2 * draw.standard_normal(60)
    moved[-12:] -= 0.5
    judge = Judge(Numbers(), offsets=Offsets({"5Steady": steady, "5Moved": moved}))
    (finding,) = judge.findings()
    assert "5Moved" in finding and abs(drift(steady)) < 4
    judge.correct = False
    assert judge.findings() == []


def test_a_validator_tells_its_judge_who_answered():
    "Rewards, averages and events are corrected; no share of weight is negative."
    workers = [Worker("good", lambda prompt: "0.8 x"), Worker("bad", lambda prompt: "0.1 x")]
    with Network(workers, seed=5) as network:
        keys = {miner.worker.name: miner.hotkey for miner in network.miners.values()}
        uids = {miner.worker.name: uid for uid, miner in network.miners.items()}
        judge = Judge(Numbers(), offsets=Offsets({"good": [0.1] * 30, "bad": [-0.4] * 30}).renamed(keys))
        with Validator(network.wallet, network.client, judge, policy=Policy(k=2, timeout=20.0)) as validator:
            event = validator.step("any prompt")
            shares = validator.set_weights()
    at = {uid: i for i, uid in enumerate(event.uids)}
    good, bad = at[uids["good"]], at[uids["bad"]]
    assert event.rewards[good] == pytest.approx(0.9, abs=0.01) and event.rewards[bad] == pytest.approx(-0.3, abs=0.01)
    assert event.offsets[good] == pytest.approx(0.1, abs=0.01) and event.offsets[bad] == pytest.approx(-0.4, abs=0.01)
    assert shares == {uids["good"]: 1.0}, "the other one's average is 0, not negative"
    assert '"offsets": [' in event.to_json()


def test_a_judge_gets_hotkeys_only_if_it_wants_them():
    plain = lambda prompt, completions: torch.zeros(len(completions))
    assert reward_with(plain, "", ["a"], ["5A"]).tolist() == [0]
    wants = lambda prompt, completions, hotkeys: torch.tensor([float(len(key)) for key in hotkeys])
    assert reward_with(wants, "", ["a", "b"], ["5A", "5Long"]).tolist() == [2, 5]


def test_a_cross_encoder_is_a_judge(tmp_path):
    config = hf.BertConfig(vocab_size=31, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1)
    folder = save_model(tmp_path / "cross", config, letter_tokenizer(bert=True), kind=hf.AutoModelForSequenceClassification)
    scorer = CrossEncoderScorer(folder)
    texts = ["abc", "xyz abc", "q"]
    found = scorer.score("what", texts)
    right = torch.as_tensor(scorer.model.predict([("what", text) for text in texts]))
    assert found.shape == (3, 1) and found.dtype == torch.float32 and torch.allclose(found[:, 0], right, atol=1e-6)
    assert torch.allclose(scorer.score(["what"] * 3, texts), found)
    judge = Judge.fitted(scorer, [found[:, 0].tolist()] * 2, [[0.1, 0.5, 0.9]] * 2, [["5A", "5B", "5C"]] * 2)
    assert judge("what", texts, ["5A", "5B", "5C"]).shape == (3,)
    many = hf.BertConfig(**{**config.to_dict(), "num_labels": 3, "id2label": None, "label2id": None})
    other = save_model(tmp_path / "three", many, letter_tokenizer(bert=True), kind=hf.AutoModelForSequenceClassification)
    with pytest.raises(InputError, match="3 labels"):
        CrossEncoderScorer(other)
    with pytest.raises(InputError, match="there is no folder"):
        CrossEncoderScorer(str(tmp_path / "nothing"))


def test_a_score_that_is_not_finite_is_named():
    with pytest.raises(InputError, match="'nan x' is not finite"):
        Judge(Numbers())("", ["0.5 x", "nan x"])
    with pytest.raises(InputError, match="finite"):
        Offsets({"5A": [float("inf")]})
    assert Watch().findings() == []


def test_audits_find_out_whom_the_judge_flatters():
    "First answers and then a share are graded; all rewards come closer to the grades."
    draw = np.random.default_rng(0)
    bias = dict(zip(("5A", "5B", "5C"), (0.3, 0.0, -0.3)))
    audits, early, late = Audits(Judge(Numbers()), lambda _, text: float(text.split()[1]), first=4, share=0.05), [], []
    for step in range(200):
        truth = draw.uniform(0.3, 0.7, 3)
        texts = [f"{t + b + 0.05 * draw.standard_normal():.4f} {t:.4f}" for t, b in zip(truth, bias.values())]
        (late if step >= 20 else early).append(audits("x", texts, [*bias]).numpy() - truth)
    assert 12 + 25 <= audits.graded <= 12 + 31 and audits.answers == 600
    assert np.abs(late).mean() < 0.06, "the noise alone is 0.04"
    assert audits.offset("5A") == pytest.approx(-0.3, abs=0.05) and audits.offset("5C") == pytest.approx(0.3, abs=0.05)


def test_audits_go_where_they_teach_most():
    "To those whose errors vary and that were asked often, not to those that are well known."
    draw = np.random.default_rng(1)
    known = Offsets({"5Known": 0.3 + 0.05 * draw.standard_normal(80), "5Wild": 0.4 * draw.standard_normal(8) - 0.3})
    auditor = Auditor(known, first=2, share=0.2)
    picked = [key for _ in range(20) for key in np.array(["5Known", "5Wild"])[auditor.pick(["5Known", "5Wild"])]]
    assert picked == ["5Wild"] * 8
    assert auditor.pick(["5New", "5New", "5New"])[:2] == [0, 1]


def test_a_validator_has_answers_audited():
    workers = [Worker("good", lambda prompt: "0.5 0.9"), Worker("bad", lambda prompt: "0.5 0.1")]
    with Network(workers, seed=6) as network:
        judge = Audits(Judge(Numbers()), lambda _, text: float(text.split()[1]))
        with Validator(network.wallet, network.client, judge, policy=Policy(k=2, timeout=20.0)) as validator:
            events = [validator.step("any prompt") for _ in range(6)]
    uids = {miner.worker.name: uid for uid, miner in network.miners.items()} or {"good": 1, "bad": 2}
    last = dict(zip(events[-1].uids, events[-1].rewards))
    assert last[uids["good"]] == pytest.approx(0.9, abs=0.02) and last[uids["bad"]] == pytest.approx(0.1, abs=0.02)


def test_an_audit_is_worth_what_it_may_change_of_the_choice():
    levels, steps, k = np.array([0.6, 0.5, 0.48, 0.2]), np.array([0.05, 0.05, 0.05, 0.05]), 2
    draw, found = np.random.default_rng(0), choice_value(levels, steps, k)
    for i in range(4):
        moved = np.tile(levels, (40_000, 1))
        moved[:, i] += steps[i] * draw.standard_normal(len(moved))
        rise = np.sort(moved, axis=1)[:, -k:].sum(1).mean() - levels[:k].sum()
        assert found[i] == pytest.approx(rise, abs=6e-4)
    assert found[1] == found[2] > found[0] > found[3]
    assert choice_value([0.1, 0.9], [1.0, 1.0], 2).tolist() == [0, 0], "both are asked in any case"


@pytest.mark.parametrize("rule", ["first", "doubt", "choice"])
def test_a_rule_keeps_to_its_budget_whatever_the_judge_does(rule):
    auditor = Auditor(Offsets(usual=Usual()), first=3, share=0.1, rule=rule, k=1)
    keys, picked = ["5A", "5B"], 0
    for _ in range(100):
        picked += len(auditor.pick(keys, [0.5, 0.4]))  # no grade ever comes
    assert picked in (2 * 3 + 19, 2 * 3 + 20), "and an expensive judge that fails is not asked for ever"
    assert auditor.pick([], []) == [] and auditor.pick(["5New"] * 2, [0.1, 0.1]) == [0, 1]
    with pytest.raises(InputError, match="rule of audits"):
        Auditor(Offsets(), rule="all")


def test_audits_go_to_those_who_contend():
    known = Offsets({key: [0.0, 0.1] * 3 for key in ("5Best", "5Second", "5Third", "5Last")}, usual=Usual())
    auditor = Auditor(known, first=0, share=0.25, rule="choice", k=2)
    rewards, counts = [0.9, 0.52, 0.5, 0.1], {0: 0, 1: 0, 2: 0, 3: 0}
    for _ in range(40):
        for place in auditor.pick([*known.errors], rewards):
            counts[place] += 1
    assert counts[1] + counts[2] == 40


def test_few_errors_are_read_with_care():
    two = {"5A": [0.30, 0.31], "5B": [-0.1, 0.2], "5C": [0.0, 0.1]}
    known = Offsets(two, usual=Usual())
    assert known.certainty("5A")[1] > 100 * Offsets(two).certainty("5A")[1], "two equal errors are luck"
    assert known.doubt("5A") > 2 * Offsets(two).doubt("5A")
    assert Offsets({"5A": [0.5]}, usual=Usual())["5A"] > 0.03 > Offsets({"5A": [0.5]})["5A"]
    draw = np.random.default_rng(0)
    many = {f"5{i}": 0.1 * draw.standard_normal() + 0.3 * draw.standard_normal(400) for i in range(30)}
    for key in many:
        assert Offsets(many)[key] == pytest.approx(Offsets(many, usual=Usual())[key], abs=0.003)
    doubts = [Offsets({"5A": [0.1, 0.4] * n}, usual=Usual()).doubt("5A") for n in (1, 4, 16)]
    assert doubts == sorted(doubts, reverse=True) and Offsets(usual=Usual()).doubt("5New") == pytest.approx(0.03**0.5)


_EQUAL = [{"5A": [0.5, 0.5]}, {"5A": [0.5, 0.5], "5B": [0.5] * 3}, {"5A": [0.1] * 2, "5B": [0.3] * 2}, {"5A": [0.0]}, {}]


@pytest.mark.parametrize("errors", _EQUAL)
@pytest.mark.parametrize("usual", [None, Usual(), Usual(spread=0.0, variance=0.0), Usual(answers=0.0, hotkeys=0.0)])
def test_equal_errors_leave_doubt_about_others(errors, usual):
    known = Offsets(errors, usual=usual)
    assert all(np.isfinite(known.doubt(key)) for key in ("5A", "5New"))
    assert known.doubt("5New") >= known.doubt("5A") >= 0
    for rule in ("first", "doubt", "choice"):
        auditor = Auditor(known, first=0, share=1.0, rule=rule, k=1)
        assert auditor.pick(["5New", "5A"], [0.5, 0.5]) == [0, 1]
        assert np.isfinite([gain(known, "5New"), gain(known, "5A")]).all()
    if "5B" not in errors and errors and usual is None:
        assert known.doubt("5New") == pytest.approx(0.01), "the least spread of offsets"


def test_one_error_shows_no_drift():
    with pytest.raises(InputError, match="two errors at least"):
        drift([0.1, 0.2, 0.3], latest=1)
    with pytest.raises(InputError, match="latest=1"):
        Audits(Judge(Numbers()), lambda *_: 0.5, latest=1)


def test_a_correction_is_a_line_that_can_be_undone():
    draw = np.random.default_rng(1)
    rewards = {f"5{i}": draw.random(9) for i in range(4)}
    found = Offsets({key: 0.2 - 1.0 * r for key, r in rewards.items()}, rewards)
    for key in (*rewards, "5New"):
        shift, factor = found.line(key)
        assert factor >= 0.05
        for reward in (0.1, 0.6):
            assert shift + factor * reward == pytest.approx(reward + found.correction(key, reward), abs=0.05)



def test_what_a_gate_was_told_follows_the_corrections():
    network = SimpleNamespace(hotkeys=["5A", "5B", "5C"])
    gate = BayesianGatingModel(network, {"gating": {"topics": 2}}, "minilm", num_uids=3)
    audits = Audits(Judge(Numbers()), lambda _, text: float(text.split()[1]), first=3, share=0.0)
    draw, plain = np.random.default_rng(2), {}
    for n in range(12):
        audits.follow(gate)
        texts = [f"{draw.random():.4f} {grade}" for grade in (0.2, 0.5, 0.8)]
        plain[f"question {n}"] = [float(text.split()[0]) for text in texts]
        rewards = audits(f"question {n}", texts, network.hotkeys)
        gate.backward(gate(f"question {n}"), rewards)
    audits.follow(gate)
    kept = {n: q for n, q in zip(plain, gate.memory.questions.values())}
    for name, question in kept.items():
        lines = [audits.told.line(key) for key in network.hotkeys]
        wanted = [shift + factor * reward for (shift, factor), reward in zip(lines, plain[name])]
        assert question.rewards.tolist() == pytest.approx(wanted, abs=1e-4), "as if it had been so from the start"
    mean = gate("question 3").tolist()
    assert mean[0] < mean[1] - 0.05 and mean[1] < mean[2] - 0.05


@pytest.mark.parametrize("missing", [None, ""])
def test_what_was_not_answered_earns_nothing_after_a_correction(missing, tmp_path):
    "Nor after the gate was saved; an answer whose reward is 0 is one, and is corrected."
    network = SimpleNamespace(hotkeys=["5A", "5B"])
    make = lambda: BayesianGatingModel(network, {"gating": {"topics": 2}}, "minilm", num_uids=2)
    gate = make()
    audits = Audits(Judge(Numbers()), lambda _, text: float(text.split()[1]), first=6, share=0.0)
    for n in range(12):
        audits.follow(gate)
        texts = [missing if n % 2 else "-3 0.9", "0.5 0.5"]
        gate.backward(gate(f"question {n}"), audits(f"question {n}", texts, network.hotkeys))
    audits.follow(gate)
    gate.save(tmp_path / "gate")
    again = make()
    again.load(tmp_path / "gate")
    for one in (gate, again):
        audits.offsets.add("5A", 0.9, 0.0)
        audits.told.least = 1e-6
        audits.follow(one)
        kept = [question.rewards[0].item() for question in one.memory.questions.values()]
        assert kept[1::2] == [0.0] * 6, "no answer"
        assert kept[::2] == pytest.approx([0.9] * 6, abs=0.1), "answers without a reward before they were audited"


@pytest.mark.parametrize("when", ["first", "later", "resumed"])
def test_a_gate_that_began_warm_is_corrected_but_for_its_grades(when, tmp_path):
    "Newcomers and those it knew alike, wherever the judged rankings came from, and after a restart."
    network = SimpleNamespace(hotkeys=["5Known", "5New"])
    make = lambda: BayesianGatingModel(network, {"gating": {"topics": 2}}, "minilm", num_uids=2)
    judged = [SimpleNamespace(prompt=f"judged {n}", scores=[0.25], names=["5Known"]) for n in range(3)]
    grade = lambda _, text: float(text.split()[1])
    gate, audits = make(), Audits(Judge(Numbers()), grade, first=4, share=0.0)

    def ask(name, prompts):
        for n in range(prompts):
            audits.follow(gate)
            texts = ["0.8 0.4", "0.3 0.7"]
            gate.backward(gate(f"{name} {n}"), audits(f"{name} {n}", texts, network.hotkeys))
        audits.follow(gate)

    if when == "later":
        ask("early", 2)
    gate.learn_from(judged)
    ask("question", 3)
    if when == "resumed":
        gate.save(tmp_path / "gate")
        audits.judge.save(tmp_path / "judge.json")
        state, audits = json.dumps(audits.state()), Audits(Judge.load(tmp_path / "judge.json", Numbers()), grade, first=4, share=0.0)
        audits.restore(json.loads(state))
        gate = make()
        gate.load(tmp_path / "gate")
    ask("late", 5)
    shift, factor = audits.told.line("5New")  # asked again: a newcomer's answer beside a grade
    gate.backward(gate("judged 2")[[1]], torch.tensor([shift + factor * 0.3]))
    for _ in range(30):
        audits.offsets.add("5New", 0.4, 0.3)
    audits.told.least = 1e-6
    audits.follow(gate)
    shown = {key: audits.told.line(key) for key in network.hotkeys}
    wanted = {key: shift + factor * reward for (key, (shift, factor)), reward in zip(shown.items(), (0.8, 0.3))}
    assert wanted["5Known"] < 0.6 and wanted["5New"] > 0.6
    got = []
    for question in gate.memory.questions.values():
        for uid, reward in zip(question.uids.tolist(), question.rewards.tolist()):
            got.append((network.hotkeys[uid], reward))
    grades = [reward for key, reward in got if key == "5Known" and reward == 0.25]
    assert len(grades) == 3, "grades stay"
    told = [(key, reward) for key, reward in got if reward != 0.25]
    assert len(told) == 2 * (8 + 2 * (when == "later")) + 1
    late = [abs(reward - wanted[key]) for key, reward in told]
    assert max(late) < 1e-4


def test_an_offset_that_drifted_is_remembered():
    "After its old errors are forgotten, after a restart, and under another name."
    audits, grades = Audits(Judge(Numbers()), lambda _, text: float(text.split()[1]), first=99), [0.5] * 12 + [0.1] * 12 + [0.8] * 12
    for n, grade in enumerate(grades):
        audits("x", [f"{0.5 + 0.01 * (-1) ** n:.2f} {grade}", "0.5 0.5"], ["5A", "5B"])
    (finding,) = audits.findings()
    assert finding.startswith("the offset of 5A drifted 2 times, at last by +"), finding
    again = Audits(Judge(Numbers()), audits.grade)
    again.restore(json.loads(json.dumps(audits.state())))
    assert again.findings() == [finding]
    named = audits.named({"5A": "ann"})
    assert named.findings() == [finding.replace("5A", "ann")] and named.graded == audits.graded == 72
    assert named.told.lines.keys() <= {"ann", "5B"} and named.auditor.asked == {"ann": 36, "5B": 36}
    old = {name: part for name, part in audits.state().items() if name not in ("drifted", "judged", "clock", "known")}
    again.restore(old)
    assert again.findings() == []


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    "A run of sixty steps: one miner gets worse half-way, the judge begins to flatter another, and some audits fail."
    at = lambda prompt: int(prompt.split()[-1])
    workers = [Worker("good", lambda prompt: "0.6 0.7"), Worker("turncoat", lambda prompt: "0.9 0.9" if at(prompt) < 30 else "0.1 0.1"),
               Worker("smooth", lambda prompt: "0.5 0.5" if at(prompt) < 20 else "0.5 0.1")]
    grade = lambda _, text: float(text.split()[1])
    arena = Arena("audited", [f"number {n}" for n in range(60)], workers, workers[0], [], [], grade=grade)
    failing = lambda prompt, text: grade(prompt, text) if at(prompt) != 5 else None
    folder = make_folder(tmp_path_factory.mktemp("run") / "out")
    recorder = Recorder(folder)
    judge = Audits(Judge(Numbers(), watch=Watch(0.0, 0.8)), failing, first=99)
    loop = Loop(arena, judge, Policy(k=3, timeout=20.0), on_event=recorder.event, churn=0)
    loop.run(progress=False)
    return loop, recorder.close(loop), folder


def test_a_run_with_audits_reports_what_they_found(audited):
    loop, summary, folder = audited
    rows = {row["hotkey"]: row["value"] for row in summary["judge_offsets"]}
    assert rows.keys() == {"good", "turncoat", "smooth"} and rows["smooth"] < -0.2 and summary["judge_corrected"]
    assert summary["audits"] == {"answers": 180, "graded": 177, "failed": 3}
    found = " | ".join(summary["judge_findings"])
    assert "the offset of smooth drifted 1 time" in found and "3 audits failed" in found and "30 of 180 raw scores lie outside" in found
    said = "177 of 180 answers were audited by a better judge, and 3 audits failed"
    page = (folder / "report.html").read_text()
    assert said in page and said in knowledge(summary) and "knew nothing of them either" not in page
    assert all(finding.split(":")[0] in page for finding in summary["judge_findings"])
    hotkey = next(holder.hotkey for holder in loop.trace.holders if holder.name == "smooth")
    assert hotkey in json.loads((folder / "judge.json").read_text())["errors"]
    assert summary["judging"]["kind"] == "Audits" and summary["judging"]["audits"]["first"] == 99
    assert json.loads((folder / "events.jsonl").read_text().splitlines()[-1])["watched"] == [180, 0, 30]
    console = Console(file=io.StringIO(), width=500)
    print_tables(summary, console)
    assert "note: the offset of smooth drifted 1 time" in console.file.getvalue()


def test_a_run_reports_alarms_of_its_gate(audited):
    loop, summary, folder = audited
    (alarm,) = [row for row in summary["alarms"] if row["name"] == "turncoat"]
    assert alarm["earns"] == "less" and 30 < alarm["step"] < 45 and not [row for row in summary["alarms"] if row["name"] == "good"]
    said = f"at step {alarm['step']} the gate noticed that turncoat (uid {alarm['uid']}) earns less than was expected"
    assert said in (folder / "report.html").read_text()
    console = Console(file=io.StringIO(), width=500)
    print_tables(summary, console)
    assert f"note: {said}" in console.file.getvalue()


def test_an_alarm_is_written_down_when_it_begins():
    trace = Trace(1, holders=[Holder(1, "ann", "5A"), Holder(2, "bob", "5B"), Holder(1, "cy", "5C", since=3)])
    for step, alarms in enumerate([{}, {1: "less"}, {1: "less", 2: "more"}, {2: "more"}, {1: "more"}]):
        trace.note_alarms(step, alarms)
    assert [(a.step, a.uid, a.name, a.earns) for a in trace.alarms] == [(1, 1, "cy", "less"), (2, 2, "bob", "more"), (4, 1, "cy", "more")]
    assert trace.alarmed == {1: "more"}


def test_opinions_of_a_run_without_grades_cost_no_audits():
    workers = [Worker("good", lambda prompt: "0.6 0.7"), Worker("bad", lambda prompt: "0.2 0.1")]
    arena = Arena("ungraded", ["a", "b", "c"], workers, workers[0], [], [])
    loop = Loop(arena, Audits(Judge(Numbers()), lambda *_: 0.5, first=1, share=0.0), Policy(k=1, timeout=20.0), churn=0)
    trace = loop.run(progress=False)
    assert np.allclose(trace.truth, [[0.6, 0.2]] * 3) and loop.validator.judge.answers == 3


def test_several_threads_have_answers_audited():
    audits = Audits(Judge(Numbers()), lambda _, text: float(text.split()[1]), first=20, share=0.2)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: audits("x", ["0.5 0.9", "0.5 0.1"], [f"5A{n % 7}", f"5B{n % 7}"]), range(400)))
    assert audits.answers == 800 and audits.graded == sum(map(len, audits.offsets.errors.values()))
    assert all(rewards.isfinite().all() for rewards in found)


def test_audits_of_a_judge_that_is_not_corrected_are_refused():
    with pytest.raises(InputError, match="would change nothing"):
        Audits(Judge(Numbers(), correct=False), lambda *_: 0.5)
    with pytest.raises(InputError, match="as many hotkeys: 1"):
        Audits(Judge(Numbers()), lambda *_: 0.5)("x", ["0.1", "0.2"], ["5A"])


def flattered(seed, names=None):
    subnet = made_up(uids=10, topics=2, seed=seed, spare=1, level=0.08, own=0.02)
    bias = 0.2 * np.random.default_rng(seed).standard_normal(11)
    return Subnet(subnet.grades, 0.5 * subnet.grades + 0.225 + bias, subnet.embeddings, subnet.prompts, subnet.topics, 10, names)


@pytest.mark.parametrize("rule", ["first", "doubt", "choice"])
@pytest.mark.parametrize("kind", ["gate", "mean"])
def test_audits_help_any_policy(kind, rule):
    make = {"gate": GatePolicy, "mean": lambda subnet, seed: MeanPerUid(subnet.metagraph, seed=seed)}[kind]
    made = []

    def audited(subnet, seed):
        made.append(AuditedPolicy(make(subnet, seed), subnet, rule=rule))
        return made[-1]

    found = simulate(flattered, {"alone": make, "audited": audited}, 3, steps=120, events=[Replace()])
    assert found.figure("audited", "lead", minus="alone").mean > 0.02
    assert all(policy.audits <= 11 * 4 + 0.05 * 360 for policy in made)


def test_audits_grade_the_answer_that_was_given():
    "Whoever gave it, under whatever name, and late."
    names = [f"model {i} (7b)" for i in range(11)]
    events = [Replace([0], 40, silent=True), Replace([1], 60), Lazy([2], 0, share=0.0), Delay(5)]
    seen = []

    class Spy(AuditedPolicy):
        def learn_graded(self, prompt, uids, rewards, grades):
            seen.extend((self.policy.hotkeys[u], g) for u, g in zip(uids.tolist(), grades.tolist()))
            super().learn_graded(prompt, uids, rewards, grades)

    subnet = flattered(0, names)
    spy = Spy(MeanPerUid(subnet.metagraph), subnet, first=3)
    run = run_policy(subnet, spy, k=3, steps=100, events=events)
    assert {grade for key, grade in seen if key == names[2]} == {0.0}, "a lazy answer is worth nothing"
    true = {round(float(value), 6) for value in run.grades.ravel()}
    assert spy.audits and {round(grade, 6) for _, grade in seen} <= true


def test_a_memory_that_forgets_is_not_corrected():
    policy = MeanPerUid(SimpleNamespace(hotkeys=["5A"]), half_life=10.0)
    with pytest.raises(InputError, match="half forgotten"):
        policy.correct({0: (0.1, 1.0)})


class OwnBandit:
    "A policy with scores alone: no choice, no hotkeys."

    def __init__(self, subnet, seed=0):
        self.mean, self.count = torch.full((subnet.uids,), 1.0), torch.zeros(subnet.uids)

    def scores(self, prompt):
        return self.mean

    def learn(self, prompt, uids, rewards):
        self.count[uids] += 1
        self.mean[uids] += (rewards - self.mean[uids]) / self.count[uids]

    def resync(self, before, now):
        new = [uid for uid, key in enumerate(now.hotkeys) if before.hotkeys[uid] != key]
        self.mean[new], self.count[new] = 1.0, 0.0


AUDITED = {
    "own": OwnBandit,
    "forgets": lambda subnet, seed: MeanPerUid(subnet.metagraph, half_life=50, seed=seed),
    "LinTS": lambda subnet, seed: LinTS(subnet.metagraph, subnet.encoder(), torch.as_tensor(subnet.embeddings), components=2),
    "a gate that forgets": lambda subnet, seed: GatePolicy(subnet, seed, config={"gating.half_life": 300.0}),
}


@pytest.mark.parametrize("kind", AUDITED)
def test_audits_work_beside_any_policy(kind, caplog):
    made = []

    def audited(subnet, seed):
        made.append(AuditedPolicy(AUDITED[kind](subnet, seed), subnet))
        return made[-1]

    with caplog.at_level("INFO"):
        found = simulate(flattered, {"audited": audited}, 2, steps=80, events=[Replace()])
    assert all(policy.audits and policy.told.lines for policy in made), "corrections have moved"
    (run, _) = found.runs["audited"]
    assert run.scores[40].std() > 0 and made[0].hotkeys[int(np.flatnonzero(run.grades.std(0) >= 0)[0])]
    assert ("stays as it was told" in caplog.text) == (kind == "forgets")


def test_whom_a_gate_knew_before_is_not_corrected_and_others_are():
    names = [f"model {i}" for i in range(11)]
    subnet = flattered(0, names)
    known = AuditedPolicy(GatePolicy(subnet), subnet, first=3)
    gate = known.policy.gate
    gate.known.update({names[0]: 5})
    x = gate.encoder(subnet.prompts[0])
    gate.learn(x, torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
    for hotkey in names[:2]:
        for reward in (0.2, 0.8) * 6:
            known.offsets.add(hotkey, -0.3, reward)
    known._pass_on()
    (question,) = gate.memory.questions.values()
    told = dict(zip(question.uids.tolist(), question.rewards.tolist()))
    assert told[0] == 0.5 and told[1] < 0.4


def test_audits_go_on_where_they_stopped(tmp_path):
    network, grade = SimpleNamespace(hotkeys=["5A", "5B"]), lambda _, text: float(text.split()[1])
    make = lambda: BayesianGatingModel(network, {"gating": {"topics": 2}}, "minilm", num_uids=2)
    gate, audits = make(), Audits(Judge(Numbers()), grade, first=3)
    for n in range(6):
        audits.follow(gate)
        gate.backward(gate(f"question {n}"), audits(f"question {n}", ["0.5 0.9", "0.6 0.1"], network.hotkeys))
    audits.follow(gate)
    gate.save(tmp_path / "gate")
    audits.judge.save(tmp_path / "judge.json")
    again, other = Audits(Judge.load(tmp_path / "judge.json", Numbers()), grade, first=3), make()
    again.restore(json.loads(json.dumps(audits.state())))
    other.load(tmp_path / "gate")
    again.follow(other)
    told = [question.rewards.tolist() for question in gate.memory.questions.values()]
    assert [question.rewards.tolist() for question in other.memory.questions.values()] == told, "not corrected twice"
    assert again.auditor.credit == audits.auditor.credit and again.graded == audits.graded > 0
    texts = ["0.5 0.9", "0.6 0.1"]
    assert again("x", texts, network.hotkeys).tolist() == audits("x", texts, network.hotkeys).tolist()


def test_a_state_holds_alarms_and_a_smaller_memory_keeps_the_newest(tmp_path):
    network = SimpleNamespace(hotkeys=["5A", "5B"])
    make = lambda memory: BayesianGatingModel(network, {"gating": {"memory": memory}}, "minilm", num_uids=2)
    gate = make(100)
    for n in range(8):
        gate.backward(gate(f"question {n}")[[0]], torch.tensor([0.5]))
    gate.watch.mean[1], gate.watch.count[1] = -2.0, 30.0
    gate.save(tmp_path / "gate")
    small = make(3)
    small.load(tmp_path / "gate")
    assert small.watch.alarmed == [1] and small.watch.count.tolist() == [8, 30]
    kept = [question.at for question in small.memory.questions.values()]
    assert kept == [5, 6, 7]
