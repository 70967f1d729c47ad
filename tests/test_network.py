"""What the network pages promise and cannot show in prose: hostile bytes, order under load, shutdown, leaks."""

import asyncio
import dataclasses
import gc
import gzip
import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import bittensor as bt
import pytest
from bittensor import http_auth
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import OnePiece
from prompting_nb.network import isolation
from prompting_nb.network import metrics as metrics_module
from prompting_nb.network.auth import FileNonces, Refusal
from prompting_nb.network.axon import Axon
from prompting_nb.network.chain import EmbeddedChain, make_wallet
from prompting_nb.network.dendrite import Dendrite
from prompting_nb.network.isolation import Isolated
from prompting_nb.network.metrics import Metrics
from prompting_nb.network.queue import WorkQueue, time_left
from prompting_nb.network.server import Limits
from prompting_nb.protocol import Prompting, write_body

MINER, VALIDATOR, STRANGER = (make_wallet(name) for name in ("miner", "validator", "stranger"))
SECONDS = 30  # longest wait for something that must happen; never a wait for something that must not


def echo(synapse):
    synapse.completion = synapse.prompt
    return synapse


def sign(body, wallet=VALIDATOR, path="/Prompting", method="POST", receiver=MINER.hotkey.ss58_address, **more):
    return http_auth.sign(wallet, method=method, path=path, body=body, receiver_ss58=receiver, **more)


def post(axon, body, headers, path="/Prompting", method="POST"):
    connection = OnePiece(axon.host, axon.port, timeout=SECONDS)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), dict(answer.getheaders())
    finally:
        connection.close()


def ask(axon, text="hello", wallet=VALIDATOR, timeout=SECONDS):
    body = write_body(Prompting.ask(text, timeout=timeout))
    return post(axon, body, sign(body, wallet))


def raw(axon, data):
    "Send bytes as they are; the status that comes back, or None when the line is closed without one."
    with socket.create_connection((axon.host, axon.port), timeout=SECONDS) as line:
        try:
            line.sendall(data)
            head = line.recv(4096).split(b"\r\n")[0].split(b" ")
            return int(head[1]) if len(head) > 1 else None
        except ConnectionError:
            return None


def until(condition):
    "Wait until `condition()` holds, which another thread brings about."
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def until_begun(axon, begun, text="hello"):
    "Ask for a tenth of a second, until the handler has begun before it was over: a machine may stand still for so long."
    before = axon.health()["running"]

    def asked():
        assert ask(axon, text, timeout=0.1)[0] == 504
        until(lambda: begun() or axon.health()["running"] == before)
        return begun()

    until(asked)


def threads_of(owner):
    "Names of the threads that still belong to an axon, or to dendrites."
    name = f"axon-{owner.port}" if isinstance(owner, Axon) else owner
    return sorted(t.name for t in threading.enumerate() if t.name.startswith(name))


@pytest.fixture
def axon():
    with Axon(MINER, max_body=10_000, body_timeout=0.3, drain=1).attach(echo) as axon:
        yield axon


class Held:
    "A forward function that waits until it is released, and remembers whom it served."

    def __init__(self):
        self.free, self.entered, self.served = threading.Event(), threading.Event(), []

    def __call__(self, synapse):
        self.served.append(synapse.prompt)
        self.entered.set()
        if synapse.prompt == "hold":
            self.free.wait(SECONDS)
        return echo(synapse)


# The chain ------------------------------------------------------------------------------------------------------------


def test_chain_and_client_touch_no_disk(tmp_path):
    code = """
        import bittensor as bt
        from prompting_nb.network.chain import EmbeddedChain, make_wallet
        chain, wallet = EmbeddedChain(), make_wallet(1)
        chain.register(wallet, validator_permit=True)
        with chain.client() as client:
            client.execute(bt.ServeAxon(1, "127.0.0.1", 80), wallet).raise_for_failure()
            client.execute(bt.SetWeights(1, weights={0: 1}), wallet).raise_for_failure()
            client.subnets.metagraph(1)
    """
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_chain_announces_blocks_to_those_who_wait():
    chain = EmbeddedChain()
    with chain.client() as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait_for_block, 3, timeout=SECONDS)
        until(lambda: chain.substrate.listeners)
        chain.step(2)
        assert waiting.result(SECONDS).number == 3
        until(lambda: not chain.substrate.listeners)


def test_chain_takes_concurrent_writes():
    chain = EmbeddedChain()
    wallets = [make_wallet(i) for i in range(16)]

    def join(i):
        uid = chain.register(wallets[i])
        with chain.client() as client:
            client.execute(bt.ServeAxon(1, "127.0.0.1", 1000 + i), wallets[i]).raise_for_failure()
        return uid

    with ThreadPoolExecutor(8) as pool:
        uids = list(pool.map(join, range(16)))
    with chain.client() as client:
        metagraph = client.subnets.metagraph(1)
    assert sorted(uids) == list(range(16))
    for i, uid in enumerate(uids):
        assert (metagraph.neuron(uid).hotkey, metagraph.neuron(uid).axon) == (
            wallets[i].hotkey.ss58_address, f"127.0.0.1:{1000 + i}")


@pytest.mark.parametrize("signature", [b"", b"\0" * 64, None, STRANGER.hotkey.sign(b"something else")],
                         ids=["empty", "zeros", "none", "of something else"])
def test_chain_refuses_a_signature_that_does_not_verify(signature):
    chain = EmbeddedChain()
    chain.register(MINER)
    key = MINER.hotkey
    signer = SimpleNamespace(ss58_address=key.ss58_address, public_key=key.public_key, crypto_type=1,
                             sign=lambda payload: signature)
    with chain.client() as client:
        result = client.execute(bt.ServeAxon(1, "127.0.0.1", 80), signer)
        assert not result.success and "signature" in result.message
        assert client.subnets.metagraph(1).neuron(0).axon is None


def test_chain_awaits_a_signer_that_takes_its_time():
    chain = EmbeddedChain()
    chain.register(MINER)

    class Device:
        ss58_address, public_key, crypto_type = MINER.hotkey.ss58_address, MINER.hotkey.public_key, 1

        async def sign(self, payload):
            await asyncio.sleep(0)
            return MINER.hotkey.sign(payload)

    with chain.client() as client:
        assert client.execute(bt.ServeAxon(1, "::1", 80), Device()).success
        assert client.subnets.metagraph(1).neuron(0).axon == "[::1]:80"
        assert client.execute(bt.intents.ResetAxon(1), MINER).success
        assert client.subnets.metagraph(1).neuron(0).axon is None


def test_chain_forgets_a_neuron_that_is_replaced():
    chain = EmbeddedChain()
    for wallet in (MINER, VALIDATOR):
        chain.register(wallet, validator_permit=True)
    with chain.client() as client:
        for wallet in (MINER, VALIDATOR):
            client.execute(bt.SetWeights(1, weights={0: 1, 1: 1}), wallet).raise_for_failure()
        client.execute(bt.ServeAxon(1, "127.0.0.1", 80), MINER).raise_for_failure()
        chain.replace(0, STRANGER)
        assert chain.weights == {1: {1: 1.0}}
        assert client.subnets.metagraph(1).neuron(0).axon is None


def test_chain_refuses_the_coldkey_and_wrong_weights():
    chain = EmbeddedChain()
    chain.register(MINER, validator_permit=True)
    with chain.client() as client:
        refused = client.execute(bt.ServeAxon(1, "127.0.0.1", 80), MINER.coldkey)
        assert refused.error.name == "HotKeyNotRegisteredInSubNet"
        assert client.execute(bt.SetWeights(1, weights={5: 1}), MINER).error.name == "UidVecContainInvalidOne"
        with pytest.raises(bt.ChainError, match="not registered"):
            client.execute(bt.SetWeights(1, weights={0: 1}), STRANGER)
    assert chain.weights == {}


def test_asynchronous_client_reads_the_same_chain():
    chain = EmbeddedChain()
    chain.register(MINER, stake=2.5)

    async def read():
        async with bt.Client("ws://embedded", substrate=chain.substrate) as client:
            return await client.subnets.metagraph(1)

    assert asyncio.run(read()).neuron(0).total_stake.amount == 2.5


# The axon: who is calling ---------------------------------------------------------------------------------------------


def test_identity_is_the_signer_whatever_the_body_says():
    seen = []

    def remember(synapse):
        seen.append(synapse.dendrite.hotkey)
        return echo(synapse)

    body = json.dumps({"roles": ["user"], "messages": ["x"], "dendrite": {"hotkey": "5Forged"},
                       "axon": {"hotkey": "5Forged"}, "completion": "mine"}).encode()  # fmt: skip
    with Axon(MINER).attach(remember, lambda s: seen.append(s.dendrite.hotkey), lambda s: 1) as axon:
        status, answer, _ = post(axon, body, sign(body))
    assert (status, answer) == (200, {"completion": "x"})
    assert seen == [VALIDATOR.hotkey.ss58_address] * 2


BODY = write_body(Prompting.ask("hello"))
ATTACKS = {
    "no headers": (BODY, lambda: {}, "MalformedAuth"),
    "empty signature": (BODY, lambda: sign(BODY) | {"X-Bittensor-Signature": ""}, "MalformedAuth"),
    "signature of zeros": (BODY, lambda: sign(BODY) | {"X-Bittensor-Signature": "0x" + "00" * 64}, "BadSignature"),
    "other receiver": (BODY, lambda: sign(BODY, receiver=STRANGER.hotkey.ss58_address), "WrongReceiver"),
    "no receiver": (BODY, lambda: sign(BODY, receiver=None), "WrongReceiver"),
    "stale nonce": (BODY, lambda: sign(BODY, nonce_ns=time.time_ns() - 11 * 10**9), "StaleRequest"),
    "future nonce": (BODY, lambda: sign(BODY, nonce_ns=time.time_ns() + 30 * 10**9), "StaleRequest"),
    "edited body": (BODY.replace(b"hello", b"jello"), lambda: sign(BODY), "BadSignature"),
    "edited timeout": (BODY.replace(b"12.0", b"99.0"), lambda: sign(BODY), "BadSignature"),
    "edited nonce": (BODY, lambda: sign(BODY) | {"X-Bittensor-Nonce": str(time.time_ns())}, "BadSignature"),
    "signed for GET": (BODY, lambda: sign(BODY, method="GET"), "BadSignature"),
    "signed for a query": (BODY, lambda: sign(BODY, path="/Prompting?x=1"), "BadSignature"),
    "another's hotkey": (BODY, lambda: sign(BODY, STRANGER)
                         | {"X-Bittensor-Hotkey": VALIDATOR.hotkey.ss58_address}, "BadSignature"),
    "hotkey null": (BODY, lambda: sign(BODY) | {"X-Bittensor-Hotkey": "null"}, "MalformedAuth"),
    "unknown scheme": (BODY, lambda: sign(BODY) | {"X-Bittensor-Crypto": "none"}, "MalformedAuth"),
    "other version": (BODY, lambda: sign(BODY) | {"X-Bittensor-Version": "2"}, "MalformedAuth"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_request_that_does_not_prove_its_sender_is_refused(axon, attack):
    body, headers, reason = ATTACKS[attack]
    status, answer, _ = post(axon, body, headers())
    assert status == 401 and answer["error"].startswith(reason)


def test_a_request_is_good_once_also_across_a_restart(axon):
    headers = sign(BODY)
    assert [post(axon, BODY, headers)[0] for _ in range(2)] == [200, 401]
    axon.stop()
    assert post(axon.start(), BODY, headers)[0] == 401
    with Axon(MINER).attach(echo) as reborn:  # another process with the same key knows no nonces
        status, answer, _ = post(reborn, BODY, headers)
    assert status == 401 and "before this miner began" in answer["error"]


@pytest.mark.parametrize("given", [str, FileNonces])
def test_an_axon_that_is_started_again_goes_on_with_its_nonces(tmp_path, given):
    axon = Axon(MINER, nonces=given(tmp_path / "nonces")).attach(echo)
    with axon:
        headers = sign(BODY)
        assert post(axon, BODY, headers)[0] == 200
    with axon:
        assert [post(axon, BODY, headers)[0], ask(axon)[0]] == [401, 200]


def test_a_request_behind_another_one_begins_without_its_time_limit():
    async def answered(synapse):
        return echo(synapse)

    left = []
    with Axon(MINER).attach(answered, lambda synapse: left.append(time_left())) as axon:
        requests = []
        for _ in range(2):
            head = {"host": "x", "content-length": len(BODY), **sign(BODY)}
            lines = ["POST /Prompting HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
            requests.append("\r\n".join([*lines, "", ""]).encode() + BODY)
        with socket.create_connection((axon.host, axon.port), timeout=SECONDS) as line:
            line.sendall(b"".join(requests))
            until(lambda: len(left) == 2)
    assert left == [math.inf, math.inf]


def completion_of(isolated):
    "What a new worker answers, or the status with which the call is refused."
    while isolated._idle:
        isolated._idle.pop().kill()
    try:
        return isolated(Prompting.ask("hello", timeout=SECONDS)).completion
    except Refusal as refusal:
        return refusal.status


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_make_workers_are_kept_when_both_are_late():
    with Isolated(echo) as isolated:
        until(lambda: completion_of(isolated) == "hello" and len(isolated._templates) == 2)
        templates, processes = [*isolated._templates], [template._process for template in isolated._templates]
        for template, process in zip(templates, processes):
            template._orders.settimeout(0.5)  # for those that do not answer: others have their time
            process.suspend()  # as in a cgroup that is frozen
        assert [completion_of(isolated) for _ in range(4)] == [503] * 4
        assert all(template.alive for template in isolated._templates) and len(isolated._templates) == 2
        for template, process in zip(templates, processes):
            template._orders.settimeout(isolation._ANSWER_TIME)
            process.resume()
        until(lambda: completion_of(isolated) == "hello")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_makes_workers_and_stays_silent_is_replaced_by_its_twin():
    with Isolated(echo) as isolated:
        until(lambda: completion_of(isolated) == "hello" and len(isolated._templates) == 2)
        silent = isolated._templates[0]._process
        isolated._templates[0]._orders.settimeout(0.5)  # its twin has its time
        silent.suspend()
        assert completion_of(isolated) == 503
        until(lambda: completion_of(isolated) == "hello" and len(isolated._templates) == 2)
        until(lambda: not silent.is_running() or silent.status() == "zombie")
        assert silent not in [template._process for template in isolated._templates]


def test_freshness_follows_the_given_clock():
    now = [time.time_ns()]
    with Axon(MINER, clock=lambda: now[0]).attach(echo) as axon:
        headers = sign(BODY, nonce_ns=now[0])
        now[0] += 11 * 10**9
        assert post(axon, BODY, headers)[1]["error"].startswith("StaleRequest")


def test_blacklisted_callers_get_the_reason_and_the_body_is_not_read():
    with Axon(MINER).attach(echo, lambda s: (s.dendrite.hotkey == VALIDATOR.hotkey.ss58_address, "no permit")) as axon:
        nonsense = b"this is not JSON"
        status, answer, _ = post(axon, nonsense, sign(nonsense))
        assert (status, answer) == (403, {"error": "no permit"})
        assert ask(axon, wallet=STRANGER)[0] == 200


# The axon: bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [
    b"", b"{", b"null", b"[]", b"[" * 4000, b'{"roles": ["user"]}', b'{"roles": [], "messages": []}',
    b'{"roles": ["user"], "messages": ["a", "b"]}', b'{"roles": ["user"], "messages": [null]}',
    b'{"roles": ["user"], "messages": ["x"], "timeout": -1}', b'{"roles": ["user"], "messages": ["x"], "timeout": NaN}',
    b'{"roles": ["user"], "messages": ["x"], "timeout": 1e999}', b"\xff\xfe\x00",
    b'{"roles": ["user"], "messages": ["\\ud800"]}',
])  # fmt: skip
def test_malformed_bodies_are_the_callers_fault(axon, body):
    status, answer, _ = post(axon, body, sign(body))
    assert status == 400 and "\n" not in answer["error"]
    assert ask(axon)[0] == 200


def test_size_limits(axon):
    big = b" " * 10_001
    assert post(axon, big, sign(big))[0] == 413
    announced = b"POST /Prompting HTTP/1.1\r\nhost: x\r\ncontent-length: 50000000\r\n\r\n"
    assert raw(axon, announced) == 413  # not one byte of the body was needed
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    assert raw(axon, b"POST /Prompting HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + 3 * chunk) == 413
    assert raw(axon, b"POST /Prompting HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 20_000 + b"\r\ncontent-length: 0\r\n\r\n") == 431
    assert raw(axon, b"POST /Prompting HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nthe rest never comes") == 408
    assert ask(axon)[0] == 200


def test_other_paths_and_methods(axon):
    assert post(axon, None, {}, "/", "GET")[0] == 404
    assert post(axon, None, {}, "/Prompting", "GET")[0] == 405
    assert post(axon, BODY, sign(BODY, path="/prompting"), "/prompting")[0] == 404
    assert post(axon, None, {}, "/health", "GET")[1]["status"] == "ok"


def test_health_is_for_this_machine_only(axon):
    async def get(client):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/health", "client": client, "headers": []}
        await axon(scope, None, send)
        return sent[0]["status"]

    callers = [("127.0.0.1", 1), ("::1", 1), ("192.0.2.7", 1), None]
    assert [asyncio.run(get(caller)) for caller in callers] == [200, 200, 403, 403]


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=300), signed=st.booleans())
def test_generated_nonsense_is_never_our_error(nonsense_axon, data, signed):
    if signed:
        status = post(nonsense_axon, data, sign(data))[0]
    else:
        status = raw(nonsense_axon, b"POST /Prompting HTTP/1.1\r\nhost: x\r\n" + data + b"\r\n\r\n")
    assert status is None or 400 <= status < 500


@pytest.fixture(scope="module")
def nonsense_axon():
    with Axon(MINER, body_timeout=0.3).attach(echo) as axon:
        yield axon
        assert ask(axon)[0] == 200


def test_limits_are_shared_by_servers_that_share_nothing_else():
    told = []
    limits = Limits(head_timeout=0.2, refused=told.append)
    with Axon(MINER, limits=limits).attach(echo) as one, Axon(MINER, limits=limits).attach(echo) as two:
        assert raw(one, b"GET / HTTP/1.1\r\nhost: x\r\nx: ") == 408
        refused = [a.metrics.registry.get_sample_value("axon_connections_refused_total", {"reason": "slow"})
                   for a in (one, two)]  # fmt: skip
        assert (refused, told) == ([1, None], ["slow"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        limits.refused = None


# The axon: work -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward, reason", [
    (lambda s: None, "returned NoneType"), (lambda s: s, "left the completion empty"),
    (lambda s: "text", "returned str"), (lambda s: 1 / 0, "the miner failed (error "),
    (lambda s: sys.exit(3), "the miner failed"), (lambda s: next(iter(())), "the miner failed"),
])  # fmt: skip
def test_a_handler_that_fails_costs_its_caller_only(forward, reason, caplog):
    with Axon(MINER).attach(forward) as axon:
        for _ in range(3):
            status, answer, _ = ask(axon)
            assert status == 500 and reason in answer["error"] and "Traceback" not in answer["error"]
        assert post(axon, None, {}, "/health", "GET")[0] == 200


def test_an_asynchronous_handler_that_exits_does_not_end_the_server(caplog):
    async def leave(synapse):
        raise KeyboardInterrupt

    with Axon(MINER).attach(leave) as axon:
        assert [ask(axon)[0] for _ in range(2)] == [500, 500]


def test_policy_that_fails_refuses(caplog):
    with Axon(MINER).attach(echo, lambda s: 1 / 0) as axon:
        assert ask(axon)[0] == 403
    with Axon(MINER).attach(echo, None, lambda s: 1 / 0) as axon:
        assert ask(axon)[:2] == (500, {"error": "internal error"})


def test_a_plain_handler_does_not_block_the_loop():
    held = Held()
    with Axon(MINER, workers=1).attach(held) as axon, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, axon, "hold")
        assert held.entered.wait(SECONDS)
        assert post(axon, None, {}, "/health", "GET")[1]["running"] == 1  # answered while the handler is in its thread
        held.free.set()
        assert slow.result()[0] == 200


def test_priority_orders_what_waits_without_inversions():
    wallets = [make_wallet(f"caller {i}") for i in range(24)]
    stake = {w.hotkey.ss58_address: float(i % 6) for i, w in enumerate(wallets)}
    held = Held()
    axon = Axon(MINER, workers=1).attach(held, None, lambda s: stake.get(s.dendrite.hotkey, 100.0))
    with axon, ThreadPoolExecutor(32) as pool:
        pool.submit(ask, axon, "hold")
        assert held.entered.wait(SECONDS)
        for n, i in enumerate([7, 3, 20, 11, 0, 15, 23, 1, 18, 9, 5, 12, 2, 22, 6, 16, 4, 13, 8, 21, 10, 17, 14, 19]):
            pool.submit(ask, axon, f"{stake[wallets[i].hotkey.ss58_address]:g} {n}", wallets[i])
            until(lambda waiting=n + 1: axon.health()["waiting"] == waiting)
        held.free.set()
        until(lambda: len(held.served) == 25)
    order = [(-float(p), int(n)) for p, n in (text.split() for text in held.served[1:])]
    assert order == sorted(order)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=30), st.integers(1, 4))
def test_work_queue_serves_by_priority_then_arrival(priorities, workers):
    async def serve():
        line, served = WorkQueue(workers, limit=100), []

        async def work(i):
            slot = await line.slot(priorities[i])
            served.append(i)
            slot.release()

        busy = [await line.slot(0) for _ in range(workers)]
        rest = [asyncio.ensure_future(work(i)) for i in range(len(priorities))]
        await asyncio.sleep(0)
        for slot in busy:
            slot.release()
        await asyncio.gather(*rest)
        return served

    assert asyncio.run(serve()) == sorted(range(len(priorities)), key=lambda i: (-priorities[i], i))


def test_a_full_queue_says_when_to_come_back():
    held = Held()
    with Axon(MINER, workers=1, max_queue=1).attach(held) as axon, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(ask, axon, "hold")]
        assert held.entered.wait(SECONDS)
        waiting.append(pool.submit(ask, axon, "waits"))
        until(lambda: axon.health()["waiting"] == 1)
        status, answer, headers = ask(axon, "too much")
        assert (status, answer["error"], headers["retry-after"]) == (503, "the queue is full", "1")
        held.free.set()
        assert [w.result()[0] for w in waiting] == [200, 200]
    assert "too much" not in held.served


def test_work_whose_caller_is_gone_or_late_is_not_started():
    held = Held()
    with Axon(MINER, workers=1).attach(held) as axon, ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, axon, "hold")
        assert held.entered.wait(SECONDS)
        body = write_body(Prompting.ask("gone"))
        headers = "".join(f"{k}: {v}\r\n" for k, v in sign(body).items())
        request = f"POST /Prompting HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body
        line = socket.create_connection((axon.host, axon.port))
        line.sendall(request)
        until(lambda: axon.health()["waiting"] == 1)
        line.close()
        until(lambda: axon.health()["waiting"] == 0)
        assert ask(axon, "late", timeout=0.05)[:2] == (504, {"error": "no answer within 0.05 s"})
        held.free.set()
        assert first.result()[0] == 200
        assert ask(axon, "after")[0] == 200
    assert held.served == ["hold", "after"]


def test_an_asynchronous_handler_is_cancelled_when_the_time_is_up():
    cancelled = threading.Event()

    async def slow(synapse):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with Axon(MINER, workers=1).attach(slow) as axon:
        until_begun(axon, cancelled.is_set)
        until(lambda: axon.health()["running"] == 0)


def test_a_thread_that_hangs_keeps_its_worker_and_no_more():
    held = Held()
    with Axon(MINER, workers=2).attach(held) as axon:
        until_begun(axon, held.entered.is_set, "hold")
        assert axon.health()["running"] == 1  # honest: the thread still runs
        assert ask(axon, "free")[0] == 200
        held.free.set()
        until(lambda: axon.health()["running"] == 0)


def test_a_caller_is_held_to_the_longest_timeout():
    held = Held()
    with Axon(MINER, max_timeout=0.1).attach(held) as axon:
        assert ask(axon, "hold", timeout=1000)[:2] == (504, {"error": "no answer within 0.1 s"})
        held.free.set()


def test_the_time_that_a_body_takes_counts():
    held = Held()
    body = write_body(Prompting.ask("hello", timeout=0.2))
    with Axon(MINER).attach(held) as axon, socket.create_connection((axon.host, axon.port), timeout=SECONDS) as line:
        headers = "".join(f"{k}: {v}\r\n" for k, v in sign(body).items())
        line.sendall(f"POST /Prompting HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{headers}\r\n".encode() + body[:-1])
        time.sleep(0.3)  # longer than this caller wants to wait
        line.sendall(body[-1:])
        assert line.recv(4096).startswith(b"HTTP/1.1 504 ")
    assert held.served == []


def test_sixteen_at_once():
    callers = [make_wallet(f"caller {i}") for i in range(16)]

    def whoami(synapse):
        synapse.completion = synapse.dendrite.hotkey
        return synapse

    with Axon(MINER).attach(whoami) as axon, ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda i: ask(axon, wallet=callers[i % 16])[1]["completion"], range(160))
        assert list(answers) == [callers[i % 16].hotkey.ss58_address for i in range(160)]


# The axon: start and stop ---------------------------------------------------------------------------------------------


def test_stop_lets_work_end_and_refuses_more():
    held = Held()
    axon = Axon(MINER, workers=2, drain=SECONDS).attach(held).start()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, axon, "hold")
        assert held.entered.wait(SECONDS)
        stopping = pool.submit(axon.stop)
        until(lambda: axon.health()["status"] == "stopping")
        assert ask(axon)[:2] == (503, {"error": "the miner is stopping"})
        held.free.set()
        assert running.result()[:2] == (200, {"completion": "hold"})
        stopping.result()
    assert threads_of(axon) == []
    with pytest.raises(ConnectionRefusedError):
        ask(axon)


def test_stop_gives_up_what_does_not_end():
    held = Held()
    axon = Axon(MINER, drain=0.1).attach(held).start()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, axon, "hold")
        assert held.entered.wait(SECONDS)
        axon.stop()
        assert threads_of(axon) == [f"axon-{axon.port}-work-0"]  # the handler still hangs, and nobody waited for it
        assert running.result()[:2] == (503, {"error": "the miner is stopping"})
    held.free.set()
    until(lambda: threads_of(axon) == [])


def test_stop_refuses_what_waits_until_the_time_of_its_nonce():
    now, body = time.time_ns(), write_body(Prompting.ask("hello"))
    axon = Axon(MINER, drain=SECONDS, clock=lambda: now).attach(echo).start()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(post, axon, body, sign(body, nonce_ns=now + 19 * 10**8))
        until(lambda: axon._waiting.size)
        axon.stop()
        status, told, headers = asked.result()
    assert (status, told, headers["retry-after"]) == (503, {"error": "the miner is stopping"}, "1")


def test_starting_and_stopping_leaks_nothing():
    axon = Axon(MINER).attach(echo)

    def cycle():
        with axon:
            assert ask(axon)[0] == 200
        assert threads_of(axon) == []

    cycle()
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(10):
        cycle()
    gc.collect()
    assert not before or len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_keeps_neither_port_nor_connections():
    code = """
        import os, socket, time, warnings
        from prompting_nb.network.axon import Axon
        from prompting_nb.network.chain import make_wallet
        warnings.simplefilter("ignore")
        with Axon(make_wallet("miner")).attach(lambda synapse: synapse) as axon:
            line = socket.create_connection((axon.host, axon.port), timeout=10)
            line.sendall(b"GET /health HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
            assert b"200" in line.recv(4096)
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            line.sendall(b"GET /health HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")  # the parent goes on
            assert b"200" in line.recv(4096)
        assert line.recv(4096) == b""  # closed, although the child lives
        try:
            socket.create_connection((axon.host, axon.port), timeout=10)
            print("somebody listens")
        except ConnectionRefusedError:
            socket.create_server((axon.host, axon.port)).close()
            print("free")
        os.kill(child, 9)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert run.stdout == "free\n", run.stdout + run.stderr


def test_a_port_in_use_is_an_error_at_start(axon):
    second = Axon(MINER, port=axon.port).attach(echo)
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{axon.port}: the port is in use"):
        second.start()
    assert not second.is_running and threads_of(axon) and ask(axon)[0] == 200
    axon.stop()
    with second:
        assert ask(second)[0] == 200


def test_ipv6_loopback():
    try:
        axon = Axon(MINER, host="::1").attach(echo).start()
    except OSError:
        pytest.skip("no IPv6 here")
    with axon, Dendrite(VALIDATOR, allow_private=True) as dendrite:
        assert dendrite.query([axon], Prompting.ask("hello"))[0].completion == "hello"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_a_process_whose_handlers_hang():
    code = """
        import signal, threading
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
        from prompting_nb.network.axon import Axon
        from prompting_nb.network.chain import make_wallet
        from prompting_nb.network.dendrite import Dendrite
        from prompting_nb.protocol import Prompting
        def hang(synapse):
            print("hanging", flush=True)
            threading.Event().wait()
        with Dendrite(make_wallet(1), allow_private=True) as dendrite, Axon(make_wallet(2), drain=0.2).attach(hang) as axon:
            dendrite.query([axon], Prompting.ask("x", timeout=600))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "hanging\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS)  # the handler would hang for ever
    assert errors.strip().splitlines()[-1] == "KeyboardInterrupt"


# The dendrite ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dendrite():
    with Dendrite(VALIDATOR, allow_private=True, max_answer=20_000) as dendrite:
        yield dendrite


class Raw:
    "A server that says the given bytes, piece by piece, and counts its visitors."

    def __init__(self, *pieces, pause=0.0):
        self.hotkey, self.pieces, self.pause, self.visitors = MINER.hotkey.ss58_address, pieces, pause, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with self.socket, self.socket.accept()[0] as line:
            self.visitors += 1
            try:
                line.recv(65536)
                for piece in self.pieces:
                    line.sendall(piece)
                    time.sleep(self.pause)
                line.recv(1)
            except OSError:
                pass


def ok(body, headers=b""):
    return b"HTTP/1.1 200 OK\r\n%scontent-length: %d\r\n\r\n%s" % (headers, len(body), body)


LIES = {
    "a list": (ok(b"[]"), 422),
    "not JSON": (ok(b"<html>"), 422),
    "a number": (ok(b'{"completion": 1}'), 422),
    "no text": (ok(b'{"completion": null}'), 422),
    "no completion": (ok(b"{}"), 422),
    "deep nesting": (ok(b"[" * 10_000), 422),
    "not UTF-8": (ok(b'{"completion": "\xff"}'), 422),
    "gzip": (ok(gzip.compress(b'{"completion": "bomb"}'), b"content-encoding: gzip\r\n"), 422),
    "too long": (ok(b'{"completion": "' + b"x" * 30_000 + b'"}'), 413),
    "nothing": (b"", 408),
    "half a header": (b"HTTP/1.1 200", 408),
    "half a body": (ok(b"{}").replace(b"length: 2", b"length: 99"), 408),
    "not HTTP": (b"SSH-2.0\r\n", 422),
    "endless header": (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, 422),
    "status 999": (b"HTTP/1.1 999 x\r\ncontent-length: 0\r\n\r\n", 422),
    "status 204": (b"HTTP/1.1 204 x\r\n\r\n", 204),
    "long reason": (ok(b'{"error": "two\\nlines %s"}' % (b"x" * 999)).replace(b"200 OK", b"500 x"), 500),
    "deep reason": (ok(b"[" * 10_000).replace(b"200 OK", b"500 x"), 500),
    "no reason": (ok(b'{"error": {"a": [1]}}').replace(b"200 OK", b"500 x"), 500),
}


def test_a_bad_miner_among_many_costs_nothing(dendrite):
    late = [name for name, (_, status) in LIES.items() if status == 408]
    others, raws = [name for name in LIES if name not in late], {name: Raw(reply) for name, (reply, _) in LIES.items()}
    ask = lambda targets, timeout: dendrite.query(targets, Prompting.ask("hello"), timeout=timeout)
    with Axon(MINER).attach(echo) as axon, ThreadPoolExecutor(1) as pool:
        silent = pool.submit(ask, [raws[name] for name in late], 0.5)
        answers = ask([*(raws[name] for name in others), axon], SECONDS)  # beside them, and with more time
    answers = [*silent.result(), *answers]
    got = {name: a.dendrite.status_code for name, a in zip([*late, *others], answers)}
    assert got == {name: status for name, (_, status) in LIES.items()}
    assert answers[-1].completion == "hello" and answers[-1].is_success
    assert all(a.completion is None and not a.is_success for a in answers[:-1])
    assert all("\n" not in a.dendrite.status_message and len(a.dendrite.status_message) <= 200 for a in answers)


def test_an_answer_that_drips_does_not_stretch_the_time_limit(dendrite):
    reply = ok(b'{"completion": "' + b"x" * 500 + b'"}')
    [answer] = dendrite.query([Raw(*(bytes([b]) for b in reply), pause=0.05)], Prompting.ask("x"), timeout=0.3)
    assert answer.dendrite.status_code == 408
    assert answer.dendrite.process_time < SECONDS  # the whole answer would take 25 seconds


def test_redirects_are_not_followed(dendrite):
    elsewhere = Raw(ok(b'{"completion": "stolen"}'))
    location = f"HTTP/1.1 307 x\r\nlocation: http://{elsewhere.address}/Prompting\r\ncontent-length: 0\r\n\r\n"
    [answer] = dendrite.query([Raw(location.encode())], Prompting.ask("x"), timeout=SECONDS)
    assert (answer.dendrite.status_code, elsewhere.visitors) == (307, 0)


@pytest.mark.parametrize(
    "address", [None, "", "nonsense", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:70000", "[::1", ":80", "a b:1"]
)
def test_an_address_that_is_none_is_an_answer_too(dendrite, address):
    [answer] = dendrite.query([SimpleNamespace(hotkey="5X", axon=address)], Prompting.ask("x"), timeout=SECONDS)
    assert answer.dendrite.status_code == 503 and answer.axon.hotkey == "5X"


def test_await_and_plain_calls_from_many_places(dendrite):
    question = Prompting.ask("hello")

    async def from_a_loop():
        asked = await asyncio.gather(*(dendrite([axon], question) for _ in range(8)))
        return [a.completion for [a] in asked] + [dendrite.query([axon], question)[0].completion]

    with Axon(MINER).attach(echo) as axon, ThreadPoolExecutor(4) as pool:
        loops = [pool.submit(asyncio.run, from_a_loop()) for _ in range(4)]
        assert [dendrite.query([axon], question)[0].completion for _ in range(8)] == ["hello"] * 8
        assert [loop.result() for loop in loops] == [["hello"] * 9] * 4


def test_connections_are_kept(dendrite):
    seen = set()

    def remember(synapse):
        seen.add(synapse.dendrite.port)
        return echo(synapse)

    with Axon(MINER).attach(remember) as axon:
        for _ in range(5):
            assert dendrite.query([axon], Prompting.ask("x"))[0].is_success
    assert len(seen) == 1


def test_a_restarted_miner_is_reached_again(dendrite):
    axon = Axon(MINER, port=0).attach(echo)
    for _ in range(3):
        with axon:
            assert dendrite.query([axon], Prompting.ask("x"))[0].is_success
        assert dendrite.query([axon], Prompting.ask("x"))[0].dendrite.status_code == 503


def test_cancelling_the_question_cancels_the_requests(dendrite):
    gone = threading.Event()

    async def wait(synapse):
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()

    async def give_up():
        asking = asyncio.ensure_future(dendrite([axon], Prompting.ask("x"), timeout=SECONDS))
        while axon.health()["running"] == 0:
            await asyncio.sleep(0.005)
        asking.cancel()

    with Axon(MINER).attach(wait) as axon:
        asyncio.run(give_up())
        assert gone.wait(SECONDS)


def test_a_forgotten_dendrite_ends_its_thread():
    threads = lambda: {t for t in threading.enumerate() if t.name == "dendrite"}
    before = threads()  # an error of another test may still hold one
    own = lambda: threads() - before
    asking = Dendrite(VALIDATOR, allow_private=True)
    assert asking.query([], Prompting.ask("x")) == [] and len(own()) == 1
    del asking
    gc.collect()
    until(lambda: not own())


def test_no_nonce_is_used_twice_even_when_the_clock_stands_still():
    with Axon(MINER).attach(echo) as axon:
        now = time.time_ns()  # after the axon's start, before which it takes no nonce
        with Dendrite(VALIDATOR, allow_private=True, clock=lambda: now) as dendrite:
            answers = [dendrite.query([axon], Prompting.ask("hello"))[0] for _ in range(3)]
    assert [a.dendrite.status_message for a in answers] == ["Success"] * 3


@pytest.mark.parametrize("end, status", [(b"", 422), (b'{"done": true}\n', 200)], ids=["cut off", "complete"])
def test_a_stream_without_its_last_line_is_no_completion(end, status):
    reply = ok(b'{"piece": "Half of "}\n{"piece": "it"}\n' + end)
    with Dendrite(VALIDATOR, allow_private=True, require_signed=False) as trusting:
        stream = trusting.stream(Raw(reply), Prompting.ask("x"), timeout=SECONDS)
        assert list(stream) == ["Half of ", "it"]
    got = stream.answer
    assert (got.dendrite.status_code, got.completion) == (status, "Half of it" if status == 200 else None)
    assert got.dendrite.status_message == ("Success, unsigned" if status == 200 else "the answer was cut off")


def test_a_page_of_metrics_of_many_processes_is_made_beside_the_event_loop(monkeypatch):
    makers, merge = [], metrics_module.merge_texts
    monkeypatch.setattr(metrics_module, "merge_texts", lambda texts: makers.append(threading.get_ident()) or merge(texts))

    class Shared:
        async def exchange(self, text):
            return {"one": text, "two": text}

    async def page():
        metrics = Metrics(waiting=lambda: 3)
        metrics.shared = Shared()
        return await metrics.page()

    assert b'axon_queue_depth{process="two"} 3.0' in asyncio.run(page())
    assert len(makers) == 1 and makers[0] != threading.get_ident()


def test_many_who_ask_for_metrics_get_one_page_and_take_no_thread_of_requests(monkeypatch):
    pages, free, merge = [], threading.Event(), metrics_module.merge_texts

    def merge_slowly(texts):
        pages.append(texts)
        assert free.wait(10 * SECONDS)
        return merge(texts)

    class Shared:
        async def exchange(self, text):
            return {"one": text}

    async def asked():
        metrics = Metrics()
        metrics.shared = Shared()
        asking = [asyncio.create_task(metrics.page()) for _ in range(100)]
        await asyncio.sleep(0)
        asking[0].cancel()  # it was the first, and others wait for the same page
        try:
            await asyncio.wait_for(asyncio.to_thread(int), SECONDS)  # as a request does that waits for a store
        finally:
            free.set()
        found = await asyncio.gather(*asking[1:])
        assert len(pages) == 1 and {b'process="one"' in page for page in found} == {True}
        metrics._fresh_until = math.inf  # not a second ago
        assert await metrics.page() is found[0]
        metrics._fresh_until = 0.0
        assert await metrics.page() == found[0] and len(pages) == 2

    monkeypatch.setattr(metrics_module, "merge_texts", merge_slowly)
    asyncio.run(asked())
