"""The reward model beside TRL, the reference and a transformers pipeline: speed (reward_speed.py) and quality (reward_quality.py).

Both parts in one run: two hours or more on two cores, most of it training. The quality part keeps what it
computed in a folder (--work), and the speed part with --keep, so a run that was interrupted, or stopped by --minutes, goes on
where it was. With --parts only one of them is measured, and the figures of the other stay in the JSON file as they were.

TRL lives in an environment of its own; `make bench-reward JSON=FILE` makes it, from bench/requirements-reward.txt.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

import reward_quality
import reward_speed
from machine import machine
from prompting_nb.config import InputError

KEYS = ("train_vs_trl_default", "train_vs_trl_tuned", "train_vs_reference_no_dropout", "train_vs_reference",
        "train_bert_vs_trl_default", "train_bert_vs_trl_tuned", "score_vs_pipeline", "score_gpt2_vs_pipeline",
        "score_bert_vs_pipeline", "heldout_accuracy_equal", "heldout_accuracy_trl", "heldout_accuracy", "heldout_accuracy_whole",
        "heldout_accuracy_length", "best_of_16", "best_of_16_trl", "ece", "ece_trl")


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     conflict_handler="resolve")  # both parts have --trl-python
    reward_speed.add_flags(parser)
    reward_quality.add_arguments(parser)
    parser.add_argument("--json", type=Path, help="write the figures to this file; figures of a part that is not run stay")
    parser.add_argument("--quick", action="store_true", help="few repetitions, one division of 96 prompts: to see that it runs")
    parser.add_argument("--parts", nargs="+", choices=["speed", "quality"], default=["speed", "quality"], help="default: both")
    args = parser.parse_args(arguments)
    if args.quick:
        args.seeds, args.prompts, args.pairs, args.repetitions = 1, 96, 32, 1
    if "speed" in args.parts and not args.trl_python:
        parser.error("the speed part needs --trl-python: the Python of an environment with bench/requirements-reward.txt")
    return args


def main():
    args = parse()
    result = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    if "speed" in args.parts:
        try:
            found = reward_speed.speed(args)
        except reward_speed.Pause as pause:
            sys.exit(f"reward.py: {pause}; the same command goes on")
        reward_speed.show(found, Console(width=120))
        result |= found
    if "quality" in args.parts:
        found = reward_quality.quality(args, result)
        reward_quality.show(found)
        result |= found
    result = {key: result.get(key) for key in KEYS} | result | {"machine": machine("torch", "transformers")}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"reward.py: {error}")
