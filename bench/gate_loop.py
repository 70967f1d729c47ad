"""The loop on tables: recorded models with the rewards of a fitted head, and the built-in tasks with a trained model.

Every arena is divided anew for a seed, as `prompting-nb loop` divides it: what the reward model learns from, what
calibrates the judge, what the loop asks. The gate and its rivals then run in the simulator, three uids asked, the most
asked uid given to a newcomer half-way; what counts is the last third, by the recorded grades.

`--parts audits`: nothing is known of the authors, and an expensive judge (the recorded grades) audits some answers. Rules and
constants were chosen on one half of the prompts (`--half tuning`) and are reported on the other.

`--parts apart`: where the gap of corrected rewards comes from, on either half: the gate with offsets alone, exploring less, and told
what is less noisy.
"""

import argparse
import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import reward_quality as quality
from prompting_nb.encoding.encoder import Encoder
from prompting_nb.loop.tables import subnet_of
from prompting_nb.loop.tasks import built_in, recorded
from prompting_nb.loop.teach import calibrate, teach
from prompting_nb.pretrained import MINILM
from prompting_nb.reward.ensemble import fit_head
from prompting_nb.reward.preferences import decided, score_rankings
from prompting_nb.validators.audits import AuditedPolicy
from prompting_nb.validators.offsets import Offsets
from prompting_nb.validators.policies import MeanPerUid
from prompting_nb.validators.simulate import Favourites, GatePolicy, Replace, figure_of, simulate
from prompting_nb.validators.validator import Policy


PARTS = ("recorded", "built-in")  # and "audits" or "apart", where it is asked for
HALVES = ("tuning", "untouched")


class Lookup:
    "Stands in for a reward model whose scores are in a table."

    def __init__(self, scores: dict[tuple[str, str], float]):
        self.scores = scores

    def score(self, prompt, completions):
        return torch.tensor([[self.scores[prompt, text.strip()]] for text in completions])


def text_features(data: str, work: str) -> tuple[list, dict]:
    "Rankings, and the features of each (prompt, completion) from an encoder at rest, which are kept in a folder."
    args = SimpleNamespace(data=data, work=work, prompts=None, trl_python=None, trl_lr=1e-4, wrapper="")
    rankings = quality.rankings_of(args)
    features = []
    for number in range(-(-len(rankings) // quality.CHUNK)):
        features += quality.done(args, "texts", number)["result"]
    return rankings, {(r.prompt, text): torch.tensor(row) for r, rows in zip(rankings, features)
                      for text, row in zip(r.completions, rows)}


def half_of(rankings: list, half: str) -> list:
    "One of two halves of the prompts, the same for all seeds."
    prompts = sorted({r.prompt for r in rankings})
    random.Random("gap-halves").shuffle(prompts)
    tuning = set(prompts[:len(prompts) // 2])
    return [r for r in rankings if (r.prompt in tuning) == (half == "tuning")]


def recorded_arena(data: str, seed: int, features: dict, half: str | None = None):
    "An arena, and a stand-in for a reward model whose head is fitted to its training rankings."
    from prompting_nb.reward.preferences import read_rankings

    rankings = read_rankings(data, keep_all=True)
    if half is None:
        arena = recorded(rankings, seed=seed)
    else:
        arena = recorded(half_of(rankings, half), seed=seed, steps=142)
        rest = arena.test + arena.train
        arena = replace(arena, test=rest[:50], train=rest[50:])
    learn = decided(arena.train)
    rows = lambda r: torch.stack([features[r.prompt, text.strip()] for text in r.completions])
    head = fit_head([rows(r) for r in learn], [r.scores for r in learn])
    return arena, Lookup({key: float(row @ head) for key, row in features.items()})


def ceilings(run, last: float = 1 / 3) -> dict[str, float]:
    "Mean grades of what the rewards allow at best: fixed uids and uids of each prompt, chosen by the rewards themselves."
    steps, k = max(1, round(last * len(run.uids))), run.uids.shape[1]
    grades, rewards = run.grades[-steps:], run.rewards[-steps:]
    fixed = grades[:, np.argsort(-rewards.mean(0), kind="stable")[:k]].mean()
    best = np.take_along_axis(grades, np.argsort(-rewards, axis=1, kind="stable")[:, :k], 1).mean()
    return {"fixed_by_reward": float(fixed), "oracle_by_reward": float(best)}


VARIANTS = {  # name -> (corrected, told, policy)
    "now": (False, "rewards", GatePolicy),
    "grades": (False, "grades", GatePolicy),
    "corrected": (True, "rewards", GatePolicy),
    "warm": (True, "rewards", lambda subnet, seed: GatePolicy(subnet, seed, warm=True)),
    "rule": (True, "rewards", Favourites),
}


def compared(subnets: dict, seeds: list[int], moves: bool, variants=VARIANTS) -> dict:
    "Figures of the lead over the best fixed choice in hindsight, for each variant; and the ceilings."
    events = [Replace()] if moves else []
    table = {}
    for name, (corrected, told, policy) in variants.items():
        found = simulate(lambda seed: subnets[seed, corrected, told], {name: policy}, seeds, events=events)
        table[name] = found.figure(name, "lead")._asdict() | {"grade": found.figure(name, "gate").mean,
                                                              "gap_closed": found.figure(name, "gap_closed").mean}
        if name in ("now", "corrected"):
            runs = found.runs[name]
            top = [ceilings(run) for run in runs]
            best = [run.standing().best_fixed for run in runs]
            for kind in top[0]:
                table[f"{name}_{kind}"] = figure_of([t[kind] - b for t, b in zip(top, best)], seeds)._asdict()
    return table


def recorded_loop(data: str, seeds: list[int], work: str, progress=print) -> dict:
    "The recorded loop with the fitted head: a uid changes hands half-way, and nobody moves."
    _, features = text_features(data, work)
    encoder, subnets = Encoder(MINILM), {}
    for seed in seeds:
        arena, model = recorded_arena(data, seed, features)
        scores = score_rankings(lambda prompts, texts: [model.scores[p, t.strip()] for p, t in zip(prompts, texts)], arena.test)
        for corrected in (False, True):
            judge = calibrate(model, arena, scores, corrected)
            subnets[seed, corrected, "rewards"] = subnet_of(arena, encoder, judge)
        subnets[seed, False, "grades"] = subnet_of(arena, encoder, judge, told="grades")
        progress(f"recorded loop: tables of seed {seed}")
    return {name: compared(subnets, seeds, moves) for name, moves in (("moves", True), ("stays", False))}


def told(subnet, rewards: np.ndarray):
    "The same subnet, in which a policy is told other rewards."
    made = copy.copy(subnet)
    made.rewards = rewards
    return made


def gap_apart(data: str, seeds: list[int], work: str, half: str | None, progress=print) -> dict:
    "The gate with corrected rewards, with offsets alone, with less exploration, and told what is less noisy."
    _, features = text_features(data, work)
    encoder, subnets = Encoder(MINILM), {}
    for seed in seeds:
        arena, model = recorded_arena(data, seed, features, half)
        scores = score_rankings(lambda prompts, texts: [model.scores[p, t.strip()] for p, t in zip(prompts, texts)], arena.test)
        judge, flat = (calibrate(model, arena, scores) for _ in range(2))
        flat.offsets = Offsets(judge.offsets.errors)  # without the rewards no slope is learned
        whole, alone = (subnet_of(arena, encoder, one) for one in (judge, flat))
        each = lambda table: np.broadcast_to(table.mean(0), table.shape).copy()
        subnets |= {(seed, "whole"): whole, (seed, "alone"): alone, (seed, "means"): told(alone, each(alone.rewards)),
                    (seed, "truth"): told(alone, each(alone.grades))}
    progress(f"apart: tables of {len(seeds)} divisions of {half or 'all'} prompts")
    narrow = lambda subnet, seed: GatePolicy(subnet, seed, Policy(width=0.65, least=0.325))
    rows = {  # name -> (rewards that are told, policy)
        "offsets alone": ("alone", GatePolicy),
        "the same, exploring half as widely": ("alone", narrow),
        "the same, told the mean reward of each miner": ("means", GatePolicy),
        "the same, told the true mean grade of each miner": ("truth", GatePolicy),
        "offsets and slope": ("whole", GatePolicy),
    }
    found = {}
    for name, (rewards, policy) in rows.items():
        run = simulate(lambda seed: subnets[seed, rewards], {name: policy}, seeds, events=[Replace()])
        found[name] = run.figure(name, "lead")._asdict()
        if name in ("offsets alone", "offsets and slope"):
            gaps = [ceilings(one)["fixed_by_reward"] - one.standing().best_fixed for one in run.runs[name]]
            found[f"{name}: the three with the highest rewards"] = figure_of(gaps, seeds)._asdict()
    return found


BANDITS = {"mean per uid": lambda subnet, seed: MeanPerUid(subnet.metagraph, seed=seed), "gate": GatePolicy}
AUDITS = {  # name -> options of `AuditedPolicy`; all spend as much, at most 72 of 510 answers
    "first answers, plain offsets": dict(rule="first", first=3, share=0.03, plain=True),
    "first answers": dict(rule="first", first=3, share=0.03),
    "largest doubt": dict(rule="doubt", first=2, share=0.06),
    "value of the choice": dict(rule="choice", first=2, share=0.06),
}


def audited_loop(data: str, seeds: list[int], work: str, half: str | None, progress=print) -> dict:
    "The recorded loop without authors known before: a bandit without context and our gate, and rules of audits."
    _, features = text_features(data, work)
    known: dict[str, torch.Tensor] = {}
    encoder, subnets, found = Encoder(MINILM), {}, {}

    def encode(texts):
        known.update(zip(new, encoder(new)) if (new := [text for text in texts if text not in known]) else ())
        return torch.stack([known[text] for text in texts])

    for seed in seeds:
        arena, model = recorded_arena(data, seed, features, half)
        scores = score_rankings(lambda prompts, texts: [model.scores[p, t.strip()] for p, t in zip(prompts, texts)], arena.test)
        subnets[seed] = subnet_of(arena, encode, calibrate(model, arena, scores, False))
        subnets[seed].known, subnets[seed].known_embeddings = [], None
    progress(f"audits: tables of {len(seeds)} divisions of {half or 'all'} prompts")
    for bandit, make in BANDITS.items():
        for name, options in {"none": None, **AUDITS}.items():
            made = []

            def audited(subnet, seed):
                if options is None:
                    return make(subnet, seed)
                more = dict(options)
                plain = Offsets() if more.pop("plain", False) else None
                made.append(AuditedPolicy(make(subnet, seed), subnet, offsets=plain, **more))
                return made[-1]

            run = simulate(lambda seed: subnets[seed], {name: audited}, seeds, events=[Replace()])
            counts = [policy.audits for policy in made]
            figure = run.figure(name, "lead")
            found[f"{bandit}: {name}"] = figure._asdict() | {"audits": float(np.mean(counts)) if counts else 0.0}
            progress(f"{bandit}: {name}: {figure}, {np.mean(counts) if counts else 0:.0f} audits")
    return found


def built_in_loop(seeds: list[int], progress=print) -> dict:
    "The built-in tasks with a reward model trained as `prompting-nb loop` does."
    encoder, subnets = Encoder(MINILM), {}
    for seed in seeds:
        arena = built_in(encoder, seed=seed)
        model = teach(arena, seed, progress=False)
        scores = score_rankings(lambda *texts, model=model: model.score(*texts), arena.test)
        for corrected in (False, True):
            subnets[seed, corrected, "rewards"] = subnet_of(arena, encoder, calibrate(model, arena, scores, corrected))
        progress(f"built-in loop: trained for seed {seed}")
    names = ("now", "corrected", "warm", "rule")
    return compared(subnets, seeds, True, {name: VARIANTS[name] for name in names})


def measure(data: str, quick: bool = False, work: str = str(quality.WORK), progress=lambda text: None, parts=PARTS,
            built_in_seeds: int = 3, halves=("untouched", None)) -> dict:
    "Everything, or a part of it, with the keys of the benchmark."
    found = {}
    if Path(data).is_file() and "recorded" in parts:
        found["loop"] = recorded_loop(data, list(range(2 if quick else 10)), work, progress)
        for key in ("now", "corrected", "warm", "rule"):
            found[f"loop_gap_{key}"] = found["loop"]["moves"][key]["mean"]
    if Path(data).is_file() and "audits" in parts:
        for half in halves:
            seeds = list(range(900, 902 if quick else 910)) if half else list(range(2 if quick else 10))
            found.setdefault("audits", {})[half or "all"] = audited_loop(data, seeds, work, half, progress)
    if Path(data).is_file() and "apart" in parts:
        for half in HALVES if None in halves else halves:
            seeds = list(range(900, 902 if quick else 910))
            found.setdefault("apart", {})[half] = gap_apart(data, seeds, work, half, progress)
    if "built-in" in parts:
        found["built_in"] = built_in_loop(list(range(1 if quick else built_in_seeds)), progress)
        found["builtin_ahead"] = found["built_in"]["warm"]["mean"]
    return found


def show(found: dict, console) -> None:
    "Print the tables."
    titles = {"moves": "Recorded loop, the most asked uid changes hands", "stays": "Recorded loop, nobody moves"}
    parts = {title: found["loop"][name] for name, title in titles.items() if "loop" in found}
    parts |= {f"Corrected rewards, {half} prompts": rows for half, rows in found.get("apart", {}).items()}
    parts |= {f"Audits, {half} prompts": rows for half, rows in found.get("audits", {}).items()}
    if "built_in" in found:
        parts["Built-in tasks, trained reward model"] = found["built_in"]
    for title, rows in parts.items():
        table = Table(title=f"{title}: ahead of the best fixed three in hindsight, {len(next(iter(rows.values()))['values'])} seeds")
        for column in ("", "mean ± 95 %", "sd", "worst (seed)"):
            table.add_column(column, justify="right" if column else "left")
        for name, row in rows.items():
            half = row["high"] - row["mean"]
            table.add_row(name, f"{row['mean']:+.3f} ± {half:.3f}", f"{row['sd']:.3f}", f"{row['worst']:+.3f} ({row['worst_seed']})")
        console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=str(quality.DATA), help="prompts-responses.jsonl.gz (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "audits", "apart"), default=PARTS, help="default: recorded and built-in")
    parser.add_argument("--half", choices=HALVES,
                        help="of the prompts, for audits and apart; default: the untouched one, and all of them (apart: both)")
    parser.add_argument("--quick", action="store_true", help="one or two seeds: does it run at all?")
    parser.add_argument("--built-in-seeds", type=int, default=3, metavar="N", help="each trains a model, a minute or two (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="put the figures into this file; figures of a part that is not run stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(args.data, args.quick, progress=print, parts=args.parts, built_in_seeds=args.built_in_seeds,
                     halves=(args.half,) if args.half else ("untouched", None))
    show(result, Console(width=120))
    print({key: round(value, 4) for key, value in result.items() if isinstance(value, float)})
    if args.json:
        before = json.loads(args.json.read_text()) if args.json.is_file() else {}
        args.json.write_text(json.dumps(before | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
