"""Tiny tokenizers and random transformers, which several files of tests save and load."""

from pathlib import Path
from typing import Any, Iterable, Optional

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

LETTERS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]


def word_tokenizer(words: Iterable[str], split: Any = None, template: Optional[str] = None, **special: str):
    """A tokenizer with a token for each word, and `[UNK]` for the rest.

    `split` is how a text is cut, by default at spaces; `template`, as "[CLS] $A [SEP]", is what is put around it;
    `special` names special tokens: `eos_token="<eos>"`.
    """
    vocabulary = {word: i for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = split or pre_tokenizers.WhitespaceSplit()
    if template:
        around = [(token, vocabulary[token]) for token in template.split() if token != "$A"]
        made.post_processor = processors.TemplateProcessing(template, special_tokens=around)
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **special)


def letter_tokenizer(bert: bool = False, letters: Iterable[str] = LETTERS):
    "A tokenizer with a token for each letter: as BERT's with its special tokens, or as GPT-2's without a padding token."
    split = pre_tokenizers.Split("", "isolated")
    if bert:
        special = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
        return word_tokenizer(letters, split, "[CLS] $A [SEP]", **special)
    return word_tokenizer(letters, split, eos_token="<eos>")


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
