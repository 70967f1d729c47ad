"Hotkeys that give the same answers are noticed, and a validator asks one of them."

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from prompting_nb.config import InputError
from prompting_nb.validators.copies import Copies
from prompting_nb.validators.validator import MovingAverage, Policy, Validator


def seen(times, **options):
    copies = Copies(**options)
    for n in range(times):
        copies.see(["a", "b", "c", "d"], [f"one {n}", f"one  {n} ", "other" if n % 2 else f"one {n}", None])
    return copies


def test_copies_are_noticed_after_some_answers():
    assert seen(3).groups() == [] and seen(4).groups() == [["a", "b"]]
    assert seen(8, share=0.5).groups() == [["a", "b", "c"]]
    for wrong in (dict(least=0), dict(share=0.0), dict(share=1.5)):
        with pytest.raises(InputError, match="copies need"):
            Copies(**wrong)


def test_each_of_a_group_is_drawn_equally_often():
    copies, hotkeys, draw = seen(8), dict(enumerate("abcd")), torch.Generator().manual_seed(0)
    counts: Counter = Counter()
    for _ in range(400):
        uids, shares = copies.one_each(hotkeys, [0, 1, 2, 3], draw)
        counts.update(uids)
        assert len(uids) == 3 and dict(zip(uids, shares))[uids[0]] == 0.5 and shares[1:] == [1, 1]
    assert counts[2] == counts[3] == 400 and 160 < counts[0] < 240
    assert copies.one_each(hotkeys, [1, 3]) == ([1, 3], [1, 1])  # the other one cannot be asked


def stub(policy, hotkeys):
    validator = object.__new__(Validator)
    neurons = [SimpleNamespace(uid=uid, hotkey=hotkey, axon="there") for uid, hotkey in enumerate(hotkeys)]
    validator.metagraph = type("Network", (list,), {"hotkeys": property(lambda self: hotkeys)})(neurons)
    validator.averages, validator.policy, validator.copies = MovingAverage(), policy, seen(8)
    validator.averages.counts.update(hotkeys)
    validator.pending, validator.prices, validator.in_vain = (), None, Counter()  # nothing waits, nothing costs
    validator.gate, validator.steps, validator.generator = None, 60, torch.Generator().manual_seed(0)
    validator.wallet = SimpleNamespace(hotkey=SimpleNamespace(ss58_address="own"))
    return validator


def test_a_validator_asks_one_of_them_and_states_the_probability():
    hotkeys, scores, sd = ["a", "b", "c", "d"], torch.tensor([0.9, 0.9, 0.5, 0.1]), torch.full((4,), 1e-4)
    both = stub(Policy(k=2, floor=0.0), hotkeys).choose(scores, sd)
    assert both.uids.tolist() == [0, 1]
    validator, asked = stub(Policy(k=2, floor=0.0, distinct=True), hotkeys), Counter()
    for _ in range(300):
        uids, propensities = validator.choose(scores, sd)
        asked.update(uids.tolist())
        assert 2 in uids and sorted(propensities.tolist()) == [0.5, 1.0]
    assert 110 < asked[0] < 190 and asked[3] == 0
    many = stub(Policy(k=4, floor=0.0, distinct=True), hotkeys).choose(scores, sd)
    assert sorted(many.uids.tolist()) == [0, 1, 2, 3]  # copies are better than too few


def answers(seed, rounds=60):
    "Some of twelve hotkeys are asked; the first four give one answer, the next two mostly."
    draw = torch.Generator().manual_seed(seed)
    for n in range(rounds):
        asked = [f"h{uid:02d}" for uid in torch.randperm(12, generator=draw)[:6].tolist()]
        sloppy = torch.rand((), generator=draw) < 0.5
        texts = {f"h{uid:02d}": "a" if uid < 4 else "b" if uid < 6 and not sloppy else f"{uid} {n}" for uid in range(12)}
        yield asked, [texts[hotkey] for hotkey in asked]


@pytest.mark.parametrize("options", [{}, {"pairs": 20}, {"share": 0.4, "least": 2}])
def test_groups_follow_every_answer(options):
    "They are what all pairs say, whatever was asked before: pairs that left, or no longer agree."
    copies, sizes = Copies(**options), set()
    for hotkeys, texts in answers(1):
        copies.see(hotkeys, texts)
        found, again = copies.groups(), Copies(**options)
        again.restore([[*pair, *counts] for pair, counts in copies.met.items()])
        assert found == again.groups()
        together = {pair for pair, (met, equal) in copies.met.items() if met >= copies.least and equal >= copies.share * met}
        assert together == copies.close
        sizes.add(sum(map(len, found)))
        for own in found:
            own.clear()  # what is handed out is nobody else's
    assert len(sizes) > 1


def test_what_nobody_changed_is_not_computed_again():
    copies = Copies()
    for n in range(6):
        copies.see([f"h{i}" for i in range(8)], ["same"] * 8)
    found = copies._groups()
    copies.see(["h0", "x"], ["same", "other"])
    assert copies._groups() is found
    for _ in range(4):
        copies.see(["h0", "h1"], ["same", "other"])
    assert copies._groups() is not found
