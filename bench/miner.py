"""The miner's server beside its neighbours, in one run: `make bench-miner JSON=FILE`.

Servers and clients are separate processes on loopback, and the peers take turns within each repetition. Measured are

  client and server   (vs_stock, vs_starlette) bittensor 10.5.0's stock Dendrite and Axon, in an environment of their own
                      with uvloop and httptools added, which they lack as installed; our Dendrite and our miner; an
                      aiohttp client and Starlette
  the server alone    (server_vs_starlette) one cheap load generator asks Starlette and our miner. Requests are made, and
                      for ours signed, before the clock runs, so that the server and not the client is at its limit;
                      the share of a core that each side used is reported with the figures

Prompts have 300 characters and completions 1500, about as many as those that people collect to compare chat models by.

Our miner has everything on: signatures of both generations, blacklist, validator permit, minimum stake, rate limit,
priority and prompt cache on a metagraph of 4096 hotkeys, signed answers. All handlers are coroutines that answer at once.
Starlette parses the same JSON, answers the same JSON, and does nothing else.

A repetition in which other programs used more than a fifth of a core is measured again, up to three times. What they used and how
often that was done stands beside each figure, and at the end those that were disturbed to the last.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import miner_load as load
import miner_servers as servers
import uvloop
from machine import QUIET, machine, undisturbed
from rich.console import Console
from rich.table import Table

from prompting_nb.network.chain import make_wallet
from prompting_nb.network.dendrite import Dendrite
from prompting_nb.protocol import Prompting, Synapse, Terminal, write_body

HERE = Path(__file__).resolve().parent
AT_A_TIME = (1, 16, 128)
TRIES = 4  # times that a repetition is measured at most, until others let it alone
TARGETS = {"vs_stock_1": (">=", 14), "vs_stock_16": (">=", 20), "vs_bound_16": (">=", 0.75), "policy_us_4096": ("<", 15),
           "inversions": ("<=", 0), "overload_p99_ratio": ("<=", 1.25), "refusal_ms": ("<", 6), "held_success": (">=", 1),
           "held_p99_ratio": ("<=", 3)}
console = Console(stderr=True)


# Processes


class Process:
    "A peer in a process of its own that is spoken to in lines of JSON."

    def __init__(self, *command, **environment):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent / "tests" / "legacy")])}
        self.process = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env={**env, **environment})

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.process.args[1:3])} ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, job: dict | None = None) -> dict:
        self.process.stdin.write(json.dumps(job or {}) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Server(Process):
    "One that serves."

    def __init__(self, python, script, *arguments, **environment):
        super().__init__(python, HERE / script, *arguments, **environment)
        self.found = found = self.read()
        self.port, self.hotkey = found["port"], found["hotkey"]

    @property
    def target(self) -> SimpleNamespace:
        return SimpleNamespace(hotkey=self.hotkey, axon=f"127.0.0.1:{self.port}")


# Clients: each has `closed(at_a_time, seconds)` and `open(gaps)`, and gives what was seen with wall and processor time


async def closed_loop(ask, at_a_time: int, seconds: float) -> list:
    "`at_a_time` callers, each asks again when it has its answer."
    end, seen = time.perf_counter() + seconds, []

    async def caller():
        while (now := time.perf_counter()) < end:
            seen.append(await ask(now))

    await asyncio.gather(*(caller() for _ in range(at_a_time)))
    return seen


async def open_loop(ask, gaps: list) -> list:
    "One request after each gap in seconds, whatever became of those before it; timed from when it was due."
    due, asked = time.perf_counter(), []
    for gap in gaps:
        due += gap
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        asked.append(asyncio.ensure_future(ask(due)))
    return await asyncio.gather(*asked)


def timed(seeing) -> dict:
    "Run a coroutine; what it saw, with the wall and processor seconds of this process."
    gc.collect()
    gc.freeze()  # thousands of keys of this program are no burden that a client has
    wall, cpu = time.perf_counter(), time.process_time()
    seen = uvloop.run(seeing)
    return {"seen": seen, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


class StockClient(Process):
    "A stock Dendrite."

    def __init__(self, python, server: Server, home: str):
        super().__init__(python, HERE / "miner_stock.py", "ask", server.port, server.hotkey, HOME=home)

    def closed(self, at_a_time, seconds):
        return self.ask({"at_a_time": at_a_time, "seconds": seconds})

    def open(self, gaps):
        return self.ask({"gaps": gaps})


class Numbered:
    "Hands out numbers, so that no two questions are alike."

    number = 0

    def take(self, count: int = 1) -> int:
        Numbered.number += count
        return Numbered.number - count

    def question(self) -> Prompting:
        return Prompting.ask(servers.question(self.take()), timeout=10.0)


class OurClient(Numbered):
    "Our Dendrite, awaited from many tasks as the stock one is."

    def __init__(self, server: Server):
        self.dendrite, self.server = Dendrite(make_wallet("caller 7"), allow_private=True), server

    async def ask(self, begin):
        answer, = await self.dendrite([self.server.target], self.question())
        return time.perf_counter() - begin, answer.dendrite.status_code

    def closed(self, at_a_time, seconds):
        return timed(closed_loop(self.ask, at_a_time, seconds))

    def open(self, gaps):
        return timed(open_loop(self.ask, gaps))

    def close(self):
        self.dendrite.close()


class AiohttpClient(Numbered):
    "What one writes to ask Starlette: an aiohttp session, JSON out, JSON in."

    def __init__(self, server: Server):
        self.url = f"http://127.0.0.1:{server.port}{Prompting.path}"

    async def within_session(self, loop, *arguments):
        connector = aiohttp.TCPConnector(limit=1024)
        headers = {"Content-Type": "application/json"}
        async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
            async def ask(begin):
                async with session.post(self.url, data=write_body(self.question())) as answer:
                    (await answer.json())["completion"]
                    return time.perf_counter() - begin, answer.status

            return await loop(ask, *arguments)

    def closed(self, at_a_time, seconds):
        return timed(self.within_session(closed_loop, at_a_time, seconds))

    def open(self, gaps):
        return timed(self.within_session(open_loop, gaps))

    def close(self):
        pass


class LoadClient(Numbered):
    "The load generator, with requests that are made before the clock runs."

    most = 30_000  # requests a second that it prepares for at first

    def __init__(self, server: Server, wallets: list):
        self.server, self.wallets, self.rate = server, wallets, 12_000 if server.hotkey else self.most

    def made(self, count):
        return load.requests(count, self.take(count), self.server.hotkey, self.wallets)

    def closed(self, at_a_time, seconds):
        made = self.made(int(self.rate * seconds))
        return timed(load.closed(self.server.port, made, at_a_time, seconds))

    def open(self, gaps):
        return timed(load.opened(self.server.port, self.made(len(gaps)), gaps))

    def close(self):
        pass


# Figures


def percentile(values: list, share: float) -> float:
    "The value that `share` of them do not exceed; nan of none."
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def figures(result: dict, server_cpu: float) -> dict:
    "Rate, success, latencies in ms of what succeeded and of what was refused, share of a core of client and server."
    good = [1e3 * seconds for seconds, status in result["seen"] if status == 200]
    refused = [1e3 * seconds for seconds, status in result["seen"] if status in (429, 503)]
    total = len(result["seen"])
    return {
        "rate": len(good) / result["wall"], "asked": total, "wall": result["wall"],
        "success": len(good) / total, "refused": len(refused) / total,
        "p50": percentile(good, 0.50), "p95": percentile(good, 0.95), "p99": percentile(good, 0.99),
        "refusal_p50": percentile(refused, 0.50), "refusal_p99": percentile(refused, 0.99),
        "client_cpu": result["cpu"] / result["wall"], "server_cpu": server_cpu / result["wall"],
    }


def middle(rows: list[dict]) -> dict:
    "The median of each figure over repetitions, with the least and greatest rate, and what may have disturbed them."
    found = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name not in ("others", "again")}
    return {**found, "rate_range": [min(row["rate"] for row in rows), max(row["rate"] for row in rows)], **disturbed(rows)}


def disturbed(rows: list[dict]) -> dict:
    "What others used at most, and how often rows were measured again."
    used = [row["others"] for row in rows if row["others"] is not None]  # unknown where the system does not tell
    return {"others": max(used, default=None), "again": sum(row["again"] for row in rows)}


def poisson(rate: float, seconds: float, seed: int) -> list:
    "Gaps between arrivals at random, `rate` a second."
    draw = random.Random(seed)
    return [draw.expovariate(rate) for _ in range(max(1, int(rate * seconds)))]


class Peer:
    "A client with the server that it asks."

    def __init__(self, name: str, client, server: Server):
        self.name, self.client, self.server = name, client, server

    def measure(self, kind: str, *arguments) -> dict:
        "One repetition of `closed` or `open`, measured again where others disturbed it."
        return undisturbed(lambda: self.once(kind, *arguments), TRIES)

    def once(self, kind: str, *arguments) -> dict:
        "One repetition, whatever else runs."
        before = self.server.ask()["cpu"]
        result = getattr(self.client, kind)(*arguments)
        return figures(result, self.server.ask()["cpu"] - before)


# What is measured


def closed_loops(peers: list, seconds: float, repetitions: int, decisions: "Decisions") -> list[dict]:
    "Every peer at every concurrency, taking turns, and between them what takes microseconds."
    seen = {}
    for repetition in range(repetitions):
        for at_a_time in AT_A_TIME:
            for peer in peers:
                console.print(f"closed loop, repetition {repetition + 1} of {repetitions}: {at_a_time} at a time, "
                              f"{peer.name}")
                if repetition == 0:
                    peer.once("closed", at_a_time, 0.3)  # connections, caches
                seen.setdefault((peer.name, at_a_time), []).append(peer.measure("closed", at_a_time, seconds))
                decisions.measure()
    return [{"peer": name, "at_a_time": at_a_time, **middle(rows)} for (name, at_a_time), rows in seen.items()]


def open_loops(peers: list, capacity: dict, shares: tuple, seconds: float, repetitions: int) -> list[dict]:
    "Arrivals at random, at shares of what each peer took 16 at a time."
    seen = {}
    for repetition in range(repetitions):
        for share in shares:
            for peer in peers:
                rate = share * capacity[peer.name]
                console.print(f"open loop, repetition {repetition + 1} of {repetitions}: {rate:.0f} a second, {peer.name}")
                gaps = poisson(rate, seconds, repetition)
                seen.setdefault((peer.name, share, rate), []).append(peer.measure("open", gaps))
    return [{"peer": name, "share": share, "offered": rate, **middle(rows)}
            for (name, share, rate), rows in seen.items()]


def overload(wallets: list, python: str, rising: bool, seconds: float, repetitions: int) -> dict:
    """A handler of 20 ms, eight at a time: what becomes of those who are served, and of the rest, as the load rises.

    With `rising` stakes a caller who waits may lose the place to one with more, and hears of it then and not at once.
    """
    settings = {"seconds": 0.02, "workers": 8, "max_queue": 8, "rising": rising}
    server = Server(python, "miner_servers.py", "ours", json.dumps(settings))
    peer = Peer("ours", LoadClient(server, wallets), server)
    try:
        capacity = peer.measure("closed", 8, seconds)["rate"]
        seen = {}
        for repetition in range(repetitions):
            for load_factor in (0.5, 0.9, 1.0, 1.5, 2.0, 3.0):
                console.print(f"overload, repetition {repetition + 1} of {repetitions}: {load_factor} x capacity")
                gaps = poisson(load_factor * capacity, seconds, 100 + repetition)
                seen.setdefault(load_factor, []).append(peer.measure("open", gaps))
    finally:
        server.close()
    return {**settings, "capacity": capacity,
            "rows": [{"load": load_factor, **middle(rows)} for load_factor, rows in seen.items()]}


def wrong_order(numbers: list[int]) -> float:
    "The share of pairs in which the lower number, that is the lower stake, was served first."
    pairs = [(first, second) for i, first in enumerate(numbers) for second in numbers[i + 1 :]]
    return sum(first < second for first, second in pairs) / len(pairs)


def our_order(python: str, callers: int = 64) -> float:
    "Share of pairs in the wrong order, of callers with rising stake that all wait while one request holds the worker."
    server = Server(python, "miner_servers.py", "ours", json.dumps({"workers": 1, "seconds": 0.005, "hotkeys": callers}))
    numbers = random.Random(0).sample(range(callers), callers)
    wallets = load.wallets(callers)

    async def ask():
        pool = load.Pool(server.port)
        hold = asyncio.ensure_future(pool.ask(load.request("Hold", server.hotkey, wallets[0]), 0.0))
        await asyncio.sleep(0.1)  # of the second that it holds
        await asyncio.gather(*(pool.ask(load.request(f"Order {number}", server.hotkey, wallets[number]), 0.0)
                               for number in numbers))
        await hold
        pool.close()

    uvloop.run(ask())
    served = [int(text.split()[1]) for text in server.ask()["served"] if text.startswith("Order")]
    server.close()
    if len(served) != callers:
        raise SystemExit(f"{len(served)} of {callers} requests were served, so their order says nothing")
    return wrong_order(served)


def stock_order(client: StockClient, server: Server) -> float:
    "The same for the stock pair: all callers wait while one request holds the server for a second."
    server.ask()
    client.ask({"order": True})
    return wrong_order([int(text.split()[1]) for text in server.ask()["served"] if text.startswith("Order")])


HELD = {"idle": 4000, "writers": 500, "readers": 500}
ROOM = 8192  # connections that the miner allows while all of them hold on; by default it allows fewer than they are


def held(wallets: list, python: str, seconds: float, repetitions: int, ramp: float) -> dict:
    """A quarter of the capacity asked by good callers: alone, while strangers and slow callers hold on, and while they contend.

    They hold on to a miner that has room for all of them, and come back at once when they are sent away. They contend for the places
    of a miner with the usual limit, which has fewer, and come back after five seconds.
    """
    rate, rows, told = None, [], {}
    for what, pause, settings in (("held", 0.2, {"connections": ROOM}), ("contended", 5.0, {})):
        server = Server(python, "miner_servers.py", "ours", json.dumps(settings))
        peer = Peer("ours", LoadClient(server, wallets), server)
        try:
            peer.once("closed", 16, seconds)
            rate = rate or 0.25 * peer.measure("closed", 16, seconds)["rate"]
            if not rows:
                rows.append({"what": "quiet", "offered": rate, **middle(in_turns(peer, "quiet", rate, seconds, repetitions))})
            crowd = Process(python, HERE / "miner_held.py", server.port, server.hotkey, json.dumps({**HELD, "ramp": ramp, "pause": pause}))
            try:
                states, before = [crowd.read()], server.ask()["closed"]
                found = in_turns(peer, what, rate, seconds, repetitions, lambda: states.append(crowd.ask()))
            finally:
                crowd.close()
            closed = {reason: count - before.get(reason, 0) for reason, count in server.ask()["closed"].items()}
            rows.append({"what": what, "offered": rate, **middle(found)})
            told[what] = {"places": server.found.get("connections"), "pause": pause, "closed": closed, **least(states)}
        finally:
            server.close()
    return {**HELD, "holding": told["held"]["holding"], "back": told["held"]["back"], "told": told, "rows": rows}


def in_turns(peer, what: str, rate: float, seconds: float, repetitions: int, after=lambda: None) -> list[dict]:
    "Repetitions of an open loop, with a call after each."
    found = []
    for repetition in range(repetitions):
        console.print(f"{what}, repetition {repetition + 1} of {repetitions}: {rate:.0f} a second")
        found.append(peer.measure("open", poisson(rate, seconds, 200 + repetition)))
        after()
    return found


def least(states: list[dict]) -> dict:
    "The least that held on at any look, of each kind and together, and how often they came back meanwhile."
    kinds = states[0]["by_kind"]
    return {"holding": min(state["holding"] for state in states),
            "by_kind": {kind: min(state["by_kind"].get(kind, 0) for state in states) for kind in kinds},
            "waiting_answers": min(state["waiting_answers"] for state in states),
            "unread_mb": min(state["unread_mb"] for state in states), "back": states[-1]["back"] - states[0]["back"]}


class Decisions:
    """Microseconds a request for what the miner decides, with 4096 registered hotkeys, and for a signature made and one checked.

    A little is measured at a time, again and again between other measurements. The figure is the least of the repetitions, as the
    documentation of timeit recommends for what takes microseconds: a machine that others share is slower for a while, and never faster.
    Their median stands beside it, and what share that is of the two signatures in the same repetition.
    """

    parts = ("blacklist", "priority", "cache")

    def __init__(self, requests: int = 2000, signed: int = 1000):
        self.miner, self.requests, self.signed = servers.make_miner({}), requests, signed
        self.hotkeys = [neuron.hotkey for neuron in self.miner.metagraph if neuron.hotkey != self.miner.hotkey]
        self.draw, self.number, self.rows = random.Random(0), Numbered(), []

    def measure(self) -> None:
        "Measure once more, and again where others disturbed it."
        self.rows.append(undisturbed(self.once, TRIES))

    def once(self) -> dict:
        "One repetition, whatever else runs."
        miner, wallet, text = self.miner, make_wallet("anybody").hotkey, b"x" * 300
        asked = [Prompting.ask(self.number.question().prompt) for _ in range(self.requests)]
        headers = [Synapse(dendrite=Terminal(hotkey=self.draw.choice(self.hotkeys))) for _ in asked]
        signature = wallet.sign(text)
        found, admitted = {}, []

        def claim():
            for synapse in asked:
                with miner.once.claimed(synapse):
                    pass

        for name, count, work in (
            ("blacklist", self.requests, lambda: admitted.extend(not miner.blacklist(header) for header in headers)),
            ("priority", self.requests, lambda: [miner.priority(header) for header in headers]),
            ("cache", self.requests, claim),
            ("sign", self.signed, lambda: [wallet.sign(text) for _ in range(self.signed)]),
            ("verify", self.signed, lambda: [wallet.verify(text, signature) for _ in range(self.signed)]),
        ):
            begin = time.perf_counter()
            work()
            found[name] = 1e6 * (time.perf_counter() - begin) / count
        assert all(admitted)
        return found

    def figures(self) -> dict:
        "Of policy and of signatures, over all repetitions."
        total = lambda row, names: sum(row[name] for name in names)
        middle = lambda *names: {name: statistics.median(row[name] for row in self.rows) for name in names}
        signed, totals = ("sign", "verify"), [total(row, self.parts) for row in self.rows]
        quickest = min(self.rows, key=lambda row: total(row, self.parts))
        return {
            "policy": {"hotkeys": len(self.hotkeys) + 1, "repetitions": len(totals), "greatest": max(totals),
                       "least": {**{name: quickest[name] for name in self.parts}, "total": min(totals)},
                       "median": {**middle(*self.parts), "total": statistics.median(totals)},
                       "of_signatures": statistics.median(part / total(row, signed) for part, row in zip(totals, self.rows)),
                       **disturbed(self.rows)},
            "signatures": {**middle(*signed), **{f"least_{name}": min(row[name] for row in self.rows) for name in signed},
                           **disturbed(self.rows)}}


# The report


def environment(legacy: str) -> dict:
    "Where this ran, and on what."
    freeze = subprocess.run([legacy, "-m", "pip", "freeze"], capture_output=True, text=True).stdout.split()
    stock = {name: row.split("==")[1] for row in freeze for name in ("bittensor", "fastapi", "starlette", "uvicorn")
             if row.startswith(f"{name}==")}
    names = ("bittensor", "starlette", "uvicorn", "uvloop", "httptools", "aiohttp", "pydantic")
    where = machine()
    others = os.getloadavg()[0]  # what else ran when this began
    return {"cpu": where.pop("processor"), **where, "load": others,
            "versions": {name: version(name) for name in names}, "stock_versions": stock}


def table(title: str, rows: list[dict], columns: dict) -> Table:
    "A table of figures; `columns` gives the heading and the format of each."
    made = Table(title=title, title_justify="left")
    for heading, _ in columns.values():
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(*(form.format(row[name]) for name, (_, form) in columns.items()))
    return made


LATENCY = {"rate": ("answers/s", "{:,.0f}"), "rate_range": ("from, to", "{0[0]:,.0f}, {0[1]:,.0f}"),
           "p50": ("p50 ms", "{:.2f}"), "p95": ("p95 ms", "{:.2f}"), "p99": ("p99 ms", "{:.2f}"), "success": ("success", "{:.2%}"),
           "client_cpu": ("client cores", "{:.2f}"), "server_cpu": ("server cores", "{:.2f}")}


def report(found: dict) -> None:
    "The tables."
    out = Console(width=max(120, Console().width))
    out.print(table("Closed loop", found["closed"], {
        "peer": ("peer", "{}"), "at_a_time": ("at a time", "{}"), **LATENCY}))
    out.print(table("Open loop, arrivals at random", found["open"], {
        "peer": ("peer", "{}"), "share": ("of capacity", "{:.0%}"), "offered": ("offered/s", "{:,.0f}"), **LATENCY}))
    for name, stakes in (("overload", "equal stakes"), ("overload_rising", "all stakes different")):
        out.print(table(f"Overload: a handler of 20 ms, 8 at a time, 8 may wait, {stakes}", found[name]["rows"], {
            "load": ("x capacity", "{:.1f}"), "rate": LATENCY["rate"], "p50": LATENCY["p50"], "p99": LATENCY["p99"],
            "refused": ("refused", "{:.1%}"), "refusal_p50": ("refusal p50 ms", "{:.2f}"),
            "refusal_p99": ("refusal p99 ms", "{:.2f}")}))
    holders = found["held"]
    who = f"{holders['idle']} idle strangers, {holders['writers']} slow writers and {holders['readers']} slow readers"
    out.print(table(who, holders["rows"], {"what": ("", "{}"), "offered": ("offered/s", "{:,.0f}"), **LATENCY}))
    for what, told in holders["told"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in told["by_kind"].items())
        out.print(f"{what}: at least {told['holding']} held on ({kinds}; {told['waiting_answers']} with {told['unread_mb']:.0f} MB of "
                  f"answers that they did not take), came back {told['back']} times; closed by limits: {told['closed']}")
    parts, signed = found["policy"], found["signatures"]
    for name in ("least", "median"):
        part = parts[name]
        out.print(f"policy with {parts['hotkeys']} hotkeys, the {name} of {parts['repetitions']} repetitions: blacklist and rate limit "
                  f"{part['blacklist']:.1f} us, priority {part['priority']:.1f} us, cache {part['cache']:.1f} us, "
                  f"together {part['total']:.1f} us")
    out.print(f"a signature takes {signed['sign']:.1f} us to make and {signed['verify']:.1f} us to check, at the least "
              f"{signed['least_sign']:.1f} and {signed['least_verify']:.1f}; policy takes {parts['of_signatures']:.0%} of both together")
    out.print(f"pairs served in the wrong order: ours {found['inversions']:.1%}, stock {found['stock_inversions']:.1%}")
    out.print(f"vs_starlette_16 is {found['vs_starlette_16']:.0%}; signatures alone allow "
              f"{found['vs_starlette_16_bound']:.0%}, of which that is {found['vs_bound_16']:.0%}")
    out.print(f"for the server alone it is {found['server_vs_starlette_16']:.0%}, "
              f"and they allow {found['server_vs_starlette_16_bound']:.0%}")
    rows = [{"name": name, "found": found[name], "target": f"{sign} {limit}",
             "met": "yes" if {">=": found[name] >= limit, "<": found[name] < limit, "<=": found[name] <= limit}[sign]
             else "NO"} for name, (sign, limit) in TARGETS.items()]
    out.print(table("Targets", rows, {"name": ("figure", "{}"), "found": ("found", "{:.3g}"), "target": ("target", "{}"),
                                      "met": ("met", "{}")}))
    told = found["neighbours"]
    most = "an unknown share" if told["most"] is None else f"{told['most']:.2f}"
    out.print(f"others used at most {most} of a core; {told['measured_again']} repetitions were measured again, and disturbed to the last "
              f"are: {'; '.join(told['disturbed']) or 'none'}")
    out.print(json.dumps(found["machine"], indent=1))


def bound(seconds: float, signatures: dict) -> float:
    "The share of its rate that a process keeps which makes and checks a signature besides `seconds` of work a request."
    return seconds / (seconds + 1e-6 * (signatures["sign"] + signatures["verify"]))


def summarize(found: dict) -> None:
    "The figures that are promised, out of those that were measured."
    rate = {(row["peer"], row["at_a_time"]): row["rate"] for row in found["closed"]}
    for at_a_time in AT_A_TIME:
        found[f"vs_stock_{at_a_time}"] = rate["our pair", at_a_time] / rate["stock pair", at_a_time]
        found[f"vs_starlette_{at_a_time}"] = rate["our pair", at_a_time] / rate["aiohttp + Starlette", at_a_time]
        found[f"server_vs_starlette_{at_a_time}"] = rate["our server", at_a_time] / rate["Starlette", at_a_time]
    by_name = {row["peer"]: row for row in found["closed"] if row["at_a_time"] == 16}
    pair, alone = by_name["aiohttp + Starlette"], by_name["Starlette"]
    found["vs_starlette_16_bound"] = bound(pair["client_cpu"] / pair["rate"], found["signatures"])
    found["server_vs_starlette_16_bound"] = bound(alone["server_cpu"] / alone["rate"], found["signatures"])
    found["vs_bound_16"] = found["vs_starlette_16"] / found["vs_starlette_16_bound"]
    quiet, busy, contended = found["held"]["rows"]
    found["held_success"], found["held_p99_ratio"] = busy["success"], busy["p99"] / quiet["p99"]
    found["contended_success"], found["contended_p99_ratio"] = contended["success"], contended["p99"] / quiet["p99"]
    rows = {row["load"]: row for row in found["overload"]["rows"]}
    found["overload_p99_ratio"] = rows[2.0]["p99"] / rows[0.9]["p99"]
    found["refusal_ms"] = rows[2.0]["refusal_p99"]
    found["policy_us_4096"] = found["policy"]["least"]["total"]
    found["neighbours"] = disturbance(found)


def disturbance(found: dict) -> dict:
    "What others used at most, how often something was measured again, and what was disturbed to the last."
    parts = {"signatures": found["signatures"], "policy": found["policy"]}
    for kind in ("closed", "open"):
        parts |= {f"{kind}, {row['peer']}, {row.get('at_a_time') or row['share']}": row for row in found[kind]}
    for kind in ("overload", "overload_rising"):
        parts |= {f"{kind}, {row['load']}": row for row in found[kind]["rows"]}
    parts |= {f"held, {row['what']}": row for row in found["held"]["rows"]}
    told = disturbed(list(parts.values()))
    return {"quiet": QUIET, "tries": TRIES, "most": told["others"], "measured_again": told["again"],
            "disturbed": [name for name, part in parts.items() if (part["others"] or 0) > QUIET]}


def run(options) -> dict:
    "Everything, in turns."
    seconds, repetitions, closed = (0.3, 1, 1) if options.quick else (1.2, 3, 7)
    python, legacy, home = sys.executable, options.stock_python, tempfile.mkdtemp()
    started, wallets = time.time(), load.wallets()
    stock = Server(legacy, "miner_stock.py", "serve", HOME=home)
    ours, starlette = Server(python, "miner_servers.py", "ours"), Server(python, "miner_servers.py", "starlette")
    peers = [Peer("stock pair", StockClient(legacy, stock, home), stock), Peer("our pair", OurClient(ours), ours),
             Peer("aiohttp + Starlette", AiohttpClient(starlette), starlette),
             Peer("Starlette", LoadClient(starlette, wallets), starlette),
             Peer("our server", LoadClient(ours, wallets), ours)]
    try:
        found, decisions = {"machine": environment(legacy)}, Decisions()
        found["stock_inversions"] = stock_order(peers[0].client, stock)
        found["closed"] = closed_loops(peers, seconds, closed, decisions)
        found |= decisions.figures()
        capacity = {row["peer"]: row["rate"] for row in found["closed"] if row["at_a_time"] == 16}
        alone = [peer for peer in peers if peer.name in ("stock pair", "Starlette", "our server")]
        found["open"] = open_loops(alone, capacity, (0.25, 0.5, 0.75), seconds, repetitions)
    finally:
        for peer in peers:
            peer.client.close()
        for server in (stock, ours, starlette):
            server.close()
    found["inversions"] = our_order(python)
    found["overload"] = overload(wallets, python, False, 2 * seconds, repetitions)
    found["overload_rising"] = overload(wallets, python, True, 2 * seconds, repetitions)
    found["held"] = held(wallets, python, 2 * seconds, repetitions, ramp=2.0 if options.quick else 20.0)
    summarize(found)
    found["seconds"], found["quick"] = time.time() - started, options.quick
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="keep the figures in this file (bench/results/miner.json for the docs)")
    parser.add_argument("--quick", action="store_true", help="once and for half a second each: does it run?")
    parser.add_argument("--stock-python", default=str(HERE.parent / ".venv-legacy" / "bin" / "python"),
                        help="python with bittensor 10.5.0; `make test-legacy` makes it (default: %(default)s)")
    options = parser.parse_args()
    if not Path(options.stock_python).exists():
        parser.error(f"{options.stock_python} is not there: `make bench-miner` makes it, or name one with --stock-python")
    found = run(options)
    report(found)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
