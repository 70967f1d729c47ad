"""Tiny tokenizers and random transformers, which several files of tests save and load."""

from pathlib import Path
from typing import Any, Iterable

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from prompting_nb.pretrained import word_tokenizer

LETTERS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]


def letter_tokenizer(bert: bool = False, letters: Iterable[str] = LETTERS):
    "A tokenizer with a token for each letter: as BERT's with its special tokens, or as GPT-2's without a padding token."
    split = pre_tokenizers.Split("", "isolated")
    if bert:
        special = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
        return word_tokenizer(letters, split, "[CLS] $A [SEP]", **special)
    return word_tokenizer(letters, split, eos_token="<eos>")


class CountsCharacters:
    "A tokenizer that counts the characters which it is given."

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: Any, *args: Any, **more: Any) -> Any:
        self.characters += sum(map(len, [texts] if isinstance(texts, str) else texts))
        return self.tokenizer(texts, *args, **more)


def byte_tokenizer():
    "A byte-level tokenizer without merges, which knows every character; `<end>` begins and ends a text."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<end>", *alphabet])}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>")


def save_model(folder: str | Path, config, tokenizer, seed: int = 0, kind: Any = hf.AutoModel) -> str:
    "Write a random model and its tokenizer to a folder, which is returned as text."
    torch.manual_seed(seed)
    kind.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
