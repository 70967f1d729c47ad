"""The servers that bench/miner.py measures, each in a process of its own: `miner_servers.py KIND`, settings as JSON.

A line with port and hotkey says that it serves; each line on stdin is answered with the state of the server; the end of
stdin ends it.
"""

import asyncio
import json
import logging
import resource
import sys
import time

from prompting_nb.baseminer.miner import Miner
from prompting_nb.config import add_argument, read_config
from prompting_nb.network.axon import Axon
from prompting_nb.network.chain import EmbeddedChain, make_wallet
from prompting_nb.network.server import Limits, freeze_loaded, open_files
from prompting_nb.protocol import Prompting

ANSWER = "The meaning of life is a question that every generation asks anew, and answers in its own way. ".ljust(100) * 15
LONG = ANSWER * 350  # 525 kB, of which a slow reader's system takes little


def question(number: int) -> str:
    "A prompt of 300 characters, another for each number."
    return f"Question {number}: what is the meaning of life? ".ljust(300, "?")


POLICY = {  # everything on
    "miner.blacklist.quota": 100_000, "miner.blacklist.use_prompt_cache": True,
    "miner.blacklist.force_validator_permit": True, "miner.blacklist.minimum_stake_requirement": 1.0,
    "miner.no_set_weights": True, "miner.poll_interval": 60.0,
}


class BenchMiner(Miner):
    """Answers at once, or after `--bench.seconds` of doing nothing.

    After a second where it is asked to hold, and at length where it is asked for a long answer.
    """

    @classmethod
    def add_args(cls, parser):
        add_argument(parser, "--bench.seconds", type=float, default=0.0)

    @classmethod
    def config(cls):
        return read_config(cls.add_args, argv=[])

    async def prompt(self, synapse: Prompting) -> Prompting:
        served.append(text := synapse.prompt)
        seconds = 1.0 if text.startswith("Hold") else self.config.bench.seconds
        if seconds:
            await asyncio.sleep(seconds)
        synapse.completion = LONG if text.startswith("Long") else ANSWER
        return synapse


served = []  # prompts in the order in which they were begun


def raise_open_files() -> int:
    "Let this process open as many files as the system allows; how many connections that makes."
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return open_files()


def make_miner(settings: dict) -> BenchMiner:
    "A miner on a subnet of `hotkeys` validators, with `rising` stakes in the order of their numbers or all the same."
    chain, wallet, rising = EmbeddedChain(max_uids=8192), make_wallet("bench miner"), settings.get("rising", True)
    chain.register(wallet)
    for number in range(settings.get("hotkeys", 4095)):
        chain.register(make_wallet(f"caller {number}"), stake=1.0 + number * rising, validator_permit=True)
    limits = {name: settings[name] for name in ("workers", "max_queue") if name in settings}
    if "connections" in settings:
        limits["limits"] = Limits(max_connections=settings["connections"])
    return BenchMiner({**POLICY, "bench.seconds": settings.get("seconds", 0.0),
                       "miner.priority.idle_factor": float(rising)}, Axon(wallet, **limits), wallet,
                      chain.client())


def ours(settings: dict) -> None:
    "Our miner: signatures, blacklist, rate limit, priority, cache, both generations, signed answers."
    logging.disable()
    files = raise_open_files()
    if "connections" in settings:
        settings["connections"] = min(settings["connections"], files)
    with make_miner(settings) as miner:
        freeze_loaded()  # as `prompting-nb miner` does
        print(json.dumps({"port": miner.axon.port, "hotkey": miner.hotkey, **settings}), flush=True)
        for _ in sys.stdin:
            state = {"cpu": time.process_time(), "served": list(served), "closed": closed_by_limits(miner)}
            print(json.dumps(state), flush=True)
            served.clear()


def closed_by_limits(miner: Miner) -> dict:
    "How many connections each limit of the server has closed."
    samples = [sample for metric in miner.axon.metrics.connections.collect() for sample in metric.samples]
    return {sample.labels["reason"]: int(sample.value) for sample in samples if sample.name.endswith("_total")}


def starlette(settings: dict) -> None:
    "Starlette with the same JSON and nothing else, on uvicorn with uvloop and httptools."
    import threading

    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def prompt(request):
        asked = await request.json()
        assert asked["messages"] and asked["roles"]
        return JSONResponse({"completion": ANSWER})

    app = Starlette(routes=[Route("/Prompting", prompt, methods=["POST"])])
    config = uvicorn.Config(app, port=0, http="httptools", loop="uvloop", ws="none", lifespan="off", log_config=None,
                            access_log=False, server_header=False, date_header=False)
    server = uvicorn.Server(config)

    def talk():
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        print(json.dumps({"port": port, "hotkey": None}), flush=True)
        for _ in sys.stdin:
            print(json.dumps({"cpu": time.process_time()}), flush=True)
        server.should_exit = True

    threading.Thread(target=talk, daemon=True).start()
    server.run()


if __name__ == "__main__":
    {"ours": ours, "starlette": starlette}[sys.argv[1]](json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
