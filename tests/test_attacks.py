"""Attacks and faults, each a test with a name.

The first line of a docstring says what is done, a line `Older server:` what the source of bittensor 10.5's Axon and
Dendrite says about it, a dash where it says nothing. The table on the page about attacks is made from these docstrings.
"""

import asyncio
import errno
import gc
import http.client
import json
import logging
import os
import pickle
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from bittensor import ServeAxon, http_auth
from bittensor.sp_core import ss58_decode, ss58_encode
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conftest import OnePiece, alive
from prompting_nb.baseminer.answering import Once, handler
from prompting_nb.baseminer.blacklist import Verdict
from prompting_nb.baseminer.cache import PromptCache
from prompting_nb.baseminer.miner import Miner
from prompting_nb.baseminer.processes import Followers
from prompting_nb.baseminer.subnet import NotRegisteredError
from prompting_nb.config import InputError, read_config
from prompting_nb import protocol
from prompting_nb.loop.network import Network
from prompting_nb.loop.tasks import Worker
from prompting_nb.network import addresses, auth, connection, isolation, legacy, limits
from prompting_nb.network import axon as axon_page
from prompting_nb.network import dendrite as dendrite_page
from prompting_nb.network import server as server_page
from prompting_nb.network.auth import FORGOTTEN, FileNonces, MemoryNonces, Refusal, sign_request
from prompting_nb.network.axon import Axon, _Waiting
from prompting_nb.network.chain import EmbeddedChain, make_wallet
from prompting_nb.network.dendrite import Dendrite, _discard, _read_stream
from prompting_nb.network.isolation import Isolated
from prompting_nb.network.legacy import legacy_headers
from prompting_nb.network.pace import Pace
from prompting_nb.network.server import Door, Limits, Server, listen
from prompting_nb.network.store import Store, StoredNonces
from prompting_nb.protocol import Prompting, StreamPrompting, write_body
from prompting_nb.validators.judge import reward_answers
from prompting_nb.validators.validator import Policy, Validator
from test_store import REDIS, Redis, a_minute_later

MINER, VALIDATOR, STRANGER = (make_wallet(name) for name in ("miner", "validator", "stranger"))
ME = MINER.hotkey.ss58_address
SECONDS = 20  # longest wait for something that must happen
QUESTION = Prompting.ask("hello")
BODY = write_body(QUESTION)
OLD = json.dumps({"name": "Prompting", "roles": ["user"], "messages": ["hello"], "timeout": 12.0}).encode()


def echo(synapse):
    synapse.completion = synapse.prompt
    return synapse


async def aecho(synapse):
    return echo(synapse)


def sign(body=BODY, wallet=VALIDATOR, path="/Prompting", method="POST", receiver=ME, **more):
    return http_auth.sign(wallet, method=method, path=path, body=body, receiver_ss58=receiver, **more)


def old(question=QUESTION, wallet=VALIDATOR, receiver=ME, **more):
    return legacy_headers(wallet.hotkey, question, receiver, **more)


def post(axon, body=BODY, headers=None, path="/Prompting"):
    "Status, JSON and headers of the answer."
    connection = OnePiece(axon.host, axon.port, timeout=SECONDS)
    try:
        connection.request("POST", path, body, sign(body) if headers is None else headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), dict(answer.getheaders())
    finally:
        connection.close()


def status(*args, **kwargs):
    return post(*args, **kwargs)[0]


def request(body=BODY, headers=None, path="/Prompting"):
    "The bytes of a request."
    headers = {"host": "x", "content-length": len(body), **(sign(body) if headers is None else headers)}
    head = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


class Nowhere(asyncio.Transport):
    "A transport that takes everything and sends nothing."
    pause_reading = resume_reading = close = abort = write_eof = lambda self: None
    write = lambda self, data: None
    is_closing = can_write_eof = lambda self: False
    get_write_buffer_size = lambda self: 0
    set_write_buffer_limits = lambda self, high: None


def connect(axon):
    return socket.create_connection((axon.host, axon.port), timeout=SECONDS)


def read_status(line):
    "The status of one answer on an open line; None when it was closed. The body is read as well."
    data = b""
    while b"\r\n\r\n" not in data:
        try:
            more = line.recv(65536)
        except ConnectionError:
            return None
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length")), 0)
    while len(body) < length:
        body += line.recv(65536)
    return int(head.split()[1])


def read_or_none(line):
    "Whether a line that waits for us was closed."
    line.setblocking(False)
    try:
        return line.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def later(monkeypatch):
    """Lets time pass at once, for the looks that a server takes at its connections.

    So its limits can be long, and no test has to be faster than a short one.
    """
    monkeypatch.setattr(Limits, "tick", 0.02)

    def later(axon, seconds):
        time = axon._server.loop.time
        axon._server.loop.time = lambda: time() + seconds

    return later


def get(axon, path):
    connection = http.client.HTTPConnection(axon.host, axon.port, timeout=SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def memory():
    "Resident memory of this process in MB."
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture(scope="module")
def axon():
    with Axon(MINER, max_body=50_000).attach(echo) as axon:
        yield axon
        assert status(axon) == 200  # whatever was done to it


# Identity -------------------------------------------------------------------------------------------------------------


def test_missing_signature(axon):
    """A request without a signature.
    Older server: 401."""
    assert status(axon, headers={}) == 401
    assert status(axon, OLD, {k: v for k, v in old().items() if "signature" not in k}) == 401


def test_empty_signature(axon):
    """A signature that is empty.
    Older server: 401."""
    assert status(axon, headers=sign() | {"X-Bittensor-Signature": ""}) == 401
    assert status(axon, OLD, old() | {"bt_header_dendrite_signature": ""}) == 401


@pytest.mark.parametrize("signature", ["0x" + "00" * 64, "0x00", "zz", "0x" + "ff" * 64])
def test_wrong_signature(axon, signature):
    """A signature of zeros, of the wrong length, not hexadecimal.
    Older server: 401."""
    assert status(axon, headers=sign() | {"X-Bittensor-Signature": signature}) == 401
    assert status(axon, OLD, old() | {"bt_header_dendrite_signature": signature}) == 401


def test_other_receiver(axon):
    """A request that was signed for another miner.
    Older server: 401."""
    assert status(axon, headers=sign(receiver=STRANGER.hotkey.ss58_address)) == 401
    assert status(axon, headers=sign(receiver=None)) == 401
    elsewhere = old(receiver=STRANGER.hotkey.ss58_address)
    assert status(axon, OLD, elsewhere) == status(axon, OLD, elsewhere | {"bt_header_axon_hotkey": ME}) == 401


@pytest.mark.parametrize("kind", ["btauth/1", "older format"])
def test_replay_at_once(axon, kind):
    """The same request twice.
    Older server: refused, as long as it runs: a nonce must be greater than the last."""
    body, headers = (BODY, sign()) if kind == "btauth/1" else (OLD, old())
    assert [status(axon, body, headers) for _ in range(3)] == [200, 401, 401]


@pytest.mark.parametrize("where", ["memory", "file"])
def test_replay_after_restart(where, tmp_path):
    """A request that was answered, sent again after the miner was restarted.
    Older server: nonces are in memory only: answered, within 4 s plus the timeout that the header claims."""
    ahead = time.time_ns() + int(1.5e9)  # the clock of this caller runs ahead
    nonces = tmp_path / "nonces" if where == "file" else None
    new, older = sign(), old()
    early, early_old = sign(nonce_ns=ahead), old(nonce=ahead + 1)
    with Axon(MINER, nonces=nonces).attach(echo) as first:
        time.sleep(0)
        answered = [status(first, b, h) for b, h in ((BODY, early), (OLD, early_old))]
    with Axon(MINER, nonces=nonces).attach(echo) as second:
        again = [status(second, b, h) for b, h in ((BODY, new), (OLD, older), (BODY, early), (OLD, early_old))]
        assert status(second) == status(second, OLD, old()) == 200
    assert answered == [200, 200]  # after the time that they are from
    assert again == [401] * 4


def test_replay_to_a_second_process(tmp_path):
    """A request that was answered, sent to another process with the same key.
    Older server: nonces are in the memory of one process: answered."""
    code = f"""
        import sys
        from prompting_nb.network.axon import Axon
        from prompting_nb.network.chain import make_wallet
        def echo(synapse):
            synapse.completion = synapse.prompt
            return synapse
        with Axon(make_wallet("miner"), nonces={str(tmp_path / "nonces")!r}).attach(echo) as axon:
            print(axon.port, flush=True)
            sys.stdin.readline()
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with Axon(MINER, nonces=tmp_path / "nonces").attach(echo) as here, subprocess.Popen(run, **pipes) as process:
        there = SimpleNamespace(host="127.0.0.1", port=int(process.stdout.readline()))
        headers, older, another = sign(), old(), sign()
        assert [status(here, headers=headers), status(there, headers=headers)] == [200, 401]
        assert [status(there, OLD, older), status(here, OLD, older)] == [200, 401]
        assert status(there, headers=another) == 200
        process.communicate("end\n", timeout=SECONDS)


def test_stale_nonce(axon):
    """A nonce that is too old, with headers that claim a long timeout or an old version.
    Older server: answered: the claim widens the window, and a version before 7.2 removes it."""
    minute_ago = time.time_ns() - 60 * 10**9
    assert status(axon, headers=sign(nonce_ns=minute_ago)) == 401
    for claim in ({}, {"timeout": "3600"}, {"bt_header_dendrite_version": "6000000"}):
        assert status(axon, OLD, old(nonce=minute_ago) | claim) == 401


def test_future_nonce(axon):
    """A nonce of tomorrow.
    Older server: answered, and every honest request with the same uuid refused until then."""
    tomorrow = time.time_ns() + 86_400 * 10**9
    assert status(axon, headers=sign(nonce_ns=tomorrow)) == 401
    assert status(axon, OLD, old(nonce=tomorrow)) == 401
    assert status(axon) == status(axon, OLD, old()) == 200


def test_edited_timeout(axon):
    """The timeout edited on the way.
    Older server: believed. (In the older format nothing signs it; here it is bounded.)"""
    assert status(axon, BODY.replace(b"12.0", b"99.0"), sign()) == 401
    held = threading.Event()
    with Axon(MINER, max_timeout=0.1).attach(lambda synapse: held.wait(SECONDS)) as bounded:
        assert status(bounded, OLD.replace(b"12.0", b"99999.0"), old()) == 504
        held.set()


def test_edited_version(axon):
    """The protocol version edited on the way.
    Older server: a version before 7.2 switches the check of freshness off."""
    assert status(axon, headers=sign() | {"X-Bittensor-Version": "2"}) == 401
    assert status(axon, OLD, old(nonce=time.time_ns() - 10**12) | {"bt_header_dendrite_version": "1"}) == 401


@pytest.mark.parametrize("field", ["roles", "messages"])
def test_edited_roles_and_messages(axon, field):
    """Roles or messages edited on the way.
    Older server: refused for the fields that the message lists in `required_hash_fields`; by default it lists none."""
    edited = {"roles": (b'"user"', b'"system"'), "messages": (b"hello", b"jello")}[field]
    assert status(axon, BODY.replace(*edited), sign()) == 401
    assert status(axon, OLD.replace(*edited), old()) == 401


def test_edited_path_and_query(axon):
    """A request signed for one path, sent to another; a query added.
    Older server: the path is not signed."""
    assert post(axon, path="/StreamPrompting", headers=sign())[0] == 401
    assert status(axon, path="/Prompting?fast=1", headers=sign()) == 401
    assert status(axon, path="/Prompting?", headers=sign()) == 401  # the question mark alone was not signed
    for path in ("/Prompting?x=1", "/Prompting?"):
        assert status(axon, path=path, headers=sign(path=path)) == 200


def test_identity_forged_in_the_body():
    """A body that says who it is from.
    Older server: the handler sees the hotkey of the body, whoever signed."""
    seen = []
    forged = {"dendrite": {"hotkey": "5Victim"}, "axon": {"hotkey": "5Victim"}, "name": "Other"}
    with Axon(MINER).attach(lambda s: seen.append(s.dendrite.hotkey) or echo(s)) as axon:
        body = json.dumps({**json.loads(BODY), **forged}).encode()
        assert status(axon, body) == status(axon, json.dumps({**json.loads(OLD), **forged}).encode(), old()) == 200
    assert seen == [VALIDATOR.hotkey.ss58_address] * 2


def test_spoofed_hotkey_burns_no_rate_limit():
    """Requests in a victim's name, to use up its quota.
    Older server: the blacklist function is asked before the signature is checked."""
    asked = []

    def limited(synapse):
        asked.append(synapse.dendrite.hotkey)
        return len(asked) > 2, "too often"

    with Axon(MINER).attach(echo, limited) as axon:
        victim = VALIDATOR.hotkey.ss58_address
        for _ in range(5):
            assert status(axon, headers=sign(wallet=STRANGER) | {"X-Bittensor-Hotkey": victim}) == 401
            assert status(axon, OLD, old(wallet=STRANGER) | {"bt_header_dendrite_hotkey": victim}) == 401
        assert asked == []
        assert [status(axon), status(axon), status(axon)] == [200, 200, 403]


@pytest.mark.parametrize("hotkey", ["null", "None", "", "0", "5" * 5000, "../../etc", "ä" * 10, "5Grw vaEF", "[]"])
def test_null_and_odd_hotkeys(axon, hotkey):
    """Hotkeys that are none: null, empty, endless, a path.
    Older server: 401, after the blacklist function has seen it."""
    hotkey = hotkey.encode().decode("latin-1")
    assert status(axon, headers=sign() | {"X-Bittensor-Hotkey": hotkey}) == 401
    assert status(axon, OLD, old() | {"bt_header_dendrite_hotkey": hotkey}) == 401


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31), b"\xec" + b"\xff" * 30 + b"\x7f"], ids=["0", "1", "-1"])
def test_key_that_everybody_can_sign_for(axon, dendrite, key):
    """A hotkey of small order, for which a signature without a secret fits: as a caller, and as a miner.
    Older server: takes it."""
    weak = ss58_encode(key, 42)
    for scheme, signature in ((0, key + bytes(32)), (0, bytes(64)), (1, bytes(63) + b"\x80")):
        forger = SimpleNamespace(ss58_address=weak, crypto_type=scheme, sign=lambda line: signature)
        for nonce in range(4):  # some fit every message, others one in a few
            headers = sign_request(forger, BODY, path="/Prompting", receiver=ME, nonce=time.time_ns() + nonce)
            assert status(axon, BODY, headers) == 401
        assert status(axon, OLD, legacy_headers(forger, QUESTION, ME)) == 401
    refused = dendrite.query([SimpleNamespace(hotkey=weak, axon="127.0.0.1:1")], QUESTION)[0].dendrite
    assert refused.status_code == 503 and "everybody can sign" in refused.status_message


def test_hotkey_that_takes_long_to_read(axon, monkeypatch):
    """A hotkey or a receiver as long as the headers may be, which takes long to decode.
    Older server: decodes it, after the blacklist function has seen it."""
    read = []
    monkeypatch.setattr(auth.http_auth, "verify", lambda *_, **__: read.append(1))
    monkeypatch.setattr(legacy, "verify_signature", lambda *_: read.append(1))
    for hotkey in ("5" * 101, "z" * 14_000):
        assert status(axon, headers=sign() | {"X-Bittensor-Hotkey": hotkey}) == 401
        assert status(axon, OLD, old() | {"bt_header_dendrite_hotkey": hotkey}) == 401
        with pytest.raises(ValueError, match="too long"):
            addresses.hotkey_address(hotkey)
    assert read == []


def test_headers_sent_twice(axon):
    """The same authentication header twice, so that two readers could disagree.
    Older server: -"""
    with connect(axon) as line:
        line.sendall(request().replace(b"\r\n\r\n", b"\r\nX-Bittensor-Hotkey: 5Other\r\n\r\n", 1))
        assert read_status(line) == 401


def test_roles_and_messages_swapped(axon):
    """Roles and messages of a signed question in the older format change places on the way.
    Older server: refused where the message lists both fields."""
    question = Prompting(roles=["user", "assistant"], messages=["assistant", "user"])
    swapped = json.dumps({"roles": question.messages, "messages": question.roles, "timeout": 12.0}).encode()
    assert status(axon, swapped, old(question)) == 401
    assert status(axon, json.dumps({"roles": ["What?"], "messages": ["user"]}).encode(),
                  old(Prompting(roles=["What?"], messages=["user"]))) == 400  # fmt: skip


def test_another_address_of_the_same_key(chain):
    """A blacklisted caller, and one that has used up its quota, under another ss58 prefix.
    Older server: another caller."""
    settings = {"miner.blacklist": {"blacklist": [STRANGER.hotkey.ss58_address], "allow_non_registered": True, "quota": 1,
                                    "window": 3600.0}}  # fmt: skip
    spelt = lambda wallet, prefix: SimpleNamespace(
        ss58_address=ss58_encode(ss58_decode(wallet.hotkey.ss58_address), prefix), crypto_type=1, sign=wallet.hotkey.sign)
    new = lambda wallet, prefix: sign_request(spelt(wallet, prefix), BODY, path="/Prompting", receiver=ME, nonce=time.time_ns())
    older = lambda wallet, prefix: legacy_headers(spelt(wallet, prefix), QUESTION, ME)
    with chain.client() as client, Echo(settings, wallet=MINER, subtensor=client) as miner:
        for prefix in (42, 0, 2):
            assert status(miner.axon, BODY, new(STRANGER, prefix)) == status(miner.axon, OLD, older(STRANGER, prefix)) == 403
        heard = [status(miner.axon, BODY, new(VALIDATOR, prefix)) for prefix in (0, 42, 2)]
        assert [*heard, status(miner.axon, OLD, older(VALIDATOR, 0))] == [200, 429, 429, 429]


@pytest.fixture
def now(monkeypatch):
    "Nanoseconds that the test counts, by which requests wait in an axon until the time of their nonce."
    now, began = [time.time_ns()], time.time_ns()

    async def sleep(seconds):
        end = now[0] + int(seconds * 1e9)
        while now[0] < end:
            await asyncio.sleep(0.005)

    monkeypatch.setattr(auth, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(axon_page, "time", SimpleNamespace(monotonic=lambda: (now[0] - began) / 1e9))
    return now


@pytest.mark.parametrize("older", [False, True])
def test_long_questions_signed_ahead_of_the_clock(older, now):
    """Strangers sign long questions up to two seconds ahead, which wait in memory until their time has come.
    Older server: answers them at once."""
    question, lines = Prompting.ask("x" * 900), []
    body = write_body(question)

    def signed(wallet, seconds):
        now[0] += 1000  # no nonce twice, and none waits as long as another
        nonce = now[0] + int(seconds * 1e9)
        return old(question, wallet, nonce=nonce) if older else sign(body, wallet, nonce_ns=nonce)

    def ahead():
        return request(body, signed(STRANGER, 1.9))

    with Axon(MINER, max_body=1000, clock=lambda: now[0]).attach(echo, only(VALIDATOR)) as axon, ThreadPoolExecutor(1) as pool:
        waiting = axon._waiting
        for _ in range(16_000 // len(body)):
            lines.append(connect(axon))
            lines[-1].sendall(ahead())
        until(lambda: waiting.size == len(body) * len(lines))
        with connect(axon) as line:
            line.sendall(ahead())
            assert read_status(line) == 503
        assert status(axon, body, signed(VALIDATOR, 0)) == 200  # one whose time has come
        ahead = pool.submit(status, axon, body, signed(VALIDATOR, 1))  # and one whose clock is a little ahead
        assert [read_status(line) for line in lines[-1:]] == [503]  # in place of the last that came
        now[0] += 10**9
        assert ahead.result() == 200
        for line in lines:
            line.close()
        until(lambda: waiting.size == 0)  # at once, and not when their time has come
        until(lambda: axon.metrics.totals().get("left") == len(lines) - 1)


def test_long_questions_beside_a_clock_that_is_far_ahead(now):
    """Strangers sign long questions a little ahead of the clock, and a validator's own clock is further ahead.
    Older server: answers them at once."""
    body, lines = write_body(Prompting.ask("x" * 900)), []
    with Axon(MINER, max_body=1000, clock=lambda: now[0]).attach(echo, only(VALIDATOR)) as axon, connect(axon) as line:
        short = write_body(Prompting.ask("x"))
        line.sendall(request(short, sign(short, nonce_ns=now[0] + 18 * 10**8)))
        until(lambda: axon._waiting.size == len(short))
        for _ in range(30):
            lines.append(connect(axon))
            lines[-1].sendall(request(body, sign(body, STRANGER, nonce_ns=now[0] + 9 * 10**8)))
        until(lambda: sum(axon.metrics.totals().values()) == 30 - (16_000 - len(short)) // len(body))
        assert axon._waiting.size <= 16_000
        now[0] += 2 * 10**9
        assert read_status(line) == 200
        for other in lines:
            other.close()


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("waits", ["blacklist", "check"])
def test_long_questions_while_the_miner_decides(waits, older):
    """Callers send long questions while the miner waits for its own blacklist or check, or for a store of nonces or of prompts.
    Older server: sets no limit."""
    body, lines = OLD if older else BODY, []
    body += b" " * (900 - len(body))
    decide, allow = asyncio.Event(), only(VALIDATOR)

    async def wait(synapse):
        await decide.wait()
        return allow(synapse) if waits == "blacklist" else None

    def asked(wallet):
        return request(body, old(wallet=wallet) if older else sign(body, wallet))

    functions = {f"{waits}_fn": wait}
    with Axon(MINER, max_body=1000, workers=20).attach(echo, **functions) as axon, connect(axon) as line:
        for _ in range(17):
            lines.append(connect(axon))
            lines[-1].sendall(asked(STRANGER))
            until(lambda: axon._waiting.size == 900 * len(lines))
        short = OLD if older else BODY
        line.sendall(request(short, old() if older else sign(short)))
        until(lambda: axon._waiting.size == 900 * 17 + len(short))
        lines.append(connect(axon))
        lines[-1].sendall(asked(STRANGER))
        until(lambda: sum(axon.metrics.totals().values()) == 1)  # one of the long ones
        axon._server.loop.call_soon_threadsafe(decide.set)
        assert read_status(line) == 200
        until(lambda: axon._waiting.size == 0)
        told = 403 if waits == "blacklist" else 200
        assert sorted(read_status(other) for other in lines) == [told] * 17 + [503]
        for other in lines:
            other.close()


class Body:
    "A question that waits, of which only the size matters."

    def __init__(self, size, gone):
        self.body, self.deadline = b"x" * size, SimpleNamespace(cancel=lambda refusal: gone.append((self, refusal.status)))


@pytest.fixture
def weighed(monkeypatch):
    "Grows by one for each question that is looked at to find which has to go."
    looks, weigh = [], _Waiting._weight
    monkeypatch.setattr(_Waiting, "_weight", lambda *args, **more: looks.append(1) or weigh(*args, **more))
    return looks


def test_large_question_beside_many_small_ones(weighed):
    """While thousands of small questions wait, a large one comes that waits for a moment only, so that many of them have to go.
    Older server: sets no limit."""
    waiting, gone = _Waiting(1_000_000), []
    for _ in range(1000):
        waiting.enter(Body(999, gone), 2.0, early=True)
    assert not gone and not weighed
    waiting.enter(Body(500_000, gone), 0.001, early=True)
    assert len(gone) == 500 and {status for _, status in gone} == {503}
    assert len(weighed) < 1100 and waiting.size == 500 * 999 + 500_000  # no wait for the others


def test_small_questions_where_no_room_is_left(weighed):
    """While so many questions wait that no other has room, more of them come, all of different sizes and signed for different times.
    Older server: sets no limit."""
    waiting, gone, kept = _Waiting(1_000_000), [], []
    for number in range(1000):
        kept.append(Body(900 + number % 100, gone))
        waiting.enter(kept[-1], 1000.0 + 100 * (number % 7), early=True)
    while waiting.size < 999_000:
        waiting.enter(Body(900, gone), 900.0, early=True)
    weighed.clear()
    for number in range(200):
        waiting.enter(Body(1000, gone), 1.0 + number % 7 / 10, early=True)
    assert len(weighed) < 2000  # a few are looked at for each of them, not all that wait
    assert {kept.index(body) % 7 for body, _ in gone[:140]} == {6}  # who would wait longest
    for body in kept:
        waiting.leave(body), waiting.leave(body)
    assert sum(size for size, *_ in waiting._held.values()) == waiting.size
    assert sum(map(len, waiting._lines.values())) == len(waiting._held)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_clock_that_was_two_hours_ahead(where, restart, tmp_path, caplog):
    """The miner's clock is two hours ahead for a while, and is then corrected.
    Older server: refuses a hotkey's nonces below its last one, until it is restarted."""
    shift, nonces = [0], tmp_path / "nonces" if where == "file" else None
    clock = lambda: time.time_ns() + shift[0]
    axon = Axon(MINER, nonces=nonces, clock=clock).attach(echo).start()
    before, shift[0] = sign(), 7200 * 10**9
    ahead = sign(nonce_ns=clock())
    assert status(axon, headers=ahead) == 200
    shift[0] = 0
    if restart:
        axon.stop()
        axon = axon.start() if where == "memory" else Axon(MINER, nonces=nonces, clock=clock).attach(echo).start()
    with axon:
        assert status(axon) == status(axon, OLD, old()) == 200  # at once
        assert status(axon, headers=ahead) == 401
        shift[0] = 7200 * 10**9  # the time comes for which it was signed
        assert status(axon, headers=ahead) == 401
    assert "has gone back by at least 7" in caplog.text and before


def taken(nonces, nonce, hotkey="5x"):
    "Whether a store takes a nonce; the reason where it cannot know."
    try:
        return nonces.check_and_store(hotkey, nonce)
    except Refusal as refusal:
        return refusal.reason


@pytest.mark.skipif(REDIS is None, reason="redis-server is not installed (apt-get install redis-server)")
def test_replay_from_a_shared_store_that_has_forgotten(tmp_path):
    """A request is sent again when its nonce has expired in the shared store and the miner's clock has gone back.
    Older server: -"""
    now = [time.time_ns() // 10**10 * 10**10 + 5 * 10**9]
    first, redis = now[0], Redis(tmp_path)
    try:
        nonces = StoredNonces(Store(redis.url, ME, clock=lambda: now[0], timeout=SECONDS))
        nonces.begin()
        assert [taken(nonces, first), taken(nonces, first), taken(nonces, first + 1)] == [True, False, True]
        a_minute_later(nonces)
        now[0] += 60 * 10**9
        assert taken(nonces, now[0]) is True
        now[0] = first + 10**9  # and it would be fresh again
        assert [taken(nonces, first), taken(nonces, first + 1)] == [f"StaleRequest: {FORGOTTEN}"] * 2
        now[0] = first + 120 * 10**9
        assert taken(nonces, now[0]) is True
    finally:
        redis.kill()


class NoRedis(socketserver.StreamRequestHandler):
    "Answers what comes first like a Redis, and each script with the next of the server's `answers`."

    def handle(self):
        while line := self.rfile.readline():
            parts = []
            for _ in range(int(line[1:])):
                parts.append(self.rfile.read(int(self.rfile.readline()[1:])))
                self.rfile.readline()
            answer = self.server.answers.pop(0) if parts[0] == b"EVAL" else b"+OK\r\n"
            if parts[0] == b"HELLO":
                answer = b"%1\r\n$5\r\nproto\r\n:3\r\n"
            self.wfile.write(answer.replace(b"NUMBER", b"$%d\r\n%s" % (len(parts[-1]), parts[-1])))


def test_store_that_is_no_redis():
    """What answers in place of the shared store is no Redis, or gives the answers to other questions.
    Older server: -"""
    good = b"*2\r\nNUMBER\r\n:1\r\n"
    wrong = [b":1\r\n", b"+OK\r\n", b"*0\r\n", b"$3\r\nfoo\r\n", b"$2\r\n\xff\xff\r\n", b"$-5\r\n", good + b":1\r\n"]
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), NoRedis) as server, ExitStack() as stack:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        store = Store(f"redis://127.0.0.1:{server.server_address[1]}/0", ME, timeout=SECONDS)
        server.answers = [good]  # to `begin`
        with Axon(MINER, nonces=StoredNonces(store)).attach(echo) as axon:
            for answer in wrong:
                server.answers = [answer]
                first = status(axon)
                assert first == (200 if answer.startswith(good) else 503)
                if first == 200:  # the answer that is left over is none to the next question
                    server.answers = [good]
                    assert status(axon) == 503
                code, text = http_get(axon, "/ready")
                assert (code, json.loads(text)["reason"]) == (503, "the store of this miner does not answer")
                store._away_until = 0.0  # later
                server.answers = [good]
                assert status(axon) == 200


@pytest.mark.skipif(REDIS is None, reason="redis-server is not installed (apt-get install redis-server)")
def test_shared_store_that_began_when_the_clock_was_ahead(tmp_path):
    """The clock of the first process that uses a shared store is two hours ahead, and is then corrected.
    Older server: -"""
    right, redis = time.time_ns(), Redis(tmp_path)
    ahead = right + 7200 * 10**9
    now = [ahead]
    try:
        nonces = StoredNonces(Store(redis.url, ME, clock=lambda: now[0], timeout=SECONDS))
        nonces.begin()
        assert taken(nonces, ahead) is True
        now[0] = right
        assert [taken(nonces, right), taken(nonces, right)] == [True, False]  # at once
        assert "began to remember" in taken(nonces, right - 1)
        now[0] = ahead  # the time comes from which it was
        assert taken(nonces, ahead) in (False, f"StaleRequest: {FORGOTTEN}")
        assert taken(nonces, ahead - 5 * 10**9) == f"StaleRequest: {FORGOTTEN}"
    finally:
        redis.kill()


@pytest.mark.parametrize("what", ["damaged", "deleted", "folder deleted", "locked"])
def test_nonce_file_that_is_lost(what, tmp_path):
    """The file of accepted nonces is damaged, deleted or locked by another program while the miner runs.
    Older server: has none."""
    path = tmp_path / "state" / "nonces"
    with Axon(MINER, nonces=path).attach(aecho) as axon:
        assert status(axon, headers=(recorded := sign())) == 200
        if what == "damaged":
            axon._gate.nonces._file.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            path.write_bytes(b"x" * path.stat().st_size)
            until(lambda: status(axon) == 200)  # after a window of refusals
        elif what == "locked":
            other = sqlite3.connect(path, isolation_level=None)
            db = axon._gate.nonces._file.db
            with ThreadPoolExecutor(4) as pool:
                for patience in (SECONDS, 0):  # for the lock, in seconds
                    db.execute(f"PRAGMA busy_timeout = {1000 * patience}")
                    other.execute("BEGIN EXCLUSIVE")
                    waiting = [pool.submit(status, axon, BODY, sign()) for _ in range(4)]
                    if patience:
                        until(lambda: axon._waiting.size == 4 * len(BODY))
                        assert get(axon, "/health")[0] == 200  # the loop goes on meanwhile
                        assert not any(task.done() for task in waiting)
                        other.execute("COMMIT")
                    assert {task.result() for task in waiting} == {200 if patience else 503}
            other.close()
            db.execute(f"PRAGMA busy_timeout = {1000 * SECONDS}")
        else:
            shutil.rmtree(path.parent) if what == "folder deleted" else path.unlink()
        assert status(axon) == 200
        assert status(axon, headers=recorded) == 401
    with Axon(MINER, nonces=path).attach(aecho) as again:
        assert status(again, headers=recorded) == 401
        until(lambda: status(again) == 200)  # a damaged file may cost two seconds


NEEDS_REDIS = pytest.mark.skipif(REDIS is None, reason="redis-server is not installed (apt-get install redis-server)")


def test_nonce_file_that_another_locks(tmp_path):
    """The file of nonces is locked by another program: every request is refused, and `/ready` says why.
    Older server: has no file."""
    path = tmp_path / "nonces"
    with Axon(MINER, nonces=path).attach(echo) as axon:
        assert (status(axon), get(axon, "/ready")[0]) == (200, 200)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert status(axon) == 503
        code, told = get(axon, "/ready")
        assert (code, told["reason"]) == (503, "this miner cannot write down what it accepts")
        other.execute("COMMIT")
        other.close()
        until(lambda: get(axon, "/ready")[0] == 200)  # without any request
        assert status(axon) == 200


def test_nonce_file_whose_place_is_taken(tmp_path, caplog):
    """Something else takes the place of the file of nonces while the miner runs: it is said once, not for each request.
    Older server: has no file."""
    path = tmp_path / "nonces"
    with Axon(MINER, nonces=path).attach(echo) as axon:
        assert status(axon) == 200
        path.unlink()
        path.mkdir()
        assert [status(axon) for _ in range(5)] == [503] * 5
        assert [record.levelname for record in caplog.records if str(path) in record.message] == ["ERROR"] * 2
        path.rmdir()
        until(lambda: status(axon) == 200)


@pytest.fixture
def store_of(tmp_path):
    "Makes a store of nonces of a kind."
    opened = []

    def make(where, clock):
        if where == "memory":
            made = MemoryNonces(clock)
        elif where == "file":
            made = FileNonces(tmp_path / "nonces", clock)
        else:
            opened.append(Redis(tmp_path))
            made = StoredNonces(Store(opened[-1].url, ME, clock=clock, timeout=SECONDS))
            made.begin()
        return made

    yield make
    for redis in opened:
        redis.kill()


@pytest.mark.parametrize("where", ["memory", "file", pytest.param("store", marks=NEEDS_REDIS)])
def test_strangers_who_sign_while_the_clock_is_ahead(where, store_of):
    """Strangers sign requests while the miner's clock is two hours ahead; it is corrected, and the time comes for which they signed.
    Older server: keeps the last nonce of a hotkey: others are served."""
    second, right = 10**9, time.time_ns() // 10**10 * 10**10
    now = [right]
    nonces = store_of(where, lambda: now[0])
    take = lambda who: taken(nonces, now[0], who)
    now[0] += 7200 * second
    for _ in range(30):
        assert take("5stranger") is True
        now[0] += second
    now[0] += 20 * second
    assert take("5other") is True
    if where == "store":
        a_minute_later(nonces)
    now[0] = right + 100 * second
    assert take("5validator") is True
    for later in range(0, 30, 3):
        now[0] = right + (7200 + later) * second
        assert [take("5validator"), take("5validator")] == [True, False]
        assert take("5stranger") == f"StaleRequest: {FORGOTTEN}"
    nonces.close()


def test_clock_that_was_behind_at_a_restart():
    """A request is sent again after a restart with the clock an hour behind, as soon as the clock is right.
    Older server: nonces are in memory only: answered, within 4 s plus the timeout that the header claims."""
    shift = [0]
    clock = lambda: time.time_ns() + shift[0]
    with Axon(MINER, clock=clock).attach(echo) as first:
        recorded, older = sign(), old()
        assert [status(first, headers=recorded), status(first, OLD, older)] == [200, 200]
    shift[0] = -3600 * 10**9
    with Axon(MINER, clock=clock).attach(echo) as second:
        assert status(second, headers=sign(nonce_ns=clock())) == 200
        shift[0] = 0
        assert [status(second, headers=recorded), status(second, OLD, older)] == [401, 401]
        assert [status(second), status(second, OLD, old())] == [200, 200]  # at once


@pytest.mark.parametrize("change", [
    "DROP TABLE nonces; CREATE TABLE nonces (other TEXT)", "UPDATE floor SET nonce = NULL",
    "INSERT INTO dropped VALUES (0, 9223372036854775807)", "INSERT INTO dropped VALUES (2, 1)",
    "UPDATE floor SET nonce = 9223372036854775807", "INSERT INTO callers VALUES (-1, '5x')",
])  # fmt: skip
def test_nonce_file_with_another_content(change, tmp_path, caplog):
    """The file of accepted nonces is a sound one at the start, but its tables are other ones or hold impossible times.
    Older server: has none."""
    path, shift = tmp_path / "nonces", [0]
    clock = lambda: time.time_ns() + shift[0]
    with Axon(MINER, nonces=path).attach(echo) as axon:
        assert status(axon, headers=(recorded := sign())) == 200
    with sqlite3.connect(path) as db:
        db.executescript(change)
    db.close()
    for _ in range(2):
        with Axon(MINER, nonces=path, clock=clock).attach(echo) as axon:
            assert status(axon, headers=recorded) == 401
            shift[0] += 2 * 10**9  # after a window of refusals
            assert status(axon, headers=sign(nonce_ns=clock())) == 200
    assert caplog.text.count("set aside as") == 1 and path.with_suffix(".damaged").exists()


# Bytes ----------------------------------------------------------------------------------------------------------------


def test_body_of_50_mb_announced(axon):
    """A body of 50 MB, announced.
    Older server: no limit of its own: read whole, after the signature was checked."""
    with connect(axon) as line:
        line.sendall(b"POST /Prompting HTTP/1.1\r\nhost: x\r\ncontent-length: 50000000\r\n\r\n")
        assert read_status(line) == 413  # not one byte of the body was needed


def test_body_of_50_mb_chunked(axon):
    """A body of 50 MB in chunks.
    Older server: the same."""
    chunk, sent = b"10000\r\n" + b"x" * 65536 + b"\r\n", 0
    with connect(axon) as line:
        line.sendall(b"POST /Prompting HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            while sent < 50_000_000:
                sent += line.send(chunk)
        except OSError:
            pass
    assert sent < 5_000_000  # what the limits and the system's buffers take


def test_headers_of_100_kb(axon):
    """Headers of 100 KB: in one, in many, without an end.
    Older server: -"""
    many = b"".join(b"x-%d: y\r\n" % i for i in range(12_000))
    for head in (b"x: " + b"y" * 100_000 + b"\r\n\r\n", many + b"\r\n", b"x: " + b"y" * 100_000):
        with connect(axon) as line:
            line.sendall(b"POST /Prompting HTTP/1.1\r\nhost: x\r\n" + head)
            assert read_status(line) == 431
    body = b"2\r\n{}\r\n0\r\n" + many * 4 + b"\r\n"  # trailers are headers, too
    with connect(axon) as line:
        line.sendall(b"POST /Prompting HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + body)
        assert read_status(line) in (None, 401, 431)


POST = b"POST /Prompting HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
MANY = {  # a quarter of a megabyte in small parts: the last status, what is called for each part, and how often it may be
    "chunks": (CHUNKED + b"1\r\nx\r\n" * 40_000, 400, "on_body", 1100),
    "trailers": (CHUNKED + b"1\r\nx\r\n0\r\n" + b"a:\r\n" * 60_000, 431, "on_header", 200),
    "headers": (POST + b"a:\r\n" * 60_000, 431, "on_header", 200),
    "requests": (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 9_000, 400, "on_headers_complete", 40),
    "requests behind one that is refused": (
        b"CONNECT / HTTP/1.1\r\nhost: x\r\n\r\n" + b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 9_000, 400, "on_headers_complete", 2),
}


@pytest.mark.parametrize("what", MANY)
def test_a_quarter_of_a_megabyte_in_small_parts(what, monkeypatch):
    """A stranger sends chunks of one byte, trailers, short headers or requests by the ten thousand, as fast as it can.
    Older server: parses all that has arrived, while others wait."""
    data, last, method, most = MANY[what]
    called, original = [], getattr(connection._Reader, method)
    monkeypatch.setattr(connection._Reader, method, lambda *args: called.append(1) or original(*args))
    with Axon(MINER).attach(echo) as axon, connect(axon) as line:
        line.sendall(data)
        answers = b""
        with suppress(ConnectionError):
            while more := line.recv(65536):
                answers += more
        assert int(answers.split(b"HTTP/1.1 ")[-1][:3]) == last and b"500" not in answers
        assert len(called) <= most
        assert status(axon) == 200


def test_a_body_in_small_chunks_of_its_own_length():
    """A question in chunks of one byte, and one in 2000 chunks of 100.
    Older server: takes both."""
    for body, size in ((BODY, 1), (write_body(Prompting.ask("x" * 200_000)), 100)):
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[i : i + size] for i in range(0, len(body), size)))
        with Axon(MINER).attach(echo) as axon, connect(axon) as line:
            lines = "".join(f"{k}: {v}\r\n" for k, v in sign(body).items()).encode()
            line.sendall(CHUNKED[:-2] + lines + b"\r\n" + chunks + b"0\r\n\r\n")
            assert read_status(line) == 200


@pytest.mark.slow
@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_thousand_slow_clients(part):
    """A thousand clients that send a byte now and then, while good requests go on.
    Older server: sets no limit for the time that a request takes to arrive."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    head = b"POST /Prompting HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
    with Axon(MINER, body_timeout=5.0, limits=Limits(head_timeout=5.0)).attach(aecho) as axon:
        lines = []
        try:
            for _ in range(1000):
                lines.append(connect(axon))
                lines[-1].sendall(head + (b"\r\n" if part == "body" else b"x-slow: "))
            until(lambda: axon._server.connections >= 900)
            for line in lines[::10]:
                line.sendall(b"x")
            with Dendrite(VALIDATOR, allow_private=True) as dendrite:
                good = [dendrite.query([axon], QUESTION, timeout=5)[0].dendrite.status_code for _ in range(100)]
            assert good == [200] * 100
            until(lambda: axon._server.connections <= 10)  # and the slow ones are sent away
            assert read_status(lines[500]) == 408
        finally:
            for line in lines:
                line.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_second_request_that_does_not_go_on(later):
    """A good request, and on the same connection the beginning of another that never goes on.
    Older server: sets no limit for the time that a request takes to arrive."""
    with Axon(MINER, limits=Limits(head_timeout=60.0)).attach(echo) as axon, connect(axon) as line:
        line.sendall(request())
        assert read_status(line) == 200
        line.sendall(b"POST /Prompting HTTP/1.1\r\nhost: x\r\nx-slow: ")
        until(lambda: axon._server.crowd.size)
        later(axon, 60.0)
        assert read_status(line) == 408
        assert axon.metrics.registry.get_sample_value("axon_connections_refused_total", {"reason": "slow"}) == 1


def test_request_that_arrives_while_the_server_is_busy(later):
    """The rest of a request arrives in time, while the server is busy for longer than a request may take.
    Older server: -"""
    busy, free = threading.Event(), threading.Event()
    with Axon(MINER, limits=Limits(head_timeout=60.0)).attach(echo) as axon, connect(axon) as line:
        data = request()
        line.sendall(data[:100])
        until(lambda: axon._server.crowd.size >= 100)  # with what headers take
        axon._server.loop.call_soon_threadsafe(lambda: busy.set() or free.wait(SECONDS))
        assert busy.wait(SECONDS)
        line.sendall(data[100:])
        time.sleep(0.1)  # the next look is due
        later(axon, 60.0)
        free.set()
        assert read_status(line) == 200


HALF = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9000\r\n\r\n" + b"x" * 4000
NEXT = {  # what a caller does that has not read its answer, and what is too much then; the reason counted
    "silent": (b"", Limits(write_timeout=0.2), ["unread"]),
    "oldest connection": (b"GET / HTTP/1.1\r\nhost: x\r\nx: ", Limits(max_connections=1), ["connections"]),
    "oldest body": (HALF, Limits(max_waiting=6000), ["memory"]),
    "endless body": (HALF, Limits(max_message=2000), ["message"]),
}


@pytest.mark.parametrize("then", NEXT)
def test_caller_that_does_not_read(then):
    """A caller that does not read its answer, and says nothing more, or begins another request.
    Older server: -"""
    more, limits, why = NEXT[then]

    async def long_answer(scope, receive, send):  # too long for the system's buffers, so that a part of it waits here
        size = 60_000 if scope["method"] == "PUT" else 1
        head = [(b"content-length", b"%d" % size)]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b"x" * size})
        answered.set()

    async def nothing_more():
        pass

    refused, answered, sock = [], threading.Event(), listen("127.0.0.1", 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server = Server(long_answer, sock, limits, refused.append).start()
    try:
        with socket.socket() as line, socket.socket() as other:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.connect(sock.getsockname())
            line.sendall(b"PUT / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert answered.wait(SECONDS)
            line.sendall(more)
            if then.startswith("oldest"):
                until(lambda: server.crowd.size)  # the beginning has arrived
                other.connect(sock.getsockname())
                other.sendall(HALF)
            until(lambda: refused == why)
            until(lambda: server.connections == then.startswith("oldest"))  # closed at once, with the answer unread
    finally:
        server.stop(nothing_more, SECONDS)


def test_garbage_behind_an_answer_that_is_not_read_yet(caplog):
    """A caller sends garbage before it has read a large answer, and reads then.
    Older server: -"""

    async def long_answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"600000")]})
        await send({"type": "http.response.body", "body": b"x" * 600_000})

    async def nothing_more():
        pass

    refused, sock = [], listen("127.0.0.1", 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server = Server(long_answer, sock, Limits(), refused.append).start()
    try:
        with socket.socket() as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.connect(sock.getsockname())
            line.sendall(b"PUT / HTTP/1.1\r\nhost: x\r\n\r\n")
            until(lambda: any(c._transport.get_write_buffer_size() for c in server.crowd))
            line.sendall(b"garbage\r\n\r\n")
            until(lambda: refused)
            line.settimeout(SECONDS)
            data = b"".join(iter(lambda: line.recv(65_536), b""))
        assert data.count(b"HTTP/1.1 200") == data.count(b"HTTP/1.1 400") == 1 and data.count(b"HTTP/1.1") == 2
    finally:
        server.stop(nothing_more, SECONDS)
    assert not [row for row in caplog.records if row.levelno >= logging.ERROR]


def test_many_bodies_that_are_not_completed():
    """Large bodies on many connections, none of them completed.
    Older server: sets no limit."""
    limits = Limits(max_waiting=1_000_000)
    with Axon(MINER, limits=limits).attach(echo) as axon:
        lines = [connect(axon) for _ in range(40)]
        for line in lines:
            with suppress(ConnectionError):
                line.sendall(request(BODY + b" " * 200_000)[:100_000])
            assert status(axon) == 200
            assert axon._server.crowd.size <= 1_000_000
        until(lambda: sum(read_or_none(line) for line in lines) >= 30)  # those that began first were sent away
        for line in lines:
            line.close()


def test_unfinished_bodies_of_strangers_beside_a_permitted_caller():
    """Strangers leave so many bodies unfinished that some are dropped: none of a permitted caller, whose request began first.
    Older server: -"""
    with Axon(MINER, limits=Limits(max_waiting=1_000_000)).attach(echo) as axon, connect(axon) as permitted:
        permitted.sendall(request())
        assert read_status(permitted) == 200
        again = request()
        permitted.sendall(again[:-5])
        until(lambda: axon._server.crowd.size)
        lines = [connect(axon) for _ in range(20)]
        for line in lines:
            with suppress(ConnectionError):
                line.sendall(request(BODY + b" " * 200_000)[:100_000])
        gone = {"reason": "memory"}
        until(lambda: axon.metrics.registry.get_sample_value("axon_connections_refused_total", gone))
        permitted.sendall(again[-5:])
        assert read_status(permitted) == 200
        for line in lines:
            line.close()


def only(*wallets):
    "A blacklist that lets these callers through."
    allowed = {wallet.hotkey.ss58_address for wallet in wallets}
    return lambda synapse: synapse.dendrite.hotkey not in allowed


REGISTERED = make_wallet("registered")  # its requests are permitted, and it means no good


def test_unfinished_bodies_of_a_registered_caller():
    """A registered caller leaves unfinished bodies on connections that were permitted once; validators come on new ones.
    Older server: sets no limit."""
    with Axon(MINER, limits=Limits(max_waiting=1_000_000)).attach(echo, only(REGISTERED, VALIDATOR)) as axon:
        lines = [connect(axon) for _ in range(12)]
        for line in lines:
            line.sendall(request(BODY, sign(BODY, REGISTERED)))
            assert read_status(line) == 200
        crowd, held = axon._server.crowd, 0
        for line in lines:
            held += min(100_000, 999_900 - held)
            line.sendall(request(BODY + b" " * 200_000)[: 100_000 - max(0, 100_000 * len(lines) - 999_900) // len(lines)])
        until(lambda: crowd.size > 900_000)
        assert [status(axon) for _ in range(5)] == [200] * 5
        with connect(axon) as line:  # and one whose own body is long
            long = write_body(Prompting.ask("x" * 50_000))
            line.sendall(request(long, sign(long)))
            assert read_status(line) == 200
        for line in lines:
            line.close()


def test_connections_of_a_registered_caller():
    """A registered caller holds all places with connections that were permitted once; validators come on new ones, all at once.
    Older server: sets no limit; its file descriptors run out."""
    with Axon(MINER, limits=Limits(max_connections=150, max_per_address=150)).attach(echo, only(REGISTERED, VALIDATOR)) as axon:
        lines = [connect(axon) for _ in range(150)]
        for line in lines:
            line.sendall(request(BODY, sign(BODY, REGISTERED)))
            assert read_status(line) == 200
        assert axon._server.connections == 150 and axon._server.crowd.strangers == 150 - 64  # an eighth, or 64
        asking = [connect(axon) for _ in range(30)]
        for line in asking:
            line.sendall(request())
        assert [read_status(line) for line in asking] == [200] * 30
        for line in (*lines, *asking):
            line.close()


def test_refused_requests_on_a_permitted_connection():
    """A registered caller replays a request, or asks for pages, on connections that were permitted once, ahead of all newcomers.
    Older server: -"""
    with Axon(MINER).attach(echo, only(VALIDATOR)) as axon, connect(axon) as line:
        crowd, good = axon._server.crowd, request()
        for bad, told in ((good, 401), (request(BODY, sign(BODY, STRANGER)), 403), (b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n", 404)):
            line.sendall(good if bad is good else request())
            assert read_status(line) == 200 and crowd.strangers == 0
            line.sendall(bad)
            assert read_status(line) == told
            until(lambda: crowd.strangers == 1)  # it waits for its turn like others from now on
        line.sendall(request())
        assert read_status(line) == 200 and crowd.strangers == 0
        malformed = b'{"messages": 1}'  # a mistake of one who may ask is no attack
        line.sendall(request(malformed, sign(malformed)))
        assert read_status(line) == 400 and crowd.strangers == 0


def test_too_many_connections():
    """More connections than the server takes: those that say nothing make room.
    Older server: sets no limit."""
    with Axon(MINER, limits=Limits(max_connections=20)).attach(echo) as axon:
        silent = [connect(axon) for _ in range(50)]
        assert [status(axon) for _ in range(5)] == [200] * 5
        for line in silent:
            line.close()


def connect_from(axon, address):
    "A line from another address of loopback, as if from another host."
    return socket.create_connection((axon.host, axon.port), SECONDS, source_address=(address, 0))


ADDRESSES = [f"127.0.{i}.1" for i in range(1, 9)]


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="the system does not tell how many connections may wait")
def test_many_that_connect_while_the_server_is_busy():
    """Six hundred connect in a moment in which the server is busy with something else.
    Older server: two thousand may wait."""
    busy, free = threading.Event(), threading.Event()

    async def hold(synapse):
        busy.set()
        free.wait(SECONDS)  # stops the event loop
        return echo(synapse)

    with Axon(MINER).attach(hold) as axon, ThreadPoolExecutor(1) as pool:
        held = pool.submit(status, axon)
        assert busy.wait(SECONDS)
        lines = [connect(axon) for _ in range(600)]
        info = axon._server._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        waiting, most = struct.unpack_from("2I", info, 24)
        free.set()
        for line in lines:
            line.sendall(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n")
        assert {read_status(line) for line in lines} == {404} and held.result() == 200
        for line in lines:
            line.close()
    assert waiting == 600 <= most


def test_idle_connections_that_have_had_an_answer():
    """All places taken by connections that ask `GET /` again and again, from one address and from many.
    Older server: sets no limit; its file descriptors run out."""
    with Axon(MINER, limits=Limits(max_connections=80, max_per_address=20)).attach(echo) as axon:
        for addresses in (ADDRESSES[:1], ADDRESSES):
            held = [connect_from(axon, a) for a in addresses for _ in range(160 // len(addresses))]
            for _ in range(3):  # each time the lines that were closed are opened anew
                for i, line in enumerate(held):
                    try:
                        line.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                        assert read_status(line) in (404, None)
                    except OSError:
                        line.close()
                        held[i] = connect_from(axon, addresses[i % len(addresses)])
                assert status(axon) == 200
                with Dendrite(VALIDATOR) as dendrite:
                    assert [ask(dendrite, axon).is_success for _ in range(5)] == [True] * 5
            assert axon._server.connections <= 81
            for line in held:
                line.close()


def test_many_callers_behind_one_address_who_come_at_once(monkeypatch):
    """Sixty validators behind one proxy connect in a moment in which the server is busy: three times the share of an address.
    Older server: sets no limit."""
    monkeypatch.setattr(limits, "_FRESH", 60.0)  # a moment, on a machine that stands still
    busy, free = threading.Event(), threading.Event()

    async def hold(synapse):
        if not busy.is_set():
            busy.set()
            free.wait(SECONDS)  # stops the event loop
        return echo(synapse)

    with Axon(MINER, limits=Limits(max_connections=80, max_per_address=20)).attach(hold) as axon, ThreadPoolExecutor(1) as pool:
        held = pool.submit(status, axon)
        assert busy.wait(SECONDS)
        lines = [connect(axon) for _ in range(60)]
        for line in lines:
            line.sendall(request())
        free.set()
        assert [read_status(line) for line in lines] == [200] * 60 and held.result() == 200
        for line in lines:
            line.close()


def test_strangers_do_not_push_out_a_permitted_caller():
    """Many new connections, while a permitted caller's connection is idle.
    Older server: -"""
    owned = VALIDATOR.hotkey.ss58_address
    with Axon(MINER, limits=Limits(max_connections=20)).attach(echo, lambda s: s.dendrite.hotkey != owned) as axon:
        with connect_from(axon, "127.0.9.1") as permitted, connect_from(axon, "127.0.9.1") as refused:
            permitted.sendall(request())
            refused.sendall(request(headers=sign(wallet=STRANGER)))  # signed, but refused by the blacklist
            assert [read_status(permitted), read_status(refused)] == [200, 403]
            held = [connect(axon) for _ in range(60)]
            gone = {"reason": "connections"}
            until(lambda: axon.metrics.registry.get_sample_value("axon_connections_refused_total", gone) == 42)
            permitted.sendall(request())
            assert read_status(permitted) == 200
            assert read_or_none(refused)
            for line in held:
                line.close()


@pytest.mark.parametrize("sent", [0, 1, 10], ids=["idle", "begun", "almost whole"])
def test_burst_from_the_address_of_a_permitted_caller(sent, monkeypatch):
    """Silent strangers connect all at once from the address of a permitted caller, who is idle or in the middle of a request.
    Older server: -"""
    monkeypatch.setattr("prompting_nb.network.limits._FRESH", 0.3)
    with Axon(MINER, limits=Limits(max_connections=80, max_per_address=20)).attach(echo) as axon, connect(axon) as permitted:
        permitted.sendall(request())
        assert read_status(permitted) == 200
        time.sleep(0.5)  # it is not fresh any more
        again = request()
        permitted.sendall(again[:sent] if sent < 2 else again[:-sent])
        lines = [connect(axon) for _ in range(30)]
        until(lambda: axon._server.connections >= 20)
        permitted.sendall(again[sent:] if sent < 2 else again[-sent:])
        assert read_status(permitted) == 200
        for line in lines:
            line.close()


HALVES = ["older format without a body", "older format with half a body", "half a body", "a stream that is not read"]


@pytest.mark.parametrize("what", HALVES)
def test_permitted_callers_that_hold_on_to_their_connections(what):
    """Permitted callers sign one head after the other and send no body, or ask for large answers and do not read them.
    Older server: has no bound."""
    long, most, lines, asked = "x" * 8_000_000, 10, [], []

    def forward(synapse):
        synapse.completion = long if isinstance(synapse, StreamPrompting) else synapse.prompt
        return synapse

    few = dict(workers=2, max_queue=4, limits=Limits(max_connections=most))
    with Axon(MINER, **few).attach(forward, lambda synapse: asked.append(synapse)) as axon:
        try:
            for n in range(1, 3 * most):
                if what == HALVES[3]:
                    lines.append(unread(axon, "/StreamPrompting"))
                    until(lambda n=n: len(asked) == n and axon.health()["running"] == axon.health()["waiting"] == 0)
                else:
                    whole = request(*(OLD, old()) if "older" in what else (BODY, sign()))
                    lines.append(connect(axon))
                    lines[-1].sendall(whole[: whole.index(b"\r\n\r\n") + (4 if what == HALVES[0] else 9)])
                    until(lambda n=n: len(asked) == n or "older" not in what)
            until(lambda: axon._server.connections <= most)
            until(lambda: axon.health()["running"] == axon.health()["waiting"] == 0)
            assert status(axon) == status(axon, OLD, old()) == 200
        finally:
            for line in lines:
                line.close()


def test_permitted_callers_that_hang_up_by_half_and_do_not_read(later):
    """Permitted callers ask for streams, read nothing, and say that they send no more, but keep the connections.
    Older server: -"""
    told = []

    async def forward(synapse):
        for _ in range(100):
            yield "word " * 8_000
            await asyncio.sleep(0.01)

    limits = Limits(write_timeout=60.0, max_connections=3, refused=told.append)
    with Axon(MINER, workers=8, limits=limits).attach(forward) as axon:
        axon._server._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # so that a part waits in the miner
        lines = []
        for _ in range(9):
            lines.append(unread(axon, "/StreamPrompting"))
            name = lines[-1].getsockname()
            until(lambda: any(c.client == name and c._transport.get_write_buffer_size() for c in axon._server.crowd))
            lines[-1].shutdown(socket.SHUT_WR)
        later(axon, 60.0)
        until(lambda: axon._server.connections == 0)
        assert told.count("connections") >= 5 and "unread" in told  # they make room, and the last are closed in time
        for line in lines:
            line.close()


def test_request_behind_a_permitted_one_whose_body_does_not_come():
    """A permitted caller sends a second head ahead on each of its connections, and never its body.
    Older server: -"""
    few = dict(workers=2, max_queue=4, limits=Limits(max_connections=8))
    with Axon(MINER, **few).attach(echo, only(REGISTERED, VALIDATOR)) as axon:
        lines = [connect(axon) for _ in range(8)]
        for n in range(30):
            body = BODY + b" " * n
            lines.append(connect(axon))
            lines[-1].sendall(request(body, sign(body, REGISTERED)) + request(BODY, sign(BODY, REGISTERED))[:-3])
            assert read_status(lines[-1]) == 200
            assert axon._server.connections <= 8 + 2
        assert status(axon) == 200
        for line in lines:
            line.close()


def test_idle_time_is_short_when_nearly_all_places_are_taken(later):
    """Idle connections that take up most places.
    Older server: -"""
    limits = Limits(max_connections=20, head_timeout=60.0, idle_timeout=3600.0)
    with Axon(MINER, limits=limits).attach(echo) as axon:
        held = [connect(axon) for _ in range(18)]
        for line in held:
            line.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert [read_status(line) for line in held] == [404] * 18  # all of them are there, at first
        later(axon, 60.0)
        until(lambda: axon._server.connections <= 15)
        for line in held:
            line.close()


def test_pipelined_requests_whose_answers_nobody_reads(later):
    """35 000 requests sent at once on one connection, of which no answer is read.
    Older server: holds them for ever."""
    limits = Limits(write_timeout=60.0, head_timeout=60.0)
    with ThreadPoolExecutor(1) as pool, Axon(MINER, limits=limits).attach(echo) as axon, connect(axon) as line:
        sending = pool.submit(line.sendall, b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n" * 35_000)
        answered = axon.metrics.requests.labels("refused", "http")._value.get
        until(answered)
        later(axon, 60.0)
        until(lambda: axon._server.connections == 0)
        assert isinstance(sending.exception(SECONDS), (OSError, type(None))) and answered() <= 20
        assert status(axon) == 200


def unread(axon, path="/Prompting", wallet=VALIDATOR, timeout=SECONDS):
    "A line whose caller asks and reads nothing."
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.connect((axon.host, axon.port))
    body = write_body(Prompting.ask("hello", timeout=timeout))
    line.sendall(request(body, sign(body, wallet, path), path))
    return line


def test_large_answers_that_nobody_reads():
    """Permitted callers ask for large answers and do not read them.
    Older server: keeps the answers and the connections for ever."""
    long = "x" * 8_000_000

    async def large(synapse):
        synapse.completion = long if synapse.prompt == "hello" else "short"
        return synapse

    with Axon(MINER, workers=1, limits=Limits(write_timeout=0.5)).attach(large) as axon:
        lines = [unread(axon) for _ in range(3)]
        until(lambda: axon.metrics.totals().get("answered") == 3)
        assert axon.health()["running"] == 0  # the worker is free while they are on their way
        body = write_body(Prompting.ask("another"))
        assert status(axon, body) == 200
        until(lambda: axon._server.connections == 0)
        reason = {"reason": "unread"}
        assert axon.metrics.registry.get_sample_value("axon_connections_refused_total", reason) == 3
        for line in lines:
            line.close()


def test_the_rest_of_an_answer_that_nobody_reads(later):
    """A caller reads nothing, and what is left of the last answer is small.
    Older server: keeps the connection as if it were idle."""
    asked = []

    async def forward(synapse):
        asked.append(1)
        synapse.completion = "x" * 150_000
        return synapse

    with Axon(MINER, limits=Limits(write_timeout=60.0)).attach(forward) as axon, socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect((axon.host, axon.port))
        unsent = lambda: [c for c in axon._server.crowd if c._transport.get_write_buffer_size()]
        for number in range(200):  # until the system takes no more
            line.sendall(request())
            until(lambda: len(asked) > number and axon.health()["running"] == 0)
            time.sleep(0.02)
            if unsent():
                break
        assert number < 199
        refused = lambda: axon.metrics.registry.get_sample_value("axon_connections_refused_total", {"reason": "unread"})
        later(axon, 60.0)
        until(lambda: axon._server.connections == 0)
        assert refused() == 1


def test_a_server_that_waits_while_it_sends():
    """Another ASGI server than ours waits until a slow caller has taken the answer.
    Older server: -"""
    axon, sending, taken = Axon(MINER, workers=1).attach(aecho), asyncio.Event(), asyncio.Event()

    async def receive():
        return {"type": "http.request", "body": BODY}

    async def send(message):
        if message["type"] == "http.response.body":
            sending.set()
            await taken.wait()

    headers = [(key.lower().encode(), value.encode()) for key, value in sign().items()]
    scope = {"type": "http", "method": "POST", "path": "/Prompting", "raw_path": b"/Prompting", "query_string": b"", "headers": headers}

    async def check():
        serving = asyncio.ensure_future(axon(scope, receive, send))
        await asyncio.wait_for(sending.wait(), SECONDS)
        assert axon.health()["running"] == 0  # the worker is free
        taken.set()
        await serving

    asyncio.run(check())


@pytest.mark.parametrize("plain", [True, False], ids=["generator", "async generator"])
def test_stream_that_nobody_reads(plain):
    """A stream without end that is not read.
    Older server: -"""
    closed = threading.Event()

    def endless(synapse):
        try:
            while True:
                yield "word " * 1000
        finally:
            closed.set()

    async def endless_async(synapse):
        try:
            while True:
                yield "word " * 1000
        finally:
            closed.set()

    with Axon(MINER, workers=1, limits=Limits(write_timeout=0.3)).attach(endless if plain else endless_async) as axon:
        with unread(axon, "/StreamPrompting"):
            assert closed.wait(SECONDS)  # long before the caller's time is up
            until(lambda: axon.health()["running"] == 0 and axon._server.connections == 0)


@pytest.mark.parametrize("size", [10, 200_000])
def test_caller_that_hangs_up_while_a_long_question_is_worked_on(size):
    """A caller asks, at length, and leaves before the answer.
    Older server: works on."""
    begun = threading.Event()

    async def forward(synapse):
        begun.set()
        await asyncio.sleep(100)

    body = write_body(Prompting.ask("x" * size, timeout=100))
    with Axon(MINER, workers=1).attach(forward) as axon:
        with connect(axon) as line:
            line.sendall(request(body))
            assert begun.wait(SECONDS)
        until(lambda: axon.health()["running"] == 0)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "coroutine"])
@pytest.mark.parametrize("how", ["leave", "run out of time"])
def test_many_that_wait_and_go_at_once(how, plain):
    """Sixty callers wait for four workers, and all leave in one moment, or run out of time.
    Older server: answers them."""

    async def slow(synapse):
        await asyncio.sleep(0.004)
        return echo(synapse)

    def slow_plain(synapse):
        time.sleep(0.004)
        return echo(synapse)

    body = write_body(Prompting.ask("x", timeout=SECONDS if how == "leave" else 0.05))
    with Axon(MINER, workers=4).attach(slow_plain if plain else slow) as axon:
        for _ in range(6):
            lines, signed = [connect(axon) for _ in range(60)], [request(body) for _ in range(60)]
            for line, data in zip(lines, signed):
                line.sendall(data)
            if how == "leave":
                time.sleep(0.05)
            for line in lines:
                assert how == "leave" or read_status(line) in (200, 504)
                line.close()
            until(lambda: (axon.health()["running"], axon.health()["waiting"]) == (0, 0))
        assert status(axon) == 200


@pytest.mark.parametrize("how", ["closes", "resets", "shuts down"])
@pytest.mark.parametrize("ahead", [1, 3])
def test_caller_that_hangs_up_behind_requests_sent_ahead(ahead, how):
    """A caller sends several requests at once, and leaves while the first is worked on.
    Older server: works on."""
    begun = threading.Event()

    async def forward(synapse):
        begun.set()
        await asyncio.sleep(100)

    body = write_body(Prompting.ask("x", timeout=100))
    with Axon(MINER, workers=1, limits=Limits(idle_timeout=0.4)).attach(forward) as axon, connect(axon) as line:
        line.sendall(b"".join(request(body) for _ in range(1 + ahead)))
        assert begun.wait(SECONDS)
        line.sendall(request(body)[:-5])  # what nobody reads for the present
        if how == "shuts down":
            line.shutdown(socket.SHUT_WR)
        else:
            linger = struct.pack("ii", how == "resets", 0)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            line.close()
        until(lambda: axon.health()["running"] == 0 and axon._server.connections == 0)


def test_caller_of_a_long_question_is_heard_after_it():
    """The whole of a long question arrives at once, and its caller may hang up afterwards.
    Older server: -"""

    class Line(asyncio.Transport):
        reading, ended = True, False
        pause_reading = lambda self: setattr(self, "reading", False)
        resume_reading = lambda self: setattr(self, "reading", True)
        close = abort = lambda self: setattr(self, "ended", True)
        is_closing = lambda self: self.ended
        set_write_buffer_limits = lambda self, high: None

    async def check():
        taken, gone = asyncio.Event(), asyncio.Event()

        async def app(scope, receive, send):
            assert len((await receive())["body"]) == 200_000
            scope["extensions"]["connection.on_leave"](gone.set)
            taken.set()
            await asyncio.wait_for(gone.wait(), SECONDS)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

        tasks, line = set(), Line()
        served = connection.Connection(app, connection.Crowd(Limits()), tasks)
        served.connection_made(line)
        served.data_received(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n" + b"x" * 200_000)
        assert not line.reading
        await asyncio.wait_for(taken.wait(), SECONDS)
        assert line.reading
        served.eof_received()
        await asyncio.gather(*tasks)

    asyncio.run(check())


def test_answered_request_leaves_nothing_in_memory():
    """Requests and connections that are over are freed at once, with their bodies, and do not wait for the garbage collector.
    Older server: -"""

    async def check():
        with Axon(MINER).attach(aecho) as axon:
            tasks = set()
            served = connection.Connection(axon, connection.Crowd(Limits()), tasks)
            served.connection_made(Nowhere())
            asked = [request(), b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n", request(headers={}), request()]
            gc.collect()
            gc.set_debug(gc.DEBUG_SAVEALL)  # keeps what the collector finds
            for data in asked:
                served.data_received(data)
                while tasks:
                    await asyncio.gather(*tasks)
            gc.collect()
            assert not [o for o in gc.garbage if type(o).__module__.startswith("prompting_nb")]
            served.connection_lost(None)
            for end in (b"", b"GET / HTTP/1.1\r\nhost: x\r\nx: ", b"this is no HTTP", request()[:-9], request()):
                leaving = connection.Connection(axon, connection.Crowd(Limits()), tasks)
                leaving.connection_made(Nowhere())
                leaving.data_received(end)
                await asyncio.sleep(0)
                leaving.connection_lost(None)
                del leaving
                while tasks:
                    await asyncio.gather(*tasks)
            gc.collect()

    gc.disable()
    try:
        asyncio.run(check())
        ours = [o for o in gc.garbage if type(o).__module__.startswith("prompting_nb")]
        assert not ours, " ".join(type(o).__qualname__ for o in ours)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def of_a_server(app, *parts):
    "A connection as a server makes it."
    line = connection.Connection(app, *parts)
    line.connection_made(Nowhere())
    return line


async def empty(scope, receive, send):
    "An application that reads all and answers with nothing; who asks for /known is permitted."
    if scope["path"] == "/known":
        scope["extensions"]["connection.permit"]()
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


async def until_idle(*lines):
    "Wait until everything that came on these connections is answered."
    while any(line._serving or line._ahead or len(line._inlet) for line in lines):
        await asyncio.sleep(0)


def test_many_bytes_of_many_strangers_in_one_moment(monkeypatch):
    """Twenty strangers send sixteen requests of a thousand chunks each in one moment, and after them a known caller asks: a few of
    these bytes are parsed in each turn of the loop, and those of the known caller first.
    Older server: parses all that has arrived, while others wait."""
    feed, turn, most, order = connection._Reader.feed, [], [0], []

    def counted(reader, data):
        if not turn:
            asyncio.get_running_loop().call_soon(turn.clear)
        turn.append(len(data))
        order.append(reader)
        most[0] = max(most[0], sum(turn))
        feed(reader, data)

    async def check():
        crowd = connection.Crowd(Limits())
        parts = empty, crowd, set(), connection.Turns(), Pace(seconds=0)
        known, *strangers = (of_a_server(*parts) for _ in range(21))
        known.data_received(b"GET /known HTTP/1.1\r\nhost: x\r\n\r\n")
        await until_idle(known)
        monkeypatch.setattr(connection._Reader, "feed", counted)
        sent = 16 * (CHUNKED + 1000 * b"1\r\nx\r\n" + b"0\r\n\r\n")
        for line in strangers:
            line.data_received(sent)
        size = 3 * connection._PART
        known.data_received(b"POST /known HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + size * b"x")
        assert crowd.size == 20 * len(sent) + len(known._inlet) and not order
        await until_idle(known, *strangers)
        assert order[:4] == 4 * [known._reader] and most[0] <= 3 * connection._PART
        assert crowd.size == 0 and order.count(strangers[0]._reader) == -(-len(sent) // connection._PART)

    asyncio.run(check())
    with Axon(MINER).attach(echo) as axon, connect(axon):
        until(lambda: len(axon._server.crowd) == 1)
        assert isinstance(next(iter(axon._server.crowd))._pace, Pace)


def test_somebody_new_while_strangers_come_and_go():
    """In each turn of the loop another stranger sends a little and is never heard of again, and somebody new has a longer question.
    Older server: -"""

    async def check():
        served = []

        async def app(scope, receive, send):
            while (await receive()).get("more_body"):
                pass
            served.append(scope["path"])
            await empty(scope, receive, send)

        parts = app, connection.Crowd(Limits()), set(), connection.Turns(), Pace(seconds=0)
        lines, little = [], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"

        def another(data):
            lines.append(of_a_server(*parts))
            lines[-1].data_received(data)

        for _ in range(20):
            another(little)
        size = 2 * connection._PART  # three parts, with the headers
        another(b"POST /new HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + size * b"x")
        for turn in range(120):
            another(little)
            await asyncio.sleep(0)
            if "/new" in served:
                break
        assert "/new" in served
        for line in lines:
            line.connection_lost(None)

    asyncio.run(check())


def test_who_has_hung_up_is_not_read():
    """A stranger sends a lot, and closes before it is its turn: nothing of that is parsed.
    Older server: -"""
    here, there = socket.socketpair()

    class Closed(Line):
        get_extra_info = lambda self, name, default=None: here if name == "socket" else default

    async def check():
        pace = Pace(seconds=0)
        lines = [connection.Connection(empty, connection.Crowd(Limits()), set(), None, pace) for _ in range(2)]
        for line in lines:
            line.connection_made(Closed())
        there.close()
        lines[0].data_received(b"GET / HTTP/1.1\r\nhost: x\r\n")  # there is time at once
        lines[1].data_received(b"GET / HTTP/1.1\r\nhost: x\r\n")
        while len(lines[1]._inlet):
            await asyncio.sleep(0)
        assert [line._reader.part for line in lines] == ["head", ""] and lines[1]._transport.is_closing()

    asyncio.run(check())
    here.close()


def test_half_a_head_behind_requests():
    """Half a head comes in one piece with the requests before it: it has the time of a head, and not of an idle connection.
    Older server: -"""

    async def check():
        line = of_a_server(empty, connection.Crowd(Limits()), set(), connection.Turns(), Pace(seconds=0))
        start = b"GET / HTTP/1.1\r\nhost: x\r\nx: "
        whole = start + (connection._PART - len(start) - 4) * b"x" + b"\r\n\r\n"
        line.data_received(whole + b"GET / HTTP/1.1\r\nhost")
        await until_idle(line)
        assert (line._reader.part, line._clock.state) == ("head", "head")

    asyncio.run(check())


def test_headers_of_half_a_head_are_counted():
    """A stranger sends a hundred short headers and no end of them; another goes on sending after a refusal.
    Older server: -"""

    async def check():
        head = b"GET / HTTP/1.1\r\nhost: x\r\n" + 100 * b"ab:cd\r\n"
        for pace in (None, Pace(seconds=0)):
            crowd = connection.Crowd(Limits())
            line = of_a_server(empty, crowd, set(), connection.Turns(), pace)
            if pace is not None:
                assert not pace.is_over  # it begins, so that the head has to wait
            line.data_received(head)
            while len(line._inlet):
                await asyncio.sleep(0)
            assert crowd.size == len(head) + 100 * connection._HEADER  # the last one may go on
            line.data_received(b"no header\r\n\r\n")
            for _ in range(20):
                line.data_received(1000 * b"what nobody reads")
                assert crowd.size == 0 or not line._ending
                await asyncio.sleep(0)
            assert line._ending and crowd.size == 0

    asyncio.run(check())


def test_headers_of_requests_that_wait_are_counted():
    """A stranger sends requests ahead with a hundred short headers each, which take more memory than they have bytes.
    Older server: -"""

    async def check():
        crowd = connection.Crowd(Limits())
        line = of_a_server(empty, crowd, set(), connection.Turns())
        line.data_received(16 * (b"GET / HTTP/1.1\r\nhost: x\r\n" + 100 * b"ab:cd\r\n" + b"\r\n"))
        assert 16 * 100 * 100 < crowd.size < 16 * 100 * 300
        await until_idle(line)
        assert crowd.size == 0

    asyncio.run(check())


class Recorded(Nowhere):
    "Keeps what is written, and how the connection ends."

    def __init__(self):
        super().__init__()
        self.written, self.ends = b"", []

    can_write_eof = lambda self: True
    write_eof = lambda self: self.ends.append("eof")
    close = lambda self: self.ends.append("close")

    def write(self, data):
        self.written += data


def test_what_is_sent_behind_an_answer_that_closes():
    """A caller sends more behind the request that is the last one, and is answered: what is not read does not reset the connection.
    Older server: -"""

    async def check():
        last = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        ahead = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
        for sent, ends in ((last, ["close"]), (last + 9000 * b"x", ["eof"])):
            line = connection.Connection(empty, connection.Crowd(Limits()), set(), connection.Turns(), Pace(seconds=0))
            line.connection_made(Recorded())
            line.data_received(sent)
            await until_idle(line)
            assert (line._transport.ends, line._transport.written[:15]) == (ends, b"HTTP/1.1 200 OK")
        line = connection.Connection(empty, connection.Crowd(Limits()), set(), connection.Turns())
        line.connection_made(Recorded())
        line.data_received(3 * ahead)
        line.leave()  # the server stops
        await until_idle(line)
        assert (line._transport.ends, line._transport.written.count(b"HTTP/1.1 200")) == (["eof"], 1)

    asyncio.run(check())


@pytest.mark.parametrize("headers", [[(b"x", b"a\r\nb: c")], [(b"content-length", b"7"), (b"x", b"a\nb")], [(b"content-length", b"x")]])
def test_answer_whose_head_is_invalid(headers):
    """An application starts an answer with a header that holds the end of a line, or a length that is none: the 500 can be read.
    Older server: -"""

    async def wrong(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def check():
        line = connection.Connection(wrong, connection.Crowd(Limits()))
        line.connection_made(Recorded())
        line.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await until_idle(line)
        head, _, body = line._transport.written.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 500") and b"chunked" not in head and json.loads(body) == {"error": "internal error"}

    asyncio.run(check())


def test_strangers_who_all_ask_at_once():
    """Strangers who all ask at once are served a few at a time, and in between a caller who is known.
    Older server: -"""

    async def check():
        served, tasks, crowd, turns = [], set(), connection.Crowd(Limits()), connection.Turns()

        async def app(scope, receive, send):
            served.append(scope["path"])
            if scope["path"] == "/known":
                scope["extensions"]["connection.permit"]()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})

        def came():
            line = connection.Connection(app, crowd, tasks, turns)
            line.connection_made(Nowhere())
            return line

        async def until_done():
            while tasks or len(turns):
                await asyncio.sleep(0)

        known = came()
        known.data_received(b"GET /known HTTP/1.1\r\nhost: x\r\n\r\n")
        await until_done()
        for _ in range(50):
            came().data_received(b"GET /stranger HTTP/1.1\r\nhost: x\r\n\r\n")
        for _ in range(3):
            known.data_received(b"GET /known HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await until_done()
        assert served.count("/stranger") == 50
        assert [i for i, path in enumerate(served) if path == "/known"][-1] < 18

    asyncio.run(check())


class Line(Nowhere):
    "A transport that is closed when it is aborted."
    closed, answers, protocol = False, 0, None
    is_closing = lambda self: self.closed

    def write(self, data):
        self.answers += data.count(b"HTTP/1.1 ")

    def abort(self):
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)


@pytest.mark.parametrize("ahead", [False, True])
def test_whole_requests_that_wait_for_their_turn(ahead):
    """Strangers send long requests faster than they can be served, each at once or behind one that takes long.
    Older server: sets no limit."""

    async def check():
        tasks, crowd, turns, free = set(), connection.Crowd(Limits(max_waiting=1_000_000)), connection.Turns(), asyncio.Event()
        short, long = (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % n + b"x" * n for n in (9, 50_000))

        async def app(scope, receive, send):
            await receive()
            if (b"content-length", b"9") in scope["headers"]:
                await free.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})

        lines = [Line() for _ in range(40)]
        for line in lines:
            line.protocol = connection.Connection(app, crowd, tasks, turns)
            line.protocol.connection_made(line)
            line.protocol.data_received(short + long if ahead else long)
            assert crowd.size <= 1_000_000
        assert crowd.size > 900_000 and 19 <= sum(line.closed for line in lines) <= 22
        for _ in range(50):
            await asyncio.sleep(0)
        assert (crowd.size > 900_000) == ahead  # the others have had their turn
        free.set()
        while tasks or len(turns):
            await asyncio.sleep(0)
        assert crowd.size == 0 and not crowd.begun
        assert all(line.closed or line.answers == 1 + ahead for line in lines)

    asyncio.run(check())


def test_strangers_whose_requests_take_long():
    """Strangers hold all places with whole requests that are made to take long, and more of them come.
    Older server: sets no limit; its file descriptors run out."""

    async def app(scope, receive, send):
        if scope["path"] == "/stranger":
            await asyncio.sleep(SECONDS)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def check():
        now, tasks, asked = [0.0], set(), []
        crowd = connection.Crowd(Limits(max_connections=20), clock=lambda: now[0])

        def came():
            line = Line()
            line.protocol = connection.Connection(app, crowd, tasks)
            line.protocol.connection_made(line)
            return line

        for turn in range(300):
            came().protocol.data_received(b"GET /stranger HTTP/1.1\r\nhost: x\r\n\r\n")
            if turn % 20 == 10:
                asked.append(came())  # whose request is not here yet
            if turn % 20 == 15 and not asked[-1].closed:
                asked[-1].protocol.data_received(b"GET /validator HTTP/1.1\r\nhost: x\r\n\r\n")
            now[0] += 0.05
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(crowd) <= 20 and [line.answers for line in asked] == [1] * 15
        for task in tasks:
            task.cancel()

    asyncio.run(check())


def test_strangers_who_come_again_as_soon_as_they_are_closed():
    """Strangers hold all places with requests sent ahead, and come again when they are closed, faster than they can be served.
    Older server: sets no limit; its file descriptors run out."""

    async def app(scope, receive, send):
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def check():
        tasks, crowd, turns = set(), connection.Crowd(Limits(max_connections=20)), connection.Turns()

        def came(data):
            line = Line()
            line.protocol = connection.Connection(app, crowd, tasks, turns)
            line.protocol.connection_made(line)
            line.protocol.data_received(data)
            return line

        ahead, asked = b"GET /stranger HTTP/1.1\r\nhost: x\r\n\r\n" * 8, []
        for turn in range(300):
            for _ in range(60 if turn == 0 else 2):  # at first they all come at once
                came(ahead)
            if turn % 20 == 10:
                asked.append(came(b"GET /validator HTTP/1.1\r\nhost: x\r\n\r\n"))
            await asyncio.sleep(0)
        assert len(crowd) <= 20 and len(turns) <= 20
        while tasks or len(turns):
            await asyncio.sleep(0)
        assert [line.answers for line in asked] == [1] * 15

    asyncio.run(check())


def test_two_servers_that_share_the_files_of_a_process():
    """Strangers open so many connections to two miners in one process that no file is left for another.
    Older server: its file descriptors run out."""
    pytest.importorskip("resource")
    code = """
        import logging, resource, sys
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
        logging.basicConfig(level=logging.ERROR)
        from prompting_nb.network.axon import Axon
        from prompting_nb.network.chain import make_wallet
        def echo(synapse):
            synapse.completion = synapse.prompt
            return synapse
        one, two = (Axon(make_wallet("miner")).attach(echo) for _ in "12")
        with one, two:
            print(one.port, two.port, flush=True)
            sys.stdin.read()
    """
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run, lines = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], **pipes), []
    try:
        axons = [SimpleNamespace(host="127.0.0.1", port=int(port)) for port in run.stdout.readline().split()]
        for axon in axons:
            lines += [connect_from(axon, address) for address in ADDRESSES[:5] for _ in range(50)]
        assert [status(axon) for axon in axons * 2] == [200] * 4
        _, said = run.communicate(timeout=SECONDS)
        assert 1 <= said.count("few files are left: connections make room") <= 2
    finally:
        run.kill()
        for line in lines:
            line.close()


@pytest.mark.parametrize("what", ["refused", "tick"])
def test_error_in_the_care_for_a_connection(what, later, caplog):
    """What is told of closed connections fails, or a look at a connection does.
    Older server: -"""

    def fail(*args):
        raise RuntimeError("away")

    with Axon(MINER, limits=Limits(head_timeout=60.0, refused=fail if what == "refused" else None)).attach(echo) as axon:
        for _ in range(2):
            with connect(axon) as line:
                until(lambda: axon._server.connections)
                if what == "tick":
                    (one,) = axon._server.crowd
                    one.tick = fail
                else:
                    line.sendall(b"GET /")
                    later(axon, 60.0)
                    assert read_status(line) == 408
                assert read_status(line) is None
            until(lambda: not axon._server.connections)
        assert status(axon) == 200
    assert caplog.text.count("RuntimeError: away") == 1


def test_connections_by_the_hundred_each_second():
    """Strangers open connections by the hundred each second, while others ask again and again; who is new has to be let in first.
    Older server: -"""

    async def check():
        turns, asked, inside = connection.Turns(), [], []

        class Guest(asyncio.Protocol):
            def connection_made(self, transport):
                inside.append(transport)

        def ask_again(name):
            asked.append(name)
            turns.add(name, partial(ask_again, name), again=True)

        for name in range(50):
            ask_again(name)
        sock = listen("127.0.0.1", 0)
        door, callers = Door(sock, Guest), [socket.create_connection(sock.getsockname()) for _ in range(200)]
        asked.clear()
        door.open()
        end = time.monotonic() + SECONDS
        while len(inside) < 200 and time.monotonic() < end:
            await asyncio.sleep(0)
        assert len(inside) == 200 and 20 < len(asked) < 60  # they come on as well, but the others need not wait for them
        await door.close()
        for line in (*callers, *inside):
            line.close()
        for name in range(50):
            turns.drop(name)
        await asyncio.sleep(0)

    asyncio.run(check())


def test_no_more_are_let_in_than_can_be_answered(monkeypatch):
    """Strangers connect and ask at once, more of them than can be answered: those wait outside whom nobody can answer yet.
    Older server: sets no limit."""
    most = [0]

    class Noting(connection.Turns):
        def add(self, *args, **more):
            super().add(*args, **more)
            most[0] = max(most[0], len(self))

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def nothing():
        pass

    monkeypatch.setattr(server_page, "Turns", Noting)
    sock = listen("127.0.0.1", 0)
    lines = [socket.create_connection(sock.getsockname(), timeout=SECONDS) for _ in range(300)]
    for line in lines:
        line.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    server = Server(app, sock).start()
    assert [read_status(line) for line in lines] == [401] * 300
    server.stop(nothing, SECONDS)
    assert 0 < most[0] < 60  # as many as came while nobody waited
    for line in lines:
        line.close()


def test_system_without_connections(caplog, monkeypatch):
    """The system has no file left for another connection, for a while: it is said once, and all come in later.
    Older server: the loop stands still while thousands are let in"""
    monkeypatch.setattr("prompting_nb.network.server._PAUSE", 0.01)

    class Lines:
        "A listening socket that gives no connection at first."
        refused, turn, most = 3, 0, 0

        def __init__(self, sock):
            self.sock = sock
            self.fileno, self.setblocking, self.close = sock.fileno, sock.setblocking, sock.close

        def accept(self):
            if self.refused:
                self.refused -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            found = self.sock.accept()
            self.turn += 1
            self.most = max(self.most, self.turn)
            return found

    async def check():
        lines, made = Lines(listen("127.0.0.1", 0)), []

        class Guest(asyncio.Protocol):
            def connection_made(self, transport):
                made.append(transport)

        door = Door(lines, Guest)
        callers = [socket.create_connection(lines.sock.getsockname()) for _ in range(40)]
        door.open()
        address, end = lines.sock.getsockname(), time.monotonic() + SECONDS
        while len(made) < 40 and time.monotonic() < end:
            await asyncio.sleep(0)
            lines.turn = 0
        await door.close()
        assert len(made) == 40 and 1 < lines.most <= 8
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        for line in (*callers, *made):
            line.close()
        await asyncio.sleep(0)

    asyncio.run(check())
    assert [record.message for record in caplog.records].count(
        "no new connection can be accepted: [Errno 24] Too many open files"
    ) == 1


@pytest.mark.parametrize("parts, arrived", [
    ([b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nbody"], True),
    ([b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"], True),
    ([b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nbo", b"dy"], False),
    ([b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n", b"0\r\n\r\n"], False),
    ([b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\nexpect: 100-continue\r\n\r\n", b"body"], False),
])  # fmt: skip
def test_time_limit_of_a_body(parts, arrived):
    """A body is read without a clock only when all of it has come: a slow one has to keep `body_timeout`.
    Older server: -"""

    async def check():
        seen = []

        async def app(scope, receive, send):
            seen.append(scope["extensions"]["connection.arrived"]())
            more = True
            while more:
                more = (await receive())["more_body"]
            seen.append(scope["extensions"]["connection.arrived"]())
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

        tasks = set()
        served = connection.Connection(app, connection.Crowd(Limits()), tasks)
        served.connection_made(Nowhere())
        for part in parts:
            served.data_received(part)
            for _ in range(5):
                await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*tasks), SECONDS)
        assert seen == [arrived, True]

    asyncio.run(check())


def test_generator_that_never_waits():
    """An asynchronous generator that yields without waiting, read slowly, quickly, or put together for a whole answer.
    Older server: -"""
    piece, size = "x" * 1000, 100_000_000

    async def hasty(synapse):
        for _ in range(size // len(piece) if synapse.prompt != "endless" else 10**9):
            yield piece

    with Axon(MINER, max_answer=1_000_000).attach(hasty) as axon:
        before = memory()
        with unread(axon, "/StreamPrompting") as line:
            until(lambda: axon.health()["running"] == 1)
            begin = time.monotonic()
            assert http_get(axon, "/health")[0] == 200
            assert time.monotonic() - begin < 5  # the loop is free
            got = 0
            while got < 20_000_000:
                got += len(line.recv(65536))
            assert memory() - before < 40  # MB
        until(lambda: axon.health()["running"] == 0)
        body = write_body(Prompting.ask("endless", timeout=SECONDS))
        code, answer, _ = post(axon, body)
        assert code == 500 and "longer than 1000000 characters" in answer["error"]
        assert memory() - before < 40
        with Dendrite(VALIDATOR, max_answer=2**40) as dendrite:
            late = dendrite.query([axon], StreamPrompting.ask("endless", timeout=0.5), timeout=0.5)[0]
        assert late.dendrite.status_code in (408, 504)
        until(lambda: axon.health()["running"] == 0)  # the limit is kept; this client kept all pieces, so memory tells nothing


def http_get(axon, path, headers=None):
    "Status and text of a GET."
    connection = http.client.HTTPConnection(axon.host, axon.port, timeout=SECONDS)
    try:
        connection.request("GET", path, None, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_upgrade_whose_body_is_a_second_request(axon):
    """A POST with `Upgrade`, whose body looks like another request.
    Older server: leaves the body to another protocol, and reads it as a second request behind some proxies."""
    smuggled = b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"
    upgrade = {"upgrade": "websocket", "connection": "upgrade"}
    for body in (BODY, smuggled):
        with connect(axon) as line:
            line.sendall(request(body, sign(body) | upgrade) + smuggled)
            assert read_status(line) == (200 if body == BODY else 400)  # the body was read as such
            assert line.recv(1) == b""  # nothing else is answered


def test_trailers_are_no_headers(axon):
    """Authentication in the trailers of a chunked body.
    Older server: counts them as headers."""
    lines = "".join(f"{k}: {v}\r\n" for k, v in sign().items()).encode()
    chunks = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    head = b"POST /Prompting HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
    for data, code in ((head + b"\r\n" + chunks + lines + b"\r\n", 401), (head + lines + b"\r\n" + chunks + b"\r\n", 200)):
        with connect(axon) as line:
            line.sendall(data)
            assert read_status(line) == code


def test_garbage_after_a_good_request(axon):
    """A good request, and behind it bytes that are none, in one piece and in two.
    Older server: answers the good one with 400."""
    for pause in (0.0, 0.05):
        with connect(axon) as line:
            line.sendall(request() + (b"" if pause else b"SSH-2.0\r\n"))
            time.sleep(pause)
            if pause:
                line.sendall(b"SSH-2.0\r\n")
            answers = b""
            while more := line.recv(65536):
                answers += more
            assert [int(a[:3]) for a in answers.split(b"HTTP/1.1 ")[1:]] == [200, 400]


def test_body_whose_last_chunk_holds_a_part_of_the_next_head(axon):
    """Two requests, cut in the middle of the second one's headers.
    Older server: -"""
    first, second = request(), request()
    for cut in (1, 20, 200):
        with connect(axon) as line:
            line.sendall(first[:-5])
            time.sleep(0.02)
            line.sendall(first[-5:] + second[:cut])
            assert read_status(line) == 200
            line.sendall(second[cut:])
            assert read_status(line) == 200
        first, second = request(), request()


AMBIGUOUS = {
    "two lengths": b"content-length: 1\r\ncontent-length: 1\r\n\r\nx",
    "length and chunks": b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip, then chunks": b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "no coding": b"transfer-encoding:\r\n\r\n",
    "chunks twice": b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "another coding": b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "unknown coding": b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "space before the colon": b"content-length : 1\r\n\r\nx",
    "a folded header": b"a: b\r\n content-length: 1\r\n\r\nx",
    "bare line feeds": b"a: b\ncontent-length: 1\n\nx",
    "bare carriage returns": b"a: b\rcontent-length: 1\r\n\r\nx",
    "a sign": b"content-length: +1\r\n\r\nx",
    "two hosts": b"host: a\r\nhost: b\r\n\r\n",
    "a NUL": b"a: b\0c\r\n\r\n",
    "a chunk in other digits": b"transfer-encoding: chunked\r\n\r\n0x1\r\nx\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("version, code", [("1.1", 400), ("1.0", 404)])
def test_request_without_a_host(axon, version, code):
    """A request that does not say which host it is for, as HTTP/1.1 demands and HTTP/1.0 does not.
    Older server: answers it."""
    with connect(axon) as line:
        line.sendall(f"GET /nothing HTTP/{version}\r\n\r\n".encode())
        assert read_status(line) == code


@pytest.mark.parametrize("what", AMBIGUOUS)
def test_request_that_two_servers_read_differently(axon, what):
    """A request that a proxy and the miner could divide differently: two lengths, odd codings, odd line ends.
    Older server: refuses most of them."""
    with connect(axon) as line:
        line.sendall(b"POST /Prompting HTTP/1.1\r\nhost: x\r\n" + AMBIGUOUS[what] + request())
        assert read_status(line) == 400
        try:
            assert line.recv(1) == b""  # and nothing after it is read
        except ConnectionResetError:
            pass


def test_metrics_behind_a_proxy_on_the_same_host():
    """`/metrics` through a proxy that makes everybody a caller of this machine.
    Older server: has no metrics."""
    paths, away = ("/metrics", "/health", "/ready"), {"X-Forwarded-For": "203.0.113.9"}
    with Axon(MINER).attach(echo) as open_here, Axon(MINER, trusted_proxies=["127.0.0.1"]).attach(echo) as behind:
        for path in paths:
            assert http_get(open_here, path)[0] == 200
            for header in ("X-Forwarded-For", "X-Real-IP", "Forwarded", "Via"):
                assert http_get(open_here, path, {header: "127.0.0.1"})[0] == 403
            assert [http_get(behind, path, h)[0] for h in ({}, away)] == [403, 403]
            assert http_get(behind, path, {"X-Forwarded-For": "203.0.113.9, 127.0.0.1"})[0] == 403
            assert http_get(behind, path, {"X-Forwarded-For": "::1"})[0] == 200
    with Axon(MINER, trusted_proxies=["10.9.9.9"]).attach(echo) as another:  # than the one that passes these on
        for header in ("X-Forwarded-For", "X-Real-IP", "Forwarded", "Via"):
            assert [http_get(another, path, {header: "8.8.8.8"})[0] for path in paths] == [403] * 3
        assert http_get(another, "/health")[0] == 200
    with Axon(MINER, status_token="sesame", public_status=True).attach(echo) as guarded:
        for path in paths:
            tokens = (None, "Bearer sesam", "Bearer sesame", "Basic sesame")
            codes = [http_get(guarded, path, {"Authorization": t} if t else {})[0] for t in tokens]
            assert codes == [401, 401, 200, 401]


MALFORMED = [
    b"", b"{", b"null", b"[]", b"3", b'"text"', b"[" * 20_000, b'{"a":' * 9_000, b'{"roles": ["user"]}',
    b'{"roles": [], "messages": []}', b'{"roles": ["user"], "messages": ["a", "b"]}', b"\xff\xfe\x00",
    b'{"roles": ["user"], "messages": [null]}', b'{"roles": "user", "messages": "x"}', b'{"roles": 1, "messages": {}}',
    b'{"roles": ["user"], "messages": ["x"], "timeout": -1}', b'{"roles": ["user"], "messages": ["x"], "timeout": NaN}',
    b'{"roles": ["user"], "messages": ["x"], "timeout": 1e999}', b'{"roles": ["user"], "messages": ["\\ud800"]}',
    b'{"roles": ["user"], "messages": ["x"], "timeout": "soon"}', b'{"roles": [["user"]], "messages": [["x"]]}',
]  # fmt: skip


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_json_wrong_types_deep_nesting(axon, body):
    """A signed body that is not JSON, of wrong types, or 20 000 levels deep.
    Older server: -"""
    code, answer, _ = post(axon, body)
    assert code == 400 and "\n" not in answer["error"] and len(answer["error"]) < 500
    assert status(axon, body, old()) == 400


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("what", ["messages", "numbers", "names", "text"])
def test_question_of_many_parts(what, older, monkeypatch):
    """A permitted caller asks a megabyte of empty messages, or of other things in lists, which take long to read.
    Older server: reads any JSON."""
    count, reads, text = 150_000, [], ", [{" * 20_000
    body = {
        "messages": lambda: {"roles": [""] * count, "messages": [""] * count},
        "numbers": lambda: {"roles": ["user"], "messages": ["x"], "other": [1] * 2 * count},
        "names": lambda: {"roles": ["user"], "messages": ["x"], **dict.fromkeys(map(str, range(count // 2)), 0)},
        "text": lambda: {"roles": ["user"], "messages": [text]},  # they are no parts
    }[what]()
    question = Prompting(roles=body["roles"], messages=body["messages"])
    body = json.dumps(body, separators=(",", ":")).encode()
    if what != "text":
        monkeypatch.setattr(protocol, "_LONG_BODY", SimpleNamespace(validate_json=reads.append))
    with Axon(MINER, max_body=2_000_000).attach(echo) as axon:
        code, answer, _ = post(axon, body, old(question) if older else None)
        if what == "text":
            assert (code, answer["completion"]) == (200, text)
        else:
            assert code == 400 and "more than 10000 items" in answer["error"] and not reads


heads = st.sampled_from(
    [
        b"",
        b"x-bittensor-version: 1\r\n",
        b"bt_header_dendrite_hotkey: x\r\n",
        b"a: b\r\n",
        b":\r\n",
        b"content-length: 5\r\n",
        b"transfer-encoding: chunked\r\n",
        b"content-length: -1\r\n",
        b"content-length: 1\r\ncontent-length: 2\r\n",
        b"expect: 100-continue\r\n",
        b"connection: close\r\n",
        b"upgrade: websocket\r\nconnection: upgrade\r\n",
        b"host: \xff\r\n",
        b"bt_header_dendrite_nonce: 1\r\n",
    ]
)
lines = st.sampled_from(
    [
        b"POST /Prompting HTTP/1.1\r\nhost: x",
        b"POST /StreamPrompting HTTP/1.1\r\nhost: x",
        b"GET /Prompting HTTP/1.0",
        b"POST /%ff%00/../Prompting HTTP/1.1",
        b"POST * HTTP/1.1",
        b"POST http://x/Prompting HTTP/1.1",
        b"OPTIONS /Prompting HTTP/1.1\r\nhost: x",
        b"POST /Prompting?\xc3\xa4 HTTP/1.1",
        b"POST /Prompting",
        b"PRI * HTTP/2.0",
        b"CONNECT x:1 HTTP/1.1",
        b"GET /metrics/ HTTP/1.1\r\nhost: x",
        b"DELETE /health HTTP/1.1",
    ]
)
signed_heads = st.fixed_dictionaries(
    {},
    optional={
        "X-Bittensor-Nonce": st.text("0123456789-+_e. ", max_size=30),
        "X-Bittensor-Hotkey": st.text("5abcXYZ ", max_size=60),
        "X-Bittensor-Signature": st.text("0xabcdefg", max_size=140),
        "X-Bittensor-Crypto": st.sampled_from(["", "ed25519", "rsa"]),
        "X-Bittensor-Version": st.sampled_from(["1", "2", "", "1.0"]),
        "X-Bittensor-Receiver": st.sampled_from([ME, "", "-"]),
        "bt_header_dendrite_nonce": st.text("0123456789-. ", max_size=30),
        "computed_body_hash": st.text("0abc", max_size=70),
        "timeout": st.sampled_from(["1", "-1", "nan", "1e999", ""]),
    },
)
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
asked = st.fixed_dictionaries(
    {}, optional={key: values for key in ("roles", "messages", "timeout", "completion", "dendrite")}
)
raw_requests = st.builds(
    lambda line, head, body: line + b"\r\n" + b"".join(head) + b"\r\n" + body,
    lines,
    st.lists(heads, max_size=4),
    st.binary(max_size=60),
)
edited_requests = st.builds(lambda edits: request(headers=sign() | edits), signed_heads)
old_requests = st.builds(lambda edits: request(OLD, old() | edits), signed_heads)
typed_requests = st.builds(lambda fields: request(json.dumps(fields).encode()), asked)
generated = st.lists(
    st.one_of(raw_requests, edited_requests, old_requests, typed_requests, st.binary(max_size=80)),
    min_size=20,
    max_size=20,
)
COUNT = {"sent": 0}


@settings(
    max_examples=520,
    phases=[Phase.generate],
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(batch=generated)
def fuzz(axon, batch):
    "Twenty requests, each on a line of its own, all sent before any answer is read."
    open_lines = [connect(axon) for _ in batch]
    try:
        for line, data in zip(open_lines, batch):
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
        for line, data in zip(open_lines, batch):
            code = read_status(line)
            assert code is None or 100 <= code < 500, (code, data)  # 100: go on
            COUNT["sent"] += 1
        if "memory" not in COUNT and COUNT["sent"] >= 5_000:
            COUNT["memory"] = memory()
    finally:
        for line in open_lines:
            line.close()


@pytest.mark.slow
def test_10_000_generated_malformed_requests(caplog):
    """10 000 requests made by hypothesis: broken HTTP, broken headers, signed nonsense of every type.
    Older server: -"""
    caplog.set_level(logging.ERROR)
    with Axon(MINER, body_timeout=0.3, limits=Limits(head_timeout=0.3)).attach(aecho) as axon:
        COUNT["sent"] = 0
        fuzz(axon)
        assert COUNT["sent"] >= 10_000
        assert memory() - COUNT["memory"] < 60  # MB over the second half, of which hypothesis itself keeps most
        assert status(axon) == 200
        until(lambda: axon._server.connections <= 1)
        assert axon.health()["running"] == axon.health()["waiting"] == 0
    assert [r for r in caplog.records if "failed" in r.getMessage() or "Exception" in r.getMessage()] == []


# Handlers and overload ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", [lambda s: 1 / 0, lambda s: None, lambda s: s, lambda s: "text", lambda s: sys.exit(3)],
                         ids=["raises", "returns None", "no completion", "returns text", "exits"])  # fmt: skip
def test_handler_that_fails(forward, caplog):
    """A handler that raises, returns None, or exits.
    Older server: 500 without the reason; for None the question goes back, with status 200 and no completion."""
    with Axon(MINER).attach(forward) as axon:
        for _ in range(3):
            code, answer, _ = post(axon)
            assert code == 500 and "Traceback" not in answer["error"]
            assert status(axon, OLD, old()) == 500


def until_it_hangs(axon, begun, timeout=0.2, path="/Prompting"):
    "Ask for a short time, until the handler has begun before it was over: a machine may stand still for so long."
    body, before = write_body(Prompting.ask("x", timeout=timeout)), axon.health()["running"]

    def asked():
        assert post(axon, body, sign(body, path=path), path)[0] == 504
        until(lambda: begun() or axon.health()["running"] == before)  # its thread may be about to begin
        return begun()

    until(asked)


def test_handler_that_hangs():
    """A plain handler that hangs, and a coroutine that never ends.
    Older server: a plain handler is called in the event loop, where all others wait for it."""
    free, begun, cancelled = threading.Event(), threading.Event(), threading.Event()

    async def never(synapse):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with Axon(MINER, workers=2, drain=0.1).attach(lambda s: begun.set() or free.wait(SECONDS)) as axon:
        until_it_hangs(axon, begun.is_set)
        assert axon.health()["running"] == 1  # the thread goes on, and counts
        connection = http.client.HTTPConnection(axon.host, axon.port, timeout=SECONDS)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200  # the loop is free
        connection.close()
        free.set()
    with Axon(MINER, workers=1).attach(never) as axon:
        until_it_hangs(axon, cancelled.is_set)
        until(lambda: axon.health()["running"] == 0)

    async def stubborn(synapse):
        begun.set()
        while not free.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    free.clear(), begun.clear()
    with Axon(MINER, workers=1).attach(stubborn) as axon:
        until_it_hangs(axon, begun.is_set)  # the caller hears in time
        assert axon.health()["running"] == 1  # and the slot is taken while the work goes on
        free.set()
        until(lambda: axon.health()["running"] == 0)


STUBBORN = ["goes on", "hangs in its finally", "yields first", "is a coroutine"]


@pytest.mark.parametrize("what", STUBBORN)
@pytest.mark.parametrize("path", ["/Prompting", "/StreamPrompting"])
def test_handler_that_does_not_let_itself_be_cancelled(path, what, caplog):
    """An asynchronous generator or a coroutine that catches its cancellation, or hangs in its clean-up.
    Older server: no time limit ends a handler."""
    free, begun = [], threading.Event()

    async def wait():
        begun.set()
        while not free:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    async def goes_on(synapse):
        await wait()
        yield "x"

    async def hangs(synapse):
        begun.set()
        try:
            await asyncio.sleep(99)
            yield "x"
        finally:
            await wait()

    async def yields(synapse):
        yield "x"
        await wait()

    async def coroutine(synapse):
        await wait()

    forward = dict(zip(STUBBORN, (goes_on, hangs, yields, coroutine)))[what]
    with Axon(MINER, workers=1, drain=0.1).attach(forward) as axon:
        if what == "yields first" and path == "/StreamPrompting":  # the head is sent by then

            def asked():
                body = write_body(Prompting.ask("x", timeout=0.2))
                with connect(axon) as line:
                    line.sendall(request(body, sign(body, path=path), path))
                    until(lambda: b"no answer within" in line.recv(65536))
                return begun.is_set()

            until(asked)
        else:
            until_it_hangs(axon, begun.is_set, path=path)
        until(lambda: http_get(axon, "/ready")[0] == 503)
        assert axon.health()["stuck"] == axon.health()["running"] == 1
        until(lambda: any("all 1 workers are held" in r.getMessage() for r in caplog.records))
        free.append(1)
        until(lambda: axon.health()["running"] == 0)
        assert http_get(axon, "/ready")[0] == 200


def test_stop_with_a_handler_that_does_not_end(caplog):
    """A handler goes on for ever, whatever it is told, and the miner is stopped.
    Older server: -"""
    begun = threading.Event()

    async def for_ever(synapse):
        while True:
            begun.set()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        yield "x"

    axon = Axon(MINER, workers=1, drain=0.1).attach(for_ever).start()
    server = axon._server
    with connect(axon) as line:
        line.sendall(request())
        assert begun.wait(SECONDS)
        axon.stop()
        assert read_status(line) == 503
    assert not server.alive and server.loop.is_closed()
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR" and "given up" in r.getMessage()] == [
        "1 task did not end when cancelled: given up"]  # fmt: skip
    with axon:
        begun.clear()


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "is about to wait"])
@pytest.mark.parametrize("body, signed", [(BODY, sign), (OLD, old)], ids=["btauth/1", "older format"])
def test_stop_while_a_check_is_awaited(waits, body, signed):
    """A miner is stopped while its asynchronous check has an admitted question before it.
    Older server: -"""
    begun, decide, said = threading.Event(), threading.Event(), []

    async def look():
        while not decide.is_set():
            begun.set()
            await asyncio.sleep(0.001)

    def check(synapse):
        if not waits:
            axon._waiting.stop()  # as when the stop comes in the moment before
        return look()

    axon = Axon(MINER).attach(echo, check_fn=check).start()
    asking = threading.Thread(target=lambda: said.append(status(axon, body, signed())))
    stopping = threading.Thread(target=axon.stop)
    asking.start()
    until(lambda: begun.is_set() or said)
    stopping.start()
    until(lambda: axon._waiting._stopped)
    decide.set()
    asking.join(SECONDS), stopping.join(SECONDS)
    assert said == [200] and not axon.is_running


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "coroutine"])
def test_handler_that_cancels_itself(plain):
    """A handler that raises `CancelledError`.
    Older server: -"""

    def cancel(synapse):
        raise asyncio.CancelledError

    async def cancel_async(synapse):
        cancel(synapse)

    with Axon(MINER).attach(cancel if plain else cancel_async) as axon:
        assert status(axon) == status(axon, OLD, old()) == 500
        until(lambda: axon.metrics.totals() == {"failed": 2})  # they are counted after the answer


def test_error_of_a_handler_stays_in_the_log(caplog):
    """A handler whose error holds a key and a path.
    Older server: 500 without the reason."""

    def leak(synapse):
        raise ValueError("/home/me/key.pem: sk-secret")

    async def leak_async(synapse):
        yield "a"
        raise ValueError("/home/me/key.pem: sk-secret")

    for forward in (leak, leak_async):
        with Axon(MINER).attach(forward) as axon, Dendrite(VALIDATOR) as dendrite:
            answers = [str(post(axon)), str(post(axon, OLD, old())), str(ask(dendrite, axon, StreamPrompting))]
        for answer in answers:
            assert "secret" not in answer and "/home" not in answer
            word = answer.split("error ")[1].split()[0]
            assert any(word in r.getMessage() and "sk-secret" in str(r.exc_info) for r in caplog.records)


WAITS = ["blacklist", "priority", "check", "nonces"]


@pytest.mark.parametrize("stubborn", [False, True], ids=["", "and catches its cancellation"])
@pytest.mark.parametrize("what", WAITS)
def test_miner_that_waits_before_it_admits(what, stubborn):
    """What a request waits for before it takes a place never answers: a coroutine of the miner, the store of nonces.
    Older server: waits."""
    free, asked = [], []

    async def hang(*args):
        asked.append(args)
        while stubborn and not free:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
        if not stubborn:
            await asyncio.Event().wait()

    def plain(*args):  # an async function in a decorator that is not
        return hang(*args)

    functions = [plain if name == what else None for name in WAITS[:3]]
    nonces = SimpleNamespace(accept=hang, close=lambda: None) if what == "nonces" else None
    with Axon(MINER, body_timeout=0.3, nonces=nonces).attach(echo, *functions) as axon:
        for body, headers in ((BODY, sign()), (OLD, old())):
            code, answer, told = post(axon, body, headers)
            assert (code, answer["error"]) == (503, "the miner could not decide in time whether to answer")
            assert told["retry-after"] == "1"
        until(lambda: axon.metrics.totals() == {"overloaded": 2})
        axon._application._endpoints["/Prompting"]._btauth.patience = 60.0
        with connect(axon) as line:
            line.sendall(request())
            until(lambda: len(asked) == 3)
            assert axon._server._tasks
        until(lambda: not axon._server._tasks)  # its caller has hung up
        assert axon.metrics.totals() == {"overloaded": 2, "left": 1}
        free.append(1)


@pytest.mark.parametrize("what", ["blacklist", "priority", "check"])
def test_function_of_the_miner_that_cancels_itself_or_exits(what, caplog):
    """A function that is asked before a request is admitted raises `CancelledError` or `SystemExit`, at once or awaited.
    Older server: -"""
    for error in (asyncio.CancelledError, SystemExit, KeyboardInterrupt):

        def plain(synapse, error=error):
            raise error

        async def coroutine(synapse, error=error):
            raise error

        for function in (plain, coroutine):
            functions = [function if name == what else None for name in WAITS[:3]]
            with Axon(MINER).attach(echo, *functions) as axon:
                code, expected = status(axon), 403 if (what, function) == ("blacklist", coroutine) else 500
                until(lambda: axon.metrics.totals())
                assert (code, axon.metrics.totals()) == (expected, {"refused" if expected == 403 else "failed": 1})


def test_every_worker_hangs(caplog):
    """Handlers that hang in every worker.
    Older server: looks well from outside."""
    free, begun = threading.Event(), []
    with Axon(MINER, workers=2).attach(lambda s: begun.append(s) or free.wait(SECONDS) and echo(s)) as axon:
        until_it_hangs(axon, lambda: len(begun) == 1)
        until(lambda: axon.health()["stuck"] == 1)
        code, text = http_get(axon, "/ready")
        assert (code, json.loads(text)["stuck"]) == (200, 1)  # one worker is left
        until_it_hangs(axon, lambda: len(begun) == 2)
        until(lambda: any("all 2 workers are held" in r.getMessage() for r in caplog.records))
        code, text = http_get(axon, "/ready")
        assert (code, json.loads(text)["reason"]) == (
            503, "all 2 workers are held by work whose time limit has passed")  # fmt: skip
        assert axon.metrics.registry.get_sample_value("axon_stuck") == 2
        free.set()
        until(lambda: http_get(axon, "/ready")[0] == 200)
        assert status(axon) == 200
    assert sum("all 2 workers" in r.getMessage() for r in caplog.records) == 1


def test_handlers_that_hang_for_ever_in_processes():
    """Handlers that hang for ever in every worker, each in a process of its own.
    Older server: -"""

    def hang(synapse):
        if synapse.prompt == "hang":
            threading.Event().wait()
        return echo(synapse)

    with Isolated(hang, grace=0.1) as isolated, Axon(MINER, workers=2).attach(isolated) as axon:
        bodies = [write_body(Prompting.ask("hang", timeout=0.2)) for _ in range(2)]
        assert [status(axon, body) for body in bodies] == [504, 504]
        until(lambda: axon.health()["running"] == 0)  # the processes were ended, and the workers are free again
        assert [status(axon) for _ in range(3)] == [200] * 3


def test_killed_makers_of_processes():
    """The process that makes the workers is killed, then its twin, then both.
    Older server: -"""

    def end(process):
        process._process.kill()
        until(lambda: not (process.alive if hasattr(process, "alive") else process.ready))

    with Isolated(echo, grace=5.0) as isolated, Axon(MINER, workers=1).attach(isolated) as axon:
        for _ in range(2):
            assert status(axon) == 200
            end(isolated._templates[0])
            end(isolated._idle[0])
            assert (status(axon), http_get(axon, "/ready")[0]) == (200, 200)
        for process in [*isolated._templates, *isolated._idle]:
            end(process)
        code, text = http_get(axon, "/ready")
        assert (code, json.loads(text)["reason"]) == (503, isolated.problem())
        assert status(axon) == 503


def test_killed_maker_of_processes_while_one_stands_still():
    """The process that makes the workers is killed while one of these stands still: the others go on.
    Older server: -"""
    with Isolated(echo, grace=5.0) as isolated, Axon(MINER, workers=1).attach(isolated) as axon:
        still, other = workers = [isolated._take(), isolated._take()]
        question = pickle.dumps((Prompting.ask("hello"), time.monotonic() + SECONDS))
        assert [worker.call(question, time.monotonic() + SECONDS)[0] for worker in workers] == [None, None]
        still._process.suspend()
        first, twin = isolated._templates
        first._process.kill()
        until(lambda: not first.alive)
        isolated._idle.append(other)
        assert status(axon) == 200 and list(isolated._idle) == [other]
        isolated._idle.clear()
        assert status(axon) == 200 and isolated._templates[0] is twin


@pytest.mark.parametrize("how", ["killed", "in order"])
def test_handler_that_hangs_when_its_miner_ends(how):
    """A miner ends, or is killed, while a handler hangs in a process of its own.
    Older server: -"""
    code = """
import os, sys, threading
from types import SimpleNamespace
from prompting_nb.network.isolation import Isolated

def hang(synapse):
    os.write(1, b"%d " % os.getpid())
    threading.Event().wait()

both = Isolated(hang), Isolated(hang)
for isolated in both:
    threading.Thread(target=isolated, args=[SimpleNamespace(timeout=1000.0)], daemon=True).start()
sys.stdin.read()
"""
    miner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    said = b""
    while said.count(b" ") < 2:
        said += os.read(miner.stdout.fileno(), 100)
    groups = {os.getpgid(int(pid)) for pid in said.split()}
    assert len(groups) == 2 and os.getpgid(miner.pid) not in groups
    miner.kill() if how == "killed" else miner.stdin.close()
    miner.wait(SECONDS)
    until(lambda: not any(map(group_lives, groups)))
    miner.stdout.close()


def group_lives(group):
    "Tell whether a process of a group has not ended; one that nobody has asked for its status has."
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ends in this moment
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def test_maker_of_processes_that_stands_still():
    """The process that makes the workers stands still: those that work are not held up.
    Older server: -"""
    begun, go_on = os.pipe(), os.pipe()

    def slowly(synapse):
        if synapse.prompt == "slow":
            os.write(begun[1], b".")
            os.read(go_on[0], 1)
        return echo(synapse)

    with Isolated(slowly, grace=5.0) as isolated, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(isolated, Prompting.ask("slow"))
        os.read(begun[0], 1)
        template = isolated._templates[0]
        template._orders.settimeout(SECONDS)
        template._process.suspend()
        waits = pool.submit(isolated, Prompting.ask("hello"))  # for a worker that is made
        until(lambda: isolated._making.locked())
        os.write(go_on[1], b".")
        assert slow.result(SECONDS / 2).completion == "slow" and not waits.done()
        template._process.resume()
        assert waits.result(SECONDS).completion == "hello"
    for end in (*begun, *go_on):
        os.close(end)


def test_process_of_a_request_that_has_waited(tmp_path):
    """A handler hangs in a process, for a request that has used up most of its time in the queue.
    Older server: -"""
    seconds, go_on = [], os.pipe()

    def hang(synapse):
        os.read(go_on[0], 1)
        return echo(synapse)

    with Isolated(hang, grace=0.1) as isolated:
        take = isolated._take

        def noted():
            begin, worker = time.monotonic(), take()
            call = type(worker).call
            worker.call = lambda question, limit: seconds.append(limit - begin) or call(worker, question, limit)
            return worker

        isolated._take = noted
        with Axon(MINER, workers=1).attach(isolated) as axon, ThreadPoolExecutor(2) as pool:
            first = pool.submit(status, axon, write_body(Prompting.ask("first", timeout=SECONDS)))
            until(lambda: axon.health()["running"] == 1)
            second = pool.submit(status, axon, write_body(Prompting.ask("second", timeout=SECONDS)))
            until(lambda: axon.health()["waiting"] == 1)
            time.sleep(0.5)
            os.write(go_on[1], b"..")
            assert [first.result(), second.result()] == [200, 200]
    for end in go_on:
        os.close(end)
    assert len(seconds) == 2 and 0 < seconds[1] < SECONDS - 0.5 + 0.1  # and not from the start of its call


@pytest.mark.parametrize("when", ["before the question", "in its answer"])
def test_process_that_stands_still(when, monkeypatch):
    """A process of a handler stands still, before it has read a long question or in the middle of a long answer.
    Older server: -"""

    def double(synapse):
        synapse.completion = synapse.prompt * 2
        return synapse

    with Isolated(double, grace=0.1) as isolated, Axon(MINER, workers=1).attach(isolated) as axon:
        assert status(axon) == 200
        worker, read = isolated._idle[0], isolation._read

        def stop_and_read(connection, size, until):
            worker._process.suspend()
            return read(connection, size, until)

        if when == "in its answer":
            monkeypatch.setattr(isolation, "_read", stop_and_read)
        else:
            worker._process.suspend()


        def asked():  # of a machine that stands still, the time may be over before the process is given the question
            assert status(axon, write_body(Prompting.ask("x" * 400_000, timeout=0.5))) == 504
            return worker not in isolated._idle

        until(asked)
        until(lambda: axon.health()["running"] == 0)
        monkeypatch.undo()
        assert status(axon) == 200
        until(lambda: not worker._process.is_running())  # a killed one may take a moment


def test_model_in_a_process():
    """A model that has computed with several threads is copied into the process of a handler.
    Older server: -"""
    code = """
import torch
from types import SimpleNamespace
from prompting_nb.network.isolation import Isolated

torch.set_num_threads(2)
model, given = torch.nn.Linear(2000, 2000), torch.ones(500, 2000)
wanted = model(given).sum().item()
with Isolated(lambda synapse: model(given).sum().item()) as isolated:
    found = isolated(SimpleNamespace(timeout=20.0))
assert abs(found - wanted) < 1e-3 * abs(wanted) + 1, (found, wanted)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_programs_of_a_handler_that_hangs():
    """A handler hangs in a program that it has started, in a process of its own.
    Older server: -"""
    told = os.pipe()

    def run(synapse):
        with subprocess.Popen(["sleep", "1000"], start_new_session=True) as program:
            os.write(told[1], b"%d " % program.pid)
            if synapse.prompt == "end it":
                program.terminate()
        return echo(synapse)

    with Isolated(run, grace=0.1) as isolated:
        assert isolated(Prompting.ask("end it", timeout=SECONDS)).completion == "end it"
        os.read(told[0], 100)

        def hangs():  # once its program has started in time
            with pytest.raises(TimeoutError):
                isolated(Prompting.ask("hang", timeout=0.3))
            return select.select(told[:1], [], [], 0)[0]

        until(hangs)
        program = int(os.read(told[0], 100))
        until(lambda: not alive(program))
        with ThreadPoolExecutor(1) as pool:
            busy = pool.submit(isolated, Prompting.ask("hang"))
            program = int(os.read(told[0], 100))
            isolated.close()
            assert isinstance(busy.exception(SECONDS), RuntimeError)
        until(lambda: not alive(program))
    for end in told:
        os.close(end)


def test_handler_that_forks():
    """A handler in a process of its own forks, and the copy returns as well, while the next question is worked on.
    Older server: -"""
    go_on, copies = os.pipe(), []

    def fork(synapse):
        if synapse.prompt == "first":
            copies.append(os.fork())
            if copies == [0]:
                os.read(go_on[0], 1)
        else:
            os.write(go_on[1], b".")
            os.waitpid(copies[0], 0)
        return echo(synapse)

    with Isolated(fork, grace=0.1) as isolated:
        found = [isolated(Prompting.ask(text, timeout=SECONDS)).completion for text in ("first", "second")]
        assert found == ["first", "second"]
    for end in go_on:
        os.close(end)


def test_no_more_processes(monkeypatch):
    """The system allows no more processes when a handler needs one.
    Older server: -"""
    fork, allowed = os.fork, iter([True])

    def limited():
        if next(allowed, False):
            return fork()
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", limited)
    with Isolated(echo) as isolated, Axon(MINER).attach(isolated) as axon:
        assert status(axon) == 503
        code, text = http_get(axon, "/ready")
        assert code == 503 and "no process can be made" in json.loads(text)["reason"]
        monkeypatch.setattr(isolation, "_SHORTAGE_TIME", 0.0)  # later
        assert http_get(axon, "/ready")[0] == 200


def test_handler_in_a_process_of_a_miner_that_was_copied():
    """A miner that has forked a child is killed while a handler hangs in a process of its own: the child holds nothing up.
    Older server: -"""
    code = """
import os, sys, threading, time
from types import SimpleNamespace
from prompting_nb.network.isolation import Isolated

def hang(synapse):
    os.write(1, b"%d " % os.getpid())
    threading.Event().wait()

isolated = Isolated(hang)
threading.Thread(target=isolated, args=[SimpleNamespace(timeout=1000.0)], daemon=True).start()
if sys.stdin.read(1) and os.fork() == 0:
    os.write(1, b"%d " % os.getpid())
    time.sleep(1000)
sys.stdin.read()
"""
    miner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    worker = int(os.read(miner.stdout.fileno(), 100))
    miner.stdin.write(b".")
    miner.stdin.flush()
    child, group = int(os.read(miner.stdout.fileno(), 100)), os.getpgid(worker)
    miner.kill()
    miner.wait(SECONDS)
    try:
        until(lambda: not group_lives(group))
    finally:
        os.kill(child, signal.SIGKILL)
        miner.stdout.close(), miner.stdin.close()


def test_overload_is_refused_and_told_when_to_come_back():
    """More requests than the queue holds.
    Older server: has no bound; its priority queue orders a task that does nothing, not the handlers."""
    free = threading.Event()
    wallets = [make_wallet(f"caller {i}") for i in range(12)]
    rank = {w.hotkey.ss58_address: i for i, w in enumerate(wallets)}

    def hold(synapse):
        free.wait(SECONDS)
        return echo(synapse)

    axon = Axon(MINER, workers=1, max_queue=3).attach(hold, None, lambda s: rank[s.dendrite.hotkey])
    with axon, ThreadPoolExecutor(12) as pool:
        answers = []
        for i, wallet in enumerate(wallets[:6]):  # one works, three wait; two more displace the lowest of them
            answers.append(pool.submit(post, axon, BODY, sign(wallet=wallet)))
            until(lambda n=min(i, 3): axon.health()["running"] == 1 and axon.health()["waiting"] == n)
            if i >= 4:
                until(lambda: sum(a.done() for a in answers) == i - 3)
        code, answer, headers = post(axon, BODY, sign(wallet=wallets[0]))
        assert (code, answer["error"], headers["retry-after"]) == (503, "the queue is full", "1")
        free.set()
        assert [a.result()[0] for a in answers] == [200, 503, 503, 200, 200, 200]


# Clients --------------------------------------------------------------------------------------------------------------


class Raw:
    "A miner that says the given bytes, over and over when asked to, and counts its visitors."

    def __init__(self, reply, endless=False):
        self.hotkey, self.visitors = ME, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.run, args=(reply, endless), daemon=True).start()

    def run(self, reply, endless):
        with self.socket, self.socket.accept()[0] as line:
            self.visitors += 1
            try:
                line.recv(65536)
                line.sendall(reply)
                while endless:
                    line.sendall(b"x" * 65536)
                line.recv(1)
            except OSError:
                pass


def ok(body, more=b""):
    return b"HTTP/1.1 200 OK\r\n%scontent-length: %d\r\n\r\n%s" % (more, len(body), body)


@pytest.fixture
def dendrite():
    with Dendrite(VALIDATOR, allow_private=True, max_answer=50_000) as dendrite:
        yield dendrite


def ask(dendrite, miner, kind=Prompting, timeout=SECONDS):
    return dendrite.query([miner], kind.ask("hello"), timeout=timeout)[0]


def test_redirecting_miner(dendrite):
    """A miner that sends the validator elsewhere.
    Older client: redirects are not switched off, and its HTTP client follows them."""
    elsewhere = Raw(ok(b'{"completion": "stolen"}'))
    location = f"HTTP/1.1 307 x\r\nlocation: http://{elsewhere.address}/Prompting\r\ncontent-length: 0\r\n\r\n"
    assert (ask(dendrite, Raw(location.encode())).dendrite.status_code, elsewhere.visitors) == (307, 0)


@pytest.mark.parametrize("kind", [Prompting, StreamPrompting])
def test_lying_miner(dendrite, kind):
    """An answer of the wrong type, unsigned, or signed by another.
    Older client: answers are not verified."""
    forged = b"x-prompting-signature: sr25519 0x" + b"00" * 64 + b"\r\n"
    lies = [ok(b"[]"), ok(b"<html>"), ok(b'{"completion": 1}'), ok(b'{"completion": "unsigned"}'),
            ok(b'{"completion": "forged"}', forged), ok(b'{"piece": "cut off"}\n'), ok(b'{"piece": 1}\n'),
            ok(b'{"piece": "a"}\n{"done": true}\n'), ok(b'{"done": true, "signature": "sr25519 0x00"}\n')]  # fmt: skip
    for lie in lies:
        answer = ask(dendrite, Raw(lie), kind)
        assert (answer.dendrite.status_code, answer.completion) == (422, None), lie


def test_answer_of_another_question(dendrite):
    """A miner's signed answer to one question, given as the answer to another.
    Older client: answers are not verified."""
    with Axon(MINER).attach(echo) as axon:
        _, answer, headers = post(axon)
    signature = f"x-prompting-signature: {headers['x-prompting-signature']}\r\n".encode()
    replayed = ask(dendrite, Raw(ok(json.dumps(answer).encode(), signature)))
    assert (replayed.dendrite.status_code, replayed.completion) == (422, None)


@pytest.mark.parametrize("kind", [Prompting, StreamPrompting])
def test_answer_that_comes_before_its_question(dendrite, kind):
    """A miner answers, and on the kept connection sends the beginning of an answer to a question that nobody has asked yet.
    Older client: -"""
    lines = []

    def serve():
        while True:
            try:
                lines.append(server.accept()[0])
            except OSError:
                return
            if len(lines) == 1:
                lines[0].recv(65536)
                lines[0].sendall(ok(b"{}"))

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        there = SimpleNamespace(hotkey=ME, axon=f"127.0.0.1:{server.getsockname()[1]}")
        assert ask(dendrite, there).dendrite.status_code == 422

        async def ask_again():  # in the loop that keeps the connection
            lines[0].sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{")
            await asyncio.sleep(0.05)
            return (await dendrite([there], kind.ask("hello"), 0.3))[0]

        asking = asyncio.run_coroutine_threadsafe(ask_again(), dendrite._sessions.background())
        answer = asking.result(SECONDS)  # it does not hang
    assert len(lines) == 1 and answer.dendrite.status_code == 408
    for line in lines:
        line.close()


@pytest.mark.parametrize("evil_first", [True, False])
def test_another_hotkey_at_the_address_of_a_miner(evil_first):
    """Somebody publishes an honest miner's address beside another hotkey, for which that miner refuses to answer.
    Older client: -"""
    with Axon(MINER).attach(echo) as axon, Dendrite(VALIDATOR, allow_private=True) as dendrite:
        honest, evil = (SimpleNamespace(hotkey=hotkey, axon=axon.address) for hotkey in (ME, STRANGER.hotkey.ss58_address))

        def asked():
            "Statuses of one after the other, and the miner's known connections after that."
            order = [evil, honest] if evil_first else [honest, evil]
            statuses = {target.hotkey: ask(dendrite, target, timeout=SECONDS).dendrite.status_code for target in order}
            crowd = axon._server.crowd
            until(lambda: len(crowd._all.known) == 1 and crowd.strangers == 1)  # both are idle
            return statuses[ME], statuses[evil.hotkey], list(crowd._all.known)

        assert ask(dendrite, honest, timeout=SECONDS).dendrite.status_code == 200
        until(lambda: len(axon._server.crowd._all.known) == 1)
        [known] = axon._server.crowd._all.known
        assert [asked() for _ in range(3)] == 3 * [(200, 401, [known])]  # no answer waits among strangers


def test_stream_of_pieces_without_text(dendrite):
    """A miner streams a megabyte of empty pieces as fast as it can, while others are asked.
    Older client: -"""
    answer = ok(b'{"piece": ""}\n' * 60_000)
    turns = []

    async def ask_beside():
        async def others():
            while True:
                turns.append(1)
                await asyncio.sleep(0)

        class Response:  # all of it is there at once
            class content:
                @staticmethod
                async def iter_any():
                    yield answer.partition(b"\r\n\r\n")[2]

        waiting = asyncio.ensure_future(others())
        await asyncio.sleep(0)
        turns.clear()
        try:
            await _read_stream(Response, 10**6, _discard)
        except Exception as error:
            assert error.args == (422, "the answer was cut off")
        waiting.cancel()

    asyncio.run(ask_beside())
    assert len(turns) > 3
    assert ask(dendrite, Raw(answer), StreamPrompting, SECONDS).dendrite.status_code == 413


BRACKETS = ['{"completion": "x", "other": [%s1]}' % ("[]," * 300_000), "[" * 900_000,
            '{"completion": [%s1]}' % ('{"":"]\\\\"},' * 90_000), '[%s1]' % ('"",[],' * 150_000)]  # fmt: skip


@pytest.mark.parametrize("brackets", range(len(BRACKETS)))
def test_answer_of_brackets(brackets, monkeypatch):
    """A miner answers with a megabyte of empty lists and objects, which take long to read.
    Older client: reads any JSON."""
    reads = []
    monkeypatch.setattr(protocol, "_LONG_REPLY", SimpleNamespace(validate_json=reads.append))
    body, code = BRACKETS[brackets].encode(), json.dumps("[{\\\"" * 200_000)
    with Dendrite(VALIDATOR, allow_private=True, require_signed=False) as dendrite:
        answer = ask(dendrite, Raw(ok(body)), timeout=SECONDS).dendrite
        assert answer.status_code == 422 and "more than 1000 lists and objects" in answer.status_message and not reads
    monkeypatch.undo()
    assert len(protocol.read_reply(f'{{"completion": {code}}}'.encode())) == 800_000


def test_answer_of_an_impostor_is_not_read(dendrite, monkeypatch):
    """Somebody at the miner's address answers with JSON that takes long to read, without the miner's signature.
    Older client: answers are not verified."""
    reads = []
    monkeypatch.setattr("prompting_nb.network.dendrite.read_reply", reads.append)
    forged = b"x-prompting-signature: sr25519 0x" + b"00" * 64 + b"\r\n"
    for more in (b"", forged):
        answer = ask(dendrite, Raw(ok(b'{"completion": "x"}', more)), timeout=SECONDS).dendrite
        assert answer.status_code == 422 and "not signed" in answer.status_message and not reads


def test_miner_whose_name_hangs(monkeypatch):
    """A miner's name is one that nobody answers for, and it is asked again and again; another miner has a name as well.
    Older client: -"""
    free, asked = threading.Event(), []

    def look(host, port, *_, **__):
        asked.append(host)
        if host == "slow.example":
            free.wait(SECONDS)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    with Axon(MINER).attach(echo) as axon, Dendrite(VALIDATOR, allow_private=True) as dendrite:
        monkeypatch.setattr(socket, "getaddrinfo", look)
        slow, honest = (SimpleNamespace(hotkey=ME, axon=f"{name}.example:{axon.port}") for name in ("slow", "honest"))


        def asked_a_hundred_times():
            assert {a.dendrite.status_code for a in dendrite.query([slow] * 100, QUESTION, timeout=0.3)} == {408}
            return asked

        until(asked_a_hundred_times)
        assert ask(dendrite, honest, timeout=SECONDS).is_success
        free.set()
    assert asked == ["slow.example", "honest.example"]


def test_silent_miner(dendrite):
    """A miner that takes the connection and says nothing, or stops in the middle.
    Older client: waits for the time limit as well."""
    for reply in (b"", b"HTTP/1.1 200", ok(b"{}").replace(b"length: 2", b"length: 99")):
        assert ask(dendrite, Raw(reply), timeout=0.3).dendrite.status_code == 408
    assert ask(dendrite, Raw(ok(b'{"piece": "a"}\n').replace(b"length: 15", b"length: 99")), StreamPrompting,
               timeout=0.3).dendrite.status_code == 408  # fmt: skip


@pytest.mark.parametrize("kind", [Prompting, StreamPrompting])
def test_gigantic_miner(dendrite, kind):
    """An answer without an end, a bomb of gzip.
    Older client: reads the whole answer, without a limit."""
    assert ask(dendrite, Raw(b"HTTP/1.1 200 OK\r\n\r\n", endless=True), kind, SECONDS).dendrite.status_code == 413
    import gzip

    bomb = gzip.compress(b"x" * 10_000_000)
    assert ask(dendrite, Raw(ok(bomb, b"content-encoding: gzip\r\n")), kind).dendrite.status_code == 422


FLOODS = {
    "informational answers": b"HTTP/1.1 100 \r\n\r\n",
    "informational answers with headers": b"HTTP/1.1 103 Early Hints\r\n" + b"link: x\r\n" * 50 + b"\r\n",
    "answers to nothing": b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx",
    "the extension of a chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;" + b"x" * 1000,
    "empty lines": b"\r\n" * 100,
    "trailers": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 100,
}


@pytest.mark.parametrize("what", FLOODS)
def test_flood_from_a_miner(dendrite, what):
    """A miner sends without end what is no answer: statuses 100, answers to nothing, the middle of a chunk.
    Older client: parses all of it; its time limit does not end meanwhile."""
    flood = FLOODS[what]
    head, more = (flood[:-1000], b"x") if flood.endswith(b"x" * 1000) else (b"", flood)

    class Flood(Raw):
        def run(self, reply, endless):
            with self.socket, self.socket.accept()[0] as line, suppress(OSError):
                line.recv(65536)
                line.sendall(head)
                while True:
                    line.sendall(more * (100_000 // len(more)))

    with Axon(MINER).attach(echo) as axon:
        flooded, good = dendrite.query([Flood(b""), axon], QUESTION, timeout=SECONDS)
    assert (flooded.dendrite.status_code, good.dendrite.status_code) == (422, 200)  # not 408, when the time is up


TINY = {
    "chunks": (Prompting, b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 4_000),
    "lines": (StreamPrompting, b"content-length: 99999\r\n\r\n" + b"{}\n" * 8_000),
}


@pytest.mark.parametrize("what", TINY)
def test_many_answers_in_tiny_parts(what, monkeypatch):
    """Forty miners answer at once, in chunks of one byte, or in lines of a stream without a piece.
    Older client: parses what each of them has sent before anything else."""
    (kind, tiny), turn, work = TINY[what], [0], Counter()

    def slowly(call):
        def slow(*args):
            if args[-1]:  # bytes; without any, aiohttp goes on with those that it has
                work[turn[0]] += 1
                time.sleep(0.001)
            return call(*args)

        return slow

    owner, name = (ResponseHandler, "data_received") if what == "chunks" else (dendrite_page, "read_event")
    monkeypatch.setattr(owner, name, slowly(getattr(owner, name)))
    raws = [Raw(b"HTTP/1.1 200 OK\r\n" + tiny) for _ in range(40)]

    async def count():
        while True:
            turn[0] += 1
            await asyncio.sleep(0)

    async def crowd():
        counting = asyncio.create_task(count())
        with Dendrite(VALIDATOR, allow_private=True) as dendrite:
            answers = await dendrite(raws, kind.ask("hello"), 2.0)
        counting.cancel()
        return answers

    answers = asyncio.run(crowd())
    assert {answer.dendrite.status_code for answer in answers} == {408}
    assert max(work.values()) < (20 if what == "chunks" else 80), sorted(work.values())[-9:]


def test_refusal_that_moves_the_cursor(dendrite):
    """A miner's reason for its refusal holds escape sequences of a terminal, half a character, or a megabyte.
    Older client: shows it as it is."""
    for reason in (b"\\u001b[2J\\u001b]0;x\\u0007", b"\\ud800", b"\\u202e\\u0000", b"a " * 24_000, b'", "error": [["\\u009b"]], "x": "'):
        body = b'{"error": "%s"}' % reason
        refusal = b"HTTP/1.1 403 No\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        message = ask(dendrite, Raw(refusal)).dendrite.status_message
        assert message.isprintable() and message.encode() and len(message) <= 200
    event = b'{"done": true, "error": "\\u001b[2J"}\n'
    assert ask(dendrite, Raw(ok(event)), StreamPrompting).dendrite.status_message.isprintable()


@pytest.mark.parametrize("reason", [b"", b" \\n\\t"], ids=["empty", "blank"])
def test_refusal_without_a_reason(dendrite, reason):
    """A miner refuses, or ends a stream with a failure, and gives an empty reason.
    Older client: shows it as it is."""
    event = b'{"done": true, "error": "%s"}\n' % reason
    failed = ask(dendrite, Raw(ok(event)), StreamPrompting).dendrite
    assert (failed.status_code, failed.status_message) == (500, "the miner reported a failure without a reason")
    body = b'{"error": "%s"}' % reason
    refused = ask(dendrite, Raw(b"HTTP/1.1 403 No\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))).dendrite
    assert (refused.status_code, refused.status_message) == (403, "HTTP status 403")


@pytest.mark.parametrize("code", [b"000", b"101", b"600", b"999"])
def test_status_that_ends_no_answer(dendrite, code):
    """A miner answers with a status that HTTP does not have, or that is no end.
    Older client: takes it."""
    reply = b"HTTP/1.1 " + code + b" x\r\nupgrade: x\r\nconnection: upgrade\r\ncontent-length: 0\r\n\r\n"
    assert ask(dendrite, Raw(reply), timeout=SECONDS).dendrite.status_code == 422


def test_one_bad_miner_among_many(dendrite):
    """Bad miners among good ones.
    Older client: -"""
    bad = [Raw(b""), Raw(b"SSH-2.0\r\n"), Raw(b"HTTP/1.1 200 OK\r\n\r\n", endless=True)]
    nobody = SimpleNamespace(hotkey=ME, axon="127.0.0.1:1")
    with Axon(MINER).attach(echo) as axon, ThreadPoolExecutor(1) as pool:
        silent = pool.submit(dendrite.query, bad[:1], QUESTION, timeout=0.5)
        answers = dendrite.query([*bad[1:], nobody, axon, axon], QUESTION, timeout=SECONDS)  # beside it
    assert [a.dendrite.status_code for a in (*silent.result(), *answers)] == [408, 422, 413, 503, 200, 200]


def test_answers_too_long_together():
    """Two miners collude: the judge takes the answer of each, but not both together, which is to void every step.
    Older validator: -"""

    def judge(prompt, completions):
        if sum(len(text or "") for text in completions) > 1000:
            raise ValueError("context length exceeded")
        return [0.5 if text else 0.0 for text in completions]

    found = reward_answers(judge, "x", ["x" * 600, "y" * 601, "honest"], ["5a", "5b", "5c"])
    assert found.rewards == [0.5, 0.0, 0.5] and found.refused == [1]


def test_miner_that_takes_its_address_away(caplog):
    """After good answers a miner takes its address off the chain, where nobody asks it again and its average stays as it is.
    Older validator: -"""

    def publish(uid, host, port):
        network.client.execute(ServeAxon(network.netuid, host, port), network.miners[uid].wallet).raise_for_failure()
        network.chain.step()
        validator.sync()

    judge = lambda prompt, texts: [0.5 if text else 0.0 for text in texts]
    workers = [Worker(name, lambda prompt: "yes") for name in ("leaver", "b")]
    with Network(workers) as network, Validator(network.wallet, network.client, judge, policy=Policy(k=2, timeout=SECONDS)) as validator:
        validator.step("is it?")
        both = validator.weights()
        leaver, other = both
        axon = network.miners[leaver].axon
        publish(leaver, "0.0.0.0", 0)
        assert (validator.serving(), validator.weights(), validator.weights()) == ([other], {other: 1.0}, {other: 1.0})
        assert validator.away == 1 and caplog.text.count("1 hotkey without an address: no weight until they serve again") == 1
        publish(other, "0.0.0.0", 0)
        assert (validator.set_weights(), validator.away, network.chain.weights) == ({}, 2, {})
        publish(leaver, axon.host, axon.port)
        assert validator.weights() == {leaver: 1.0}


@pytest.mark.parametrize("address", [
    "127.0.0.1:80", "10.0.0.1:80", "169.254.169.254:80", "224.0.0.1:80", "[::ffff:127.0.0.1]:80", "[64:ff9b::a00:1]:80",
    "[2002:7f00:1::]:80", "[fd00::5efe:808:808]:80", "[ff02::5efe:808:808]:80", "[2002:7f00:1::5efe:808:808]:80",
    "[fe80::1%eth0]:80", "2130706433:80", "0x7f.1:80", "127.1:80", "127.0.0.1.:80", "localhost.:80",
])  # fmt: skip
def test_address_inside_our_network(address, monkeypatch):
    """A miner publishes loopback, a private address, a metadata service, or one of them in disguise.
    Older client: connects."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", 80))])
    monkeypatch.setattr(aiohttp.TCPConnector, "connect", None)  # is not called
    with Dendrite(VALIDATOR) as dendrite:
        [answer] = dendrite.query([SimpleNamespace(hotkey=ME, axon=address)], QUESTION)
    assert answer.dendrite.status_code == 503


def test_odd_targets_among_many(dendrite):
    """Entries of the metagraph that are no miners: digits of another script, 5000 digits, 100,000 colons, bytes, a number.
    Older client: -"""
    where = ["127.0.0.1:\xb2", "127.0.0.1:" + "9" * 5000, b"127.0.0.1:80", ("127.0.0.1", 80), 80, "127.0.0.1:80\r\n"]
    where += [100_000 * ":", 100_000 * "1.:", 100_000 * "a.", "\ud800:80", "\x1b[2J:80"]
    odd = [*(SimpleNamespace(hotkey=ME, axon=address) for address in where), "127.0.0.1:80", 7, None]
    odd += [SimpleNamespace(hotkey=hotkey, axon="127.0.0.1:80") for hotkey in (100_000 * "5", "\ud800", "\x1b[2J")]
    with Axon(MINER).attach(echo) as axon:
        answers = dendrite.query([*odd, axon], QUESTION)
    assert [a.dendrite.status_code for a in answers] == [503] * len(odd) + [200]
    assert all(a.dendrite.status_message.isprintable() and (a.axon.hotkey or "").isprintable() for a in answers)


@pytest.mark.parametrize("method", ["__hash__", "__len__", "__bool__", "__eq__", "__str__", "__getattribute__"])
def test_target_whose_methods_fail(dendrite, method):
    """Entries of the metagraph, addresses and hotkeys whose classes fail when they are compared, hashed, measured or shown.
    Older client: -"""

    class Worse(RuntimeError):
        def __str__(self):
            raise self

    class Panic(BaseException):
        """As extensions in Rust raise it: no `Exception`."""

        __str__ = Worse.__str__

    for error in (RuntimeError("no"), Worse(), Panic(), asyncio.CancelledError(), GeneratorExit()):

        def fail(*_, error=error):
            raise error

        Text, Thing = (type("Odd", (kind,), {method: fail}) for kind in (str, object))
        Neuron = type("Neuron", (), {"hotkey": property(fail)})
        odd = [SimpleNamespace(hotkey=ME, axon=make) for make in (Text("127.0.0.1:x"), Thing())]
        odd += [SimpleNamespace(hotkey=make, axon="127.0.0.1:x") for make in (Text(ME), Thing())]
        odd += [SimpleNamespace(hotkey=ME, address=Thing()), Text("x"), Thing(), Neuron()]
        with Axon(MINER).attach(echo) as axon:
            answers = dendrite.query([*odd, axon], QUESTION)
            assert [a.dendrite.status_code for a in answers] == [503] * len(odd) + [200]
            assert all(dendrite.query(one, QUESTION)[0].dendrite.status_code == 503 for one in (odd[0], Neuron()))


ODD_NAMES = {"half": "\ud800", "long": 1_000_000 * "x", "escape": "\x1b[2J\n", "number": 7, "error": RuntimeError("no")}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_target_whose_class_has_an_odd_name(dendrite, name):
    """Entries of the metagraph, addresses and their errors, whose class says of its name what no class is called.
    Older client: -"""

    class Odd(type):
        @property
        def __name__(self):
            if isinstance(name, Exception):
                raise name
            return name

    def fail(*_):
        raise Odd("Error", (Exception,), {"__str__": fail})()

    Thing, Neuron = Odd("Thing", (), {}), type("Neuron", (), {"hotkey": property(fail)})
    odd = [Thing(), SimpleNamespace(hotkey=ME, axon=Thing()), Neuron()]
    with Axon(MINER).attach(echo) as axon:
        answers = dendrite.query([*odd, axon], QUESTION)
    assert [a.dendrite.status_code for a in answers] == [503] * 3 + [200]
    messages = [a.dendrite.status_message for a in answers]
    assert all(message.isprintable() and message.encode() and len(message) <= 200 for message in messages)


def test_300_silent_miners(dendrite):
    """300 miners accept a connection and say nothing, asked together with an honest one.
    Older client: -"""
    with socket.create_server(("127.0.0.1", 0), backlog=700) as server, Axon(MINER).attach(echo) as axon:
        silent = [SimpleNamespace(hotkey=make_wallet(i).hotkey.ss58_address, axon=f"127.0.0.1:{server.getsockname()[1]}")
                  for i in range(300)]  # fmt: skip


        async def ask_together():
            late = asyncio.ensure_future(dendrite(silent, QUESTION, timeout=100))
            [honest] = await dendrite(axon, QUESTION, timeout=SECONDS)
            assert honest.is_success and not late.done()
            late.cancel()
            await asyncio.gather(late, return_exceptions=True)
            return await dendrite(silent, QUESTION, timeout=0.5)

        answers = asyncio.run(ask_together())
    assert [a.dendrite.status_code for a in answers] == [408] * 300


# Streams --------------------------------------------------------------------------------------------------------------


def test_stream_that_is_read_slowly():
    """A permitted caller takes a little of a long stream now and then, and so keeps a worker.
    Older server: works for it to the end."""

    async def long(synapse):
        for _ in range(200):
            yield "y" * 60_000

    body, path = write_body(StreamPrompting.ask("x", timeout=100)), "/StreamPrompting"
    slow = Axon(MINER, workers=1, limits=Limits(write_timeout=2.0)).attach(long)
    with slow as axon, socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect((axon.host, axon.port))
        line.sendall(request(body, sign(body, path=path), path))
        until(lambda: axon.health()["running"] == 1)

        def has_ended():
            with suppress(OSError):
                line.recv(4096)
            time.sleep(0.005)
            return axon.health()["running"] == 0

        until(has_ended)
        until(lambda: axon.metrics.totals())
        # refused, unless this machine is so busy that nothing at all is read in that time
        assert axon.metrics.totals() in ({"refused": 1}, {"left": 1})


@pytest.mark.parametrize("plain", [True, False], ids=["generator", "async generator"])
def test_caller_hangs_up_in_the_middle_of_a_stream(dendrite, plain):
    """A caller that reads two pieces of an endless answer and leaves.
    Older server: -"""
    closed = threading.Event()

    def endless(synapse):
        try:
            while True:
                yield "ä😀\n"
        finally:
            closed.set()

    async def endless_async(synapse):
        try:
            while True:
                yield "ä😀\n"
                await asyncio.sleep(0)
        finally:
            closed.set()

    with Axon(MINER, workers=1).attach(endless if plain else endless_async) as axon:
        stream = dendrite.stream(axon, QUESTION, timeout=SECONDS)
        assert [piece for piece, _ in zip(stream, range(2))] == ["ä😀\n"] * 2
        stream.close()
        assert closed.wait(SECONDS)
        until(lambda: axon.health()["running"] == 0)


def test_pieces_arrive_whole_and_as_they_are_made(dendrite):
    """Pieces of newlines and characters of many bytes; each must arrive before the next is made.
    Older server: -"""
    pieces, heard = ["a\n", "\n\n", "ü", "😀" * 2000, "\u2028", "end"], threading.Semaphore(0)

    def one_by_one(synapse):
        for piece in pieces:
            yield piece
            assert heard.acquire(timeout=SECONDS)  # the next is made when this one has been heard

    with Axon(MINER).attach(one_by_one) as axon:
        got, stream = [], dendrite.stream(axon, QUESTION, timeout=SECONDS)
        for piece in stream:
            got.append(piece)
            heard.release()
    assert got == pieces and stream.answer.completion == "".join(pieces) and stream.answer.is_success


def test_old_stream_is_plain_text():
    """The older format's stream: text as it comes, each chunk whole characters.
    Older server: -"""

    def speak(synapse):
        yield from ("zwei\n", "Wörter 😀")

    with Axon(MINER).attach(speak) as axon:
        connection = http.client.HTTPConnection(axon.host, axon.port, timeout=SECONDS)
        connection.request("POST", "/StreamPrompting", OLD, old(StreamPrompting.ask("hello")))
        answer = connection.getresponse()
        assert answer.status == 200 and answer.getheader("content-type") == "text/event-stream"
        assert answer.getheader("bt_header_axon_status_code") == "200"
        assert answer.read().decode() == "zwei\nWörter 😀"
        connection.close()


def test_old_streams_that_are_late(caplog):
    """A permitted caller asks for streams in the older format, and for less time than they take, to fill the log.
    Older server: no time limit ends a handler."""

    async def speak(synapse):
        yield "zwei"
        await asyncio.sleep(SECONDS)

    body, answers = write_body(Prompting.ask("hello", timeout=0.2)), []

    def asked():
        "Whether anything was said in time: the machine may stand still for so long."
        with connect(axon) as line:
            line.sendall(request(body, old(), "/StreamPrompting"))
            answers.append(b"")
            with suppress(ConnectionResetError):
                while more := line.recv(65536):
                    answers[-1] += more
                    if b"504" in answers[-1]:
                        return False
        return True

    with Axon(MINER).attach(speak) as axon:
        until(asked)
        assert b"zwei" in answers[-1] and not answers[-1].endswith(b"0\r\n\r\n")  # it is told from a whole one
        until(lambda: axon.metrics.totals() == {"late": len(answers)})
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# The world around it --------------------------------------------------------------------------------------------------


class Echo(Miner):
    @classmethod
    def add_args(cls, parser):
        pass

    def config(self):
        return read_config(self.add_args)

    def prompt(self, synapse):
        return echo(synapse)


@pytest.fixture
def chain(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test"])
    chain = EmbeddedChain()
    chain.register(MINER), chain.register(VALIDATOR, stake=1000.0, validator_permit=True)
    return chain


class Hurried(threading.Event):
    "Writes down how long it should be waited for, and waits less."

    def __init__(self):
        super().__init__()
        self.pauses = []

    def wait(self, seconds=None):
        self.pauses.append(seconds)
        return super().wait(0.005)


def test_chain_away(chain, caplog):
    """The chain is away for twenty-five minutes, which here pass quickly.
    Older miner: -"""
    with chain.client() as client:
        miner = Echo(wallet=MINER, subtensor=client)
        miner.runner.stopping = Hurried()
        with miner, Dendrite(VALIDATOR, allow_private=True) as dendrite:
            chain.fail(9)
            chain.step()
            assert {ask(dendrite, miner.axon).dendrite.status_code for _ in range(20)} == {200}
            assert miner.wait_for_block(chain.block, SECONDS)
    assert sum(pause for pause in miner.runner.stopping.pauses if pause > 6.0) > 25 * 60
    assert sum("the chain failed" in r.getMessage() for r in caplog.records) == 9


def test_chain_that_hangs(chain, caplog):
    """A call to the chain never returns.
    Older miner: -"""
    with chain.client() as client:
        hang, looks = threading.Event(), []
        settings = {"miner": {"poll_interval": 0.001, "retries": 1000}, "subtensor.timeout": SECONDS}
        hang.set()

        class Silent:
            network, subnets, execute = client.network, client.subnets, client.execute
            block = property(lambda self: looks.append(1) or hang.wait(SECONDS) and client.block)

        with Echo(settings, wallet=MINER, subtensor=Silent()) as miner:
            until(lambda: get(miner.axon, "/ready")[0] == 200)
            miner.subnet.client.seconds, seen = 0.05, len(looks)  # until here every call was answered in time
            until(lambda: len(looks) > seen + 1)  # begun with that limit
            hang.clear()
            until(lambda: get(miner.axon, "/ready")[0] == 503)
            assert "the chain has failed" in get(miner.axon, "/ready")[1]["reason"] and status(miner.axon) == 200
            hang.set()
            until(lambda: get(miner.axon, "/ready")[0] == 200)
    assert "the chain did not answer within 0.05 s" in caplog.text


def test_chain_that_stands_still(chain, caplog):
    """The chain answers with the same block for minutes.
    Older miner: -"""
    now, looks = [0.0], []

    class Patient(Echo):
        clock = staticmethod(lambda: now[0])

    settings = {"miner": {"poll_interval": 0.001}, "axon.allow_private": True}
    still = lambda: [r for r in caplog.records if "the chain has had no block after" in r.getMessage()]
    with chain.client() as client, Patient(settings, wallet=MINER, subtensor=client) as miner:
        now[0] = 400.0
        time.sleep(0.05)
        assert get(miner.axon, "/ready")[0] == 200 and not still()  # blocks of an embedded chain may be made by hand
    now[0] = 0.0
    with chain.client() as client:

        class Real:
            network, subnets, execute = "local", client.subnets, client.execute
            block = property(lambda self: looks.append(now[0]) or client.block)

        with Patient(settings, wallet=MINER, subtensor=Real()) as miner:
            until(lambda: len(looks) > 3)
            now[0] = 200.0
            until(lambda: looks.count(200.0) > 3)
            assert get(miner.axon, "/ready")[0] == 200 and not still()
            now[0] = 400.0
            until(lambda: get(miner.axon, "/ready")[0] == 503)
            assert f"no block after {chain.block} for 400 s" in get(miner.axon, "/ready")[1]["reason"] and status(miner.axon) == 200
            assert len(still()) == 1
            chain.step()
            until(lambda: get(miner.axon, "/ready")[0] == 200)
    assert any("the chain goes on" in r.getMessage() for r in caplog.records)


def test_chain_that_flips(chain):
    """Two nodes behind one address stand still at two blocks, and answer in turn.
    Older miner: -"""
    now, turn = [0.0], [0]

    class Patient(Echo):
        clock = staticmethod(lambda: now[0])

    with chain.client() as client:

        class Two:
            network, subnets, execute = "local", client.subnets, client.execute

            @property
            def block(self):
                turn[0] += 1
                return client.block + turn[0] % 2

        settings = {"miner": {"poll_interval": 0.001}, "axon.allow_private": True}
        with Patient(settings, wallet=MINER, subtensor=Two()) as miner:
            assert get(miner.axon, "/ready")[0] == 200
            for now[0] in (100.0, 200.0, 300.0, 400.0):
                seen = turn[0]
                until(lambda seen=seen: turn[0] > seen + 4)
            until(lambda: get(miner.axon, "/ready")[0] == 503)
            assert f"no block after {chain.block + 1} for" in get(miner.axon, "/ready")[1]["reason"] and status(miner.axon) == 200
            chain.step(2)
            until(lambda: get(miner.axon, "/ready")[0] == 200)


def test_chain_that_goes_back(chain):
    """Another chain, or a node that is far behind, answers at the same address: its blocks have lower numbers.
    Older miner: -"""
    back, settings = [0], {"miner": {"poll_interval": 0.001, "blocks_per_epoch": 5}}
    with chain.client() as client:

        class Behind:
            network, subnets, execute = client.network, client.subnets, client.execute
            block = property(lambda self: 1000 + client.block - back[0])

        with Echo(settings, wallet=MINER, subtensor=Behind()) as miner:
            chain.register(STRANGER)
            time.sleep(0.05)
            assert status(miner.axon, headers=sign(wallet=STRANGER)) == 403
            back[0] = 900
            until(lambda: status(miner.axon, headers=sign(wallet=STRANGER)) == 200)


def test_chain_that_shows_nobody(chain, caplog):
    """A node answers with a subnet in which nobody is registered, for a while.
    Older miner: -"""
    settings = {"miner": {"poll_interval": 0.001, "blocks_per_epoch": 1}}
    with chain.client() as client:
        lost = threading.Event()

        class Subnets:
            def metagraph(self, netuid):
                found = client.subnets.metagraph(netuid)
                return SimpleNamespace(neurons=[]) if lost.is_set() else found

        class Losing:
            network, subnets, execute, block = client.network, Subnets(), client.execute, property(lambda self: client.block)

        with Echo(settings, wallet=MINER, subtensor=Losing()) as miner:
            lost.set()
            chain.step()
            until(lambda: "shows nobody on subnet" in caplog.text)
            assert miner.is_running and status(miner.axon) == 200
            lost.clear()
            until(lambda: miner.runner.failures == 0)


def test_deregistration_while_running(chain, caplog):
    """The miner's uid is taken by another while it runs.
    Older miner: -"""
    settings = {"miner": {"poll_interval": 0.001, "blocks_per_epoch": 1}}
    with chain.client() as client, Echo(settings, wallet=MINER, subtensor=client) as miner:
        chain.replace(0, STRANGER)
        chain.step(2)
        until(lambda: not miner.is_running)
        assert isinstance(miner.error, NotRegisteredError) and not miner.axon.is_running
    assert any("is not registered" in r.getMessage() for r in caplog.records)


def test_rule_that_is_a_coroutine(chain):
    """The operator adds a rule that is a coroutine function to the blacklist.
    Older server: awaits a blacklist function that is one; it has no rules."""

    async def banned(caller):
        await asyncio.sleep(0)
        return Verdict(True, "hotkey is banned") if caller.hotkey == STRANGER.hotkey.ss58_address else None

    chain.register(STRANGER)
    with chain.client() as client, Echo(wallet=MINER, subtensor=client) as miner:
        miner.rules.append(banned)
        miner.rules.append(lambda caller: None)
        assert [post(miner.axon)[0], post(miner.axon, BODY, sign(wallet=STRANGER))[:2]] == [
            200, (403, {"error": "hotkey is banned"})]  # fmt: skip


FAST = {"miner": {"poll_interval": 0.001, "blocks_per_epoch": 100}}


class Failing(Echo):
    "Fails at what is named in `fails`, once for each name."

    def __init__(self, *args, fails=(), **more):
        super().__init__(*args, **more)
        self.fails, self.done = list(fails), []

    def fail(self, what):
        if what in self.fails:
            self.fails.remove(what)
            raise ConnectionError("the node hung up")
        self.done.append(what)

    def _publish(self):
        self.fail("publish")
        super()._publish()

    def set_weights(self):
        if "refusal" in self.fails:
            self.fails.remove("refusal")
            return False
        self.fail("weights")
        return super().set_weights()

    def weights(self):
        return {self.uid: 1.0}


@pytest.mark.parametrize("fails", [["publish"], ["weights"], ["refusal"], ["publish", "refusal", "weights", "refusal"]])
def test_epoch_in_which_the_chain_fails(chain, fails):
    """The chain hangs up on a miner that publishes its address or sets its weights, or refuses the weights, once in an epoch.
    Older miner: sets them in the next epoch."""
    with chain.client() as client, Failing(FAST, wallet=MINER, subtensor=client) as miner:
        miner.done.clear()
        miner.fails = list(fails)
        chain.step(100)
        until(lambda: "weights" in miner.done and not miner.fails)
        chain.step(50)
        assert miner.wait_for_block(chain.block) and miner.runner.failures == 0
    assert miner.done == ["publish", "weights"] and chain.weights == {0: {0: 1.0}}  # once each


def test_chain_that_refuses_all_weights(chain):
    """The chain refuses a miner's weights each time.
    Older miner: sets them once in an epoch."""

    class Refused(Echo):
        tries = 0

        def set_weights(self):
            self.tries += 1
            return False

    with chain.client() as client, Refused(FAST, wallet=MINER, subtensor=client) as miner:
        for epoch in (1, 2):
            chain.step(100)
            until(lambda: miner.tries == 10 * epoch)
            chain.step(2), miner.wait_for_block(chain.block)
            assert miner.tries == 10 * epoch and status(miner.axon) == 200


class Panic(BaseException):
    "As a client in another language raises it."


def test_client_of_the_chain_that_panics(chain, caplog):
    """The client of the chain raises an error that is no `Exception`.
    Older miner: ends."""
    with chain.client() as client, Echo(FAST, wallet=MINER, subtensor=client) as miner:
        chain.fail(3, Panic("index out of bounds"))
        chain.step()
        assert miner.wait_for_block(chain.block) and miner.is_running and status(miner.axon) == 200
    assert "the client failed with Panic: index out of bounds), retry 3 of 10" in caplog.text


@pytest.mark.parametrize("ip", ["2001:4860::8888", "[2001:4860:0::8888]", "2001:4860::0:8888"])
def test_ipv6_address_that_is_written_otherwise(chain, ip, monkeypatch):
    """The chain writes the miner's IPv6 address otherwise than the miner does, at every epoch.
    Older miner: -"""
    published, serve = [], Axon.serve
    monkeypatch.setattr(Axon, "serve", lambda *args: published.append(1) or serve(*args))
    settings = {"axon.external_ip": ip, "miner": {"poll_interval": 0.001, "blocks_per_epoch": 1}}
    with chain.client() as client, Echo(settings, wallet=MINER, subtensor=client) as miner:
        for _ in range(3):
            chain.step()
            miner.wait_for_block(chain.block)
    assert len(published) == 1


def test_blacklist_that_returns_a_coroutine(chain):
    """A plain `blacklist` and `priority` that return coroutines, as a decorator makes them.
    Older miner: a coroutine is true: refuses everybody."""

    class Around(Echo):
        def blacklist(self, synapse):
            return self.later(super().blacklist(synapse))

        def priority(self, synapse):
            return self.later(super().priority(synapse))

        async def later(self, value):
            await asyncio.sleep(0)
            return value

    with chain.client() as client, Around(wallet=MINER, subtensor=client) as miner:
        assert [status(miner.axon), status(miner.axon, headers=sign(wallet=STRANGER))] == [200, 403]


@pytest.mark.parametrize("ip", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "[fe80::1]", "::ffff:10.0.0.1", "64:ff9b::a00:1", "224.0.0.1"])
def test_private_address_that_is_to_be_published(chain, ip):
    """A miner is told to publish a private address.
    Older miner: publishes it."""
    with chain.client() as client, pytest.raises(InputError, match="is not on the open internet .*add --axon.allow_private"):
        Echo({"axon.external_ip": ip}, wallet=MINER, subtensor=client)


@pytest.mark.parametrize("entry", ["", " ", "member", "5Member", "0x" + "00" * 32])
def test_blacklist_entry_that_refuses_nobody(chain, entry):
    """An entry of the blacklist with white space around it, and entries that are no address.
    Older miner: they refuse nobody."""
    key = STRANGER.hotkey.ss58_address
    settings = lambda entry: {"miner.blacklist": {"blacklist": [entry], "allow_non_registered": True}}
    with chain.client() as client:
        with pytest.raises(InputError, match="miner.blacklist.blacklist: .* is no ss58 address"):
            Echo(settings(entry), wallet=MINER, subtensor=client)
        with Echo(settings(f"\t{key} \n"), wallet=MINER, subtensor=client) as miner:
            assert [status(miner.axon), status(miner.axon, headers=sign(wallet=STRANGER))] == [200, 403]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_that_keeps_the_port():
    """A program that forks goes on after the miner in it has stopped.
    Older server: the child keeps the port."""
    code = """
        import os, socket, time, warnings
        from prompting_nb.network.axon import Axon
        from prompting_nb.network.chain import make_wallet
        warnings.simplefilter("ignore")
        with Axon(make_wallet("miner")).attach(lambda synapse: synapse) as axon:
            child = os.fork()
            if child == 0:
                time.sleep(30)
                os._exit(0)
        while True:  # as soon as the child has begun
            try:
                socket.create_server((axon.host, axon.port)).close()
                break
            except OSError:
                time.sleep(0.01)
        print("free", os.waitpid(child, os.WNOHANG)[0])
        os.kill(child, 9)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert run.stdout == "free 0\n", run.stdout + run.stderr


def test_process_that_cannot_be_started(monkeypatch, caplog):
    """A process of a miner with several ends while the system has no memory or no place for another.
    Older miner: has one."""
    popen, short = subprocess.Popen, [OSError(11, "Resource temporarily unavailable"), MemoryError()]

    def start(*args, **more):
        if len(made) >= 2 and short:
            raise short.pop()
        made.append(popen(*args, **more))
        return made[-1]

    made = []
    monkeypatch.setattr(subprocess, "Popen", start)
    with Followers(lambda _: [sys.executable, "-c", "import time; time.sleep(60)"], count=2, pause=0.01) as followers:
        made[1].kill()
        until(lambda: len(made) == 3 and followers.running == 2)
    assert caplog.text.count("could not be started") == 2 and all(process.poll() is not None for process in made)
    made.clear(), short.append(OSError(12, "Cannot allocate memory"))
    with pytest.raises(OSError, match="Cannot allocate"), Followers(lambda _: ["sleep", "60"], count=3):
        pass
    assert len(made) == 2 and all(process.poll() is not None for process in made)  # none is left behind


def test_process_that_hangs(caplog):
    """A process of a miner with several is suspended, or hangs: it is given connections and answers none.
    Older miner: has one."""
    beats = "import time; from prompting_nb.baseminer.processes import leader_is_gone\nwhile not leader_is_gone(): time.sleep(0.02)"
    quiet = "import time; time.sleep(60)"  # gives no sign: it may still be starting
    commands = [beats, quiet, beats]
    with Followers(lambda _: [sys.executable, "-c", commands.pop(0)], count=2, pause=0.1, patience=2.0) as followers:
        first, second = followers._processes
        until(lambda: followers._beats[first.pid][1] == 0.0)
        first.send_signal(signal.SIGSTOP)
        until(lambda: followers._processes[0] is not first and followers.running == 2)
        until(lambda: followers._beats[followers._processes[0].pid][1] == 0.0)
        assert followers._processes[1] is second
    assert caplog.text.count("process 2 of 3 hangs (no sign of life for 2 s): killed") == 1 and first.poll() == -signal.SIGKILL


def test_rate_limit_says_when_to_come_back(chain):
    """A registered caller that asks too often.
    Older server: has no rate limit."""
    settings = {"miner.blacklist": {"quota": 2, "window": 100.0}}
    with chain.client() as client, Echo(settings, wallet=MINER, subtensor=client) as miner:
        answers = [post(miner.axon) for _ in range(3)]
    assert [code for code, _, _ in answers] == [200, 200, 429]
    assert 90 <= int(answers[2][2]["retry-after"]) <= 100


def test_a_repeated_prompt_takes_no_place_in_the_queue(chain):
    """The same prompt again and again, to keep the miner busy.
    Older miner: -"""
    settings = {"miner.blacklist.use_prompt_cache": True}
    with chain.client() as client, Echo(settings, wallet=MINER, subtensor=client) as miner:
        assert [status(miner.axon) for _ in range(3)] == [200, 409, 409]
        until(lambda: miner.axon.metrics.registry.get_sample_value("axon_cache_hits_total") == 2)


class WaitedFor(PromptCache):
    waits = True


@pytest.mark.parametrize("cache", [PromptCache, WaitedFor], ids=["memory", "store"])
@pytest.mark.parametrize("kind", ["generator", "async generator"])
def test_stream_left_at_its_last_piece(kind, cache):
    """A caller reads a stream up to its last piece, hangs up, and asks the same again.
    Older miner: -"""
    calls, closed, once = [], threading.Event(), Once(cache(), lambda: 1)

    def pieces(synapse):
        calls.append(synapse.prompt)
        yield ""
        if len(calls) == 1:
            raise MemoryError("before the first text")
        try:
            while True:
                yield "the end"
                time.sleep(0.01)
        finally:
            closed.set()

    async def pieces_async(synapse):
        calls.append(synapse.prompt)
        yield ""
        if len(calls) == 1:
            raise MemoryError("before the first text")
        try:
            yield "the end"
            await asyncio.sleep(SECONDS)
        finally:
            closed.set()

    ask = handler(pieces if kind == "generator" else pieces_async, once)
    with Axon(MINER).attach(ask, check_fn=once.check) as axon:

        def left_at(text):
            with connect(axon) as line:
                headers = sign(path="/StreamPrompting") | {"connection": "close"}
                line.sendall(request(BODY, headers, "/StreamPrompting"))
                data = b""
                while text not in data and (more := line.recv(65536)):
                    data += more
            return int(data.split()[1])

        left_at(b"nothing")  # it fails: the prompt may be sent again
        assert left_at(b"the end") == 200 and closed.wait(SECONDS)
        until(lambda: axon.health()["running"] == 0)
        assert left_at(b"the end") == 409 and len(calls) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_under_load(tmp_path):
    """SIGTERM while requests are worked on and wait.
    Older server: -"""
    code = f"""
        import logging, sys, time
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        from prompting_nb.baseminer.miner import Miner
        from prompting_nb.config import read_config
        from prompting_nb.network.chain import EmbeddedChain, make_wallet
        done = open({str(tmp_path / "done")!r}, "a", buffering=1)
        class Slow(Miner):
            @classmethod
            def add_args(cls, parser): pass
            def config(self): return read_config(self.add_args)
            def prompt(self, synapse):
                time.sleep(0.02)
                print(synapse.prompt, file=done)
                synapse.completion = synapse.prompt
                return synapse
        chain, wallet = EmbeddedChain(), make_wallet("miner")
        chain.register(wallet), chain.register(make_wallet("validator"))
        miner = Slow({{"miner.poll_interval": 0.05}}, wallet=wallet, subtensor=chain.client())
        miner.axon.drain = 20.0
        import threading
        def say_port():
            while not miner.axon.is_running:
                time.sleep(0.01)
            print(miner.axon.port, flush=True)
        threading.Thread(target=say_port).start()
        miner.run()
        print("ended", flush=True)
    """
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], **pipes) as process, ExitStack() as last:
        last.callback(process.kill)  # or a child that lives would be waited for without an end
        there = SimpleNamespace(hotkey=ME, axon=f"127.0.0.1:{int(process.stdout.readline())}")
        with Dendrite(VALIDATOR, allow_private=True) as dendrite, ThreadPoolExecutor(1) as pool:
            questions = [Prompting.ask(f"{i}", timeout=SECONDS) for i in range(300)]

            async def all_of_them():
                return await asyncio.gather(*(dendrite([there], q) for q in questions))

            rounds = pool.submit(asyncio.run, all_of_them())
            until(lambda: (tmp_path / "done").exists() and (tmp_path / "done").read_text().count("\n") >= 20)

            def admitted():
                done = (tmp_path / "done").read_text().count("\n")
                host, port = there.axon.split(":")
                _, health = get(SimpleNamespace(host=host, port=int(port)), "/health")
                return done + health["waiting"] + health["running"]

            until(lambda: admitted() >= 200)  # a slow machine takes a while to read them
            process.send_signal(signal.SIGTERM)
            answers = [answer for [answer] in rounds.result()]
        output, log = process.communicate(timeout=SECONDS)
    answered = sorted(a.completion for a in answers if a.is_success)
    assert answered == sorted((tmp_path / "done").read_text().split())  # whatever was worked on reached its caller
    assert len(answered) >= 200  # and the whole queue was worked off
    assert {a.dendrite.status_code for a in answers} <= {200, 503}
    assert process.returncode == 0 and output == "ended\n" and "SIGTERM" in log and "may finish" in log


# Memory ---------------------------------------------------------------------------------------------------------------


async def talk(axon, requests, codes):
    "Send requests on one connection, each after the answer to the last."
    reader, writer = await asyncio.open_connection(axon.host, axon.port)
    for data in requests:
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        codes[int(head[9:12])] += 1
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
    writer.close()


@pytest.mark.slow
def test_100_000_requests_leave_memory_flat():
    """100 000 requests by 1000 callers, one in ten good, over 16 connections.
    Older server: keeps a nonce for every hotkey and uuid, and forgets none."""
    wallets = [make_wallet(i) for i in range(1000)]
    codes, sizes, bad = Counter(), [], request(headers=sign() | {"X-Bittensor-Signature": "0x" + "00" * 64})

    def requests(first):
        for i in range(first, first + 1250):
            yield request(headers=sign(wallet=wallets[i % 1000])) if i % 10 == 0 else bad

    async def all_of_them(axon):
        for start in range(0, 100_000, 20_000):
            await asyncio.gather(*(talk(axon, requests(start + 1250 * i), codes) for i in range(16)))
            sizes.append(memory())

    with Axon(MINER).attach(aecho, lambda s: False, lambda s: 1.0) as axon:
        asyncio.run(all_of_them(axon))
    assert codes == {200: 10_000, 401: 90_000}
    assert sizes[-1] - sizes[1] < 10, sizes  # MB over the last 60 000; twelve seconds of nonces are kept
