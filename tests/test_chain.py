"""The embedded chain pays: epochs, permits, masks, pruning and the rules for weights."""

import asyncio
import threading
import time
from contextlib import closing
from dataclasses import replace

import bittensor as bt
import numpy as np
import pytest
from bittensor._generated import calls

from prompting_nb.network.chain import EmbeddedChain, make_wallet
from prompting_nb.network.consensus import yuma

TEMPO, U16 = 20, 65535


def shares(values, axis=None):
    total = values.sum(axis, keepdims=True)
    return np.divide(values, total, out=np.zeros_like(values), where=total > 0)


def set_weights(client, wallet, weights, **more):
    client.execute(bt.SetWeights(netuid=1, weights=weights, **more), wallet).raise_for_failure()


def a_subnet(stakes=(500, 300, 200), miners=8, **rules):
    chain = EmbeddedChain(tempo=TEMPO, **rules)
    validators = [make_wallet(f"validator {i}") for i in range(len(stakes))]
    for wallet, stake in zip(validators, stakes):
        chain.register(wallet, stake=stake, validator_permit=True)
    for i in range(miners):
        chain.register(make_wallet(f"miner {i}"))
    chain.step()  # weights of the block of a registration would not count
    return chain, validators


def test_the_metagraph_equals_the_pure_function_for_twenty_epochs():
    """8 miners and 3 validators, one of which copies what the chain shows of the other two."""
    rng = np.random.default_rng(0)
    chain, validators = a_subnet()
    stake, quality = np.array([500.0, 300.0, 200.0]), rng.random(8)
    bonds, given = np.zeros((3, 11)), np.zeros((3, 11))
    with closing(chain.client()) as client:
        for epoch in range(20):
            seen = client.weights.weights(1)
            rows = [quality + 0.2 * rng.random(8) for _ in range(2)]
            if epoch:
                rows.append(sum(stake[v] * np.array([seen[v].get(u, 0) for u in range(3, 11)]) for v in (0, 1)))
            for v, row in enumerate(rows):
                set_weights(client, validators[v], {u + 3: float(w) for u, w in enumerate(row)})
                given[v, 3:] = np.round(row / row.max() * U16)  # weights are 16-bit numbers
            chain.step(TEMPO)
            wanted = yuma(given, stake, bonds)
            graph = client.subnets.metagraph(1)
            scale = wanted.bonds.max(0, keepdims=True)
            bonds = np.floor(np.divide(wanted.bonds, scale, out=np.zeros_like(bonds), where=scale > 0) * U16 + 1e-6)
            for name, values in (
                ("incentive", wanted.incentive),
                ("rank", wanted.incentive),
                ("consensus", wanted.consensus),
                ("trust", wanted.trust),
                ("dividends", np.concatenate([wanted.dividends, np.zeros(8)])),
            ):
                on_chain = np.array([getattr(n, name) for n in graph])
                assert (on_chain <= values + 1e-9).all() and (values - on_chain < 1 / U16 + 1e-9).all(), (epoch, name)
            rao = np.array([n.emission.rao for n in graph])
            paid = shares(wanted.incentive + np.concatenate([wanted.dividends, np.zeros(8)]))
            np.testing.assert_allclose(rao, paid * 1e9 * TEMPO, atol=1.01, rtol=0)
            assert (graph.last_step, graph.blocks_since_last_step) == (chain.block - 1, 1)
    assert 0 < graph.neuron(2).dividends < graph.neuron(0).dividends


def test_step_runs_every_epoch_on_its_way():
    at_once, _ = a_subnet()
    one_by_one, _ = a_subnet()
    at_once.step(5 * TEMPO)
    for _ in range(5 * TEMPO):
        one_by_one.step()
    assert at_once.subnet.epochs == one_by_one.subnet.epochs == [1 + TEMPO * i for i in range(1, 6)]
    assert at_once.subnet.neurons == one_by_one.subnet.neurons


def test_a_metagraph_of_an_earlier_block_shows_the_epoch_before():
    chain, validators = a_subnet()
    with closing(chain.client()) as client:
        set_weights(client, validators[0], {3: 1.0})
        chain.step(2 * TEMPO)
        then, now = client.subnets.metagraph(1, block=TEMPO), client.subnets.metagraph(1)
        assert (then.last_step, then.neuron(3).incentive) == (0, 0.0)
        assert (now.last_step, now.neuron(3).incentive) == (1 + 2 * TEMPO, 1.0)


def test_permits_go_to_the_largest_stakes_at_an_epoch_and_hold_by_hand_until_then():
    chain, _ = a_subnet(stakes=(100, 300, 0), max_validators=2)
    chain.set_stake(make_wallet("miner 0"), 200)
    with closing(chain.client()) as client:
        assert [n.uid for n in client.subnets.metagraph(1).validators] == [0, 1, 2]
        chain.step(TEMPO)
        assert [n.uid for n in client.subnets.metagraph(1).validators] == [1, 3]


def test_nobody_is_paid_for_weighing_itself():
    chain, validators = a_subnet()
    with closing(chain.client()) as client:
        set_weights(client, validators[0], {0: 1.0, 4: 1.0})
        chain.step(TEMPO)
        assert [round(n.incentive, 4) for n in client.subnets.metagraph(1)][:5] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("cutoff, incentive", [(TEMPO, 1.0), (TEMPO - 2, 0.0)])
def test_an_inactive_validator_does_not_count(cutoff, incentive):
    chain, validators = a_subnet(activity_cutoff=cutoff)
    with closing(chain.client()) as client:
        set_weights(client, validators[0], {3: 1.0})
        chain.step(TEMPO)
        graph = client.subnets.metagraph(1)
        assert (graph.neuron(3).incentive, graph.neuron(0).active) == (incentive, bool(incentive))


def test_weights_from_before_a_registration_do_not_count_for_the_newcomer():
    chain, validators = a_subnet()
    with closing(chain.client()) as client:
        set_weights(client, validators[0], {3: 1.0})
        chain.subnet.put(
            type(n)(**{**vars(n), "registered": chain.block}) if uid == 3 else n
            for uid, n in enumerate(chain.subnet.neurons)
        )
        chain.step(TEMPO)
        assert client.subnets.metagraph(1).neuron(3).incentive == 0
        set_weights(client, validators[0], {3: 1.0})
        chain.step(TEMPO)
        assert client.subnets.metagraph(1).neuron(3).incentive == 1


def test_a_full_subnet_prunes_the_least_emission_after_its_immunity():
    chain, validators = a_subnet(max_uids=11, immunity_period=10)
    with closing(chain.client()) as client:
        set_weights(client, validators[0], {uid: 1.0 for uid in range(3, 11) if uid != 7})
        set_weights(client, validators[1], {4: 1.0})
        set_weights(client, validators[2], {4: 1.0})
        chain.step(TEMPO)
        scores = [n.pruning_score for n in client.subnets.metagraph(1)]
        assert scores[7] == min(scores) == 0 and max(scores) == 1
        assert chain.register(make_wallet("newcomer")) == 7
        assert chain.register(make_wallet("another")) != 7  # immune now


def test_the_rules_for_weights_are_kept():
    chain, validators = a_subnet(min_allowed_weights=2, max_weight=0.6, weights_version=5)
    with closing(chain.client()) as client:
        with pytest.raises(bt.ChainError, match="at least 2"):
            set_weights(client, validators[0], {3: 1.0}, version_key=5)
        with pytest.raises(bt.ChainError, match="requires 5"):
            set_weights(client, validators[0], {3: 1.0, 4: 1.0}, version_key=4)
        set_weights(client, validators[0], {3: 9.0, 4: 1.0}, version_key=5)
        assert max(chain.weights[0].values()) <= 0.6 + 1e-4  # clipped by the SDK
    before = chain.weights
    for weights, name in (({3: 1}, "WeightVecLengthIsLow"), ({3: 9, 4: 1}, "MaxWeightExceeded")):
        call = calls.SubtensorModule.set_mechanism_weights(  # past the SDK's own checks
            netuid=1, mecid=0, dests=list(weights), weights=list(weights.values()), version_key=5
        )
        refused = asyncio.run(chain.substrate.submit(call, validators[0].hotkey))
        assert refused.error.name == name and chain.weights == before


def test_a_small_subnet_asks_for_no_more_weights_than_it_has_uids():
    chain, (wallet,) = a_subnet(stakes=(500,), miners=2, min_allowed_weights=8)

    def refusal(*dests):  # past the SDK's own checks
        call = calls.SubtensorModule.set_mechanism_weights(netuid=1, mecid=0, dests=[*dests], weights=[1] * len(dests), version_key=0)
        return getattr(asyncio.run(chain.substrate.submit(call, wallet.hotkey)).error, "name", None)

    assert (refusal(1, 2), refusal(0, 1, 2)) == ("WeightVecLengthIsLow", None)


def test_a_stake_or_an_amount_that_cannot_be_is_refused_and_epochs_go_on():
    chain, (first, *_) = a_subnet()
    for bad in (-1, float("nan"), float("inf"), 1e10):
        with pytest.raises(ValueError, match="a stake must be from 0"):
            chain.set_stake(first, bad)
        if bad != -1:
            with pytest.raises(ValueError, match="less than 1e9 TAO"):
                chain.fund(first, bad)
    chain.fund(first, 9e8)
    with pytest.raises(ValueError, match="would be"):
        chain.fund(first, 9e8)
    before = chain.block
    assert chain.step(TEMPO) == before + TEMPO and chain.subnet.neurons[0].stake == 500 * 10**9


def test_without_weights_or_permits_emission_follows_the_stake():
    chain, _ = a_subnet(stakes=(300, 100))
    with closing(chain.client()) as client:
        rows = [type(n)(**{**vars(n), "validator_permit": False}) for n in chain.subnet.neurons]
        chain.subnet.put(rows)
        chain.step(TEMPO)
        assert [n.emission.amount for n in client.subnets.metagraph(1)][:3] == [15, 5, 0]


def test_stake_is_bought_and_sold_by_the_coldkey():
    chain, (first, second, _) = a_subnet()
    chain.fund(first, 50)
    own, cold = first.hotkey.ss58_address, first.coldkeypub.ss58_address
    with closing(chain.client()) as client:
        client.execute(bt.AddStake(own, 1, 30), first).raise_for_failure()
        client.execute(bt.RemoveStake(own, 1, 10, slippage_protection=False), first).raise_for_failure()
        client.execute(bt.RemoveStake(own, 1, 10), first).raise_for_failure()
        assert client.subnets.metagraph(1).neuron(0).total_stake.amount == 510
        assert chain.subnet.balances[cold] == 40 * 10**9
        for intent, wallet, name in (
            (bt.AddStake(own, 1, 41), first, "NotEnoughBalanceToStake"),
            (bt.RemoveStake(own, 1, 511), first, "NotEnoughStakeToWithdraw"),
            (bt.RemoveStake(own, 1, 1), second, "NonAssociatedColdKey"),
            (bt.AddStake(own, 1, 0.001), first, "AmountTooLow"),
            (bt.AddStakeLimit(own, 1, 1, limit_price_rao=10**9 - 1), first, "SlippageTooHigh"),
            (bt.RemoveStakeLimit(own, 1, 1, limit_price_rao=10**9 + 1), first, "SlippageTooHigh"),
            (bt.AddStake(make_wallet("nobody").hotkey.ss58_address, 1, 1), first, "HotKeyNotRegisteredInSubNet"),
        ):
            assert client.execute(intent, wallet).error.name == name
        client.execute(bt.AddStake(own, 1, "all"), first).raise_for_failure()
        assert 0 < chain.subnet.balances[cold] < 10**6
    with pytest.raises(ValueError, match="balance"):
        chain.fund(second, -1)


def own(wallet):
    return wallet.hotkey.ss58_address


def test_the_stake_of_who_is_pruned_or_replaced_goes_back_to_its_coldkey():
    chain, (first, second, _) = a_subnet()
    chain.fund(first, 50)
    with closing(chain.client()) as client:
        client.execute(bt.AddStake(own(first), 1, 30), first).raise_for_failure()
    chain.replace(0, make_wallet("newcomer"))
    assert chain.subnet.balances[first.coldkeypub.ss58_address] == 550 * 10**9
    assert chain.subnet.balances[second.coldkeypub.ss58_address] == 0


def test_a_registration_is_bought_through_the_sdk_and_prunes_a_full_subnet():
    chain, _ = a_subnet(max_uids=11, burn=2, immunity_period=10)
    chain.step(TEMPO)
    rich, poor = make_wallet("rich"), make_wallet("poor")
    chain.fund(rich, 5)
    with closing(chain.client()) as client:
        assert client.query(("SubtensorModule", "Burn"), [1]) == 2 * 10**9
        refused = client.execute(bt.BurnedRegister(netuid=1), poor)
        assert not refused.success and refused.error.name == "NotEnoughBalanceToStake"
        bought = client.execute(bt.BurnedRegister(netuid=1), rich)
        assert bought.success and bought.data["shielded"] and int(bought.extrinsic_id.split("-")[0]) == chain.block
        graph = client.subnets.metagraph(1)
        neuron = graph.by_hotkey(own(rich))
        assert len(graph) == 11 and neuron.block_at_registration == chain.block
        assert chain.subnet.balances[rich.coldkeypub.ss58_address] == 3 * 10**9
        again = client.execute(bt.BurnedRegister(netuid=1), rich)
        assert again.error.name == "HotKeyAlreadyRegisteredInSubNet"
        other = client.execute(bt.BurnedRegister(netuid=1, hotkey_ss58=own(make_wallet("other"))), rich)
        assert other.success and chain.subnet.balances[rich.coldkeypub.ss58_address] == 10**9
        assert client.subnets.metagraph(1).by_hotkey(own(make_wallet("other"))).coldkey == rich.coldkeypub.ss58_address
        wrong = client.execute(bt.BurnedRegister(netuid=7), rich)
        assert wrong.error.name == "SubnetNotExists"


def test_a_carrier_whose_inner_call_nobody_handed_over_is_refused():
    chain, (first, *_) = a_subnet()
    carrier = calls.MevShield.submit_encrypted(ciphertext=b"sealed elsewhere")
    refused = asyncio.run(chain.substrate.submit(carrier, first.coldkey))
    assert refused.error.name == "FailedShieldedTxDecryption" and chain.subnet.count == 0


def test_all_of_a_stake_and_to_a_limit():
    chain, (first, second, third) = a_subnet()
    free = lambda wallet: chain.subnet.balances[wallet.coldkeypub.ss58_address] / 10**9
    with closing(chain.client()) as client:
        client.execute(bt.RemoveStake(own(first), 1, "all"), first).raise_for_failure()
        client.execute(bt.RemoveStakeLimit(own(second), 1, "all", limit_price_rao=10**9), second).raise_for_failure()
        dust = client.execute(bt.RemoveStake(own(third), 1, 199.999), third)
        assert dust.error.name == "AmountTooLow" and "unstake all" in dust.message
        client.execute(bt.UnstakeAll(own(third)), third).raise_for_failure()
        assert [n.total_stake.amount for n in client.subnets.metagraph(1)][:3] == [0, 0, 0]
        assert [free(wallet) for wallet in (first, second, third)] == [500, 300, 200]
        with pytest.raises(bt.BittensorError, match="nothing to unstake"):
            client.execute(bt.RemoveStake(own(first), 1, "all"), first)
        full = calls.SubtensorModule.remove_stake_full_limit(hotkey=own(first), netuid=1, limit_price=None)
        client.execute(bt.AddStake(own(first), 1, 5), first).raise_for_failure()
        client.submit_call(full, first).raise_for_failure()
        assert free(first) == 500


@pytest.mark.parametrize("period", [1, 3])
def test_committed_weights_appear_when_their_epoch_comes(period):
    chain, validators = a_subnet(commit_reveal=True, reveal_period=period)
    with closing(chain.client()) as client:
        set_weights(client, validators[0], {3: 1.0, 4: 3.0})
        pending = client.weights.timelocked_weight_commits(1)
        assert [c["hotkey"] for c in pending[0]] == [own(validators[0])] and set(pending) == {0}
        assert client.subnets.metagraph(1).neuron(0).last_update == chain.block
        for epoch in range(1, period + 1):
            assert chain.weights == {}
            chain.step(TEMPO)
        assert {u: round(w, 3) for u, w in chain.weights[0].items()} == {3: 0.25, 4: 0.75}
        paid = client.subnets.metagraph(1)  # they count in the epoch that reveals them
        assert (paid.last_step, round(paid.neuron(4).incentive, 3)) == (chain.block - 1, 0.75)
        assert client.weights.timelocked_weight_commits(1) == {}
        set_weights(client, validators[0], {5: 1.0})
        for epoch in range(period):  # the old ones stay visible, and count
            assert set(chain.weights[0]) == {3, 4}
            chain.step(TEMPO)
        assert set(chain.weights[0]) == {5}


def test_the_rules_of_commits_are_kept(caplog):
    chain, validators = a_subnet(commit_reveal=True, weights_rate_limit=0)
    commit = lambda **more: calls.SubtensorModule.commit_timelocked_mechanism_weights(
        **{**dict(netuid=1, mecid=0, commit=b"made elsewhere", reveal_round=1, commit_reveal_version=4), **more})
    submit = lambda call, wallet=validators[0]: asyncio.run(chain.substrate.submit(call, wallet.hotkey)).error.name
    assert submit(commit()) == "InvalidRevealCommitHashNotMatch"  # the plain weights are missing
    assert submit(commit(commit_reveal_version=3)) == "IncorrectCommitRevealVersion"
    assert submit(commit(mecid=1)) == "MechanismDoesNotExist"
    openly = calls.SubtensorModule.set_mechanism_weights(netuid=1, mecid=0, dests=[3], weights=[1], version_key=0)
    assert submit(openly) == "CommitRevealEnabled"
    with closing(chain.client()) as client:
        for _ in range(10):
            set_weights(client, validators[0], {3: 1.0})
        with pytest.raises(bt.ChainError, match="not revealed"):
            set_weights(client, validators[0], {3: 1.0})
        set_weights(client, make_wallet("miner 0"), {4: 1.0})  # has no permit, which is seen at the reveal
        chain.step(TEMPO)
        assert "no validator permit" in caplog.text and set(chain.weights) == {0}
    openly_on = EmbeddedChain()
    openly_on.register(validators[0])
    refused = asyncio.run(openly_on.substrate.submit(commit(), validators[0].hotkey))
    assert refused.error.name == "CommitRevealDisabled"


def test_commits_that_a_shorter_period_leaves_behind_are_counted(caplog):
    chain, validators = a_subnet(commit_reveal=True, reveal_period=3)
    with closing(chain.client()) as client:
        set_weights(client, validators[0], {3: 1.0})
        chain.step(TEMPO)
        set_weights(client, validators[0], {4: 1.0})
        chain.subnet.rules = replace(chain.subnet.rules, reveal_period=1)
        chain.step(TEMPO)
    assert set(chain.weights[0]) == {4}
    assert "1 commit of weights of uid 0 dropped: too old to reveal" in caplog.text


def test_committed_weights_do_not_reach_a_newcomer_on_the_uid():
    chain, validators = a_subnet(commit_reveal=True, reveal_period=2)
    with closing(chain.client()) as client:
        set_weights(client, validators[0], {3: 1.0, 4: 1.0})
        chain.step()
        chain.replace(3, make_wallet("newcomer"))
        chain.step(TEMPO - 1)
        set_weights(client, validators[0], {3: 1.0})  # this commit is younger than the newcomer
        chain.step(TEMPO)
        assert set(chain.weights[0]) == {3, 4}  # revealed, and only one of them counts
        assert [client.subnets.metagraph(1).neuron(uid).incentive for uid in (3, 4)] == [0, 1]
        chain.step(TEMPO)
        assert [client.subnets.metagraph(1).neuron(uid).incentive for uid in (3, 4)] == [1, 0]


def test_a_copier_earns_less_when_weights_stay_secret():
    "The loss that the laboratory predicts, through the SDK's calls: the copier knows the old ranking only."
    def dividends(commit_reveal):
        rng = np.random.default_rng(0)
        chain, validators = a_subnet(stakes=(400, 400, 200), commit_reveal=commit_reveal, reveal_period=2)
        quality, earned = rng.random(8), []
        with closing(chain.client()) as client:
            for epoch in range(14):
                quality = np.clip(0.5 * quality + 0.5 * rng.random(8), 0.01, 1)
                copied = client.weights.weights(1).get(0)
                for wallet in validators[:2]:
                    set_weights(client, wallet, {u + 3: float(w) for u, w in enumerate(quality)})
                if copied:
                    set_weights(client, validators[2], copied)
                chain.step(TEMPO)
                earned.append([client.subnets.metagraph(1).neuron(u).dividends for u in range(3)])
        mean = np.mean(earned[6:], axis=0)
        return mean[2] / mean[:2].mean() * 2  # of its fair share: it has half of the others' stake

    openly, secretly = dividends(False), dividends(True)
    assert secretly < openly - 0.02 and openly < 1.01


def test_epochs_are_read_and_waited_for_as_on_a_real_chain():
    chain, _ = a_subnet()
    with closing(chain.client()) as client:
        status = client.epochs.epoch_status(1)
        assert (status["epoch_index"], status["next_epoch_start_block"], status["last_epoch_block"]) == (0, 21, 1)
        chain.step(TEMPO + 4)
        status = client.epochs.epoch_status(1)
        assert (status["epoch_index"], status["last_epoch_block"], status["blocks_remaining"]) == (1, 21, 15)
        assert client.query(("SubtensorModule", "LastEpochBlock"), [1], block=5) == 1


        def turn():
            while not chain.substrate.listeners:  # until somebody waits
                time.sleep(0.005)
            chain.step(TEMPO)

        threading.Thread(target=turn, daemon=True).start()
        assert client.wait_for_epoch(1, timeout=30).block == 41


@pytest.mark.parametrize("wrong", [
    {"tempo": 0}, {"max_uids": -1}, {"weights_rate_limit": -1}, {"max_validators": -1}, {"reveal_period": 0}, {"emission": float("nan")},
    {"burn": -0.1}, {"max_weight": 0.0}, {"max_weight": 1.5}, {"immunity_period": -1}, {"min_allowed_weights": -1}])
def test_numbers_that_no_subnet_can_have_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EmbeddedChain(**wrong)
    with pytest.raises(ValueError, match="do not go back"):
        EmbeddedChain().step(-1)


def test_a_listener_whose_loop_was_closed_stops_no_chain():
    chain, loop = EmbeddedChain(), asyncio.new_event_loop()
    headers = chain.substrate.blocks()

    async def first():
        waiting = asyncio.ensure_future(anext(headers))
        await asyncio.sleep(0.01)
        chain.step()
        return await waiting

    block = loop.run_until_complete(first())["header"]["number"]
    loop.close()
    assert (chain.step(), chain.step()) == (block + 1, block + 2)
    assert not chain.substrate.listeners
    asyncio.run(headers.aclose())  # the late end of what was abandoned
