"Folders and files that cannot be read: one line says which file, what is wrong and what to do, without a word of a library."

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import letter_tokenizer
from transformers import AutoModel, BertConfig

from prompting_nb.cli import main
from prompting_nb.reward import RewardModel

# what torch, transformers, safetensors, json, pydantic, jsonargparse and Python itself would say
THEIRS = re.compile(r"Traceback|torch\.|pydantic|[dD]eserializing|validation error|size mismatch|Expecting|jsonargparse|NoneType|codec|"
                    r"Union|(Key|Type|Attribute|Value|Runtime|Unpickling)Error|HeaderTooLarge|object at 0x|invalid literal|Errno|"
                    r"state_dict|from_pretrained|Unrecognized|Input should|weights_only")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "An encoder, a reward model in the format of a classifier, one with a head of its own, and one with adapters."
    folder = tmp_path_factory.mktemp("models")
    tokenizer = letter_tokenizer(True)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                        max_position_embeddings=32)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    make = lambda **how: RewardModel(str(folder / "encoder"), device="cpu", **how)
    make().save_pretrained(folder / "classifier")
    make(length=0.1, pooling="mean").save_pretrained(folder / "head")
    make().add_lora(2).save_pretrained(folder / "adapters")
    return folder


def failed(capsys, *argv):
    "The one line of a call with bad input."
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(list(map(str, argv)))
    [line] = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and not THEIRS.search(line), line
    return line


def put(name, content):
    "Give a file other bytes; `None` removes it, and a folder takes its place for `...`."
    def change(folder):
        (folder / name).unlink()
        if content is ...:
            (folder / name).mkdir()
        elif content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def set_in(name, **values):
    def change(folder):
        now = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(now))
    return change


def tensors(name, change):
    def changed(folder):
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name, {"format": "pt"})
    return changed


def lose(found):
    del found[next(name for name in found if "word_embeddings" in name)]


def narrow(found):
    name = next(name for name in found if "word_embeddings" in name)
    found[name] = found[name][:, :4].contiguous()


FOLDERS = [
    ("classifier", put("model.safetensors", "text " * 99), "model.safetensors is damaged"),
    ("classifier", put("model.safetensors", ""), "model.safetensors is empty"),
    ("classifier", put("model.safetensors", "version https://git-lfs.github.com"), "git lfs pull"),
    ("classifier", put("model.safetensors", ...), "model.safetensors is"),
    ("classifier", put("model.safetensors", None), "model.safetensors is missing"),
    ("classifier", tensors("model.safetensors", narrow), "in the shape"),
    ("classifier", tensors("model.safetensors", lose), "embeddings.word_embeddings.weight"),
    ("head", tensors("model.safetensors", lose), "for which chance would stand in"),
    ("classifier", set_in("config.json", vocab_size=1.5), "1.5 for vocab_size"),
    ("classifier", set_in("tokenizer_config.json", model_max_length="long"), "'long' is no number of tokens"),
    ("classifier", put("config.json", "what?"), "config.json is no JSON"),
    ("classifier", put("config.json", "[1]"), "config.json holds no object"),
    ("classifier", put("config.json", "{}"), "does not name a model_type"),
    ("classifier", set_in("config.json", model_type="berty"), "does not know its model_type 'berty'"),
    ("classifier", set_in("config.json", hidden_size="big"), "'big' for hidden_size"),
    ("classifier", set_in("config.json", num_attention_heads=0), "0 for num_attention_heads"),
    ("classifier", put("tokenizer.json", "what?"), "tokenizer.json is no JSON"),
    ("classifier", put("tokenizer.json", "{}"), "tokenizer.json holds no tokenizer"),
    ("classifier", put("tokenizer_config.json", "what?"), "tokenizer_config.json is no JSON"),
    ("classifier", put("reward.json", "{"), "reward.json is no JSON"),
    ("classifier", put("reward.json", "[]"), "reward.json holds no object"),
    ("classifier", put("reward.json", '{"format": 2}'), "nothing for weights, which must be encoder or classifier"),
    ("classifier", set_in("reward.json", format="new"), "'new' for format"),
    ("classifier", set_in("reward.json", dtype="float99"), "'float99' for dtype, which must be a precision"),
    ("classifier", set_in("reward.json", max_length="many"), "'many' for max_length, which must be a whole number"),
    ("classifier", set_in("reward.json", dropout=float("nan")), "nan for dropout, which must be a number from 0 to 1"),
    ("classifier", set_in("reward.json", pooling="best"), "'best' for pooling, which must be one of"),
    ("classifier", set_in("reward.json", files=3), "3 for files"),
    ("head", put("reward_head.safetensors", "text " * 99), "reward_head.safetensors is damaged"),
    ("head", tensors("reward_head.safetensors", lambda t: t.update({"1.weight": torch.ones(1, 3)})), "a head for vectors of 8 numbers"),
    ("head", put("model.safetensors", "text " * 99), "model.safetensors is damaged"),
    ("adapters", put("adapter_model.safetensors", "text " * 99), "adapter_model.safetensors is damaged"),
    ("adapters", put("adapter_config.json", "what?"), "adapter_config.json is no JSON"),
    ("adapters", put("adapter_config.json", "{}"), "its adapters do not fit its base, or lack a setting"),
]


@pytest.mark.parametrize("kind, change, said", FOLDERS, ids=range(len(FOLDERS)))
def test_a_damaged_reward_model_is_named_with_file_and_remedy(models, tmp_path, capsys, kind, change, said):
    shutil.copytree(models / kind, tmp_path / "model")
    change(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert said in failed(capsys, "reward", "score", "--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl")


@pytest.mark.parametrize("change, said", [
    (put("model.safetensors", "text " * 99), "model.safetensors is damaged"), (put("model.safetensors", None), "it has no weights"),
    (put("config.json", None), "it has no config.json"), (put("tokenizer.json", None), "it has no tokenizer"),
    (tensors("model.safetensors", narrow), "the two are of different models"),
    (set_in("config.json", hidden_size=-4), "-4 for hidden_size"),
], ids=range(6))
def test_a_damaged_encoder_is_named_with_file_and_remedy(models, tmp_path, capsys, change, said):
    shutil.copytree(models / "encoder", tmp_path / "model")
    change(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{n}", "chosen": "a", "rejected": "b"}}\n' for n in range(9)))
    argv = ["reward", "train", "--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out"]
    assert said in failed(capsys, *argv) and not (tmp_path / "out").exists()
    if "shape" not in said and "different" not in said:
        assert said in failed(capsys, "loop", "--quick", "--out", tmp_path / "run", "--gating.model_name", tmp_path / "model")


DATA = {"text.jsonl": ("hello\n", "text.jsonl:1: not JSON from column 1 on"),
        "list.jsonl": ("[1]\n", "list.jsonl:1"),
        "half.json": ("[{", "half.json: it is no JSON from line 1, column 3 on"),
        "packed.jsonl.gz": ("no gzip", "it is not packed by gzip"),
        "table.parquet": ("no parquet", "it is damaged, or of another kind than its name says"),
        "latin.jsonl": ('{"prompt": "\xe9"}'.encode("latin-1"), "it is no text in UTF-8"),
        "deep.jsonl": ("[" * 10**5 + "\n", "nested too deeply")}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_read_is_named_with_its_line(models, tmp_path, capsys, name):
    content, said = DATA[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    train = ["train", "--model", models / "encoder", "--out", tmp_path / "o"]
    for argv in (["score", "--model", models / "head"], ["eval", "--model", models / "head"], train):
        assert said in failed(capsys, "reward", *argv, "--data", tmp_path / name)


def test_checkpoints_states_prices_and_runs_that_are_damaged(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("points")
    (tmp_path / "points" / "checkpoint.pt").write_bytes(b"no pickle")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{n}", "chosen": "a", "rejected": "b"}}\n' for n in range(9)))
    said = failed(capsys, "reward", "train", "--model", models / "encoder", "--data", "rows.jsonl", "--out", "o", "--checkpoint", "points")
    assert "checkpoint.pt (it is damaged or cut off): delete it" in said
    os.makedirs("state/state-000000001")
    (tmp_path / "state" / "state-000000001" / "validator.json").write_text("{")
    assert "it is no JSON from line 1, column 2 on" in failed(capsys, "route", "why?", "--dir", "state")
    (tmp_path / "prices.json").write_text("[1]")
    assert "a value in it is of a wrong kind" in failed(capsys, "loop", "--prices.file", "prices.json", "--prices.worth", "1")
    os.makedirs("run")
    (tmp_path / "run" / "summary.json").write_text("what?")
    assert "summary.json: it is no JSON from line 1, column 1 on; leave this run out" in failed(capsys, "compare", "run", "points")
