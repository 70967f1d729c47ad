"""Strangers and slow callers that hold on to a miner: `miner_held.py PORT HOTKEY JSON`, in a process of its own.

Idle strangers have had an answer to `GET /`. Slow writers send a byte of a header each second. Slow readers are permitted callers that
ask for a long answer (`miner_servers.LONG`) and take 64 bytes of it each second; with the small segments and the small buffer that
they allow, the system of the miner holds little of the answer, and the rest waits at the miner.

Strangers and slow writers come within a tenth of `ramp` seconds, so that many are sent away at the same moment and come back together
after `pause` seconds; the slow readers, whose questions are work, come one after the other within `ramp` seconds.

A line says when all have come; each line on stdin is answered with how many hold on, how often they came back, and how many bytes of
answers the slow readers have not taken; the end of stdin ends it.
"""

import asyncio
import json
import socket
import sys
from collections import Counter

import miner_load as load
import miner_servers as servers
import uvloop

ADDRESSES = [f"127.0.{i}.1" for i in range(1, 17)]  # so many hosts
SEGMENT, BUFFER = 536, 2048  # bytes that a slow reader takes at a time, and that wait at its system (which doubles it)


class Held:
    "What all who hold on have in common: where they come from, whom they hold on to, and what became of them."

    def __init__(self, port: int, hotkey: str):
        self.there, self.hotkey, self.wallets = ("127.0.0.1", port), hotkey, load.wallets(64)
        self.now, self.back, self.asked, self.unread = Counter(), Counter(), 0, {}

    def state(self) -> dict:
        "How many hold on now, how often they came back, and the megabytes that slow readers have not taken."
        return {"holding": self.now.total(), "by_kind": dict(self.now), "back": self.back.total(), "back_by_kind": dict(self.back),
                "unread_mb": sum(self.unread.values()) / 1e6, "waiting_answers": len(self.unread)}

    async def hold(self, kind: str, number: int, delay: float, pause: float) -> None:
        "Hold on, and come back whenever that ends."
        loop, stay = asyncio.get_running_loop(), getattr(self, kind)
        await asyncio.sleep(delay)
        while True:
            with socket.socket() as line:
                line.setblocking(False)
                try:
                    line.bind((ADDRESSES[number % len(ADDRESSES)], 0))
                    if kind == "readers":
                        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
                        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
                    await loop.sock_connect(line, self.there)
                    self.now[kind] += 1
                    try:
                        await stay(loop, line)
                    finally:
                        self.now[kind] -= 1
                except OSError:
                    pass
            self.back[kind] += 1
            await asyncio.sleep(pause)

    async def idle(self, loop, line) -> None:
        await loop.sock_sendall(line, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        while await loop.sock_recv(line, 4096):
            pass

    async def writers(self, loop, line) -> None:
        await loop.sock_sendall(line, b"POST /Prompting HTTP/1.1\r\nhost: x\r\nx-slow: ")
        while True:
            await asyncio.sleep(1.0)
            await loop.sock_sendall(line, b"x")

    async def readers(self, loop, line) -> None:
        self.asked += 1
        wallet = self.wallets[self.asked % len(self.wallets)]
        await loop.sock_sendall(line, load.request(f"Long answer {self.asked}", self.hotkey, wallet))
        left = len(servers.LONG)
        try:
            while taken := await loop.sock_recv(line, 64):
                left -= len(taken)
                self.unread[line] = left
                await asyncio.sleep(1.0)
                if error := line.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(error, "reset")  # seen before what is left to read
        finally:
            self.unread.pop(line, None)


async def main(port: int, hotkey: str, settings: dict) -> None:
    held, loop = Held(port, hotkey), asyncio.get_running_loop()
    kinds = [kind for kind in ("idle", "writers", "readers") for _ in range(settings[kind])]
    ramp, holders = settings["ramp"], []
    for i, kind in enumerate(kinds):
        within = ramp if kind == "readers" else ramp / 10
        delay = within * (7919 * i % len(kinds)) / len(kinds)
        holders.append(asyncio.ensure_future(held.hold(kind, i, delay, settings["pause"])))
    await asyncio.sleep(ramp + 2.0)
    print(json.dumps(held.state()), flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(held.state()), flush=True)
    for holder in holders:
        holder.cancel()
    await asyncio.gather(*holders, return_exceptions=True)


if __name__ == "__main__":
    servers.raise_open_files()
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])))
