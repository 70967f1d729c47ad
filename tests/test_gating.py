"""Gates in every combination: encoder families, devices and dtypes, random histories of a subnet, a fresh process."""

import argparse
import copy
import gc
import inspect
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings, strategies as st
from toys import letter_tokenizer, save_model

from prompting_nb.config import Config, InputError
from prompting_nb.validators.gating import BaseGatingModel, GatingModel, LinearGate, SentenceEmbedGatingModel
from prompting_nb.validators.rows import RowAdagrad

FAMILIES = ("bert", "gpt2", "gpt_neo", "llama")
GATES = (GatingModel, SentenceEmbedGatingModel)


def _config(family):
    small = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                 max_position_embeddings=24)
    return {
        "bert": lambda: transformers.BertConfig(**small),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=24),
        "gpt_neo": lambda: transformers.GPTNeoConfig(
            vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
            window_size=8, max_position_embeddings=24),
        "llama": lambda: transformers.LlamaConfig(**small, num_key_value_heads=2),
    }[family]()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    "Folders of small random models, one of each family."
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_model(folder / family, _config(family), letter_tokenizer(family == "bert"))
    return folder


def subnet(hotkeys, uids=None):
    return SimpleNamespace(hotkeys=hotkeys) if uids is None else SimpleNamespace(hotkeys=hotkeys, uids=uids)


@pytest.fixture(params=GATES, ids=lambda cls: cls.__name__)
def make(request, models):
    "Makes a gate of either class."
    def make(metagraph=subnet(list("abcd")), family="bert", num_uids=4, seed=0, **gating):
        torch.manual_seed(seed)
        config = {"gating": {"model_name": str(models / family), **gating}}
        return request.param(metagraph, config, num_uids=num_uids)
    return make


def snapshot(gate):
    "Everything with a row per uid."
    state = gate.optimizer.state.get(gate.head.weight, {}).get("momentum_buffer")
    return gate.head.weight.detach().clone(), gate.head.bias.detach().clone(), None if state is None else state.clone()


# ---- configuration ------------------------------------------------------------------------------------------------


def test_command_line_reaches_the_config_and_strangers_do_not_matter(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "-q", "tests/", "--gating.num_uids", "7", "-f", "kernel.json"])
    assert BaseGatingModel.config().gating.num_uids == 7
    assert GatingModel.config().gating.momentum == 0.9


def test_args_can_be_added_twice():
    parser = argparse.ArgumentParser()
    GatingModel.add_args(parser)
    SentenceEmbedGatingModel.add_args(parser)
    assert vars(parser.parse_args([]))["gating.num_uids"] == 4096


# ---- construction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", GATES)
def test_signature(cls):
    parameters = inspect.signature(cls).parameters
    assert list(parameters) == ["metagraph", "config", "model_name", "num_uids"]
    assert [p.default for p in parameters.values()][1:] == [None] * 3
    assert issubclass(cls, BaseGatingModel)


@pytest.mark.parametrize("cls", GATES)
def test_arguments_win_over_config(cls, models, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    config = Config(gating=Config(model_name=str(models / "gpt2"), num_uids=6))
    before = copy.deepcopy(config)
    gate = cls(subnet(list("abcd")), config, str(models / "bert"), 5)
    assert (gate.num_uids, gate.head.out_features) == (5, 5)
    assert gate.encoder.model.config.model_type == "bert"
    assert config == before
    gate = cls(subnet(list("abcd")), config)
    assert gate.num_uids == 6 and gate.encoder.model.config.model_type == "gpt2"
    gate = cls(subnet(list("abcd")), model_name=str(models / "bert"))
    assert gate.num_uids == 4096 and gate.config.gating.learning_rate == 0.01


def test_only_the_head_learns_with_sgd(make):
    gate = make()
    wanted = [p for p in gate.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in wanted] == [(4, 16), (4,)]
    group, = gate.optimizer.param_groups
    assert type(gate.optimizer) is torch.optim.SGD and (group["lr"], group["momentum"]) == (0.01, 0.9)
    assert {id(p) for p in group["params"]} == {id(p) for p in wanted}
    assert torch.equal(make(seed=3).head.weight, make(seed=3).head.weight)
    assert not torch.equal(make(seed=3).head.weight, make(seed=4).head.weight)


def test_capacity(make):
    with pytest.raises(ValueError, match="4 uids.*num_uids = 3"):
        make(num_uids=3)
    with pytest.raises(ValueError, match="9 uids.*num_uids = 4"):
        make(SimpleNamespace(hotkeys=["a"], n=torch.tensor(9)))
    with pytest.raises(ValueError, match="8 uids"):
        make(subnet(["a", "b"], uids=[0, 7]))


NO_METAGRAPHS = ["finney", None, 1, ["a", "b"], SimpleNamespace(hotkeys=None), SimpleNamespace(hotkeys="abc")]


@pytest.mark.parametrize("cls", GATES)
@pytest.mark.parametrize("network", NO_METAGRAPHS)
def test_what_is_no_metagraph_is_named(cls, network):
    with pytest.raises(TypeError, match=f"needs a metagraph, .* got {type(network).__name__} .*"):
        cls(network)


def test_gates_share_everything_but_what_they_read(make):
    "Each method is written once, in one class."
    for name in ("__init__", "forward", "backward", "resync", "save", "load"):
        assert getattr(GatingModel, name) is getattr(SentenceEmbedGatingModel, name) is vars(LinearGate)[name]
        assert getattr(LinearGate, name).__qualname__ == f"LinearGate.{name}"
    with pytest.raises(TypeError, match="abstract"):
        LinearGate(subnet(list("abcd")))


@pytest.mark.parametrize("bad", [{"loss": "hinge"}, {"optimizer": "lion"}, {"learning_rate": -1.0}, {"momentum": 1.0}])
def test_wrong_settings_are_refused(make, bad):
    with pytest.raises(ValueError, match=f"--gating.{next(iter(bad))}"):
        make(**bad)


# ---- forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_forward(make, family):
    gate = make(family=family)
    assert gate.encoder.tokenizer.pad_token == ("[PAD]" if family == "bert" else "<eos>")
    scores = gate("which miner")
    assert scores.shape == (4,) and scores.dtype == torch.float32 and scores.isfinite().all()
    scores.sum().backward()
    assert gate.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in gate.encoder.parameters())
    gate.train()
    gate.encoder.cache.clear()
    assert torch.equal(gate("which miner"), scores)
    for claim in (3, 10**30):
        gate.encoder.tokenizer.model_max_length = claim
        long = gate("abcde" * 20)
        changed = gate("abcde" * 19 + "abcdz")
        assert long.shape == (4,) and not torch.equal(long, changed)
        if isinstance(gate, SentenceEmbedGatingModel):
            assert not torch.equal(long, gate("z" + ("abcde" * 20)[1:]))


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_is_what_is_documented(make, family):
    gate = make(family=family)
    tokens = gate.encoder.tokenizer("which miner", return_tensors="pt")
    tokens.pop("token_type_ids", None)
    output = gate.encoder.model(**tokens)
    if isinstance(gate, SentenceEmbedGatingModel):
        embedding = F.normalize(gate.mean_pooling(output, tokens["attention_mask"]))[0]
    else:
        embedding = output[0][0, -1]
    torch.testing.assert_close(gate("which miner"), gate.head(embedding))


def test_mean_pooling_of_a_subclass_is_used(models):
    class First(SentenceEmbedGatingModel):
        @staticmethod
        def mean_pooling(model_output, attention_mask):
            return model_output[0][:, 0]

    gate = First(subnet(list("abcd")), model_name=str(models / "gpt2"), num_uids=4)
    torch.testing.assert_close(gate("abc"), gate("axyz"))  # the first token of a causal model has seen nothing else


@pytest.mark.parametrize("bad", ["", 3, None, ["a"], b"a"])
def test_no_message(make, bad):
    with pytest.raises(ValueError if bad == "" else TypeError, match="message"):
        make()(bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moved_gate_still_works(make, dtype):  # as far as a CPU can show it
    gate = make()
    gate.backward(gate("abc"), torch.rand(4))
    gate.to(dtype)
    assert gate("abc").dtype == dtype
    assert gate.backward(gate("abc"), torch.rand(4)).isfinite()
    assert gate.optimizer.state[gate.head.weight]["momentum_buffer"].dtype == dtype
    gate.resync(None, subnet(list("dcba")))
    assert gate.backward(gate("abc"), torch.rand(4)).isfinite()


# ---- backward -----------------------------------------------------------------------------------------------------


def test_loss_is_the_documented_one(make):
    gate = make()
    for picked in (slice(None), [2, 0]):
        scores, rewards = gate("abc")[picked], torch.tensor([0.3, 1.0, -2.0, 5.0])[picked]
        wanted = F.mse_loss(scores.softmax(0), rewards.softmax(0)).item()
        assert gate.backward(scores, rewards).item() == pytest.approx(wanted, abs=1e-7)


def test_gradients_do_not_accumulate(make):
    gate = make(learning_rate=0.0)
    grads = []
    for _ in range(4):
        gate.backward(gate("abc"), torch.arange(4.0))
        grads.append(gate.head.weight.grad.clone())
    assert all(torch.equal(grads[0], grad) for grad in grads) and grads[0].abs().sum() > 0
    scores = gate("abc")
    assert torch.equal(gate.backward(scores, torch.arange(4.0)), gate.backward(scores, torch.arange(4.0)))


def test_four_uids_are_learned(make):
    gate = make(family="gpt_neo")
    frozen = {name: value.clone() for name, value in gate.encoder.state_dict().items()}
    losses = [gate.backward(gate("abc"), torch.tensor([1.0, 0, 0, 0])).item() for _ in range(300)]
    assert losses[0] > 100 * max(losses[-20:])
    assert all(torch.equal(value, frozen[name]) for name, value in gate.encoder.state_dict().items())


@pytest.mark.parametrize("rewards", [[1.0, torch.nan, 0, 0], [torch.inf, 0, 0, 0], [1.0, 2.0], [[1.0, 2, 3, 4]], []])
def test_what_cannot_be_learned_leaves_the_weights(make, rewards):
    gate = make()
    gate.backward(gate("abc"), torch.rand(4))
    before = snapshot(gate)
    with pytest.raises(ValueError, match="rewards"):
        gate.backward(gate("abc"), torch.tensor(rewards))
    with pytest.raises(ValueError, match="no gradient"):
        gate.backward(gate("abc").detach(), torch.rand(4))
    with torch.no_grad(), pytest.raises(ValueError, match="no gradient"):
        gate.backward(gate("abc"), torch.rand(4))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(gate)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float64, torch.float16, torch.bool])
def test_rewards_of_any_kind(make, dtype):
    gate = make()
    assert gate.backward(gate("abc"), torch.tensor([1, 0, 1, 0]).to(dtype)).dtype == torch.float32


def test_loss_is_a_number_without_a_graph(make):
    gate = make()
    rewards = torch.rand(4, requires_grad=True)
    scores = gate("abc")
    graph = weakref.ref(scores)
    loss = gate.backward(scores, rewards)
    assert rewards.grad is None and loss.shape == () and not loss.requires_grad and loss.is_floating_point()
    del scores
    gc.collect()
    assert graph() is None


def test_learning_on_a_large_network(make):
    rewards = torch.rand(256, generator=torch.Generator().manual_seed(0))
    gain = {}
    for loss, rate in (("softmax_mse", 0.01), ("reward_mse", 0.01), ("reward_mse", 0.5)):
        gate = make(subnet(range(256)), num_uids=256, loss=loss, learning_rate=rate, momentum=0.0)
        for _ in range(300):
            gate.backward(gate("abc"), rewards)
        together = torch.stack([gate("abc").detach(), rewards])
        gain[loss, rate] = torch.corrcoef(together)[0, 1].item()
    assert gain["softmax_mse", 0.01] < 0.3 and gain["reward_mse", 0.5] > 0.95


@pytest.mark.parametrize("option", ["lr_decay", "weight_decay", "maximize"])
def test_row_adagrad_refuses_what_it_does_not_do(option):
    weight = torch.nn.Parameter(torch.ones(3))
    for options in (dict(params=[weight], **{option: 0.1}), dict(params=[{"params": [weight], option: 0.1}])):
        with pytest.raises(ValueError, match=f"RowAdagrad has no {option}, got 0.1"):
            RowAdagrad(**options)
    optimizer = RowAdagrad([weight], lr=0.1)
    weight.grad = torch.ones(3)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
    assert torch.equal(weight, torch.ones(3))
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


# ---- resync -------------------------------------------------------------------------------------------------------

CAPACITY = 7
metagraphs = st.dictionaries(st.integers(0, CAPACITY - 1), st.integers(0, 9), max_size=CAPACITY).filter(
    lambda held: len(set(held.values())) == len(held))
kinds = st.sampled_from([list, np.array, lambda values: torch.tensor(values, dtype=torch.int64)])


def _metagraph(held, kind):
    return subnet(kind(list(held.values())), uids=kind(list(held)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(metagraphs, min_size=2, max_size=6), kinds, st.sampled_from(["sgd", "adagrad", "adam"]))
def test_rows_follow_hotkeys_through_any_history(models_once, history, kind, optimizer):
    config = {"gating": dict(model_name=models_once, num_uids=CAPACITY, optimizer=optimizer, loss="reward_mse")}
    gate = SentenceEmbedGatingModel(_metagraph(history[0], kind), config)

    def rows():
        "Everything with a row per uid: weight, bias, and what the optimizer remembers of both."
        state = [value for parameter in gate.head.parameters() for value in gate.optimizer.state[parameter].values()
                 if torch.is_tensor(value) and value.dim()]
        return [gate.head.weight, gate.head.bias, *state]

    for before, now in zip(history, history[1:]):
        gate.backward(gate("abc"), torch.randn(CAPACITY))  # every row and all that belongs to it becomes distinct
        old, scores = [value.detach().clone() for value in rows()], gate("abc").detach()
        gate.resync(_metagraph(before, kind), _metagraph(now, kind))
        was_at = {hotkey: uid for uid, hotkey in before.items()}
        for uid in range(CAPACITY):
            source = was_at.get(now[uid]) if uid in now else uid if uid not in before else None
            for place, (new, kept) in enumerate(zip(rows(), old)):
                if source is not None:
                    assert torch.equal(new[uid], kept[source])
                elif place == 0:
                    assert not (new[uid] == kept).all(1).any() and new[uid].abs().max() <= new.shape[1] ** -0.5
                else:
                    assert (new[uid] == 0).all()
            if source is not None:
                score = gate("abc")[uid].detach()  # at another place in the matrix the last bit may differ
                assert score == scores[source] if source == uid else torch.isclose(score, scores[source], atol=1e-6)
    for parameter in (gate.head.weight, gate.head.bias):
        assert parameter.is_leaf and parameter.requires_grad


@pytest.fixture(scope="session")
def models_once(models):
    return str(models / "bert")


def test_a_fresh_row_stays_when_nothing_is_learned(make):
    gate = make()
    for _ in range(5):
        gate.backward(gate("abc"), torch.rand(4) * 10)
    gate.resync(subnet(list("abcd")), subnet(list("abxd")))
    row = gate.head.weight[2].clone()
    for parameter in gate.head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gate.optimizer.step()
    assert torch.equal(gate.head.weight[2], row) and gate.head.bias[2] == 0


def test_growth_beyond_capacity_changes_nothing(make):
    gate = make()
    gate.backward(gate("abc"), torch.rand(4))
    before = snapshot(gate)
    for grown in (subnet(list("xbcde")), subnet(["x", "b"], uids=[0, 4]), SimpleNamespace(hotkeys=list("xbcd"), n=5)):
        with pytest.raises(ValueError, match="5 uids.*num_uids = 4"):
            gate.resync(subnet(list("abcd")), grown)
    with pytest.raises(ValueError, match="6 uids.*num_uids = 4"):  # the metagraph before needs rows as well
        gate.resync(subnet(list("abcdef")), subnet(list("xbcd")))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(gate))) and gate.hotkeys == dict(enumerate("abcd"))
    gate.resync(None, subnet(list("xbcd")))  # the gate still knows who was there
    assert not torch.equal(gate.head.weight[0], before[0][0]) and torch.equal(gate.head.weight[1:], before[0][1:])


def test_a_metagraph_that_was_updated_in_place(make):
    metagraph = subnet(list("abcd"))
    gate = make(metagraph)
    rows = gate.head.weight.detach().clone()
    metagraph.hotkeys[1] = "x"
    gate.resync(metagraph, metagraph)
    assert not torch.equal(gate.head.weight[1], rows[1]) and torch.equal(gate.head.weight[[0, 2, 3]], rows[[0, 2, 3]])


def test_fresh_rows_are_like_initial_rows(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=768, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path)
    letter_tokenizer(True).save_pretrained(tmp_path)
    gate = SentenceEmbedGatingModel(subnet(range(64)), model_name=str(tmp_path), num_uids=64)
    first = gate.head.weight.detach().clone()
    gate.resync(subnet(range(64)), subnet(range(64, 128)))
    assert gate.head.weight.std().item() == pytest.approx(first.std().item(), rel=0.1)
    assert gate.head.bias.abs().max() == 0


# ---- save and load ------------------------------------------------------------------------------------------------

RELOAD = """
import sys, torch
from types import SimpleNamespace
from prompting_nb.validators import gating
name, model, path, optimizer = sys.argv[1:]
config = {"gating": dict(model_name=model, num_uids=4, optimizer=optimizer)}
gate = getattr(gating, name)(SimpleNamespace(hotkeys=list("abcd")), config)
gate.load(path)
gate.backward(gate("abc"), torch.arange(4.))
print([value.hex() for value in gate("abc").tolist()])
"""


def test_round_trip_through_a_fresh_process(make, models, tmp_path, optimizer="adam"):
    gate = make(optimizer=optimizer)
    for _ in range(3):
        gate.backward(gate("abc"), torch.rand(4))
    gate.save(tmp_path / "gate.safetensors")
    arguments = [type(gate).__name__, str(models / "bert"), str(tmp_path / "gate.safetensors"), optimizer]
    done = subprocess.run([sys.executable, "-c", RELOAD, *arguments], capture_output=True, text=True, check=True)
    gate.backward(gate("abc"), torch.arange(4.0))  # the next step depends on the optimizer's memory too
    assert done.stdout.strip() == str([value.hex() for value in gate("abc").tolist()])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adagrad"])
def test_learning_goes_on_where_it_stopped(make, tmp_path, optimizer):
    gate, other = make(optimizer=optimizer), make(optimizer=optimizer, seed=5)
    for _ in range(3):
        gate.backward(gate("abc"), torch.rand(4))
        other.backward(other("abc"), torch.rand(4))
    gate.save(tmp_path / "gate")
    other.load(tmp_path / "gate")
    for one in (gate, other):
        one.backward(one("abc"), torch.arange(4.0))
    assert torch.equal(gate("abc"), other("abc"))


def test_rows_of_a_saved_gate_go_to_their_hotkeys(make, tmp_path):
    gate = make()
    gate.backward(gate("abc"), torch.rand(4))
    gate.save(tmp_path / "gate")
    later = make(subnet(list("dxba")), seed=9)
    later.load(tmp_path / "gate")
    assert torch.equal(later("abc")[[0, 2, 3]], gate("abc")[[3, 1, 0]])
    assert later.head.bias[1] == 0


def test_a_gate_says_how_many_hotkeys_it_found(make, tmp_path, caplog):
    make().save(tmp_path / "gate")
    make(subnet(list("dcba"))).load(tmp_path / "gate")
    assert caplog.messages == []  # all are there
    make(subnet(list("dxyz"))).load(tmp_path / "gate")
    assert caplog.messages == ["gate has rows for 1 of 4 hotkeys; the others start anew"]
    strangers = make(subnet(list("wxyz")))
    before = snapshot(strangers)
    with pytest.raises(InputError, match="of the 4 hotkeys that it has rows for, none is among the 4 of the metagraph"):
        strangers.load(tmp_path / "gate")
    assert all(torch.equal(a, b) for a, b in zip(before[:2], snapshot(strangers)[:2]))
    with pytest.raises(InputError, match="none is among the 0"):
        make(subnet([])).load(tmp_path / "gate")


def test_another_optimizer_starts_with_a_blank_memory(make, tmp_path):
    gate = make(optimizer="sgd")
    gate.backward(gate("abc"), torch.rand(4))
    gate.save(tmp_path / "gate")
    for optimizer in ("adagrad", "adam"):
        other = make(optimizer=optimizer, seed=5)
        other.backward(other("abc"), torch.rand(4))
        other.load(tmp_path / "gate")
        assert torch.equal(other("abc"), gate("abc"))
        assert all((value == 0).all() for state in other.optimizer.state.values() for value in state.values())
        assert other.backward(other("abc"), torch.rand(4)).isfinite()


def test_what_differs_is_said(make, models, tmp_path):
    make().save(tmp_path / "gate")
    larger = make(num_uids=6)
    before = snapshot(larger)
    with pytest.raises(ValueError, match="num_uids is 4 there and 6 here"):
        larger.load(tmp_path / "gate")
    assert all(torch.equal(a, b) for a, b in zip(before[:2], snapshot(larger)[:2]))
    with pytest.raises(ValueError, match="model_name is .*bert there and .*gpt2 here"):
        make(family="gpt2").load(tmp_path / "gate")
    for broken in (tmp_path / "nowhere", tmp_path, tmp_path / "text"):
        (tmp_path / "text").write_text("no head")
        with pytest.raises(ValueError, match="cannot be read as a saved gate"):
            larger.load(broken)
