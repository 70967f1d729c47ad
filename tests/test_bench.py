"""The parts of the benchmarks that decide what is counted: neighbours, repetitions that are measured again, what is kept."""

import argparse
import io
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

machine = import_module("machine")
speed = import_module("reward_speed")
quality = import_module("reward_quality")


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="needs /proc")
def test_what_children_use_is_our_own():
    "Of one that runs, and of one that has ended."
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True)\ninput()"
    before = machine._own(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    running = machine._own(os.getpid())
    child.communicate(b"\n")
    assert running - before >= 0.2 and machine._own(os.getpid()) >= running


def test_neighbours_are_all_that_runs_less_our_own(monkeypatch):
    clock = iter([(10.0, 100.0, 20.0), (14.0, 106.0, 23.0)])  # seconds, processor seconds of all, and ours
    monkeypatch.setattr(machine.Neighbours, "_now", lambda self: next(clock))
    assert machine.Neighbours().cores() == pytest.approx((6 - 3) / 4)


@pytest.mark.parametrize("used, again, left", [([0.1], 0, 0.1), ([0.9, 0.3, 0.2], 2, 0.2), ([0.9] * 9, 3, 0.9), ([None], 0, None)])
def test_a_disturbed_turn_is_measured_again(used, again, left, monkeypatch):
    found = iter(used)
    monkeypatch.setattr(machine, "Neighbours", lambda: SimpleNamespace(cores=lambda: next(found)))
    turns = []
    turn = machine.undisturbed(lambda: turns.append(1) or {"seconds": len(turns)}, tries=4)
    assert turn == {"seconds": again + 1, "others": left, "again": again}
    told = speed.disturbance([{"ours": turn}, {"ours": {"others": 0.0, "again": 1}}])
    assert told["measured_again"] == again + 1 and told["others"] == {"ours": [left, 0.0]}
    assert told["disturbed"] == ([[0, "ours"]] if left == 0.9 else [])


def test_figures_of_the_miner_say_what_disturbed_them(monkeypatch):
    miner = import_module("miner")
    used = iter([0.1, 0.5, 0.3, 0.0, *[0.7] * 4])  # the second repetition is measured again, the third in vain
    monkeypatch.setattr(machine, "Neighbours", lambda: SimpleNamespace(cores=lambda: next(used)))
    server = SimpleNamespace(ask=lambda: {"cpu": 0.0})
    client = SimpleNamespace(closed=lambda *_: {"seen": [(0.5, 200)], "wall": 1.0, "cpu": 0.5})
    peer = miner.Peer("ours", client, server)
    row = miner.middle([peer.measure("closed", 1, 1.0) for _ in range(3)])
    assert row["rate"] == 1.0 and row["others"] == 0.7 and row["again"] == 2 + 3
    fine, unknown = {"others": 0.1, "again": 1}, {"others": None, "again": 0}
    told = miner.disturbance({"signatures": fine, "policy": unknown, "closed": [{"peer": "ours", "at_a_time": 16, **row}], "open": [],
                              "overload": {"rows": []}, "overload_rising": {"rows": []}, "held": {"rows": []}})
    assert told == {"quiet": 0.2, "tries": 4, "most": 0.7, "measured_again": 6, "disturbed": ["closed, ours, 16"]}


def test_what_takes_microseconds_is_shown_at_the_least_and_in_the_middle():
    row = lambda slow, others, again: {name: slow * value for name, value in zip(
        ("blacklist", "priority", "cache", "sign", "verify"), (4.0, 3.0, 5.0, 20.0, 40.0))} | {"others": others, "again": again}
    decisions = import_module("miner").Decisions.__new__(import_module("miner").Decisions)
    decisions.hotkeys, decisions.rows = ["a"] * 15, [row(2.0, 0.1, 0), row(1.0, None, 3), row(1.5, 0.2, 1)]
    policy, signatures = decisions.figures().values()
    assert policy["least"] == {"blacklist": 4, "priority": 3, "cache": 5, "total": 12}
    assert policy["median"]["total"] == 18 and policy["greatest"] == 24 and policy["of_signatures"] == pytest.approx(0.2)
    assert (policy["repetitions"], policy["hotkeys"], policy["others"], policy["again"]) == (3, 16, 0.2, 4)
    assert (signatures["sign"], signatures["least_verify"], signatures["again"]) == (30, 40, 4)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    args, asked = SimpleNamespace(pairs=4, threads=2, keep=str(tmp_path), minutes=None), []
    measure = lambda: asked.append(1) or {"rate": 1.5}
    for _ in range(2):
        assert speed.keeper(args, lambda: None)("gpt2-0", measure) == {"rate": 1.5}
    assert asked == [1]
    args.minutes = 1e-9
    keep = speed.keeper(args, lambda: None)
    assert keep("gpt2-0", measure) == {"rate": 1.5}
    with pytest.raises(speed.Pause, match="before gpt2-1"):
        keep("gpt2-1", measure)
    args.pairs = 8  # other figures
    with pytest.raises(speed.Pause, match="before gpt2-0"):
        speed.keeper(args, lambda: None)("gpt2-0", measure)


def test_models_are_compared_on_the_divisions_that_both_have():
    row = lambda *values: {figure: quality.interval(values) for figure in quality.FIGURES}
    table = {"ours": row(0.8, 0.9), "trl_all": row(0.75), "length": row(0.7, 0.8)}
    quality.compare(table)
    assert table["ours"]["accuracy_over_trl_all"]["values"] == pytest.approx([0.05])
    assert table["ours"]["best_of_over_length"]["mean"] == pytest.approx(0.1) and "accuracy_over_ours" not in table["ours"]


def test_switching_off_leaves_no_trace():
    from prompting_nb.reward import training
    from prompting_nb.reward.fast import packing

    before = packing.shares_prefix, packing.attend, packing._LAST, training.packed_rewards, training.length_batches
    for without in speed.ABLATIONS.values():
        with speed.switched_off(without):
            changed = packing.shares_prefix, packing.attend, packing._LAST, training.packed_rewards, training.length_batches
        assert (changed == before) == (without in ([], ["gelu"], ["packed"]))
    assert before == (packing.shares_prefix, packing.attend, packing._LAST, training.packed_rewards, training.length_batches)


class Scripted:
    "A peer that answers at once, with rates that its name decides."

    RATES = {"ours": 8.0, "trl_default": 1.0, "trl_tuned": 4.0, "reference": 0.25, "pipeline": 2.0}
    asked = []

    def __init__(self, args, name, kind, folder):
        self.name, self.kind = name, kind

    def ask(self, do, **job):
        self.asked.append((self.name, do, {key: job[key] for key in job if key not in ("pairs", "rows", "texts", "test")}))
        if do == "rows":
            return {"rows": [[[1], [2]] for _ in job["pairs"]], "texts": [t for p in job["pairs"] for t in (p["chosen"], p["rejected"])]}
        count = len(job.get("pairs") or job.get("rows") or job.get("texts") or [])
        rate = self.RATES[self.name] * (2 if job.get("attention") == "eager" else 1) / (1 + len(job.get("without", [])))
        texts = 2 * count if self.name == "ours" else count
        return {"train": {"seconds": count / rate, "pairs": count, "steps": 3, "loss": 0.7, "test_loss": 0.6},
                "ablation": {"seconds": count / rate, "pairs": count}, "batch": {"tokens": 4096},
                "work": {"flop": 1e9, "median_tokens": 5}, "rate": {"gflops": 80.0, "bf16": True, "threads": 2},
                "score": {"seconds": texts / rate, "scores": [0.5] * texts}}[do] | {"peak_mb": 100.0}

    def close(self):
        self.asked.append((self.name, "close", {}))


def test_the_run_as_a_whole_with_peers_that_answer_at_once(tmp_path, monkeypatch):
    "Every figure has its place, TRL and the pipeline get what was fastest, and a second run computes nothing again."
    monkeypatch.setattr(speed, "Peer", Scripted)
    monkeypatch.setattr(speed, "make_models", lambda folder: None)
    monkeypatch.setattr(machine, "Neighbours", lambda: SimpleNamespace(cores=lambda: 0.1))
    monkeypatch.setattr(speed, "real_lengths", lambda path: [[3, 4, 5], [2, 6, 1]])
    monkeypatch.setattr(speed.subprocess, "run", lambda *args, **options: SimpleNamespace(stdout="1.0 2.0"))
    data = tmp_path / "rows.jsonl"
    data.touch()
    parser = argparse.ArgumentParser()
    speed.add_flags(parser)
    args = parser.parse_args(["--pairs", "16", "--repetitions", "2", "--keep", str(tmp_path / "kept"), "--data", str(data), "--quiet"])
    Scripted.asked.clear()
    found = speed.speed(args)
    assert found["train_vs_trl_default"] == 8 and found["train_vs_trl_tuned"] == 1  # with eager attention it is twice as fast
    assert found["train_vs_reference"] == found["train_vs_reference_no_dropout"] == 32
    assert found["score_vs_pipeline"] == min(found["score_gpt2_vs_pipeline"], found["score_bert_vs_pipeline"]) == 2
    gpt2, bert = (found["speed"]["training"][kind] for kind in ("gpt2", "bert"))
    assert gpt2["trl_tuned"]["attention"] == "eager" and found["speed"]["scoring"]["bert"]["best"]["attention"] == "eager"
    assert [len(run["trl_tried"]) for run in (gpt2, bert)] == [7, 6] and "gelu" not in str(bert["trl_tried"])
    assert gpt2["real"]["ratios"]["trl_default"]["median"] == 8 and "reference" not in gpt2["real"]["ratios"]
    assert gpt2["ablation"]["ratios"]["without the shared prompt"]["median"] == 2 and len(bert["ablation"]["ratios"]) == 5
    assert gpt2["others"]["ours"] == [0.1, 0.1] and gpt2["disturbed"] == [] and gpt2["measured_again"] == 0
    assert sum(1 for asked in Scripted.asked if asked[:2] == ("reference", "close")) == 1 + 2 * 2  # it never waits beside others
    speed.show(found, Console(file=io.StringIO(), width=120))
    before = len(Scripted.asked)
    assert speed.speed(args) == found and len(Scripted.asked) == before
