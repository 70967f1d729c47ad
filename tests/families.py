"""Tiny random models of the families that transformers has sequence classifiers for, and what a reward model does with each.

`python tests/families.py [FAMILY ...]` prints the table.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers as hf
from toys import LETTERS, letter_tokenizer
from transformers import CONFIG_MAPPING

from prompting_nb.config import InputError
from prompting_nb.reward.fast.packing import can_pack, packed_rewards
from prompting_nb.reward.model import RewardModel
from prompting_nb.reward.tokens import pad

IDS = {name: LETTERS.index(token) for name, token in
       dict(pad_token_id="[PAD]", bos_token_id="[CLS]", eos_token_id="<eos>", sep_token_id="[SEP]", cls_token_id="[CLS]").items()}
WIDTH = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "d_embed", "word_embed_proj_dim")
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
INNER = ("intermediate_size", "ffn_dim", "d_inner", "d_ff", "hidden_dim", "n_inner", "dff", "inner_dim", "ffn_hidden_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
LENGTH = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
SIZES = {**dict.fromkeys(WIDTH, 32), **dict.fromkeys(LAYERS, 2), **dict.fromkeys(HEADS, 4), **dict.fromkeys(INNER, 64),
         **dict.fromkeys(EXPERTS, 4), **dict.fromkeys(LENGTH, 96), "vocab_size": len(LETTERS), "num_key_value_heads": 2, "head_dim": 8,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2, "n_shared_experts": 1,
         "initializer_range": 0.2, "init_std": 0.2, "encoder_layers": 2, "decoder_layers": 2}
MORE = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "esmc": {"num_key_value_heads": 4},
    "lilt": {"channel_shrink_ratio": 4, "max_2d_position_embeddings": 8},
    "layoutlm": {"max_2d_position_embeddings": 8},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "deepseek_v2": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "head_dim": None},
    "minicpm3": {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                 "num_key_value_heads": 4, "head_dim": None},
    "opt": {"word_embed_proj_dim": 16},
    "jamba": {"mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8},
    "markuplm": {"max_depth": 2, "max_xpath_tag_unit_embeddings": 8, "max_xpath_subs_unit_embeddings": 8},
    "longformer": {"attention_window": [8, 8]},
    "big_bird": {"block_size": 16},
    "squeezebert": {"embedding_size": 32},
    "mra": {"block_per_row": 2},
    "nystromformer": {"num_landmarks": 4},
}


def tiny(kind: str, **more):
    "Make a config of a family, as small as it allows."
    make = CONFIG_MAPPING[kind]
    known = vars(make()) | dict.fromkeys(getattr(make, "attribute_map", {}), 1)
    options = {name: value for name, value in SIZES.items() if name in known} | IDS | {"num_labels": 1} | MORE.get(kind, {}) | more
    if isinstance(known.get("layer_types"), list) and "layer_types" not in options:
        kinds = list(dict.fromkeys(known["layer_types"]))
        options["layer_types"] = (kinds * 2)[:2]
    options = {name: value for name, value in options.items() if value is not None}
    return make(**options)


PROMPTS = ["what is it", "a b c", "say no more of it"]
COMPLETIONS = ["four", "a longer answer than that", "z"]


def changed(model, by=0.05):
    "The model, as if it had been trained: everything that learns has moved."
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def scores(model):
    return model.score(PROMPTS, COMPLETIONS)


def close(one, other, tolerance=1e-4):
    difference = float((one - other).abs().max() / max(1.0, float(other.abs().max())))
    assert difference < tolerance, f"differs by {difference:.1e}"


def as_transformers(classifier, tokenizer, prompts=PROMPTS, completions=COMPLETIONS):
    "The logits of a classifier for prompts with completions, as its own tokenizer makes them, one by one."
    with torch.no_grad():
        return torch.cat([classifier(**tokenizer(*pair, return_tensors="pt")).logits for pair in zip(prompts, completions)])


def does_padding(model, folder):
    rows = model.encode_texts(PROMPTS, COMPLETIONS)
    alone = torch.cat([model.score_rows([row]) for row in rows])
    close(scores(model), alone)
    width = max(map(len, rows)) + 5
    left = torch.tensor([[5] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        close(model.eval()(left, mask), alone)


def does_save(model, folder):
    model.save_pretrained(folder / "saved")
    close(scores(RewardModel.from_pretrained(folder / "saved", device="cpu")), scores(model), 1e-5)


def does_export(model, folder):
    model.to_sequence_classification(folder / "exported")
    classifier = hf.AutoModelForSequenceClassification.from_pretrained(folder / "exported").eval()
    close(as_transformers(classifier, hf.AutoTokenizer.from_pretrained(folder / "exported")), scores(model), 1e-4)


def does_lora(model, folder):
    before = scores(model)
    changed(model.add_lora(2))
    after = scores(model)
    assert (after - before).abs().max() > 1e-4, "adapters change nothing"
    does_save(model, folder)
    close(scores(model.merge_lora()), after)


def does_pack(model, folder):
    model.eval()
    if not can_pack(model):
        raise InputError("runs padded")
    rows = model.encode_texts(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        close(packed_rewards(model, [rows[:2], rows[2:]]), scores(model), 1e-4)
    model.eval()
    groups = [model.encode_texts("a b c", ["one", "two and two"]), model.encode_texts("d", ["e"])]
    gradients = []
    for run in (lambda: packed_rewards(model, groups), lambda: model(*pad([row for rows in groups for row in rows]))):
        model.zero_grad()
        (run()[:, 0] * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close(gradient, gradients[1][name], 1e-4)


STEPS = {"padding": does_padding, "save": does_save, "export": does_export, "lora": does_lora, "packed": does_pack}


def examine(kind: str, folder: Path, **more) -> dict[str, str]:
    "What becomes of a classifier of a family: for each column of the table `ok`, or the reason of a refusal."
    row, name = {"family": kind}, str(folder / "base")
    config = tiny(kind, **more)
    torch.manual_seed(0)
    classifier = changed(hf.AutoModelForSequenceClassification.from_config(config).eval().float())
    two_sided = kind in hf.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    tokenizer = letter_tokenizer(bert=two_sided)
    tokenizer.pad_token = "[PAD]"
    classifier.save_pretrained(name)
    tokenizer.save_pretrained(name)
    try:
        model = RewardModel.from_pretrained(name, device="cpu")
    except InputError as error:
        return row | {"pooling": "-", "score": f"refused: {error}"}
    row["pooling"] = model.pooling
    own = hf.AutoModelForSequenceClassification.from_pretrained(name).eval()
    close(scores(model), as_transformers(own, hf.AutoTokenizer.from_pretrained(name)))
    row["score"] = "ok"
    for column, step in STEPS.items():
        try:
            step(RewardModel.from_pretrained(name, device="cpu"), folder / column)
            row[column] = "ok"
        except InputError as error:
            row[column] = f"refused: {error}"
    return row


# how each family is read: by our own code at the last token or BERT's pooler, or by the classifier as a whole
LAST = """arcee biogpt bloom ctrl deepseek_v2 deepseek_v3 diffllama doge exaone4 falcon gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode
    gpt_neo gpt_neox gpt_oss gptj helium hunyuan_v1_dense hunyuan_v1_moe jamba jetmoe llama minicpm3 minimax ministral ministral3 mistral
    mixtral mpt nemotron olmo olmo2 olmo3 openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss
    smollm3 stablelm starcoder2""".split()
POOLER = "albert bert ernie gte layoutlm megatron-bert nomic_bert rembert roc_bert squeezebert tapas".split()
WHOLE = """big_bird camembert data2vec-text deberta deberta-v2 distilbert electra esm esmc eurobert flaubert ibert jina_embeddings_v3
    longformer modernbert modernbert-decoder mpnet mra roberta roberta-prelayernorm roformer ultrabert xlm xlm-roberta
    xlm-roberta-xl""".split()
REFUSED = {"bart": "an encoder and a decoder", "t5": "an encoder and a decoder", "convbert": "depend on the other texts",
           "fnet": "depend on the other texts", "mobilebert": "depend on the other texts", "xlnet": "depend on the other texts",
           "yoso": "depend on the other texts", "funnel": "cannot be run", "nystromformer": "cannot be run", "xmod": "cannot be run"}
READ = {kind: how for how, kinds in (("last", LAST), ("pooler", POOLER), ("classifier", WHOLE), ("-", REFUSED)) for kind in kinds}
NO_LORA = {"jamba": "does not call all layers", "phimoe": "cannot be run"}

COLUMNS = ("family", "pooling", "score", *STEPS)


def table(rows: list[dict]) -> str:
    "Lines of a table, with the reasons of refusals below."
    lines, reasons = ["  ".join(f"{name:10.10}" if i else f"{name:20}" for i, name in enumerate(COLUMNS))], []
    for row in rows:
        cells = [row.get(name, "-") for name in COLUMNS]
        for i, cell in enumerate(cells):
            if cell.startswith("refused: "):
                reason = cell.removeprefix("refused: ")
                if reason not in reasons:
                    reasons.append(reason)
                cells[i] = f"no ({reasons.index(reason) + 1})"
        lines.append("  ".join(f"{cell:10.10}" if i else f"{cell:20}" for i, cell in enumerate(cells)))
    return "\n".join([*lines, *(f"({i}) {reason}" for i, reason in enumerate(reasons, 1))])


if __name__ == "__main__":
    import time
    import traceback

    warnings.simplefilter("ignore")
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    rows = []
    for kind in sys.argv[1:] or READ:
        started = time.time()
        try:
            with tempfile.TemporaryDirectory() as place:
                rows.append(examine(kind, Path(place)))
            print(f"{time.time() - started:5.1f} {kind}", *list(rows[-1].values())[1:], flush=True)
        except Exception as error:
            places = (f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:])
            print(f"{time.time() - started:5.1f} {kind} FAILED {type(error).__name__}: {str(error)[:300]}", *places, flush=True)
    print(table(rows))
