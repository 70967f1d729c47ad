"""Quality of reward models on recorded rankings: ours beside TRL's trainer and beside rules that need no training.

By prompt, 400 rankings are learned from and 168 are held out, another division for every seed. Every trained model is MiniLM
and reads the same number of completions as often; TRL gets the same rows of tokens, half as many pairs as we read
completions. The settings of ours were chosen on a division of 400 training prompts alone (280 to learn, 120 to choose).
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared/data/alpacaeval/prompts-responses.jsonl.gz"
TEST = 168  # prompts held out
MODEL = dict(pooling="layers", depth=4, length=3.0)
TRAIN = dict(lr=1e-4, head_lr=1e-2)
MODELS = {"ours": "RewardModel, K-way", "pairs": "RewardModel, pairs at equal compute", "plain": "RewardModel, defaults",
          "no_prompt": "RewardModel that never sees the prompt", "trl": "TRL RewardTrainer"}
RULES = {"length": "the longer answer wins", "cosine": "zero-shot cosine"}
FIGURES = ("accuracy", "shorter_accuracy", "best_of", "ece")


def division(data, seed):
    "Training and held-out rankings."
    from prompting_nb.preferences import read_rankings, split

    return split(read_rankings(data), test=TEST, seed=seed)


def without_prompt(rankings):
    from prompting_nb.preferences import Ranking

    return [Ranking("", ranking.completions, ranking.scores) for ranking in rankings]


def as_pairs(rankings, completions, rng):
    "Disjoint pairs of each ranking, which have as many completions together as a draw of `completions`."
    from prompting_nb.preferences import Ranking

    found = []
    for ranking in rankings:
        order = rng.sample(range(len(ranking)), len(ranking))
        decided = [p for p in zip(order[::2], order[1::2]) if ranking.scores[p[0]] != ranking.scores[p[1]]]
        for pair in decided[: completions // 2]:
            found.append(Ranking(ranking.prompt, [ranking.completions[i] for i in pair], [ranking.scores[i] for i in pair]))
    return found


def train_ours(kind, args):
    "The held-out scores of one of our models."
    import torch

    from prompting_nb.preferences import score_rankings
    from prompting_nb.reward import RewardModel
    from prompting_nb.training import TrainConfig, train

    learn, test = division(args.data, args.seed)
    rng = random.Random(args.seed)
    if kind == "no_prompt":
        learn, test = without_prompt(learn), without_prompt(test)
    torch.manual_seed(args.seed)
    plain = kind == "plain"
    model = RewardModel("minilm", device="cpu", max_length=args.max_length, **({} if plain else MODEL))
    settings = dict(seed=args.seed, completions_per_prompt=args.completions, **({"lr": 1e-4} if plain else TRAIN))
    if kind == "pairs":
        settings["completions_per_prompt"] = 2
        learn = [pair for _ in range(args.epochs) for pair in as_pairs(learn, args.completions, rng)]
    history = train(model, learn, TrainConfig(epochs=1 if kind == "pairs" else args.epochs, **settings), progress=args.bar)
    return score_rankings(lambda *texts: model.score(*texts, bf16=history.bf16, progress=args.bar), test)


def train_trl(args):
    "The held-out scores of TRL's model, trained in its own environment on rows that we tokenised."
    from prompting_nb.pretrained import minilm_path
    from prompting_nb.reward import TextEncoder, _encode_pairs
    from prompting_nb.training import bf16_pays

    learn, test = division(args.data, args.seed)
    rng = random.Random(args.seed)
    encoder = TextEncoder("minilm", device="cpu", max_length=args.max_length)
    rows = lambda ranking: _encode_pairs(encoder.tokenizer, ranking.prompt, ranking.completions, args.max_length)
    pairs = []
    for ranking in (pair for _ in range(args.epochs) for pair in as_pairs(learn, args.completions, rng)):
        better, worse = sorted(zip(ranking.scores, rows(ranking)), key=lambda pair: -pair[0])
        pairs.append({"chosen_ids": better[1], "rejected_ids": worse[1]})
    with tempfile.TemporaryDirectory() as folder:
        job = {"model": minilm_path(), "pairs": pairs, "test": [rows(ranking) for ranking in test], "seed": args.seed,
               "bf16": bf16_pays(encoder.device), "max_length": args.max_length, "lr": args.trl_lr, "folder": folder}
        Path(folder, "job.json").write_text(json.dumps(job))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([args.trl_python, HERE / "reward_quality_trl.py", f"{folder}/job.json", f"{folder}/scores.json"],
                       check=True, env=environment, stdout=subprocess.DEVNULL if not args.bar else None)
        return json.loads(Path(folder, "scores.json").read_text())


def worker(args):
    "Train one model, and write its held-out scores and the time it took."
    started = time.process_time()
    scores = train_trl(args) if args.job == "trl" else train_ours(args.job, args)
    used = time.process_time() - started + sum(os.times()[2:4])  # with TRL's process
    Path(args.json).write_text(json.dumps({"scores": scores, "cpu_seconds": used}))


def run_job(kind, seed, options, folder):
    "The result of a worker in a process of its own, with one thread."
    out = Path(folder) / f"{kind}-{seed}.json"
    command = [sys.executable, __file__, "--job", kind, "--seed", str(seed), "--json", out, *options]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{kind}, seed {seed}: {done.stderr.strip()[-2000:]}")
    return json.loads(out.read_text())


def interval(values):
    "Mean and 95 % interval over seeds (Student's t)."
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def rules(data, seeds):
    "For each seed the evaluations of the rules that need no training; every text is embedded once."
    from prompting_nb.evaluation import evaluate_scores, longer_wins, zero_shot_cosine
    from prompting_nb.preferences import read_rankings, score_rankings
    from prompting_nb.reward import TextEncoder

    every = read_rankings(data)
    scorers = {"length": longer_wins, "cosine": zero_shot_cosine(TextEncoder("minilm", device="cpu"))}
    scores = {name: dict(zip((r.prompt for r in every), score_rankings(scorer, every))) for name, scorer in scorers.items()}
    tests = [division(data, seed)[1] for seed in range(seeds)]
    return {name: [evaluate_scores([given[r.prompt] for r in test], test) for test in tests] for name, given in scores.items()}


def measure(progress=True, seeds=5, data=DATA, completions=4, epochs=1, max_length=256, trl_python=None, trl_lr=1e-4,
            workers=2, kinds=None):
    "Train and evaluate everything; a dict with a mean and an interval over seeds for each figure of each scorer."
    from tqdm.auto import tqdm

    from prompting_nb.config import InputError
    from prompting_nb.evaluation import accuracy_by_length, evaluate_scores

    if not Path(data).is_file():
        raise InputError(f"{data} is missing: give the recorded rankings (.jsonl.gz) with --data")
    kinds = [kind for kind in kinds or MODELS if kind != "trl" or trl_python]
    options = ["--data", str(data), "--completions", str(completions), "--epochs", str(epochs), "--max-length",
               str(max_length), "--trl-python", str(trl_python), "--trl-lr", str(trl_lr)]
    found, by_length, seconds = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        jobs = {(kind, seed): pool.submit(run_job, kind, seed, options, folder) for seed in range(seeds) for kind in kinds}
        with tqdm(total=len(jobs), desc="models", disable=not progress) as bar:
            for (kind, seed), job in jobs.items():
                result, (_, test) = job.result(), division(data, seed)
                found.setdefault(kind, []).append(evaluate_scores(result["scores"], test))
                seconds.setdefault(kind, []).append(result["cpu_seconds"])
                by_length.setdefault(kind, accuracy_by_length(result["scores"], test))
                bar.update()
    found |= rules(data, seeds)
    _, test = division(data, 0)
    by_length["length"] = accuracy_by_length([[len(text) for text in ranking.completions] for ranking in test], test)
    table = {kind: {figure: interval([getattr(e, figure) for e in evaluations]) for figure in FIGURES}
             for kind, evaluations in found.items()}
    for kind in kinds:  # against the rule, on the same prompts
        gains = [e.accuracy - rule.accuracy for e, rule in zip(found[kind], found["length"])]
        table[kind]["gain_over_length"] = interval(gains)
        table[kind]["cpu_seconds"] = statistics.median(seconds[kind])
    value = lambda kind, figure: table[kind][figure]["mean"] if kind in table else None
    return {"heldout_accuracy": value("ours", "accuracy"), "heldout_accuracy_trl": value("trl", "accuracy"),
            "heldout_accuracy_length": value("length", "accuracy"), "best_of_16": value("ours", "best_of"),
            "best_of_16_trl": value("trl", "best_of"), "ece": value("ours", "ece"), "ece_trl": value("trl", "ece"),
            "oracle": statistics.fmean(e.oracle for e in found["length"]),
            "random": statistics.fmean(e.random for e in found["length"]), "table": table,
            "by_length": {kind: [list(bin) for bin in bins] for kind, bins in by_length.items()},
            "reliability": [list(bin) for bin in found["ours"][0].bins] if "ours" in found else [],
            "settings": {"seeds": seeds, "completions": completions, "epochs": epochs, "max_length": max_length,
                         "model": MODEL, "training": TRAIN, "trl_lr": trl_lr}, "machine": machine()}


def machine():
    import torch
    import transformers

    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__}


def show(result):
    "Print the result as a table."
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Held-out quality, mean and 95 % interval over {result['settings']['seeds']} seeds")
    columns = ("", "pairwise accuracy", "shorter preferred", "best of 16", "ECE", "CPU s")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right")
    cell = lambda figure: f"{figure['mean']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"
    for kind, name in (MODELS | RULES).items():
        if kind in (rows := result["table"]):
            ece = cell(rows[kind]["ece"]) if kind in MODELS else ""
            seconds = f"{rows[kind]['cpu_seconds']:.0f}" if kind in MODELS else ""
            table.add_row(name, *(cell(rows[kind][figure]) for figure in FIGURES[:3]), ece, seconds)
    console = Console(width=150)
    console.print(table)
    console.print(f"judge's own choice {result['oracle']:.3f}, a choice by chance {result['random']:.3f}")
    for kind in MODELS:
        if kind in result["table"]:
            console.print(f"{MODELS[kind]}: ahead of the longer answer by {cell(result['table'][kind]['gain_over_length'])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--data", default=str(DATA), help="recorded rankings, .jsonl or .jsonl.gz (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="divisions and trainings (default: %(default)s)")
    parser.add_argument("--completions", type=int, default=4, help="read of each prompt in an epoch (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="the same for all (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--trl-python", default=None, help="Python of an environment with trl; without it TRL is left out")
    parser.add_argument("--trl-lr", type=float, default=1e-4, help="learning rate of TRL (default: its own default)")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time, one thread each (default: %(default)s)")
    parser.add_argument("--only", nargs="*", choices=list(MODELS), help="train only these")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--job", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--bar", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return worker(args)
    result = measure(True, 1 if args.quick else args.seeds, args.data, args.completions, args.epochs, args.max_length,
                     args.trl_python, args.trl_lr, args.workers, args.only)
    show(result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
