"Folders and files that cannot be read: one line says which file, what is wrong and what to do, without a word of a library."

import json
import os
import re
import shutil
import socket
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import letter_tokenizer
from transformers import AutoModel, BertConfig

from prompting_nb.cli import main
from prompting_nb.config import InputError
from prompting_nb.encoding.encoder import Encoder
from prompting_nb.pretrained import known_device
from prompting_nb.reward import RewardModel
from prompting_nb.reward.model import pick_device

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
    (tmp_path / "state" / "state-000000001" / "validator.json").write_text('{"format": 1, "step": 2}')
    assert "its hotkeys is missing" in failed(capsys, "route", "why?", "--dir", "state")
    train = ["reward", "train", "--model", models / "encoder", "--data", "rows.jsonl", "--out", "o"]
    assert "rows.jsonl is a file: give a folder to --report" in failed(capsys, *train, "--report", "rows.jsonl")
    (tmp_path / "prices.json").write_text("[1]")
    assert "a value in it is of a wrong kind" in failed(capsys, "loop", "--prices.file", "prices.json", "--prices.worth", "1")
    os.makedirs("run")
    (tmp_path / "run" / "summary.json").write_text("what?")
    assert "summary.json: it is no JSON from line 1, column 1 on; leave this run out" in failed(capsys, "compare", "run", "points")


HUGE = str(10**20)
ABSURD = [
    (["reward", "train", "--epochs", HUGE], "--epochs must be at least 1 and at most 10000"),
    (["reward", "train", "--max-steps", HUGE], f"--max-steps must be at most {sys.maxsize}"),
    (["reward", "train", "--tokens-per-batch", "9" * 5000], "--tokens-per-batch must be"),
    (["reward", "train", "--seed", "-1"], "--seed must be at least 0 and at most 4294967295"),
    (["reward", "train", "--lr", "1e400"], "--lr must be a number, greater than 0, not inf"),
    (["reward", "score", "--batch-size", HUGE], f"--batch-size must be at most {sys.maxsize}"),
    (["loop", "--epochs", HUGE], "--epochs must be at least 1 and at most 10000"),
    (["loop", "--prompts", __file__, "--steps", "2000000"], "--steps must be at most 1000000"),
    (["loop", "--seed", HUGE], "--seed must be at least 0 and at most 4294967295"),
    (["loop", "--timeout", "1e9"], "--timeout must be greater than 0 and at most 1000000"),
    (["loop", "--gating.num_uids", HUGE], f"--gating.num_uids must be at most {sys.maxsize}"),
    (["loop", "--gating.num_uids", "70000"], "--gating.num_uids must be at most 65536, not 70000"),
    (["loop", "--gating.topics", "100000"], "--gating.topics must be at most 256, not 100000"),
    (["chain", "--netuid", "65536"], "--netuid must be at least 0 and less than 65536"),
    (["chain", "--tempo", HUGE], f"--tempo must be at most {sys.maxsize}"),
    (["chain", "--tempo", "70000"], "--tempo must be at most 65535, not 70000"),
    (["chain", "--register", "a", "--stake", "1e30"], "--stake must be at most 21000000"),
    (["chain", "--step", "10000000"], "--step must be at most 1000000"),
    (["chain", "--block-time", "1e300"], "--block-time must be at least 0 and at most 1000000"),
    (["subnet", "--timeout", "1e300"], "--timeout must be greater than 0 and at most 1000000"),
    (["subnet", "--tempo", "70000"], "--tempo must be at most 65535"),
    (["subnet", "--seed", "-1"], "--seed must be at least 0"),
    (["subnet", "--miners", "251"], "at most 250"),
    (["validator", "--validator.concurrent", "100000"], "--validator.concurrent must be at most 1000"),
    (["validator", "--validator.poll_interval", "1e300"], "--validator.poll_interval must be greater than 0 and at most 1000000"),
    (["validator", "--validator.log_size", "1e300"], "--validator.log_size must be at most 1000000"),
    (["miner", "--axon.processes", "100000"], "--axon.processes must be at most 256"),
    (["miner", "--miner.poll_interval", "1e300"], "--miner.poll_interval must be greater than 0 and at most 1000000"),
    (["miner", "--miner.priority.history", HUGE], f"--miner.priority.history must be at most {sys.maxsize}"),
    (["miner", "--netuid", "-1"], "--netuid must be at least 0"),
    (["doctor", "--axon.port", "99999"], "--axon.port must be at least 0 and at most 65535"),
    (["doctor", "--timeout", "1e9"], "--timeout must be greater than 0 and at most 1000000"),
    (["watch", "--every", "1e9"], "--every must be greater than 0 and at most 1000000"),
    (["ask", "why?", "--dir", "d", "--timeout", "1e9"], "--timeout must be greater than 0 and at most 1000000"),
]


@pytest.mark.parametrize("argv, said", ABSURD, ids=range(len(ABSURD)))
def test_absurd_numbers_are_refused_before_anything_is_written(tmp_path, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    needed = {"train": ["--data", "d.jsonl", "--out", "o"], "score": ["--data", "d.jsonl", "--model", "m"], "chain": ["--dir", "c"],
              "watch": ["--dir", "w"]}
    line = failed(capsys, *argv, *needed.get(argv[1], needed.get(argv[0], [])))
    assert said in line and len(line) < 200 and not list(tmp_path.iterdir())


def test_a_plan_is_no_longer_than_its_run_and_has_a_bound(monkeypatch):
    from prompting_nb.reward import training
    from prompting_nb.reward.preferences import Ranking

    rankings = [Ranking(str(n), ["a", "b"], [1.0, 0.0]) for n in range(8)]
    rows = [[[1, 2], [1, 3]] for _ in rankings]
    plan = lambda **how: training.plan_batches(rankings, rows, training.TrainConfig(tokens_per_batch=8, **how))
    whole = plan(epochs=20)
    short = plan(epochs=10**4, max_steps=5)
    assert short[:5] == whole[:5] and 5 < len(short) < len(whole)
    monkeypatch.setattr(training, "_MOST_STEPS", len(whole) - 1)
    with pytest.raises(InputError, match=f"20 epochs are about {len(whole)} steps, and a plan holds at most"):
        plan(epochs=20)
    assert len(plan(epochs=20, max_steps=5)) < len(whole)


@pytest.mark.parametrize("name", ["cuda:7", "xpu", "mps:3", "gpu", "cudanonsense", "hpu", "meta", ""])
def test_a_device_that_is_not_there_is_named(models, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 0)
    there = re.escape(f"this machine has no {name!r}, but cpu, cuda:0, cuda:1")
    for load in (lambda: pick_device(name), lambda: known_device(name)):
        with pytest.raises(InputError, match=there):
            load()
    if name:
        for load in (lambda: RewardModel(str(models / "encoder"), device=name), lambda: Encoder(str(models / "encoder"), device=name)):
            with pytest.raises(InputError, match=there):
                load()
    argv = ["miner", "--miner.kind", "transformers", "--transformers.model_name", models / "encoder", "--transformers.device", name]
    assert f"--transformers.device: this machine has no {name!r}" in failed(capsys, *argv)


def test_without_cuda_its_name_is_the_cpu_and_only_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.warns(RuntimeWarning, match="no CUDA device"):
        assert pick_device("cuda:3").type == "cpu"
    with pytest.raises(InputError, match="no 'cudas', but cpu"):
        pick_device("cudas")


REFUSED = [
    (["chain", "--dir", "c", "--register", "a", "../b"], "'../b' cannot name a wallet"),
    (["chain", "--dir", ""], "--dir must be a text that is not empty"),
    (["validator"], "create it, or choose another with --wallet.name"),
    (["validator", "--prompts", "none.txt", "--subtensor.network", "embedded://127.0.0.1:1"], "none.txt is not a file"),
    (["validator", "--top-k", "0"], "--top-k must be at least 1"),
    (["subnet", "--reward", "."], "holds no reward model"),
    (["loop", "--out", "/proc/none"], "cannot write to /proc/none: No such file or directory; give another folder to --out"),
    (["loop", "--miners", "999"], "--miners must be at most 250"),
    (["loop", "--gating.prompt_name", "nonsense"], "has no prompt 'nonsense'"),
    (["loop", "--prompts", "TEXT", "--judge.kind", "python", "--judge.python", "nonsense"],
     "'nonsense' must be FILE.py:NAME or MODULE:NAME"),
    (["reward", "eval", "--model", "minilm", "--data", "ROWS"], "minilm is an encoder, and no reward model"),
    (["reward", "train", "--data", "ROWS", "--out", "/proc/none"], "cannot write to /proc/none"),
    (["reward", "train", "--data", "ROWS", "--out", "o", "--report", "/proc/none"], "give another folder to --report"),
    (["reward", "train", "--data", "ROWS", "--out", "o", "--checkpoint", "/proc/none"], "give another folder to --checkpoint"),
    (["reward", "train", "--data", "ROWS", "--out", ""], "--out must be a text that is not empty"),
    (["reward", "train", "--data", "ROWS", "--out", "o", "--lora", "99999999"], "--lora must be at most 4096"),
    (["reward", "train", "--data", "ROWS", "--out", "o", "--length", "1e300"], "--length must be at most 1000000"),
    (["miner", "--miner.kind", "transformers", "--transformers.model_name", "minilm"],
     "minilm is no causal language model: its weights lack"),
    (["miner", "--miner.kind", "transformers", "--transformers.model_name", "no/such-model"],
     "give a local folder with its weights or connect to the hub"),  # minilm writes no text
    (["miner", "--axon.nonces", "/proc/version"],
     "/proc/version cannot keep nonces (unable to open database file): give another file to --axon.nonces"),
    (["miner", "--ask", " "], "--ask needs some text"),
    (["miner", "more"], "more belongs to no flag"),
    (["miner", "--netuid"], "--netuid needs a value"),
    (["watch", "--dir", __file__], "is a file: give a validator's folder to --dir"),
    (["ask"], "ask: question must be given"),
]


@pytest.mark.parametrize("argv, said", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_work_is_refused_before_the_work_and_leaves_nothing(tmp_path_factory, capsys, monkeypatch, argv, said):
    work, data = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("data")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(data))
    (data / "text.txt").write_text("why?\nhow?\n")
    files = {"ROWS": data / "rows.jsonl", "TEXT": data / "text.txt"}
    (data / "rows.jsonl").write_text("".join(f'{{"prompt": "{n}", "chosen": "a", "rejected": "b"}}\n' for n in range(9)))
    assert said in failed(capsys, *(files.get(word, word) for word in argv))
    assert [path.name for path in work.rglob("*")] == []


def test_a_server_that_is_not_there_is_named_in_the_log_with_its_flag(capsys, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:  # closed below: nobody listens
        port = server.getsockname()[1]
    argv = ["--openai.base_url", f"http://me:secret@127.0.0.1:{port}/v1", "--openai.model", "small"]
    with pytest.raises(SystemExit):
        main(["miner", "--miner.kind", "openai", *argv, "--ask", "why?"])
    said = capsys.readouterr().err
    [logged] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    where = f"look at --openai.base_url http://127.0.0.1:{port}/v1 and --openai.model small"
    assert logged.endswith(f"the model server cannot be reached: ConnectError; {where}")
    assert "the miner failed (error " in said.splitlines()[-1] and "secret" not in said + logged


def test_a_program_that_fails_is_one_line_in_the_log(capsys, caplog):
    with pytest.raises(SystemExit) as end:
        main(["miner", "--miner.kind", "process", "--process.command", "false", "--ask", "why?"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 1 and line.startswith("prompting-nb miner: status 500: the miner failed (error ") and not THEIRS.search(line)
    [logged] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "the program ended with status 1" in logged.getMessage() and not logged.exc_info
