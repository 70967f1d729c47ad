"""Your own miners and your own prompts: a file of miners, a judge of one's choice, and what the report says of them."""

import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import bittensor as bt
import pytest
import torch
import transformers as hf
from rich.console import Console
from toys import byte_tokenizer, letter_tokenizer, save_model

from prompting_nb.baseminer.command import make_miner, miner_parser
from prompting_nb.config import InputError, RunError
from prompting_nb.loop import command
from prompting_nb.loop import validator as validator_module
from prompting_nb.loop.command import loop_parser, run_loop
from prompting_nb.loop.miners import read_miners
from prompting_nb.loop.network import Network
from prompting_nb.loop.processes import free_port, is_free
from prompting_nb.loop.report import print_tables
from prompting_nb.loop.run import Loop
from prompting_nb.loop.subnet import SubnetProcesses, SubnetSettings, run_subnet, subnet_parser
from prompting_nb.loop.tasks import Arena, Worker
from prompting_nb.loop.validator import make_service, run_validator, validator_parser
from prompting_nb.network.chain_server import ChainServer
from prompting_nb.network.chain_store import open_chain
from prompting_nb.network.dendrite import Dendrite
from prompting_nb.network.remote import RemoteChain
from prompting_nb.network.wallets import local_wallet
from prompting_nb.protocol import Prompting
from prompting_nb.reward import RewardModel
from prompting_nb.validators.judge import CrossEncoderScorer
from prompting_nb.validators.pending import later
from prompting_nb.validators.validator import Policy, Validator

OWN = """
from dataclasses import dataclass
from prompting_nb.baseminer.miner import Miner


@dataclass
class EchoSettings:
    \"\"\"Repeat the prompt.

    Args:
        times: How often.
    \"\"\"

    times: int = 1


class EchoMiner(Miner):
    Settings = EchoSettings

    def prompt(self, synapse):
        synapse.completion = " ".join([synapse.prompt] * self.own_settings.times)
        return synapse


class Flagged(Miner):
    def config(self):
        from prompting_nb.config import read_config
        return read_config(self.add_args)

    @classmethod
    def add_args(cls, parser):
        parser.add_argument("--flagged.word", default="none", type=str)

    def prompt(self, synapse):
        synapse.completion = self.config.flagged.word
        return synapse


class Half(Miner):
    Settings = EchoSettings


class Counter:
    def __init__(self, start):
        self.start = start

    def __call__(self, prompt):
        return str(self.start + len(prompt))


class Ends:
    def __init__(self):
        raise SystemExit("no licence")

    def __call__(self, prompt):
        return "never"


async def later(prompt, word="later"):
    return word


def broken(prompt):
    raise OverflowError("too much for me")


def shorter(prompt, answers):
    return [1 / (1 + len(answer)) for answer in answers]
"""
MINERS = """
- kind: openai
  name: server
  base_url: {url}
  model: small
- kind: transformers
  name: tiny
  model_name: tiny-model
  max_new_tokens: 8
- python: own.py:EchoMiner
  name: echo
  times: 2
- kind: template
  completion: I do not know.
"""
PROMPTS = ["What is the capital of France?", "Who wrote Faust?", "What is the capital of France?", "Why is the sky blue?"]


class Chat(BaseHTTPRequestHandler):
    "Answers as OpenAI's API does."

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = asked["messages"][-1]["content"]
        text = f"{asked['model']} says: {said}"
        if asked["model"] == "judge":  # which of two answers is better: it likes who does not know
            text = "[[A]]" if said.find("I do not know.") < said.find("[Answer B]") else "[[B]]"
            text = text if "I do not know." in said else "[[C]]"
        data = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a file of miners, what it names, prompts, and a reward model."
    folder = tmp_path_factory.mktemp("own")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tokenizer = byte_tokenizer()
    config = hf.GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    save_model(folder / "tiny-model", config, tokenizer, kind=hf.AutoModelForCausalLM)
    torch.manual_seed(0)
    RewardModel(str(folder / "tiny-model"), device=None).save_pretrained(str(folder / "reward"))
    (folder / "own.py").write_text(OWN)
    (folder / "miners.yaml").write_text(MINERS.format(url=f"http://127.0.0.1:{server.server_port}/v1"))
    (folder / "mine.txt").write_text("\n".join(PROMPTS) + "\n")
    yield folder
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    "No limit of `--quick` ends the asking of a run on a busy machine."
    monkeypatch.setitem(command._QUICK, "asking", 600.0)


def loop(folder: Path, out: Path, *flags) -> tuple[dict, list[dict], str]:
    "Run the command; return the summary, the answers, and what was said."
    said = []
    given = ["--prompts", str(folder / "mine.txt"), "--quick", "--quiet", "--out", str(out), *map(str, flags)]
    summary = run_loop(loop_parser().parse_args(given), said.append)
    return summary, [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()], "\n".join(said)


def test_own_prompts_ask_own_miners(place, tmp_path, capsys):
    flags = ["--miners", place / "miners.yaml", "--reward", place / "reward"]
    summary, answers, said = loop(place, tmp_path / "run", *flags)
    kinds = {"server": "openai", "tiny": "transformers", "echo": "python", "template": "template"}
    assert {row["name"]: row["kind"] for row in summary["miners"]} == kinds
    assert summary["steps"] == 4 and summary["churn"] == 0 and summary["moved_uid"] is None
    assert "reward_accuracy" not in summary and "favourites" not in summary and "built-in" not in said
    page, shown = (tmp_path / "run" / "report.html").read_text(), capsys.readouterr().out
    for text in (page, shown):
        assert "unseen pairs" not in text and "cosine" not in text, "nothing of other tasks"
        assert str(place / "reward") in " ".join(text.split()).replace(" ", "") + text
    assert all(name in shown for name in kinds) and "Who answered what" in page
    asked = [row for row in answers if row["step"] >= 0]
    assert [row["prompt"] for row in asked[::4]] == PROMPTS, "repeated prompts are asked again"
    said_by = {row["name"]: row["completion"] for row in asked if row["prompt"] == "Who wrote Faust?"}
    assert said_by["server"] == "small says: Who wrote Faust?" and said_by["template"] == "I do not know."
    assert said_by["echo"] == "Who wrote Faust? Who wrote Faust?" and said_by["tiny"]
    assert all(sum(row["asked"] for row in asked[i:i + 4]) == 2 for i in range(0, 16, 4))
    for text in ("small says: Who wrote Faust?", "I do not know."):
        assert text in page
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    by_hand = {(row["step"], row["uid"]): row["grade"] for row in asked}
    for event in events:
        assert event["grades"] == [by_hand[event["step"], uid] for uid in event["uids"]]
        assert event["rewards"] == pytest.approx(event["grades"], abs=1e-4)


def test_the_table_of_miners_fits_a_terminal_of_80_columns(place, tmp_path):
    summary, _, _ = loop(place, tmp_path / "run", "--miners", place / "miners.yaml", "--reward", place / "reward")
    odd = json.loads(json.dumps(summary))
    odd["miners"][0]["name"] = "[/i] [red]"  # a recorded model may have any name
    text = StringIO()
    print_tables(odd, Console(width=80, file=text))
    assert "[/i] [red]" in text.getvalue()
    console = Console(width=80, record=True, file=StringIO())
    print_tables(summary, console)
    told = console.export_text()
    words = set(re.findall(r"[\w.]+", told))
    for row in summary["miners"]:
        assert {row["name"], row["kind"], f"{row['share']:.3f}", f"{row['weight']:.3f}", f"{row['incentive']:.3f}"} <= words
    assert "…" not in told and "dividends" not in told.partition("At the next epoch")[0]  # nobody earned any
    assert all(len(line) <= 80 and line[-1] in "┓┃┩│┘" for line in told.splitlines() if line[0] in "┏┃┡│└")
    summary["miners"][0]["dividends"] = 0.125
    print_tables(summary, console)
    assert "0.125" in console.export_text()


def test_a_judge_of_ones_own_and_a_uid_that_changes_hands(place, tmp_path):
    flags = ["--judge.kind", "python", "--judge.python", f"{place}/own.py:shorter", "--churn", 1, "--top-k", 1, "--distinct"]
    summary, answers, said = loop(place, tmp_path / "run", "--miners", place / "miners.yaml", *flags)
    assert "graded by own.py:shorter" in said and "the reward model" not in said and summary["graded_by"] == "own.py:shorter"
    step = "prompting-nb validator --reward later, to which a program posts the rewards of own.py:shorter"
    assert f"next: {step} (prompting-nb subnet takes no --judge.kind)" in said, "a subnet would ask another judge"
    assert summary["moved_at"] == 2 and summary["churn"] == 1 and summary["judge"].endswith("own.py:shorter")
    assert summary["policy"]["distinct"] and (summary["policy"]["width"], summary["policy"]["least"]) == (1.3, 0.65)
    assert [row["kind"] for row in summary["miners"] if row["name"] == "beginner"] == ["built-in"]
    for row in answers:
        if row["step"] >= 0:
            assert row["grade"] == pytest.approx(1 / (1 + len(row["completion"])), abs=1e-6)


def test_own_miners_and_prompts_without_a_judge_take_one_of_the_built_in_tasks(place, tmp_path, monkeypatch):
    "As with built-in miners; it used to learn from no ranking at all."
    (tmp_path / "miners.yaml").write_text("- {kind: template, count: 2}\n- {kind: template, name: short, completion: No.}\n")
    monkeypatch.setitem(command._QUICK, "max_seconds", 0.1)
    summary, _, said = loop(place, tmp_path / "run", "--miners", tmp_path / "miners.yaml")
    assert re.search(r"teaching the reward model on \d\d rankings", said) and len(summary["miners"]) == 3
    assert "may not be like these prompts: give a better one with --reward or --judge.kind" in said
    assert f"--reward {tmp_path / 'run' / 'reward'} --dir run" in said and "graded by the reward model" in said


def test_it_is_said_that_a_model_of_the_built_in_tasks_judges_other_prompts(place, tmp_path, monkeypatch):
    monkeypatch.setattr(validator_module, "open_judge", lambda *_: later)
    told = "are judged by a reward model that was taught on the built-in tasks"
    with open_chain(tmp_path / "chain") as chain, ChainServer(chain, token="t") as server:
        remote, wallets = RemoteChain(server.address, "t"), tmp_path / "wallets"
        remote.register(local_wallet(wallets, "judge"), stake=1000.0, validator_permit=True)
        here = ["--subtensor.network", server.address, "--wallet.path", str(wallets), "--wallet.name", "judge"]
        for given, warns in (
            (["--prompts", str(place / "mine.txt")], True),
            (["--prompts", "-"], True),
            (["--prompts", str(place / "mine.txt"), "--reward", "later"], False),
            (["--prompts", "tasks"], False),
            ([], False),
        ):
            said = []
            flags = ["--dir", str(tmp_path / "v"), *here, *given]
            with make_service(validator_parser().parse_args(flags), said.append).validator:
                pass
            found = " ".join(said)
            assert (told in found) == warns and ("--reward FOLDER, or --reward later" in found) == warns, given
    said = []
    flags = ["--miners", str(tmp_path / "gone.yaml"), "--prompts", str(place / "mine.txt"), "--dir", str(tmp_path / "net")]
    with pytest.raises(InputError, match="gone.yaml is not a file"):
        run_subnet(subnet_parser().parse_args(flags), said.append)
    assert told in said[0] and said[0].endswith("--reward FOLDER"), "a subnet takes no `later`"


def test_a_chain_that_is_not_there_is_named_with_what_to_do_and_leaves_nothing(tmp_path):
    network = f"embedded://127.0.0.1:{free_port()}"
    local_wallet(tmp_path / "wallets", "me")
    here = ["--subtensor.network", network, "--wallet.path", str(tmp_path / "wallets"), "--wallet.name", "me"]
    told = f"the chain {network} cannot be reached.*another one to --subtensor.network, or start it with prompting-nb chain"
    with pytest.raises(RunError, match=told):
        run_validator(validator_parser().parse_args(["--dir", str(tmp_path / "v"), *here]))
    assert not (tmp_path / "v").exists()
    with pytest.raises(RunError, match=told):
        make_miner(miner_parser().parse_args(here))


def test_a_model_behind_a_server_judges_a_loop(place, tmp_path):
    "It likes the answer of one miner only, and each question to it is asked in both orders."
    address = re.search(r"http://\S+", (place / "miners.yaml").read_text())[0]
    flags = ["--judge.kind", "openai", "--judge.base_url", address, "--judge.model", "judge", "--top-k", 2]
    summary, _, _ = loop(place, tmp_path / "run", "--miners", place / "miners.yaml", *flags)
    assert "judge" in summary["judge"] and address in summary["judge"]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    rewards = [dict(zip(event["completions"], event["rewards"])) for event in events]
    told = [given for given in rewards if "I do not know." in given]
    assert told and all(given["I do not know."] == max(given.values()) > min(given.values()) for given in told)
    assert all(len(set(given.values())) == 1 for given in rewards if "I do not know." not in given)  # equal


def test_a_cross_encoder_judges_a_loop(place, tmp_path):
    torch.manual_seed(1)
    config = hf.BertConfig(vocab_size=31, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1)
    folder = save_model(tmp_path / "cross", config, letter_tokenizer(bert=True), kind=hf.AutoModelForSequenceClassification)
    flags = ["--judge.kind", "cross-encoder", "--reward", folder]
    summary, answers, _ = loop(place, tmp_path / "run", "--miners", place / "miners.yaml", *flags)
    assert str(folder) in summary["judge"]
    scores, answers = CrossEncoderScorer(folder), [row for row in answers if row["completion"] and row["step"] >= 0]
    assert all(0 <= row["grade"] <= 1 for row in answers)
    order = lambda values: sorted(range(len(values)), key=values.__getitem__)
    for step in {row["step"] for row in answers}:
        rows = [row for row in answers if row["step"] == step]
        given = scores.score(rows[0]["prompt"], [row["completion"] for row in rows])[:, 0].tolist()
        assert order(given) == order([row["grade"] for row in rows])  # the scale changes no order


def test_miners_that_fail_are_named_with_their_reason(place, tmp_path):
    (tmp_path / "miners.yaml").write_text(
        f"- kind: template\n- python: {place}/own.py:broken\n- kind: process\n  command: sh -c 'echo no >&2; exit 4'\n"
    )
    flags = ["--miners", tmp_path / "miners.yaml", "--reward", place / "reward", "--top-k", 1]
    summary, _, _ = loop(place, tmp_path / "run", *flags)
    assert {row["name"]: row["failed"] for row in summary["failures"]} == {"broken": 7, "process": 7}, "3 before, 4 steps"
    why = {row["name"]: row["why"] for row in summary["failures"]}
    assert "OverflowError: too much for me" in why["broken"] and "status 4: no" in why["process"]
    (tmp_path / "miners.yaml").write_text(f"- python: {place}/own.py:broken\n")
    with pytest.raises(InputError, match="no miner answers any prompt .*broken: OverflowError: too much for me"):
        loop(place, tmp_path / "none", *flags)


def test_own_miners_answer_tasks_that_a_program_grades(place):
    arena = Arena("sums", ["1 plus 1"] * 4, read_miners(place / "miners.yaml"), Worker("new", str), [], [],
                  grade=lambda prompt, completion: float(completion == "I do not know."))
    run = Loop(arena, lambda prompt, found: torch.zeros(len(found)), Policy(k=1, timeout=20), churn=0)
    assert run.run(progress=False).truth == [[0.0, 0.0, 0.0, 1.0]] * 4


def ask(miners, prompt="hello"):
    with Network(miners) as network, Dendrite(network.wallet, allow_private=True) as dendrite:
        neurons = network.client.subnets.metagraph(1).neurons[1:]
        return [answer.completion for answer in dendrite.query(neurons, Prompting.ask(prompt), timeout=60)]


def test_every_form_of_an_own_class(place, tmp_path):
    (tmp_path / "miners.yaml").write_text(f"""miners:
- python: {place}/own.py:Flagged
  word: flag
- python: {place}/own.py:Counter
  settings: {{start: 100}}
- python: "{place}/own.py:later"
- {{kind: builtin, worker: calculator}}
- {{kind: process, command: [tr, "a-z", "A-Z"], name: loud, count: 2}}
""")
    miners = read_miners(tmp_path / "miners.yaml")
    assert [miner.name for miner in miners] == ["Flagged", "Counter", "later", "calculator", "loud-1", "loud-2"]
    assert ask(miners, "6 plus 7") == ["flag", "108", "later", "13", "6 PLUS 7", "6 PLUS 7"]


@pytest.mark.parametrize("text, says", [
    ("- kind: openai\n  modle: m\n", ":1: entry 1: openai has no setting modle; the nearest is model"),
    ("- kind: openai\n", "entry 1 (openai): say with model which"),
    ("- kind: template\n- cuont: 2\n  kind: template\n", ":2: entry 2: template has no setting cuont; the nearest is count"),
    ("- kind: templat\n", "no kind 'templat'; the nearest is template"),
    ("- template: {}\n", "write kind: template"),
    ("- kind: template\n  python: a:b\n", "not both"),
    ("- kind: template\n  count: 0\n", "count must be a whole number from 1 to 250, not 0"),
    ("- kind: template\n  name: a/b\n", "this one is 'a/b'"),
    ("- kind: template\n  name: chain\n", "not chain or validator"),
    ("- {kind: template, name: x}\n- {kind: template, name: x}\n", ":2: entry 2 (x): the name is taken by"),
    ("- kind: template\n  kind: openai\n", ":2: kind stands twice"),
    ("- kind: transformers\n  temperature: hot\n", "temperature must be a number, at least 0, not 'hot'"),
    ("- kind: replay\n  file: none.jsonl\n", "file: 'none.jsonl' is not a file"),
    ("- kind: process\n", "which program should answer"),
    ("- python: OWN:EchoMiner\n  tmies: 3\n", "EchoMiner has no setting tmies; the nearest is times"),
    ("- python: OWN:EchoMiner\n  times: x\n", "times must be a whole number, not 'x'"),
    ("- python: OWN:EchoMinor\n", "there is no EchoMinor in"),
    ("- python: OWN:Half\n", "Half lacks prompt"),
    ("- python: OWN:Counter\n", "missing a required argument: 'start'"),
    ("- python: OWN:OWN\n", "there is no OWN in"),
    ("- python: none.py:X\n", "there is no file none.py in"),
    ("- python: no.such.module:X\n", "cannot be imported: ModuleNotFoundError"),
    ("- python: x\n", "python must be path/to/file.py:Class"),
    ("a: [\n", "this is not YAML"),
    ("", "names no miner"),
    ("minders: []\n", "under the one key miners; found minders"),
    ("- 7\n", "give a kind and its settings, not 7"),
    ("- ? [a, b]\n  : 1\n", ":1: a key must be a text"),
    ("- {kind: template, completion: 2020-13-45}\n", "a value cannot be read: month must be in 1..12"),
    ("- &a [*a]\n", "give a kind and its settings, not [[...]]"),
    ("[" * 9000, "it is nested too deeply"),
    ("- python: OWN:Ends\n", "entry 1 (Ends): SystemExit: no licence"),
    ("- python: ENDS:Any\n", "cannot be imported: SystemExit: 0"),
    ("- python: builtins:iter\n", "entry 1 (iter): ValueError: no signature found"),
])  # fmt: skip
def test_mistakes_name_file_and_entry(place, tmp_path, text, says):
    file = tmp_path / "wrong.yaml"
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(0)\n")
    file.write_text(text.replace("OWN:", f"{place}/own.py:").replace("ENDS:", f"{tmp_path}/ends.py:"))
    with pytest.raises(InputError) as raised:
        for miner in read_miners(file):
            miner.open({})
    assert str(file) in str(raised.value) and says in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_keys_are_not_shown(place, tmp_path):
    (tmp_path / "miners.yaml").write_text("- {kind: openai, model: m, api_key: secret-word}\n")
    assert "secret-word" not in repr(read_miners(tmp_path / "miners.yaml"))


@pytest.mark.parametrize("flags, says", [
    (["--miners", "none.yaml"], "none.yaml is not a file"),
    (["--churn", "often"], "--churn must be a whole number or off"),
    (["--judge.kind", "openai"], "--judge.kind openai needs --judge.model"),
    (["--judge.python", "a:b"], "--judge.python is for --judge.kind python"),
    (["--churn", "9"], "--churn 9 needs more than 4 steps"),
    (["--epochs", "3"], "--epochs 3 has no effect with --reward"),
    (["--judge.budget", "3"], "--judge.budget is for --judge.kind openai"),
    (["--judge.base_url", "http://127.0.0.1:1/v1"], "--judge.base_url is for --judge.kind openai"),
    (["--judge.kind", "python", "--judge.python", "own.py:shorter"], "--reward has no effect with --judge.kind python"),
])  # fmt: skip
def test_wrong_flags(place, tmp_path, flags, says):
    with pytest.raises(InputError, match=says):
        loop(place, tmp_path / "run", "--miners", place / "miners.yaml", "--reward", place / "reward", *flags)


@pytest.mark.parametrize("rule", ["thompson", "ucb"])
@pytest.mark.parametrize("gate", ["sentence", "last-token"])
def test_a_rule_that_needs_a_posterior_is_refused_with_a_gate_that_has_none(rule, gate, tmp_path):
    flags = ["--gate", gate, "--rule", rule]
    here = ["--subtensor.network", "embedded://127.0.0.1:1", "--dir", str(tmp_path / "v")]
    for run in (lambda: run_loop(loop_parser().parse_args([*flags, "--out", str(tmp_path / "run")])),
                lambda: make_service(validator_parser().parse_args([*flags, *here]))):
        with pytest.raises(InputError, match=f"--rule {rule} needs a gate with a posterior: take --gate bayes"):
            run()
    assert list(tmp_path.iterdir()) == []


def test_a_validator_refuses_the_rule_at_once():
    client = SimpleNamespace(subnets=SimpleNamespace(metagraph=lambda netuid: SimpleNamespace(hotkeys=["a"])))
    with pytest.raises(InputError, match="--rule ucb needs a gate"):
        Validator(None, client, None, gate=object(), policy=Policy(rule="ucb"))
    assert [Policy().rule_of(posterior) for posterior in (True, False)] == ["thompson", "epsilon"]


@pytest.mark.slow
def test_a_subnet_serves_own_miners_as_processes(place, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.setattr(SubnetProcesses._wait_for_chain, "__defaults__", (300.0,))
    (tmp_path / "miners.yaml").write_text(f"""
- {{python: "{place}/own.py:EchoMiner", name: echo, times: 2}}
- {{kind: process, command: rev, name: back}}
""")
    settings = SubnetSettings(dir=str(tmp_path / "net"), miners=str(tmp_path / "miners.yaml"), block_time=0.5)
    with SubnetProcesses(settings) as subnet:
        assert [entry["name"] for entry in json.loads((tmp_path / "net" / "processes.json").read_text())][1:3] == ["echo", "back"]
        wallet = local_wallet(subnet.folder / "chain" / "wallets", "validator")
        client, deadline = subnet.chain.client(), time.monotonic() + 300
        neurons = []
        while len(neurons) < 2:
            assert time.monotonic() < deadline, "the miners do not serve"
            time.sleep(0.3)
            neurons = [neuron for neuron in client.subnets.metagraph(1).neurons if neuron.axon]
        with Dendrite(wallet, allow_private=True) as dendrite:
            answers = [answer.completion for answer in dendrite.query(neurons, Prompting.ask("abc"), timeout=60)]
        client.close()
    assert answers == ["abc abc", "cba"]


def test_a_subnet_refuses_a_wrong_file_before_anything_starts(tmp_path):
    (tmp_path / "miners.yaml").write_text("- kind: nothing\n")
    settings = SubnetSettings(dir=str(tmp_path / "net"), miners=str(tmp_path / "miners.yaml"))
    with pytest.raises(InputError, match="entry 1: there is no kind 'nothing'"):
        SubnetProcesses(settings)
    assert not (tmp_path / "net").exists()


def test_a_subnet_that_is_started_again_with_other_miners(tmp_path, monkeypatch):
    "A port that another program holds by now is replaced; who is not started again is not asked."
    said, busy = [], socket.create_server(("127.0.0.1", 0))
    ports = {"chain": busy.getsockname()[1], "miner-1": "x", "validator": free_port()}
    (tmp_path / "ports.json").write_text(json.dumps(ports))
    subnet = SubnetProcesses(SubnetSettings(dir=str(tmp_path), miners=1, prompts="tasks"), said.append)
    with busy, subnet.supervisor, open_chain(tmp_path / "chain") as chain, ChainServer(chain, token="t") as server:
        subnet._leave_taken_ports(["chain", "miner-1", "validator"], timeout=0.1)
        assert subnet.port("chain") != ports["chain"] and subnet.port("validator") == ports["validator"]
        assert said == [f"port {ports['chain']} of chain is taken: it gets another one"] and is_free(subnet.port("miner-1"))
        subnet.chain = RemoteChain(server.address, "t")
        client = subnet.chain.client()
        for name in ("miner-1", "miner-2"):
            wallet = local_wallet(tmp_path / "chain" / "wallets", name)
            subnet.chain.register(wallet)
            client.execute(bt.ServeAxon(1, "127.0.0.1", 80), wallet).raise_for_failure()
            (tmp_path / "miners" / name).mkdir(parents=True)
        subnet._retire(["validator", "miner-1"])
        assert [neuron.axon for neuron in client.subnets.metagraph(1)] == ["127.0.0.1:80", None]
        assert said[1:] == ["not started and not asked: 1 miner of an earlier run (miner-2)"]
        client.close()
        with open_chain(tmp_path / "small", max_uids=2) as few, ChainServer(few, token="t") as server:
            subnet.chain = RemoteChain(server.address, "t")
            subnet._register(["validator", "miner-1"])
            with pytest.raises(InputError, match="is full: validator lost its uid"):
                subnet._register(["validator", "miner-1", "miner-2"])
    assert subnet._prompts() == "tasks"


def test_the_view_of_a_subnet_asks_no_proxy(tmp_path, monkeypatch):
    class Status(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"step": 7}')

        def log_message(self, *args):
            pass

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with ThreadingHTTPServer(("127.0.0.1", 0), Status) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "ports.json").write_text(json.dumps({"validator": server.server_port}))
        subnet = SubnetProcesses(SubnetSettings(dir=str(tmp_path)))
        with subnet.supervisor:
            assert {"step": 7} in (subnet.status() for _ in range(9))  # it waits for two seconds each time
        server.shutdown()
