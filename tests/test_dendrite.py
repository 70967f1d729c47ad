"""The client among strangers: addresses that it does not follow, targets that are none, miners that take up its places."""

import asyncio
import gc
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from bittensor.sp_core import ss58_decode, ss58_encode
from hypothesis import given, settings
from hypothesis import strategies as st

from prompting_nb import protocol
from prompting_nb.network import dendrite as dendrite_module
from prompting_nb.network import floods
from prompting_nb.network.addresses import find_addresses
from prompting_nb.network.axon import Axon
from prompting_nb.network.chain import EmbeddedChain, make_wallet
from prompting_nb.network.dendrite import Dendrite, Question
from prompting_nb.network.floods import Paced, PacedConnector
from prompting_nb.protocol import Prompting, StreamPrompting, read_body, read_event, read_reply
from prompting_nb.validators.validator import Validator

MINER, VALIDATOR = make_wallet("miner"), make_wallet("validator")
ME = MINER.hotkey.ss58_address
QUESTION = Prompting.ask("hello", timeout=10)
ONE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def echo(synapse):
    synapse.completion = synapse.prompt
    return synapse


def at(address, hotkey=ME):
    return SimpleNamespace(hotkey=hotkey, axon=address)


def said(answers):
    return [(answer.dendrite.status_code, answer.dendrite.status_message) for answer in answers]


@pytest.fixture
def axon():
    with Axon(MINER).attach(echo) as axon:
        yield axon


@pytest.fixture
def dendrite():
    with Dendrite(VALIDATOR, allow_private=True) as dendrite:
        yield dendrite


# Addresses ------------------------------------------------------------------------------------------------------------


class Internet:
    "Stands in for resolver and connector: notes what is looked up and connected to, and does neither."

    def __init__(self, monkeypatch):
        self.names, self.asked, self.connected, self.refuse = {}, [], [], set()
        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)
        monkeypatch.setattr(aiohttp.TCPConnector, "connect", self.connect)

    def look_up(self, host, port, *_, **__):
        self.asked.append(host)
        if host not in self.names:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in self.names[host].pop(0)]

    async def connect(self, request, *_, **__):
        self.connected.append((request.url.host, request.url.port, request.headers["Host"]))
        if request.url.host in self.refuse:
            raise aiohttp.ClientConnectorError(SimpleNamespace(host="", port=0, ssl=None), OSError(111, "refused"))
        raise aiohttp.ServerDisconnectedError("this is no internet")


@pytest.fixture
def internet(monkeypatch):
    return Internet(monkeypatch)


REFUSED = """127.0.0.1 127.255.255.254 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 100.64.0.1 100.100.100.200
169.254.169.254 168.63.129.16 192.0.0.192 192.0.2.1 198.18.0.1 198.51.100.7 203.0.113.9 192.88.99.1 224.0.0.1 239.255.255.250
240.0.0.1 255.255.255.255 [::] [::1] [::127.0.0.1] [fe80::1] [fec0::1] [fc00::1] [fd00:ec2::254] [ff02::1] [ff0e::1]
[::ffff:127.0.0.1] [::ffff:10.0.0.1] [::ffff:a9fe:a9fe] [::ffff:0:127.0.0.1] [64:ff9b::127.0.0.1]
[64:ff9b::a9fe:a9fe] [64:ff9b::10.1.2.3] [64:ff9b:1::8.8.8.8] [2002:7f00:1::] [2002:a9fe:a9fe::1] [2002:c0a8:101::]
[2002:e000:1::1] [2001::1]
[2001:db8::1] [3fff::1] [100::1] [2607:f8b0::5efe:7f00:1] [fe80::5efe:8.8.8.8] [fd00::200:5efe:8.8.8.8]
[2002:7f00:1::5efe:8.8.8.8] [ff0e::5efe:8.8.8.8] [::5efe:8.8.8.8]
[5f00::1] [4000::1] [0:0:0:0:0:0:0:1] [0000:0000::ffff:7f00:0001]""".split()
ODD = """2130706433 0x7f000001 0x7f.0.0.1 0177.0.0.1 127.1 127.0.1 127.0.0.1. 127.0.0.01 0 1 017700000001 1.2.3.4.5 a.b.0x1f
[fe80::1%eth0] [::1%25lo] [8.8.8.8] [::1 ::1] 8.8.8.8:80 user@8.8.8.8 8.8.8.8/x 8.8.8.8?x 8.8.8.8#x 8.8.8.8\\x 8.8.8.8%00
１２７.0.0.1 127。0。0。1 ①②⑦.0.0.1 ::ffff:127.0.0.1%1""".split()


@pytest.mark.parametrize("host", REFUSED)
def test_an_address_inside_is_not_connected_to(host, internet):
    with Dendrite(VALIDATOR) as dendrite:
        [(status, message)] = said(dendrite.query([at(f"{host}:8091")], QUESTION))
    assert status == 503 and "is not on the open internet" in message
    assert internet.asked == internet.connected == []


@pytest.mark.parametrize("allow_private", [False, True])
@pytest.mark.parametrize("host", ODD)
def test_another_way_to_write_an_address_is_not_followed(host, allow_private, internet):
    with Dendrite(VALIDATOR, allow_private=allow_private) as dendrite:
        [(status, message)] = said(dendrite.query([at(f"{host}:8091")], QUESTION))
    assert status == 503 and ("is not ip:port" in message or "is no address" in message or "not on the open" in message)
    assert internet.asked == internet.connected == []


@pytest.mark.parametrize("host, connected", [
    ("8.8.8.8", "8.8.8.8"), ("[2606:4700::1111]", "2606:4700::1111"), ("[::ffff:8.8.8.8]", "::ffff:808:808"),
    ("[64:ff9b::8.8.8.8]", "64:ff9b::808:808"), ("[2002:808:808::]", "2002:808:808::"),
])  # fmt: skip
def test_an_address_on_the_open_internet_is(host, connected, internet):
    with Dendrite(VALIDATOR) as dendrite:
        [(status, _)] = said(dendrite.query([at(f"{host}:8091")], QUESTION))
    assert status == 503 and internet.asked == [] and [call[:2] for call in internet.connected] == [(connected, 8091)]


def test_the_word_opens_private_addresses(internet):
    with Dendrite(VALIDATOR, allow_private=True) as dendrite:
        dendrite.query([at("10.0.0.1:80"), at("[::1]:81")], QUESTION)
    assert sorted(call[:2] for call in internet.connected) == [("10.0.0.1", 80), ("::1", 81)]


@pytest.mark.parametrize("found", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["10.0.0.1", "8.8.8.8"], ["::1"],
                                   ["::ffff:10.0.0.1"], ["fe80::1%eth0"]])  # fmt: skip
@pytest.mark.parametrize("name", ["miner.example", "miner.example.", "localhost", "localhost."])
def test_a_name_is_judged_by_all_it_leads_to(name, found, internet):
    internet.names[name] = [found]
    with Dendrite(VALIDATOR) as dendrite:
        [(status, message)] = said(dendrite.query([at(f"{name}:80")], QUESTION))
    assert status == 503 and f"{name}, which is " in message and "is not on the open internet" in message
    assert internet.asked == [name] and internet.connected == []


def test_a_name_that_leads_elsewhere_the_second_time_is_asked_once(internet):
    internet.names["miner.example"] = [["8.8.8.8"], ["127.0.0.1"]]
    with Dendrite(VALIDATOR) as dendrite:
        dendrite.query([at("miner.example:80")], QUESTION)
    assert internet.asked == ["miner.example"] and internet.connected == [("8.8.8.8", 80, "miner.example:80")]


def test_the_next_address_of_a_name_is_tried(internet):
    internet.names["miner.example"], internet.refuse = [["8.8.4.4", "8.8.8.8", "1.1.1.1"]], {"8.8.4.4"}
    with Dendrite(VALIDATOR) as dendrite:
        dendrite.query([at("miner.example:80")], QUESTION)
    assert [call[0] for call in internet.connected] == ["8.8.4.4", "8.8.8.8"]


def test_an_unknown_name_and_one_that_takes_long(internet, monkeypatch):
    free = threading.Event()
    look = lambda host, *_, **__: free.wait(20) and [] if host == "slow.example" else internet.look_up(host, 0)
    monkeypatch.setattr(socket, "getaddrinfo", look)
    with Dendrite(VALIDATOR) as dendrite:
        answers = [*said(dendrite.query([at("slow.example:80")], QUESTION, timeout=0.2)),
                   *said(dendrite.query([at("gone.example:80")], QUESTION, timeout=30))]
        free.set()
    assert answers[0] == (408, "no answer within 0.2 s") and internet.connected == []
    assert answers[1] == (503, "gone.example:80 cannot be reached: [Errno -2] Name or service not known")


def test_names_that_nobody_answers_for_do_not_hold_up_the_others(internet, monkeypatch):
    free = threading.Event()
    look = lambda host, *_, **__: free.wait(20) and [] if host.startswith("slow") else internet.look_up(host, 0)
    monkeypatch.setattr(socket, "getaddrinfo", look)
    internet.names["miner.example"] = [["8.8.8.8"]]
    with Dendrite(VALIDATOR) as dendrite:
        answers = said(dendrite.query([at(f"slow{i}.example:80") for i in range(40)], QUESTION, timeout=0.5))
        answers += said(dendrite.query([at("miner.example:80")], QUESTION, timeout=10))  # while they still hang
        free.set()
    assert [status for status, _ in answers] == [408] * 40 + [503]
    assert [call[0] for call in internet.connected] == ["8.8.8.8"]


def test_four_addresses_of_a_name_are_tried(internet):
    found = [f"8.8.8.{i}" for i in range(9)]
    internet.names["miner.example"], internet.refuse = [found], set(found)
    with Dendrite(VALIDATOR) as dendrite:
        [(status, message)] = said(dendrite.query([at("miner.example:80")], QUESTION))
    assert status == 503 and "cannot be reached" in message
    assert [call[0] for call in internet.connected] == found[:4]


@pytest.mark.parametrize("stale", [0, 1, 2])
def test_what_was_sent_to_one_address_is_not_sent_to_the_next(stale, internet, monkeypatch):
    "Kept connections to it had been closed, and it takes no new one."
    internet.names["miner.example"], sent = [["8.8.8.8", "8.8.4.4"]], []

    async def exchange(self, session, url, **_):
        sent.append(url.host)
        if len(sent) <= stale:
            raise aiohttp.ServerDisconnectedError
        raise aiohttp.ClientConnectorError(SimpleNamespace(host="", port=0, ssl=None), OSError(111, "refused"))

    monkeypatch.setattr(Question, "_exchange", exchange)
    monkeypatch.setattr(dendrite_module, "was_stale", lambda: len(sent) <= stale)
    with Dendrite(VALIDATOR) as dendrite:
        [(status, message)] = said(dendrite.query([at("miner.example:80")], QUESTION))
    assert (status, message) == (503, f"miner.example:80 cannot be reached: {os.strerror(111)}") or not stale
    assert sent == (["8.8.8.8"] * (stale + 1) if stale else ["8.8.8.8", "8.8.4.4"])


def test_those_who_want_the_same_name_share_a_look_up(monkeypatch):
    free, asked = threading.Event(), []

    def look(host, port, *_, **__):
        asked.append((host, port))
        assert free.wait(20)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", port))]

    monkeypatch.setattr(socket, "getaddrinfo", look)

    async def want():
        wanted = [asyncio.ensure_future(find_addresses("miner.example", port)) for port in (80, 80, 81, 80)]
        await asyncio.sleep(0.05)
        wanted[0].cancel()  # the one who asked first
        with suppress(asyncio.CancelledError):
            await wanted[0]
        with pytest.raises(asyncio.TimeoutError):
            await find_addresses("miner.example", 80, timeout=0.01)
        free.set()
        assert await asyncio.gather(*wanted[1:]) == [["8.8.8.8"]] * 3
        assert await find_addresses("miner.example", 80) == ["8.8.8.8"]  # it was forgotten

    asyncio.run(want())
    assert sorted(asked) == [("miner.example", 80)] * 2 + [("miner.example", 81)]


def test_all_who_want_an_unknown_name_are_told(internet):
    async def want():
        return await asyncio.gather(*(find_addresses("gone.example", 80) for _ in range(3)), return_exceptions=True)

    assert [str(error) for error in asyncio.run(want())] == ["[Errno -2] Name or service not known"] * 3


def test_a_redirect_is_not_followed():
    location = b"HTTP/1.1 307 x\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n"
    with Answering(location) as miner, Dendrite(VALIDATOR, allow_private=True) as dendrite:
        assert said(dendrite.query([miner], QUESTION)) == [(307, "redirects are not followed")]


def test_an_axon_of_this_process_is_asked_and_what_looks_like_one_is_not(axon):
    chain = EmbeddedChain()
    chain.register(MINER)
    with Dendrite(VALIDATOR) as dendrite, chain.client() as client:
        axon.serve(client, 1)
        miner = SimpleNamespace(hotkey=ME, axon=axon)  # as a `Miner` has it
        twin = SimpleNamespace(hotkey=ME, address=axon.address, is_running=True, host=axon.host, port=axon.port)
        posing = type("Posing", (), {"hotkey": ME, "address": axon.address, "__class__": property(lambda self: Axon)})()
        assert said(dendrite.query(posing, QUESTION))[0][0] == 503
        answers = dendrite.query([axon, miner, twin, *client.subnets.metagraph(1)], QUESTION)
        assert [a.dendrite.status_code for a in answers] == [200, 200, 503, 503]
        assert answers[3].axon.port == axon.port and "(loopback)" in answers[3].dendrite.status_message


def test_a_validator_asks_at_private_addresses_on_the_embedded_chain_only():
    chain = EmbeddedChain()
    chain.register(MINER)
    with chain.client() as client:
        real = SimpleNamespace(network="finney", subnets=client.subnets)
        given = [(client, None), (client, False), (real, None), (real, True)]
        made = [Validator(VALIDATOR, c, None, gate=object(), allow_private=word) for c, word in given]
    assert [validator.dendrite.allow_private for validator in made] == [True, False, False, True]


# Targets --------------------------------------------------------------------------------------------------------------


class Breaks:
    @property
    def hotkey(self):
        raise RuntimeError("no\nhotkey today")


there = "127.0.0.1:1"
TARGETS = [
    *(at(address) for address in [b"127.0.0.1:1", ("127.0.0.1", 1), 1, 1.5, ["x"], {"a": 1}, object(), "127.0.0.1:\xb2",
                                  "127.0.0.1:" + "9" * 5000, "127.0.0.1:-1", "127.0.0.1:0", "127.0.0.1:65536",
                                  "127.0.0.1", ":80", "x" * 10_000, "\ud800:80", "a\r\nHost: b:80"]),
    *(at(there, hotkey) for hotkey in [None, 0, 7, b"5", ("5",), "", "5Stranger", f"{ME} ", f"{ME}\r\nX: y", "\ud800"]),
    there, "text", b"127.0.0.1:1", (ME, there), [], {}, {"hotkey": ME}, 42, 4.2, None, object(), Breaks(), type, len,
]  # fmt: skip


def test_an_odd_target_costs_its_own_answer_only(axon, dendrite):
    answers = dendrite.query([axon, *TARGETS, axon], QUESTION)
    assert [a.dendrite.status_code for a in answers] == [200, *[503] * len(TARGETS), 200]
    assert all(a.dendrite.status_message and "\n" not in a.dendrite.status_message for a in answers)
    assert max(len(a.dendrite.status_message) for a in answers) < 300
    assert not [a for a in answers if "is published" in a.dendrite.status_message]
    for target in TARGETS[:5]:
        stream = dendrite.stream(target, QUESTION)
        assert list(stream) == [] and stream.answer.dendrite.status_code == 503


def test_nothing_published_is_said_of_a_neuron_without_address(dendrite):
    assert said(dendrite.query([at(None), at("")], QUESTION)) == [(503, "no axon is published")] * 2


@pytest.mark.parametrize("alone", [there, b"x", 42, {"hotkey": ME}])
def test_a_text_is_told_that_it_has_no_hotkey(alone, dendrite):
    [(status, message)] = said(dendrite.query(alone, QUESTION))
    assert status == 503 and "names no hotkey that the request could be signed for" in message


def test_one_target_needs_no_list_and_a_text_is_a_question(axon, dendrite):
    neuron = at(axon.address)
    for target in (axon, neuron, [axon], (axon,), iter([axon]), {axon: 1}.keys()):
        [answer] = dendrite.query(target, "hello")
        assert answer.completion == "hello"
    assert asyncio.run(dendrite(axon, "hello", timeout=9))[0].timeout == 9
    stream = dendrite.stream(axon, "hello")
    assert "".join(stream) == "hello" and isinstance(stream.answer, StreamPrompting)


def test_what_is_wanted_is_said(axon, dendrite):
    for call in (lambda: dendrite.query(None, QUESTION), lambda: asyncio.run(dendrite(None, QUESTION))):
        with pytest.raises(TypeError, match="targets must be neurons or axons, not None"):
            call()
    for wrong in (7, None, b"text", ["hello"], {"messages": ["hello"]}):
        for call in (dendrite.query, dendrite.stream):
            with pytest.raises(TypeError, match="ask with a Prompting or with a text, not with"):
                call(axon, wrong)


def test_a_hotkey_of_another_network_is_the_same_key(axon, dendrite):
    elsewhere = ss58_encode(ss58_decode(ME), 0)
    [answer] = dendrite.query([at(axon.address, elsewhere)], QUESTION)
    assert answer.completion == "hello" and answer.axon.hotkey == elsewhere


# Places ---------------------------------------------------------------------------------------------------------------


class Answering:
    "A miner that says the given bytes to each caller, or nothing."

    def __init__(self, reply=b"", hotkey=ME):
        self.hotkey, self.reply, self.lines = hotkey, reply, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.axon = f"127.0.0.1:{self.socket.getsockname()[1]}"
        if reply:
            threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        line, _ = self.socket.accept()
        self.lines.append(line)
        line.recv(65536)
        line.sendall(self.reply)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for each in (self.socket, *self.lines):
            each.close()


@pytest.fixture
def silent():
    miners = [Answering(hotkey=make_wallet(f"silent {i}").hotkey.ss58_address) for i in range(60)]
    yield miners
    for miner in miners:
        miner.__exit__()


def test_silent_miners_do_not_make_an_honest_one_late(axon, silent):
    with Dendrite(VALIDATOR, allow_private=True, connections=20) as dendrite:


        async def ask():
            late, [honest] = await asyncio.gather(dendrite(silent, QUESTION, timeout=0.3), dendrite(axon, QUESTION, timeout=30))
            return late, honest, time.monotonic(), dendrite._sessions.here()

        began = time.monotonic()
        late, honest, ended, session = asyncio.run(ask())
    assert {a.dendrite.status_code for a in late} == {408} and honest.is_success
    assert all(a.dendrite.process_time >= 0.29 for a in late)
    assert ended - began - honest.dendrite.process_time >= 0.29  # the wait for a place was not its time
    assert len(session.places) == 0 and session.places._own == session.places._users == {}


def test_by_default_300_miners_have_a_place_at_once(dendrite):
    assert dendrite._sessions._bounds[0] > 300 or dendrite._sessions._bounds[0] >= 0.4 * open_files_of_this_process()


def open_files_of_this_process():
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_connections_that_are_kept_do_not_use_up_the_files(monkeypatch):
    connect, most = PacedConnector.connect, []

    async def counted(self, *args, **more):
        connection = await connect(self, *args, **more)
        most.append(len(self.lines))
        return connection

    monkeypatch.setattr(PacedConnector, "connect", counted)
    with Axon(MINER, host="0.0.0.0").attach(echo) as axon, Dendrite(VALIDATOR, allow_private=True, connections=10) as dendrite:
        targets = [at(f"127.0.0.{i + 1}:{axon.port}") for i in range(60)]
        for _ in range(2):
            assert [a.completion for a in dendrite.query(targets, QUESTION)] == ["hello"] * 60
        [session] = dendrite._sessions._sessions.values()
        assert max(most) <= 30 and len(session.http.connector.lines) <= 20  # some are being closed


@pytest.mark.parametrize("name", ["max_answer", "connections", "per_target"])
@pytest.mark.parametrize("bound", [0, -1, 1.5, float("nan"), float("inf"), True, "20"])
def test_a_bound_that_lets_nothing_through_is_refused(name, bound):
    with pytest.raises(ValueError, match=f"Dendrite: {name} must be a whole number of at least 1, not {bound!r}"):
        Dendrite(VALIDATOR, **{name: bound})


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 10**400, "3"])
def test_a_timeout_that_is_no_time_is_refused(dendrite, axon, timeout):
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, not "):
        dendrite.query(axon, QUESTION, timeout=timeout)


def test_closing_as_the_last_act_of_a_loop_closes_all(axon):
    async def ask():
        with Dendrite(VALIDATOR, allow_private=True) as dendrite:
            assert (await dendrite(axon, QUESTION))[0].completion == "hello"
            return dendrite._sessions.here()

    session = asyncio.run(ask())
    assert session.http.closed and session.fresh.closed
    assert not session.http.connector.lines  # all connections are lost, as asyncio says


def test_one_target_cannot_have_all_places(axon, silent):
    with Dendrite(VALIDATOR, allow_private=True, connections=4, per_target=2) as dendrite:

        async def ask():
            hog = [asyncio.ensure_future(dendrite(silent[0], QUESTION, timeout=60)) for _ in range(8)]
            await asyncio.sleep(0.05)
            [answer] = await dendrite(axon, QUESTION)
            assert not any(task.done() for task in hog)  # there was a place for it
            for task in hog:
                task.cancel()
            await asyncio.gather(*hog, return_exceptions=True)
            hog = [dendrite(silent[0], QUESTION, timeout=0.4) for _ in range(8)]
            return answer, [answer for [answer] in await asyncio.gather(*hog)]

        answer, late = asyncio.run(ask())
    assert answer.completion == "hello"
    assert {a.dendrite.status_code for a in late} == {408}
    waited = [a for a in late if "the 2 requests before this one" in a.dendrite.status_message]
    assert len(waited) >= 4  # those have not had their time after that of all others


def test_a_place_is_given_back_when_the_question_is_given_up(axon, silent):
    with Dendrite(VALIDATOR, allow_private=True, connections=2, per_target=1) as dendrite:

        async def ask():
            asked = [asyncio.ensure_future(dendrite(silent[:3], QUESTION)) for _ in range(2)]
            await asyncio.sleep(0.05)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            assert len(dendrite._sessions.here().places) == 0
            return await dendrite([axon] * 3, QUESTION)

        assert [a.completion for a in asyncio.run(ask())] == ["hello"] * 3


def test_many_threads_ask_at_once(axon, dendrite):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: dendrite.query(axon, f"{i}")[0].completion, range(64)))
    assert answers == [f"{i}" for i in range(64)]


def read_in_a_thread(how, make):
    """What a reader of the stream gets, or None if it still waits after 10 s."""
    got = []

    async def pieces(stream):
        return [piece async for piece in stream]

    def read():
        try:
            stream = make()
            got.append(list(stream) if how == "for" else asyncio.run(pieces(stream)))
        except BaseException as error:
            got.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return reader, got


@pytest.mark.parametrize("how", ["for", "async for"])
def test_a_stream_keeps_its_dendrite(axon, how):
    reader, got = read_in_a_thread(how, lambda: Dendrite(VALIDATOR, allow_private=True).stream(axon, QUESTION))
    reader.join(10)
    assert got and "".join(got[0]) == QUESTION.prompt


@pytest.mark.parametrize("how", ["for", "async for"])
def test_the_reader_of_a_stream_is_told_that_the_dendrite_was_closed(how):
    began = threading.Event()

    async def slow(synapse):
        yield "a"
        began.set()
        await asyncio.sleep(30)
        yield "b"

    with Axon(MINER).attach(slow) as miner:
        dendrite = Dendrite(VALIDATOR, allow_private=True)
        reader, got = read_in_a_thread(how, lambda: dendrite.stream(miner, QUESTION))
        assert began.wait(10)
        time.sleep(0.05)  # the reader waits for the second piece
        dendrite.close()
        reader.join(10)
        assert [repr(error) for error in got] == [repr(RuntimeError("this dendrite was closed before the answer was complete"))]


@pytest.mark.parametrize("how", ["for", "async for"])
def test_a_stream_whose_dendrite_is_closed_says_so_to_a_later_reader(axon, how):
    dendrite = Dendrite(VALIDATOR, allow_private=True)
    stream = dendrite.stream(axon, QUESTION)
    dendrite.close()
    reader, got = read_in_a_thread(how, lambda: stream)
    reader.join(10)
    assert "closed before the answer was complete" in str(got)


def test_a_stream_that_is_closed_early_leaves_no_task_behind(dendrite):
    "Its maker waits then, because nobody takes the pieces."
    def endless(synapse):
        while True:
            yield "more "

    with Axon(MINER).attach(endless) as axon:
        stream = dendrite.stream(axon, QUESTION)
        assert next(iter(stream)) == "more "
        deadline = time.monotonic() + 20
        while len(stream._pieces.unread) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        loop = dendrite._sessions.background()
        stream.close()
        while asyncio.all_tasks(loop) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not asyncio.all_tasks(loop)


class Steps:
    "A miner of two pieces, each of which comes when it is told to, and an end that is told as well."

    def __init__(self):
        self.go = [threading.Event() for _ in range(3)]
        self.made = Axon(MINER).attach(self.answer)

    def answer(self, synapse):
        for go, piece in zip(self.go, "ab"):
            go.wait(20)
            yield piece
        self.go[2].wait(20)

    def __enter__(self):
        return self.made.start()

    def __exit__(self, *_):
        for go in self.go:
            go.set()
        self.made.stop()


@pytest.mark.parametrize("hows", [["for"] * 2, ["async for"] * 3, ["for", "async for"]])
def test_all_readers_of_a_stream_come_to_its_end(hows, dendrite):
    steps = Steps()
    with steps as miner:
        stream = dendrite.stream(miner, QUESTION)
        readers = [read_in_a_thread(how, lambda: stream) for how in hows]
        for go in steps.go:
            time.sleep(0.05)  # all of them wait
            go.set()
        for reader, _ in readers:
            reader.join(10)
        assert sorted(piece for _, [pieces] in readers for piece in pieces) == ["a", "b"]
        assert stream.answer.completion == "ab" and list(stream) == []


def test_a_reader_that_is_cancelled_as_the_end_comes_takes_nothing_with_it(dendrite):
    steps = Steps()

    async def read_on():
        stream = dendrite.stream(miner, QUESTION)

        async def read():
            async for piece in stream:
                return piece
            return ""

        async def rest():
            return "".join([piece async for piece in stream])

        got = ""
        for go in steps.go:
            reading = asyncio.ensure_future(read())
            await asyncio.sleep(0.02)  # it waits
            go.set()
            time.sleep(0.3)  # what it waits for comes while its loop does something else
            reading.cancel()
            with suppress(asyncio.CancelledError):
                got += await reading
        return got + await asyncio.wait_for(rest(), 10), stream.answer

    with steps as miner:
        got, answer = asyncio.run(read_on())
        assert got == "ab" == answer.completion


@pytest.mark.parametrize("read", [0, 1, 2])
def test_a_reader_goes_on_after_ctrl_c(read, dendrite):
    steps, pieces = Steps(), []

    def interrupt():
        time.sleep(0.1)  # the reader waits
        os.kill(os.getpid(), signal.SIGINT)

    with steps as miner:
        stream = dendrite.stream(miner, QUESTION)
        for go in steps.go[:read]:
            go.set()
        with pytest.raises(KeyboardInterrupt):
            if not read:
                threading.Thread(target=interrupt).start()
            for piece in stream:
                pieces.append(piece)
                if len(pieces) == read:
                    threading.Thread(target=interrupt).start()
        for go in steps.go:
            go.set()
        reader, got = read_in_a_thread("for", lambda: stream)
        reader.join(10)
        assert got and pieces + got[0] == ["a", "b"] and stream.answer.completion == "ab"


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["for", "async for"])
@pytest.mark.parametrize("before", [0, 1])
def test_a_stream_that_another_thread_closes_ends(how, before, dendrite):
    steps = Steps()
    with steps as miner:
        stream = dendrite.stream(miner, QUESTION)
        for go in steps.go[:before]:
            go.set()
        taken, take = [], stream._take
        stream._take = lambda: taken.append(take()) or taken[-1]
        reader, got = read_in_a_thread(how, lambda: stream)
        until(lambda: len([*filter(None, taken)]) == before and taken[-1:] == [None])  # the reader waits
        stream.close()
        reader.join(10)
        assert got == [["a"][:before]] and stream.answer is None
        assert list(stream) == []


def test_a_stream_that_its_own_reader_closes_ends(axon, dendrite):
    steps = Steps()

    async def first():
        stream = dendrite.stream(miner, QUESTION)
        return [piece async for piece in stream if stream.close() is None]

    with steps as miner:
        steps.go[0].set()
        stream = dendrite.stream(miner, QUESTION)
        assert [piece for piece in stream if stream.close() is None] == ["a"] and stream.answer is None
        assert asyncio.run(first()) == ["a"]
    stream = dendrite.stream(axon, QUESTION)
    assert "".join(stream) == "hello" and stream.close() is None and stream.answer.completion == "hello"


def test_a_slow_reader_slows_the_miner_down(dendrite):
    made = []

    def counts(synapse):
        for number in range(900):
            made.append(number)
            yield "x" * 1_000

    with Axon(MINER).attach(counts) as axon:
        stream = dendrite.stream(axon, QUESTION, timeout=20)
        for number, _ in enumerate(stream):
            if number == 3:
                time.sleep(0.5)
                assert len(stream._pieces.unread) <= 8
        assert len(made) == number + 1 == 900 and len(stream.answer.completion) == 900_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_stream_is_not_read_in_a_forked_child(dendrite):
    steps = Steps()
    with steps as miner:
        steps.go[0].set()
        stream = dendrite.stream(miner, QUESTION)
        pieces = iter(stream)
        assert next(pieces) == "a"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12
            child = os.fork()
        if not child:  # nothing of pytest may run in it
            signal.alarm(10)
            said = 1
            with suppress(BaseException):
                try:
                    list(pieces)
                except RuntimeError as error:
                    said = 0 if "in the process that asked" in str(error) else 2
                stream.close()
            os._exit(said)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for go in steps.go:
            go.set()
        assert list(pieces) == ["b"] and stream.answer.completion == "ab"


def result_in_a_thread(ask):
    "What a call returns or raises, or nothing if it has done neither after 10 s."
    got = []

    def call():
        try:
            got.append(ask())
        except BaseException as error:
            got.append(repr(error))

    asking = threading.Thread(target=call, daemon=True)
    asking.start()
    return asking, got


WAS_CLOSED = repr(RuntimeError("this dendrite was closed before the answer was complete"))
IS_CLOSED = repr(RuntimeError("this dendrite is closed; make a new one"))


def test_a_question_is_told_that_another_thread_closed_the_dendrite():
    with Answering() as miner, Dendrite(VALIDATOR, allow_private=True) as dendrite:
        asking, got = result_in_a_thread(lambda: dendrite.query([miner] * 2, QUESTION))
        select.select([miner.socket], [], [], 30)  # it has been called, and says nothing
        dendrite.close()
        asking.join(10)
    assert got == [WAS_CLOSED]


def test_a_question_in_a_loop_of_its_own_is_told_so_as_well(caplog):
    with Answering() as miner, Dendrite(VALIDATOR, allow_private=True) as dendrite:
        asking, got = result_in_a_thread(lambda: asyncio.run(dendrite([miner] * 2, QUESTION)))
        select.select([miner.socket], [], [], 30)
        dendrite.close()
        asking.join(10)
    assert got == [WAS_CLOSED] and not caplog.records


def test_a_question_that_comes_as_its_loop_ends_does_not_wait_for_ever(axon, monkeypatch):
    "The loop takes it and does nothing more."
    dendrite = Dendrite(VALIDATOR, allow_private=True)
    dendrite.query(axon, QUESTION)
    begun = threading.Event()

    def taken(work, loop):
        begun.set()
        return Future()

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", taken)
    asking, got = result_in_a_thread(lambda: dendrite.query(axon, QUESTION))
    assert begun.wait(10)
    dendrite.close()
    asking.join(10)
    assert got == [WAS_CLOSED]


def test_a_dendrite_that_is_closed_between_two_steps_leaves_nothing_behind(axon, monkeypatch):
    def closed_after(dendrite, step):
        then = getattr(dendrite, step)
        monkeypatch.setattr(dendrite, step, lambda *given, **named: (then(*given, **named), dendrite.close())[0])
        return dendrite

    for step, said in (("_question", IS_CLOSED), ("_ask_all", WAS_CLOSED)):
        dendrite = closed_after(Dendrite(VALIDATOR, allow_private=True), step)
        asking, got = result_in_a_thread(lambda: dendrite.query(axon, QUESTION))
        asking.join(10)
        background = dendrite._sessions._background
        assert got == [said] and (background is None or not background.alive)
        dendrite = closed_after(Dendrite(VALIDATOR, allow_private=True), step)
        asking, got = result_in_a_thread(lambda: asyncio.run(dendrite(axon, QUESTION)))
        asking.join(10)
        assert got == [WAS_CLOSED] and not dendrite._sessions._sessions
    dendrite = Dendrite(VALIDATOR, allow_private=True)
    background = dendrite._sessions.background
    monkeypatch.setattr(dendrite._sessions, "background", lambda: (background(), dendrite.close())[0])
    for ask in (dendrite.query, dendrite.stream):
        monkeypatch.setattr(dendrite, "_check_open", lambda: None)
        asking, got = result_in_a_thread(lambda: ask(axon, QUESTION))
        asking.join(10)
        assert got in ([WAS_CLOSED], [IS_CLOSED])


# Connections that are kept --------------------------------------------------------------------------------------------


class Keeping:
    "A miner, or a proxy before one, whose connections answer one question each and end in some way when the next one comes."

    def __init__(self, end, answer=None, first=True, hotkey=ME):
        self.hotkey, self.end, self.first, self.requests = hotkey, end, first, []
        self.answer = answer or (lambda request: (b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n", b'{"completion": "42"}'))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.axon = f"127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with suppress(OSError):  # closed
            while True:
                line, _ = self.socket.accept()
                threading.Thread(target=self.serve, args=(line,), daemon=True).start()

    def read(self, line):
        "A whole request: its bytes."
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.more(line, 1 if self.end == "unread" and not data else 65536)
        head, _, body = data.partition(b"\r\n\r\n")
        size = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
        while len(body) < size:
            body += self.more(line, 65536)
        return head + b"\r\n\r\n" + body

    def more(self, line, most):
        if not (data := line.recv(most)):
            raise ConnectionError("the other side has closed")  # else a thread would read nothing for ever
        return data

    def serve(self, line):
        with line, suppress(OSError):
            if self.first:
                self.requests.append(self.read(line))
                line.sendall(b"".join(self.answer(self.requests[-1])))
            if self.end == "unread":
                line.recv(1)
            else:
                self.requests.append(self.read(line))
            if self.end == "half an answer":
                line.sendall(self.answer(self.requests[-1])[0])
            elif self.end == "answer that is lost":
                self.answer(self.requests[-1])
            elif self.end == "reset":
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self.socket.close()


@pytest.mark.parametrize("size", [5, 900_000])
@pytest.mark.parametrize("end", ["end", "reset", "unread"])
def test_a_connection_that_was_closed_as_the_question_came_costs_no_answer(end, size):
    with Keeping(end) as miner, Dendrite(VALIDATOR, allow_private=True, require_signed=False) as dendrite:
        for number in range(4):
            [answer] = dendrite.query(miner, f"{number}" + size * "x", timeout=20)
            assert answer.completion == "42", answer.dendrite
    if end != "unread":  # the first, and each of the others twice: the same bytes, so the same nonce
        first, *twice = miner.requests
        assert len(twice) == 6 and twice[::2] == twice[1::2] and len({first, *twice}) == 4


@pytest.mark.parametrize("background", [True, False])
def test_what_waits_at_the_end_of_a_connection_is_handed_on_in_turns(background, monkeypatch):
    "100 000 chunks of one byte, and the end behind them: no turn of the loop is full of them, and no more is received while some wait."
    hand, receive, pace = Paced._hand, Paced.data_received, floods.Pace(seconds=0)
    turn, most, received = [], [], []

    def counted(line, part, waited):
        if not turn:
            asyncio.get_running_loop().call_soon(turn.clear)
        turn.append(part)
        most[:] = [max(len(turn), *most, 0)]
        hand(line, part, waited)

    def receiving(line, data):
        receive(line, data)
        received.append(len(line._inlet) > 0 and line._transport.is_reading())

    monkeypatch.setattr(Paced, "_hand", counted)
    monkeypatch.setattr(Paced, "data_received", receiving)
    monkeypatch.setattr(floods, "pace_here", lambda: pace)
    body = json.dumps({"completion": 100_000 * "a"})
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = "".join(f"1\r\n{byte}\r\n" for byte in body).encode() + b"0\r\n\r\n"

    with Answering() as miner, Dendrite(VALIDATOR, allow_private=True, require_signed=False) as dendrite:

        def run():
            line, _ = miner.socket.accept()
            with line:
                line.recv(65536)
                line.sendall(head + chunks)

        threading.Thread(target=run, daemon=True).start()
        if background:
            [answer] = dendrite.query(miner, "x", timeout=60)
        else:

            async def ask():
                return await dendrite(miner, "x", timeout=60)

            [answer] = asyncio.run(ask())
    assert answer.completion == 100_000 * "a"
    assert most[0] <= 3 and not any(received)


@pytest.mark.parametrize("kind", [Prompting, StreamPrompting])
def test_large_answers_that_come_together_are_checked_one_in_a_turn_and_small_ones_first(kind, monkeypatch):
    "Twenty miners hold back the last byte, and send it at one moment."
    done, turn, most = [], [], []

    def noted(work):
        def noting(*args):
            if not turn:
                asyncio.get_running_loop().call_soon(turn.clear)
            turn.append(args)
            most[:] = [max(len(turn), *most, 0)]
            done.append(max(len(each) for each in args if isinstance(each, bytes)))
            return work(*args)

        return noting

    if kind is Prompting:
        monkeypatch.setattr(dendrite_module.Sent, "check", noted(dendrite_module.Sent.check))
        small, large = (json.dumps({"completion": size * "a"}).encode() for size in (5, 200_000))
    else:
        monkeypatch.setattr(dendrite_module, "read_event", noted(read_event))
        small, large = (json.dumps({"piece": size * "a", "done": True}).encode() + b"\n" for size in (5, 200_000))
    monkeypatch.setattr(dendrite_module, "pace_here", lambda pace=floods.Pace(seconds=0): pace)

    async def ask(dendrite, miner):
        miner.socket.settimeout(20)
        asking = asyncio.ensure_future(dendrite([miner] * 20, kind.ask("x"), timeout=60))
        lines = [await asyncio.to_thread(miner.socket.accept) for _ in range(20)]
        for place, (line, _) in enumerate(lines):
            line.settimeout(20)
            await asyncio.to_thread(line.recv, 65536)
            body = small if place == 13 else large
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
            await asyncio.to_thread(line.sendall, head + body[:-1])
        while sum(each._size for each in floods_of(dendrite)) < 19 * len(large):
            await asyncio.sleep(0.01)
        for place, (line, _) in enumerate(lines):  # the loop stands still: they come in one of its turns
            line.sendall((small if place == 13 else large)[-1:])
        answers = await asking
        for line, _ in lines:
            line.close()
        return answers

    def floods_of(dendrite):
        [session] = dendrite._sessions._sessions.values()
        return session.http.connector.lines

    with Answering() as miner, Dendrite(VALIDATOR, allow_private=True, require_signed=False) as dendrite:
        answers = asyncio.run(ask(dendrite, miner))
    assert [a.dendrite.status_code for a in answers] == [200] * 20
    assert len(done) == 20 and min(done) in done[:2] and most[0] <= 2


@pytest.mark.parametrize("seconds, limit, more, status", [(2.5, 2, 60, 200), (0.5, 60, 0.01, 200), (60, 2, 0.01, 408)])
def test_the_wait_until_an_answer_is_checked_is_not_the_miners_time(seconds, limit, more, status, axon, dendrite, monkeypatch):
    class Busy:
        async def do(self, size, work):
            await asyncio.sleep(seconds)
            return work()

    monkeypatch.setattr(dendrite_module, "pace_here", Busy)
    monkeypatch.setattr(dendrite_module, "_CHECKS", more)
    [(found, message)] = said(dendrite.query([axon], QUESTION, timeout=limit))
    assert (found, message) == (status, "Success" if status == 200 else "the answer came in time, but with too many to check it soon")


def test_no_more_of_a_refusal_is_read_than_its_reason_takes():
    def refuse(size):
        body = json.dumps({"error": "busy", "more": [[]] * size}).encode()
        return lambda request: (b"HTTP/1.1 503 no\r\ncontent-length: %d\r\n\r\n" % len(body), body)

    with Dendrite(VALIDATOR, allow_private=True, connections=4) as dendrite:
        for size, reason in ((1000, "busy"), (200_000, "HTTP status 503")):
            with Keeping("end", refuse(size)) as miner:
                assert said(dendrite.query(miner, "x")) == [(503, reason)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6)  # fmt: skip
FIELDS = st.sampled_from(["completion", "roles", "messages", "timeout", "piece", "done", "error", "signature", "other"])
VALUES = JSON | st.lists(st.text(max_size=3), max_size=2) | st.just(["x"])


@pytest.mark.parametrize("read", [read_reply, read_event, read_body])
@settings(max_examples=150, deadline=None)
@given(message=st.dictionaries(FIELDS, VALUES, max_size=5) | JSON)
def test_what_is_valid_does_not_depend_on_the_length(read, message):
    def outcome(text):
        try:
            return read(text)
        except ValueError:
            return "refused"

    short = json.dumps(message).encode()
    assert outcome(short + b" " * 20_000) == outcome(short)


@settings(max_examples=300, deadline=None)
@given(message=JSON | st.recursive(st.text('"\\\\[{,x', max_size=6), lambda inner: st.lists(inner, max_size=4), max_leaves=8),
       most=st.integers(0, 4), commas=st.integers(0, 4), loose=st.booleans())  # fmt: skip
def test_brackets_and_commas_are_counted_outside_of_texts(message, most, commas, loose):
    text = json.dumps(message, separators=None if loose else (",", ":"))
    outside = re.sub(r'"(\\.|[^"\\])*"', "", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "_BRACKETS", most)
        patch.setattr(protocol, "_COMMAS", commas)
        few = outside.count("[") + outside.count("{") <= most and outside.count(",") <= commas
        try:
            protocol._check_parts(text.encode())
        except ValueError:
            assert not few
        else:
            assert few or len(text) <= most


@pytest.mark.parametrize("read", [read_reply, read_event, read_body])
@pytest.mark.parametrize("message", ['{"WHERE": LISTS}', "LISTS", '{"other": LISTS}', '{"error": "x", "done": LISTS}'])
def test_a_long_message_of_the_wrong_kind_is_not_copied(read, message):
    fields = {read_reply: "completion", read_event: "piece", read_body: "messages"}
    text = message.replace("WHERE", fields[read]).replace("LISTS", f"[{'[],' * 200_000}1]").encode()
    gc.collect()
    tracemalloc.start()
    try:
        with suppress(ValueError):
            read(text)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # bytes; a list takes 56
    finally:
        tracemalloc.stop()


def test_a_miner_that_closes_every_kept_connection_is_asked_three_times_at_most():
    together = threading.Barrier(8)

    def answer(request):
        if b"together" in request:
            together.wait(10)  # each on a connection of its own, all of which are kept
        return b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n", b'{"completion": "42"}'

    miner = Keeping("end", answer)
    with miner, Dendrite(VALIDATOR, allow_private=True, require_signed=False) as careless:
        assert [status for status, _ in said(careless.query([miner] * 8, "together"))] == [200] * 8
        before = len(miner.requests)
        assert careless.query(miner, "alone")[0].completion == "42"  # the third connection is a new one
        assert len(miner.requests) - before == 3


def test_an_end_that_says_something_is_final():
    with Dendrite(VALIDATOR, allow_private=True, require_signed=False) as dendrite:
        with Keeping("end", first=False) as miner:  # a new connection
            assert said(dendrite.query(miner, QUESTION)) == [(503, f"{miner.axon} cannot be reached: the connection was closed")]
        assert len(miner.requests) == 1
        with Keeping("half an answer") as miner:
            statuses = [dendrite.query(miner, QUESTION)[0].dendrite.status_code for _ in range(2)]
        assert statuses == [200, 422] and len(miner.requests) == 2


@pytest.mark.parametrize("kind", [Prompting, StreamPrompting])
def test_a_question_whose_answer_was_lost_is_not_answered_twice(kind, dendrite):
    asked = []

    def forward(synapse):
        asked.append(synapse.prompt)
        return echo(synapse)

    def passed_on(request):
        with socket.create_connection((axon.host, axon.port), 20) as line:
            line.sendall(request)
            answer = b""
            while not re.search(rb"\r\n0\r\n\r\n$|\}$", answer):
                answer += line.recv(65536)
        head, gap, body = answer.partition(b"\r\n\r\n")
        return head + gap, body

    with Axon(MINER).attach(forward) as axon, Keeping("answer that is lost", passed_on) as between:
        answers = [dendrite.query(between, kind.ask(prompt, timeout=20))[0] for prompt in ("one", "two", "three")]
    assert asked == ["one", "two", "three"]
    status = [(a.completion, a.dendrite.status_code) for a in answers]
    assert status == [("one", 200), (None, 503), (None, 503)]
    assert "the connection was closed" in answers[1].dendrite.status_message


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_asks_with_a_loop_of_its_own(axon):
    code = """
        import os, sys, warnings
        from types import SimpleNamespace
        from prompting_nb.network.chain import make_wallet
        from prompting_nb.network.dendrite import Dendrite
        warnings.simplefilter("ignore")
        miner = SimpleNamespace(hotkey=sys.argv[1], axon=sys.argv[2])
        with Dendrite(make_wallet("validator"), allow_private=True) as dendrite:
            print(dendrite.query(miner, "parent")[0].completion, flush=True)
            child = os.fork()
            if child == 0:
                print(dendrite.query(miner, "child")[0].completion, flush=True)
                os._exit(0)
            print(os.waitpid(child, 0)[1], dendrite.query(miner, "parent again")[0].completion, flush=True)
    """
    run = [sys.executable, "-c", textwrap.dedent(code), ME, axon.address]
    found = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert found.stdout == "parent\nchild\n0 parent again\n", found.stderr


def test_what_is_relied_on_in_aiohttp():
    """`network.floods` stands between the connector and the protocol of aiohttp's client. These are the seams, in versions below 4:
    `connect` of the connector, `transport` of what it returns, whose protocol can be replaced; that has a length, the answers that wait
    to be read, `set_exception` and `force_close`, and a `transport` that can be replaced, too. A `Dendrite` keeps connections apart by
    `server_hostname`, as 3.14.1 was the first to do."""
    settings = Path(__file__).resolve().parents[1] / "settings.ini"
    assert "aiohttp>=3.14.1,<4 " in settings.read_text()
    seen, handed, used = [], [], set()

    class Between(asyncio.Protocol):
        def __init__(self, transport, inner):
            for name in ("eof_received", "connection_lost", "pause_writing", "resume_writing"):
                setattr(self, name, getattr(inner, name))
            self.transport, self.inner = transport, inner

        def __getattr__(self, name):
            used.add(name)
            return getattr(self.transport, name)

        def data_received(self, data):
            handed.append(data)
            self.inner.data_received(data)

    class Looking(aiohttp.TCPConnector):
        async def connect(self, *args, **kwargs):
            connection = await super().connect(*args, **kwargs)
            transport = connection.transport
            line = transport.get_protocol()
            if not isinstance(line, Between):
                line = Between(transport, line)
                transport.set_protocol(line)
                line.inner.transport = line
            assert connection.transport is line
            seen.append((line, line.inner))
            if len(seen) == 3:
                line.inner.force_close()
            return connection

    async def twice(reader, writer):
        while await reader.read(65536):
            writer.write(2 * ONE if len(seen) == 4 else ONE)
        writer.close()

    async def look():
        server = await asyncio.start_server(twice, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with aiohttp.ClientSession(connector=Looking()) as session:

            async def get():
                async with session.get(url) as answer:
                    return await answer.read()

            assert [await get(), await get()] == [b"ok", b"ok"] and seen[0] == seen[1]  # it was kept
            assert b"".join(handed) == 2 * ONE and len(seen[0][1]) == 0
            assert await get() == b"ok" and seen[2] == seen[0]
            async with session.get(url):
                assert seen[3][0] is not seen[2][0]  # it was not kept any more
                assert len(seen[3][1]) == 1  # one more than was asked for
                seen[3][1].set_exception(aiohttp.ClientPayloadError("a flood"))
                seen[3][0].abort()
            closing = [transport.is_closing() for transport, _ in seen]
            assert closing == [True] * 4 and await get() == b"ok"
            assert {"is_closing", "write", "close", "abort"} <= used
        server.close()

    asyncio.run(look())
