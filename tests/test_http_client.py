"""The HTTP client of a Dendrite: where answers end, what is kept, and servers that send what belongs to no answer."""

import asyncio
import errno
from contextlib import asynccontextmanager

import pytest

from prompting_nb.network import http_client
from prompting_nb.network.http_client import Closed, Flood, HttpClient, NotHttp, Unreachable
from prompting_nb.network.server import new_loop

OK = b"HTTP/1.1 200 OK\r\n"
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
SECONDS = 20  # longest wait for something that must happen


@pytest.fixture(params=[asyncio.new_event_loop, new_loop], ids=["asyncio", "uvloop"])
def run(request):
    loop = request.param()
    yield lambda coroutine: loop.run_until_complete(asyncio.wait_for(coroutine, SECONDS))
    loop.close()


class Serving:
    "A server that answers each request on a connection with the next of the replies, and closes where there is none."

    def __init__(self, *replies, cut=None, stays=True):
        self.replies, self.cut, self.stays = replies, cut, stays
        self.connections, self.closed, self.writers = 0, 0, []

    async def __call__(self, reader, writer):
        self.connections += 1
        self.writers.append(writer)
        try:
            for reply in self.replies:
                await reader.readexactly(len(HEAD) + 2)
                for start in range(0, len(reply), self.cut or len(reply) or 1):
                    writer.write(reply[start : start + (self.cut or len(reply))])
                    if self.cut:
                        await writer.drain()
                        await asyncio.sleep(0)
            if self.stays:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        self.closed += 1
        writer.close()

    @asynccontextmanager
    async def client(self, **options):
        server = await asyncio.start_server(self, "127.0.0.1", 0)
        client = HttpClient(**options)
        client.there = server.sockets[0].getsockname()
        try:
            yield client
        finally:
            client.close()
            server.close()


async def read(answer):
    body = b""
    while part := await answer.read():
        body += part
    answer.close()
    return body


async def ask(client):
    answer = await client.post(*client.there, HEAD, b"hi")
    return answer.status, answer.headers, await read(answer)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


WHOLE = {  # an answer: its status, its body, whether the connection is kept, whether its end is that of the connection
    "length": (OK + b"content-length: 3\r\n\r\nyes", 200, b"yes", True, False),
    "chunks": (OK + b"transfer-encoding: chunked\r\n\r\n2;a=b\r\nye\r\n1\r\ns\r\n0\r\nx: y\r\n\r\n", 200, b"yes", True, False),
    "end": (OK + b"\r\nyes", 200, b"yes", False, True),
    "end, 1.0": (b"HTTP/1.0 200 OK\r\n\r\nyes", 200, b"yes", False, True),
    "length, 1.0": (b"HTTP/1.0 200 OK\r\ncontent-length: 3\r\n\r\nyes", 200, b"yes", False, False),
    "close": (OK + b"connection: close\r\ncontent-length: 3\r\n\r\nyes", 200, b"yes", False, False),
    "no body": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True, False),
    "early hints": (b"HTTP/1.1 103 x\r\nlink: y\r\n\r\n" + OK + b"content-length: 3\r\n\r\nyes", 200, b"yes", True, False),
    "switched": (b"HTTP/1.1 101 x\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", 101, b"", False, False),
    "no status": (b"HTTP/1.1 000 x\r\ncontent-length: 0\r\n\r\n", 0, b"", True, False),
    "more": (OK + b"content-length: 3\r\n\r\nyes" + OK + b"content-length: 2\r\n\r\nno", 200, b"yes", False, False),
    "garbage behind": (OK + b"content-length: 3\r\n\r\nyes\0\0", 200, b"yes", False, False),
}


@pytest.mark.parametrize("cut", [None, 1, 7])
@pytest.mark.parametrize("what", WHOLE)
def test_where_an_answer_ends_and_what_is_kept(what, cut, run):
    reply, status, body, kept, ends = WHOLE[what]

    async def check():
        serving = Serving(reply, reply, cut=cut, stays=not ends)
        if ends:
            serving.replies = (reply,)
        async with serving.client() as client:
            for _ in range(2):
                found = await ask(client)
                assert (found[0], found[2]) == (status, body)
                assert "x" not in found[1] and "link" not in found[1]  # a trailer, and a header of another answer
                await until(lambda: kept or not client.lines)
            assert serving.connections == (1 if kept else 2)

    run(check())


CUT = {  # what a server sends before it closes the connection: the error
    "nothing": (b"", Closed),
    "half a head": (OK + b"content-le", Closed),
    "half a body": (OK + b"content-length: 9\r\n\r\nyes", NotHttp),
    "half a chunk": (OK + b"transfer-encoding: chunked\r\n\r\n9\r\nyes", NotHttp),
    "no last chunk": (OK + b"transfer-encoding: chunked\r\n\r\n3\r\nyes\r\n", NotHttp),
    "another coding": (OK + b"transfer-encoding: gzip\r\n\r\nyes", NotHttp),
    "two lengths": (OK + b"content-length: 3\r\ncontent-length: 4\r\n\r\nyes", NotHttp),
    "length and chunks": (OK + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\r\nyes\r\n0\r\n\r\n", NotHttp),
    "SSH": (b"SSH-2.0\r\n", NotHttp),
    "HTTP/9": (b"HTTP/9.9 200 OK\r\ncontent-length: 0\r\n\r\n", NotHttp),
}


@pytest.mark.parametrize("what", CUT)
def test_an_answer_that_is_cut_off_or_wrong_is_none(what, run):
    sent, error = CUT[what]

    async def check():
        async with Serving(sent, stays=False).client() as client:
            with pytest.raises(error) as raised:
                await ask(client)
            assert type(raised.value) is error
            if error is Closed:
                assert not raised.value.stale  # it had answered nothing before
            await until(lambda: not client.lines)

    run(check())


FLOODS = {
    "messages": (b"HTTP/1.1 100 x\r\n\r\n" * 16, "more than 16 answers"),
    "headers": (OK + b"x: y\r\n" * 140, "more than 128 headers"),
    "trailers": (OK + b"transfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 140, "more than 128 headers"),
    "empty lines": (b"\r\n" * 40_000, "a head is longer than 65536 bytes"),
    "a long header": (OK + b"x: " + b"y" * 80_000, "a head is longer than 65536 bytes"),
    "a body": (OK + b"\r\n" + b"x" * 200_000, "more than 150000 bytes"),
    "a chunk's extension": (OK + b"transfer-encoding: chunked\r\n\r\n1;" + b"x" * 200_000, "more than 150000 bytes"),
}


@pytest.mark.parametrize("what", FLOODS)
def test_what_belongs_to_no_answer_ends_the_connection(what, run):
    sent, reason = FLOODS[what]
    sent += OK if what == "messages" else b""  # the seventeenth

    async def check():
        async with Serving(sent).client(most=150_000) as client:
            with pytest.raises(Flood, match=reason):
                await ask(client)
            await until(lambda: not client.lines)

    run(check())


def test_what_comes_when_nothing_was_asked_closes_the_connection(run):
    async def check():
        serving = Serving(WHOLE["length"][0], WHOLE["length"][0])
        async with serving.client() as client:
            await ask(client)
            serving.writers[0].write(b"x")
            await until(lambda: not client.lines)
            assert (await ask(client))[2] == b"yes" and serving.connections == 2

    run(check())


def test_a_connection_is_closed_when_it_is_idle_for_long_or_one_too_many(run):
    async def check():
        async with Serving(*[WHOLE["length"][0]] * 3).client(idle=0.05) as client:
            await ask(client)
            await until(lambda: not client.lines)
        serving = Serving(*[WHOLE["length"][0]] * 3)
        async with serving.client(kept=2) as client:
            await asyncio.gather(*(ask(client) for _ in range(5)))
            await until(lambda: len(client.lines) == 2)
            await ask(client)
            assert serving.connections == 5

    run(check())


def test_a_kept_connection_that_was_closed_meanwhile_is_said(run):
    async def check():
        serving = Serving(WHOLE["length"][0], b"", stays=False)
        async with serving.client() as client:
            await ask(client)
            with pytest.raises(Closed) as raised:
                await ask(client)
            assert raised.value.stale
        half = Serving(WHOLE["length"][0], OK, stays=False)
        async with half.client() as client:
            await ask(client)
            with pytest.raises(Closed) as raised:
                await ask(client)
            assert not raised.value.stale

    run(check())


def test_who_does_not_read_receives_no_more(run):
    async def check():
        size = 5_000_000
        serving = Serving(OK + b"content-length: %d\r\n\r\n" % size + b"x" * size)
        async with serving.client() as client:
            answer = await client.post(*client.there, HEAD, b"hi")
            await until(lambda: answer.held > http_client._HELD)
            for _ in range(20):
                await asyncio.sleep(0.005)
            assert answer.held < 600_000 and not answer.complete
            assert await read(answer) == b"x" * size

    run(check())


def test_an_answer_that_is_given_up_closes_its_connection(run):
    async def check():
        serving = Serving(OK + b"content-length: 9\r\n\r\nyes")
        async with serving.client() as client:
            answer = await client.post(*client.there, HEAD, b"hi")
            answer.close()
            answer.close()
            await until(lambda: serving.closed == 1 and not client.lines)
        silent = Serving(b"")
        async with silent.client() as client:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.post(*client.there, HEAD, b"hi"), 0.05)
            await until(lambda: silent.closed == 1 and not client.lines)

    run(check())


def test_others_have_a_turn_while_much_is_parsed(run, monkeypatch):
    async def check():
        sent = OK + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n"
        parsed = []
        feed = http_client.Answer.feed
        monkeypatch.setattr(http_client.Answer, "feed", lambda *args: parsed.append(1) or feed(*args))

        async def turns():
            most = 0
            while True:
                before = len(parsed)
                await asyncio.sleep(0)
                most = max(most, len(parsed) - before)
                if len(parsed) == 20_000:
                    return most

        async with Serving(sent).client() as client:
            beside = asyncio.ensure_future(turns())
            assert (await ask(client))[2] == b"x" * 20_000
            assert await beside <= 2 * http_client._PART / 6

    run(check())


def test_an_address_where_nobody_listens(run):
    async def check():
        serving = Serving()
        async with serving.client() as client:
            there = client.there
        client = HttpClient()
        await asyncio.sleep(0)
        with pytest.raises(Unreachable) as raised:
            await client.post(*there, HEAD, b"hi")
        assert raised.value.errno == errno.ECONNREFUSED and not isinstance(raised.value, TimeoutError)
        client.close()
        with pytest.raises(Unreachable, match="closed"):
            await client.post(*there, HEAD, b"hi")

    run(check())


@pytest.mark.parametrize("size", [2, 5_000_000])
def test_a_request_arrives_whole(size, run):
    got = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        got.append(head + await reader.readexactly(size))
        writer.write(WHOLE["length"][0])

    async def check():
        server, client = await asyncio.start_server(serve, "127.0.0.1", 0), HttpClient()
        answer = await client.post(*server.sockets[0].getsockname(), HEAD, b"y" * size)
        assert await read(answer) == b"yes" and got == [HEAD + b"y" * size]
        client.close()
        server.close()

    run(check())
