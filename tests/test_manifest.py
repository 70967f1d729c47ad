"""A folder holds what was saved: whole weights or adapters, whatever else lies there, whatever the model was before."""

import json
import shutil
from functools import partial

import families
import pytest
import torch
import transformers as hf
from toys import LETTERS, letter_tokenizer, save_model

from prompting_nb.config import InputError
from prompting_nb.reward import saving
from prompting_nb.reward.model import RewardModel
from prompting_nb.reward.preferences import Ranking
from prompting_nb.reward.training import TrainConfig, train

PROMPTS = ["what is it", "a b c", "say no more"]
COMPLETIONS = ["four", "a longer answer than that", "z"]
SMALL = dict(vocab_size=len(LETTERS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
             max_position_embeddings=80, initializer_range=0.2)
LLAMA = hf.LlamaConfig(num_key_value_heads=2, **SMALL)
BERT = hf.BertConfig(**SMALL)


@pytest.fixture
def bases(tmp_path):
    return {"llama": save_model(tmp_path / "llama", LLAMA, letter_tokenizer()),
            "bert": save_model(tmp_path / "bert", BERT, letter_tokenizer(bert=True))}


changed = partial(families.changed, by=0.1)


def scores(model):
    return model.score(PROMPTS, COMPLETIONS)


def comes_back(model, folder):
    model.save_pretrained(folder)
    loaded = RewardModel.from_pretrained(folder, device="cpu")
    torch.testing.assert_close(scores(loaded), scores(model), atol=1e-5, rtol=1e-5)
    return loaded


@pytest.mark.parametrize("options", [{}, {"length": 0.5}, {"pooling": "layers", "depth": 1}], ids=["plain", "length", "layers"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_adapters_on_weights_that_were_trained(bases, tmp_path, kind, options):
    "The base by name has other weights than the one that the adapters were trained on."
    saved = changed(RewardModel(bases[kind], device="cpu", **options))
    saved.save_pretrained(tmp_path / "f")
    again = changed(RewardModel.from_pretrained(tmp_path / "f", device="cpu").add_lora(4))
    loaded = comes_back(again, tmp_path / "adapters of a loaded model")
    comes_back(changed(changed(RewardModel(bases[kind], device="cpu", **options)).add_lora(4)), tmp_path / "trained, then adapters")
    merged = comes_back(loaded.merge_lora(), tmp_path / "merged")
    twice = changed(merged.add_lora(2))
    comes_back(comes_back(twice, tmp_path / "adapters again"), tmp_path / "and once more")


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_adapters_alone_where_the_base_is_as_it_was(bases, tmp_path, kind):
    model = changed(RewardModel(bases[kind], device="cpu").add_lora(4))
    comes_back(model, tmp_path / "o")
    manifest = json.loads((tmp_path / "o" / "reward.json").read_text())
    assert (manifest["kind"], manifest["base"]["name"]) == ("adapter", bases[kind])
    assert not list((tmp_path / "o").rglob("model*.safetensors"))
    changed(RewardModel(bases[kind], device="cpu")).model.save_pretrained(bases[kind])  # somebody trains the base in its place
    with pytest.raises(InputError, match="other weights"):
        RewardModel.from_pretrained(tmp_path / "o", device="cpu")


def test_a_base_moves_with_its_adapters(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = changed(RewardModel("llama", device="cpu").add_lora(4))  # a relative name
    model.save_pretrained("o")
    wanted = scores(model)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.testing.assert_close(scores(RewardModel.from_pretrained("../o", device="cpu")), wanted)
    for name in ("llama", "o"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    torch.testing.assert_close(scores(RewardModel.from_pretrained("o", device="cpu")), wanted)


@pytest.mark.parametrize("first, then", [("adapters", "whole"), ("whole", "adapters"), ("length", "whole"), ("whole", "bounded")])
def test_nothing_of_an_older_model_stays(bases, tmp_path, first, then):
    new = lambda **options: RewardModel(bases["llama"], device="cpu", **options)
    make = {"adapters": lambda: new().add_lora(4), "whole": new, "length": lambda: new(length=1.0), "bounded": lambda: new(bound=1.0)}
    changed(make[first]()).save_pretrained(tmp_path / "o")
    comes_back(changed(make[then]()), tmp_path / "o")
    comes_back(changed(make[then]()), tmp_path / "fresh")
    names = lambda name: sorted(path.name for path in (tmp_path / name).iterdir())
    assert names("o") == names("fresh")


@pytest.mark.parametrize("name", ["adapter_config.json", "added_tokens.json", "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_foreign_file_that_would_be_read_is_removed_or_refused(bases, tmp_path, name):
    model = changed(RewardModel(bases["llama"], device="cpu"))
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / name).write_text('{"<new>": 77}')
    comes_back(model, tmp_path / "o")
    assert not (tmp_path / "o" / name).exists()
    (tmp_path / "o" / name).write_text('{"<new>": 77}')
    with pytest.raises(InputError, match=name):
        RewardModel.from_pretrained(tmp_path / "o", device="cpu")


@pytest.mark.parametrize("name", ["thesis.tex", "pairs.json", "data.bin", "other.safetensors", "vocabulary.csv", "base"])
@pytest.mark.parametrize("write", ["save_pretrained", "to_sequence_classification"])
def test_somebody_elses_files_are_not_deleted(bases, tmp_path, name, write):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / name).write_text("ten years of work")
    with pytest.raises(InputError, match=name):
        getattr(RewardModel(bases["llama"], device="cpu"), write)(tmp_path / "o")
    assert [path.name for path in (tmp_path / "o").iterdir()] == [name]
    assert (tmp_path / "o" / name).read_text() == "ten years of work"


@pytest.mark.parametrize("write", ["save_pretrained", "to_sequence_classification"])
def test_what_git_keeps_beside_a_model_stays(bases, tmp_path, write):
    model = RewardModel(bases["llama"], device="cpu")
    getattr(model, write)(tmp_path / "o")
    (tmp_path / "o" / ".git" / "refs").mkdir(parents=True)
    (tmp_path / "o" / ".git" / "refs" / "main").write_text("abc")
    (tmp_path / "o" / ".gitattributes").write_text("*.safetensors filter=lfs")
    getattr(model, write)(tmp_path / "o")
    assert (tmp_path / "o" / ".git" / "refs" / "main").read_text() == "abc"
    assert (tmp_path / "o" / ".gitattributes").read_text() == "*.safetensors filter=lfs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "llama", "o"]  # no draft is left


@pytest.mark.parametrize("before", [False, True])
def test_a_folder_appears_whole_or_not_at_all(bases, tmp_path, monkeypatch, before):
    old = changed(RewardModel(bases["llama"], device="cpu"))
    if before:
        old.save_pretrained(tmp_path / "o")
    monkeypatch.setattr(saving, "model_card", lambda *args, **options: 1 / 0)  # the disk is full, say
    with pytest.raises(ZeroDivisionError):
        changed(old).save_pretrained(tmp_path / "o")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["bert", "llama", *["o"] * before]
    if before:
        RewardModel.from_pretrained(tmp_path / "o", device="cpu")


def test_what_does_not_come_back_is_not_saved(bases, tmp_path, monkeypatch):
    "The folder is loaded and compared before it takes its place."
    model, read = changed(RewardModel(bases["bert"], device="cpu")), saving.load_file
    monkeypatch.setattr(saving, "load_file", lambda path: {name: 2 * value for name, value in read(path).items()})
    with pytest.raises(InputError, match="comes back with other scores"):
        model.save_pretrained(tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("frozen", [False, True])
def test_merging_lets_learn_what_learnt_before(bases, frozen):
    model = RewardModel(bases["bert"], device="cpu")
    if frozen:
        model.model.embeddings.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.add_lora(2)
    assert not any(p.requires_grad for name, p in model.model.named_parameters() if "lora" not in name)
    assert {name: parameter.requires_grad for name, parameter in model.merge_lora().named_parameters()} == before


def test_adapters_on_adapters_are_refused(bases):
    with pytest.raises(InputError, match="merge_lora"):
        RewardModel(bases["bert"], device="cpu").add_lora(2).add_lora(2)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_adapters_after_new_tokens(bases, tmp_path, kind):
    model = RewardModel(bases[kind], device="cpu")
    model.tokenizer.add_tokens(["<tool>", "<call>"])
    model.model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    loaded = comes_back(changed(model.add_lora(2)), tmp_path / "o")
    assert loaded.encode_texts(["<tool>"]) == model.encode_texts(["<tool>"])
    torch.testing.assert_close(loaded.score(["<tool>a<call>"]), model.score(["<tool>a<call>"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lora", [False, True])
def test_a_precision_comes_back(bases, tmp_path, dtype, lora):
    model = RewardModel(bases["llama"], device="cpu")
    model = (model.add_lora(2) if lora else model).to(dtype)
    model.save_pretrained(tmp_path / "o")
    loaded = RewardModel.from_pretrained(tmp_path / "o", device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {p.dtype for p in model.parameters()}
    assert torch.equal(scores(loaded), scores(model))
    assert scores(loaded).dtype == torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------- export
def test_roberta_whose_tokenizer_pads_with_another_token(tmp_path):
    "Its positions follow from the padding token of the config."
    config = hf.RobertaConfig(pad_token_id=1, **SMALL)
    model = RewardModel(save_model(tmp_path / "base", config, letter_tokenizer(bert=True)), device="cpu", pooling="pooler")
    changed(model).to_sequence_classification(tmp_path / "o")
    classifier = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "o").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "o")
    batch = tokenizer.pad({"input_ids": model.encode_texts(PROMPTS, COMPLETIONS)}, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(classifier(**batch).logits, scores(model), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- checkpoints
RANKINGS = [Ranking(f"p{i}", ["good", "bad"], [1.0, 0.0]) for i in range(4)]


def interrupted(model, folder, **config):
    return train(model, RANKINGS, TrainConfig(bf16=False, max_steps=1, **config), progress=False, checkpoint=folder)


def new_tokens(model):
    model.tokenizer.add_tokens(["<tool>"])
    model.model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)


OTHERS = {
    "weights": lambda base, other: changed(RewardModel(base, device="cpu")),
    "family": lambda base, other: RewardModel(other, device="cpu"),
    "pooling": lambda base, other: RewardModel(base, device="cpu", pooling="mean"),
    "max_length": lambda base, other: RewardModel(base, device="cpu", max_length=20),
    "length": lambda base, other: RewardModel(base, device="cpu", length=0.0),
    "bound": lambda base, other: RewardModel(base, device="cpu", bound=2.0),
    "adapters": lambda base, other: RewardModel(base, device="cpu").add_lora(2),
    "frozen": lambda base, other: RewardModel(base, device="cpu"),
    "tokenizer": lambda base, other: RewardModel(base, device="cpu"),
    "template": lambda base, other: RewardModel(base, device="cpu"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_belongs_to_its_model(bases, tmp_path, other):
    def made(how):
        torch.manual_seed(0)
        model = OTHERS[how](bases["llama"], bases["bert"]) if how else RewardModel(bases["llama"], device="cpu")
        if how == "frozen":
            model.model.layers[0].requires_grad_(False)
        if how == "tokenizer":
            new_tokens(model)
        if how == "template":
            model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        return model
    interrupted(made(None), tmp_path / "ck")
    assert interrupted(made(None), tmp_path / "ck").resumed > 0
    with pytest.raises(InputError, match="is of a run with.*(model|tokenizer)"):
        interrupted(made(other), tmp_path / "ck")
