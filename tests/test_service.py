"A validator as a service: killed, without miners, without a chain, on a full disk; and the processes of a subnet."

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from prompting_nb.baseminer.subnet import open_client
from prompting_nb.config import InputError
from prompting_nb.loop.endpoint import Endpoint
from prompting_nb.loop.journal import Journal
from prompting_nb.loop.network import Network, WorkerMiner
from prompting_nb.loop.service import NotReady, Service, ServiceSettings
from prompting_nb.loop.tasks import Worker
from prompting_nb.network.chain_server import read_token
from prompting_nb.network.command import find_chain
from prompting_nb.network.wallets import local_wallet
from prompting_nb.validators.pending import later
from prompting_nb.validators.validator import Policy, Validator

ANSWERS = {"brief": "No.", "wordy": "Well, " * 9 + "yes.", "polite": "Yes, please do.", "odd": "Perhaps, or not."}
PROMPTS = [f"Is {n} a number?" for n in range(7)]
SECONDS = 120.0  # that anything may take


def by_length(prompt, completions):
    return torch.tensor([min(len(text or "") / 60, 1.0) for text in completions])


def workers():
    return [Worker(name, lambda _, text=text: text) for name, text in ANSWERS.items()]


def until(done, what="it"):
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, f"{what} did not happen within {SECONDS:g} s"
        time.sleep(0.02)


def events(folder):
    return list(Journal(folder).read())


@pytest.fixture
def network():
    with Network(workers()) as network:
        yield network


def service_of(network, folder, judge=by_length, k=2, prompts=PROMPTS, **settings):
    validator = Validator(network.wallet, network.client, judge, policy=Policy(k=k, timeout=30))
    settings = {"interval": 0, "poll_interval": 0.05, "save_every": 4, "no_set_weights": True} | settings
    return Service(validator, folder, prompts, ServiceSettings(**settings))


def test_a_service_goes_on_as_if_it_had_not_been_stopped(network, tmp_path):
    with service_of(network, tmp_path / "whole", steps=30) as whole:
        assert whole.join(SECONDS)
    for steps in (7, 8, 19, 30):
        with service_of(network, tmp_path / "parts", steps=steps) as part:
            assert part.join(SECONDS)
    one, other = events(tmp_path / "whole"), events(tmp_path / "parts")
    assert [e["step"] for e in other] == list(range(30))
    for key in ("prompt", "uids", "rewards", "scores", "propensities"):
        assert [e[key] for e in one] == [e[key] for e in other], key
    assert whole.validator.averages.values == part.validator.averages.values


def test_prompts_at_the_same_time(network, tmp_path):
    with service_of(network, tmp_path, concurrent=3, steps=24) as service:
        assert service.join(SECONDS)
    found = events(tmp_path)
    assert [e["step"] for e in found] == list(range(24))
    assert sorted(e["prompt"] for e in found) == sorted(PROMPTS[n % 7] for n in range(24))


def test_averages_equal_what_the_events_say(network, tmp_path):
    with service_of(network, tmp_path, steps=12) as service:
        assert service.join(SECONDS)
    said = {}
    for event in events(tmp_path):
        for hotkey, reward in zip(event["hotkeys"], event["rewards"]):
            old = said.get(hotkey, reward)
            said[hotkey] = old + 0.1 * (reward - old)
    assert said == service.validator.averages.values


def test_a_judge_that_gives_nan_costs_its_step_only(network, tmp_path, caplog):
    def judge(prompt, completions):
        return by_length(prompt, completions) * (float("nan") if "3" in prompt else 1.0)

    with service_of(network, tmp_path, judge, steps=12) as service:
        assert service.join(SECONDS)
    found = events(tmp_path)
    assert [e["step"] for e in found] == list(range(12)) and not any("3" in e["prompt"] for e in found)
    assert "a step failed and is left out" in caplog.text


def test_fewer_miners_than_it_asks_for(network, tmp_path, caplog):
    with service_of(network, tmp_path, k=9, steps=3) as service:
        assert service.join(SECONDS)
    assert all(len(e["uids"]) == 4 for e in events(tmp_path))
    assert caplog.text.count("4 miners serve: asking these instead of 9") == 1


def test_without_a_miner_it_waits_and_says_so(tmp_path, caplog):
    with Network([]) as empty, service_of(empty, tmp_path, steps=3) as service:
        until(lambda: "no miner of the subnet serves" in caplog.text)
        assert service.problems() == ["no miner of the subnet serves"]
        with pytest.raises(NotReady, match="no miner"):
            service.step("hello?")
    assert events(tmp_path) == []


def test_a_chain_that_is_away(network, tmp_path, caplog):
    with service_of(network, tmp_path, steps=0) as service:
        until(lambda: service.validator.steps > 2)
        network.chain.fail(times=10**6)
        service.chain.patience = 0.3
        until(lambda: "retry 3 of" in caplog.text)
        before = service.validator.steps
        until(lambda: service.validator.steps > before + 3)  # it goes on with what it knows
        until(lambda: any("no news of the chain" in problem for problem in service.problems()))
        network.chain.fail(times=0)
    assert "the chain failed" in caplog.text


def test_refused_weights_are_tried_again(network, tmp_path, monkeypatch, caplog):
    calls = []

    def set_weights(self, weights=None):
        calls.append(weights)
        if len(calls) == 1:
            raise RuntimeError("the chain refused the weights: too soon")
        return weights

    monkeypatch.setattr(Validator, "set_weights", set_weights)
    with service_of(network, tmp_path, no_set_weights=False, weights_every=1) as service:
        until(lambda: service.validator.steps > 2)
        network.chain.step(2)
        until(lambda: len(calls) >= 1)
        network.chain.step(1)
        until(lambda: len(calls) >= 2)
    assert "too soon; another attempt" in caplog.text and abs(sum(calls[-1].values()) - 1) < 1e-6


def test_a_full_disk_is_waited_out(network, tmp_path, caplog):
    with service_of(network, tmp_path, steps=0, save_every=1000) as service:
        until(lambda: service.validator.steps > 2)
        real, full = Journal.append, threading.Event()
        full.set()

        def append(self, event):
            if full.is_set():
                raise OSError(28, "No space left on device")
            real(self, event)

        Journal.append = append
        try:
            until(lambda: any("could not be written" in problem for problem in service.problems()))
            stood = service.validator.steps
            time.sleep(0.5)
            assert service.validator.steps <= stood + 1  # nothing is asked that could not be kept
            full.clear()
            until(lambda: service.validator.steps > stood + 3)
        finally:
            Journal.append = real
    found = [e["step"] for e in events(tmp_path)]
    assert found == list(range(len(found))) and len(found) == service.validator.steps
    assert "No space left" in caplog.text


def test_the_log_is_cut_back_where_the_disk_is_full(tmp_path):
    "A real limit on the size of files, in a process of its own."
    code = f"""
        import resource, signal, dataclasses
        from prompting_nb.loop.journal import Journal
        from prompting_nb.validators.event import Event
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        event = Event(step=0, prompt="a" * 300, uids=[1], hotkeys=["5"], scores=[0.5], propensities=[1.0], rewards=[1.0],
                      statuses=[200], completions=["b"], loss=0.1, seconds=[0.1], block=1)
        journal = Journal({str(tmp_path)!r})
        try:
            for step in range(100):
                journal.append(dataclasses.replace(event, step=step))
        except OSError as error:
            print(step, type(error).__name__)
    """
    out = subprocess.run([sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines())], capture_output=True, text=True)
    failed, kind = out.stdout.split()
    assert kind == "OSError" and [e["step"] for e in events(tmp_path)] == list(range(int(failed)))


def test_half_a_line_after_a_kill_costs_that_step_only(network, tmp_path, caplog):
    with service_of(network, tmp_path, steps=6) as service:
        assert service.join(SECONDS)
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"step": 6, "prom')
    with service_of(network, tmp_path, steps=8) as service:
        assert service.join(SECONDS)
    assert [e["step"] for e in events(tmp_path)] == list(range(8)) and "bytes were cut off" in caplog.text


def test_the_endpoint_serves_while_the_service_asks(network, tmp_path):
    import urllib.request

    with service_of(network, tmp_path, steps=0, interval=0.05) as service, Endpoint(service) as endpoint:
        def post(n):
            data = json.dumps({"prompt": f"question {n}"}).encode()
            head = {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"http://{endpoint.address}/prompt", data, head), timeout=60) as got:
                return json.load(got)

        answers = [post(n) for n in range(8)]
        assert all(len(a["answers"]) == 2 and a["best"] is not None for a in answers)
    asked = [e["prompt"] for e in events(tmp_path)]
    assert {f"question {n}" for n in range(8)} <= set(asked)


def post(address, body, path="/prompt"):
    request = urllib.request.Request(f"http://{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as got:
        return json.load(got)


def test_rewards_that_come_later_survive_a_stop_and_are_learned_in_the_same_order(network, tmp_path):
    def teach(service, steps):
        for step in steps:
            found = service.validator.pending.open[step][1]
            last = service.reward(step, {uid: 0.1 * uid + 0.01 * step for uid in found})
        return last

    given = dict(judge=later, steps=6)
    with service_of(network, tmp_path / "whole", **given) as whole:
        assert whole.join(SECONDS)
        assert teach(whole, (4, 0, 3))["waiting"] == sum(whole.validator.pending.waiting().values())
        with pytest.raises(InputError, match="no answer of step 4 waits"):
            whole.reward(4, {1: 0.5})
        with pytest.raises(InputError, match="finite"):
            whole.reward(5, {uid: math.nan for uid in whole.validator.pending.open[5][1]})
    first = service_of(network, tmp_path / "parts", **given)
    with first:
        assert first.join(SECONDS)
        teach(first, (4,))
        teach(first, (0,))
    shutil.copytree(tmp_path / "parts", tmp_path / "killed")
    for state in sorted((tmp_path / "killed").glob("state-*"))[1:]:  # as if killed before the last save
        shutil.rmtree(state)
    for folder in ("parts", "killed"):
        with service_of(network, tmp_path / folder, **given) as again:
            teach(again, (3,))
        one, other = whole.validator, again.validator
        assert one.pending.open == other.pending.open and one.averages.values == other.averages.values, folder
        torch.testing.assert_close(one.gate(PROMPTS[0]), other.gate(PROMPTS[0]))
    assert [e["step"] for e in Journal(tmp_path / "parts").late()] == [4, 0, 3]


def test_rewards_are_posted(network, tmp_path):
    with service_of(network, tmp_path, judge=later, prompts=None) as service, Endpoint(service) as endpoint:
        answer = post(endpoint.address, {"prompt": "Is 1 a number?"})
        rows = answer["answers"]
        assert answer["best"] is None and {row["because"] for row in rows} == {"new"} and rows[0]["sd"] > 0
        rewards = {str(row["uid"]): 0.5 for row in rows if row["reward"] is None}
        body = {"step": answer["step"], "rewards": rewards}
        assert post(endpoint.address, body, "/reward") == {"learned": len(rewards), "waiting": 0}
        for wrong, code in ((body, 409), ({"step": 1}, 400), ({"step": 0, "rewards": {"x": 1}}, 400), (body | {"k": 1}, 400)):
            with pytest.raises(urllib.error.HTTPError) as error:
                post(endpoint.address, wrong, "/reward")
            assert error.value.code == code


# Real processes


def command(*arguments):
    return [sys.executable, "-c", "import sys; from prompting_nb.cli import main; main(sys.argv[1:])", *map(str, arguments)]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    "A small reward model that was taught once, with its calibration, to be copied into validators' folders."
    from prompting_nb.loop.validator import open_judge

    folder = tmp_path_factory.mktemp("judged")
    open_judge(folder)
    return folder


@pytest.fixture
def served(tmp_path):
    "A chain in a process of its own whose blocks are turned by hand, and miners in this process."
    folder = tmp_path / "chain"
    chain = subprocess.Popen(command("chain", "--dir", folder, "--block-time", "0"), stderr=subprocess.DEVNULL)
    miners, clients = [], []
    try:
        until(lambda: find_chain(folder), "the chain")
        remote = find_chain(folder)
        assert read_token(folder)
        remote.register(local_wallet(folder / "wallets", "validator"), stake=1000.0, validator_permit=True)
        for worker in workers():
            wallet = local_wallet(folder / "wallets", worker.name)
            remote.register(wallet)
            clients.append(open_client(remote.address))
            settings = {"miner.no_set_weights": True, "axon.nonces": "memory"}
            miners.append(WorkerMiner(worker, config=settings, wallet=wallet, subtensor=clients[-1]))
            miners[-1].__enter__()
        yield remote.address, folder / "wallets"
    finally:
        for miner in miners:
            miner.stop_run_thread()
        for client in clients:
            client.close()
        chain.kill()
        chain.wait()


def validator_process(place, folder, judged, steps, prompts):
    import shutil

    address, wallets = place
    folder.mkdir(exist_ok=True)
    for name in ("judge.json", "judged.json"):
        if not (folder / name).exists():
            shutil.copy(judged / name, folder / name)
    flags = ["--dir", folder, "--prompts", prompts, "--reward", judged / "reward", "--subtensor.network", address]
    flags += ["--wallet.path", wallets, "--wallet.name", "validator", "--top-k", 2, "--timeout", 60]
    flags += ["--validator.interval", 0, "--validator.save_every", 7, "--validator.steps", steps]
    return subprocess.Popen(command("validator", *flags), stdout=subprocess.DEVNULL, stderr=open(folder / "log", "ab"))


def _kills(served, judged, tmp_path, kills, after):
    "Kill a validator `kills` times at random steps; compare its choices with those of one that was left alone."
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"What is {n} plus {n + 1}?" for n in range(23)))
    chance = random.Random(7)
    stops = [0]
    for _ in range(kills):
        stops.append(stops[-1] + chance.randint(1, 9))
    last = stops[-1] + after
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert validator_process(served, whole, judged, last, prompts).wait(timeout=600) == 0
    for stop in stops[1:]:
        process = validator_process(served, parts, judged, 0, prompts)
        until(lambda: (parts / "events.jsonl").exists() and (parts / "events.jsonl").read_bytes().count(b"\n") >= stop)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert validator_process(served, parts, judged, max(last, len(events(parts)) + 1), prompts).wait(timeout=600) == 0
    one, other = events(whole), events(parts)
    assert [e["step"] for e in other] == list(range(len(other)))
    for a, b in zip(one, other):
        assert (a["prompt"], a["uids"], a["rewards"]) == (b["prompt"], b["uids"], b["rewards"]), a["step"]


@pytest.mark.slow
def test_a_killed_validator_goes_on_with_the_same_choices(served, judged, tmp_path):
    _kills(served, judged, tmp_path, kills=2, after=10)


@pytest.mark.long
def test_a_validator_that_is_killed_twenty_times(served, judged, tmp_path):
    _kills(served, judged, tmp_path, kills=20, after=50)


def alive(pid):
    try:
        os.kill(pid, 0)
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (ProcessLookupError, FileNotFoundError):
        return False


def _subnet(tmp_path, judged, miners, seconds, every):
    "Kill a random process now and then; the subnet goes on, and its events have no gap."
    run = tmp_path / "run"
    flags = ["--miners", miners, "--dir", run, "--reward", judged / "reward", "--block-time", 1, "--tempo", 10]
    log = open(tmp_path / "log", "wb")
    subnet = subprocess.Popen(command("subnet", *flags), stdout=log, stderr=log)
    listed = lambda: {e["name"]: e for e in json.loads((run / "processes.json").read_text())}
    steps = lambda: len(events(run / "validator")) if (run / "validator" / "events.jsonl").exists() else 0
    chance = random.Random(3)
    try:
        until(lambda: steps() >= 3, "the first steps")
        names = ["chain", "validator", *(f"miner-{n + 1}" for n in range(miners))]
        assert sorted(listed()) == sorted(names)
        end, killed = time.monotonic() + seconds, 0
        queue = ["chain", "validator", "miner-1"]
        while time.monotonic() < end:
            name = queue.pop(0) if queue else chance.choice(names)
            pid = listed()[name]["pid"]
            os.kill(pid, signal.SIGKILL)
            killed += 1
            until(lambda: listed()[name]["pid"] != pid, f"a new {name}")
            before = steps()
            until(lambda: steps() >= before + 2, f"steps after {name} was killed")
            time.sleep(every)
        assert killed >= 3
        found = events(run / "validator")
        assert [e["step"] for e in found] == list(range(len(found)))
        pids = [entry["pid"] for entry in listed().values()]
        subnet.send_signal(signal.SIGKILL)
        subnet.wait()
        deadline = time.monotonic() + 5 + 10  # five seconds on an idle machine
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(alive, pids))
    finally:
        subnet.kill()
        subnet.wait()
        log.close()
    return run


@pytest.mark.slow
def test_a_subnet_heals(judged, tmp_path):
    run = _subnet(tmp_path, judged, miners=3, seconds=15, every=0)
    # the saved gate answers where no validator runs
    out = subprocess.run(command("route", "What is 6 times 7?", "--dir", run, "--json"), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert len(json.loads(out.stdout)["answers"]) == 3


@pytest.mark.long
def test_a_subnet_heals_for_ten_minutes(judged, tmp_path):
    _subnet(tmp_path, judged, miners=8, seconds=600, every=20)
