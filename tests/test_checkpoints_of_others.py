"""Reward models that others made: a classifier of transformers gives transformers' own scores, and what cannot be right is refused."""

import json
import warnings

import pytest
import torch
import transformers as hf
from families import COMPLETIONS, IDS, PROMPTS, as_transformers, changed, close, scores, tiny
from toys import LETTERS, letter_tokenizer, save_model
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from prompting_nb.config import InputError
from prompting_nb.reward.classifiers import last_layer, tokenizer_frame
from prompting_nb.reward.evaluation import evaluate
from prompting_nb.reward.model import RewardModel, TextEncoder, position_limit
from prompting_nb.reward.preferences import Ranking
from prompting_nb.reward.training import TrainConfig, train

TEMPLATE = ("{% for m in messages %}{{ '<s>' + m['role'] + ' ' + m['content'] + '</s>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}")


def classifier_in(folder, kind, bert=False, template=None, dtype=torch.float32, pad="[PAD]", **more):
    torch.manual_seed(0)
    changed(AutoModelForSequenceClassification.from_config(tiny(kind, **more)).to(dtype)).save_pretrained(folder)
    tokenizer = letter_tokenizer(bert=bert)
    tokenizer.pad_token = pad
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_segments_are_those_of_the_tokenizer(tmp_path):
    name, classifier, _ = classifier_in(tmp_path / "bert", "bert", bert=True)
    state = json.loads((tmp_path / "bert" / "tokenizer.json").read_text())
    place = lambda token, kind: {"SpecialToken": {"id": token, "type_id": kind}}
    text = lambda name, kind: {"Sequence": {"id": name, "type_id": kind}}
    state["post_processor"]["pair"] = [place("[CLS]", 0), text("A", 0), place("[SEP]", 0), text("B", 1), place("[SEP]", 1)]
    (tmp_path / "bert" / "tokenizer.json").write_text(json.dumps(state))
    settings = json.loads((tmp_path / "bert" / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own has
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(name)
    assert tokenizer_frame(tokenizer).segments
    assert 1 in tokenizer("a", "b")["token_type_ids"]
    model = RewardModel.from_pretrained(name, device="cpu")
    close(scores(model), as_transformers(classifier, tokenizer), 1e-5)
    with pytest.warns(UserWarning, match=r"1 prompt of 2 hold \[SEP\], with which a prompt ends"):
        model.score(["a[SEP]b", "ab"], ["c", "[SEP]"])
    model.save_pretrained(tmp_path / "saved")
    close(scores(RewardModel.from_pretrained(tmp_path / "saved", device="cpu")), scores(model), 1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "modernbert-decoder"])
def test_a_chat_template(tmp_path, kind):
    name, classifier, tokenizer = classifier_in(tmp_path / "base", kind, template=TEMPLATE)
    model = RewardModel.from_pretrained(name, device="cpu")
    talks = [[{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c in zip(PROMPTS, COMPLETIONS)]
    with torch.no_grad():
        wanted = torch.cat([classifier(tokenizer(tokenizer.apply_chat_template(talk, tokenize=False), add_special_tokens=False,
                                                 return_tensors="pt")["input_ids"]).logits for talk in talks])
    close(model.score(talks), wanted, 1e-5)
    close(scores(model), wanted, 1e-5)


@pytest.mark.parametrize("kind, pad", [("llama", "<eos>"), ("llama", None), ("gpt_neox", "<eos>"), ("gpt_neox", None),
                                       ("modernbert-decoder", "<eos>")])
def test_padding_that_ends_a_text_too(tmp_path, kind, pad):
    "transformers passes over it and reads the token before; without a padding token it takes one text at a time."
    number = None if pad is None else LETTERS.index(pad)
    name, classifier, tokenizer = classifier_in(tmp_path / "base", kind, pad=pad, pad_token_id=number)
    classifier.config.pad_token_id = number
    model = RewardModel.from_pretrained(name, device="cpu")
    rows = [[7, 8, 9, LETTERS.index("<eos>")], [7, 8, LETTERS.index("<eos>"), 9, 10], [12] * 9 + [LETTERS.index("<eos>")] * 2]
    with torch.no_grad():
        wanted = torch.cat([classifier(torch.tensor([row])).logits for row in rows])
    close(model.score_rows(rows), wanted, 1e-5)
    model.save_pretrained(tmp_path / "saved")
    close(RewardModel.from_pretrained(tmp_path / "saved", device="cpu").score_rows(rows), wanted, 1e-5)


@pytest.mark.parametrize("kind, bert", [("roberta", True), ("deberta-v2", True), ("qwen3", False)])
def test_it_can_be_trained_evaluated_and_given_away(tmp_path, kind, bert):
    name, _, _ = classifier_in(tmp_path / "base", kind, bert=bert)
    model = RewardModel.from_pretrained(name, device="cpu")
    rankings = [Ranking(f"p {i}", ["good", "bad"], [1.0, 0.0]) for i in range(8)]
    before = scores(model)
    train(model, rankings, TrainConfig(epochs=6, lr=3e-3, bf16=False), progress=False)
    assert evaluate(model, rankings).accuracy == 1.0 and not torch.allclose(scores(model), before, atol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    close(as_transformers(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval(),
                          AutoTokenizer.from_pretrained(tmp_path / "saved")), scores(model), 1e-5)


@pytest.mark.parametrize("kind, pooling", [("gpt2", "auto"), ("llama", "auto"), ("mistral", "auto"), ("bert", "pooler"),
                                           ("roberta", "pooler")])
def test_what_is_saved_is_a_pipeline_of_transformers(tmp_path, kind, pooling):
    base = save_model(tmp_path / "base", tiny(kind), letter_tokenizer(bert=pooling == "pooler"))
    model = changed(RewardModel(base, device="cpu", pooling=pooling))
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "reward.json").read_text())["weights"] == "classifier"
    loaded = RewardModel.from_pretrained(tmp_path / "saved", device="cpu")
    assert loaded.pooling == model.pooling
    close(scores(loaded), scores(model), 1e-6)
    pipe = hf.pipeline("text-classification", str(tmp_path / "saved"), function_to_apply="none", device="cpu")
    found = pipe([{"text": p, "text_pair": c} for p, c in zip(PROMPTS, COMPLETIONS)], batch_size=3)
    close(torch.tensor([[one["score"]] for one in found]), scores(model), 1e-5)


@pytest.mark.parametrize("options", [{}, {"length": 1.0, "pooling": "pooler"}, {"bound": 1.0, "pooling": "pooler"}, {"pooling": "layers"}])
def test_what_stays_ours_says_so(tmp_path, options):
    model = RewardModel(save_model(tmp_path / "base", tiny("bert"), letter_tokenizer(bert=True)), device="cpu", **options)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "reward.json").read_text())["weights"] == "encoder"
    assert "no classifier of transformers expresses" in " ".join((tmp_path / "saved" / "README.md").read_text().split())
    with pytest.raises(InputError, match="cannot express"):
        model.to_sequence_classification()


# ---------------------------------------------------------------- options of transformers
def test_options_are_handed_on(tmp_path):
    name, _, _ = classifier_in(tmp_path / "base", "llama", dtype=torch.bfloat16)
    model = RewardModel.from_pretrained(name, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # as transformers does
    model = RewardModel.from_pretrained(name, device="cpu", dtype=torch.float64, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.float64} and model.model.config._attn_implementation == "eager"
    placed = RewardModel.from_pretrained(name, device="cpu", device_map={"": "cpu"}, dtype=torch.float64)
    close(scores(placed), scores(model), 1e-6)
    model.save_pretrained(tmp_path / "saved")
    assert RewardModel.from_pretrained(tmp_path / "saved", device="cpu", dtype=torch.float32).head[1].weight.dtype == torch.float32


def test_a_revision_is_asked_of_the_hub(tmp_path, monkeypatch):
    "For a reward model and for a new head; no hub is needed to see it."
    folder, _, _ = classifier_in(tmp_path / "base", "llama")
    known, asked = scores(RewardModel.from_pretrained(folder, device="cpu")), []

    def snapshot_download(name, revision=None, **options):
        asked.append((name, revision))
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = RewardModel.from_pretrained("nobody/judge", device="cpu", revision="v2")
    assert asked == [("nobody/judge", "v2")] and model.model_name == "nobody/judge"
    close(scores(model), known, 1e-6)
    RewardModel.from_pretrained("nobody/judge", device="cpu")
    assert asked[1:] == [("nobody/judge", None)]
    loaded, load = [], AutoModel.from_pretrained
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda name, **options: loaded.append(options) or load(name))
    read = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **options: loaded.append(options) or read(name))
    with pytest.warns(RuntimeWarning, match="its head is left out"):
        RewardModel(folder, device="cpu", options={"revision": "v3"})
    assert [options["revision"] for options in loaded] == ["v3", "v3"]  # of the model, and of its tokenizer


def test_a_quantisation_config_reaches_transformers(tmp_path, monkeypatch):
    "For others' reward models, for ours, and for a new head."
    folder, _, _ = classifier_in(tmp_path / "base", "llama")
    model = RewardModel.from_pretrained(folder, device="cpu")
    model.save_pretrained(tmp_path / "saved")
    config, seen = hf.BitsAndBytesConfig(load_in_8bit=True), []

    def spy(kind):
        load = kind.from_pretrained

        def from_pretrained(name, *args, quantization_config=None, **options):
            seen.append(quantization_config)
            return load(name, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    spy(AutoModelForSequenceClassification)
    spy(AutoModel)
    for path in (folder, tmp_path / "saved"):
        again = RewardModel.from_pretrained(path, device="cpu", quantization_config=config)
        assert seen.pop() is config and not seen
        close(scores(again), scores(model), 1e-6)
    with pytest.warns(RuntimeWarning, match="its head is left out"):
        RewardModel(folder, device="cpu", options={"quantization_config": config})
    assert seen == [config]


# ---------------------------------------------------------------- refusals and warnings
def test_a_head_is_not_lost_silently(tmp_path):
    name, _, _ = classifier_in(tmp_path / "base", "llama")
    with pytest.warns(RuntimeWarning, match="its head is left out"):
        RewardModel(name, device="cpu")
    RewardModel(save_model(tmp_path / "bert", tiny("bert"), letter_tokenizer(bert=True)), device="cpu").save_pretrained(tmp_path / "ours")
    with pytest.warns(RuntimeWarning, match="its head is left out"):
        RewardModel(str(tmp_path / "ours"), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        RewardModel(str(tmp_path / "bert"), device="cpu")
        RewardModel.from_pretrained(tmp_path / "ours", device="cpu")


@pytest.mark.parametrize("labels", [2, 5])
def test_several_labels_are_no_reward(tmp_path, labels):
    name, _, _ = classifier_in(tmp_path / "base", "llama", num_labels=labels)
    with pytest.raises(InputError, match=f"has {labels} labels"):
        RewardModel.from_pretrained(name, device="cpu")


@pytest.mark.parametrize("kind", ["llama", "roberta", "gpt2"])
def test_a_checkpoint_without_a_head_is_refused(tmp_path, kind):
    for make in (hf.AutoModel, hf.AutoModelForCausalLM):
        name = save_model(tmp_path / make.__name__, tiny(kind), letter_tokenizer(), kind=make)
        with pytest.raises(InputError, match="holds no reward model"):
            RewardModel.from_pretrained(name, device="cpu")


def test_texts_longer_than_a_turning_rope_are_cut(tmp_path):
    "Llama's dynamic rope turns otherwise as soon as the longest text of a batch is longer."
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    base = save_model(tmp_path / "base", tiny("llama", rope_parameters=rope), letter_tokenizer())
    model = changed(RewardModel(base, device="cpu"))
    assert position_limit(model.model) == model.max_length == 16
    alone = model.score("a", ["b"])
    close(model.score("a", ["b", "c" * 60])[:1], alone, 1e-6)
    close(model.score("a", ["b"]), alone, 1e-6)
    with pytest.raises(InputError, match="8 to 16 tokens"):
        RewardModel(base, device="cpu", max_length=17)


def test_xlnet_has_no_limit_of_positions(tmp_path):
    model = RewardModel(save_model(tmp_path / "base", tiny("xlnet"), letter_tokenizer(bert=True)), device="cpu")
    assert model.max_length >= 256
    close(model.score("a", ["b", "c" * 60])[:1], model.score("a", ["b"]))


@pytest.mark.parametrize("kind", ["fnet", "convbert", "nystromformer", "mobilebert"])
def test_scores_that_would_depend_on_the_batch_are_refused(tmp_path, kind):
    base = save_model(tmp_path / "base", tiny(kind), letter_tokenizer(bert=True))
    with pytest.raises(InputError, match="depend on the other texts of a batch|cannot be run"):
        RewardModel(base, device="cpu")


def test_roberta_reads_as_many_tokens_as_it_has_positions(tmp_path):
    base = save_model(tmp_path / "base", tiny("roberta", max_position_embeddings=40), letter_tokenizer(bert=True))
    model = RewardModel(base, device="cpu")
    assert model.max_length == 40 - IDS["pad_token_id"] - 1
    assert model.score("a", ["b" * 99]).isfinite().all()


def test_a_narrow_embedding(tmp_path):
    base = save_model(tmp_path / "base", tiny("opt", word_embed_proj_dim=16), letter_tokenizer())
    model = changed(RewardModel(base, device="cpu"))
    assert model.encoder.hidden_size == model.head[1].in_features == 16
    model.save_pretrained(tmp_path / "saved")
    close(scores(RewardModel.from_pretrained(tmp_path / "saved", device="cpu")), scores(model), 1e-6)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_a_causal_model_of_pictures_is_read_at_its_last_token(tmp_path, kind):
    text = dict(vocab_size=len(LETTERS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=64, max_position_embeddings=96, initializer_range=0.2,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]})
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, out_hidden_size=32, intermediate_size=32)
    known = vars(hf.CONFIG_MAPPING[kind]().vision_config)
    config = hf.CONFIG_MAPPING[kind](text_config=text, vision_config={k: v for k, v in vision.items() if k in known})
    encoder = TextEncoder(save_model(tmp_path / "base", config, letter_tokenizer()), device="cpu")
    assert encoder.pooling == "last" and encoder.hidden_size == 32


@pytest.mark.parametrize("lora", [False, True])
def test_a_table_smaller_than_the_tokenizer_grows(tmp_path, lora):
    base = save_model(tmp_path / "base", tiny("llama", vocab_size=len(LETTERS) - 3), letter_tokenizer())
    with pytest.warns(RuntimeWarning, match="got the mean of the others"):
        model = changed(RewardModel(base, device="cpu"))
    if lora:
        with pytest.warns(RuntimeWarning):
            model = changed(RewardModel(base, device="cpu").add_lora(2))
    assert model.score("x", ["y z"]).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "saved")
        close(scores(RewardModel.from_pretrained(tmp_path / "saved", device="cpu")), scores(model), 1e-6)


def test_the_last_layer_is_the_only_one_with_one_output(tmp_path):
    classifier = classifier_in(tmp_path / "base", "roberta", bert=True)[1]
    assert last_layer(classifier) == "classifier.out_proj"
    classifier.another = torch.nn.Linear(4, 1)
    with pytest.raises(InputError, match="does not end with one linear layer"):
        last_layer(classifier)


def without(folder, *names, **more):
    "Take weights out of a checkpoint, and put others in."
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if name not in names}
    save_file(weights | more, path, {"format": "pt"})


def test_weights_that_chance_stands_in_for_are_said(tmp_path):
    base = save_model(tmp_path / "base", tiny("bert"), letter_tokenizer(bert=True))
    without(tmp_path / "base", "pooler.dense.weight", "pooler.dense.bias")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        RewardModel(base, device="cpu")  # the pooler is not read
    with pytest.warns(RuntimeWarning, match="lacks 2 weights of .*, such as pooler.dense.bias: random ones"):
        RewardModel(base, device="cpu", pooling="pooler")
    without(tmp_path / "base", "encoder.layer.0.output.dense.weight")
    with pytest.warns(RuntimeWarning, match=r"lacks 1 weight of .* encoder.layer.0.output.dense.weight"):
        RewardModel(base, device="cpu")


@pytest.mark.parametrize("name", ["v_head.summary.weight", "value_head.weight", "reward_head.bias", "regression_head.weight"])
def test_a_head_of_another_trainer_is_not_lost_silently(tmp_path, name):
    base = save_model(tmp_path / "base", tiny("llama"), letter_tokenizer())
    without(tmp_path / "base", **{name: torch.ones(1, 32)})
    with pytest.warns(RuntimeWarning, match="its head is left out"):
        RewardModel(base, device="cpu")


def test_a_head_of_another_shape_is_none(tmp_path):
    name, _, _ = classifier_in(tmp_path / "base", "llama", num_labels=3)
    with pytest.raises(InputError, match="holds no reward model: its weights have no score.weight"):
        RewardModel.from_pretrained(name, device="cpu", num_labels=1, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("kind, bert", [("deberta-v2", True), ("llama", False)])
def test_a_pipeline_gives_rewards_as_they_are(tmp_path, kind, bert):
    "Also of what somebody else made and we saved: without a word it would give sigmoids."
    name, _, _ = classifier_in(tmp_path / "base", kind, bert=bert)
    model = RewardModel.from_pretrained(name, device="cpu")
    model.save_pretrained(tmp_path / "saved")
    pipe = hf.pipeline("text-classification", str(tmp_path / "saved"), device="cpu")
    found = pipe([{"text": p, "text_pair": c} for p, c in zip(PROMPTS, COMPLETIONS)])
    close(torch.tensor([[one["score"]] for one in found]), scores(model), 1e-5)


def test_a_model_of_which_nothing_learns_is_refused(tmp_path):
    model = RewardModel(save_model(tmp_path / "base", tiny("bert"), letter_tokenizer(bert=True)), device="cpu").requires_grad_(False)
    with pytest.raises(InputError, match="no weight of this model learns"):
        train(model, [Ranking("p", ["good", "bad"], [1.0, 0.0])], progress=False)


def test_adapters_alone_are_no_model(tmp_path):
    "transformers would load the base and, by other names than theirs, none of the adapters."
    from peft import LoraConfig, get_peft_model

    name, classifier, tokenizer = classifier_in(tmp_path / "base", "llama")
    get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters")
    tokenizer.save_pretrained(tmp_path / "adapters")
    for make in (RewardModel, RewardModel.from_pretrained):
        with pytest.raises(InputError, match=r"holds adapters \(LoRA\)"):
            make(str(tmp_path / "adapters"), device="cpu")


def test_a_length_is_an_option_of_loading_and_nothing_else_of_ours(tmp_path):
    name, _, _ = classifier_in(tmp_path / "base", "llama", max_position_embeddings=4096)
    model = RewardModel.from_pretrained(name, device="cpu", max_length=2000)
    assert (RewardModel.from_pretrained(name, device="cpu").max_length, model.max_length) == (1024, 2000)
    model.save_pretrained(tmp_path / "saved")
    assert RewardModel.from_pretrained(tmp_path / "saved", device="cpu").max_length == 2000
    assert RewardModel.from_pretrained(tmp_path / "saved", device="cpu", max_length=30).max_length == 30
    with pytest.raises(InputError, match="8 to 4096 tokens"):
        RewardModel.from_pretrained(name, device="cpu", max_length=5000)
    for folder in (name, tmp_path / "saved"):
        with pytest.raises(InputError, match="pooling belongs to the model that was saved"):
            RewardModel.from_pretrained(folder, device="cpu", pooling="mean")


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_a_tokenizer_that_pads_with_another_token_than_its_classifier(tmp_path, pad):
    "The classifier finds the end of a text by its own padding, and so does what is saved."
    name, classifier, tokenizer = classifier_in(tmp_path / "base", "llama", pad=pad)
    assert tokenizer.pad_token_id != classifier.config.pad_token_id == LETTERS.index("[PAD]")
    model = RewardModel.from_pretrained(name, device="cpu")
    close(scores(model), as_transformers(classifier, tokenizer), 1e-5)
    model.save_pretrained(tmp_path / "saved")
    close(scores(RewardModel.from_pretrained(tmp_path / "saved", device="cpu")), scores(model), 1e-6)
    pipe = hf.pipeline("text-classification", str(tmp_path / "saved"), device="cpu")
    found = pipe([{"text": p, "text_pair": c} for p, c in zip(PROMPTS, COMPLETIONS)], batch_size=len(PROMPTS))
    close(torch.tensor([[one["score"]] for one in found]), scores(model), 1e-5)
