"""Figures that subtensor's runtime has printed, epoch by epoch: consensus, bonds as they are stored, and emission.

Source: pallets/subtensor/src/tests/epoch.rs of https://github.com/opentensor/subtensor at commit 14bc6f9f9, from the asserts and the
comments of `test_bonds`, `test_active_stake`, `test_outdated_weights` and `test_zero_weights`. Its numbers are 32.32 fixed point.
"""

from dataclasses import replace

import numpy as np
import pytest

from prompting_nb.network.epochs import run_epoch
from prompting_nb.network.neurons import Neuron, Rules

U16, RAO = 65535, 1_000_000_000
RULES = Rules(max_validators=8)


def row(stakes, miners):
    "Validators with a permit, and miners without one."
    hotkeys = [str(i) for i in range(len(stakes) + miners)]
    stakes = [*stakes, *[0] * miners]
    return tuple(Neuron(key, key, stake, validator_permit=stake > 0) for key, stake in zip(hotkeys, stakes))


def weigh(neurons, uid, weights, block):
    return tuple(replace(n, weights=weights, last_update=block, weights_block=block) if u == uid else n
                 for u, n in enumerate(neurons))


def near(found, printed, by):
    np.testing.assert_allclose(found, printed, rtol=0, atol=by)


def test_bonds_of_eight_epochs():
    "The runtime rounds each epoch's bonds to 16 bits, and so do we: after eight epochs both are within one of 65535."
    usual = {4: 16383, 5: 32767, 6: 49149, 7: 65535}
    neurons = row([1, 2, 3, 4], 4)
    for uid in range(4):
        neurons = weigh(neurons, uid, usual, 1)
    miners = [49998779, 100000610, 149996337, 200004272]
    # who changes its weights before the epoch; a column of bonds after it; emission of validators and miners
    printed = [
        (None, 4, [16383, 32767, 49151, 65535], [49999998, 99999999, 150000000, 200000001, *miners]),
        ((0, {0: U16}), 4, [14582, 32767, 49151, 65535], [44998351, 101110561, 151667215, 202223870, *miners]),
        ((1, {1: U16}), 4, [12603, 28321, 49151, 65535], [40496805, 90999783, 157929636, 210573773, *miners]),
        ((2, {2: U16}), 7, [12602, 28320, 49150, 65535], [99999999, 199999999, 299999999, 399999999, 0, 0, 0, 0]),
        ((2, {7: U16}), 7, [10951, 24609, 49150, 65535], [36443733, 81898628, 163565493, 218092144, 0, 0, 0, 500000000]),
        (None, 7, [9559, 21482, 49150, 65535], [32799427, 73706612, 168638129, 224855830, 0, 0, 0, 500000000]),
        (None, 7, [8376, 18824, 49150, 65535], [29518068, 66336137, 173203134, 230942659, 0, 0, 0, 500000000]),
        (None, 7, None, [26565175, 59701871, 177311856, 236421095, 0, 0, 0, 500000000]),
    ]
    for block, (change, column, bonds, emission) in enumerate(printed, 1):
        if change:
            neurons = weigh(neurons, *change, block)
        neurons = run_epoch(neurons, block, block - 1, RULES, RAO)
        # rounding of bonds moves payments by at most one of 65535, and that of a 10^9 is 15259
        near([n.emission for n in neurons], emission, 15 if block < 4 else 8000)
        if bonds:
            near([n.bonds[column] for n in neurons[:4]], bonds, 1)


def test_the_stake_of_an_inactive_validator_does_not_count():
    neurons = row([1, 1], 2)
    for uid in (0, 1):
        neurons = weigh(neurons, uid, {2: U16, 3: U16}, 1)
    first = run_epoch(neurons, 1, 0, RULES, RAO)
    assert [n.dividends for n in first] == [32767, 32767, 0, 0]
    assert [n.bonds for n in first[:2]] == [{2: U16, 3: U16}] * 2
    second = run_epoch(weigh(first, 0, {2: U16, 3: U16}, 5002), 5002, 1, RULES, RAO)
    assert [n.active for n in second] == [True, False, False, False]
    near([n.dividends for n in second], [36044, 29490, 0, 0], 1)
    near([n.emission for n in second], [274999999, 224999999, 250000000, 250000000], 4000)
    near([second[1].bonds[2], second[1].bonds[3]], [53619, 53619], 1)
    third = run_epoch(weigh(second, 1, {2: U16, 3: U16}, 5003), 5003, 5002, RULES, RAO)
    near([n.dividends for n in third], [35716, 29818, 0, 0], 1)
    near([n.emission for n in third], [272501132, 227498866, 250000000, 250000000], 4000)
    near([third[1].bonds[2], third[1].bonds[3]], [54712, 54712], 1)


def test_weights_for_a_uid_that_changed_hands_do_not_count():
    neurons = row([1, 1, 1, 1], 0)
    for uid in (0, 1):
        neurons = weigh(neurons, uid, {2: 65535, 3: 32768}, 1)
    for uid in (2, 3):
        neurons = weigh(neurons, uid, {uid: U16}, 1)
    first = run_epoch(neurons, 1, 0, RULES, RAO)
    near([n.emission for n in first], [250000000, 250000000, 333331637, 166668361], 3)
    newcomer = Neuron("new", "new", 0, registered=1, last_update=1)
    second = weigh((*first[:3], newcomer), 0, {2: 65535, 3: 32768}, 2)
    second = run_epoch(second, 2, 1, RULES, RAO)
    # consensus .6666632756 for uid 2 and 0 for the newcomer, whom one of two rates
    near([n.consensus for n in second], [0, 0, 43689, 0], 1)
    near([n.incentive for n in second], [0, 0, U16, 0], 1)
    near([n.trust / U16 for n in second], [0, 0, 0.799997558, 0], 2 / U16)
    near([n.validator_trust / U16 for n in second[:2]], [0.6666632756, 0.6666632756], 2 / U16)
    near([n.emission for n in second], [250000000, 250000000, 500000000, 0], 4000)


def test_without_weights_that_count_emission_follows_the_stake():
    neurons = row([1], 1)  # test_zero_weights: one validator, one server
    nobody = run_epoch(neurons, 1, 0, RULES, RAO)
    near([n.emission for n in nobody], [RAO, 0], 1)
    own = run_epoch(weigh(neurons, 0, {0: U16}, 1), 1, 0, RULES, RAO)  # a weight for oneself
    near([n.emission for n in own], [RAO, 0], 1)
    outdated = tuple(replace(n, registered=9) if uid else n for uid, n in enumerate(weigh(neurons, 0, {1: U16}, 1)))
    near([n.emission for n in run_epoch(outdated, 9, 0, RULES, RAO)], [RAO, 0], 1)
    weighed = run_epoch(weigh(neurons, 0, {1: U16}, 1), 1, 0, RULES, RAO)
    near([n.emission for n in weighed], [RAO // 2, RAO // 2], 1)


def test_stake_without_a_permit_earns_nothing_when_nobody_weighs():
    neurons = (*row([1, 1], 0), Neuron("rich", "rich", 8))
    near([n.emission for n in run_epoch(neurons, 1, 0, RULES, RAO)], [RAO // 2, RAO // 2, 0], 1)


@pytest.mark.parametrize("registered, held", [(9, [U16, 7281]), (10, [U16, 7281]), (11, [0, U16])])
def test_bonds_to_a_neuron_that_registered_after_the_epoch_before_are_dropped(registered, held):
    "Of two validators one held all bonds to it; now the other one weighs it, and buys a tenth (of .9), or all."
    neurons = row([1, 1], 2)
    neurons = weigh(weigh(neurons, 0, {2: U16}, 12), 1, {2: U16, 3: U16}, 12)
    neurons = tuple(replace(n, bonds={3: U16}) if u == 0 else replace(n, registered=registered) if u == 3 else n
                    for u, n in enumerate(neurons))
    after = run_epoch(neurons, 20, 10, Rules(max_validators=8), RAO)
    near([after[u].bonds.get(3, 0) for u in (0, 1)], held, 1)


@pytest.mark.parametrize("stakes, most, permits", [
    ([1, 3, 2, 0], 2, [False, True, True, False]),
    ([5, 5, 5, 0], 2, [True, True, False, False]),
    ([0, 0, 0, 1], 4, [False, False, False, True]),
])
def test_permits_go_to_the_largest_stakes(stakes, most, permits):
    neurons = tuple(Neuron(str(i), str(i), stake) for i, stake in enumerate(stakes))
    after = run_epoch(neurons, 1, 0, Rules(max_validators=most), RAO)
    assert [n.validator_permit for n in after] == permits
