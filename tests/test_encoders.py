"""The encoder under load: groupings, threads, precisions, compilation, in combinations that a page would not bear."""

import copy
import gc
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from toys import CountsCharacters, LETTERS, byte_tokenizer, letter_tokenizer, save_model

from prompting_nb.config import InputError
from prompting_nb.encoding.batches import in_batches, in_threads, micro_batches
from prompting_nb.encoding.batches import pad_rows
from prompting_nb.encoding.encoder import check_encoder, Encoder
from prompting_nb.encoding.pooling import last_token, last_window
from prompting_nb.encoding.weights import frozen_model, own_weights, PRECISIONS
from prompting_nb.encoding import windows as windows_module
from prompting_nb.encoding.windows import cut, shortened, windows


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "A small random BERT with a token for each letter."
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=64, max_position_embeddings=24)
    save_model(folder, config, letter_tokenizer(bert=True, letters=[*LETTERS, " "]))
    return folder


@pytest.fixture
def threads():
    "Sets the number of torch's threads and sets it back."
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@given(st.lists(st.integers(1, 600), max_size=80), st.integers(1, 1000))
def test_micro_batches_hold_everything_within_the_budget(lengths, budget):
    groups = micro_batches(lengths, budget)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[place] for place in group) <= budget
    longest = [max(lengths[place] for place in group) for group in groups]
    assert longest == sorted(longest, reverse=True)


@given(st.lists(st.integers(1, 600), max_size=80), st.integers(1, 9))
def test_batches_of_so_many_rows(lengths, at_most):
    groups = micro_batches(lengths, budget=None, at_most=at_most)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    assert all(len(group) == at_most for group in groups[1:]) and all(len(group) <= at_most for group in groups)
    in_order = [lengths[place] for group in groups[::-1] for place in group]
    assert in_order == sorted(lengths)  # the longest groups come first


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=20), st.integers(1, 40), st.integers(1, 3))
def test_in_batches_keeps_the_order_of_the_rows(rows, budget, threads):
    groups = micro_batches([len(row) for row in rows], budget)

    def sums(some):
        ids, mask = pad_rows(some, token_id=7)
        assert ids.shape == mask.shape == (len(some), max(map(len, some)))
        return (ids * mask).sum(dim=1, keepdim=True)

    assert in_batches(sums, rows, groups, threads).tolist() == [[sum(row)] for row in rows]


@given(st.integers(1, 500), st.integers(1, 50), st.integers(1, 6))
def test_windows_are_even_and_lose_only_the_middle(count, room, most):
    pieces, ids = cut(list(range(count)), room, most), list(range(count))
    kept = sum(pieces, [])
    assert all(len(piece) <= room for piece in pieces) and len(pieces) <= most
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    if count <= room * most:
        assert kept == ids
    else:
        end = len(kept) // 2
        assert len(kept) == room * most and kept == ids[:len(kept) - end] + ids[count - end:]


@pytest.mark.parametrize("count", [1, 2, 4])
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text("abcdefghij ", min_size=1, max_size=90).filter(str.strip), min_size=1, max_size=30))
def test_a_text_has_one_embedding_whatever_its_company(folder, count, texts):
    "Also with several threads, and with long texts of several windows among short ones."
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        encoder = Encoder(str(folder), cache_size=0)
        together = encoder(texts)
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(together, torch.stack([encoder(text) for text in texts]), atol=1e-5, rtol=1e-5)


def test_threads_that_come_later_have_all_threads_again(threads):
    threads(2)
    in_threads(lambda job: job, [1, 2, 3])
    seen = []
    late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert seen == [2]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_agree_and_stay_frozen(folder, precision):
    texts = ["a text", "another text that is longer than one window of it", "b"]
    exact, near = Encoder(str(folder))(texts), Encoder(str(folder), precision=precision)
    found = near(texts)
    assert found.dtype == torch.float32 and not found.requires_grad
    assert F.cosine_similarity(found, exact).min() > {"float32": 0.999999, "bfloat16": 0.999, "int8": 0.98}[precision]
    assert not any(parameter.requires_grad for parameter in near.parameters())
    assert not any(module.training for module in near.train().modules())
    if precision == "bfloat16":
        assert {parameter.dtype for parameter in near.parameters()} == {torch.bfloat16}


def test_other_weights_are_seen(folder):
    "The faster layers read the weights of the moment."
    encoder = Encoder(str(folder))
    before = encoder("a text")
    state = {name: value + 0.05 * torch.randn_like(value) if value.is_floating_point() else value
             for name, value in encoder.state_dict().items()}
    encoder.load_state_dict(state)
    assert not torch.allclose(encoder("a text"), before, atol=1e-3)


def trained(kind):
    "A tokenizer that has learnt from a few words and runs: its tokens cross blanks, or depend on the length of a run."
    words = ["the rain in the plain ", "aaaaaaaa", "!!!!!!!! ", "-- --- ---- ", "abab cdcd "] * 20
    if kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        if kind == "bytes":
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator(words, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


TOKENIZERS = {"minilm": lambda: Encoder("minilm").tokenizer, "letters": lambda: letter_tokenizer(bert=True), "byte": byte_tokenizer,
              **{kind: partial(trained, kind) for kind in ("bytes", "characters", "unigram")}}  # fmt: skip
PARTS = ["a", "the rain ", "ab", "!", "-", " ", "\n", "\u200b", "e\u0301", "\u4e00", "\U0001f600", "[SEP] ", "\ud83d", "Straße, "]
PARTS += ["x" * 130 + " "]


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_tokenizer(request):
    return TOKENIZERS[request.param]()


def longest_word(tokenizer, text):
    "Characters of the longest piece of a text whose tokens may depend on each other: those of merged pairs are chosen in all of it."
    read = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    words = {}
    for word, (start, end) in zip(read.word_ids(), read["offset_mapping"]):
        words[word] = min(words.get(word, (start, 0))[0], start), end
    return max((end - start for start, end in words.values()), default=0)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 6_000)), min_size=1, max_size=8), first=st.integers(0, 600),
       last=st.integers(0, 600))  # fmt: skip
def test_what_is_left_out_of_a_long_text_changes_no_token_that_is_kept(any_tokenizer, parts, first, last):
    "Runs, blanks, letters of many bytes: beginning and end are those of the whole text, here with a bound an eighth of the real one."
    text = "".join(part * count for part, count in parts)[:60_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "_WHOLE", 4_096)
        short = shortened(any_tokenizer, text, first, last)
    readable = text.encode("utf-8", "replace").decode()
    ids, kept = (
        any_tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"]
        for each in (readable, short.encode("utf-8", "replace").decode())
    )
    same = kept[:first] == ids[:first] and kept[len(kept) - min(last, len(kept)) :] == ids[len(ids) - min(last, len(ids)) :]
    assert same or longest_word(any_tokenizer, readable) > windows_module._CLEAR
    assert short == text or first + last < len(kept) and len(short) < len(text)


@pytest.mark.parametrize("text", ["!", "the rain ", "\u4e00"])
def test_no_more_of_a_very_long_text_is_tokenised_than_is_kept(text, monkeypatch):
    text, counting = (text * 300_000)[:300_000], CountsCharacters(Encoder("minilm").tokenizer)
    found = windows(counting, [text, "short"], 256)
    assert 0 < counting.characters < 150_000
    monkeypatch.setattr(windows_module, "_WHOLE", 10**9)
    assert windows(counting.tokenizer, [text, "short"], 256) == found and len(found[0]) == 16


@pytest.mark.parametrize("pool", [{}, {"pool": last_token, "combine": last_window}], ids=["mean", "last"])
def test_a_megabyte_of_text(folder, pool):
    encoder = Encoder(str(folder), max_windows=4, **pool)
    middle = "a" * 500_000
    one, other = (encoder(middle + letter + middle) for letter in "bc")
    assert one.isfinite().all() and torch.equal(one, other)  # its middle is left out
    assert not torch.equal(encoder(middle * 2 + "b"), one)
    assert torch.equal(encoder("b" + middle * 2), one) == bool(pool)  # the last token knows its own window only


def test_compiled_gives_the_same(folder):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler and there is none")
    plain, compiled = Encoder(str(folder)), Encoder(str(folder), compile=True)
    for texts in (["a text"], ["abc", "b", "a text that is longer than the others by far"]):
        torch.testing.assert_close(compiled(texts), plain(texts), atol=1e-4, rtol=1e-4)


def test_a_missing_encoder_is_found_without_reading_weights(folder, tmp_path, monkeypatch):
    check_encoder(str(folder))
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    for name, said in (("copy", "cannot load the model"), ("nowhere", "there is no folder")):
        with pytest.raises(InputError, match=said):
            check_encoder(str(tmp_path / name))


# ---------------------------------------------------------------- shared weights
@pytest.fixture
def loads(monkeypatch):
    "The names of the models whose weights were read."
    seen, load = [], transformers.AutoModel.from_pretrained

    def counted(name, *args, **kwargs):
        seen.append(str(name))
        return load(name, *args, **kwargs)

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", counted)
    return seen


@pytest.fixture
def fresh(folder, tmp_path):
    "A copy of the model that no other test has loaded."
    return str(shutil.copytree(folder, tmp_path / "fresh"))


def weight(encoder):
    return encoder.model.embeddings.word_embeddings.weight


def test_frozen_encoders_share_their_weights(fresh, loads):
    one, other = Encoder(fresh), Encoder(fresh, "cpu", pool=last_token, combine=last_window, window=8)
    assert weight(one).data_ptr() == weight(other).data_ptr() and frozen_model(fresh) is one.model
    assert loads == [fresh]
    assert weight(Encoder(fresh, precision="bfloat16")).dtype == torch.bfloat16 and len(loads) == 2
    assert weight(one).dtype == torch.float32


def test_threads_that_need_the_same_model_load_it_once(fresh, loads):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: frozen_model(fresh), range(4)))
    assert loads == [fresh] and all(model is found[0] for model in found)


def test_weights_go_with_their_last_user(fresh, loads):
    one = Encoder(fresh)
    del one
    gc.collect()
    Encoder(fresh)
    assert len(loads) == 2


def test_a_folder_that_was_written_anew_is_another_model(fresh, loads):
    one = Encoder(fresh)
    torch.manual_seed(7)
    transformers.BertModel(one.model.config).save_pretrained(fresh)
    other = Encoder(fresh)
    assert len(loads) == 2 and not torch.equal(weight(one), weight(other))


CHANGES = {
    "half": lambda one: one.to(torch.bfloat16),
    "part of another module": lambda one: torch.nn.Sequential(one).double(),
    "device": lambda one: one.to("meta"),
    "weights": lambda one: one.load_state_dict({name: value + 1 for name, value in one.state_dict().items()}),
    "weights, from outside": lambda one: torch.nn.Sequential(one).load_state_dict(
        {f"0.{name}": value + 1 for name, value in one.state_dict().items()}),
    "own": own_weights,
    "a copy": lambda one: copy.deepcopy(one).to("meta")}


@pytest.mark.parametrize("how", CHANGES)
def test_changing_one_encoder_leaves_the_others(fresh, loads, how):
    one, other = Encoder(fresh), Encoder(fresh)
    shared, before = other.model, other("a text")
    state = {name: value.clone() for name, value in other.state_dict().items()}
    CHANGES[how](one)
    assert (one.model is shared) == (how == "a copy") and other.model is shared and frozen_model(fresh) is shared
    assert all(torch.equal(value, state[name]) and value.device.type == "cpu" for name, value in other.state_dict().items())
    other.cache.clear()
    assert torch.equal(other("a text"), before) and len(loads) == 1


def test_a_move_to_where_it_is_copies_nothing(fresh):
    one, other = Encoder(fresh), Encoder(fresh)
    torch.nn.Sequential(one).to("cpu").float()
    one.load_state_dict({}, strict=False)
    assert one.model is other.model


@pytest.mark.parametrize("device, precision, message", [
    ("cpu", "int4", "one of float32, bfloat16, int8, got 'int4'"), ("meta", "int8", "int8 runs on the CPU only")])
def test_an_unknown_precision_is_refused_before_anything_is_loaded(fresh, loads, device, precision, message):
    with pytest.raises(InputError, match=message):
        frozen_model(fresh, device, precision)
    assert loads == []
