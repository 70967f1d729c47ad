"""Strangers and slow callers that hold on to a miner: `miner_held.py PORT HOTKEY IDLE WRITERS READERS`, in a process of its own.

Idle ones have had an answer to `GET /`; slow writers send a byte of a header each second; slow readers are permitted callers that
ask, and never read the answer. Who is sent away comes back after five seconds. A line says when all are there; each line on stdin is
answered with how many hold on and how often they came back; the end of stdin ends it.
"""

import asyncio
import json
import resource
import socket
import sys

import miner_load as load
import uvloop

ADDRESSES = [f"127.0.{i}.1" for i in range(1, 17)]  # so many hosts


class Holder:
    "One who holds on, and comes back."

    back = holding = 0

    def __init__(self, port: int, number: int, first, again: bytes = b""):
        self.place = ("127.0.0.1", port), (ADDRESSES[number % len(ADDRESSES)], 0)
        self.first, self.again = first, again

    async def hold(self) -> None:
        loop, there, here = asyncio.get_running_loop(), *self.place
        while True:
            line = socket.socket()
            line.setblocking(False)
            try:
                line.bind(here)
                await loop.sock_connect(line, there)
                await loop.sock_sendall(line, self.first())
                Holder.holding += 1
                try:
                    await self.stay(loop, line)
                finally:
                    Holder.holding -= 1
            except OSError:
                pass
            finally:
                line.close()
            Holder.back += 1
            await asyncio.sleep(5.0)

    async def stay(self, loop, line) -> None:
        "Until the line is closed at the other end."
        if self.again:
            while True:
                await asyncio.sleep(1.0)
                await loop.sock_sendall(line, self.again)
        if self.first.__name__ == "ask":  # does not read: hears of the end when it writes
            while True:
                await asyncio.sleep(1.0)
                await loop.sock_sendall(line, b"\r\n")
        while await loop.sock_recv(line, 4096):
            pass


async def main(port: int, hotkey: str, idle: int, writers: int, readers: int) -> None:
    wallets, number = load.wallets(64), [0]

    def get():
        return b"GET / HTTP/1.1\r\n\r\n"

    def begin():
        return b"POST /Prompting HTTP/1.1\r\nx-slow: "

    def ask():
        number[0] += 1
        return load.request(f"Held {number[0]} by a slow reader", hotkey, wallets[number[0] % len(wallets)])

    kinds = [(get, b"")] * idle + [(begin, b"x")] * writers + [(ask, b"")] * readers
    holders = [asyncio.ensure_future(Holder(port, i, *kind).hold()) for i, kind in enumerate(kinds)]
    await asyncio.sleep(1.0 + len(kinds) / 2000)
    print(json.dumps({"holding": Holder.holding, "back": Holder.back}), flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps({"holding": Holder.holding, "back": Holder.back}), flush=True)
    for holder in holders:
        holder.cancel()
    await asyncio.gather(*holders, return_exceptions=True)


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16_384), hard))
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])))
