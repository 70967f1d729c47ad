"""Every call to the chain ends in time: of a miner, of a validator, and of what the commands open."""

import socket
import threading
import time
from types import SimpleNamespace

import pytest

from prompting_nb.baseminer.subnet import Subnet, open_client
from prompting_nb.loop.validator import PlaceSettings
from prompting_nb.network.chain import EmbeddedChain, is_embedded, make_wallet
from prompting_nb.network.limited import CALL_TIMEOUT, BlockWatch, LimitedClient, limited
from prompting_nb.validators.validator import Validator

ME = make_wallet("validator")


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


class Node:
    "A client of a chain that stops answering when told to."

    network = "ws://embedded"

    def __init__(self, client):
        self.client, self.answers, self.hung = client, threading.Event(), threading.Event()
        self.answers.set()
        self.subnets = SimpleNamespace(metagraph=lambda netuid: self.wait() or client.subnets.metagraph(netuid))

    def wait(self):
        if not self.answers.is_set():
            self.hung.set()
            self.answers.wait(20)

    @property
    def block(self):
        self.wait()
        return self.client.block

    def execute(self, call, wallet):
        self.wait()
        return self.client.execute(call, wallet)


@pytest.fixture
def node():
    chain = EmbeddedChain()
    chain.register(ME, stake=9.0, validator_permit=True)
    with chain.client() as client:
        node = Node(client)
        yield node
        node.answers.set()


def test_a_validator_waits_no_longer_than_its_limit(node):
    gate = SimpleNamespace(resync=lambda *_: None)
    with Validator(ME, limited(node, 20), None, gate) as validator:
        node.answers.clear()
        validator.client.seconds = 0.1
        for call in (validator.sync, lambda: validator.set_weights({0: 1.0}), lambda: validator.client.block):
            with pytest.raises(TimeoutError, match="the chain did not answer within 0.1 s"):
                call()
        node.answers.set()
        validator.client.seconds = 20  # no machine is so slow
        assert validator.sync() == [] and validator.set_weights({0: 1.0}) == {0: 1.0}
    with Validator(ME, node, None, gate) as validator:  # a client without a limit gets one
        assert validator.client.seconds == CALL_TIMEOUT == Subnet(ME, node, 1).client.seconds


def test_calls_that_never_return_do_not_become_ever_more():
    "Each of them keeps its thread; those of one kind are counted together, whichever part of the client is asked."
    now, over, begun = [0.0], threading.Event(), []
    hang = lambda *_: begun.append(1) or over.wait(20)
    silent = SimpleNamespace(subnets=SimpleNamespace(metagraph=hang), at=lambda block: SimpleNamespace(read=hang), execute=lambda: 7)
    client = limited(silent, 0.01)
    client.left.clock = lambda: now[0]
    calls = [lambda: client.subnets.metagraph(1), lambda: limited(client, 0.02).subnets.metagraph(1)]
    for number in range(16):
        with pytest.raises(TimeoutError, match="did not answer within"):
            calls[number % 2]()
    until(lambda: len(begun) == 16)
    threads = threading.active_count()
    for number in range(9):
        with pytest.raises(TimeoutError, match="subnets.metagraph: 16 such calls hang; no other is begun"):
            calls[number % 2]()
        assert limited(client, 20).execute() == 7  # another kind
    for pause, tried in ((59.0, 16), (1.0, 17), (119.0, 17), (1.0, 18)):  # one is tried now and then, or it would never go on
        now[0] += pause
        with pytest.raises(TimeoutError):
            calls[0]()
        until(lambda: len(begun) == tried)
    assert threading.active_count() == threads + 2
    now[0] += 240
    silent.subnets.metagraph = lambda netuid: netuid
    patient = limited(client, 20)
    assert [patient.subnets.metagraph(n) for n in range(20)] == [*range(20)] and not client.left.calls  # though 18 still hang
    over.set()


def test_calls_that_hang_every_second_time_leave_few_threads():
    over, asked, now = threading.Event(), [0], [0.0]

    def ask(*_):
        asked[0] += 1
        return asked[0] if asked[0] % 2 else over.wait(20)

    client = limited(SimpleNamespace(execute=ask, balance=lambda: 7), 0.01)
    patient = limited(client, 20)  # for calls that are answered, on a machine that may stand still
    client.left.clock = lambda: now[0]

    def calls():
        for _ in range(70):
            for call in (client.execute if asked[0] % 2 else patient.execute, patient.balance):
                try:
                    call()
                except TimeoutError as error:
                    yield str(error)

    try:
        *_, last = calls()
        *_, last = calls()
        assert (last, asked[0]) == ("balance: 64 calls hang; no other is begun", 128)
        now[0] += 61.0  # one of each kind is tried
        assert (patient.execute(), patient.balance()) == (129, 7)
        with pytest.raises(TimeoutError, match="execute: 64 calls hang; no other is begun"):
            client.execute()
    finally:
        over.set()
    until(lambda: not client.left.alive)
    assert [patient.execute() is not None for _ in range(20)] == [True] * 20  # those that have returned count no longer


@pytest.mark.parametrize("kind", ["validator", "miner"])
def test_a_node_that_takes_connections_and_says_nothing(kind, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"://127.0.0.1:{server.getsockname()[1]}"
        for scheme in ("embedded", "ws"):
            client = open_client(scheme + address, 0.3)
            ask = {"validator": lambda c=client: c.subnets.metagraph(1), "miner": Subnet(ME, client, 1).sync}[kind]
            with pytest.raises(TimeoutError, match="did not answer within 0.3 s"):
                ask()


def test_the_clients_of_all_commands_are_limited():
    for network in ("embedded://127.0.0.1:1", "ws://127.0.0.1:1", "local"):
        client = open_client(network)
        assert isinstance(client, LimitedClient) and client.seconds == CALL_TIMEOUT
        assert is_embedded(client) == network.startswith("embedded://")
    assert PlaceSettings().subtensor.timeout == CALL_TIMEOUT


def test_a_limited_client_is_the_client_in_all_other_ways():
    chain = EmbeddedChain()
    chain.register(ME)
    with limited(chain.client(), 20.0) as client:
        chain.step(3)
        assert client.block == chain.block and client.subnets.metagraph(chain.netuid).hotkeys == [ME.hotkey.ss58_address]
        assert client.at(2).block == 2 and is_embedded(client) and client.constant is not None
        with pytest.raises(AttributeError):
            client.no_such_thing


def test_only_a_new_greatest_block_is_progress():
    watch = BlockWatch(SimpleNamespace(network="finney"))
    looks = [watch.look(100 + now // 6 % 2, float(now)) for now in range(0, 600, 6)]
    assert looks[:3] == [True, True, False] and not any(looks[2:]) and watch.problem() == "the chain has had no block after 101 for 588 s"
    for now in range(600, 894, 6):  # another chain, which goes on
        watch.look(now // 12 - 40, float(now))
    assert watch.problem()
    for now in range(894, 1500, 6):
        watch.look(now // 12 - 40, float(now))
    assert (watch.block, watch.problem()) == (84, "")
    for now in range(1500, 2200, 6):  # and one that stands still from its beginning
        watch.look(3, float(now))
    assert watch.block == 3 and watch.problem() == "the chain has had no block after 3 for 696 s"
