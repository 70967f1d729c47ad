"""The loop from the outside: the program `prompting-nb` in a process of its own, as a person runs it."""

import dataclasses
import gzip
import html
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from weakref import WeakValueDictionary

import pytest
import torch
import transformers

from prompting_nb.baseminer.running import Runner
from prompting_nb.config import InputError
from prompting_nb.network.chain import EmbeddedChain, make_wallet
from prompting_nb.network.dendrite import Dendrite
from prompting_nb.protocol import Prompting
from prompting_nb.reward import RewardModel
from prompting_nb.reward.preferences import Ranking
from prompting_nb.loop.command import loop_parser, run_loop
from prompting_nb.loop.network import Network, WorkerMiner
from prompting_nb.loop.report import render, summarise
from prompting_nb.loop.run import Loop
from prompting_nb.loop.tasks import Worker, built_in, open_arena, recorded
from prompting_nb.loop.teach import assess
from prompting_nb.encoding.encoder import Encoder
from prompting_nb.pretrained import MINILM, resolve
from prompting_nb.validators.judge import Judge
from prompting_nb.validators.replay import ask_anyone, estimate, read_events
from prompting_nb.validators.validator import Policy, Validator

PROGRAM = Path(sys.executable).with_name("prompting-nb")
# a shell may have told its background jobs to ignore Ctrl-C, and children inherit that
LISTENS_TO_CTRL_C = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
DEAF_TO_CTRL_C = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    "A folder with a reward model that has learned nothing, which is enough to run the loop."
    folder = tmp_path_factory.mktemp("models") / "reward"
    torch.manual_seed(0)
    RewardModel("minilm", device=None).save_pretrained(folder)
    return folder


@pytest.fixture
def recordings(tmp_path):
    "Recorded completions of five models for thirty prompts; the last model is mute now and then."
    path = tmp_path / "recorded.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i in range(30):
            responses = [{"model": f"model-{m}", "completion": f"answer {i} " + "and so on " * m, "score": round(0.2 * m, 1)}
                         for m in range(5)]
            responses[4]["completion"] *= i % 3 != 0
            print(json.dumps({"prompt": f"question number {i}", "source": "made up", "responses": responses}), file=file)
    return path


def run(*args, **kwargs):
    return subprocess.run([PROGRAM, "loop", "--quiet", *map(str, args)], capture_output=True, text=True, timeout=600, **kwargs)


def results(folder: Path):
    "Events and summary, after checks that hold for every run."
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    page = (folder / "report.html").read_text()
    assert [event["step"] for event in events] == list(range(len(events)))
    assert summary["steps"] == len(events)
    assert page.rstrip().endswith("</html>") and "http" not in page.split("</style>")[0]
    assert not [p for p in folder.iterdir() if p.name.startswith(".")], "no temporary file stays behind"
    return events, summary


@pytest.mark.slow
def test_built_in_run_leaves_events_summary_and_report(tmp_path, reward):
    out = tmp_path / "run"
    done = run("--reward", reward, "--steps", 14, "--out", out)
    assert done.returncode == 0, done.stderr
    events, summary = results(out)
    assert summary["status"] == "finished" and len(events) == 14
    for name in ("reward_accuracy", "random", "best_fixed", "gate", "oracle"):
        assert 0 <= summary[name] <= 1
    assert summary["random"] <= summary["oracle"] and summary["best_fixed"] <= summary["oracle"]
    assert summary["command"].startswith("prompting-nb loop --quiet --reward") and summary["settings"]["steps"] == 14
    assert summary["judging"]["folder"] == str(reward) and len(summary["judging"]["sha256"]) == 64
    assert summary["data"]["prompts"]["count"] == 14 and summary["seeds"] == {"run": 0, "prompts": 0}
    for event in events:
        assert len(set(event["uids"])) == 3 and 0 not in event["uids"], "the validator itself is never asked"
        assert all(0 < p <= 1 for p in event["propensities"])
        assert set(event["statuses"]) <= {200, 408, 500}
        failed = [status != 200 for status in event["statuses"]]
        assert all(reward == 0 and grade == 0 for reward, grade, bad in zip(event["rewards"], event["grades"], failed) if bad)
    holders = [row for row in summary["miners"] if row["uid"] == summary["moved_uid"]]
    assert [row["weight"] is None for row in holders] == [True, False] and holders[1]["name"] == "beginner"
    assert sum(row["weight"] or 0 for row in summary["miners"]) == pytest.approx(1, abs=0.01)
    assert "the best for each prompt" in done.stdout and "report.html" in done.stdout
    # the log can be replayed: what was asked is what random choice would ask, as far as it explored
    replayed = estimate(read_events(out / "events.jsonl"), ask_anyone(3))
    assert replayed.answers == 3 * 14 and replayed.ips > 0


@pytest.mark.slow
def test_the_report_shows_answers_moves_and_files(tmp_path, reward):
    out = tmp_path / "run"
    assert run("--reward", reward, "--steps", 12, "--out", out).returncode == 0
    page, summary = (out / "report.html").read_text(), json.loads((out / "summary.json").read_text())
    assert "1 is a perfect answer, 0 a useless one" in page
    assert "Three of the last 4 steps" in page
    # a phone: names and digests break within words, short texts do not break at all, pictures scroll
    assert page.index('<div class="folded">') > page.index("What it was made with") and 'class="text short">built-in<' in page
    assert "figure { overflow-x: auto; }" in page
    for kind in ("best", "typical", "worst"):
        assert page.count(f"{kind}, step ") == summary["top_k"]  # each of those who were asked
    last = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()][-4:]
    assert any(html.escape(event["prompt"])[:60] in page for event in last)
    assert re.search(r"Before step 6, uid \d+ passed from \w+ to \w+", page)  # the one that changes hands half-way
    files = re.findall(r'href="([^"]+)"', page)
    assert files and all((out / name).is_file() for name in files)


@pytest.mark.slow
def test_recorded_completions_go_through_the_same_loop(tmp_path, reward, recordings):
    out = tmp_path / "run"
    done = run("--reward", reward, "--prompts", recordings, "--steps", 12, "--top-k", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    events, summary = results(out)
    assert summary["graded_by"] == "the recorded judge" and summary["arena"] == "recorded.jsonl.gz"
    assert len(summary["miners"]) == 6, "five models, and the newcomer"
    grades = {f"answer {i} " + "and so on " * m: round(0.2 * m, 1) for i in range(30) for m in range(5)}
    for event in events:
        for text, grade in zip(event["completions"], event["grades"]):
            assert grade == (grades[text] if text else 0)


def test_what_the_reward_model_does_not_read_is_in_the_report(recordings):
    "Told as counts in the summary, and in a sentence on the page."
    arena = open_arena(str(recordings), Encoder(MINILM), steps=4)
    torch.manual_seed(0)
    model = RewardModel("minilm", device="cpu", depth=1, max_length=12)
    assessment, judge = assess(model, arena, progress=False)
    texts = sum(map(len, arena.test))
    assert assessment.cuts.texts == texts and 0 < assessment.cuts.completions < texts and assessment.cuts.max_length == 12
    loop = Loop(arena, judge)
    summary = summarise(loop, assessment)
    assert summary["reward_cuts"] == assessment.cuts.to_dict()
    assert f"Of what it was tested on, of {texts} texts, " in render(loop, summary, assessment)
    whole = dataclasses.replace(assessment, cuts=None)  # a judge that does not tell
    assert "tested on" not in render(loop, summarise(loop, whole), whole)


@pytest.mark.slow
def test_a_list_of_prompts_is_enough(tmp_path, reward):
    (tmp_path / "mine.txt").write_text("".join(f"What is {i} plus 7?\n" for i in range(8)))
    done = run("--reward", reward, "--prompts", tmp_path / "mine.txt", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    events, summary = results(tmp_path / "run")
    assert len(events) == 8 and summary["graded_by"] == "the reward model"


def _interrupted(tmp_path, reward, number, **kwargs):
    "Start a run, send a signal after three events, and return the ended process with its output."
    out = tmp_path / "run"
    process = subprocess.Popen([PROGRAM, "loop", "--quiet", "--reward", reward, "--steps", "200", "--out", out],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
    try:
        log = out / "events.jsonl"
        deadline = time.monotonic() + 300
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 3):
            assert time.monotonic() < deadline, "the run did not begin"
            time.sleep(0.05)
        process.send_signal(number)
        output = process.communicate(timeout=300)
    finally:
        process.kill()
    return out, process.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize("number, kwargs", [(signal.SIGINT, LISTENS_TO_CTRL_C), (signal.SIGTERM, DEAF_TO_CTRL_C)])
def test_interruption_leaves_what_was_learned_readable(tmp_path, reward, number, kwargs):
    out, status, (stdout, stderr) = _interrupted(tmp_path, reward, number, **kwargs)
    assert status == 130, stderr
    assert "interrupted" in stderr and "Traceback" not in stderr
    events, summary = results(out)
    assert summary["status"] == "interrupted" and 3 <= len(events) < 200
    assert (out / "gate.safetensors").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("args, says", [
    (["--nonsense", "1"], "no setting nonsense"),
    (["--steps", "many"], "steps"),
    (["--prompts", "there-is-no.jsonl"], "there-is-no.jsonl"),
    (["--top-k", "77"], "--top-k 77"),
    (["--timeout", "-1"], "--timeout"),
    (["--reward", "there-is-none"], "there-is-none"),
    (["--gating.num_uids", "3"], "--gating.num_uids 3"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, args, says):
    done = run(*args, "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_existing_results_are_kept_unless_forced(tmp_path, reward):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("mine")
    done = run("--reward", reward, "--steps", "4", "--out", tmp_path / "run")
    assert done.returncode == 2 and "--force" in done.stderr
    assert (tmp_path / "run" / "summary.json").read_text() == "mine"


def test_help_teaches_and_imports_little():
    done = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "loop" in done.stdout
    probe = "import sys, prompting_nb.cli; print([m for m in ('torch', 'transformers', 'bittensor') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("module, absent", [
    ("prompting_nb", ["torch", "bittensor", "transformers"]),
    ("prompting_nb.reward.model", ["bittensor", "aiohttp", "uvicorn"]),
    ("prompting_nb.baseminer.miner", ["torch", "transformers"]),
    ("prompting_nb.network.axon", ["torch"]),
    ("prompting_nb.validators.gating", ["bittensor", "aiohttp", "uvicorn"]),
])
def test_rooms_import_only_what_they_need(module, absent):
    probe = f"import sys, {module}; print([m for m in {absent} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


class Omniscient:
    "Scores a completion with its checked grade: what a perfect reward model would do."

    def __init__(self, arena):
        self.arena = arena

    def score(self, prompt, completions):
        return torch.tensor([[self.arena.grade(prompt, completion)] for completion in completions])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_the_gate_learns(seed):
    arena = built_in(Encoder("minilm"), steps=180, seed=seed, train=12, test=12)
    trace = Loop(arena, Judge(Omniscient(arena)), seed=seed).run(progress=False)
    assert trace.standing().gap_closed > 0.5, trace.standing()


@pytest.mark.slow
def test_nothing_listens_after_a_run():
    arena = built_in(Encoder("minilm"), steps=6, train=12, test=12)
    loop = Loop(arena, Judge(Omniscient(arena)))
    loop.run(progress=False)
    for neuron in loop.validator.metagraph.neurons[1:]:
        host, port = neuron.axon.split(":")
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0


def test_miners_of_the_network_do_not_read_the_environment(monkeypatch):
    monkeypatch.setenv("PROMPTING_NB_AXON__PORT", "1")  # a port that nobody may listen on, and that two could not share
    monkeypatch.setenv("PROMPTING_NB_MINER__BLACKLIST__QUOTA", "1")
    workers = [Worker(name, lambda prompt: "yes") for name in ("a", "b")]
    with Network(workers) as network, Dendrite(network.wallet, allow_private=True) as dendrite:
        neurons = network.client.subnets.metagraph(1).neurons[1:]
        for _ in range(3):
            answers = dendrite.query(neurons, Prompting.ask("hello"), timeout=60)
            assert [answer.completion for answer in answers] == ["yes", "yes"]


def test_a_worker_s_miner_reads_nothing_of_the_process_it_is_in(monkeypatch):
    "Neither its command line, where names of ours may be another program's, nor its environment."
    monkeypatch.setattr(sys, "argv", ["pytest", "--miner.name", "theirs", "--miner.unknown", "3"])
    monkeypatch.setenv("PROMPTING_NB_MINER__RETRIES", "77")
    worker = Worker("good", lambda prompt: "yes")
    chain, wallet = EmbeddedChain(), make_wallet("worker")
    chain.register(wallet)
    with chain.client() as client:
        miner = WorkerMiner(worker, wallet=wallet, subtensor=client)
    assert (miner.settings.miner.name, miner.settings.miner.retries) == ("good", 10)


def test_a_chain_that_refuses_weights_does_not_waste_the_run(monkeypatch):
    arena = built_in(Encoder("minilm"), steps=4, train=12, test=12)
    monkeypatch.setattr(Validator, "set_weights", lambda self: (_ for _ in ()).throw(RuntimeError("rate limit")))
    trace = Loop(arena, Judge(Omniscient(arena))).run(progress=False)
    assert len(trace.events) == 4 and "rate limit" in trace.complaint and trace.weights == {}


def test_sync_starts_anew_for_the_uid_that_changed_hands_and_only_there():
    workers = [Worker(name, lambda prompt: "yes") for name in ("a", "b", "c")]
    give_one = lambda prompt, completions: torch.ones(len(completions))
    with Network(workers) as network, Validator(network.wallet, network.client, give_one, policy=Policy(k=2, timeout=30)) as validator:
        for step in range(6):
            validator.step(f"prompt {step}")
        before = validator.gate.head.weight.detach().clone()
        old = validator.metagraph.hotkeys[2]
        network.replace(2, Worker("d", lambda prompt: "no"))
        assert validator.sync() == [2]
        after = validator.gate.head.weight.detach()
        assert [uid for uid in range(4) if not torch.equal(before[uid], after[uid])] == [2]
        new = validator.metagraph.hotkeys[2]
        assert old != new and validator.averages.counts[new] == 0 < validator.averages.counts[old]
        event = validator.step("and now?")
        assert event.available == [1, 2, 3]


def test_recorded_completions_that_are_left_out_are_said_in_the_log(caplog):
    texts = ["good answer to {}", "poor answer to {}", ""]
    rows = [Ranking(f"prompt {i}", [t.format(i) for t in texts], [0.9, 0.2, 0.1], ["strong", "weak", "mute"]) for i in range(20)]
    arena = recorded(rows + rows[:3], "mine")
    assert "mine: 3 rows left out, whose prompt comes again" in caplog.text
    assert "mine: models left out, since they have no answer to learn from: mute" in caplog.text
    assert sorted(w.name for w in arena.workers) == ["strong", "weak"]


@pytest.mark.parametrize("source", ["built-in tasks", "recorded completions"])
def test_a_run_loads_the_frozen_encoder_once(tmp_path, monkeypatch, reward, recordings, source):
    monkeypatch.setattr("prompting_nb.encoding.weights._frozen", WeakValueDictionary())  # as in a new process
    seen, load = [], transformers.AutoModel.from_pretrained

    def counted(name, *args, **kwargs):
        if kwargs.get("device_map") != "meta":  # which reads no weights
            seen.append(str(name))
        return load(name, *args, **kwargs)

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", counted)
    flags = ["--quiet", "--steps", "4", "--reward", str(reward), "--out", str(tmp_path / "run")]
    flags += ["--prompts", str(recordings)] if source == "recorded completions" else []
    summary = run_loop(loop_parser().parse_args(flags), say=lambda text: None)
    assert summary["status"] == "finished"
    assert seen.count(resolve(MINILM)) == 1, seen  # for the arena, the cosine beside the reward model, and the gate


def test_a_runner_runs_a_validator_one_step_a_block_and_weights_each_epoch():
    workers = [Worker(name, lambda prompt: "yes") for name in ("a", "b", "c")]
    give_one = lambda prompt, completions: torch.ones(len(completions))
    epoch, events, at_epoch = 5, [], []  # `at_epoch`: the block, and which uids have changed hands
    with Network(workers) as network, Validator(network.wallet, network.client, give_one, policy=Policy(k=2, timeout=30)) as validator:

        def each_block():
            block = int(network.client.block)
            if block > runner.block:
                events.append(validator.step(f"prompt {block}"))
                if block % epoch == 0:
                    at_epoch.append((block, validator.sync()))
                    validator.set_weights()
            return block

        runner = Runner(each_block, name="validator", poll_interval=0.01)
        runner.start()
        for block in range(1, 11):
            assert runner.wait_for(block, timeout=300), runner.error
            assert [event.block for event in events] == list(range(1, block + 1))
            assert (0 in network.chain.weights and bool(network.chain.weights[0])) == (block >= epoch)
            if block == 7:
                network.replace(2, Worker("d", lambda prompt: "no"))
                network.chain.fail(2)  # the chain is away for a moment: no step is lost, none is taken twice
            if block < 10:
                network.chain.step()
        assert runner.stop() and runner.error is None
        assert at_epoch == [(5, []), (10, [2])]
        assert [event.prompt for event in events] == [f"prompt {n}" for n in range(1, 11)]
        assert abs(sum(network.chain.weights[0].values()) - 1) < 1e-3


@pytest.mark.slow
def test_a_run_says_what_it_knew_before(tmp_path, reward, recordings):
    "Warm gate and corrected judge by default; each can be switched off, and the trivial rival is always there."
    shown = {}
    for name, flags in {"all": (), "none": ("--judge.correct", "false", "--gating.warm", "false")}.items():
        out = tmp_path / name
        done = run("--reward", reward, "--prompts", recordings, "--steps", 9, "--top-k", 2, "--out", out, *flags)
        assert done.returncode == 0, done.stderr
        events, summary = results(out)
        shown[name] = events, summary, (out / "report.html").read_text(), done.stdout
        assert {row["hotkey"] for row in summary["judge_offsets"]} <= {f"model-{m}" for m in range(5)}
        assert 0 <= summary["favourites"] <= summary["oracle"] + 1e-4 and "always the miners that ranked best before the run" in done.stdout
        assert json.loads((out / "judge.json").read_text())["correct"] is (name == "all")
    events, summary, page, told = shown["all"]
    assert summary["warm"] and summary["judge_corrected"] and summary["known_rankings"] == 21
    assert "the gate learned from 21 rankings with 105 answers of 5 hotkeys" in page
    assert "the gate learned from 21 rankings" in " ".join(told.split())
    assert any(any(event["offsets"]) for event in events)
    assert set(events[0]["hotkeys"]) & set(_hotkeys(events, "model-4", summary)), "the best one is asked at once"
    events, summary, page, told = shown["none"]
    assert not summary["warm"] and not summary["judge_corrected"] and summary["known_rankings"] == 0
    assert "knew nothing of the miners" in page and "not corrected for who answered" in page
    assert not any(any(event["offsets"]) for event in events)


def _hotkeys(events, name, summary):
    "The hotkeys that held the uids of a miner."
    uids = {row["uid"] for row in summary["miners"] if row["name"] == name}
    return {key for event in events for uid, key in zip(event["uids"], event["hotkeys"]) if uid in uids}


def test_everybody_gets_the_credit_for_an_answer_that_several_give():
    arena = built_in(Encoder(MINILM), steps=6, train=24, test=12)
    assert len(arena.known) == 36 and all(len(row.names) == len(arena.workers) for row in arena.known)
    assert any(len(set(row.completions)) < len(row.completions) for row in arena.known)
    late = [(row, i) for row in arena.known for i, name in enumerate(row.names) if name == "slow" and not row.completions[i]]
    assert late and all(row.scores[i] == 0 for row, i in late)


def test_judge_and_gate_of_a_loop_know_hotkeys_by_the_names_of_their_workers():
    arena = built_in(Encoder(MINILM), steps=8, train=24, test=12)
    judge = Judge(Omniscient(arena))
    judge.offsets.add("lazy", -0.3), judge.offsets.add("calendar", 0.3)
    loop = Loop(arena, judge, Policy(k=3, timeout=20.0), warm=True)
    trace = loop.run(progress=False)
    hotkey = {holder.name: holder.hotkey for holder in trace.holders}
    assert loop.validator.judge.offset(hotkey["lazy"]) == judge.offset("lazy") < 0
    assert trace.known.hotkeys == {hotkey[worker.name]: 36 for worker in arena.workers}
    assert loop.validator.gate.known == trace.known.hotkeys
    assert len(trace.favourites(arena.known)) == 8


def test_prices_of_a_run_are_read_by_name_and_reported(tmp_path, reward):
    file, run = tmp_path / "prices.json", ["--quiet", "--reward", str(reward), "--steps", "12", "--out", str(tmp_path / "run")]
    flags = [*run, "--prices.file", str(file), "--prices.budget", "2"]
    file.write_text('{"nobody": 1.0}')
    with pytest.raises(InputError, match="names none of the miners"):
        run_loop(loop_parser().parse_args(flags), say=lambda text: None)
    file.write_text('{"lazy": 1.0, "slow": 4.0}')
    summary = run_loop(loop_parser().parse_args(flags), say=lambda text: None)
    assert 1 <= summary["paid"] <= 4 and summary["budget"] == 2 and set(summary["aiq"]) == {"gate", "fixed", "oracle"}
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert all(len(event["prices"]) == 3 == len(event["why"]["uids"]) for event in events)
    assert "What it cost" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(InputError, match="--prices.file"):
        run_loop(loop_parser().parse_args([*run, "--prices.worth", "2"]), say=lambda text: None)
