"""Training: what does not read as prose. A run that is killed, and the packed way beside the plain one."""
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_reward import kind_words, toy, toys  # noqa: F401 (a fixture)

from prompting_nb.config import InputError
from prompting_nb.reward.checkpoints import run_digest, score_digest
from prompting_nb.reward.fast.packing import can_pack
from prompting_nb.reward.training import TrainConfig, bf16_pays, train

WORKER = """
import os, random, signal, sys
sys.path.insert(0, sys.argv[3])
from test_reward import RewardModel, TrainConfig, kind_words, torch, train
torch.manual_seed(0)
model = RewardModel(sys.argv[1], dropout=0.1, device="cpu")
config = TrainConfig(epochs=3, lr=1e-3, tokens_per_batch=200, bf16=False, checkpoint_every=2)
kill, replace, writes = sys.argv[4], os.replace, 0

def die(record=None):
    if record is None or record["step"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)

def die_while_writing(source, target):
    global writes
    writes += 1
    if writes == 2:
        os.truncate(source, 1000)
        die()
    replace(source, target)

if kill == "write":
    os.replace = die_while_writing
train(model, list(kind_words(13, random.Random(0))), config, progress=False, checkpoint=sys.argv[2],
      on_step=die if kill == "step" else None)
torch.save(model.state_dict(), os.path.join(sys.argv[2], "weights.pt"))
"""


def run(folder, out, kill):
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", WORKER, folder, str(out), os.path.dirname(__file__), kill]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("kind, kill", [("bert", "step"), ("gpt2", "write")])
def test_a_killed_run_resumes_to_the_same_weights(toys, tmp_path, kind, kill):  # noqa: F811
    whole = run(toys[kind], tmp_path / "whole", "never")
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert run(toys[kind], tmp_path / "killed", kill).returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint.pt").exists() and not (tmp_path / "killed" / "weights.pt").exists()
    resumed = run(toys[kind], tmp_path / "killed", "never")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    wanted, found = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "killed"))
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_a_run_that_is_interrupted_saves_its_steps_and_goes_on(toys, tmp_path):  # noqa: F811
    "Also one that is far from its next checkpoint; a step is never left half done."
    rankings, config = list(kind_words(13, random.Random(0))), TrainConfig(max_steps=5, lr=1e-3, tokens_per_batch=200, bf16=False)

    def run(folder, on_step=None):
        torch.manual_seed(0)
        model = toy(toys, "bert")
        return model, train(model, rankings, config, progress=False, checkpoint=folder, on_step=on_step)

    def stop(times):
        def stop(record):
            for _ in range(times if record["step"] == 2 else 0):
                signal.raise_signal(signal.SIGINT)

        return stop

    whole, before = run(tmp_path / "whole")[0], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=f"interrupted after 3 of 5 steps, which are saved in {tmp_path}/points: "):
        run(tmp_path / "points", stop(1))
    with pytest.raises(KeyboardInterrupt) as second:
        run(tmp_path / "impatient", stop(2))
    assert not second.value.args and not (tmp_path / "impatient").exists()
    assert signal.getsignal(signal.SIGINT) is before
    model, history = run(tmp_path / "points")
    assert history.resumed == 3 and len(history.steps) == 5
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_run_without_checkpoints_is_interrupted_at_once(toys):  # noqa: F811
    steps = []

    def stop(record):
        steps.append(record)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as error:
        train(toy(toys, "bert"), list(kind_words(13, random.Random(0))), TrainConfig(max_steps=5, bf16=False), progress=False, on_step=stop)
    assert not error.value.args and len(steps) == 1


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_packed_training_is_plain_training(toys, kind):  # noqa: F811
    losses = []
    for packed in (True, False):
        model = toy(toys, kind, dropout=0.0)
        assert can_pack(model)
        config = TrainConfig(epochs=1, lr=1e-3, tokens_per_batch=10_000, bf16=False, packed=packed)
        history = train(model, list(kind_words(13, random.Random(0))), config, progress=False)
        assert history.packed == packed
        losses.append([(s["loss"], s["grad_norm"]) for s in history.steps])
    assert [x for s in losses[0] for x in s] == pytest.approx([x for s in losses[1] for x in s], rel=1e-4)


def rescored(ranking):
    return replace(ranking, scores=[score + 1 for score in ranking.scores])


@pytest.mark.parametrize("other", [
    rescored, lambda ranking: replace(ranking, prompt=ranking.prompt + " ?"),
    lambda ranking: replace(ranking, completions=["day", *ranking.completions[1:]])])
def test_a_checkpoint_belongs_to_its_data(toys, tmp_path, other):  # noqa: F811
    rankings, config = list(kind_words(8, random.Random(0))), TrainConfig(max_steps=1, bf16=False)
    changed = [*rankings[:-1], other(rankings[-1])]
    assert run_digest(config, changed) != run_digest(config, rankings)
    train(toy(toys, "bert"), rankings, config, progress=False, checkpoint=tmp_path)
    with pytest.raises(InputError, match="other settings or data"):
        train(toy(toys, "bert"), changed, config, progress=False, checkpoint=tmp_path)
    assert train(toy(toys, "bert"), rankings, config, progress=False, checkpoint=tmp_path).resumed == 1


def test_a_checkpoint_belongs_to_its_settings():
    rankings = list(kind_words(2, random.Random(0)))
    digests = {run_digest(config, rankings) for config in (
        TrainConfig(), TrainConfig(max_seconds=9.0), TrainConfig(checkpoint_every=7))}
    assert len(digests) == 1  # how long a run may take, and how often it is saved, may change
    assert run_digest(TrainConfig(lr=2e-4), rankings) not in digests


def test_a_digest_of_scores_follows_what_they_depend_on(toys, tmp_path):  # noqa: F811
    model = toy(toys, "bert")
    digest = score_digest(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(str(tmp_path / "saved"), device="cpu")
    assert score_digest(loaded) == digest  # also from another folder, and after use
    model.score(["a"], ["b"])
    model.requires_grad_(False)  # what it will learn says nothing about scores
    assert score_digest(model) == digest
    model.tokenizer.chat_template = "{{ messages }}"
    assert score_digest(model) != digest
    with torch.no_grad():
        next(loaded.head.parameters()).add_(1e-3)
    assert score_digest(loaded) != digest


@pytest.mark.parametrize("supported, pays", [((), False), (("bf16",), True), (("amx",), True), (("bf16", "amx"), True)])
def test_bf16_pays_where_the_processor_multiplies_it(monkeypatch, supported, pays):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "bf16" in supported, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in supported, raising=False)
    assert bf16_pays(torch.device("cpu")) is pays
    assert bf16_pays(torch.device("meta")) is False


def test_bf16_pays_on_a_gpu_without_emulation(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert bf16_pays(torch.device("cuda")) is False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert bf16_pays(torch.device("cuda")) is True


def test_a_checkpoint_keeps_its_names(toys, tmp_path):  # noqa: F811
    "So that a run which was interrupted under an earlier version continues."
    rankings, config = list(kind_words(4, random.Random(0))), TrainConfig(max_steps=1, bf16=False)
    train(toy(toys, "bert"), rankings, config, progress=False, checkpoint=tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(state) == {"digest", "step", "seconds", "best", "model", "optimizer", "steps", "evaluations"}
    assert {name.split(".")[0] for name in state["model"]} == {"model", "head"}
    assert {name.split(".")[1] for name in state["optimizer"]["state"]} == {"model", "head"}


def test_dropout_in_front_of_adapters_acts_in_training(toys):  # noqa: F811
    rankings, losses = list(kind_words(8, random.Random(0))), []
    for dropout in (0.0, 0.5, 0.5):
        torch.manual_seed(0)
        model = toy(toys, "llama", dropout=0.0).add_lora(4, dropout=dropout)
        with torch.no_grad():
            for name, one in model.named_parameters():
                if "lora_B" in name:
                    one.add_(0.1 * torch.randn(one.shape))
        history = train(model, rankings, TrainConfig(max_steps=2, bf16=False), progress=False)
        losses.append([step["loss"] for step in history.steps])
        assert history.packed == (dropout == 0) and not model.training
    assert losses[1] == losses[2] != losses[0]


def test_evaluations_need_something_to_evaluate(toys):  # noqa: F811
    with pytest.raises(InputError, match="eval_every needs eval_rankings"):
        train(toy(toys, "bert"), list(kind_words(4, random.Random(0))), TrainConfig(eval_every=2), progress=False)
