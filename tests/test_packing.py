"""Packed batches give scores and gradients of the plain forward pass, for each family on the lists, and leave a live model alone."""

import threading

import pytest
import torch
import transformers as hf
from families import IDS, changed, close, tiny
from toys import LETTERS, letter_tokenizer, save_model

from prompting_nb.encoding.products import HalfLinear, runs_half
from prompting_nb.reward.fast import packing
from prompting_nb.reward.fast.packing import PACKING, SHARING, can_pack, packed_rewards, packed_view, score_packed, shares_prefix
from prompting_nb.reward.model import RewardModel
from prompting_nb.reward.preferences import Ranking
from prompting_nb.reward.tokens import pad
from prompting_nb.reward.training import TrainConfig, train

TWO_SIDED = sorted(PACKING - SHARING)
WAYS = [(kind, "last") for kind in sorted(SHARING)] + [(kind, how) for kind in TWO_SIDED for how in ("mean", "layers", "pooler")]


def made(folder, kind, pooling="auto", dtype=torch.float64, **more):
    if kind in ("mistral", "qwen2", "qwen3", "smollm3"):
        more = {"sliding_window": None} | more
    config = tiny(kind, **more) if kind != "granite" else hf.GraniteConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=len(LETTERS), max_position_embeddings=96,
        initializer_range=0.2, attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=2.0, **IDS)
    name = save_model(folder / kind, config, letter_tokenizer(bert=kind in PACKING - SHARING))
    torch.manual_seed(0)
    return changed(RewardModel(name, device="cpu", pooling=pooling)).to(dtype).eval()


def groups_of(model):
    return [model.encode_texts("a long prompt of all", ["one", "two and two", "b"]), model.encode_texts("d", ["e" * 40]),
            model.encode_texts("say it", ["it", "itself"])]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind, pooling", WAYS)
def test_packed_is_plain(tmp_path, kind, pooling, threads):
    model = made(tmp_path, kind, pooling)
    assert can_pack(model) and shares_prefix(model) == (kind in SHARING)
    groups = groups_of(model)
    rows, outcomes = [row for rows in groups for row in rows], []
    for run in (lambda: packed_rewards(model, groups, threads=threads, part=60), lambda: model(*pad(rows))):
        model.zero_grad()
        rewards = run()
        (rewards[:, 0] * torch.linspace(-1, 1, len(rows))).sum().backward()
        outcomes.append((rewards.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (packed, gradients), (plain, wanted) = outcomes
    tolerance = 1e-12 if kind in ("gpt2", "bert", "roberta", "xlm-roberta", "camembert") else 5e-6  # whose norms compute in float32
    close(packed, plain, tolerance)
    assert gradients.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name in wanted:
        assert (gradients[name] - wanted[name]).abs().max() <= tolerance * max(1, largest), name


TEXTS = ["a long prompt"] * 3 + ["b", "say it"], ["one", "two and two", "c" * 30, "d" * 50, "it"]
ONCE = [(kind, "last") for kind in sorted(SHARING)] + [(kind, how) for kind, how in WAYS if (kind, how) == ("bert", "layers")]
ONCE += [(kind, how) for kind, how in zip(TWO_SIDED * 2, ("mean", "mean", "mean", "pooler", "pooler", "pooler", "pooler", "mean"))]


@pytest.mark.parametrize("kind, pooling", sorted(set(ONCE)))
def test_half_layers_are_as_exact_as_autocast(tmp_path, kind, pooling, monkeypatch):
    "The scores of all texts differ from those in float32 as they do under autocast, and the model keeps its weights."
    model = made(tmp_path, kind, pooling, torch.float32)
    before = {name: part for name, part in model.named_modules()}
    exact, views = score_packed(model, *TEXTS), []
    monkeypatch.setattr(packing, "packed_view", lambda *given: views.append(packed_view(*given)) or views[-1])
    monkeypatch.setattr(packing, "runs_half", lambda model: False)
    cast = score_packed(model, *TEXTS, bf16=True)
    if not runs_half(torch.nn.Linear(2, 2)):
        pytest.skip("torch has no oneDNN that multiplies bfloat16 on this processor")
    assert runs_half(model.model)
    monkeypatch.setattr(packing, "runs_half", runs_half)
    half = score_packed(model, *TEXTS, bf16=True)
    products = [part for part in views[-1].modules() if isinstance(part, HalfLinear)]
    assert products and not any(isinstance(part, HalfLinear) for part in views[0].modules())
    assert any(part.activation[0] == "gelu" for part in products) == (kind in {"gpt2", *TWO_SIDED})
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    assert (half - exact).abs().max() <= 3 * (cast - exact).abs().max() < 0.3 * exact.std()
    assert before == dict(model.named_modules()) and {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(score_packed(model, *TEXTS), exact)


def test_half_layers_take_part_where_nothing_is_learned(tmp_path):
    "Adapters keep their own layers in bfloat16, and a new weight is seen by the next scores."
    model = made(tmp_path, "bert", "mean", torch.float32)
    first = score_packed(model, *TEXTS, bf16=True)
    with torch.no_grad():
        model.model.encoder.layer[0].output.dense.weight.mul_(3)
    second = score_packed(model, *TEXTS, bf16=True)
    assert (second - first).abs().max() > 0.01
    torch.testing.assert_close(second, score_packed(model, *TEXTS), atol=0.05 * second.std().item() + 0.02, rtol=0.02)
    changed(model.add_lora(2))
    assert can_pack(model) and not runs_half(model.model)
    adapted = score_packed(model, *TEXTS, bf16=True)
    torch.testing.assert_close(adapted, score_packed(model, *TEXTS), atol=0.05 * adapted.std().item() + 0.02, rtol=0.02)


def test_a_text_longer_than_a_part_leaves_the_others_together():
    assert packing.divide([900, 5, 6, 7, 8], 2, 20) == [[0], [4, 3, 2, 1]]
    assert len(packing.divide([10] * 100, 2, 50)) == 20


def test_a_window_is_not_packed_unless_texts_fit(tmp_path):
    assert not can_pack(made(tmp_path / "short", "mistral", sliding_window=8))
    assert can_pack(made(tmp_path / "long", "mistral", sliding_window=96))
    assert not can_pack(made(tmp_path / "mixed", "qwen2", use_sliding_window=True, sliding_window=8,
                             layer_types=["full_attention", "sliding_attention"]))


def test_a_changed_layer_is_not_packed(tmp_path):
    model = made(tmp_path, "llama")
    layer = model.model.layers[0]
    layer.forward = type(layer).forward.__get__(layer)
    assert not can_pack(model)


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "qwen3"])
def test_a_live_model_stays_as_it_is(tmp_path, kind):
    model = made(tmp_path, kind, "mean" if kind == "roberta" else "last", torch.float32)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    config = model.model.config.to_dict(), model.model.config._attn_implementation
    prompts, completions = ["a b"] * 6, ["one", "two", "three and a half", "b", "c", "d"]
    wanted, plain = model.score(prompts, completions), model.score
    found, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            found.append(plain(prompts, completions))
    looker = threading.Thread(target=look)
    looker.start()
    scorers = [threading.Thread(target=lambda: found.append(score_packed(model, prompts, completions))) for _ in range(8)]
    for thread in scorers:
        thread.start()
    for thread in scorers:
        thread.join()
    stop.set()
    looker.join()
    for scores in [*found, model.score(prompts, completions)]:
        torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-5)
    assert config == (model.model.config.to_dict(), model.model.config._attn_implementation)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys() and type(module.__dict__) is dict
        assert all(vars(module)[key] is value for key, value in before[name].items() if not isinstance(value, (bool, int, str))), name


@pytest.mark.parametrize("packed", [True, False])
def test_threads_that_score_a_model_in_train_mode(tmp_path, packed):
    "Dropout of one thread's scores must not come from another thread's return to train mode."
    model = made(tmp_path, "gpt2", dtype=torch.float32).train()
    prompts, completions, found = ["a b"] * 4, ["one", "two", "three and a half", "b"], []
    score = (lambda: score_packed(model, prompts, completions)) if packed else (lambda: model.score(prompts, completions))
    wanted = score()
    threads = [threading.Thread(target=lambda: [found.append(score()) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20 and all(torch.allclose(scores, wanted, atol=1e-5) for scores in found)
    assert all(part.training for part in model.modules())


def test_a_view_shares_weights(tmp_path):
    model = made(tmp_path, "llama")
    view = packed_view(model)
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.model.parameters()}
    assert view.layers[0] is not model.model.layers[0]


RANKINGS = [Ranking(f"p{i}", ["good answer", "bad"], [1.0, 0.0]) for i in range(6)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_precision_trains(tmp_path, packed, dtype):
    model = made(tmp_path, "llama", dtype=dtype)
    history = train(model, RANKINGS, TrainConfig(packed=packed, bf16=False, epochs=2), progress=False)
    assert history.packed == packed and {p.dtype for p in model.parameters()} == {dtype}
    assert score_packed(model, ["a"], ["b"]).dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_gradient_checkpointing_acts_in_training(tmp_path, kind, monkeypatch):
    losses, calls = [], []
    for checkpointing in (False, True):
        model = made(tmp_path / str(checkpointing), kind, dtype=torch.float32)
        if checkpointing:
            model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            layer = (model.model.layers if kind == "llama" else model.model.encoder.layer)[0]
            inner = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = lambda *args, **options: calls.append(1) or inner(*args, **options)
        history = train(model, RANKINGS, TrainConfig(packed=checkpointing, bf16=False), progress=False)
        losses.append([step["loss"] for step in history.steps])
    assert calls and not history.packed
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert not any(part.training for part in model.modules())
