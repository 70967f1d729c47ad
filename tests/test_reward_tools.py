"""What surrounds the reward model: conversations, losses, rows, files, RewardBench 2's measures, the command."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentError

from prompting_nb.cli import main
from prompting_nb.config import InputError
from prompting_nb.reward.command import reward_parser
from prompting_nb.reward.conversations import Conversation, messages_of, prompt_of
from prompting_nb.reward.evaluation import (Answers, accuracy_by_length, best_of_k_accuracy, calibration, pairwise_accuracy,
                                            rejection_curve, ties_score)
from prompting_nb.reward.preferences import Ranking, parse_ranking, rankings_from
from prompting_nb.reward import PairwiseLoss, RankingLoss, RewardModel
from prompting_nb.reward.training import Tracker, TrainConfig

PAIR = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A carrot."}
CHATML = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}[SEP]{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module")
def minilm():
    torch.manual_seed(0)
    return RewardModel("minilm", device="cpu", depth=1, max_length=32)


roles = st.sampled_from(["system", "user", "assistant"])


@given(st.lists(st.fixed_dictionaries({"role": roles, "content": st.text(max_size=5)}), min_size=1, max_size=4))
def test_a_prompt_keeps_its_messages(messages):
    assert messages_of(prompt_of(messages)) == messages
    assert prompt_of(messages) == prompt_of(prompt_of(messages))


def test_conversations_score_as_their_template_writes_them(minilm):
    pairs = [("a", "b"), ("c d", "e")]
    conversations = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    plain = minilm.score(conversations)
    assert torch.equal(plain, minilm.score(["a", "c d"], ["b", "e"]))
    minilm.tokenizer.chat_template = CHATML
    try:
        templated = minilm.score(conversations)
        texts = [f"<|user|>{q}[SEP]<|assistant|>{a}[SEP]" for q, a in pairs]
        rows = minilm.tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert minilm.encode_texts(conversations) == rows
        assert not torch.allclose(templated, plain)
        [row] = minilm.encode_texts([[*conversations[0][:1], {"role": "assistant", "content": "b " * 100}]])
        assert len(row) == 32 and row[-1] == minilm.tokenizer.sep_token_id  # cut, and still closed
    finally:
        minilm.tokenizer.chat_template = None


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path):
    torch.manual_seed(0)
    model = RewardModel("minilm", device="cpu", depth=1, max_length=32, length=0.5)
    model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path, device="cpu")
    (tmp_path / "reward_head.safetensors").write_bytes(b"something else")
    assert torch.equal(loaded.score(["a"], ["b"]), model.score(["a"], ["b"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_finite_at_large_margins_with_everything_on(dtype):
    far = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype, requires_grad=True)
    loss = RankingLoss(margin=1.0, centring=0.01)(far, torch.tensor([0.0, 1.0, 0.5]), torch.zeros(3))
    loss.backward()
    assert loss.isfinite().all() and far.grad.isfinite().all()


rewards = st.floats(-9, 9)


@given(st.lists(st.tuples(rewards, rewards, st.floats(0, 3)), min_size=1, max_size=6), st.floats(0, 1))
def test_pairwise_loss_with_margin_and_centring(rows, centring):
    chosen, rejected, margin = (torch.tensor(column, dtype=torch.float64)[:, None] for column in zip(*rows))
    wanted = sum(math.log1p(math.exp(-(c - r - m))) + centring * (c + r) ** 2 for c, r, m in rows) / len(rows)
    assert PairwiseLoss(centring)(chosen, rejected, margin).item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_rows_without_a_prompt():
    ask, yes, no = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "yes"), ("assistant", "no")))
    ranking = parse_ranking({"chosen": [ask, yes, ask, yes], "rejected": [ask, yes, ask, no]})
    assert isinstance(ranking.prompt, Conversation) and ranking.completions == ["yes", "no"]
    hh = parse_ranking({"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"})
    assert (hh.prompt, hh.completions) == ("q", ["yes", "no"])
    with pytest.raises(InputError, match="row 1: 'rejected' is missing"):
        rankings_from([PAIR, {"prompt": "p", "chosen": "a"}])


def test_rewardbench_measures():
    assert best_of_k_accuracy([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], [0, 0, 0]) == pytest.approx(0.5)
    flat = Answers([1.0, 1.0], [1.0])
    assert ties_score([flat], [Answers([1.0], [1.0])]) == pytest.approx(0.0)
    assert ties_score([Answers([2.0, 2.0], [0.0])], [Answers([2.0], [0.0])]) == pytest.approx(1.01)


def test_the_ties_score_asks_the_weaker_of_two_gaps():
    "A wide gap of the twin must not hide that the tied question has none beyond its spread, nor the other way round."
    wide, narrow = Answers([9.0], [0.0]), Answers([1.5], [0.0])
    spread_2 = Answers([4.0, 6.0], [1.0])  # gap 3, spread 2
    assert ties_score([spread_2], [wide]) == pytest.approx(1 + 0.01 * math.tanh(3 / 2 - 1))
    assert ties_score([spread_2], [narrow]) == pytest.approx(0.8 + 0.01 * math.tanh(1.5 / 2 - 1))
    gap_1 = Answers([4.0, 6.0], [3.0])  # gap 1, spread 2
    assert ties_score([gap_1], [wide]) == pytest.approx(0.6 + 0.01 * math.tanh(1 / 2 - 1))


def test_equal_scores_count_a_half_everywhere():
    tied = np.array([0.0, 0.0, 0.0])
    error, [bin] = calibration(tied)
    assert (bin.confidence, bin.accuracy, error) == (0.5, 0.5, 0.0)
    [by_length] = accuracy_by_length([[1.0, 1.0]], [Ranking("p", ["good", "bad!"], [1.0, 0.0])])
    assert (by_length.accuracy, by_length.n_pairs) == (0.5, 1)
    assert rejection_curve(tied, np.arange(3), (1.0,)) == [(1.0, 0.5)]
    assert pairwise_accuracy([[1.0, 1.0]], [Ranking("p", ["a", "b"], [1.0, 0.0])]).value == 0.5


@pytest.mark.parametrize("argv, reason", [
    (["fly"], "train, eval or score"), (["train", "--data", "none.jsonl", "--out", "m"], "cannot read none.jsonl"),
    (["train", "--data", "pairs.jsonl", "--out", "m", "--lr", "-1"], "--lr must be greater than 0, not -1"),
    (["train", "--data", "pairs.jsonl", "--out", "m", "--pooling", "max"], "--pooling must be one of auto, last"),
    (["train", "--data", "pairs.jsonl", "--out", "m", "--held-out", "1"], "--held-out must be at least 0 and less than 1"),
    (["train", "--data", "pairs.jsonl", "--out", "m", "--epohcs", "2"], "there is no setting epohcs; the nearest is epochs"),
    (["eval", "--model", ".", "--data", "pairs.jsonl"], "no reward model"), (["score", "--model", "."], "data")])
def test_the_command_says_what_is_wrong_in_one_line(argv, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{**PAIR, "prompt": f"{n}"} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as end:
        main(["reward", *argv])
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert end.value.code == 2 and reason in line
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_an_interrupted_command_says_where_its_steps_are(tmp_path, monkeypatch, capsys):
    rows = [{"prompt": f"Say {n}.", "chosen": f"Gladly: {n}", "rejected": f"I do not say {n}"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    argv = ["reward", "train", "--data", "pairs.jsonl", "--out", "mine", "--max-length", "16", "--depth", "1", "--quiet",
            "--held-out", "0", "--max-steps", "4", "--checkpoint", "points"]
    shows = Tracker.show

    def interrupts(self, bar, record):
        shows(self, bar, record)
        if record["step"] == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(Tracker, "show", interrupts)
        main(argv)
    said = capsys.readouterr()
    assert end.value.code == 130 and said.err.strip().endswith("prompting-nb reward train: interrupted")
    assert "interrupted after 2 of 4 steps, which are saved in points: the same once more goes on from there" in said.out
    assert not (tmp_path / "mine").exists()
    main(argv)
    assert "after 4 steps in 1 process" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_in_two_processes(tmp_path):
    rows = [{"prompt": f"Say {n}.", "chosen": f"Gladly: {n}", "rejected": f"I do not say {n}"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["reward", "train", "--data", "pairs.jsonl", "--out", "mine", "--max-length", "16", "--depth", "1", "--quiet",
               "--tokens-per-batch", "64", "--epochs", "1", "--accumulate", "2", "--checkpoint", "points", "--held-out", "0.25"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py"]
    (tmp_path / "run.py").write_text("from prompting_nb.cli import main\nmain()\n")
    root = Path(__file__).parent.parent
    done = subprocess.run([*launch, *command], cwd=tmp_path, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("training on 9 prompts in 2 processes,") == 1  # the first process alone talks
    assert "finished after 2 steps in 2 processes;" in done.stdout
    assert (tmp_path / "mine" / "reward.json").exists() and (tmp_path / "points" / "checkpoint.pt").exists()


def test_every_setting_of_training_is_a_flag_with_help():
    parser = reward_parser().parser("train")
    flags = {action.dest: action for action in parser._actions}
    for field in dataclasses.fields(TrainConfig):
        action = flags[field.name]
        assert f"--{field.name.replace('_', '-')}" in action.option_strings
        assert action.default == field.default and len(action.help) > 10


def test_a_file_with_an_unknown_setting_is_refused(tmp_path):
    (tmp_path / "my.yaml").write_text("data: d\nout: o\nlearning_rate: 1.0\n")
    with pytest.raises(ArgumentError, match="there is no setting learning_rate"):
        reward_parser().parse_args(["train", "--config", str(tmp_path / "my.yaml")])
