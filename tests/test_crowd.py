"Many miners: how many uids a network has, how many files it may open, and miners in several processes."

import json
import os

import pytest

from prompting_nb.config import InputError
from prompting_nb.loop.crowd import Crowd
from prompting_nb.loop.network import Network, allow_files
from prompting_nb.loop.tasks import Worker
from prompting_nb.network.chain import make_wallet
from prompting_nb.network.dendrite import Dendrite


def workers(n):
    return [Worker(f"worker-{i}", lambda prompt, i=i: f"{i}: {prompt}") for i in range(n)]


def test_a_network_has_as_many_uids_as_it_takes():
    assert Network(workers(3)).chain.subnet.max_uids == 256
    assert Network(workers(3), max_uids=4).chain.subnet.max_uids == 4
    assert Network(workers(256)).chain.subnet.max_uids == 257, "256 miners and the validator"
    with pytest.raises(InputError, match="max_uids 3 is too small for 4 uids"):
        Network(workers(3), max_uids=3)


def test_the_limit_of_open_files_is_raised_or_the_reason_is_said(monkeypatch):
    resource = pytest.importorskip("resource")
    limits = [[1024, 4096]]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits[-1]))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.append(list(new)))
    allow_files(100)
    assert limits == [[1024, 4096]], "enough already"
    allow_files(3000)
    assert limits[-1] == [3256, 4096]
    with pytest.raises(InputError, match="ulimit -Hn"):
        allow_files(9000)


@pytest.mark.long
def test_256_miners_in_one_process_answer():
    with Network(workers(256)) as network, Dendrite(network.wallet, allow_private=True) as dendrite:
        neurons = network.client.subnets.metagraph(1).neurons[1:]
        answers = dendrite.query(neurons, "hello", timeout=60)
    assert sorted(answer.completion for answer in answers) == sorted(f"{i}: hello" for i in range(256))


def test_a_crowd_serves_from_several_processes_and_leaves_none(tmp_path):
    with Crowd(4, per_process=2, folder=tmp_path, kinds=["calculator"]) as crowd:
        names, serving = set(crowd.processes), crowd.serving()
        assert names == {"miners-1-2", "miners-3-4"} and len(serving) == 4
        assert [neuron.hotkey for neuron in serving] == [make_wallet(f"0-miner-{i + 1}").hotkey.ss58_address for i in range(4)]
        with Dendrite(crowd.wallet, allow_private=True) as dendrite:
            answers = dendrite.query(serving, "What is 6 times 7?", timeout=20)
        assert all("42" in answer.completion for answer in answers)
        pids = list(crowd.processes.values())
    assert json.loads((tmp_path / "processes.json").read_text()) == [] and crowd.processes == {}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("wrong, says", [(dict(miners=0), "at least one"), (dict(miners=1, per_process=257), "at most 256"),
                                         (dict(miners=1, kinds=["nobody"]), "no worker 'nobody'")])
def test_wrong_numbers_are_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        Crowd(**wrong)
