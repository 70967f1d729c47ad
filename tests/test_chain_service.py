"""A served chain: what it has acknowledged survives, whoever has only its address can do no more than sign, and miners meet on it."""

import asyncio
import json
import re
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import bittensor as bt
import httpx
import pytest
from bittensor.result import RpcConnectionError

from prompting_nb.baseminer.subnet import open_wallet
from prompting_nb.config import InputError
from prompting_nb.network.chain import EmbeddedChain, make_wallet
from prompting_nb.network.chain_server import ChainServer, read_token
from prompting_nb.network.command import chain_parser, find_chain, run_chain
from prompting_nb.network.remote import RemoteChain, RemoteSubstrate, open_remote
from prompting_nb.network.signing import STALE, sign_call
from prompting_nb.network.chain_store import open_chain
from prompting_nb.network.wallets import local_wallet

SECONDS = 60.0
AXON = dict(netuid=1, version=0, ip=2130706433, port=80, ip_type=4, protocol=0, placeholder1=0, placeholder2=0)


def program(*flags, **more):
    "A process `prompting-nb ...` that answers on pipes."
    command = [sys.executable, "-c", "from prompting_nb.cli import main; main()", *map(str, flags)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, **{**pipes, **more})


@contextmanager
def ended(process):
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process, pattern):
    "The first line of its output that matches, or an error with all that it said."
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(pattern, line):
            return found
    raise AssertionError("".join(said) + process.stderr.read())


@contextmanager
def serving(folder, *flags, **more):
    "A chain in a process of its own: the process, and the chain with its token."
    with ended(program("chain", "--dir", folder, *flags, **more)) as process:
        address = line_of(process, r"embedded://[\d.]+:\d+")[0]
        yield process, RemoteChain(address, read_token(folder))


def until(true, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_miner_processes_on_one_chain_get_two_uids(tmp_path):
    "All as a shell does it; only the name of the network differs from finney."
    with ended(program("chain", "--dir", tmp_path, "--register", "miner-1", "miner-2")) as made:
        assert made.wait(SECONDS) == 0, made.stderr.read()
    assert "worthless" in (tmp_path / "wallets" / "WORTHLESS.txt").read_text()
    with serving(tmp_path, "--block-time", 0.2) as (_, chain):
        flags = ["--subtensor.network", chain.address, "--wallet.path", tmp_path / "wallets", "--axon.nonces", "memory"]
        first = program("miner", *flags, "--wallet.name", "miner-1")
        second = program("miner", *flags, "--wallet.name", "miner-2")
        with ended(first), ended(second):
            uids = [int(line_of(process, r"is uid (\d+)")[1]) for process in (first, second)]
            with closing(chain.client()) as client:
                axons = [client.subnets.metagraph(1).neuron(uid).axon for uid in uids]
            assert uids == [0, 1] and len(set(axons)) == 2 and None not in axons
        stranger = program("miner", *flags, "--wallet.name", "nobody")
        with ended(stranger):
            assert stranger.wait(SECONDS) == 2 and "--wallet.name" in stranger.stderr.read()
        local_wallet(tmp_path / "wallets", "unregistered")
        with ended(program("miner", *flags, "--wallet.name", "unregistered")) as late:
            assert late.wait(SECONDS) == 2 and "prompting-nb chain --register" in late.stderr.read()


def test_what_was_acknowledged_survives_kill_9(tmp_path):
    "Several writers at once, killed in the middle, three times: every success is there, on the same address."
    wallets = [make_wallet(f"writer {i}") for i in range(4)]
    acknowledged: dict[int, int] = {}  # writer -> the newest port that was published
    with open_chain(tmp_path) as chain:
        for wallet in wallets:
            chain.register(wallet)

    def write(i, address, stopping):
        with closing(open_remote(address)) as client:
            for port in range(acknowledged.get(i, 0) + 1, 60000):
                try:
                    result = client.execute(bt.ServeAxon(1, "127.0.0.1", port), wallets[i])
                except RpcConnectionError:
                    return
                assert result.success, result.message
                acknowledged[i] = port
                if stopping.is_set():
                    return

    addresses = set()
    for attempt in range(3):
        with serving(tmp_path, "--block-time", 0.05) as (process, chain):
            addresses.add(chain.address)
            stopping = threading.Event()
            threads = [threading.Thread(target=write, args=(i, chain.address, stopping)) for i in range(4)]
            before = dict(acknowledged)
            for thread in threads:
                thread.start()
            until(lambda: all(acknowledged.get(i, 0) > before.get(i, 0) + 3 for i in range(4)))
            block = chain.block
            process.kill()
            stopping.set()
            for thread in threads:
                thread.join(SECONDS)
                assert not thread.is_alive()
        with open_chain(tmp_path) as chain:
            assert chain.block >= block
            for i, neuron in enumerate(chain.subnet.neurons):
                # the call that was under way may have been carried out as well
                assert neuron.axon["port"] - acknowledged[i] in (0, 1)
                acknowledged[i] = neuron.axon["port"]
    assert len(addresses) == 1


def test_an_answer_that_was_lost_is_given_again():
    "The connection breaks after the call was carried out: it is sent again and carried out once."
    chain, wallet = EmbeddedChain(), make_wallet("alice")
    chain.register(wallet)
    with ChainServer(chain) as server:
        substrate, lost = RemoteSubstrate(server.address), []

        class Breaking(httpx.AsyncHTTPTransport):
            async def handle_async_request(self, request):
                answer = await super().handle_async_request(request)
                if request.url.path == "/send" and not lost:
                    lost.append(await answer.aread())
                    raise httpx.ReadError("the connection broke")
                return answer

        async def send():
            await substrate.connect()
            substrate._http = httpx.AsyncClient(transport=Breaking())
            return await substrate.submit(("SubtensorModule", "serve_axon", AXON), wallet.hotkey)

        result = asyncio.run(send())
    assert lost and result.success and chain.subnet.count == 1
    assert chain.subnet.nonces[wallet.hotkey.ss58_address] == 1


def test_parameters_that_do_not_arrive_are_given_up(monkeypatch):
    monkeypatch.setattr("prompting_nb.network.chain_server._BODY", 0.3)
    head = "POST /info HTTP/1.1\r\nHost: 127.0.0.1:1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    with ChainServer(EmbeddedChain()) as server:
        with socket.create_connection(("127.0.0.1", server.port), 20) as line:
            line.sendall(head.encode())
            answer = line.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408") and b"within 0.3 s" in answer


def test_writes_need_the_key_and_the_rest_the_token(tmp_path):
    alice, mallory = make_wallet("alice"), make_wallet("mallory")
    chain = EmbeddedChain()
    chain.register(alice)
    with ChainServer(chain, token=read_token(tmp_path)) as server:
        substrate = RemoteSubstrate(server.address)

        async def attempts():
            call = ("SubtensorModule", "serve_axon", AXON)
            good = await sign_call(call, alice.hotkey, 0, chain.subnet.chain_id)
            wrong = [await sign_call(call, alice.hotkey, 0, "another chain")]
            for values in ({"params": {**AXON, "port": 81}}, {"nonce": 1}, {"signature": bytes(64)}):
                wrong.append(type(good)(**{**vars(good), **values}))
            wrong.append(type(good)(**{**vars(await sign_call(call, mallory.hotkey, 0, "embedded")),
                                       "address": alice.hotkey.ss58_address}))
            for forged in wrong:
                with pytest.raises(bt.ChainError, match="signature"):
                    await substrate.send(forged)
            assert chain.subnet.count == 0 and chain.subnet.neurons[0].axon is None
            assert (await substrate.send(good)).success
            again = await sign_call(call, alice.hotkey, 0, chain.subnet.chain_id)
            with pytest.raises(bt.ChainError) as refused:
                await substrate.send(again)
            assert refused.value.name == STALE
            await substrate.close()

        asyncio.run(attempts())
        for operator in (RemoteChain(server.address), RemoteChain(server.address, "guess")):
            for forbidden in (lambda: operator.step(), lambda: operator.register(mallory),
                              lambda: operator.fund(mallory, 5), lambda: operator.set_stake(alice, 5),
                              lambda: operator.replace(0, mallory)):
                with pytest.raises(PermissionError, match="token"):
                    forbidden()
        assert (chain.block, len(chain.subnet.neurons)) == (1, 1)
        assert RemoteChain(server.address, read_token(tmp_path)).step(4) == 5
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600


def test_calls_of_one_hotkey_from_several_processes_wait_for_each_other():
    chain, wallet = EmbeddedChain(), make_wallet("alice")
    chain.register(wallet)
    results = []
    with ChainServer(chain) as server:
        def write(port):
            with closing(open_remote(server.address)) as client:
                results.extend(client.execute(bt.ServeAxon(1, "127.0.0.1", port + i), wallet) for i in range(5))

        threads = [threading.Thread(target=write, args=(1000 * i + 1,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert len(results) == 20 and all(results) and chain.subnet.count == 20


def limit_files():
    "Let no file of this process grow beyond 300 kB: a full disk."
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_a_full_disk_refuses_and_loses_nothing(tmp_path):
    wallet = make_wallet("alice")
    with open_chain(tmp_path) as chain:
        chain.register(wallet)
    served, refused = 0, None
    with serving(tmp_path, "--block-time", 0, preexec_fn=limit_files) as (process, chain):
        for port in range(1, 2000):
            with closing(chain.client()) as client:
                try:
                    result = client.execute(bt.ServeAxon(1, "127.0.0.1", port), wallet)
                except RpcConnectionError as error:
                    refused = str(error)
                    break
            assert result.success, result.message
            served = port
        assert served and "cannot store the chain" in refused
        with closing(chain.client()) as client:  # it still answers, with what is stored
            assert client.subnets.metagraph(1).neuron(0).axon == f"127.0.0.1:{served}"
        newest = 1
        try:
            newest = chain.step()  # SQLite may have found some room in its log
        except RpcConnectionError as error:
            assert "cannot store" in str(error)
        process.send_signal(signal.SIGTERM)
        process.wait(SECONDS)
    with open_chain(tmp_path) as chain:
        assert (chain.subnet.neurons[0].axon["port"], chain.block) == (served, newest)


def test_the_command_says_what_is_wrong(tmp_path):
    with open_chain(tmp_path / "a", netuid=3):
        for flags, cause in (
            (["--dir", tmp_path / "a"], "another process"),
            (["--dir", tmp_path / "b", "--stake", 5], "--register"),
            (["--dir", tmp_path / "b", "--block-time", -1], "at least 0"),
            (["--dir", tmp_path / "b", "--register", "../x"], "cannot name a wallet"),
            ([], "dir"),
        ):
            with ended(program("chain", *flags)) as process:
                assert process.wait(SECONDS) == 2
                said = process.stderr.read()
                assert cause in said and said.count("\n") == 1, said
    with pytest.raises(InputError, match="HOST:PORT"):
        open_remote("embedded://nowhere")
    busy = socket.create_server(("127.0.0.1", 0))
    with closing(busy), ended(program("chain", "--dir", tmp_path / "c", "--port", busy.getsockname()[1])) as process:
        assert process.wait(SECONDS) == 2 and "--port" in process.stderr.read()


def test_a_chain_that_runs_is_registered_on_and_turned_from_another_process(tmp_path):
    with serving(tmp_path, "--block-time", 0) as (process, chain):
        with ended(program("chain", "--dir", tmp_path, "--register", "v", "--stake", 7, "--permit", "--step", 9)) as other:
            out, err = other.communicate(timeout=SECONDS)
            assert other.returncode == 0, err
        assert "v is uid 0" in out and chain.block == 10
        for flags, says in ((["--tempo", 5, "--step", 1], "leave out --tempo"), (["--netuid", 7, "--step", 1], "--netuid"),
                            (["--port", 9944, "--step", 1], "--port is for serving")):
            with ended(program("chain", "--dir", tmp_path, *flags)) as other:
                assert other.wait(SECONDS) == 2 and says in other.stderr.read()
        assert chain.block == 10, "what is refused changes nothing"
        with closing(chain.client()) as client:
            neuron = client.subnets.metagraph(1).neuron(0)
            assert (neuron.total_stake.amount, neuron.validator_permit) == (7, True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    found = json.loads((tmp_path / "chain.json").read_text())
    assert (found["address"], found["pid"]) == (chain.address, process.pid)


def test_registering_and_committing_through_a_served_chain_that_is_started_again(tmp_path):
    alice, bob = make_wallet("alice"), make_wallet("bob")
    settings = dict(tempo=10, commit_reveal=True, burn=1)
    with open_chain(tmp_path, **settings) as chain, ChainServer(chain, token="t") as server:
        operator = RemoteChain(server.address, "t")
        operator.register(alice, stake=9, validator_permit=True)
        operator.fund(bob, 1.5)
        with closing(operator.client()) as client:
            assert client.execute(bt.BurnedRegister(netuid=1), bob).success
            again = client.execute(bt.BurnedRegister(netuid=1, hotkey_ss58=make_wallet("c").hotkey.ss58_address), bob)
            assert again.error.name == "NotEnoughBalanceToStake"
            operator.step()
            client.execute(bt.SetWeights(netuid=1, weights={1: 1.0}), alice).raise_for_failure()
            assert operator.weights == {} and len(client.weights.timelocked_weight_commits(1)[0]) == 1
        before = {name: getattr(chain.subnet, name) for name in chain.subnet.contents}
        assert before["count"] == len(before["receipts"]) == 5  # a carrier and its inner call, twice, and a commit
    with open_chain(tmp_path) as chain, ChainServer(chain, token="t") as server:
        assert {name: getattr(chain.subnet, name) for name in before} == before
        assert chain.subnet.rules.commit_reveal and chain.subnet.balances[bob.coldkeypub.ss58_address] == 5 * 10**8
        operator = RemoteChain(server.address, "t")
        operator.step(10)
        assert operator.weights == {0: {1: 1.0}}
        with closing(operator.client()) as client:
            assert client.subnets.metagraph(1).neuron(1).incentive == 1


def test_a_store_of_an_earlier_version_gets_the_defaults_of_new_fields(tmp_path):
    with open_chain(tmp_path) as chain:
        chain.register(make_wallet("alice"), stake=3)
    with closing(sqlite3.connect(tmp_path / "chain.sqlite")) as db, db:
        (record,) = db.execute("select record from neurons").fetchone()
        older = {name: value for name, value in json.loads(record).items() if name not in ("bonds", "emission", "active")}
        db.execute("update neurons set record = ?", (json.dumps(older),))
    with open_chain(tmp_path) as chain:
        neuron = chain.subnet.neurons[0]
        assert (neuron.stake, neuron.bonds, neuron.emission, neuron.active) == (3 * 10**9, {}, 0, True)
    with closing(sqlite3.connect(tmp_path / "chain.sqlite")) as db, db:
        db.execute("update neurons set record = 'x'")
    with pytest.raises(InputError, match="damaged"), open_chain(tmp_path):
        pass


def test_a_damaged_store_is_named_whatever_is_damaged(tmp_path):
    for number, (change, says) in enumerate((
        ("update settings set value = 'x'", "is damaged"),
        ("drop table settings", "is damaged"),
        ("drop table accounts", "is damaged"),
        ("insert into settings values ('colour', '1')", r"does not know \(colour\)"),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        with open_chain(folder) as chain:
            chain.register(make_wallet("alice"))
        with closing(sqlite3.connect(folder / "chain.sqlite")) as db, db:
            db.execute(change)
        with pytest.raises(InputError, match=says), open_chain(folder):
            pass


def test_a_chain_that_the_disk_does_not_take_is_not_said_to_be_none(tmp_path):
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with ended(program("chain", "--dir", tmp_path, "--step", 1, preexec_fn=full)) as process:
        assert process.wait(SECONDS) == 2
        assert "chain.sqlite cannot be used (" in process.stderr.read()


@pytest.mark.parametrize("key", ["garbage", "", "{}", "[]", '{"secretSeed": 5}', '{"ss58Address": "x"}'])
def test_a_hotkey_that_is_none_is_bad_input(tmp_path, key):
    local_wallet(tmp_path, "me")
    (tmp_path / "me" / "hotkeys" / "default").write_text(key)
    with pytest.raises(InputError, match="hotkey default of wallet me in .* cannot be opened .*: choose another with --wallet.name"):
        open_wallet("me", "default", str(tmp_path))
    with pytest.raises(InputError, match="the wallet .*me is damaged .*: delete it"):
        local_wallet(tmp_path, "me")


def test_names_are_registered_all_or_none_and_who_is_pruned_is_said(tmp_path):
    said = []

    def act(*flags):
        run_chain(chain_parser().parse_args(["--dir", str(tmp_path), *flags]), said.append)

    act("--register", "a", "--max-uids", "3")
    with pytest.raises(InputError, match="a: hotkey .* is registered already, as uid 0: leave out a"):
        act("--register", "b", "a")
    with open_chain(tmp_path) as chain:
        assert len(chain.subnet.neurons) == 1
    act("--register", "b", "c", "d")
    assert "d is uid 0 in place of 5" in said[-1]
    with pytest.raises(InputError, match="has 3 uids, more than 2"):
        act("--step", "1", "--max-uids", "2")
    act("--step", "1")  # the refused number is not kept


def test_another_chain_at_an_old_address_is_not_taken_for_ones_own(tmp_path):
    ours = tmp_path / "ours"
    ours.mkdir()
    with open_chain(tmp_path / "other") as chain, ChainServer(chain, token="t") as server:
        for name, found in ((chain.subnet.chain_id, True), ("embedded-another", False)):
            (ours / "chain.json").write_text(json.dumps({"address": server.address, "chain_id": name}))
            assert (find_chain(ours) is not None) == found
        for odd in ("5", '{"address": 5}', '{"address": "embedded://nowhere"}'):
            (ours / "chain.json").write_text(odd)
            assert find_chain(ours) is None
