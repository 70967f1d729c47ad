"""What encoding costs a gate: one message, a repeated one, many of mixed length, and what less precision does.

    python bench/gate_latency.py [--json FILE] [--quick]

All-MiniLM-L6-v2 on two threads, a gate of 4096 uids. The 64 messages have lengths like those of prompts that people write:
log-normal, half of them under 23 tokens, one in twenty over 100, none over 256 (so that every side encodes the whole of
each). Two other mixes show what is left of the gain where lengths do not differ much. What is compared takes turns, and
a ratio is the median over draws of messages. `sentence-transformers` sorts by length too and then pads to the longest of
each batch; it runs with its default batch size and with whichever size turns out best for the draw.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import sentence_transformers
import torch
import torch.nn.functional as F
from machine import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModel

from prompting_nb.encoding.encoder import EmbeddingCache, Encoder
from prompting_nb.encoding.weights import PRECISIONS
from prompting_nb.pretrained import MINILM, load, minilm_path, no_bars
from prompting_nb.validators.gating import SentenceEmbedGatingModel

THREADS, UIDS, MESSAGES = 2, 4096, 64
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)  # of sentence-transformers; 32 is its default
WORDS = """how many miles are in a list of words about the river and what day does this story convert to python code write
explain reverse cook bread with honey for city visit answer name age short long history trade law music plan email team
summary why would someone like more time than money please give me three good reasons and one bad example of each""".split()
MIXES = {  # words in a message
    "skewed": lambda dice: int(min(240, max(4, dice.lognormvariate(math.log(22), 0.95)))),
    "equal": lambda dice: 32,
    "long": lambda dice: dice.randint(120, 240),
}


def draw(seed: int, mix: str = "skewed") -> list[str]:
    "Messages of mixed length."
    dice = random.Random(f"{seed} {mix}")
    return [" ".join(dice.choices(WORDS, k=MIXES[mix](dice))) for _ in range(MESSAGES)]


def seconds(work: dict, rounds: int) -> dict:
    "Median time of each of several functions that take turns, after one turn that does not count."
    taken = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            taken[name] += [time.perf_counter() - start] * (turn > 0)
    return {name: statistics.median(times) for name, times in taken.items()}


def subjects() -> dict:
    "Everything that is compared; none of the encoders remembers anything."
    encoders = {precision: Encoder(MINILM, cache_size=0, precision=precision) for precision in PRECISIONS}
    with no_bars():
        peer = sentence_transformers.SentenceTransformer(minilm_path(), device="cpu")
        plain = load(AutoModel.from_pretrained, MINILM).eval().requires_grad_(False)
    torch.manual_seed(0)
    gate = SentenceEmbedGatingModel(SimpleNamespace(hotkeys=range(UIDS)), model_name=MINILM, num_uids=UIDS)
    return {"encoders": encoders, "peer": peer, "plain": plain, "gate": gate}


def one_message(gate, plain, messages: list[str], rounds: int) -> dict:
    """A gate's `forward` beside the forward of its encoder alone, which gets its tokens ready made; and a repeated message.

    The encoder alone is the model as transformers loads and runs it. `forward_vs_own_encoder` is stricter: beside the same
    model with the faster layers that the gate gave it, where tokens, pooling and a cold head of 4096 rows weigh more.
    """
    gate.encoder.cache = EmbeddingCache(0)
    rows = []
    for message in messages:
        tokens = gate.encoder.tokenizer(message, return_tensors="pt")
        with torch.inference_mode():
            # Weights that others just pushed out of the processor's cache would be charged to whoever comes next, so
            # only those take turns that use the same ones.
            found = seconds({"gate": lambda: gate(message), "encoder": lambda: gate.encoder.model(**tokens)}, rounds)
            found |= seconds({"transformers": lambda: plain(**tokens)}, rounds)
        rows.append(found)
    gate.encoder.cache = EmbeddingCache(1024)
    repeated = seconds({"repeat": lambda: gate(messages[0])}, 200)["repeat"]
    median = statistics.median
    return {
        "forward_vs_encoder": median(row["gate"] / row["transformers"] for row in rows),
        "forward_vs_own_encoder": median(row["gate"] / row["encoder"] for row in rows),
        "forward_ms": 1e3 * median(row["gate"] for row in rows),
        "encoder_ms": 1e3 * median(row["encoder"] for row in rows),
        "transformers_ms": 1e3 * median(row["transformers"] for row in rows),
        "repeat_us": 1e6 * repeated,
    }


def many_messages(encoders: dict, peer, messages: list[str], rounds: int) -> dict:
    "Seconds for all messages: one at a time, at once in each precision, and sentence-transformers in several batch sizes."
    work = {"one by one": lambda: [encoders["float32"](message) for message in messages],
            **{name: lambda encoder=encoder: encoder(messages) for name, encoder in encoders.items()},
            **{size: lambda size=size: peer.encode(messages, batch_size=size, convert_to_tensor=True,
                                                   show_progress_bar=False) for size in BATCH_SIZES}}
    taken = seconds(work, rounds)
    same = F.cosine_similarity(encoders["float32"](messages), work[32]()).min().item()
    assert same > 0.99999, f"both should compute the same embeddings, the worst cosine is {same}"
    return taken


def closeness(encoders: dict, gate, messages: list[str]) -> dict:
    "How near the scores of a gate at its start are to those in float32: the starting rows have the narrowest gaps."
    found, exact = {}, encoders["float32"](messages)
    for name in ("bfloat16", "int8"):
        vectors = encoders[name](messages)
        for uids in (256, UIDS):
            here, there = (v @ gate.head.weight.detach()[:uids].T for v in (vectors, exact))  # (messages, uids)
            ten = [set(scores.topk(10).indices.tolist()) for scores in (*here, *there)]
            common = [len(a & b) / 10 for a, b in zip(ten, ten[len(messages):])]
            found |= {f"{name}_top10_{uids}": statistics.mean(common),
                      f"{name}_cosine_{uids}": F.cosine_similarity(here, there).mean().item(),
                      f"{name}_cosine_worst_{uids}": F.cosine_similarity(here, there).min().item()}
    return found


def memory(encoders: dict, gate) -> dict:
    "Megabytes (10^6 bytes) of what a gate holds."
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors) / 1e6
    scores = gate(draw(0)[0])
    gate.backward(scores, torch.rand(UIDS))
    state = [v for values in gate.optimizer.state.values() for v in values.values() if torch.is_tensor(v)]
    return {"encoder_float32": size(encoders["float32"].model.parameters()),
            "encoder_bfloat16": size(encoders["bfloat16"].model.parameters()),
            f"head_{UIDS}": size(gate.head.parameters()), f"sgd_state_{UIDS}": size(state),
            "cache_1024": 1024 * (gate.encoder.hidden_size * 4 + 16) / 1e6}


def measure(
    progress: bool = True,  # bars on stderr
    quick: bool = False,  # fewer draws and rounds, for a look
) -> dict:  # plain numbers; times in the unit of their names, ratios above 1 where the first is faster
    """Measure all of it, in a process of its own.

    How threads wait for each other is settled when a process first loads torch. `OMP_WAIT_POLICY=PASSIVE`, right for
    tests that share a machine, makes two threads on one small matrix slower and would flatter us: it is taken away.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "latency.json"
        command = [sys.executable, __file__, "--json", str(file), "--here", *["--quick"] * quick, *["--quiet"] * (not progress)]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment | {"OMP_NUM_THREADS": str(THREADS)})
        return json.loads(file.read_text())


def measure_here(progress: bool, quick: bool) -> dict:
    "What `measure` returns, in this process."
    draws, rounds = (2, 1) if quick else (5, 3)
    torch.set_num_threads(THREADS)
    things = subjects()
    encoders, peer = things["encoders"], things["peer"]
    result = one_message(things["gate"], things["plain"], draw(0)[:8 if quick else 32], 3 if quick else 9)
    jobs = [(mix, seed) for mix in MIXES for seed in range(draws if mix == "skewed" else 1)]
    taken = {mix: [] for mix in MIXES}
    for mix, seed in track(jobs, "encoding messages", console=Console(stderr=True), disable=not progress):
        taken[mix].append(many_messages(encoders, peer, draw(seed, mix), rounds))
    result["mixes"] = {mix: _ratios(rows) for mix, rows in taken.items()}
    result |= result["mixes"]["skewed"]
    result |= closeness(encoders, things["gate"], sum((draw(seed) for seed in range(draws)), []))
    lengths = [len(ids) for ids in encoders["float32"].tokenizer(draw(0))["input_ids"]]
    return result | {"memory_mb": memory(encoders, things["gate"]), "threads": THREADS, "num_uids": UIDS,
                     "messages": MESSAGES, "tokens": sorted(lengths), "draws": draws,
                     "machine": {**machine("torch", "transformers", "sentence-transformers"), "instructions": instructions()}}


def _ratios(rows: list[dict]) -> dict:
    "Ratios of rates, medians over draws, and the rates themselves in messages a second."
    ratio = lambda slow, fast: statistics.median(slow(row) / fast(row) for row in rows)
    one, best = (lambda row: row["one by one"]), (lambda row: min(row[size] for size in BATCH_SIZES))
    of = lambda name: (lambda row: row[name])
    return {
        "batch_vs_one_by_one": ratio(one, of("float32")),
        "batch_bf16_vs_one_by_one": ratio(one, of("bfloat16")),
        "batch_int8_vs_one_by_one": ratio(one, of("int8")),
        "batch_vs_sentence_transformers": ratio(of(32), of("float32")),
        "batch_vs_sentence_transformers_best": ratio(best, of("float32")),
        "batch_bf16_vs_sentence_transformers_best": ratio(best, of("bfloat16")),
        "sentence_transformers_best_size": statistics.mode(min(BATCH_SIZES, key=row.get) for row in rows),
        "rates": {str(name): MESSAGES / statistics.median(row[name] for row in rows) for name in rows[0]},
    }


def instructions() -> list:
    "What the processor has for bfloat16 and int8, as far as torch tells it."
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [name for name in ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16") if found.get(name)]


def show(result: dict, console: Console) -> None:
    "The tables."
    table = Table("one message, 4096 uids", "ms", title="One message", title_justify="left")
    for text, key in (("forward of a gate", "forward_ms"), ("the encoder alone, as transformers runs it", "transformers_ms"),
                      ("the encoder alone, with the gate's faster layers", "encoder_ms")):
        table.add_row(text, f"{result[key]:.2f}")
    table.add_row("a repeated message", f"{result['repeat_us'] / 1e3:.3f}")
    table.add_row("forward / encoder as transformers runs it", f"x {result['forward_vs_encoder']:.2f}")
    table.add_row("forward / encoder with faster layers", f"x {result['forward_vs_own_encoder']:.2f}")
    console.print(table)
    table = Table("messages a second", *result["mixes"], title=f"{MESSAGES} messages", title_justify="left")
    names = {"one by one": "one at a time, float32", **{p: f"at once, {p}" for p in PRECISIONS},
             **{str(size): f"sentence-transformers, batch size {size}" for size in BATCH_SIZES}}
    for key, text in names.items():
        table.add_row(text, *(f"{mix['rates'][key]:.0f}" for mix in result["mixes"].values()))
    for key, text in (("batch_vs_one_by_one", "at once / one at a time"),
                      ("batch_bf16_vs_one_by_one", "bfloat16 at once / float32 one at a time"),
                      ("batch_vs_sentence_transformers", "at once / sentence-transformers, size 32"),
                      ("batch_vs_sentence_transformers_best", "at once / sentence-transformers, best size")):
        table.add_row(text, *(f"x {mix[key]:.2f}" for mix in result["mixes"].values()))
    console.print(table)
    table = Table("scores beside float32", "cosine", "worst", "ten best in common", title="Precision", title_justify="left")
    for name in ("bfloat16", "int8"):
        for uids in (256, UIDS):
            table.add_row(f"{name}, {uids} uids", *(f"{result[f'{name}_{what}_{uids}']:.5f}"
                                                    for what in ("cosine", "cosine_worst", "top10")))
    console.print(table)
    table = Table("memory", "MB", title="Memory", title_justify="left")
    for name, value in result["memory_mb"].items():
        table.add_row(name.replace("_", " "), f"{value:.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    parser.add_argument("--quick", action="store_true", help="fewer draws and rounds: a look, not a measurement")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the process that `measure` starts
    args = parser.parse_args()
    result = (measure_here if args.here else measure)(not args.quiet, args.quick)
    console = Console()
    console.print(*(f"{name} {value}" for name, value in result["machine"].items()), sep=", ")
    show(result, console)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
