"""A folder holds what was saved: whole weights or adapters, whatever else lies there, whatever the model was before."""

import json
import shutil
from functools import partial

import families
import pytest
import torch
import transformers as hf
from safetensors import SafetensorError
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


@pytest.mark.parametrize("name", ["thesis.tex", "pairs.json", "data.bin", "other.safetensors", "vocabulary.csv", "base",
                                  "data_config.json"])
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


# ---------------------------------------------------------------- what was saved gives the same rewards as long as it lies there
def other_of(bases, tmp_path, kind, **options):
    "Two models of one architecture, saved side by side."
    folders = tmp_path / "one", tmp_path / "two"
    model = RewardModel(bases[kind], device="cpu", **options)
    for folder in folders:
        model = changed(model)
        model.save_pretrained(folder)
    return folders


@pytest.mark.parametrize("kind, name", [("llama", "model.safetensors"), ("bert", "model.safetensors"), ("bert", "reward_head.safetensors")])
def test_files_of_two_models_are_no_model(bases, tmp_path, kind, name):
    one, two = other_of(bases, tmp_path, kind)
    shutil.copy(two / name, one / name)
    with pytest.raises(InputError, match="gives other rewards than when it was saved: a file of it"):
        RewardModel.from_pretrained(one, device="cpu")
    manifest = json.loads((one / "reward.json").read_text())
    (one / "reward.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "probe"}))  # as the message says
    assert scores(RewardModel.from_pretrained(one, device="cpu")).isfinite().all()


def test_a_base_with_other_settings_is_another_base(bases, tmp_path):
    changed(RewardModel(bases["llama"], device="cpu").add_lora(4)).save_pretrained(tmp_path / "o")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "gelu"}))  # the weights are the same
    with pytest.raises(InputError, match="a file of it, or its base, is of another model"):
        RewardModel.from_pretrained(tmp_path / "o", device="cpu")


def test_a_precision_that_is_asked_for_is_no_fault(bases, tmp_path):
    changed(RewardModel(bases["llama"], device="cpu")).save_pretrained(tmp_path / "o")
    assert RewardModel.from_pretrained(tmp_path / "o", device="cpu", dtype=torch.bfloat16).head[1].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("probe", [3, {}, {"rows": [[1]], "rewards": []}, {"rows": [["a"]], "rewards": [1.0]}])
def test_a_probe_that_is_none_is_named(bases, tmp_path, probe):
    RewardModel(bases["llama"], device="cpu").save_pretrained(tmp_path / "o")
    path = tmp_path / "o" / "reward.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "probe": probe}))
    with pytest.raises(InputError, match="for probe, which must be null, or rows of tokens"):
        RewardModel.from_pretrained(tmp_path / "o", device="cpu")


def test_a_folder_that_cannot_be_replaced_is_refused_at_once(bases, tmp_path, monkeypatch):
    model = RewardModel(bases["llama"], device="cpu")
    model.save_pretrained(tmp_path / "o")
    before = sorted((tmp_path / "o").iterdir())
    monkeypatch.chdir(tmp_path / "o")
    for folder in (".", tmp_path / "o"):
        with pytest.raises(InputError, match="is the current folder, or above it"):
            model.save_pretrained(folder)
    model.save_pretrained("in it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.ismount", lambda path: str(path).endswith("o"))
    with pytest.raises(InputError, match="a disk is mounted"):
        model.save_pretrained(tmp_path / "o")
    assert sorted(path for path in (tmp_path / "o").iterdir() if path.name != "in it") == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")])
def test_a_full_disk_is_said_and_leaves_what_was_there(bases, tmp_path, monkeypatch, error):
    old = changed(RewardModel(bases["bert"], device="cpu"))
    old.save_pretrained(tmp_path / "o")

    def full(*args, **options):
        raise error
    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(InputError, match="cannot write .*No space left on device.*: what was there is as it was"):
        changed(RewardModel(bases["bert"], device="cpu")).save_pretrained(tmp_path / "o")
    torch.testing.assert_close(scores(RewardModel.from_pretrained(tmp_path / "o", device="cpu")), scores(old))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "llama", "o"]


def test_a_checkpoint_belongs_to_the_settings_of_its_transformer(bases, tmp_path):
    def made():
        torch.manual_seed(0)
        return RewardModel(bases["llama"], device="cpu")
    interrupted(made(), tmp_path / "ck")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "gelu"}))
    with pytest.raises(InputError, match=r"is of a run with.*\(model\)"):
        interrupted(made(), tmp_path / "ck")


def test_a_checkpoint_belongs_to_what_says_when_to_stop(bases, tmp_path):
    def made(others):
        torch.manual_seed(0)
        config = TrainConfig(bf16=False, max_steps=1)
        return train(RewardModel(bases["llama"], device="cpu"), RANKINGS[:2], config, others, progress=False, checkpoint=tmp_path / "ck")
    made(RANKINGS[2:])
    assert made(RANKINGS[2:]).resumed == 1
    for others in (RANKINGS[3:], None):
        with pytest.raises(InputError, match="is of a run with other settings or data"):
            made(others)


def test_a_card_of_adapters_promises_no_classifier(bases, tmp_path):
    config = hf.LlamaConfig(num_key_value_heads=2, num_labels=1, pad_token_id=3, **SMALL)
    classifier = hf.AutoModelForSequenceClassification.from_config(config)
    classifier.save_pretrained(tmp_path / "c")
    letter_tokenizer().save_pretrained(tmp_path / "c")
    model = RewardModel.from_pretrained(tmp_path / "c", device="cpu").add_lora(2)
    comes_back(changed(model), tmp_path / "o")
    card = " ".join((tmp_path / "o" / "README.md").read_text().split())
    assert "only `prompting_nb` computes the rewards" in card and "rewards are the logits" not in card
    comes_back(model.merge_lora(), tmp_path / "merged")
    assert "rewards are the logits" in (tmp_path / "merged" / "README.md").read_text()


def test_what_is_pushed_does_not_need_a_folder_of_this_machine(bases, tmp_path, monkeypatch):
    model = changed(RewardModel(bases["llama"], device="cpu").add_lora(2))
    wanted = scores(model)

    class Hub:
        def create_repo(self, repo_id, **options):
            return type("Made", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "pushed")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model.push_to_hub("me/judge")
    shutil.rmtree(bases["llama"])
    torch.testing.assert_close(scores(RewardModel.from_pretrained(tmp_path / "pushed", device="cpu")), wanted)


def test_an_old_folder_goes_while_another_one_replaces_the_new_one(tmp_path, monkeypatch):
    from prompting_nb import files

    take_place = files._take_place

    def and_another(draft, folder, old):  # between its two renames
        take_place(draft, folder, old)
        folder.rename(tmp_path / ".o.7.8.old")

    (tmp_path / "o").mkdir()
    monkeypatch.setattr(files, "_take_place", and_another)
    with files.replacing_folder(tmp_path / "o") as draft:
        (draft / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == [".o.7.8.old"]
    assert (tmp_path / ".o.7.8.old" / "a").read_text() == "new"


def test_two_that_replace_one_folder_leave_a_whole_one(tmp_path):
    "In threads, as often as it takes to meet; what a killed process left behind goes after an hour."
    import os
    import shutil
    import threading

    from prompting_nb.files import replacing_folder

    for name in (".o.1.2.new", ".o.3.4.old", ".o.5.6.new", ".other.1.2.new"):
        (tmp_path / name).mkdir()
    for name in (".o.1.2.new", ".o.3.4.old", ".other.1.2.new"):
        os.utime(tmp_path / name, (1, 1))
    faults = []

    def write(who):
        try:
            for _ in range(60):
                with replacing_folder(tmp_path / "o") as draft:
                    for part in "ab":
                        (draft / part).write_text(who)
        except OSError as error:
            faults.append(error)
    threads = [threading.Thread(target=write, args=(who,)) for who in "xyz"]
    [one.start() for one in threads]
    [one.join() for one in threads]
    assert not faults and (tmp_path / "o" / "a").read_text() == (tmp_path / "o" / "b").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".o.5.6.new", ".other.1.2.new", "o"]
    shutil.rmtree(tmp_path / ".other.1.2.new")
