"""Saved reward models: what a folder brings back, and files that an earlier layout of the classes wrote.

`data/reward` was written by version 0.1.0 before encoder and head were parts: a whole model (`gpt2`), adapters with a head
(`lora`), the state of a model (`state.safetensors`) and the adapters of peft around a model (`peft`), with the scores that
the models gave. `base` holds the transformers that they began with; BASE stands for its path.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from prompting_nb.reward.model import RewardModel
from prompting_nb.reward.tokens import pad

DATA = Path(__file__).parent / "data" / "reward"
FOUND = json.loads((DATA / "scores.json").read_text())
PROMPTS, COMPLETIONS = FOUND["prompts"], FOUND["completions"]


@pytest.fixture
def stored(tmp_path):
    "The stored folders, with the path of the base models filled in."
    folder = shutil.copytree(DATA, tmp_path / "stored")
    for file in folder.rglob("*.json"):
        file.write_text(file.read_text().replace("BASE/", f"{folder}/base/"))
    return folder


def agree(scores, name):
    wanted = torch.tensor(FOUND["scores"][name])
    torch.testing.assert_close(scores.flatten(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, base", [("gpt2", "gpt2"), ("lora", "bert")])
def test_a_folder_of_earlier_code_gives_its_scores(stored, name, base):
    model = RewardModel.from_pretrained(stored / name, device="cpu")
    agree(model.score(PROMPTS, COMPLETIONS), name)
    assert model.model_name == str(stored / "base" / base)
    if name == "gpt2":
        assert (model.head[0].p, model.max_length, model.bound, model.pooling) == (0.3, 12, 3.0, "last")
        assert model.length is not None and abs(model.length.item() - 0.5) > 1e-3  # it was trained


def test_a_state_of_earlier_code_loads(stored):
    model = RewardModel(str(stored / "base" / "gpt2"), device="cpu", length=0.0)
    outer = torch.nn.Sequential(RewardModel(str(stored / "base" / "gpt2"), device="cpu", length=0.0))
    state = load_file(stored / "state.safetensors")
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    agree(model.score(PROMPTS, COMPLETIONS), "state")
    outer.load_state_dict({f"0.{name}": value for name, value in state.items()})  # and as a part of another module
    agree(outer[0].score(PROMPTS, COMPLETIONS), "state")


def test_a_state_of_today_loads():
    base = str(DATA / "base" / "gpt2")
    one, other = (RewardModel(base, device="cpu", length=weight) for weight in (0.0, 1.0))
    assert not torch.equal(one.score(PROMPTS, COMPLETIONS), other.score(PROMPTS, COMPLETIONS))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.score(PROMPTS, COMPLETIONS), other.score(PROMPTS, COMPLETIONS))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: value for name, value in one.state_dict().items() if "wte" not in name})


def test_adapters_of_earlier_code_around_a_whole_model_load(stored):
    model = PeftModel.from_pretrained(RewardModel(str(stored / "base" / "gpt2"), device="cpu"), str(stored / "peft")).eval()
    with torch.no_grad():
        agree(model(*pad(model.base_model.model.encode_texts(PROMPTS, COMPLETIONS))), "peft")


@pytest.mark.parametrize("lora", [False, True])
def test_a_loaded_model_knows_what_it_began_with(tmp_path, lora):
    "Not the folder that it came from: the next save would otherwise name a folder that may be gone."
    base = str(DATA / "base" / "gpt2")
    model = RewardModel(base, device="cpu", pooling="layers")
    if lora:
        model.add_lora(rank=1)
    for turn in ("first", "second"):
        model.save_pretrained(tmp_path / turn)
        assert json.loads((tmp_path / turn / "reward.json").read_text())["model_name"] == base
        model = RewardModel.from_pretrained(tmp_path / turn, device="cpu")
        assert model.model_name == base and model.encoder.model is model.model


def test_every_setting_that_changes_a_score_comes_back(tmp_path):
    options = dict(dropout=0.3, pooling="layers", max_length=12, depth=1, length=0.7, bound=0.2)
    model = RewardModel(str(DATA / "base" / "gpt2"), device="cpu", **options)
    with torch.no_grad():
        model.head[1].weight.mul_(30)
        model.length.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(loaded.score(PROMPTS, COMPLETIONS), model.score(PROMPTS, COMPLETIONS))
    assert loaded.head[0].p == 0.3 and loaded.length.item() == pytest.approx(0.8)
    assert (loaded.pooling, loaded.max_length, loaded.depth, loaded.bound) == ("layers", 12, 1, 0.2)
