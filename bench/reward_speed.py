"""How fast reward models are trained and used: ours beside TRL's RewardTrainer, a transformers pipeline and the reference.

Models with random weights, GPT-2 (6 layers of 384) and a BERT of the size of MiniLM, get the same pairs: lengths are skewed
(median about 130 tokens, tail to 1024), chosen and rejected share their prompt. Peers run in processes of their own and take
turns in every repetition, which has pairs of its own; each turn begins with 8 pairs (the reference: 4) that are not counted.
Measured are pairs a second up to the end of the last step: for ours from the call of `train`, tokenising and all; for the others,
which are handed our tokens, from the beginning of the first step:

  ours         prompting_nb.reward.training.train with its defaults, on rankings of two; batches are so large that there are about as many
               steps as for TRL, with its 16 pairs a step (chosen on pairs that are not measured)
  trl_default  RewardTrainer with its defaults (8 pairs at once, checkpointed activations), 16 pairs a step
  trl_tuned    bf16, no checkpointing, 16 pairs a step; one pair at once, or 2 or 4 grouped by length, torch's or single
               operations' attention, and for GPT-2 the fast GELU: each tried twice after a warm-up, the fastest is taken
  no_dropout   two forwards of rows that are padded to 1024, in float32 (its rate does not depend on the texts: 4 pairs a step)
  reference    the same with GPT-2's own dropout, since the reference trained in train mode

AdamW (fused), learning rate, weight decay and clipping are the same. That they learn the same is shown by one step on the
same 8 pairs, from the same weights: its loss, and the loss on other pairs after it. Three more parts:

  real         ours and TRL's on texts with the lengths that prompts and answers of AlpacaEval have (--data)
  ablation     ours with one thing switched off at a time
  scoring      transformers' text-classification pipeline, given its texts sorted by length, at its best batch size,
               precision, attention and GELU

A turn in which other programs used more than a fifth of a core is measured again, up to three times; what they used
stands in the result. With --keep, every repetition is kept in a folder, and --minutes stops between two of them: the same
command goes on from there.
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

from machine import QUIET, cores, machine, undisturbed

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared/data/alpacaeval/prompts-responses.jsonl.gz"
KINDS = {"gpt2": "GPT-2, 6 layers of 384", "bert": "BERT, 6 layers of 384"}
NAMES = {"ours": "ours", "trl_default": "TRL, defaults", "trl_tuned": "TRL, tuned", "reference": "reference",
         "no_dropout": "reference, no dropout"}
TUNED = [{"at_once": 1}, {"at_once": 2, "group": True}, {"at_once": 4, "group": True}]
ABLATIONS = {"as it is": [], "without the shared prompt": ["share"], "without attention as one operation": ["attention"],
             "without micro-batches in threads": ["threads"], "without the short last layer": ["last"],
             "without torch's GELU": ["gelu"], "padded rows, grouped by length": ["packed"],
             "padded rows in random order": ["packed", "group"]}
TARGETS = {"train_vs_trl_default": 5, "train_vs_trl_tuned": 2, "train_vs_reference": 38,
           "train_bert_vs_trl_default": 2.4, "train_bert_vs_trl_tuned": 1.4, "score_vs_pipeline": 1.8}
PADDED = ("no_dropout", "reference")
LR, STEP, PARITY, FEW, LONGEST = 3e-4, 16, 8, 8, 1024
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[EOS]"]


# Data and models


def words_of(rng, liked):
    "A text; those that are liked have more words of the first tenth of the vocabulary."
    count, size = max(4, int(rng.lognormvariate(math.log(55), 1.0))), 30000
    return [f"w{rng.randrange(size // 10) if rng.random() < liked else rng.randrange(size)}" for _ in range(min(count, LONGEST))]


def make_pairs(count, seed, real=None):
    "Pairs {prompt, chosen, rejected} that have at most 1024 tokens with special ones; `real` are lengths to draw from."
    rng, pairs = random.Random(seed), []
    for _ in range(count):
        prompt = words_of(rng, 0.1)[:900]
        texts = [words_of(rng, liked)[: LONGEST - 4 - len(prompt)] for liked in (0.5, 0.1)]
        if real:
            prompt, *texts = ([f"w{rng.randrange(3000, 30000)}" for _ in range(size)] for size in rng.choice(real))
        pairs.append(dict(zip(("prompt", "chosen", "rejected"), map(" ".join, (prompt, *texts)))))
    return pairs


def real_lengths(path):
    "Tokens of the prompt and of two answers, for the prompts of recorded rankings; at most 1024 together."
    from prompting_nb.pretrained import minilm_path
    from prompting_nb.reward.preferences import read_rankings
    from transformers import AutoTokenizer

    tokenizer, rng, found = AutoTokenizer.from_pretrained(minilm_path()), random.Random(0), []
    count = lambda text: max(1, len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
    for ranking in read_rankings(path):
        prompt = min(900, count(ranking.prompt))
        found.append([prompt, *(min(LONGEST - 4 - prompt, count(text)) for text in rng.sample(ranking.completions, 2))])
    return found


def make_models(folder):
    "A sequence classifier of each kind with random weights, and its tokenizer."
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config
    from transformers.utils import logging

    from prompting_nb.pretrained import word_tokenizer

    logging.disable_progress_bar()
    configs = {
        "gpt2": GPT2Config(n_embd=384, n_layer=6, n_head=6, num_labels=1, pad_token_id=0),
        "bert": BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=1,
                           max_position_embeddings=LONGEST)}
    for kind, config in configs.items():
        vocabulary = SPECIAL + [f"w{i}" for i in range(config.vocab_size - len(SPECIAL))]
        special = {"gpt2": {"eos_token": "[EOS]"}, "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]"}}[kind]
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(Path(folder, kind))
        tokenizer = word_tokenizer(vocabulary, pad_token="[PAD]", model_max_length=LONGEST, **special)
        tokenizer.save_pretrained(Path(folder, kind))


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

    def ablation(self, pairs, tokens, without):
        "Train with some things switched off."
        with switched_off(without):
            return self.train(pairs, tokens=tokens, packed="packed" not in without)

    def train(self, pairs, test=None, tokens=4096, packed=True, **options):
        from prompting_nb.reward.training import TrainConfig, train, validate

        one_step = {"tokens_per_batch": 10**6, "lr": 2 * LR}  # in its only step the rate is half way down
        given = {"epochs": 1, "lr": LR, "warmup": 0.0, "weight_decay": 0.0, "tokens_per_batch": tokens,
                 "packed": packed}
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


@contextmanager
def switched_off(without):
    "Let ours run without some of what makes it fast."
    from unittest.mock import patch

    from prompting_nb.reward import batches, training
    from prompting_nb.reward.fast import attention, packing

    def in_turn(query, key, value, scale, spans, causal, **options):
        "Torch's own attention, one text after the other."
        gather = lambda x, span: torch.cat((x[:, span.shared], x[:, span.own]), dim=1)
        parts = [attention._fused(query[:, span.queries], gather(key, span), gather(value, span), scale, causal) for span in spans]
        return torch.cat(parts, dim=1).transpose(0, 1)

    def in_order(draws, rows, budget, rng, window=256):
        "Batches of prompts in random order, each padded to its longest text."
        found, most = [], math.inf
        for one in rng.sample(draws, len(draws)):
            longest = max(len(rows[one.ranking][i]) for i in one.completions)
            count = sum(len(each.completions) for each in found[-1]) if found else 0
            most = max(most, longest)
            if (count + len(one.completions)) * most > budget:
                found.append([])
                most = longest
            found[-1].append(one)
        return found

    import torch

    never = lambda encoder: False
    patches = {"share": [(packing, "shares_prefix", never), (training, "shares_prefix", never)],
               "attention": [(packing, "attend", in_turn)], "last": [(packing, "_LAST", {})],
               "gelu": [(packing, "NewGELUActivation", type("NoSuchLayer", (), {}))], "packed": [],
               "threads": [(training, "packed_rewards", partial(packing.packed_rewards, threads=1))],
               "group": [(training, "length_batches", in_order), (batches, "length_batches", in_order)]}
    running = [patch.object(*one) for name in without for one in patches[name]]
    for one in running:
        one.start()
    try:
        yield
    finally:
        for one in running:
            one.stop()


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

    def score(self, texts, at_once, dtype, attention="sdpa", gelu=False, **options):
        import torch
        from transformers import pipeline

        name = dtype, attention, gelu
        if name not in self.pipelines:
            how = {"attn_implementation": attention, **({"activation_function": "gelu_pytorch_tanh"} if gelu else {})}
            self.pipelines.clear()
            self.pipelines[name] = pipeline("text-classification", self.folder, dtype=getattr(torch, dtype), device="cpu",
                                            model_kwargs=how)
        started = time.perf_counter()
        found = self.pipelines[name](texts, batch_size=at_once, function_to_apply="none", truncation=True)
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


def data_of(crew, count, seed, real=None):
    "Pairs, and their tokens and texts for the peers."
    pairs = make_pairs(count, seed, real)
    return {"pairs": pairs, **crew.ask("ours", "rows", pairs=pairs)}


class Crew:
    "The peers of a kind of model, each started when it is first asked; the one that is only a guest ends with its turn."

    def __init__(self, args, kind, folder):
        self.args, self.kind, self.folder, self.peers = args, kind, folder, {}

    def ask(self, name, do="train", **job):
        who = "reference" if name in PADDED else name
        if who not in self.peers:
            self.peers[who] = Peer(self.args, who, self.kind, self.folder)
        return self.peers[who].ask(do, **job)

    def dismiss(self, name):
        "The reference holds more memory than all others together."
        who = "reference" if name in PADDED else name
        if who in self.peers:
            self.peers.pop(who).close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for name in list(self.peers):
            self.dismiss(name)


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


def prepared(args, crew, names, keep):
    "What is found out before anything is measured: how peers learn, the size of our batches, and how TRL is fastest."
    options = {name: {"dropout": True} if name == "reference" else {} for name in names}
    options["trl_default"], options["trl_tuned"] = {"tuned": False}, {"tuned": True, **TUNED[0]}
    data = data_of(crew, PARITY, 1000)
    learnt = keep(f"{crew.kind}-parity", lambda: dict(parity(crew.ask, names, options, data_of(crew, PARITY, 2000), data)))
    learnt |= {name: learnt["reference"] for name in names if name == "no_dropout"}
    crew.dismiss("reference")
    data = data_of(crew, args.pairs, 3000)
    rows = data["rows"][: max(STEP, args.pairs // 2)]

    def tried(how):
        return keep("-".join([crew.kind, "tried", *(f"{key}_{value}" for key, value in how.items())]), lambda: rates(how))

    def rates(how):
        crew.ask("trl_tuned", rows=rows[:FEW], tuned=True, **how)
        found = [undisturbed(lambda: crew.ask("trl_tuned", rows=rows, tuned=True, **how), args.tries) for _ in range(2)]
        return {**how, "rate": max(map(rate_of, found)), "rates": list(map(rate_of, found)),
                "others": max((one["others"] or 0) for one in found)}

    every = [tried({**how, "attention": attention}) for how in TUNED for attention in ("sdpa", "eager")]
    best = max(every, key=lambda how: how["rate"])
    if crew.kind == "gpt2":  # BERT has another GELU, which is one operation already
        every.append(tried({key: best[key] for key in ("at_once", "group", "attention") if key in best} | {"gelu": True}))
        best = max(every, key=lambda how: how["rate"])
    options["trl_tuned"] = {"tuned": True, **{key: best[key] for key in ("at_once", "group", "attention", "gelu") if key in best}}
    options["ours"] = {"tokens": crew.ask("ours", "batch", pairs=data["pairs"])["tokens"]}
    return {"loss": {name: {key: found[key] for key in ("loss", "test_loss")} for name, found in learnt.items()},
            "trl_tried": every, "options": options}


def repetition(args, crew, names, options, number, real=None):
    "A turn of every peer on pairs of this repetition."
    pairs = args.pairs // 2 if real else args.pairs
    data, found = data_of(crew, pairs, number, real), {}
    few = {key: values[:FEW] for key, values in data.items() if key in ("pairs", "rows")}
    for name in random.Random(number).sample(names, len(names)):
        some = few if name in PADDED else data
        warm = {key: values[:4] for key, values in few.items()} if name in PADDED else few  # one step of the reference
        crew.ask(name, **select(name, warm), **options[name])
        found[name] = undisturbed(lambda: crew.ask(name, **select(name, some), **options[name]), args.tries)
        if name in PADDED:
            crew.dismiss(name)
    return found


def without(args, crew, options, number):
    "A turn of ours as it is, and of each way to switch something off."
    pairs, found = make_pairs(max(STEP, args.pairs // 2), number), {}
    names = [name for name, off in ABLATIONS.items() if crew.kind == "gpt2" or not {"share", "gelu"} & {*off}]
    for name in random.Random(number).sample(names, len(names)):
        job = {"tokens": options["ours"]["tokens"], "without": ABLATIONS[name]}
        crew.ask("ours", "ablation", pairs=pairs[:FEW], **job)
        found[name] = undisturbed(lambda: crew.ask("ours", "ablation", pairs=pairs, **job), args.tries)
    return found


def summed(repetitions, than="ours"):
    "Rates, ratios and neighbours of repetitions."
    names = list(repetitions[0])
    rates = {name: [rate_of(found[name]) for found in repetitions] for name in names}
    return {"pairs_per_second": {name: median(values) for name, values in rates.items()},
            "ratios": {name: median([a / b for a, b in zip(rates[than], rates[name])]) for name in names if name != than},
            **disturbance(repetitions)}


def disturbance(repetitions):
    "What others used, which turns were measured again, and which were disturbed to the end."
    turns = [(number, name, turn) for number, found in enumerate(repetitions) for name, turn in found.items()]
    return {"others": {name: [found[name]["others"] for found in repetitions] for name in repetitions[0]},
            "measured_again": sum(turn["again"] for _, _, turn in turns),
            "disturbed": [[number, name] for number, name, turn in turns if (turn["others"] or 0) > QUIET]}


def training(args, kind, folder, keep):
    "The rates and losses of everyone who trains a model of a kind."
    names = [name for name in NAMES if name not in PADDED or kind == "gpt2"]
    with Crew(args, kind, folder) as crew:
        before = keep(f"{kind}-prepared", lambda: prepared(args, crew, names, keep))
        options = before["options"]
        runs = [keep(f"{kind}-{number}", lambda: repetition(args, crew, names, options, number)) for number in range(args.repetitions)]
        fewer = range(min(3, args.repetitions))
        off = [keep(f"{kind}-without-{number}", lambda: without(args, crew, options, number)) for number in fewer]
        found = {}
        if Path(args.data).is_file():
            lengths = keep("lengths", lambda: real_lengths(args.data))
            three = [name for name in names if name not in PADDED]
            real = [keep(f"{kind}-real-{number}", lambda: repetition(args, crew, three, options, 5000 + number, lengths))
                    for number in fewer]
            sizes = sorted(prompt + answer for prompt, *answers in lengths for answer in answers)
            found = {"real": {**summed(real), "median_tokens": statistics.median(sizes), "pairs": args.pairs // 2}}
        pairs = [pair for repetition in range(args.repetitions) for pair in make_pairs(args.pairs, repetition)]
        work_of_pair = keep(f"{kind}-work", lambda: crew.ask("ours", "work", pairs=pairs))
        machine = keep(f"{kind}-rate", lambda: undisturbed(lambda: crew.ask("ours", "rate"), args.tries))
    rates = summed(runs)
    gflops = rates["pairs_per_second"]["ours"]["median"] * work_of_pair["flop"] / 1e9
    return {**rates, **found, "ablation": summed(off, "as it is"), "steps": {name: runs[-1][name]["steps"] for name in names},
            "memory_mb": {name: runs[-1][name]["peak_mb"] for name in names}, "loss": before["loss"],
            "trl_tried": before["trl_tried"], "trl_tuned": options["trl_tuned"], "tokens_per_batch": options["ours"]["tokens"],
            "work": {key: value for key, value in work_of_pair.items() if key != "peak_mb"},
            "machine": {key: machine[key] for key in ("gflops", "bf16", "threads")}, "gflops": gflops,
            "share_of_machine": gflops / machine["gflops"]}


def sorted_texts(data, count=None):
    "Texts from the longest to the shortest, as a pipeline is best given them, and their places."
    texts = data["texts"][:count]
    order = sorted(range(len(texts)), key=lambda i: -texts[i].count(" "))
    return [texts[i] for i in order], order


def best_pipeline(crew, args):
    "The settings with which the pipeline is fastest, and how far its scores are from ours."
    data = data_of(crew, args.pairs, 4000)
    texts, order = sorted_texts(data, max(2 * STEP, args.pairs))
    ask = lambda **how: crew.ask("pipeline", "score", **how)

    def tried(how):
        ask(texts=texts[: 2 * FEW], **how)
        found = undisturbed(lambda: ask(texts=texts, **how), args.tries)
        return {**how, "rate": len(texts) / found["seconds"], "others": found["others"]}

    every = [tried({"dtype": dtype, "at_once": at_once}) for dtype in ("bfloat16", "float32") for at_once in (1, 2, 4, 8, 16)]
    chosen = lambda: {key: value for key, value in max(every, key=lambda how: how["rate"]).items() if key not in ("rate", "others")}
    every.append(tried({**chosen(), "attention": "eager"}))
    if crew.kind == "gpt2":
        every.append(tried({**chosen(), "gelu": True}))
    exact = ask(texts=texts, at_once=1, dtype="float32")["scores"]
    ours = crew.ask("ours", "score", pairs=data["pairs"])["scores"]
    return {"pipeline_tried": every, "best": chosen(),
            "largest_difference": max(abs(a - ours[i]) for a, i in zip(exact, order))}


def score_turns(crew, args, best, number):
    "A turn of ours and of the pipeline on the same texts."
    data, found = data_of(crew, args.pairs, number), {}
    texts, _ = sorted_texts(data)
    for name in random.Random(number).sample(["ours", "pipeline"], 2):
        some = {"ours": {"pairs": data["pairs"]}, "pipeline": {"texts": texts, **best}}[name]
        warm = some | {key: values[: 2 * FEW] for key, values in some.items() if key in ("pairs", "texts")}
        crew.ask(name, "score", **warm)
        turn = undisturbed(lambda: crew.ask(name, "score", **some), args.tries)
        found[name] = {key: turn[key] for key in ("seconds", "others", "again", "peak_mb")} | {"pairs": len(texts)}
    return found


def scoring(args, kind, folder, keep):
    "Texts a second, and the largest difference of two scores."
    with Crew(args, kind, folder) as crew:
        before = keep(f"{kind}-pipeline", lambda: best_pipeline(crew, args))
        runs = [keep(f"{kind}-score-{number}", lambda: score_turns(crew, args, before["best"], number))
                for number in range(args.repetitions)]
    found = summed(runs)
    return {"texts_per_second": found.pop("pairs_per_second"), "ratio": found.pop("ratios")["pipeline"], **found, **before,
            "memory_mb": {name: turn["peak_mb"] for name, turn in runs[-1].items()}}


class Pause(Exception):
    "Time is over; what was measured is kept."


def keeper(args, bar):
    "A function that gives what was measured before, where there is a folder that has it; else what is measured now."
    stamp = {"pairs": args.pairs, "threads": args.threads}
    started = time.monotonic()

    def keep(name, measure):
        path = Path(args.keep, f"{name}.json") if args.keep else None
        known = json.loads(path.read_text()) if path and path.is_file() else {}
        bar()
        if known.get("stamp") == stamp:
            return known["found"]
        if args.minutes and time.monotonic() - started > 60 * args.minutes:
            raise Pause(f"{args.minutes:g} minutes are over before {name}")
        found = measure()
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"stamp": stamp, "found": found}))
        return found

    return keep


def speed(args):
    "All figures: the ratios of `TARGETS`, and under `speed` what they come from."
    from tqdm.auto import tqdm

    with tempfile.TemporaryDirectory() as folder, tqdm(desc="speed", disable=args.quiet) as bar:
        make_models(folder)
        keep = keeper(args, bar.update)
        score = {kind: scoring(args, kind, folder, keep) for kind in args.kinds}
        train = {kind: training(args, kind, folder, keep) for kind in args.kinds}
    if len(args.kinds) < len(KINDS):
        raise Pause("only some kinds were measured")
    ratio = lambda kind, name: train[kind]["ratios"][name]["median"]
    trl = subprocess.run([args.trl_python, "-c", "import importlib.metadata as m; print(m.version('trl'), m.version('torch'))"],
                         capture_output=True, text=True, check=True).stdout.split()
    return {
        "train_vs_trl_default": ratio("gpt2", "trl_default"), "train_vs_trl_tuned": ratio("gpt2", "trl_tuned"),
        "train_vs_reference_no_dropout": ratio("gpt2", "no_dropout"), "train_vs_reference": ratio("gpt2", "reference"),
        "train_bert_vs_trl_default": ratio("bert", "trl_default"), "train_bert_vs_trl_tuned": ratio("bert", "trl_tuned"),
        "score_gpt2_vs_pipeline": score["gpt2"]["ratio"]["median"], "score_bert_vs_pipeline": score["bert"]["ratio"]["median"],
        "score_vs_pipeline": min(found["ratio"]["median"] for found in score.values()),
        "speed": {"training": train, "scoring": score, "gpu": "not measured", "pairs": args.pairs, "repetitions": args.repetitions,
                  "pairs_a_step": STEP, "quiet": QUIET,
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
        table = Table("ours", "pairs/s", "as it is is faster", title=f"{title}: one thing switched off at a time")
        for name, rate in run["ablation"]["pairs_per_second"].items():
            times = run["ablation"]["ratios"].get(name)
            table.add_row(name, f"{rate['median']:.2f}", f"{times['median']:.2f}x" if times else "")
        console.print(table)
        for name, times in run.get("real", {}).get("ratios", {}).items():
            console.print(f"lengths of AlpacaEval: {times['median']:.2f}x {NAMES[name]}")
        console.print(f"measured again: {run['measured_again']}; disturbed to the end: {run['disturbed'] or 'none'}")
        run = details["scoring"][kind]
        table = Table("scoring", "texts/s", "least to greatest", "ours is faster", "peak MB", title=title)
        for name, rate in run["texts_per_second"].items():
            times = f"{run['ratio']['median']:.2f}x" if name == "pipeline" else ""
            table.add_row(name, f"{rate['median']:.1f}", f"{rate['least']:.1f} to {rate['greatest']:.1f}", times,
                          f"{run['memory_mb'][name]:.0f}")
        console.print(table)
        console.print(f"pipeline at its best: {run['best']}; "
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
    parser.add_argument("--keep", help="folder for the figures of each repetition; those that it has are not measured again")
    parser.add_argument("--minutes", type=float, help="begin nothing more after so many; the same command goes on (with --keep)")
    parser.add_argument("--tries", type=int, default=4, help="times that a turn is measured at most, until others let it alone")
    parser.add_argument("--data", default=str(DATA), help="recorded rankings, for real lengths (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of each peer")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="models (default: both)")
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

    try:
        found = speed(args)
    except Pause as pause:
        sys.exit(f"reward_speed.py: {pause}; run the same again")
    show(found, Console(width=120))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
