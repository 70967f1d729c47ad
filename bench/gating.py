"""How well and how fast gates learn whom to ask.

1. Synthetic subnet (64 and 256 uids): the Bayesian gate beside LinUCB, LinTS, kNN-40, the best fixed choice, the old
   gate and the documented default. Prompts are made from templates on which nothing was tuned.
2. Recorded models: learned online from four fifths of the prompts, frozen, judged on the last fifth.
3. Subnets that change, judges that err, copies (gate_scenarios.py), and how long a validator takes to choose; the loop on
   tables (gate_loop.py): recorded models with the rewards of a fitted head, and the built-in tasks.
4. Costs: a learning step and a posterior at 4096 uids, memory; and those of bench/gate_latency.py.

The recorded scores are not part of the project: --scores says where prompts-scores.csv.gz lies. Without the file
part 2 and the recorded loop are left out. In full 36 minutes of processor time, on two cores.

Where constants come from: those of the peers (TUNED) were chosen with --tune, which has seeds 900 and 901 and templates of its
own. The half-life of part 3 was first tried on seeds 900 to 904 and the same templates; 1500 instead of 2000 was settled after two
of the reported seeds had been seen. In part 2 every peer chooses on a fifth of its training prompts. What is reported has seeds 0
to 19 (0 to 9 in part 3) and templates on which nothing else was chosen.

The twenty divisions of part 2 divide the same prompts and overlap, so intervals over them are too narrow.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table as RichTable
from tqdm.auto import tqdm

import gate_learning as learning
import gate_loop
import gate_recorded as recorded
import gate_scenarios as scenarios
from machine import Neighbours, machine
from prompting_nb.validators.bayes import BayesianGatingModel
from prompting_nb.validators.gating import SentenceEmbedGatingModel
from prompting_nb.validators.selection import gumbel_top_k, select, thompson

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("synthetic", "recorded", "scenarios", "loop", "costs", "latency")
SCORES = ROOT.parent / "shared/data/alpacaeval/prompts-scores.csv.gz"

# The settings of the peers: those that closed most of the gap in `--tune`, on average before and after the replacement.
METHODS = {
    "ours": lambda s, x, known: learning.Ours(s, x),
    "LinUCB": lambda s, x, known: learning.Linear(s, x, known, "ucb", **TUNED[s.n]["LinUCB"]),
    "LinTS": lambda s, x, known: learning.Linear(s, x, known, "ts", **TUNED[s.n]["LinTS"]),
    "kNN-40": lambda s, x, known: learning.Nearest(s, x, **TUNED[s.n]["kNN-40"]),
    "documented default": lambda s, x, known: learning.Documented(s, x, accumulate=False),
    "old gate": lambda s, x, known: learning.Documented(s, x, accumulate=True),
}
PEERS = ("LinUCB", "LinTS", "kNN-40", "best fixed")
TUNED = {
    64: {"LinUCB": dict(width=1.0, ridge=0.003), "LinTS": dict(width=0.45), "kNN-40": dict(share=0.005, steps=2000)},
    256: {"LinUCB": dict(width=1.0, ridge=0.003), "LinTS": dict(width=0.6, ridge=0.001),
          "kNN-40": dict(share=0.001, steps=2000)},
}
TUNING_SEEDS = [900, 901]
RIDGES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 2.0, 4.0, 8.0)  # beside 1.0, which the widths above them have
COMPONENTS = (8, 12, 24, 32)  # beside 16
# what `--tune` tries: every width and share, and beside the best of them every ridge and number of components
GRID = {
    "LinUCB": [dict(width=w) for w in (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)]
    + [dict(width=1.0, ridge=r) for r in RIDGES] + [dict(width=1.0, components=c) for c in COMPONENTS],
    "LinTS": [dict(width=w) for w in (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)]
    + [dict(width=0.6, ridge=r) for r in RIDGES] + [dict(width=0.6, components=c) for c in COMPONENTS],
    "kNN-40": [dict(share=e, steps=2000) for e in (0.001, 0.002, 0.005, 0.02)]
    + [dict(share=0.0, steps=s) for s in (150, 300, 600, 1000, 1500, 2000, 2500, 3000, 4000)],
}


def _simulate(job: tuple) -> tuple:
    "One method on some seeds: (n, name, seeds, curves (seeds, bins), closed before, closed after)."
    path, n, name, seeds, steps, settings = job
    torch.set_num_threads(1)
    x, known, topics = torch.load(path)
    subnet = learning.Subnet(n, seeds, topics, steps)
    if settings is not None:
        TUNED[n][name] = settings
    result = subnet.best_fixed() if name == "best fixed" else subnet.run(METHODS[name](subnet, x, known))
    return n, name, learning.curve(result), learning.closed(result, False), learning.closed(result, True)


def _split(job: tuple) -> dict:
    torch.set_num_threads(1)
    return recorded.one_split(*job)


def _mean(values: torch.Tensor) -> dict:
    "Mean, half the width of its 95 % interval over seeds, standard deviation, and the worst seed."
    return {"mean": values.mean().item(), "interval": 1.96 * values.std().item() / len(values) ** 0.5,
            "sd": values.std().item(), "worst": values.min().item(), "worst_seed": int(values.argmin())}


def synthetic(pool, quick: bool) -> dict:
    "Part 1."
    seeds = list(range(2 if quick else 20))
    steps = 600 if quick else learning.STEPS
    texts, x, topics = learning.embedded(report=True, per_topic=50 if quick else 400)
    _, known, _ = learning.embedded(report=False, per_topic=50 if quick else 100)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/prompts.pt"
        torch.save((x, known, topics), path)
        jobs = [(path, n, name, seeds[i::2], steps, None) for n in (256, 64) for name in [*METHODS, "best fixed"] for i in (0, 1)]
        done = list(tqdm(pool.map(_simulate, jobs), total=len(jobs), desc="simulated subnets"))
    out = {"steps": steps, "seeds": len(seeds), "bins": done[0][2].shape[1], "methods": {}}
    for n in (64, 256):
        for name in [*METHODS, "best fixed"]:
            parts = [part for part in done if part[:2] == (n, name)]
            curves, before, after = (torch.cat([part[i] for part in parts]) for i in (2, 3, 4))
            spread = 1.96 * curves.std(0) / len(curves) ** 0.5
            out["methods"].setdefault(name, {})[str(n)] = {
                "before": _mean(before), "after": _mean(after), "curve": curves.mean(0).tolist(), "band": spread.tolist()}
    return out


def tune(pool, path: str | None) -> None:
    "The best settings of the peers, on seeds and templates of their own; rows go into a file one by one, and are not repeated."
    file = Path(path) if path else None
    found = json.loads(file.read_text()) if file and file.is_file() else []
    known = {(row["uids"], row["method"], str(row["settings"])) for row in found}
    _, x, topics = learning.embedded(report=False)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/prompts.pt"
        torch.save((x, x, topics), path)
        jobs = [(path, n, name, TUNING_SEEDS, learning.STEPS, settings) for n in (64, 256)
                for name, grid in GRID.items() for settings in grid if (n, name, str(settings)) not in known]
        for job, (n, name, _, before, after) in zip(jobs, pool.map(_simulate, jobs)):
            print(n, name, job[-1], f"{before.mean():.3f} {after.mean():.3f}", flush=True)
            found.append({"uids": n, "method": name, "settings": job[-1], "before": before.tolist(), "after": after.tolist()})
            if file:
                file.write_text(json.dumps(found, indent=1) + "\n")


def on_records(pool, path: str, quick: bool) -> dict:
    "Part 2."
    models, _, x, scores = recorded.recorded(path)
    splits = list(tqdm(pool.map(_split, [(seed, x, scores) for seed in range(2 if quick else 20)]),
                       total=2 if quick else 20, desc="recorded models"))
    out = {"splits": len(splits), "models": len(models), "prompts": len(x), "methods": {}}
    ours = {k: torch.tensor([split["found"]["ours"][i] for split in splits]) for i, k in enumerate(("top1", "top3"))}
    for name in splits[0]["found"]:
        values = torch.tensor([split["found"][name] for split in splits])
        out["methods"][name] = {"top1": _mean(values[:, 0]), "top3": _mean(values[:, 1]),
                                "ours_minus_top1": _mean(ours["top1"] - values[:, 0]),
                                "ours_minus_top3": _mean(ours["top3"] - values[:, 1])}
    # how often each option of the grids was chosen
    out["chosen"] = {name: dict(Counter(str(split["chosen"][name]) for split in splits)) for name in splits[0]["chosen"]}
    prices = torch.tensor([recorded.price(model) for model in models])
    out["cost"] = {"single": [[float(p), float(q)] for p, q in zip(prices, scores.mean(0))], "routers": {}}
    for name in splits[0]["predicted"]:
        curves = [recorded.cost_curve(split["predicted"][name], scores[split["held"]], prices) for split in splits]
        points = torch.tensor([points for points, _ in curves]).mean(0)
        out["cost"]["routers"][name] = {"curve": points.tolist(), "aiq": _mean(torch.tensor([a for _, a in curves]))}
    return out


def _timed(work, rounds: int = 200) -> float:
    "Median milliseconds of a call."
    for _ in range(10):
        work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def costs(quick: bool) -> dict:
    "Part 4: milliseconds at 4096 uids, k = 10 asked."
    torch.set_num_threads(1)
    n, k, rounds, out = 4096, 10, 20 if quick else 300, {}
    metagraph = SimpleNamespace(hotkeys=[str(uid) for uid in range(n)])
    message, rewards = "How many miles are 12 km?", torch.rand(k)
    uids = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:k]
    for name, gating in (("sparse", dict(loss="reward_mse", optimizer="adagrad")), ("listwise", dict(loss="listwise", optimizer="adagrad")),
                         ("default", {})):
        gate = SentenceEmbedGatingModel(metagraph, {"gating": {"model_name": "minilm", **gating}}, num_uids=n)
        scores = gate(message)
        out[f"backward_{name}_ms"] = _timed(lambda: gate.backward(scores[uids], rewards), rounds)
    gate = BayesianGatingModel(metagraph, {"gating": {"model_name": "minilm"}}, num_uids=n)
    x = torch.nn.functional.normalize(torch.randn(2000, gate.encoder.hidden_size), dim=1)
    longest, learned = 0.0, []
    for step in range(400 if quick else 2000):
        asked = torch.randperm(n)[:k]
        start = time.perf_counter()
        gate.learn(x[step], asked, torch.rand(k))
        learned.append(1e3 * (time.perf_counter() - start))
    longest = max(learned)
    scores, sd = gate.posterior(message)
    generator = torch.Generator().manual_seed(0)
    out |= {
        "posterior_update_ms": statistics.median(learned), "posterior_update_mean_ms": statistics.mean(learned),
        "review_ms": longest, "posterior_read_ms": _timed(lambda: gate.posterior(message), rounds),
        "posterior_backward_ms": _timed(lambda: gate.backward(scores[uids], rewards), rounds),
        "thompson_ms": _timed(lambda: thompson(scores, sd, k, generator=generator), rounds // 4 + 1),
        "gumbel_ms": _timed(lambda: gumbel_top_k(scores, k, generator=generator), rounds // 4 + 1),
        "epsilon_ms": _timed(lambda: select(scores, k, generator=generator), rounds // 4 + 1),
        "bayes_mib": sum(t.numel() * t.element_size() for t in [*gate.parameters(), *gate.buffers()]
                         if t.shape[:1] == (n,)) / 2**20 + len(gate.memory) * 4 * gate.encoder.hidden_size / 2**20,
        "linear_mib": 2 * 4 * n * (gate.encoder.hidden_size + 1) / 2**20,
    }
    return out


def _keys(results: dict) -> dict:
    "The figures by which the bench is judged."
    keys, methods = {}, results["synthetic"]["methods"]
    for n in ("64", "256"):
        for when, name in (("before", ""), ("after", "_after_churn")):
            keys[f"gap_closed_{n}{name}"] = methods["ours"][n][when]["mean"]
            keys[f"gap_closed_best_peer_{n}{name}"] = max(methods[peer][n][when]["mean"] for peer in PEERS)
    if "recorded" in results:
        top1 = {name: method["top1"]["mean"] for name, method in results["recorded"]["methods"].items()}
        keys |= {"recorded_top1": top1["ours"], "recorded_top1_best_fixed": top1["best fixed"],
                 "recorded_top1_knn": max(top1["kNN"], top1["kNN-40"]),
                 "recorded_top1_best_peer": max(top1[name] for name in ("best fixed", "kNN", "kNN-40", "LinUCB", "LinTS"))}
    keys |= scenarios.keys(results["scenarios"])
    costs = results["costs"]
    keys |= {name: costs[name] for name in ("choose_ms_1024", "choose_ms_4096")}
    keys["backward_ms_4096"] = costs["backward_sparse_ms"]
    keys["posterior_ms_4096"] = costs["posterior_update_ms"] + costs["posterior_read_ms"]
    return keys | {key: value for key, value in results.get("latency", {}).items() if isinstance(value, (int, float))}


def _show(results: dict) -> None:
    console = Console()
    table = RichTable(title="share of the gap from random to oracle, last third (mean +- 95 %)")
    for column in ("method", "64", "64 after", "256", "256 after"):
        table.add_column(column)
    text = lambda cell: (f"{cell['mean']:.3f} +- {cell['interval']:.3f} (sd {cell['sd']:.3f}, "
                         f"worst {cell['worst']:.3f}, seed {cell['worst_seed']})")
    for name, by_size in results["synthetic"]["methods"].items():
        table.add_row(name, *(text(by_size[n][when]) for n in ("64", "256") for when in ("before", "after")))
    console.print(table)
    if "recorded" in results:
        table = RichTable(title="recorded models, held-out fifth: mean score (mean +- 95 %)")
        for column in ("method", "top 1", "top 3", "ours - it, top 1", "ours - it, top 3"):
            table.add_column(column)
        for name, cells in results["recorded"]["methods"].items():
            table.add_row(name, *(text(cells[c]) for c in ("top1", "top3", "ours_minus_top1", "ours_minus_top3")))
        console.print(table)
        console.print({name: text(router["aiq"]) for name, router in results["recorded"]["cost"]["routers"].items()})
    table = RichTable(title="scenarios, last third: share of the gap (copies: different answers of ten)")
    for column in ("scenario", "method", "mean +- 95 %", "sd", "worst"):
        table.add_column(column)
    for row in scenarios.table(results["scenarios"]):
        table.add_row(*row)
    console.print(table)
    console.print({name: round(value, 3) for name, value in results["costs"].items()})


def stopwatch():
    "Returns a function that gives the seconds since it was last called, and logs them."
    last = [time.perf_counter()]

    def lap() -> float:
        now = time.perf_counter()
        taken, last[0] = now - last[0], now
        print(f"{taken:.0f} seconds", file=sys.stderr, flush=True)
        return taken

    return lap


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="two seeds and few steps: does it run at all?")
    parser.add_argument("--scores", default=str(SCORES), help="prompts-scores.csv.gz (default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="print how the settings of the peers do, and stop; --json FILE keeps them")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="measure only these; other figures of --json FILE stay")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args()
    if set(args.parts) < set(PARTS) and not (args.json and Path(args.json).is_file()):
        parser.error("--parts needs --json FILE with the figures of an earlier run")
    torch.set_num_threads(1)
    with ProcessPoolExecutor(args.workers) as pool:
        if args.tune:
            tune(pool, args.json)
            return 0
        wanted, part = set(args.parts), stopwatch()
        results = json.loads(Path(args.json).read_text()) if wanted < set(PARTS) else {"seconds": {}}
        results["machine"] = machine("torch")
        if "synthetic" in wanted:
            results["synthetic"] = synthetic(pool, args.quick)
            results["seconds"]["synthetic"] = part()
        if "recorded" in wanted and Path(args.scores).is_file():
            results["recorded"] = on_records(pool, args.scores, args.quick)
            results["seconds"]["recorded"] = part()
        elif "recorded" in wanted:
            print(f"{args.scores} is not there: no recorded models. --scores FILE says where they are.", file=sys.stderr)
        if "scenarios" in wanted:
            with tempfile.TemporaryDirectory() as folder:
                results["scenarios"] = scenarios.scenarios(pool, folder, args.quick)
                results["seconds"]["scenarios"] = part()
    if "loop" in wanted:
        responses = str(Path(args.scores).with_name("prompts-responses.jsonl.gz"))
        results |= gate_loop.measure(responses, args.quick)
        results["seconds"]["loop"] = part()
    if "costs" in wanted:
        neighbours = Neighbours()
        results["costs"] = costs(args.quick)
        results["costs"] |= {f"choose_ms_{n}": scenarios.choose_ms(n) for n in (1024, 4096)}
        results["costs"]["neighbours"] = neighbours.cores()
        results["seconds"]["costs"] = part()
    if "latency" in wanted:
        try:
            import gate_latency
        except ImportError:
            print("bench/gate_latency.py is not there: no latencies of the encoder", file=sys.stderr)
        else:
            results["latency"] = gate_latency.measure(progress=True)
            results["seconds"]["latency"] = part()
    results |= _keys(results)
    _show(results)
    gate_loop.show(results, Console())
    print("seconds:", {name: round(seconds) for name, seconds in results["seconds"].items()})
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
