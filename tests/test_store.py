"""Several axons and processes behind one hotkey, with a real Redis that they share and that goes away."""

import asyncio
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest
import redis.asyncio as redis_client
from bittensor import http_auth

from prompting_nb.baseminer.miner import Miner
from prompting_nb.config import InputError, read_config
from prompting_nb.network import store as store_module
from prompting_nb.network.auth import Refusal
from prompting_nb.network.axon import Axon
from prompting_nb.network.chain import EmbeddedChain, make_wallet
from prompting_nb.network.legacy import legacy_headers
from prompting_nb.network.store import Store, StoredNonces, StoredPrompts, StoredQuota
from prompting_nb.protocol import Prompting, write_body

REDIS = shutil.which("redis-server")
MINER, VALIDATOR, OTHER = (make_wallet(name) for name in ("miner", "validator", "other"))
ME = MINER.hotkey.ss58_address
SECONDS = 20
QUESTION = Prompting.ask("hello")
BODY = write_body(QUESTION)
OLD = json.dumps({"name": "Prompting", "roles": ["user"], "messages": ["hello"], "timeout": 12.0}).encode()
pytestmark = pytest.mark.skipif(REDIS is None, reason="redis-server is not installed (apt-get install redis-server)")


def echo(synapse):
    synapse.completion = synapse.prompt
    return synapse


def sign(body=BODY, wallet=VALIDATOR, receiver=ME):
    return http_auth.sign(wallet, method="POST", path="/Prompting", body=body, receiver_ss58=receiver)


def ask(axon, body=BODY, headers=None):
    "Status, answer and headers."
    connection = http.client.HTTPConnection(axon.host, axon.port, timeout=SECONDS)
    try:
        connection.request("POST", "/Prompting", body, sign(body) if headers is None else headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), dict(answer.getheaders())
    finally:
        connection.close()


def status(*args, **kwargs):
    return ask(*args, **kwargs)[0]


def until(condition):
    end = time.monotonic() + 3 * SECONDS  # starts of processes among others
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


class Redis:
    "A redis-server of our own, which can be killed and started again."

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port = sock.getsockname()[1]
        self.folder, self.url = folder, f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self):
        flags = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        self.process = subprocess.Popen([REDIS, *flags], stdout=subprocess.DEVNULL)
        until(self.answers)

    def answers(self):
        try:
            return self.told("PING") == b"+PONG\r\n"
        except OSError:
            return False

    def told(self, command):
        with socket.create_connection(("127.0.0.1", self.port), SECONDS) as line:
            line.sendall(f"{command}\r\n".encode())
            return line.recv(100)

    def kill(self):
        self.process.kill()
        self.process.wait()


def a_minute_later(nonces):
    "Let a minute pass for a store of nonces: what it keeps for so long is gone, and the rest is older."
    redis, key = nonces.store._sync, nonces.store.key
    for name in redis.keys(key("nonce", "*")):
        redis.delete(name)
    for name in (key("seconds"), key("callers")):
        for member, since in redis.zrange(name, 0, -1, withscores=True):
            redis.zadd(name, {member: since - 60_000})


@pytest.fixture
def redis(tmp_path):
    server = Redis(tmp_path)
    yield server
    server.kill()


def stored(redis, timeout=SECONDS):
    return Axon(MINER, nonces=StoredNonces(Store(redis.url, ME, timeout=timeout))).attach(echo)


def test_a_request_is_good_once_at_all_processes(redis):
    with stored(redis) as one, stored(redis) as two:
        headers, older = sign(), legacy_headers(VALIDATOR.hotkey, QUESTION, ME)
        assert [status(a, headers=headers) for a in (one, two, one)] == [200, 401, 401]
        assert [status(a, OLD, older) for a in (two, one, two)] == [200, 401, 401]
        assert [status(a) for a in (one, two)] == [200, 200]
        one.stop()
        assert status(one.start(), headers=headers) == 401


def test_without_redis_requests_are_refused_until_it_is_back(redis, caplog):
    with stored(redis) as axon:
        before = sign()
        assert status(axon, headers=before) == 200
        redis.kill()
        for _ in range(5):
            code, answer, headers = ask(axon)
            assert (code, answer["error"], headers["retry-after"]) == (503, "the store of this miner does not answer", "1")
        said = [r.getMessage() for r in caplog.records if "the store at" in r.getMessage()]
        assert len(said) == 1 and "requests are refused" in said[0]
        redis.start()  # with nothing in its memory
        until(lambda: status(axon) == 200)
        assert status(axon, headers=before) == 401  # signed before the new memory began
        assert any("answers again" in r.getMessage() for r in caplog.records)


def test_what_redis_accepted_after_its_snapshot_is_no_good_after_a_restart(redis):
    with stored(redis) as axon:
        assert status(axon) == 200
        assert redis.told("SAVE") == b"+OK\r\n"
        headers = sign()
        assert [status(axon, headers=headers) for _ in range(2)] == [200, 401]
        redis.kill()
        redis.start()
        answers = []
        until(lambda: answers.append(status(axon, headers=headers)) or answers[-1] != 503)
        assert answers[-1] == 401
        until(lambda: status(axon) == 200)  # signed by a clock of this run
        assert [status(axon, headers=headers), status(axon)] == [401, 200]


def ready(axon):
    connection = http.client.HTTPConnection(axon.host, axon.port, timeout=SECONDS)
    connection.request("GET", "/ready")
    answer = connection.getresponse()
    told = json.loads(answer.read())
    connection.close()
    return answer.status, told


def test_without_redis_a_miner_is_not_ready_until_it_is_back(redis):
    with stored(redis) as axon:
        assert ready(axon)[0] == 200
        redis.kill()
        assert status(axon) == 503
        code, told = ready(axon)
        assert (code, told["reason"]) == (503, "the store of this miner does not answer")
        redis.start()
        until(lambda: ready(axon)[0] == 200)  # without any request
        until(lambda: status(axon) == 200)  # its new memory begins with the first one


def test_a_redis_that_takes_no_writes_makes_a_miner_unready(redis):
    "It follows another one since a failover, or cannot save; what only reads is answered."

    def follow(whom):
        with socket.create_connection(("127.0.0.1", redis.port), SECONDS) as line:
            line.sendall(f"REPLICAOF {whom}\r\n".encode())
            assert line.recv(3) == b"+OK"

    with stored(redis) as axon:
        assert (status(axon), ready(axon)[0]) == (200, 200)
        follow("127.0.0.1 1")
        assert status(axon) == 503
        time.sleep(1.1)  # after which the store is asked again
        assert [ready(axon)[0] for _ in range(2)] == [503, 503]
        follow("NO ONE")
        until(lambda: ready(axon)[0] == 200)
        until(lambda: status(axon) == 200)


def test_a_redis_that_hangs_does_not_hold_up_the_loop(redis):
    with stored(redis, timeout=0.3) as axon:
        until(lambda: status(axon) == 200)
        redis.process.send_signal(signal.SIGSTOP)
        try:
            assert status(axon) == 503
            begin = time.monotonic()
            assert [status(axon) for _ in range(10)] == [503] * 10  # at once: the store has just failed
            assert time.monotonic() - begin < 5
        finally:
            redis.process.send_signal(signal.SIGCONT)
        until(lambda: status(axon) == 200)


@pytest.mark.parametrize("more", ["", "?max_connections=3"])
def test_many_that_come_at_once_wait_for_a_connection(redis, more):
    nonces = StoredNonces(Store(redis.url + more, ME, timeout=SECONDS))
    nonces.begin()
    now = time.time_ns() + 10**9

    async def asked():
        return await asyncio.gather(*(nonces.accept("5x", now + i // 2) for i in range(600)))

    assert sum(asyncio.run(asked())) == 300
    with ThreadPoolExecutor(120) as pool:
        assert sum(pool.map(lambda i: nonces.check_and_store("5y", now + i // 2), range(600))) == 300
    nonces.close()


def test_those_that_wait_for_a_connection_are_refused_as_soon_as_the_store_has_failed(redis, monkeypatch):
    nonces, now, asked = StoredNonces(Store(redis.url, ME, timeout=0.3)), time.time_ns() + 10**9, []
    evaluate = redis_client.Redis.eval
    monkeypatch.setattr(redis_client.Redis, "eval", lambda *args: asked.append(1) or evaluate(*args))
    redis.process.send_signal(signal.SIGSTOP)

    async def all_at_once():
        return await asyncio.gather(*(nonces.accept("5x", now + i) for i in range(200)), return_exceptions=True)

    try:
        assert {type(error) for error in asyncio.run(all_at_once())} == {Refusal}
        assert 0 < len(asked) <= 32  # those that had a connection
    finally:
        redis.process.send_signal(signal.SIGCONT)
    nonces.close()


def test_a_nonce_that_is_no_time_is_refused(redis):
    nonces = StoredNonces(Store(redis.url, ME))
    for nonce in (-1, 10**20):
        with pytest.raises(Refusal):
            nonces.check_and_store("5x", nonce)
    assert [nonces.check_and_store("5x", time.time_ns() + 10**9) for _ in range(2)] == [True, True]
    nonce = time.time_ns() + 10**9
    assert [nonces.check_and_store("5x", nonce), nonces.check_and_store("5y", nonce),
            nonces.check_and_store("5x", nonce)] == [True, True, False]  # fmt: skip
    nonces.close()


def test_of_too_many_callers_the_store_remembers_when_somebody_asked(redis, monkeypatch):
    monkeypatch.setattr(store_module, "_CROWDED", 3)
    monkeypatch.setattr(store_module, "_PAIRS", 8)
    begin = time.time_ns() // 10**10 * 10**10
    now = [begin]
    nonces = StoredNonces(Store(redis.url, ME, clock=lambda: now[0], timeout=SECONDS))
    nonces.begin()

    def taken(ten, caller):
        now[0] = begin + ten * 10**10 + 10**9 * (ord(caller[1]) % 7)
        try:
            return nonces.check_and_store(caller, now[0])
        except Refusal as refusal:
            assert str(refusal).endswith("because its clock was wrong")
            return "forgotten"

    assert all(taken(1, f"5x{i}") for i in range(5)) and all(taken(ten, "5x0") for ten in range(2, 6))
    a_minute_later(nonces)
    assert taken(1, "5y") == "forgotten"  # crowded
    assert [taken(ten, "5x0") for ten in range(1, 6)] == ["forgotten"] * 5
    assert [taken(ten, "5y") for ten in range(2, 6)] == [True] * 4  # now there are too many
    a_minute_later(nonces)
    assert [taken(ten, "5x0") for ten in range(1, 6)] == ["forgotten"] * 5
    assert taken(2, "5z") in (True, "forgotten") and taken(5, "5z") is True
    assert nonces.store._sync.zcard(nonces.store.key("callers")) <= 8
    nonces.close()


def test_a_quota_is_for_all_processes_and_ends_with_its_window(redis):
    async def admitted():
        store, other = (Store(redis.url, ME, timeout=SECONDS) for _ in range(2))
        quotas = StoredQuota(store, 2, 60.0), StoredQuota(other, 2, 60.0)
        waits = [await quotas[i % 2].wait("5x") for i in range(4)]
        assert waits[:2] == [0, 0] and all(0 < w <= 60.0 for w in waits[2:])
        assert await quotas[0].wait("5y") == 0  # another hotkey
        key = store.key("quota", "5x")
        assert 0 < store._sync.pttl(key) <= 60_000
        for member, since in store._sync.zrange(key, 0, -1, withscores=True):
            store._sync.zadd(key, {member: since - 1000 * max(waits)})  # the window passes
        assert await quotas[1].wait("5x") == 0
        store.close(), other.close()

    asyncio.run(admitted())


class Echo(Miner):
    @classmethod
    def add_args(cls, parser):
        pass

    def config(self):
        return read_config(self.add_args, argv=[])

    def prompt(self, synapse):
        return echo(synapse)


class AsyncEcho(Echo):
    async def prompt(self, synapse):
        return echo(synapse)


@pytest.fixture
def pair(redis):
    "Make two miners with one hotkey and one store."
    chain, made = EmbeddedChain(), []
    chain.register(MINER), chain.register(VALIDATOR, stake=9.0), chain.register(OTHER, stake=9.0)

    def make(settings, kind=Echo):
        for follower in (False, True):
            axon = {"axon.store": redis.url, "axon.follower": follower}
            made.append(kind({**settings, **axon}, wallet=MINER, subtensor=chain.client()))
            made[-1].__enter__()
        return made[-2:]

    yield make
    for miner in made:
        miner.stop_run_thread()


def test_miners_share_their_quota(pair):
    exempt = {"miner.blacklist": {"quota": 3, "window": 60.0, "whitelist": [OTHER.hotkey.ss58_address]}}
    one, two = pair(exempt)
    answers = [ask(m.axon) for m in (one, two, one, two)]
    assert [code for code, _, _ in answers] == [200, 200, 200, 429]
    assert 50 <= int(answers[3][2]["retry-after"]) <= 60
    assert [status(m.axon, headers=sign(wallet=OTHER)) for m in (one, two) * 3] == [200] * 6


@pytest.mark.parametrize("kind", [Echo, AsyncEcho])
def test_miners_share_the_prompts_that_they_answered(pair, kind):
    one, two = pair({"miner.blacklist.use_prompt_cache": True}, kind)
    assert [status(m.axon) for m in (one, two, one)] == [200, 409, 409]
    other = write_body(Prompting.ask("another"))
    assert [status(m.axon, other) for m in (two, one)] == [200, 409]


def test_a_follower_neither_publishes_nor_sets_weights(pair):
    settings = {"miner.blocks_per_epoch": 1, "miner.poll_interval": 0.01}
    leader, follower = pair(settings)
    assert leader.axon.port != follower.axon.port
    published = leader.subtensor.subnets.metagraph(1).neuron(0).axon
    assert published == leader.axon.address


def test_a_stored_claim_is_released_by_its_block(redis):
    with Axon(MINER, nonces=StoredNonces(store := Store(redis.url, ME))).attach(echo):
        prompts = StoredPrompts(store, span=1)
        assert prompts.claim(b"k", 1) and prompts.claim(b"k", 3)
        prompts.release(b"k", 1)  # a slow answer to the first has failed
        assert prompts.recent(b"k", 3)
        prompts.release(b"k", 3)
        assert not prompts.recent(b"k", 3) and prompts.claim(b"k", 3)
        prompts.release(b"k")  # whoever has claimed it
        assert not prompts.recent(b"k", 3)


def page(axon):
    "Status of /metrics, and the answered requests of each process."
    connection = http.client.HTTPConnection(axon.host, axon.port, timeout=SECONDS)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    lines = [line for line in answer.read().decode().splitlines() if line.startswith('axon_requests_total{outcome="answered"')]
    connection.close()
    return answer.status, sorted(float(line.rpartition(" ")[2]) for line in lines), lines


def test_metrics_of_one_process_show_those_of_all(pair, redis):
    one, two = pair({"miner.poll_interval": 0.02})
    for miner in (one, one, two):
        assert status(miner.axon) == 200
    for miner in (one, two):
        until(lambda: page(miner.axon)[1] == [1.0, 2.0])
        assert all('process="' in line for line in page(miner.axon)[2])
    two.stop_run_thread()
    one.axon.metrics.shared.kept = 0.1  # seconds, instead of a minute
    until(lambda: page(one.axon)[1] == [2.0])
    redis.kill()
    assert page(one.axon)[:2] == (200, [2.0])  # its own


def test_several_processes_need_a_store():
    with pytest.raises(InputError, match="--axon.store redis://"):
        Echo({"axon.processes": 2}, wallet=MINER, subtensor=EmbeddedChain().client())
    with pytest.raises(InputError, match="--axon.follower: it and its leader need a store"):
        Echo({"axon.follower": True}, wallet=MINER, subtensor=EmbeddedChain().client())


def test_the_command_with_several_processes(redis):
    line = ["miner", "--axon.processes", "3", "--axon.store", redis.url]
    code = "import sys; from prompting_nb.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        words = process.stdout.readline().split()
        hotkey = words[1]
        there = SimpleNamespace(host="127.0.0.1", port=int(words[-1].rpartition(":")[2]))
        parent = psutil.Process(process.pid)

        def listening(process):
            return any(c.status == "LISTEN" and c.laddr.port == there.port for c in process.net_connections())

        until(lambda: sum(listening(child) for child in parent.children()) == 2)
        headers = sign(receiver=hotkey)
        codes = [status(there, headers=headers) for _ in range(30)]  # on a new connection each
        assert sorted(codes) == [200] + [401] * 29
        assert {status(there, headers=sign(receiver=hotkey)) for _ in range(20)} == {200}
        killed = parent.children()[0]
        killed.kill()
        until(lambda: killed not in parent.children() and sum(map(listening, parent.children())) == 2)  # restarted
        children = parent.children()
        process.send_signal(signal.SIGTERM)
        output, log = process.communicate(timeout=SECONDS)
        assert process.returncode in (0, 143, -15), log
        assert "ended with status -9 and is restarted" in log
        assert not any(child.is_running() and child.status() != "zombie" for child in children)
    finally:
        process.kill()
        process.wait()


def test_followers_end_when_their_leader_is_killed(redis):
    line = ["miner", "--axon.processes", "2", "--axon.store", redis.url]
    code = "import sys; from prompting_nb.cli import main; sys.exit(main())"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process = subprocess.Popen([sys.executable, "-c", code, *line], **pipes)
    try:
        process.stdout.readline()
        until(lambda: psutil.Process(process.pid).children())
        [child] = psutil.Process(process.pid).children()
        assert process.stdout.readline()  # the follower says that it listens
        process.kill()
        process.wait()
        until(lambda: not child.is_running() or child.status() == "zombie")
    finally:
        process.kill()
        process.wait()


BLOCKS = """
import os, sys, time
from functools import partial
from pathlib import Path
from prompting_nb.baseminer import command
from prompting_nb.baseminer.miners import MINERS

async def prompt(miner, synapse):
    if Path("block").exists() and "_PROMPTING_NB_LEADER" in os.environ:
        Path("blocked").write_text(str(os.getpid()))
        time.sleep(1000)
    synapse.completion = "here"
    return synapse

follow = command._follow
command._follow = lambda *given: [sys.executable, __file__, *follow(*given)[4:]]
command.Followers = partial(command.Followers, patience=3.0)
MINERS["template"].prompt = prompt
command.run_miner(command.miner_parser().parse_args(sys.argv[1:]))
"""


def test_a_follower_whose_event_loop_hangs_is_replaced(redis, tmp_path):
    script, blocked, lines = tmp_path / "blocks.py", tmp_path / "blocked", []
    script.write_text(BLOCKS)
    line = [sys.executable, str(script), "--axon.processes", "2", "--axon.store", redis.url]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(line, cwd=tmp_path, **pipes)
    try:
        words = process.stdout.readline().split()
        there = "127.0.0.1", int(words[-1].rpartition(":")[2])
        assert process.stdout.readline()  # the follower says that it listens
        (tmp_path / "block").touch()

        def asks():
            lines.append(socket.create_connection(there, SECONDS))
            head = {"host": "x", "content-length": len(BODY), **sign(receiver=words[1])}
            text = "".join(f"{name}: {value}\r\n" for name, value in head.items())
            lines[-1].sendall(f"POST /Prompting HTTP/1.1\r\n{text}\r\n".encode() + BODY)

        until(lambda: blocked.exists() and blocked.read_text() or asks())
        (tmp_path / "block").unlink()
        pid = int(blocked.read_text())
        until(lambda: pid not in [child.pid for child in psutil.Process(process.pid).children()])
        process.terminate()
        assert "process 2 of 2 hangs (no sign of life for 3 s): killed" in process.communicate(timeout=SECONDS)[1]
    finally:
        process.kill()
        process.wait()
        for one in lines:
            one.close()
