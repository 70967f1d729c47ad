"""A load generator that costs little beside what it measures: requests are bytes made beforehand, answers are counted.

The same one asks Starlette and our miner. It keeps its connections, one request at a time on each, and does not look at
an answer beyond its status, so that the server and not the client is what is measured.
"""

import asyncio
import time
from typing import Any

import httptools
from bittensor import http_auth

from miner_servers import question

from prompting_nb.network.chain import make_wallet
from prompting_nb.protocol import Prompting, write_body


def request(text: str, hotkey: str | None = None, wallet: Any = None) -> bytes:
    "One question as bytes, signed by `wallet` for the miner `hotkey` where one is given."
    body = write_body(Prompting.ask(text, timeout=10.0))
    lines = [f"POST {Prompting.path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json",
             f"Content-Length: {len(body)}"]
    if hotkey is not None:
        signed = http_auth.sign(wallet, method="POST", path=Prompting.path, body=body, receiver_ss58=hotkey)
        lines += [f"{name}: {value}" for name, value in signed.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def requests(count: int, first: int, hotkey: str | None, wallets: list) -> list:
    """`count` different requests as bytes, signed in turn by `wallets` for the miner `hotkey`; unsigned where that is None.

    To be made shortly before they are sent: a signature is fresh for ten seconds.
    """
    return [request(question(number), hotkey, wallets[number % len(wallets)])
            for number in range(first, first + count)]


def wallets(count: int = 4095) -> list:
    "The callers that are registered at the miner of `miner_servers.py`."
    return [make_wallet(f"caller {number}").hotkey for number in range(count)]


class Connection(asyncio.Protocol):
    "One kept connection: `await connection.ask(bytes)` gives the status, 0 where the connection broke."

    transport = answer = None

    def connection_made(self, transport):
        self.transport, self.parser = transport, httptools.HttpResponseParser(self)

    def data_received(self, data):
        self.parser.feed_data(data)

    def on_message_complete(self):
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(self.parser.get_status_code())

    def connection_lost(self, error):
        self.transport = None
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(0)

    def ask(self, request: bytes) -> asyncio.Future:
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.answer


class Pool:
    "Connections to one server that wait to be used again."

    def __init__(self, port: int):
        self.port, self.idle = port, []

    async def open(self) -> Connection:
        return (await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self.port))[1]

    async def take(self) -> Connection:
        while self.idle:
            if (connection := self.idle.pop()).transport is not None:
                return connection
        return await self.open()

    async def ask(self, request: bytes, begin: float) -> tuple[float, int]:
        "Seconds since `begin` and status."
        connection = await self.take()
        status = await connection.ask(request)
        self.idle.append(connection)
        return time.perf_counter() - begin, status

    def close(self) -> None:
        for connection in self.idle:
            if connection.transport is not None:
                connection.transport.close()


async def closed(port: int, made: list, at_a_time: int, seconds: float) -> list:
    "`at_a_time` callers, each asks again when it has its answer, until the time or the requests are over."
    pool, left, seen = Pool(port), iter(made), []
    end = time.perf_counter() + seconds

    async def caller():
        for request in left:
            if (now := time.perf_counter()) >= end:
                return
            seen.append(await pool.ask(request, now))

    await asyncio.gather(*(caller() for _ in range(at_a_time)))
    pool.close()
    return seen


async def opened(port: int, made: list, gaps: list) -> list:
    "One request after each gap in seconds, whatever became of those before it; timed from when it was due."
    pool, asked = Pool(port), []
    pool.idle = [await pool.open() for _ in range(64)]  # who asks often keeps connections
    due = time.perf_counter()
    for request, gap in zip(made, gaps):
        due += gap
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        asked.append(asyncio.ensure_future(pool.ask(request, due)))
    seen = await asyncio.gather(*asked)
    pool.close()
    return seen
