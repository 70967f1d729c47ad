"""The stock server and client of bittensor 10.5.0, each as a process that bench/miner.py speaks to in lines of JSON.

Runs in the environment of `make test-legacy`. uvloop and httptools are used on both sides where the stock code lets
them be used, which makes it a little faster than as installed.
"""

import asyncio
import json
import random
import socket
import sys
import time
from types import SimpleNamespace
from typing import Tuple

import uvloop

OUT, sys.stdout = sys.stdout, sys.stderr  # bittensor writes its log to stdout
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # the stock server takes its loop from the policy

import bittensor as bt
from reference import Prompting, keypair  # tests/legacy, on PYTHONPATH

bt.logging.off()
SERVER, CLIENT = keypair("bench server"), keypair("bench client")
ANSWER = "The meaning of life is a question that every generation asks anew, and answers in its own way. ".ljust(100) * 15
CALLERS = [keypair(f"caller {number}") for number in range(64)]  # of rising stake


def serve() -> None:
    "A stock Axon with blacklist and priority functions as its documentation shows them, on a free port."
    wallet = SimpleNamespace(hotkey=SERVER, coldkeypub=SERVER)
    stakes = {CLIENT.ss58_address: 1.0, **{key.ss58_address: float(number) for number, key in enumerate(CALLERS)}}
    served = []

    async def forward(synapse: Prompting) -> Prompting:
        served.append(synapse.messages[-1])
        if synapse.messages[-1].startswith("Order"):
            time.sleep(0.005)  # one at a time, as a model would
        elif synapse.messages[-1].startswith("Hold"):
            time.sleep(1.0)  # all others wait for it
        synapse.completion = ANSWER
        return synapse

    def blacklist(synapse: Prompting) -> Tuple[bool, str]:
        return synapse.dendrite.hotkey not in stakes, "registered"

    def priority(synapse: Prompting) -> float:
        return stakes[synapse.dendrite.hotkey]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    axon = bt.Axon(wallet=wallet, ip="127.0.0.1", port=port, external_ip="127.0.0.1", max_workers=16)
    axon.attach(forward_fn=forward, blacklist_fn=blacklist, priority_fn=priority)
    axon.start()
    while not axon.fast_server.started:
        time.sleep(0.01)
    print(json.dumps({"port": port, "hotkey": SERVER.ss58_address}), file=OUT, flush=True)
    for _ in sys.stdin:
        print(json.dumps({"cpu": time.process_time(), "served": list(served)}), file=OUT, flush=True)
        served.clear()
    axon.stop()


class Asker:
    "A stock Dendrite that asks one server."

    def __init__(self, port: int, hotkey: str):
        self.dendrite = bt.Dendrite(CLIENT)
        self.target = bt.AxonInfo(version=0, ip="127.0.0.1", port=port, ip_type=4, hotkey=hotkey, coldkey=hotkey)
        self.number = 0

    async def one(self, begin: float) -> tuple[float, int]:
        "Seconds since `begin`, and the status."
        self.number += 1
        text = f"Question {self.number}: what is the meaning of life? ".ljust(300, "?")
        question = Prompting(roles=["user"], messages=[text])
        answer = await self.dendrite(self.target, question, timeout=10.0, deserialize=False)
        return time.perf_counter() - begin, int(answer.dendrite.status_code or 0)

    async def closed(self, at_a_time: int, seconds: float) -> list:
        "`at_a_time` callers, each asks again when it has its answer."
        end, seen = time.perf_counter() + seconds, []

        async def caller():
            while (now := time.perf_counter()) < end:
                seen.append(await self.one(now))

        await asyncio.gather(*(caller() for _ in range(at_a_time)))
        return seen

    async def order(self) -> list:
        "Every caller asks once, in random order, while one request holds the server."
        async def one(number):
            async with bt.Dendrite(CALLERS[number]) as dendrite:
                question = Prompting(roles=["user"], messages=[f"Order {number}"])
                answer = await dendrite(self.target, question, timeout=30.0, deserialize=False)
                return 0.0, int(answer.dendrite.status_code or 0)

        async def hold():
            question = Prompting(roles=["user"], messages=["Hold"])
            await self.dendrite(self.target, question, timeout=30.0, deserialize=False)

        numbers = random.sample(range(len(CALLERS)), len(CALLERS))
        held = asyncio.ensure_future(hold())
        await asyncio.sleep(0.1)  # of the second that it holds
        answers = await asyncio.gather(*(one(number) for number in numbers))
        await held
        return answers

    async def open(self, gaps: list) -> list:
        "One request after each gap in seconds, whatever became of those before it."
        due, asked = time.perf_counter(), []
        for gap in gaps:
            due += gap
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asked.append(asyncio.ensure_future(self.one(due)))
        return await asyncio.gather(*asked)


async def ask(port: int, hotkey: str) -> None:
    "Jobs come in as lines of JSON, what was measured goes out likewise."
    asker, loop = Asker(port, hotkey), asyncio.get_running_loop()
    async with asker.dendrite:
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            job = json.loads(line)
            asker.dendrite.synapse_history.clear()  # grows for ever otherwise
            begin, cpu = time.perf_counter(), time.process_time()
            if "gaps" in job:
                seen = await asker.open(job["gaps"])
            elif "order" in job:
                seen = await asker.order()
            else:
                seen = await asker.closed(job["at_a_time"], job["seconds"])
            wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
            print(json.dumps({"seen": seen, "wall": wall, "cpu": cpu}), file=OUT, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        asyncio.run(ask(int(sys.argv[2]), sys.argv[3]))
