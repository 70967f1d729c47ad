"""Training: what does not read as prose. A run that is killed, and the packed way beside the plain one."""
import os
import signal
import subprocess
import sys

import pytest
import torch
from test_reward import kind_words, toy, toys  # noqa: F401 (a fixture)

from prompting_nb.reward.fast.packing import can_pack
from prompting_nb.reward.training import TrainConfig, train

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


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_packed_training_is_plain_training(toys, kind):  # noqa: F811
    import random
    losses = []
    for packed in (True, False):
        model = toy(toys, kind, dropout=0.0)
        assert can_pack(model)
        config = TrainConfig(epochs=1, lr=1e-3, tokens_per_batch=10_000, bf16=False, packed=packed)
        history = train(model, list(kind_words(13, random.Random(0))), config, progress=False)
        assert history.packed == packed
        losses.append([(s["loss"], s["grad_norm"]) for s in history.steps])
    assert [x for s in losses[0] for x in s] == pytest.approx([x for s in losses[1] for x in s], rel=1e-4)
