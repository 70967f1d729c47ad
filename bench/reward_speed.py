"""How fast reward models are trained and used: ours beside TRL's RewardTrainer, a transformers pipeline and the reference.

Models with random weights, GPT-2 (6 layers of 384) and a BERT of the size of MiniLM, get the same pairs: lengths are skewed
(median about 130 tokens, tail to 1024), chosen and rejected share their prompt. Peers run in processes of their own and take
turns in every repetition, which has pairs of its own; each turn begins with 8 pairs (the reference: 4) that are not counted.
Measured are pairs a second up to the end of the last step: for ours from the call of `train`, tokenising and all; for the others,
which are handed our tokens, from the beginning of the first step:

  ours         prompting_nb.reward.training.train with its defaults, on rankings of two; batches are so large that there are about as many
               steps as for TRL, with its 16 pairs a step (chosen on pairs that are not measured)
  trl_default  RewardTrainer with its defaults (8 pairs at once, checkpointed activations), 16 pairs a step
  trl_tuned    bf16, no checkpointing, 16 pairs a step: one pair at once, or 2 or 4 grouped by length, whichever is fastest here
  reference    two forwards of rows that are padded to 1024, in float32, with GPT-2's own dropout, since it trained in train
               mode (its rate does not depend on the texts: 4 pairs a step)
  no_dropout   the same without dropout, as everybody else trains here

AdamW (fused), learning rate, weight decay and clipping are the same. That they learn the same is shown by one step on the
same 8 pairs, from the same weights: its loss, and the loss on other pairs after it. Scoring is compared with
transformers' text-classification pipeline at its best batch size and precision.
"""

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from machine import cores, machine

HERE = Path(__file__).resolve().parent
KINDS = {"gpt2": "GPT-2, 6 layers of 384", "bert": "BERT, 6 layers of 384"}
NAMES = {"ours": "ours", "trl_default": "TRL, defaults", "trl_tuned": "TRL, tuned", "reference": "reference",
         "no_dropout": "reference, no dropout"}
TUNED = [{"at_once": 1}, {"at_once": 2, "group": True}, {"at_once": 4, "group": True}]
TARGETS = {"train_vs_trl_default": 5, "train_vs_trl_tuned": 2, "train_vs_reference": 38,
           "train_bert_vs_trl_default": 2.4, "train_bert_vs_trl_tuned": 1.4, "score_vs_pipeline": 2}
LR, STEP, PARITY, FEW, LONGEST = 3e-4, 16, 8, 8, 1024
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]


# Data and models


def words_of(rng, liked):
    "A text; those that are liked have more words of the first tenth of the vocabulary."
    count, size = max(4, int(rng.lognormvariate(math.log(55), 1.0))), 30000
    return [f"w{rng.randrange(size // 10) if rng.random() < liked else rng.randrange(size)}" for _ in range(min(count, LONGEST))]


def make_pairs(count, seed):
    "Pairs {prompt, chosen, rejected} that have at most 1024 tokens with special ones."
    rng, pairs = random.Random(seed), []
    for _ in range(count):
        prompt = words_of(rng, 0.1)[:900]
        texts = [words_of(rng, liked)[: LONGEST - 4 - len(prompt)] for liked in (0.5, 0.1)]
        pairs.append(dict(zip(("prompt", "chosen", "rejected"), map(" ".join, (prompt, *texts)))))
    return pairs


def make_models(folder):
    "A sequence classifier of each kind with random weights, and its tokenizer."
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    configs = {
        "gpt2": GPT2Config(n_embd=384, n_layer=6, n_head=6, num_labels=1, pad_token_id=0),
        "bert": BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=1,
                           max_position_embeddings=LONGEST)}
    for kind, config in configs.items():
        vocabulary = SPECIAL + [f"w{i}" for i in range(config.vocab_size - len(SPECIAL))]
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"gpt2": {"eos_token": "[EOS]"}, "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]"}}[kind]
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(Path(folder, kind))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_max_length=LONGEST,
                                **special).save_pretrained(Path(folder, kind))


# Workers: they read jobs as lines of JSON, and answer with one line each


def peak_mb():
    "The most memory that this process has held, in MB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def rank(pairs):
    "Pairs as rankings of two."
    from prompting_nb.reward.preferences import Ranking

    return [Ranking(pair["prompt"], [pair["chosen"], pair["rejected"]], [1.0, 0.0]) for pair in pairs]


class Ours:
    "This package, with its defaults."

    def __init__(self, folder):
        from prompting_nb.reward.training import bf16_pays

        import torch

        self.folder, self.bf16 = folder, bf16_pays(torch.device("cpu"))

    def model(self):
        from safetensors.torch import load_file

        from prompting_nb.reward import RewardModel

        pooling = "last" if "gpt2" in self.folder else "pooler"
        model = RewardModel(self.folder, dropout=0.0, device="cpu", pooling=pooling, max_length=LONGEST)
        weights = load_file(Path(self.folder, "model.safetensors"))
        model.head[1].weight.data.copy_(weights["score.weight" if pooling == "last" else "classifier.weight"])
        if pooling == "pooler":
            model.model.pooler.requires_grad_(True)
        return model

    def rows(self, pairs):
        "The tokens of the chosen and the rejected text of each pair, for the peers."
        self.encoder = model = getattr(self, "encoder", None) or self.model()
        encode = lambda side: model.encode_texts([pair["prompt"] for pair in pairs], [pair[side] for pair in pairs])
        words = model.tokenizer.convert_ids_to_tokens
        rows = list(zip(encode("chosen"), encode("rejected")))
        return {"rows": rows, "texts": [" ".join(words(row)) for both in rows for row in both]}

    def batch(self, pairs):
        "The least tokens of a batch with which there are as few steps as TRL takes."
        from prompting_nb.reward.batches import token_batches, tokenise
        from prompting_nb.reward.fast.packing import shares_prefix
        from prompting_nb.reward.training import TrainConfig, plan_batches

        model, rankings = self.model(), rank(pairs)
        plan = partial(plan_batches, rankings, tokenise(model, rankings), batches_of=partial(token_batches, share=shares_prefix(model)))
        enough = (size for size in count(1024, 512) if len(plan(TrainConfig(tokens_per_batch=size))) <= len(pairs) / STEP)
        return {"tokens": next(enough)}

    def train(self, pairs, test=None, tokens=4096, **options):
        from prompting_nb.reward.training import TrainConfig, train, validate

        one_step = {"tokens_per_batch": 10**6, "lr": 2 * LR}  # in its only step the rate is half way down
        given = {"epochs": 1, "lr": LR, "warmup": 0.0, "weight_decay": 0.0, "tokens_per_batch": tokens}
        config = TrainConfig(**{**given, **(one_step if test else {})})
        model, rankings, ends = self.model(), rank(pairs), [time.perf_counter()]
        history = train(model, rankings, config, progress=False, on_step=lambda step: ends.append(time.perf_counter()))
        found = {"seconds": ends[-1] - ends[0], "pairs": len(pairs), "steps": len(history.steps),
                 "loss": history.steps[0]["loss"]}
        return {**found, "test_loss": validate(model, rank(test))["loss"]} if test else found

    def work(self, pairs):
        "Multiplications and additions of matrix products in a pass forward and back, counted by torch."
        from torch.utils.flop_counter import FlopCounterMode

        from prompting_nb.reward.fast.packing import lay_out, packed_rewards, shares_prefix

        model, groups, flop = self.model(), self.rows(pairs)["rows"], 0
        for start in range(0, len(groups), STEP):  # all at once would not fit into memory
            with FlopCounterMode(display=False) as counter:
                packed_rewards(model, groups[start : start + STEP], threads=1).sum().backward()
            flop += counter.get_total_flops()
        lengths = sorted(len(row) for rows in groups for row in rows)
        return {"flop": flop / len(pairs), "median_tokens": statistics.median(lengths),
                "longest_tokens": lengths[-1], "tokens_of_pair": sum(lengths) / len(pairs),
                "tokens_computed_of_pair": len(lay_out(groups, shares_prefix(model))) / len(pairs)}

    def score(self, pairs, **options):
        from prompting_nb.reward.fast.packing import score_packed

        self.scorer = getattr(self, "scorer", None) or self.model()
        prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
        completions = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
        started = time.perf_counter()
        scores = score_packed(self.scorer, prompts, completions, bf16=self.bf16)
        return {"seconds": time.perf_counter() - started, "scores": scores[:, 0].tolist()}

    def rate(self):
        "The highest rate of matrix products of some sizes, in GFLOP/s, with all threads, in the precision that is used."
        import torch

        best, dtype = 0.0, torch.bfloat16 if self.bf16 else torch.float32
        for m, k, n in ((512, 384, 1536), (2048, 384, 1536), (2048, 1536, 384), (2048, 2048, 2048)):
            a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            for _ in range(8):
                started, count = time.perf_counter(), max(3, int(1e10 / (2 * m * k * n)))
                for _ in range(count):
                    torch.nn.functional.linear(a, b)
                best = max(best, 2e-9 * m * k * n * count / (time.perf_counter() - started))
        return {"gflops": best, "bf16": self.bf16, "threads": torch.get_num_threads()}


class Reference:
    "The two forwards of the reference, each padded to 1024."

    def __init__(self, folder):
        self.folder = folder

    def train(self, pairs, rows, test=None, dropout=False, **options):
        import torch
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(self.folder)
        model.train(dropout and not test)
        optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0, fused=True)

        def loss_of(some):
            rewards = []
            for side in (0, 1):
                ids = torch.zeros(len(some), LONGEST, dtype=torch.long)
                mask = torch.zeros_like(ids)
                for i, both in enumerate(some):
                    ids[i, : len(both[side])], mask[i, : len(both[side])] = torch.tensor(both[side]), 1
                rewards.append(model(input_ids=ids, attention_mask=mask).logits)
            return -torch.nn.functional.logsigmoid(rewards[0] - rewards[1]).mean()

        losses, started, at_once = [], time.perf_counter(), PARITY if test else 4
        for start in range(0, len(rows), at_once):
            loss = loss_of(rows[start : start + at_once])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found = {"seconds": time.perf_counter() - started, "pairs": len(rows), "steps": len(losses), "loss": losses[0]}
        if test:
            with torch.no_grad():
                found["test_loss"] = loss_of(test).item()
        return found


class Pipeline:
    "transformers' text-classification pipeline."

    def __init__(self, folder):
        self.folder, self.pipelines = folder, {}

    def score(self, texts, at_once, dtype, **options):
        import torch
        from transformers import pipeline

        if dtype not in self.pipelines:
            self.pipelines[dtype] = pipeline("text-classification", self.folder, dtype=getattr(torch, dtype), device="cpu")
        started = time.perf_counter()
        found = self.pipelines[dtype](texts, batch_size=at_once, function_to_apply="none", truncation=True)
        return {"seconds": time.perf_counter() - started, "scores": [one["score"] for one in found]}


def work(peer, kind, folder):
    "Answer jobs until there are no more."
    answers, sys.stdout = sys.stdout, sys.stderr
    worker = {"ours": Ours, "reference": Reference, "pipeline": Pipeline}[peer](str(Path(folder, kind)))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        found = getattr(worker, job.pop("do"))(**job)
        print(json.dumps({**found, "peak_mb": peak_mb()}), file=answers, flush=True)


class Peer:
    "A worker in a process of its own."

    def __init__(self, args, name, kind, folder):
        trl = name.startswith("trl")
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if trl:
            environment.pop("PYTHONPATH", None)
        script = [args.trl_python, HERE / "reward_speed_trl.py"] if trl else [sys.executable, __file__, "--worker", name]
        command = [*script, "--kind", kind, "--folder", folder]
        self.log = Path(folder, f"{name}-{kind}.log").open("w+")
        self.name, self.process = name, subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                         stderr=self.log, text=True, env=environment)
        self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def ask(self, do, **job):
        self.process.stdin.write(json.dumps({"do": do, **job}) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)
        self.log.close()


# The run


def median(values):
    "Median, least and greatest."
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def rate_of(found):
    "Pairs a second of a run."
    return found["pairs"] / found["seconds"]


def data_of(ours, count, seed):
    pairs = make_pairs(count, seed)
    return {"pairs": pairs, **ours.ask("rows", pairs=pairs)}


@contextmanager
def turns(args, peers, kind, folder):
    "Ask a peer to train; the reference lives for its turn only, since it holds more memory than all others together."
    guests = {}

    def ask(name, **job):
        if name not in peers and not guests:
            guests["reference"] = Peer(args, "reference", kind, folder)
        return (peers.get(name) or guests["reference"]).ask("train", **job)

    try:
        yield ask
    finally:
        for guest in guests.values():
            guest.close()


def parity(ask, names, options, test, data):
    "What one step on the same pairs does to each model."
    for name in (name for name in names if name != "no_dropout"):  # the reference takes this step without dropout
        more = {"at_once": PARITY, "pairs_a_step": PARITY} if name == "trl_default" else {"pairs_a_step": PARITY}
        yield name, ask(name, **select(name, data, test), **{**options[name], **more})


def select(name, data, test=None):
    "What a peer is told: our trainer gets texts, the others our tokens."
    what = ["pairs"] if name == "ours" else ["rows"] if name.startswith("trl") else ["pairs", "rows"]
    job = {key: data[key] for key in what}
    return {**job, "test": test["pairs" if name == "ours" else "rows"]} if test else job


def training(args, kind, folder, step):
    "The rates and losses of everyone who trains a model of a kind."
    padded = ("reference", "no_dropout")
    names = [name for name in NAMES if name not in padded or kind == "gpt2"]
    peers = {name: Peer(args, name, kind, folder) for name in names if name not in padded}
    options = {name: {"dropout": True} if name == "reference" else {} for name in names}
    options["trl_default"], options["trl_tuned"] = {"tuned": False}, {"tuned": True, **TUNED[0]}
    data = data_of(peers["ours"], PARITY, 1000)
    with turns(args, peers, kind, folder) as ask:
        learnt = dict(parity(ask, names, options, data_of(peers["ours"], PARITY, 2000), data))
    learnt |= {name: learnt["reference"] for name in names if name == "no_dropout"}
    step()
    data = data_of(peers["ours"], args.pairs, 3000)
    tried = [{**how, "rate": rate_of(peers["trl_tuned"].ask("train", rows=data["rows"], tuned=True, **how))} for how in TUNED]
    best = max(tried, key=lambda how: how["rate"])
    options["trl_tuned"].update(at_once=best["at_once"], group=best.get("group", False))
    options["ours"] = {"tokens": peers["ours"].ask("batch", pairs=data["pairs"])["tokens"]}
    step()
    rates, steps, memory = {name: [] for name in names}, {}, {}
    for repetition in range(args.repetitions):
        data = data_of(peers["ours"], args.pairs, repetition)
        few = {key: values[:FEW] for key, values in data.items() if key in ("pairs", "rows")}
        for name in random.Random(repetition).sample(names, len(names)):
            pairs = few if name in padded else data
            with turns(args, peers, kind, folder) as ask:
                warm = {key: values[:4] for key, values in few.items()} if name in padded else few  # one step of the reference
                ask(name, **select(name, warm), **options[name])
                found = ask(name, **select(name, pairs), **options[name])
            rates[name].append(rate_of(found))
            steps[name], memory[name] = found["steps"], found["peak_mb"]
        step()
    for name in set(peers) - {"ours"}:
        peers[name].close()
    pairs = [pair for repetition in range(args.repetitions) for pair in make_pairs(args.pairs, repetition)]
    work_of_pair, machine = peers["ours"].ask("work", pairs=pairs), peers["ours"].ask("rate")
    peers["ours"].close()
    step()
    gflops = statistics.median(rates["ours"]) * work_of_pair["flop"] / 1e9
    return {"pairs_per_second": {name: median(values) for name, values in rates.items()}, "steps": steps, "memory_mb": memory,
            "ratios": {name: median([a / b for a, b in zip(rates["ours"], rates[name])]) for name in names if name != "ours"},
            "loss": {name: {key: found[key] for key in ("loss", "test_loss")} for name, found in learnt.items()},
            "trl_tried": tried, "tokens_per_batch": options["ours"]["tokens"],
            "work": {key: value for key, value in work_of_pair.items() if key != "peak_mb"},
            "machine": {key: value for key, value in machine.items() if key != "peak_mb"}, "gflops": gflops,
            "share_of_machine": gflops / machine["gflops"]}


def scoring(args, kind, folder, step):
    "Texts a second, and the largest difference of two scores."
    ours, peer = Peer(args, "ours", kind, folder), Peer(args, "pipeline", kind, folder)
    data = data_of(ours, args.pairs, 4000)
    texts = len(data["texts"])
    tried = []
    for dtype in ("float32", "bfloat16"):
        for at_once in (1, 2, 4, 8, 16):
            found = peer.ask("score", texts=data["texts"], at_once=at_once, dtype=dtype)
            tried.append({"dtype": dtype, "at_once": at_once, "rate": texts / found["seconds"]})
    best = max(tried, key=lambda how: how["rate"])
    exact = peer.ask("score", texts=data["texts"], at_once=1, dtype="float32")["scores"]
    found = ours.ask("score", pairs=data["pairs"])["scores"]
    step()
    rates = {"ours": [], "pipeline": []}
    for repetition in range(args.repetitions):
        data = data_of(ours, args.pairs, repetition)
        ours.ask("score", pairs=data["pairs"][:FEW])
        rates["ours"].append(texts / ours.ask("score", pairs=data["pairs"])["seconds"])
        peer.ask("score", texts=data["texts"][: 2 * FEW], at_once=best["at_once"], dtype=best["dtype"])
        last = peer.ask("score", texts=data["texts"], at_once=best["at_once"], dtype=best["dtype"])
        rates["pipeline"].append(texts / last["seconds"])
    memory = {"ours": ours.ask("score", pairs=data["pairs"])["peak_mb"], "pipeline": last["peak_mb"]}
    ours.close()
    peer.close()
    step()
    return {"texts_per_second": {name: median(values) for name, values in rates.items()}, "pipeline_tried": tried, "best": best,
            "ratio": median([a / b for a, b in zip(rates["ours"], rates["pipeline"])]), "memory_mb": memory,
            "largest_difference": max(abs(a - b) for a, b in zip(exact, found))}


def kept(args, name, measure):
    "What was measured before, where there is a folder that has it; else what is measured now."
    path = Path(args.keep, f"{name}.json") if args.keep else None
    if path and path.is_file():
        return json.loads(path.read_text())
    found = measure()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return found


def speed(args):
    "All figures: the ratios of `TARGETS`, and under `speed` what they come from."
    from tqdm.auto import tqdm

    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * (args.repetitions + 5), desc="speed", disable=args.quiet) as bar:
        make_models(folder)
        train = {kind: kept(args, f"training-{kind}", lambda: training(args, kind, folder, bar.update)) for kind in KINDS}
        score = {kind: kept(args, f"scoring-{kind}", lambda: scoring(args, kind, folder, bar.update)) for kind in KINDS}
    ratio = lambda kind, name: train[kind]["ratios"][name]["median"]
    trl = subprocess.run([args.trl_python, "-c", "import importlib.metadata as m; print(m.version('trl'), m.version('torch'))"],
                         capture_output=True, text=True, check=True).stdout.split()
    return {
        "train_vs_trl_default": ratio("gpt2", "trl_default"), "train_vs_trl_tuned": ratio("gpt2", "trl_tuned"),
        "train_vs_reference": ratio("gpt2", "reference"), "train_bert_vs_trl_default": ratio("bert", "trl_default"),
        "train_bert_vs_trl_tuned": ratio("bert", "trl_tuned"),
        "score_vs_pipeline": min(found["ratio"]["median"] for found in score.values()),
        "speed": {"training": train, "scoring": score, "gpu": "not measured", "pairs": args.pairs, "repetitions": args.repetitions,
                  "pairs_a_step": STEP,
                  "machine": {**machine("torch", "transformers"), "threads": args.threads, "trl": trl[0], "torch with trl": trl[1]}}}


def show(found, console):
    "The figures as tables."
    from rich.table import Table

    details = found["speed"]
    for kind, title in KINDS.items():
        run = details["training"][kind]
        table = Table("training", "pairs/s", "least to greatest", "ours is faster", "peak MB", "loss", "other pairs, after",
                      title=title)
        for name, rate in run["pairs_per_second"].items():
            times = f"{run['ratios'][name]['median']:.2f}x" if name in run["ratios"] else ""
            loss = run["loss"][name]
            table.add_row(NAMES[name], f"{rate['median']:.2f}", f"{rate['least']:.2f} to {rate['greatest']:.2f}", times,
                          f"{run['memory_mb'][name]:.0f}", f"{loss['loss']:.4f}", f"{loss['test_loss']:.4f}")
        console.print(table)
        console.print(f"{run['gflops']:.0f} GFLOP/s in matrix products, {run['share_of_machine']:.0%} of the "
                      f"{run['machine']['gflops']:.0f} that this machine reached")
        run = details["scoring"][kind]
        table = Table("scoring", "texts/s", "least to greatest", "ours is faster", "peak MB", title=title)
        for name, rate in run["texts_per_second"].items():
            times = f"{run['ratio']['median']:.2f}x" if name == "pipeline" else ""
            table.add_row(name, f"{rate['median']:.1f}", f"{rate['least']:.1f} to {rate['greatest']:.1f}", times,
                          f"{run['memory_mb'][name]:.0f}")
        console.print(table)
        console.print(f"pipeline at its best: {run['best']['at_once']} at once in {run['best']['dtype']}; "
                      f"scores differ by at most {run['largest_difference']:.4f}")
    table = Table("ratio", "found", "wanted", "reached")
    for name, wanted in TARGETS.items():
        table.add_row(name, f"{found[name]:.2f}", f"{wanted}", "yes" if found[name] >= wanted else "no")
    console.print(table)
    console.print(" ".join(f"{name} {value};" for name, value in details["machine"].items()))
    console.print("GPU: not measured")


def add_flags(parser):
    "The flags of the run."
    parser.add_argument("--trl-python", default=sys.executable, help="Python of an environment with trl, transformers and torch")
    parser.add_argument("--pairs", type=int, default=96, help="pairs in a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--keep", help="folder for the figures of each part; parts that it has are not measured again")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of each peer")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="1 repetition of 32 pairs, to see that it runs")
    for flag in ("--worker", "--kind", "--folder"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.kind, args.folder)
    if args.quick:
        args.pairs, args.repetitions = 32, 1
    from rich.console import Console

    found = speed(args)
    show(found, Console(width=120))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
