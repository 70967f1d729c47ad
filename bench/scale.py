"""How the parts of a validator grow: from 64 to 4096 uids, and from 1 to 256 prompts at once.

    python bench/scale.py                    all rows: minutes
    python bench/scale.py --quick            fewer rounds, 1 and 16 prompts at once
    python bench/scale.py --json FILE        write the numbers as well
    python bench/scale.py --real-up-to 0     no miners at all: every row uses stub answers

A row asks k = 64 uids for each prompt. Up to `--real-up-to` uids every miner is a real one behind HTTP on loopback, with
signed requests, in processes of up to 256 miners that share the processor with the validator (`loop.crowd`). Above, this
machine cannot hold them: answers are made up on the spot, and such a row says `stub`; its steps leave out HTTP, and
everything else is measured as in the others. The judge takes no time. Of several prompts at once, at most 16 are on the way
(1024 requests) and the others wait: a signature is good for ten seconds, and requests that wait longer on a busy machine
are refused.

The parts, each alone and warm: reading the metagraph, following a change of it (resync), choosing, the gate's forward pass
for a known prompt and its backward pass, weights from averages to the chain, one event as JSON, and the memory that the
row adds to a process that has loaded everything.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from machine import Neighbours, machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from prompting_nb.loop.crowd import Crowd
from prompting_nb.network.chain import EmbeddedChain, Neuron, make_wallet
from prompting_nb.protocol import Prompting
from prompting_nb.validators.validator import Policy, Validator, default_gate

K, UIDS, AT_ONCE = 64, (64, 256, 1024, 4096), (1, 16, 64, 256)
IN_FLIGHT = 16  # prompts whose requests are on the way
PARTS = ("metagraph_ms", "resync_ms", "choose_ms", "gate_forward_ms", "gate_backward_ms", "weights_ms", "event_bytes", "memory_mb")
SLOPE = 1.1  # log-log, from 256 to 4096 uids; 1 is linear


class Stub:
    "Answers at once, in place of a dendrite and all miners."

    def query(self, targets, synapse, timeout=None):
        answers = []
        for _ in targets:
            answer = Prompting.ask("What is 6 times 7?")
            answer.completion = "42"
            answer.dendrite.status_code, answer.dendrite.process_time = 200, 0.001
            answers.append(answer)
        return answers

    def close(self):
        pass


@contextmanager
def network(uids: int, real: bool):
    "A chain of so many miners: wallet of the validator, and client."
    if real:
        with Crowd(uids, kinds=["calculator"], timeout=600) as crowd:
            yield crowd.wallet, crowd.client
        return
    chain, wallet = EmbeddedChain(max_uids=uids + 1), make_wallet("validator")
    chain.register(wallet, stake=1000.0, validator_permit=True)
    address = dict(ip=2130706433, port=9, ip_type=4, protocol=4, version=1)
    keys = [make_wallet(number).hotkey.ss58_address for number in range(uids)]
    with chain.subnet.change():
        chain.subnet.put([*chain.subnet.neurons, *(Neuron(key, key, axon=address) for key in keys)])
    client = chain.client()
    yield wallet, client
    client.close()


def ms(work, rounds: int) -> float:
    "Median milliseconds of a call, after one that does not count."
    taken = []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[1:])


def judge(prompt, completions):
    return torch.tensor([0.5 + 0.4 * math.sin(i) if text else 0.0 for i, text in enumerate(completions)])


def at_once(validator, prompts: list, pool) -> float:
    "Seconds for several prompts: chosen one by one, asked all at once, learned one by one."
    start = time.perf_counter()
    rounds = [validator.route(prompt) for prompt in prompts]
    list(pool.map(validator.ask, rounds))
    for round in rounds:
        validator.learn(round)
    failed = sum(text is None for round in rounds for text in round.completions)
    if failed:
        raise RuntimeError(f"{failed} of {len(rounds) * K} requests failed: the figures would not mean what they say")
    return time.perf_counter() - start


def row(uids: int, real: bool, quick: bool) -> dict:
    "Measure one row, in this process."
    torch.set_num_threads(1)
    rounds, process = (3 if quick else 15), psutil.Process()
    default_gate(type("", (), {"hotkeys": ["a"]})())("loads the encoder")
    before = process.memory_info().rss
    with network(uids, real) as (wallet, client), ThreadPoolExecutor(IN_FLIGHT) as pool:
        policy = Policy(k=K, timeout=120.0)
        with Validator(wallet, client, judge, None, policy, 1, 0, allow_private=True) as validator:
            if not real:
                validator.dendrite.close()
                validator.dendrite = Stub()
            prompt = "How many miles are 12 km?"
            for _ in range(3 if quick else 2 + -(-uids // K)):  # everybody was asked, as in a validator that has run for a while
                event = validator.step(prompt)
            found = {"uids": uids, "k": K, "answers": "http" if real else "stub", "step_ms": ms(lambda: validator.step(prompt), rounds)}
            scores, sd = validator.gate.posterior(prompt)
            asked = torch.tensor(event.uids)
            rewards = torch.rand(K, generator=torch.Generator().manual_seed(0))
            fresh = lambda: validator.gate.backward(validator.gate(prompt)[asked], rewards)
            forward = ms(lambda: validator.gate(prompt), rounds)
            found |= {
                "metagraph_ms": ms(lambda: client.subnets.metagraph(1), rounds),
                "resync_ms": ms(lambda: validator.sync(validator.metagraph), rounds),
                "choose_ms": ms(lambda: validator.choose(scores, sd), rounds),
                "gate_forward_ms": forward,
                "gate_backward_ms": max(ms(fresh, rounds) - forward, 0.0),
                "weights_ms": ms(lambda: validator.set_weights(), rounds),
                "event_bytes": len(event.to_json().encode()),
                "memory_mb": (process.memory_info().rss - before) / 1e6,
            }
            sizes = AT_ONCE[:2] if quick else AT_ONCE
            text = lambda p: f"What is {p} times 7?"
            at_once(validator, [text(p) for p in range(sizes[-1])], pool)  # connections are open, and prompts encoded
            found["at_once"] = {str(size): at_once(validator, [text(p) for p in range(size)], pool) for size in sizes}
            if real:
                miners = [p for p in process.children(recursive=True)]
                found["miner_processes"] = len(miners)
                found["miners_mb"] = sum(p.memory_info().rss for p in miners) / 1e6
    return found


def measure(progress: bool = True, quick: bool = False, real_up_to: int = 1024, uids=UIDS) -> dict:
    "Measure all rows, each in a process of its own."
    rows, neighbours = [], Neighbours()
    for n in track(uids, "rows", console=Console(stderr=True), disable=not progress):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "row.json"
            command = [sys.executable, __file__, "--row", str(n), "--json", str(file), "--real-up-to", str(real_up_to)]
            subprocess.run([*command, *["--quick"] * quick], check=True, stdout=subprocess.DEVNULL)
            rows.append(json.loads(file.read_text()))
    found = {"k": K, "quick": quick, "neighbours": neighbours.cores(), "rows": rows, "growth": growth(rows),
             "machine": machine("torch", "bittensor")}
    steps = {r["uids"]: (r["answers"], r["step_ms"]) for r in rows}
    # stub answers and real ones do not compare
    if {256, 1024} <= steps.keys() and steps[256][0] == steps[1024][0]:
        found["step_1024_to_256"] = steps[1024][1] / steps[256][1]
    return found


def growth(rows: list) -> dict:
    "The slope of each part in a log-log plot over the rows from 256 uids on: 1 is linear, 0 is constant."
    kept = [r for r in rows if r["uids"] >= 256] or rows
    first, last = kept[0], kept[-1]
    if first is last:
        return {}
    span = math.log(last["uids"] / first["uids"])
    return {part: math.log(max(last[part], 1e-3) / max(first[part], 1e-3)) / span for part in PARTS}


def show(found: dict, console: Console) -> None:
    "The tables."
    rows = found["rows"]
    table = Table("", *(f"{r['uids']} uids" for r in rows), "slope", title=f"k = {found['k']} asked", title_justify="left")
    table.add_row("answers", *(r["answers"] for r in rows))
    for part in ("step_ms", *PARTS):
        slope = found["growth"].get(part)
        table.add_row(part.replace("_", " "), *(f"{r[part]:,.2f}" for r in rows), "" if slope is None else f"{slope:.2f}")
    console.print(table)
    table = Table("prompts at once", *(f"{r['uids']} uids, {r['answers']}" for r in rows), title="ms for a prompt", title_justify="left")
    for size in rows[0]["at_once"]:
        table.add_row(size, *(f"{1e3 * r['at_once'][size] / int(size):,.1f}" for r in rows))
    console.print(table)
    for part, slope in found["growth"].items():
        if slope > SLOPE:
            console.print(f"{part} grows faster than the number of uids: slope {slope:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and prompts: a look, not a measurement")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--real-up-to", type=int, default=1024, metavar="UIDS", help="rows above have stub answers (default: 1024)")
    parser.add_argument("--uids", type=int, nargs="+", default=UIDS, help="the rows")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)  # the process that `measure` starts
    args = parser.parse_args()
    if args.row:
        args.json.write_text(json.dumps(row(args.row, args.row <= args.real_up_to, args.quick)))
        return
    found = measure(not args.quiet, args.quick, args.real_up_to, args.uids)
    show(found, Console())
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
