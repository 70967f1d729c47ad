"""Bytes of every kind for the server, and answers of every kind for the client, grown from a corpus that is kept.

The corpus is tests/data/wire: one file for each input, in which the line `@signed@` stands for the headers of btauth/1 and
`@old@` for those of the older format. An input that once did harm is added there. Hypothesis picks inputs, joins them, cuts
them, and changes bytes; 2,000 in `make test`, 200,000 in `make test-long`.
"""

import asyncio
import gc
import json
import logging
import os
import threading
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import httptools
import pytest
from bittensor import http_auth
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import prompting_nb
from prompting_nb.network.axon import Axon
from prompting_nb.network.chain import make_wallet
from prompting_nb.network.connection import Connection
from prompting_nb.network.dendrite import Dendrite
from prompting_nb.network.legacy import legacy_headers
from prompting_nb.network.limits import Crowd, Limits
from prompting_nb.protocol import Prompting, StreamPrompting

PACKAGE = Path(prompting_nb.__file__).parent
WIRE = Path(__file__).resolve().parent / "data" / "wire"
MINER, VALIDATOR = make_wallet("miner"), make_wallet("validator")
ME = MINER.hotkey.ss58_address
QUESTION = Prompting.ask("hello")
REQUESTS = [path.read_bytes() for path in sorted((WIRE / "requests").iterdir())]
ANSWERS = [path.read_bytes() for path in sorted((WIRE / "answers").iterdir())]
PER_EXAMPLE = 20  # inputs
SHORT, LONG = 2_000, 200_000


def in_headers(fields: dict) -> bytes:
    return "\r\n".join(f"{key}: {value}" for key, value in fields.items()).encode()


def filled(data: bytes) -> bytes:
    "An input with fresh signatures in place of their marks."
    if b"@signed@" in data:
        body = data.partition(b"\r\n\r\n")[2]
        path = data.split(b" ", 2)[1].decode("latin-1") if data.count(b" ") > 1 else "/"
        headers = http_auth.sign(VALIDATOR, method="POST", path=path, body=body, receiver_ss58=ME)
        data = data.replace(b"@signed@", in_headers(headers))
    if b"@old@" in data:
        data = data.replace(b"@old@", in_headers(legacy_headers(VALIDATOR.hotkey, QUESTION, ME)))
    return data


def changed(data: bytes, edits: list) -> bytes:
    "Bytes with edits at places between 0 and 1: cut out, put in, replaced, or repeated."
    for place, kind, piece, length in edits:
        at = int(place * len(data))
        if kind == "cut":
            data = data[:at] + data[at + length :]
        elif kind == "put":
            data = data[:at] + piece + data[at:]
        elif kind == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        else:  # end
            data = data[:at]
    return data


TOKENS = [b"\r\n", b"\n", b"\r", b" ", b":", b"\0", b"\xff", b",", b";", b"0", b"-1", b"9" * 20, b"content-length: 3\r\n", b"chunked",
          b"transfer-encoding: chunked\r\n", b"upgrade: x\r\nconnection: upgrade\r\n", b"expect: 100-continue\r\n", b"HTTP/1.0",
          b"connection: close\r\n", b"{", b"]", b'"', b"null", b"\\ud800", b"1e999", b"host: x\r\n",
          b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"]  # fmt: skip
edits = st.tuples(
    st.floats(0, 1),
    st.sampled_from(["cut", "put", "replace", "repeat", "end"]),
    st.one_of(st.sampled_from(TOKENS), st.binary(max_size=8)),
    st.integers(1, 60),
)


def inputs(corpus: list[bytes]):
    "Strategy: inputs, each a few of the corpus with edits, and where it is cut into pieces on its way."
    one = st.tuples(
        st.lists(st.sampled_from(corpus), min_size=1, max_size=3),
        st.lists(edits, max_size=4),
        st.lists(st.floats(0, 1), max_size=3),
    )
    return st.lists(one, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE)


def pieces(data: bytes, cuts: list[float]) -> list[bytes]:
    places = sorted({0, len(data), *(int(cut * len(data)) for cut in cuts)})
    return [data[a:b] for a, b in zip(places, places[1:])]


class Transport(asyncio.Transport):
    "Keeps what is written; ends when it is told to."

    def __init__(self):
        super().__init__({"peername": ("192.0.2.1", 1)})
        self.sent, self.ended, self.eof = b"", False, False

    def write(self, data):
        if self.eof:
            raise RuntimeError("Cannot call write() after write_eof()")
        self.sent += data

    def is_closing(self):
        return self.ended

    def get_write_buffer_size(self):
        return 0

    def can_write_eof(self):
        return True

    def close(self):
        self.ended = True

    def write_eof(self):
        self.eof = True

    abort = close

    def ignored(self, *args, **kwargs):
        pass

    pause_reading = resume_reading = set_write_buffer_limits = ignored


class Statuses:
    "Statuses of answers; an answer that is not HTTP is an error."

    def __init__(self, data: bytes):
        self.found, self.parser = [], httptools.HttpResponseParser(self)
        self.parser.feed_data(data)

    def on_headers_complete(self):
        self.found.append(self.parser.get_status_code())


async def until(condition, what):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0 if _ < 500 else 0.002)
    raise AssertionError(f"a hang: {what!r}")


async def serve(axon, crowd, tasks, data, cuts):
    "Let a connection read an input, then hang up; the statuses of its answers."
    connection, transport = Connection(axon, crowd, tasks), Transport()
    connection.connection_made(transport)
    for piece in pieces(data, cuts):
        if not transport.ended:
            connection.data_received(piece)
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    connection.tick(asyncio.get_running_loop().time() + 1000)  # whoever is late is sent away
    connection.connection_lost(None)
    await until(lambda: not tasks, data)
    if b"HEAD" in data:  # its answers look as if they were cut off
        return []
    return Statuses(transport.sent).found


def run(count: int, strategy, check) -> Counter:
    "Check `count` inputs. Seeds are fixed; each round forgets what hypothesis remembers of the one before."
    seen = Counter()
    rounds, examples = max(1, count // 10_000), min(count, 10_000) // PER_EXAMPLE

    for number in range(rounds):

        @seed(number)
        @settings(max_examples=examples, phases=[Phase.generate], deadline=None, database=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(batch=strategy)
        def fuzz(batch):
            check(batch, seen)

        fuzz()
    return seen


def memory() -> float:
    "Resident memory of this process in MB."
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Growth:
    """Memory over the inputs: in a short run what lines of the package itself have allocated and still keep, over its second half; in a
    long one that of the whole process, of which hypothesis itself keeps some."""

    def __init__(self, count: int):
        self.short, self.every, self.sizes = count <= SHORT, count // 4 if count <= SHORT else 10_000, []

    def look(self, inputs: int) -> None:
        if inputs % self.every:
            return
        if not self.short:
            self.sizes.append(memory())
        elif inputs == self.every:
            tracemalloc.start()
        else:
            gc.collect()
            kept = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, f"{PACKAGE}/*")])
            self.sizes.append(sum(line.size for line in kept.statistics("filename")) / 2**20)

    def check(self) -> None:
        tracemalloc.stop()
        first, most = (0, 0.2) if self.short else (4, 60)  # MB
        assert len(self.sizes) > first + 1 and self.sizes[-1] - self.sizes[first] < most, self.sizes


@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])
def test_no_bytes_harm_the_server(count, caplog):
    """Requests of both formats, changed, joined and cut: no status 500, no hang, nothing is kept."""
    caplog.set_level(logging.ERROR)

    async def aecho(synapse):
        synapse.completion = synapse.prompt
        return synapse

    axon = Axon(MINER, max_body=20_000, body_timeout=5.0).attach(aecho)
    crowd, tasks, loop, growth = Crowd(Limits()), set(), asyncio.new_event_loop(), Growth(count)

    def check(batch, seen):
        for parts, changes, cuts in batch:
            data = changed(b"".join(map(filled, parts)), changes)
            found = loop.run_until_complete(serve(axon, crowd, tasks, data, cuts))
            assert not [s for s in found if s >= 500 and s != 504], (found, data)  # 504: a busy machine
            seen.update(found)
            seen["inputs"] += 1
            growth.look(seen["inputs"])

    try:
        seen = run(count, inputs(REQUESTS), check)
    finally:
        loop.close()
    assert seen["inputs"] >= count and min(seen[s] for s in (200, 400, 401)) > count / 200, seen
    assert (len(crowd), crowd.size, tasks) == (0, 0, set())
    assert axon.health()["running"] == axon.health()["waiting"] == 0
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []
    growth.check()


class Miners:
    "A server that gives each connection the next of the answers, whatever was asked."

    def __init__(self):
        self.answers = []

    async def __call__(self, reader, writer):
        await reader.read(65536)
        for piece in self.answers.pop() if self.answers else ():
            writer.write(piece)
            await asyncio.sleep(0)
        writer.close()


@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.long)])
def test_no_answer_harms_the_client(count, caplog):
    """Answers of every kind, changed, joined and cut: each costs its own answer only, and none is believed."""
    caplog.set_level(logging.ERROR)
    miners, loop, kinds = Miners(), asyncio.new_event_loop(), (Prompting, StreamPrompting)
    growth = Growth(count)
    server = loop.run_until_complete(asyncio.start_server(miners, "127.0.0.1", 0))
    threading.Thread(target=loop.run_forever, daemon=True).start()
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    there = SimpleNamespace(hotkey=ME, axon=address)

    def check(batch, seen):
        miners.answers = [pieces(changed(b"".join(parts), changes), cuts) for parts, changes, cuts in batch]
        kind = kinds[seen["inputs"] // PER_EXAMPLE % 2]
        answers = dendrite.query([there] * len(batch), kind.ask("hello"), timeout=2.0)
        for answer in answers:
            assert answer.dendrite.status_code and answer.dendrite.status_code != 200, answer
            assert answer.completion is None or kind is StreamPrompting
            seen[answer.dendrite.status_code] += 1
            seen["inputs"] += 1
            growth.look(seen["inputs"])

    with Dendrite(VALIDATOR, max_answer=20_000, allow_private=True) as dendrite:
        seen = run(count, inputs(ANSWERS), check)
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    assert seen["inputs"] >= count and seen[422] > count / 20, seen
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []
    growth.check()


def test_the_corpus_is_whole():
    assert len(REQUESTS) >= 40 and len(ANSWERS) >= 15
    assert sum(b"@signed@" in data for data in REQUESTS) >= 8 and sum(b"@old@" in data for data in REQUESTS) >= 4
    body = {"roles": ["user"], "messages": ["hello"], "timeout": 12.0}
    assert json.dumps(body).encode() in b"".join(REQUESTS)
