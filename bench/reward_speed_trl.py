"""TRL's side of reward_speed.py, run by the Python of an environment that has trl: reads jobs, answers with figures."""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer

LR, STEP = 3e-4, 16


def settings(tuned, at_once, group, pairs_a_step):
    "TRL's defaults, or what is fastest on a CPU; the optimiser is the same in both."
    at_once = at_once or 8
    common = dict(learning_rate=LR, weight_decay=0.0, num_train_epochs=1, per_device_train_batch_size=at_once,
                  gradient_accumulation_steps=pairs_a_step // at_once, use_cpu=not torch.cuda.is_available(), report_to="none",
                  save_strategy="no", disable_tqdm=True, logging_steps=1, output_dir=tempfile.mkdtemp())
    if group:
        common.update(train_sampling_strategy="group_by_length", remove_unused_columns=False)
    return RewardConfig(**common, **(dict(bf16=True, gradient_checkpointing=False) if tuned else {}))


class Ends(TrainerCallback):
    "When the first step of the optimiser began, and when each of them ended."

    def __init__(self):
        self.times = []

    def on_step_begin(self, *args, **kwargs):
        self.times = self.times or [time.perf_counter()]

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())


def train(folder, rows, tuned, at_once=None, group=False, gelu=False, attention=None, pairs_a_step=STEP, test=None):
    """Train on the tokens of pairs [chosen, rejected]; the time that takes, and the loss of the first step.

    `gelu` takes torch's own GELU by tanh in place of the same formula in single operations (GPT-2's)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    how = {"attn_implementation": attention} if attention else {}
    how |= {"activation_function": "gelu_pytorch_tanh"} if gelu else {}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **how)
    columns = {"chosen_ids": [a for a, _ in rows], "rejected_ids": [b for _, b in rows]}
    if group:  # this is where the sampler looks for lengths
        columns["input_ids"] = [max(both, key=len) for both in rows]
    ends = Ends()
    trainer = RewardTrainer(model=model, args=settings(tuned, at_once, group, pairs_a_step), processing_class=tokenizer,
                            train_dataset=Dataset.from_dict(columns), callbacks=[ends])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = {"seconds": ends.times[-1] - ends.times[0], "pairs": len(rows), "steps": len(ends.times) - 1,
             "loss": losses[0], "bf16": trainer.args.bf16}
    if test:
        model.eval()
        with torch.no_grad():
            rewards = torch.tensor([[model(input_ids=torch.tensor([row])).logits.item() for row in both] for both in test])
        found["test_loss"] = -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean().item()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", required=True, help="which model")
    parser.add_argument("--folder", required=True, help="where the models are")
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # trl prints
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        job.pop("do")
        found = train(str(Path(args.folder, args.kind)), **job)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**found, "peak_mb": peak}), file=answers, flush=True)


if __name__ == "__main__":
    main()
