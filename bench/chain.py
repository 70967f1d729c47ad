"""How long one epoch of Yuma consensus takes, beside its definition uid by uid, and how many epochs the laboratory plays a second.

    python bench/chain.py                    all rows: a minute
    python bench/chain.py --json FILE        write the numbers as well

The peer is the text of the definition in numpy: each uid's column is sorted and summed by itself. Both get the same
weights, stakes and bonds and are run in turns, and their results are compared before anything is timed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from machine import Neighbours, machine
from rich.console import Console
from rich.table import Table

from prompting_nb.network.consensus import yuma
from prompting_nb.network.incentives import Copier, Honest, Laboratory, Steady

SIZES = ((16, 256), (64, 1024), (64, 4096))  # validators, uids
ROUNDS = 15


def by_definition(weights, stake, bonds, kappa=0.5, alpha=0.1):
    "Incentive, dividends and bonds of one epoch, one uid after the other; nothing divides by zero in these rows."
    weights, stake = weights / weights.sum(1, keepdims=True), stake / stake.sum()
    validators, uids = weights.shape
    ranks, instant = np.empty(uids), np.empty((validators, uids))
    for uid in range(uids):
        column = weights[:, uid]
        supported = [value for value in np.unique(column) if stake[column >= value].sum() >= kappa - 1e-9]
        clipped = np.minimum(column, max(supported))
        ranks[uid] = stake @ clipped
        instant[:, uid] = clipped * stake / ranks[uid]
    bonds = alpha * instant + (1 - alpha) * bonds / bonds.sum(0)
    incentive = ranks / ranks.sum()
    return incentive, bonds @ incentive, bonds


def timed(work):
    "Milliseconds of one call."
    begin = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begin)


def size_row(validators, uids):
    "Both implementations on one subnet."
    rng = np.random.default_rng(0)
    weights, stake = rng.random((validators, uids)), rng.random(validators)
    bonds = rng.random((validators, uids))
    ours = yuma(weights, stake, bonds)
    for one, other in zip((ours.incentive, ours.dividends, ours.bonds), by_definition(weights, stake, bonds)):
        np.testing.assert_allclose(one, other, atol=1e-9)
    found, plain = [], []
    for turn in range(ROUNDS):
        found.append(timed(lambda: yuma(weights, stake, bonds)))
        if turn % 5 == 0:
            plain.append(timed(lambda: by_definition(weights, stake, bonds)))
    return {"validators": validators, "uids": uids, "yuma_ms": statistics.median(found), "slowest_ms": max(found),
            "definition_ms": statistics.median(plain), "ratio": statistics.median(plain) / statistics.median(found)}


def laboratory_row():
    "Epochs a second of three validators, one of them a copier, and eight miners."
    validators = {"a": Honest(), "b": Honest(), "copier": Copier()}
    laboratory = Laboratory(validators, [4, 3, 3], {f"miner {n}": Steady(n / 8) for n in range(8)})
    laboratory.run(100)
    begin = time.perf_counter()
    laboratory.run(2000)
    return 2000 / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    args = parser.parse_args()
    neighbours = Neighbours()
    rows = [size_row(*size) for size in SIZES]
    result = {"machine": machine("numpy"), "rows": rows, "epochs_per_second": laboratory_row(),
              "yuma_ms_4096_uids_64_validators": rows[-1]["yuma_ms"]}
    result["neighbours"] = neighbours.cores()
    table = Table("validators", "uids", "yuma, ms", "slowest, ms", "by definition, ms", "times as fast", title="One epoch")
    for row in rows:
        figures = (row[name] for name in ("yuma_ms", "slowest_ms", "definition_ms", "ratio"))
        table.add_row(str(row["validators"]), str(row["uids"]), *(f"{figure:.3g}" for figure in figures))
    console = Console()
    console.print(table)
    console.print(f"laboratory: {result['epochs_per_second']:,.0f} epochs a second; others used {result['neighbours']:.2f} cores meanwhile")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
