"""Train TRL's RewardTrainer on tokenised pairs, and score tokenised rows: JOB.json SCORES.json. Needs trl, not prompting_nb."""

import json
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer


def main(job, out):
    job = json.load(open(job))
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
    config = RewardConfig(output_dir=job["folder"], per_device_train_batch_size=8, num_train_epochs=1,
                          learning_rate=job["lr"], warmup_steps=0.1, bf16=job["bf16"], gradient_checkpointing=False,
                          max_length=job["max_length"], seed=job["seed"], report_to="none", save_strategy="no",
                          eos_token=tokenizer.sep_token, use_cpu=True)
    trainer = RewardTrainer(model=model, args=config, train_dataset=Dataset.from_list(job["pairs"]), processing_class=tokenizer)
    trainer.train()
    flat = [row for rows in job["test"] for row in rows]
    order, scores = sorted(range(len(flat)), key=lambda i: -len(flat[i])), [0.0] * len(flat)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=job["bf16"]):
        for start in range(0, len(order), 32):
            chosen = order[start : start + 32]
            batch = tokenizer.pad({"input_ids": [flat[i] for i in chosen]}, return_tensors="pt")
            for i, score in zip(chosen, model(**batch).logits[:, 0].tolist()):
                scores[i] = score
    given = iter(scores)
    json.dump([[next(given) for _ in rows] for rows in job["test"]], open(out, "w"))


if __name__ == "__main__":
    main(*sys.argv[1:])
