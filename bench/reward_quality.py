"""Quality of reward models on recorded rankings: ours beside TRL's trainer and beside rules that need no training.

568 prompts of AlpacaEval 2 with the answers of 16 models, ranked by a judge. By prompt, 400 rankings are learned from and
168 are held out, another division for every seed. Every model is MiniLM and reads a text at most once, up to 256 tokens.
Settings were chosen on a part of the training prompts of division 0; its 168 held-out prompts were never looked at. TRL's
learning rate is chosen in the same way, among RATES, on the same prompts.

What was computed is kept in a folder (--work): a run that was interrupted, or that adds seeds, takes up what is there.
With --only, the rows of other models stay in the JSON file as they were, where they are of the same settings.
"""

import argparse
import hashlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import machine

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared/data/alpacaeval/prompts-responses.jsonl.gz"
WORK = Path(tempfile.gettempdir()) / "prompting-nb-bench-reward"
TEST = 168 / 568  # the share of the prompts that is held out
READ = (2, 4, 8, 16)  # answers of a prompt that heads are fitted to, in the comparison of all pairs with disjoint ones
CHUNK = 64  # prompts whose texts are read in one job
MODEL = dict(pooling="layers", depth=4, length=1.0, max_length=256)
TRAIN = dict(lr=2e-4, head_lr=1e-2, epochs=1, tokens_per_batch=4096)
RATES = (1e-4, 3e-5, 3e-4, 6e-4)  # learning rates that TRL is tried with, of which the first is its default
FITTED = {"ours": "RewardModel, fitted head (all pairs of a ranking)", "pairs": "fitted head, from disjoint pairs of a ranking",
          "no_length": "fitted head, without the length term", "no_prompt": "fitted head, without the prompt"}
TRAINED = {"trained_pairs": "RewardModel, train (two disjoint pairs)",
           "trained_no_length": "RewardModel, train (two disjoint pairs), without the length term",
           "trl": "TRL RewardTrainer (two disjoint pairs), searched rate",
           "trl_default": "TRL RewardTrainer (two disjoint pairs), default rate",
           "trl_all": "TRL RewardTrainer (eight disjoint pairs), searched rate",
           "trained": "RewardModel, train (four answers, all pairs)",
           "trained_all": "RewardModel, train (sixteen answers, all pairs)"}
ANSWERS = {"trained": 4, "trained_all": 16, "trained_pairs": 2, "trained_no_length": 2}  # trained on at once
MODELS = TRAINED | FITTED
ONCE = {"trl_all"}  # trained on the first division only, unless --all is given
RULES = {"cosine": "zero-shot cosine of prompt and answer", "length": "the longer answer wins"}
FIGURES = ("accuracy", "shorter_accuracy", "best_of", "ece")


def rankings_of(args):
    "All rankings, or the first few."
    from prompting_nb.reward.preferences import read_rankings

    return read_rankings(args.data)[: args.prompts]


def division(args, seed):
    "Training and held-out rankings."
    from prompting_nb.reward.preferences import split

    rankings = rankings_of(args)
    return split(rankings, test=round(TEST * len(rankings)), seed=seed)


def searched(args):
    "Three quarters and one quarter of the training prompts of the first division, on which settings are chosen."
    from prompting_nb.reward.preferences import split

    return split(division(args, 0)[0], test=0.25, seed=0)


def model_of(seed, **options):
    "A fresh reward model."
    import torch

    from prompting_nb.reward import RewardModel

    torch.manual_seed(seed)
    return RewardModel("minilm", device="cpu", **{**MODEL, **options})


def as_pairs(rankings, count, seed):
    "Disjoint pairs of each ranking, at most so many: each answer is read once."
    from prompting_nb.reward.preferences import Ranking

    rng, found = random.Random(seed), []
    for ranking in rankings:
        decided = [p for p in two_by_two(rng.sample(range(len(ranking)), len(ranking))) if len({ranking.scores[i] for i in p}) > 1]
        found += [(ranking, pair) for pair in decided[:count]]
    return [Ranking(r.prompt, [r.completions[i] for i in p], [r.scores[i] for i in p]) for r, p in found]


# --- jobs, each in a process of its own with one thread


def read_texts(args):
    "The features of the texts of some prompts, from an encoder at rest."
    import torch

    from prompting_nb.reward.ensemble import text_features
    from prompting_nb.reward.preferences import Ranking
    from prompting_nb.reward.training import bf16_pays

    rankings = rankings_of(args)[args.number * CHUNK : (args.number + 1) * CHUNK]
    if args.job == "texts_no_prompt":
        rankings = [Ranking("", ranking.completions, ranking.scores) for ranking in rankings]
    model = model_of(0)
    return [part.tolist() for part in text_features(model, rankings, bf16=bf16_pays(torch.device("cpu")))]


def cosines(args):
    "The cosine between prompt and answer for some prompts."
    import torch

    from prompting_nb.reward.evaluation import zero_shot_cosine
    from prompting_nb.reward.preferences import score_rankings
    from prompting_nb.reward.model import TextEncoder
    from prompting_nb.reward.training import bf16_pays

    rankings = rankings_of(args)[args.number * CHUNK : (args.number + 1) * CHUNK]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16_pays(torch.device("cpu"))):
        return score_rankings(zero_shot_cosine(TextEncoder("minilm", device="cpu")), rankings)


def train_ours(args):
    "The held-out scores of a model that was trained as a whole."
    from prompting_nb.reward.preferences import score_rankings
    from prompting_nb.reward.training import TrainConfig, train

    (learn, test), kind = division(args, args.number), args.job
    model = model_of(args.number, **({"length": None} if kind == "trained_no_length" else {}))
    if ANSWERS[kind] == 2:
        learn = as_pairs(learn, 2, args.number)
    config = TrainConfig(seed=args.number, completions_per_prompt=ANSWERS[kind], packed=False, **TRAIN)
    history = train(model, learn, config, progress=False)
    return score_rankings(lambda *texts: model.score(*texts, bf16=history.bf16), test)


def train_trl(args):
    "The held-out scores of TRL's model, trained in its own environment on rows that we tokenised."
    import torch

    from prompting_nb.pretrained import minilm_path
    from prompting_nb.reward.model import TextEncoder
    from prompting_nb.reward.tokens import encode_pairs
    from prompting_nb.reward.training import bf16_pays

    learn, test = searched(args) if args.job == "trl_search" else division(args, args.number)
    length = MODEL["max_length"]
    encoder = TextEncoder("minilm", device="cpu", max_length=length)
    rows = lambda ranking: encode_pairs(encoder.tokenizer, ranking.prompt, ranking.completions, length)
    pairs = []
    for pair in as_pairs(learn, 8 if args.job == "trl_all" else 2, args.number):
        worse, better = (row for _, row in sorted(zip(pair.scores, rows(pair))))
        pairs.append({"chosen_ids": better, "rejected_ids": worse})
    with tempfile.TemporaryDirectory() as folder:
        job = {"model": minilm_path(), "pairs": pairs, "test": [rows(ranking) for ranking in test], "seed": args.number,
               "bf16": bf16_pays(torch.device("cpu")), "max_length": length, "lr": args.lr, "folder": folder}
        Path(folder, "job.json").write_text(json.dumps(job))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([args.trl_python, HERE / "reward_quality_trl.py", f"{folder}/job.json", f"{folder}/scores.json"],
                       check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(Path(folder, "scores.json").read_text())


def worker(args):
    "Do one job, and write its result and the processor time it took."
    work = {"texts": read_texts, "cosine": cosines, "trl": train_trl, "trained": train_ours}[args.job.split("_")[0]]
    result = work(args)
    used = time.process_time() + sum(os.times()[2:4])  # with TRL's process
    partial = Path(f"{args.out}.{os.getpid()}")
    partial.write_text(json.dumps({"result": result, "cpu_seconds": used}))
    partial.replace(args.out)


def folder_of(args):
    "Where the results for this data and these settings are kept."
    stamp = Path(args.data).stat().st_size, args.prompts, MODEL, TRAIN, CHUNK
    folder = Path(args.work) / hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def done(args, job, number, lr=None):
    "The result of a job, which runs where it is not kept from before."
    out = folder_of(args) / f"{job}{f'-{lr:g}' if lr else ''}-{number}.json"
    if not out.is_file():
        given = {name: getattr(args, name) for name in ("data", "prompts", "trl_python")} | {"lr": lr}
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
        command = [*args.wrapper.split(), sys.executable, __file__, "--job", job, "--number", str(number), "--out", str(out)]
        ran = subprocess.run([*command, *options], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"{job} {number}: {ran.stderr.strip()[-2000:]}")
    return json.loads(out.read_text())


# --- what the results say


def interval(values):
    "Mean and 95 % interval over seeds (Student's t)."
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    bounds = {"low": None, "high": None} if half is None else {"low": mean - half, "high": mean + half}
    return {"mean": mean, **bounds, "values": list(values)}


def fitted_scores(kind, features, args, seed, read=16):
    "Held-out scores of a head that is fitted to so many answers of each training prompt, or the cosines themselves."
    from prompting_nb.reward.ensemble import fit_head

    learn, test = division(args, seed)
    if kind == "cosine":
        return [features[r.prompt].tolist() for r in test]
    if kind == "no_length":  # the term for the length is the last feature
        features = {prompt: found[:, :-1] for prompt, found in features.items()}
    rng = random.Random(seed)
    drawn = [rng.sample(range(len(r)), min(read, len(r))) for r in learn]
    groups = [(r, places) for r, order in zip(learn, drawn) for places in (two_by_two(order) if kind == "pairs" else [order])]
    groups = [(r, places) for r, places in groups if len({r.scores[i] for i in places}) > 1]  # not all tied
    head = fit_head([features[r.prompt][places] for r, places in groups], [[r.scores[i] for i in places] for r, places in groups])
    return [(features[r.prompt] @ head).tolist() for r in test]


def two_by_two(order):
    "Disjoint pairs."
    return [list(pair) for pair in zip(order[::2], order[1::2])]


def k_way(features, args, tests):
    "Accuracy of heads that are fitted to all pairs of the answers that are read, and to disjoint pairs of them."
    from prompting_nb.reward.evaluation import pairwise_accuracy

    found = {}
    for read in READ:
        accuracy = {kind: [pairwise_accuracy(fitted_scores(kind, features, args, seed, read), test, samples=1).value
                           for seed, test in enumerate(tests)] for kind in ("ours", "pairs")}
        gains = [a - b for a, b in zip(*accuracy.values())]
        found[read] = {"all": interval(accuracy["ours"]), "disjoint": interval(accuracy["pairs"]), "gain": interval(gains)}
    return found


def search(args, pool):
    "The rate of `RATES` with which TRL is most accurate on a part of the training prompts, and what each of them gave."
    from prompting_nb.reward.evaluation import evaluate_scores

    running = {lr: pool.submit(done, args, "trl_search", 0, lr) for lr in RATES}
    test = searched(args)[1]
    found = {lr: evaluate_scores(job.result()["result"], test).accuracy for lr, job in running.items()}
    return max(found, key=found.get), {f"{lr:g}": accuracy for lr, accuracy in found.items()}


def everything(args, kinds, progress):
    "{(kind, seed): held-out scores}, {kind: processor seconds}, what `k_way` found, and what `search` did."
    import torch
    from tqdm.auto import tqdm

    every, seeds = rankings_of(args), args.seeds
    chunks = range(math.ceil(len(every) / CHUNK))
    sources = [name for name, needed in (("texts", {"ours", "pairs", "no_length"}), ("texts_no_prompt", {"no_prompt"}),
                                         ("cosine", {"cosine"})) if needed & {*kinds}]
    with ThreadPoolExecutor(args.workers) as pool:
        best, tried = search(args, pool) if {"trl", "trl_all"} & {*kinds} else (None, None)
        rates = {"trl": best, "trl_all": best, "trl_default": RATES[0]}
        runs = [(k, s) for s in range(min(seeds, args.divisions)) for k in kinds
                if k in TRAINED and (s == 0 or args.all or k not in ONCE)]
        todo = [(name, n) for name in sources for n in chunks] + runs
        with tqdm(total=len(todo), desc="jobs", disable=not progress) as bar:
            # the two that TRL trains on two pairs are one where its default rate is the best
            running = {job: pool.submit(done, args, {"trl_default": "trl"}.get(job[0], job[0]), job[1], rates.get(job[0]))
                       for job in todo}
            results = {}
            for job, future in running.items():
                results[job] = future.result()
                bar.update()
    curve, scores = {}, {job: results[job]["result"] for job in runs}
    seconds = {kind: statistics.median(results[job]["cpu_seconds"] for job in runs if job[0] == kind) for kind, _ in runs}
    for name in sources:
        parts = [torch.tensor(part) for n in chunks for part in results[name, n]["result"]]
        features, took = dict(zip((r.prompt for r in every), parts)), sum(results[name, n]["cpu_seconds"] for n in chunks)
        for kind in {"texts": ("ours", "pairs", "no_length"), "texts_no_prompt": ("no_prompt",), "cosine": ("cosine",)}[name]:
            if kind in kinds:
                seconds[kind] = took
                scores |= {(kind, seed): fitted_scores(kind, features, args, seed) for seed in range(seeds)}
        if name == "texts":
            curve = k_way(features, args, [division(args, seed)[1] for seed in range(seeds)])
    return scores, seconds, curve, {"rates": tried, "best": best} if tried else None


def compare(table):
    "Add by how much each model is ahead of others, division by division."
    for kind in (kind for kind in table if kind in MODELS):
        for other in ("length", "pairs", "no_length", "no_prompt", "trl", "trl_default", "trl_all", "trained_pairs",
                      "trained_no_length"):
            for figure in ("accuracy", "best_of") if other in table and other != kind else ():
                both = zip(table[kind][figure]["values"], table[other][figure]["values"])
                table[kind][f"{figure}_over_{other}"] = interval([a - b for a, b in both])


def quality(args, before=None, progress=True):
    """Train and evaluate everything; a dict with a mean and an interval over seeds for each figure of each scorer.

    `before` is what an earlier run found, of which the rows that are not computed now are kept."""
    from prompting_nb.config import InputError
    from prompting_nb.reward.evaluation import accuracy_by_length, evaluate_scores, longer_wins
    from prompting_nb.reward.preferences import score_rankings

    if not Path(args.data).is_file():
        raise InputError(f"{args.data} is missing: give the recorded rankings (.jsonl.gz) with --data")
    kinds = [kind for kind in args.only or (*MODELS, "cosine") if not kind.startswith("trl") or args.trl_python]
    tests = [division(args, seed)[1] for seed in range(args.seeds)]
    settings = {"seeds": args.seeds, "prompts": len(rankings_of(args)), "held_out": len(tests[0]), "model": MODEL,
                "training": TRAIN}
    kept = (before or {}).get("quality", {})
    if kept.get("settings") != settings:
        kept = {}
    scores, seconds, curve, tried = everything(args, kinds, progress)
    scores |= {("length", seed): score_rankings(longer_wins, test) for seed, test in enumerate(tests)}
    found = {}
    for (kind, seed), given in sorted(scores.items(), key=lambda item: item[0][1]):
        found.setdefault(kind, []).append(evaluate_scores(given, tests[seed]))
    table = {kind: {figure: interval([getattr(e, figure) for e in evaluations]) for figure in FIGURES}
             | ({"cpu_seconds": seconds[kind], "measured": time.strftime("%Y-%m-%d")} if kind in seconds else {})
             for kind, evaluations in found.items()}
    table = kept.get("table", {}) | table
    compare(table)
    by_length = kept.get("by_length", {}) | {
        kind: [list(b) for b in accuracy_by_length(scores[kind, 0], tests[0])]
        for kind in ("ours", "trained_pairs", "trained_no_length", "trl", "trl_all", "length") if (kind, 0) in scores}
    bins = kept.get("reliability", {}) | {kind: [b._asdict() for b in found[kind][0].bins] for kind in kinds if kind != "cosine"}
    mean = lambda kind, figure: table[kind][figure]["mean"] if kind in table else None
    accuracies = {"heldout_accuracy_equal": "trained_pairs", "heldout_accuracy_equal_no_length": "trained_no_length",
                  "heldout_accuracy_trl": "trl", "heldout_accuracy_trl_default": "trl_default",
                  "heldout_accuracy_trl_all": "trl_all", "heldout_accuracy": "ours", "heldout_accuracy_whole": "trained_all",
                  "heldout_accuracy_no_length": "no_length", "heldout_accuracy_length": "length"}
    return {**{key: mean(kind, "accuracy") for key, kind in accuracies.items()}, "best_of_16": mean("ours", "best_of"),
            "best_of_16_trl": mean("trl", "best_of"), "best_of_16_length": mean("length", "best_of"),
            "ece": mean("ours", "ece"), "ece_trl": mean("trl", "ece"),
            "shorter_accuracy": mean("ours", "shorter_accuracy"), "shorter_accuracy_trl": mean("trl", "shorter_accuracy"),
            "oracle": statistics.fmean(e.oracle for e in found["length"]),
            "random": statistics.fmean(e.random for e in found["length"]),
            "quality": {"table": table, "names": MODELS | RULES, "by_length": by_length, "k_way": curve or kept.get("k_way", {}),
                        "reliability": bins, "settings": settings, "trl_search": tried or kept.get("trl_search")}}


def show(result):
    "Print the result as a table."
    from rich.console import Console
    from rich.table import Table

    settings, rows = result["quality"]["settings"], result["quality"]["table"]
    table = Table(title=f"{settings['held_out']} of {settings['prompts']} prompts held out, mean (95 % interval) over "
                        f"{settings['seeds']} divisions")
    for column in ("", "pairwise accuracy", "shorter preferred", "best of 16", "ECE", "processor s"):
        table.add_column(column, justify="right" if column else "left")
    spread = lambda f: f" ({f['low']:.3f} to {f['high']:.3f})" if f["low"] is not None else ""
    cell = lambda f: f"{f['mean']:.3f}" + spread(f)
    for kind, name in result["quality"]["names"].items():
        if kind in rows:
            ece = cell(rows[kind]["ece"]) if kind in MODELS else ""
            seconds = f"{rows[kind]['cpu_seconds']:.0f}" if kind in MODELS else ""
            table.add_row(name, *(cell(rows[kind][figure]) for figure in FIGURES[:3]), ece, seconds)
    console = Console(width=170)
    console.print(table)
    console.print(f"best of 16 by the judge itself {result['oracle']:.3f}, by chance {result['random']:.3f}")
    if found := result["quality"]["trl_search"]:
        console.print(f"TRL's learning rate, on a part of the training prompts: {found['rates']}, so {found['best']:g}")
    for kind in (kind for kind in MODELS if kind in rows):
        console.print(f"{MODELS[kind]}: ahead of the longer answer by {cell(rows[kind]['accuracy_over_length'])} of the pairs")


def add_arguments(parser):
    "The arguments of the quality part."
    parser.add_argument("--data", default=str(DATA), help="recorded rankings, .jsonl or .jsonl.gz (default: %(default)s)")
    parser.add_argument("--work", default=str(WORK), help="folder where results are kept (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="divisions of the prompts (default: %(default)s)")
    parser.add_argument("--prompts", type=int, help="take only the first so many")
    parser.add_argument("--trl-python", help="Python of an environment with trl; without it TRL is left out")
    parser.add_argument("--divisions", type=int, default=5, help="of them, those that whole models are trained on (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--wrapper", default="", help="command that every job is run with, such as 'nice -n 19'")
    parser.add_argument("--only", nargs="+", choices=[*MODELS, "cosine"], help="only these models; others stay as they were")
    parser.add_argument("--all", action="store_true", help="trl_all for every division: a quarter of an hour each")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="one division of 96 prompts")
    add_arguments(parser)
    for name in ("--job", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--lr", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return worker(args)
    if args.quick:
        args.seeds, args.prompts = 1, 96
    from prompting_nb.config import InputError

    try:
        before = json.loads(Path(args.json).read_text()) if args.json and Path(args.json).is_file() else None
        result = quality(args, before) | {"machine": machine("torch", "transformers")}
    except InputError as error:
        sys.exit(f"reward_quality.py: {error}")
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
