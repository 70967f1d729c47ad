"""Reward models, losses, splits, measures and training: what would not read as prose on a page."""
import copy
import inspect
import json
import math
import os
import random
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from families import tiny
from toys import save_model
from transformers import BertConfig, GPT2Config, GPTNeoConfig, LlamaConfig, RobertaConfig

from prompting_nb.pretrained import word_tokenizer
from prompting_nb.reward.batches import Draw, length_batches
from prompting_nb.reward.evaluation import best_of_k, calibration, evaluate
from prompting_nb.reward.preferences import Ranking, pairs, split
from prompting_nb.reward.loss import PairwiseLoss, RankingLoss
from prompting_nb.reward.model import RewardModel, pack
from prompting_nb.reward.tokens import pad
from prompting_nb.reward.tokens import Row, _fit, encode, length_of
from prompting_nb.reward.training import TrainConfig, train

WORDS = "[PAD] [UNK] [CLS] [SEP] what is the sum of two and three ? four five six it a sure maybe no good day sun thanks".split()
SIZE = dict(vocab_size=40, initializer_range=0.2)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64, **SIZE)
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **SIZE),
    "gpt_neo": GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=4,
                            intermediate_size=64, max_position_embeddings=64, **SIZE),
    "llama": LlamaConfig(**SMALL),
    "bert": BertConfig(**SMALL),
    "roberta": RobertaConfig(pad_token_id=0, **SMALL)}
CAUSAL = ("gpt2", "gpt_neo", "llama")
PROMPTS = ["what is two and three ?", "good day", "what is the sum of two and two ?"]
COMPLETIONS = ["five", "good day and good sun", "it is four sure"]


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    "Folders with tiny random models, by family."
    folders = {}
    for kind, config in CONFIGS.items():
        special = dict(eos_token="[SEP]") if kind in CAUSAL else dict(cls_token="[CLS]", sep_token="[SEP]")
        folders[kind] = save_model(tmp_path_factory.mktemp(kind), config, word_tokenizer(WORDS, **special), seed=1)
    return folders


def toy(toys, kind, **kwargs):
    torch.manual_seed(0)
    return RewardModel(toys[kind], device="cpu", **kwargs).eval()


# ---------------------------------------------------------------- RewardModel
def test_signature():
    parameters = list(inspect.signature(RewardModel).parameters.values())
    assert [(p.name, p.default) for p in parameters[:3]] == [("model_name", inspect.Parameter.empty), ("dropout", 0.1), ("device", "cuda")]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[3:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_falls_back_to_the_cpu(toys):
    with pytest.warns(RuntimeWarning, match="no CUDA device"):
        model = RewardModel(toys["bert"])
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_forward(toys, kind):
    model = toy(toys, kind)
    reward = model(torch.randint(4, 20, (3, 7)))
    assert reward.shape == (3, 1) and reward.dtype == torch.float32
    for wrong in (torch.ones(7), torch.ones(1, 3, 7)):
        with pytest.raises(ValueError, match="input_ids should have 2 dimension"):
            model(wrong.long())
    with pytest.raises(ValueError, match="attention_mask"):
        model(torch.ones(3, 7).long(), torch.ones(3, 6).long())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_do_not_depend_on_company(toys, kind, side):
    model = toy(toys, kind)
    rows = model.encode_texts(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([row])) for row in rows])
        for width in (20, 33, 60):
            for token in (0, 3, 9):
                ids, mask = torch.full((3, width), token), torch.zeros(3, width, dtype=torch.long)
                for i, row in enumerate(rows):
                    place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
                    ids[i, place], mask[i, place] = torch.tensor(row), 1
                for dtype in (torch.long, torch.bool, torch.float32):
                    torch.testing.assert_close(model(ids, mask.to(dtype)), alone, atol=1e-4, rtol=0)
    for batch_size in (1, 2, 32):
        torch.testing.assert_close(model.score(PROMPTS, COMPLETIONS, batch_size), alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", CAUSAL)
def test_every_attended_token_counts(toys, kind):
    model = toy(toys, kind)
    row = model.encode_texts(PROMPTS[:1], COMPLETIONS[:1])[0]
    changed = torch.tensor([row[:i] + [1] + row[i + 1 :] for i in range(len(row))])
    with torch.no_grad():
        assert (model(changed) - model(torch.tensor([row]))).abs().min() > 1e-5


@pytest.mark.parametrize("kind", CONFIGS)
def test_dropout_acts_in_train_mode_only(toys, kind):
    model = toy(toys, kind, dropout=0.5)
    batch = pad(model.encode_texts(PROMPTS, COMPLETIONS))
    assert torch.equal(model(*batch), model(*batch))
    model.train()
    assert not torch.equal(model(*batch), model(*batch))
    assert torch.equal(model.score(PROMPTS, COMPLETIONS), model.score(PROMPTS, COMPLETIONS)) and model.training


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_was_cut_off_counts_for_the_length_alone(toys, kind):
    "`pad` says how many tokens each text lacks; the mask is 1 for a token and 0 for padding, whatever was cut."
    endless = [" ".join(["good"] * n) for n in (3, 80, 100)]
    plain, counting = toy(toys, kind, max_length=40), toy(toys, kind, max_length=40, length=0.5)
    rows = counting.encode_texts("what is", endless)
    assert [len(row) for row in rows[1:]] == [counting.max_length] * 2
    batch = pad(rows)
    assert batch.cut.tolist() == [length_of(row) - len(row) for row in rows] and batch.cut[2] - batch.cut[1] == 20
    assert batch.attention_mask.tolist() == [[1] * len(row) + [0] * (counting.max_length - len(row)) for row in rows]
    with torch.no_grad():
        logs = torch.tensor([length_of(row) for row in rows]).log()[:, None]
        torch.testing.assert_close(counting(*batch), plain(*batch) + 0.5 * logs)
        assert torch.equal(plain(*batch), plain(batch.input_ids, batch.attention_mask))  # nothing else reads the count
        seen = torch.tensor([len(row) for row in rows]).log()[:, None]
        torch.testing.assert_close(counting(*batch[:2]), plain(*batch) + 0.5 * seen)  # without it: the tokens that are there
        shifted = torch.full((3, 50), 9), torch.zeros(3, 50)  # padded on the left, with a mask of other numbers than 1
        for i, row in enumerate(rows):
            shifted[0][i, 50 - len(row):], shifted[1][i, 50 - len(row):] = torch.tensor(row), 0.5
        torch.testing.assert_close(counting(*shifted, batch.cut), counting(*batch), atol=1e-4, rtol=0)
    torch.testing.assert_close(counting.score("what is", endless), counting(*batch).detach())
    with pytest.raises(ValueError, match="cut"):
        counting(*batch[:2], batch.cut[:2])


@given(st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 5)), min_size=1, max_size=9))
def test_pad_makes_a_batch_of_rows(texts):
    ids, mask, cut = pad([Row(tokens, left_out) for tokens, left_out in texts])
    width = max(len(tokens) for tokens, _ in texts)
    assert ids.tolist() == [tokens + [0] * (width - len(tokens)) for tokens, _ in texts]
    assert mask.tolist() == [[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in texts]
    assert cut.tolist() == [left_out for _, left_out in texts]
    assert pad([tokens for tokens, _ in texts]).cut.tolist() == [0] * len(texts)  # plain lists lack nothing


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_rows_count_what_they_lack(toys, kind):
    model = toy(toys, kind)
    for max_length in (8, 20, 64):
        for row, whole in zip(encode(model.tokenizer, PROMPTS, ["good " * n for n in (1, 9, 90)], max_length),
                              encode(model.tokenizer, PROMPTS, ["good " * n for n in (1, 9, 90)], 1000), strict=True):
            assert whole.cut == 0 and len(row) == min(len(whole), max_length) and length_of(row) == len(whole)
            assert row[-1] == whole[-1]


def test_a_row_of_a_chat_template_ends_as_the_template_does(toys):
    "Also where a long completion is cut: a causal model is read at the last token."
    tokenizer = toy(toys, "gpt2").tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} thanks {% endfor %}"
    [row] = encode(tokenizer, "what is", ["good " * 30], 12)
    assert len(row) == 12 and tokenizer.convert_ids_to_tokens(row)[-2:] == ["good", "thanks"]


def test_a_reward_model_is_made_of_an_encoder_and_a_head(toys):
    model = toy(toys, "bert")
    assert RewardModel.__mro__[:2] == (RewardModel, torch.nn.Module)
    public = {name for name, member in vars(RewardModel).items() if inspect.isfunction(inspect.unwrap(member)) and name[0] != "_"}
    assert public >= {"score", "encode_texts", "forward", "add_lora", "merge_lora", "save_pretrained"}
    assert all(getattr(RewardModel, name).__qualname__ == f"RewardModel.{name}" for name in public | {"from_pretrained"})
    assert model.encoder.model is model.model and {"model", "head"} == dict(model.named_children()).keys()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"model", "head"}
    for adapted in (model.add_lora(rank=1), copy.deepcopy(model), model.merge_lora()):  # both names for the same transformer
        assert adapted.encoder.model is adapted.model
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.get_input_embeddings().weight.zero_()
    assert not torch.equal(twin.score(PROMPTS, COMPLETIONS), model.score(PROMPTS, COMPLETIONS))


def test_rewards_are_unbounded(toys):
    model = toy(toys, "gpt2")
    with torch.no_grad():
        model.head[1].weight.mul_(1e4)
    assert model.score(PROMPTS, COMPLETIONS).abs().max() > 100


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5))
def test_pack_keeps_tokens_and_their_order(masks):
    mask = torch.tensor(masks)
    ids = torch.arange(1, mask.numel() + 1).reshape(mask.shape)
    packed, packed_mask = pack(ids, mask)
    for row, keep, got, got_mask in zip(ids, mask, packed, packed_mask):
        wanted = row[keep]
        assert got[: len(wanted)].tolist() == wanted.tolist()
        assert got_mask.tolist() == [1] * len(wanted) + [0] * (len(row) - len(wanted))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(4, 50))
def test_fit(prompt_length, completion_length, room):
    prompt, completion = list(range(prompt_length)), list(range(completion_length))
    p, c = _fit(prompt, completion, room)
    assert len(p) + len(c) == min(room, prompt_length + completion_length)  # nothing is wasted
    assert p == prompt[prompt_length - len(p) :] and c == completion[: len(c)]
    assert len(p) >= min(prompt_length, room // 4)  # a quarter is the prompt's
    assert len(p) == prompt_length or len(c) == completion_length or len(p) == room // 4  # the prompt gives way first


# ---------------------------------------------------------------- losses
@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=8))
def test_pairwise_loss(rows):
    chosen, rejected = torch.tensor(rows, dtype=torch.float64).T[..., None]
    found = PairwiseLoss()(chosen, rejected)
    wanted = sum(math.log1p(math.exp(-(c - r))) for c, r in rows) / len(rows)
    assert found.shape == (1,)
    assert found.item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    copies = PairwiseLoss()(chosen.repeat(3, 1), rejected.repeat(3, 1))
    torch.testing.assert_close(copies, found)


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((3, 1), (3,)), ((3, 1), (2, 1)), ((3, 2), (3, 2)), ((0, 1), (0, 1))])
def test_pairwise_loss_refuses_other_shapes(shapes):
    with pytest.raises(ValueError, match="batch|should be 1, got 2"):
        PairwiseLoss()(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pairwise_loss_is_finite_at_large_margins(dtype):
    rewards = torch.tensor([[1e4], [-1e4]], dtype=dtype, requires_grad=True)
    loss = PairwiseLoss()(rewards, torch.zeros(2, 1, dtype=dtype))
    loss.backward()
    assert loss.isfinite().all() and rewards.grad.isfinite().all()


def test_losses_compile_in_one_graph():
    chosen, rejected = torch.randn(4, 1), torch.randn(4, 1)
    compiled = torch.compile(PairwiseLoss(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(chosen, rejected), PairwiseLoss()(chosen, rejected))


prompts_with_scores = st.lists(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=5), min_size=1, max_size=4)


@given(prompts_with_scores, st.randoms())
def test_ranking_loss_is_the_sum_over_pairs(prompts, rng):  # ragged K, ties, any order of rows
    rows = [(reward, score, group) for group, answers in enumerate(prompts) for reward, score in answers]
    rng.shuffle(rows)
    rewards, scores, groups = (torch.tensor(column) for column in zip(*rows))
    of_prompts = []
    for answers in prompts:
        terms = [math.log1p(math.exp(-(a[0] - b[0]))) for a in answers for b in answers if a[1] > b[1]]
        of_prompts += [sum(terms) / len(terms)] if terms else []
    if not of_prompts:
        with pytest.raises(ValueError, match="nothing to rank"):
            RankingLoss()(rewards[:, None], scores, groups)
        return
    found = RankingLoss()(rewards[:, None], scores, groups).item()
    assert found == pytest.approx(sum(of_prompts) / len(of_prompts), rel=1e-4, abs=1e-6)


# ---------------------------------------------------------------- batches, splits, measures
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(1, 500), st.integers(0, 9))
def test_length_batches_keep_the_budget(lengths, budget, seed):
    rows = [[[0] * length, [0]] for length in lengths]
    draws = [Draw(i, [0, 1]) for i in range(len(lengths))]
    batches = length_batches(draws, rows, budget, random.Random(seed), window=16)
    assert sorted(one.ranking for batch in batches for one in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or 2 * len(batch) * max(lengths[one.ranking] for one in batch) <= budget


@given(st.lists(st.text(max_size=3), min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 99))
def test_split_divides_prompts(prompts, test, seed):
    rankings = [Ranking(prompt, ["a", "b"], [1.0, 0.0]) for prompt in prompts]
    count = min(max(1, round(test * len(set(prompts)))), len(set(prompts)) - 1)
    if len(set(prompts)) < 2:
        with pytest.raises(ValueError, match="leaves nothing on one side"):
            split(rankings, test, seed)
        return
    kept, held_out = split(rankings, test, seed)
    assert len(kept) + len(held_out) == len(rankings)
    assert len({r.prompt for r in held_out}) == count
    assert not {r.prompt for r in kept} & {r.prompt for r in held_out}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(1, 7), st.randoms())
def test_best_of_k_is_the_mean_over_subsets(judged, k, rng):
    given_scores = rng.sample(range(100), len(judged))
    subsets = list(combinations(range(len(judged)), min(k, len(judged))))
    wanted = sum(judged[max(subset, key=given_scores.__getitem__)] for subset in subsets) / len(subsets)
    assert best_of_k([given_scores], [Ranking("p", ["x"] * len(judged), judged)], k) == pytest.approx(wanted)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=50), st.integers(1, 20))
def test_calibration_bins_hold_every_pair(margins, bins):
    error, found = calibration(torch.tensor(margins, dtype=torch.float64).numpy(), bins)
    assert sum(b.n_pairs for b in found) == len(margins) and 0 <= error <= 1
    assert all(b.low - 1e-9 <= b.confidence <= b.high + 1e-9 for b in found)


# ---------------------------------------------------------------- training
def kind_words(prompts, rng):
    words = "good sure sun day it a no maybe".split()
    for n in range(prompts):
        answers = [" ".join(rng.choices(words, k=rng.randint(1, 10))) for _ in range(5)]
        yield Ranking(f"what is {n}", answers, [answer.split().count("good") for answer in answers])


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_improves_every_family(toys, kind):
    model, rankings = toy(toys, kind), list(kind_words(40, random.Random(0)))
    before = evaluate(model, rankings).accuracy
    train(model, rankings, TrainConfig(epochs=4, lr=3e-3, tokens_per_batch=800, bf16=False), progress=False)
    assert evaluate(model, rankings).accuracy > max(0.7, before)
    assert not model.training


def test_pairs_and_rankings_of_two_train_alike(toys):
    rankings = [Ranking(r.prompt, r.completions[:2], r.scores[:2]) for r in kind_words(30, random.Random(0))]
    as_pairs = [Ranking(pair.prompt, [pair.chosen, pair.rejected], [1.0, 0.0]) for pair in pairs(rankings)]
    config, losses = TrainConfig(tokens_per_batch=10_000, max_steps=1, bf16=False), []
    for data in (rankings, as_pairs):
        losses.append(train(toy(toys, "bert", dropout=0.0), data, config, progress=False).steps[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


WORKER = """
import json, os, random, sys
sys.path.insert(0, sys.argv[3])
from test_reward import RewardModel, TrainConfig, kind_words, torch, train
torch.manual_seed(0)
packed, checkpoint, leave_after = sys.argv[4:]
model, rankings = RewardModel(sys.argv[1], dropout=0.0, device="cpu"), list(kind_words(13, random.Random(0)))
config = TrainConfig(epochs=2, lr=1e-3, tokens_per_batch=200, accumulate=2, bf16=False, max_seconds=1e6, packed=packed == "packed",
                     eval_every=2, patience=9, checkpoint_every=1)
leave = lambda step: os._exit(0) if step["step"] == int(leave_after) else None
history = train(model, rankings, config, rankings[:3], progress=False, checkpoint=checkpoint or None, on_step=leave)
if history.processes == 1 or torch.distributed.get_rank() == 0:
    score = model.score("what is 1", ["good", "sun"]).flatten().tolist()
    curve = [[step[name] for name in ("loss", "accuracy", "margin", "grad_norm")] for step in history.steps]
    out = open(sys.argv[2], "w")
    json.dump({"processes": history.processes, "packed": history.packed, "sharded": history.sharded, "resumed": history.resumed,
               "curve": curve, "evaluations": [found["loss"] for found in history.evaluations], "score": score}, out)
    out.close()
if torch.distributed.is_initialized():
    torch.distributed.barrier()  # a process that leaves while another still speaks to it ends in SIGABRT
    torch.distributed.destroy_process_group()
    os._exit(0)  # all is written; threads of torch's process groups may still abort an interpreter that is being taken down
"""
LAUNCHERS = {
    "one": [],
    "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "fsdp": ["-m", "accelerate.commands.accelerate_cli", "launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2",
             "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]}
LAUNCHERS["fsdp by layers"] = [*LAUNCHERS["fsdp"], "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]


def launch(how, folder, out, packed="packed", checkpoint="", leave_after=-1):
    script = out.with_suffix(".py")
    script.write_text(WORKER)
    port = ["--main_process_port", "0"] if "fsdp" in how else []
    command = [sys.executable, *LAUNCHERS[how], *port, script, folder, out, os.path.dirname(__file__), packed, checkpoint, leave_after]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(out.parent)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[:4000] + "\n...\n" + done.stderr[-2000:]
    return json.loads(out.read_text()) if out.exists() else None


def same_course(one, other):
    assert len(one["curve"]) > 3
    for step, found in zip(one["curve"], other["curve"], strict=True):
        assert found == pytest.approx(step, abs=1e-4, rel=1e-3)
    assert other["evaluations"] == pytest.approx(one["evaluations"], abs=1e-4)
    assert other["score"] == pytest.approx(one["score"], abs=1e-3)


def rest(*values):
    "A case of `make test-long`."
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize("kind, how, packed", [
    ("bert", "ddp", True), rest("gpt2", "ddp", True), rest("gpt_neo", "ddp", False),
    rest("gpt2", "fsdp", True), ("llama", "fsdp by layers", False), rest("bert", "fsdp by layers", False)])
def test_two_processes_learn_what_one_learns(toys, tmp_path, kind, how, packed):
    one, two = (launch(which, toys[kind], tmp_path / f"{n}.json", "packed" if packed else "plain") for n, which in enumerate(("one", how)))
    assert (one["processes"], two["processes"], two["packed"], two["sharded"]) == (1, 2, packed, "fsdp" in how)
    same_course(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xlnet", rest("longformer")])
def test_weights_that_no_reward_depends_on_do_not_stop_two_processes(tmp_path, kind):
    tokenizer = word_tokenizer(WORDS, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")
    name = save_model(tmp_path / "base", tiny(kind, vocab_size=40), tokenizer)
    one, two = (launch(how, name, tmp_path / f"{how}.json", "plain") for how in ("one", "ddp"))
    assert two["processes"] == 2
    same_course(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("how, then", [rest("fsdp", "fsdp"), ("fsdp by layers", "one"), rest("ddp", "fsdp")])
def test_a_run_goes_on_with_other_processes(toys, tmp_path, how, then):
    whole = launch("one", toys["llama"], tmp_path / "whole.json", "plain")
    assert launch(how, toys["llama"], tmp_path / "cut.json", "plain", tmp_path / "points", 3) is None
    rest = launch(then, toys["llama"], tmp_path / "rest.json", "plain", tmp_path / "points")
    assert rest["resumed"] == 4
    same_course(whole, rest)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_looking_does_not_change_training(toys, kind):
    rankings, curves = list(kind_words(13, random.Random(0))), []
    for eval_every in (1, 1000):
        config = TrainConfig(epochs=2, lr=1e-3, tokens_per_batch=200, bf16=False, packed=False, eval_every=eval_every)
        history = train(toy(toys, kind), rankings, config, rankings[:3], progress=False)
        curves.append([step["loss"] for step in history.steps])
    assert curves[0] == curves[1]


# ---------------------------------------------------------------- floors
@pytest.mark.parametrize("module, unwanted", [
    ("prompting_nb.reward.preferences", ["torch", "bittensor", "aiohttp"]),
    ("prompting_nb.reward.evaluation", ["bittensor", "aiohttp", "starlette", "uvicorn", "sentence_transformers"]),
    ("prompting_nb.reward.training", ["bittensor", "aiohttp", "starlette", "uvicorn", "fastcore"])])
def test_imports_only_floors_below(module, unwanted):
    code = f"import sys, {module}; print([name for name in {unwanted!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
