"""The simulator: the same anywhere, true to its events, and a yardstick for estimates from logs."""

import joblib
import numpy as np
import pytest
import torch

from prompting_nb.config import InputError
from prompting_nb.reward.preferences import Ranking
from prompting_nb.validators.audits import AuditedPolicy
from prompting_nb.validators.policies import BestFixed, LinTS, LinUCB, MeanPerUid, NearestAnswers
from prompting_nb.validators.replay import ask_always, ask_anyone, estimate
from prompting_nb.validators.selection import Selection, select
from prompting_nb.validators.simulate import (
    Always, Copies, Delay, Drift, Favourites, GatePolicy, Lazy, Noise, Replace, Subnet, made_up, run_policy, simulate)
from prompting_nb.validators.validator import Policy


class Recorder:
    "Asks at random and writes down what it is told."

    def __init__(self, subnet, seed=0):
        self.dice, self.told, self.moves, self.uids = torch.Generator().manual_seed(seed), [], [], subnet.uids

    def choose(self, prompt, k, available):
        return select(torch.zeros(self.uids), k, epsilon=1.0, generator=self.dice)

    def learn(self, prompt, uids, rewards):
        self.told += [(prompt, uid, reward) for uid, reward in zip(uids.tolist(), rewards.tolist())]

    def resync(self, before, now):
        self.moves.append((before.hotkeys, now.hotkeys))


def subnets(seed):
    return made_up(uids=12, topics=3, prompts=60, seed=seed)


def flat(uids=4, prompts=40, spare=0):
    "Everybody is worth the same at any prompt; column i is worth i / 10."
    return Subnet(np.tile(np.arange(uids + spare) / 10, (prompts, 1)), uids=uids)


@pytest.mark.slow
def test_tables_are_equal_from_one_process_and_from_loky():
    given = dict(seeds=[3, 5], steps=40, events=[Replace(0.25), Noise()])
    policies = {"gate": GatePolicy, "at random": Recorder}
    alone = simulate(subnets, policies, **given)
    with joblib.parallel_config(backend="loky", n_jobs=2):
        spread = simulate(subnets, policies, **given)
    for name in policies:
        for one, other in zip(alone.runs[name], spread.runs[name]):
            for field in ("uids", "propensities", "told", "scores", "grades", "rewards"):
                assert np.array_equal(getattr(one, field), getattr(other, field)), (name, field)
    assert str(alone) == str(spread) and alone.table() == spread.table()


def test_a_seed_alone_gives_what_it_gave_among_others():
    both = simulate(subnets, {"gate": GatePolicy}, [1, 2], steps=30, events=[Drift(), Lazy()])
    alone = simulate(subnets, {"gate": GatePolicy}, [2], steps=30, events=[Drift(), Lazy()])
    assert both.values("gate")[1] == alone.values("gate")[0]


def test_policies_meet_the_same_prompts_noise_and_events():
    events = [Replace([1, 2], 0.3), Drift(), Lazy(0.5, 0.2), Noise(freedom=2)]
    made = simulate(subnets, {"a": Recorder, "b": lambda subnet, seed: Always([0, 1, 2])}, 2, steps=50, events=events)
    for one, other in zip(*made.runs.values()):
        assert one.prompts == other.prompts
        assert np.array_equal(one.grades, other.grades)
        same = np.isclose(one.rewards, other.rewards)
        assert same.all()


def test_newcomers_are_told_of_and_silent_change_is_not():
    for silent in (False, True):
        policy = Recorder(flat())
        run = run_policy(flat(spare=1), policy, k=2, events=[Replace([2], 10, silent=silent)])
        assert run.grades[9].tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
        assert run.grades[10].tolist() == pytest.approx([0, 0.1, 0.4, 0.3])
        assert len(policy.moves) == (0 if silent else 1)
        if not silent:
            before, now = policy.moves[0]
            assert [a == b for a, b in zip(before, now)] == [True, True, False, True]


def test_the_most_asked_uid_is_the_one_that_this_policy_asked_most():
    run = run_policy(flat(spare=1), Always([1]), k=1, events=[Replace("most asked", 0.5)])
    assert run.grades[-1].tolist() == pytest.approx([0, 0.4, 0.2, 0.3])


def test_hotkeys_stay_different_when_columns_come_again():
    policy = Recorder(flat())
    run_policy(flat(), policy, k=2, events=[Replace(4, step) for step in range(5, 20)])
    assert len(policy.moves) == 15 and all(len(set(now)) == 4 for _, now in policy.moves)
    assert all(not set(before) & set(now) for before, now in policy.moves)


def test_drift_keeps_the_spread_of_skills():
    runs = simulate(lambda seed: made_up(uids=64, topics=4, seed=seed), {"any": lambda *_: Always([0])}, 4, k=1, steps=400,
                    events=[Drift(rho=0.98)]).runs["any"]
    early, late = (np.mean([run.grades[part].std(1).mean() for run in runs]) for part in (slice(0, 20), slice(300, 400)))
    assert late == pytest.approx(early, rel=0.1)
    first = runs[0].grades[[0, -1]]
    assert abs(np.corrcoef(first)[0, 1]) < 0.5, "after 400 steps little is left of the first skills"


def test_lazy_miners_care_about_some_prompts():
    run = run_policy(flat(prompts=2000), Always([0]), k=1, events=[Lazy([3], 0.5, share=0.25)])
    assert (run.grades[:1000, 3] > 0).all() and (run.grades[1000:, 3] > 0).mean() == pytest.approx(0.25, abs=0.05)
    assert (run.grades[:, 2] > 0).all()


def test_copies_give_the_answer_of_one():
    run = run_policy(flat(), Always([1, 2, 3]), k=3, events=[Copies([1, 3], 20)])
    assert run.distinct.tolist() == [3] * 20 + [2] * 20
    assert run.grades[30].tolist() == pytest.approx([0, 0.1, 0.2, 0.1])


def test_noise_has_its_spread_tails_and_outliers():
    subnet = Subnet(np.full((4000, 1), 0.5))
    told = lambda **noise: run_policy(subnet, Always([0]), k=1, events=[Noise(cut=False, **noise)]).told[:, 0] - 0.5
    assert told(sd=0.1).std() == pytest.approx(0.1, rel=0.1)
    assert np.abs(told(sd=0.1, freedom=2)).max() > 10 * np.abs(told(sd=0.1)).max() / 5
    assert (told(sd=0.0, outliers=0.15) != 0).mean() == pytest.approx(0.15, abs=0.03)
    cut = run_policy(subnet, Always([0]), k=1, events=[Noise(5.0)])
    assert cut.told.min() == 0 and cut.told.max() == 1 and (cut.grades == 0.5).all()


def test_late_rewards_come_in_any_order_and_lost_ones_never():
    subnet = Subnet(np.random.default_rng(0).random((60, 5)))
    policy = Recorder(subnet)
    run = run_policy(subnet, policy, k=3, events=[Delay(most=10, lost=0.3)])
    came = [(prompt, uid, told) for prompt, uids, row in zip(run.prompts, run.uids, run.told)
            for uid, told in zip(uids, row) if np.isfinite(told)]
    assert sorted((p, u) for p, u, _ in policy.told) == sorted((p, u) for p, u, _ in came)
    worth = {(p, u): told for p, u, told in came}
    assert all(reward == pytest.approx(worth[p, u], abs=1e-6) for p, u, reward in policy.told)
    assert 0.6 < len(came) / run.uids.size < 0.75 and any(None in event.rewards for event in run.events())
    order = [run.prompts.index(prompt) for prompt, _, _ in policy.told]
    assert order != sorted(order)


def test_rewards_of_those_that_left_are_not_learned_by_who_came():
    policy = Recorder(flat())
    run_policy(flat(spare=4), policy, k=4, steps=12, events=[Replace([0, 1, 2, 3], 6), _late])
    came = [round(reward, 5) for _, _, reward in policy.told]
    assert sorted(came) == sorted([0, 0.1, 0.2, 0.3] * 3 + [0.4, 0.5, 0.6, 0.7] * 3), "those of steps 3 to 5 have left"


def _late(now):
    now.wait = lambda k, draw: np.full(k, 3.0)


def test_favourites_follow_their_hotkeys():
    known = [Ranking("before", ["x", "y"], [0.9, 0.2], ["miner 3", "miner 1"])]
    subnet = Subnet(flat(spare=1).grades, uids=4, known=known)
    policy = Favourites(subnet)
    assert policy.choose("", 2, range(4)).uids.tolist() == [3, 1]
    run_policy(subnet, policy, k=2, events=[Replace([3], 5)])
    assert policy.choose("", 1, range(4)).uids.tolist() == [1]


def test_a_warm_gate_begins_with_the_best():
    draw = np.random.default_rng(1)
    x = np.eye(384)[:80]
    grades = np.clip(np.arange(8) / 8 + 0.05 * draw.standard_normal((80, 8)), 0, 1)
    names = [f"miner {i}" for i in range(8)]
    known = [Ranking(f"known {i}", [str(j) for j in range(8)], grades[i].tolist(), names) for i in range(40)]
    subnet = Subnet(grades[40:], embeddings=x[40:], known=known, known_embeddings=x[:40])
    warm = run_policy(subnet, GatePolicy(subnet, warm=True), k=2)
    cold = run_policy(subnet, GatePolicy(subnet), k=2)
    assert set(warm.uids[0]) == {6, 7} and len(set(cold.uids[:4].ravel())) > 5, "a cold gate asks newcomers first"
    assert warm.got()[:10].mean() > cold.got()[:10].mean() + 0.1


def test_replay_is_right_about_simulated_logs():
    "Intervals from the log of one policy hold the truth about others, which the simulator knows."
    held, off = [], []
    for seed in range(12):
        subnet = subnets(seed)
        run = run_policy(subnet, _Explorer(subnet, seed), k=3, steps=250, seed=seed, events=[Noise(0.1)])
        for rule in (ask_always([0, 1, 2]), ask_anyone(3)):
            found, truth = estimate(run.events(), rule), run.truth(rule)
            held.append(found.dr_interval[0] <= truth <= found.dr_interval[1])
            off.append(found.dr - truth)
    assert np.mean(held) > 0.85 and abs(np.mean(off)) < 0.02


class _Explorer(Recorder):
    "Prefers the first uids, by scores that go into the log."

    def choose(self, prompt, k, available):
        self.scores = torch.linspace(0.6, 0.4, self.uids)
        return select(self.scores, k, epsilon=0.4, generator=self.dice)


def test_a_policy_that_misbehaves_is_named():
    class Twice(Recorder):
        def choose(self, prompt, k, available):
            return Selection(torch.tensor([1, 1]), torch.ones(2))

    with pytest.raises(InputError, match="2 different uids"):
        run_policy(flat(), Twice(flat()), k=2)
    with pytest.raises(InputError, match="policy and a seed"):
        simulate(flat(), {}, 1)
    with pytest.raises(InputError, match="k = 5"):
        run_policy(flat(), Always([0]), k=5)


def test_figures_name_the_worst_seed():
    results = simulate(subnets, {"a": lambda *_: Always([0, 1, 2]), "b": lambda *_: Always([3, 4, 5])}, [4, 7, 9], steps=20)
    figure = results.figure("a", "gate")
    assert figure.worst == min(figure.values) and figure.worst_seed == [4, 7, 9][np.argmin(figure.values)]
    assert figure.low < figure.mean < figure.high and figure.high - figure.mean == pytest.approx(4.3027 * figure.sd / 3**0.5, rel=1e-3)
    difference = results.figure("a", "gate", minus="b")
    assert difference.mean == pytest.approx(figure.mean - results.figure("b", "gate").mean)
    assert str(results).splitlines()[0].startswith("policy") and "seed" in results._repr_html_()


class Lowest:
    "Prefers the first uids; it has scores and leaves the choice to others."

    def __init__(self, subnet, seed):
        self.uids = subnet.uids

    def scores(self, prompt):
        return -torch.arange(self.uids, dtype=torch.float32)

    def learn(self, prompt, uids, rewards):
        "Never."

    def resync(self, before, now):
        "It makes no difference."


def test_policies_of_the_package_and_those_with_scores_alone_can_run():
    bandit = lambda kind: lambda subnet, seed: kind(subnet.metagraph, subnet.encoder(), torch.as_tensor(subnet.embeddings))
    policies = {"LinTS": bandit(LinTS), "LinUCB": bandit(LinUCB), "lowest": Lowest}
    results = simulate(subnets, policies, 2, steps=120, events=[Replace(0.25)])
    assert results.figure("LinTS", "gap_closed").mean > 0.3 < results.figure("LinUCB", "gap_closed").mean
    (run, _) = results.runs["lowest"]
    assert (run.uids == [0, 1, 2]).all(1).mean() > 0.9 and run.scores[5].tolist() == [-i for i in range(12)]
    assert 0.9 < np.median(run.propensities) <= run.propensities.max() <= 1


def test_another_miner_starts_without_what_was_done_to_the_old():
    lazy = run_policy(flat(spare=1), Always([3]), k=1, events=[Replace([3], 20), Lazy([3], 0, share=0.0)])
    assert (lazy.grades[:20, 3] == 0).all() and (lazy.grades[20:, 3] == 0.4).all(), "a newcomer is not lazy"
    silent = run_policy(flat(spare=1), Always([3]), k=1, events=[Replace([3], 20, silent=True), Lazy([3], 0, share=0.0)])
    assert (silent.grades[20:, 3] == 0.4).all()
    copies = run_policy(flat(spare=1), Always([1, 2, 3]), k=3, events=[Copies([1, 2, 3]), Replace([1], 20)])
    assert copies.grades[19].tolist() == pytest.approx([0, 0.1, 0.1, 0.1]) and copies.distinct[19] == 1
    assert copies.grades[20].tolist() == pytest.approx([0, 0.4, 0.2, 0.2]), "the next of them is copied"
    assert copies.distinct[20] == 2


def test_a_newcomer_drifts_from_its_own_skill():
    subnet = Subnet(np.tile([[0.2, 0.5, 0.8, 0.5]], (400, 1)), uids=3)
    for order in ([Replace([0], 200), Drift(1.0)], [Drift(1.0), Replace([0], 200)]):
        run = run_policy(subnet, Always([0]), k=1, events=order)
        assert np.allclose(run.grades[:200], [0.2, 0.5, 0.8]) and np.allclose(run.grades[200:], 0.5 * np.array([1, 1, 1.6]))
    gone = run_policy(subnet, Always([0]), k=1, events=[Drift(0.0), Replace([0], 200)])
    assert gone.grades.std(0).min() > 0.1 and np.isfinite(gone.grades).all()


def test_drift_needs_no_prompt_of_every_topic():
    grades = np.random.default_rng(0).random((40, 5))
    run = run_policy(Subnet(grades, topics=[0, 2] * 20), Always([0]), k=1, events=[Drift(0.9)])
    assert np.isfinite(run.grades).all() and run.grades.std(0).min() > 0


def test_events_of_a_kind_add_up():
    two = run_policy(flat(prompts=200), Always([1]), k=1, events=[Delay(2), _late])
    once = run_policy(flat(prompts=200), Recorder(flat()), k=2, events=[_late, Delay(0)])
    assert np.isnan(once.told[-3:]).all() and np.isfinite(once.told[:-3]).all(), "3 steps and none"
    assert np.isfinite(two.told[0]).all()
    chain = run_policy(flat(), Always([0, 1, 2]), k=3, events=[Copies([0, 1]), Copies([1, 2], 20)])
    assert chain.distinct.tolist() == [2] * 20 + [1] * 20 and chain.grades[30].tolist() == pytest.approx([0, 0, 0, 0.3])
    turned = run_policy(flat(), Always([1, 2, 3]), k=3, events=[Copies([2, 3]), Copies([1, 2], 20)])
    assert turned.grades[30].tolist() == pytest.approx([0, 0.1, 0.1, 0.1]), "who copies a copy copies its source"
    shifted = run_policy(made_up(8, 2, 60), Always([0]), k=1, events=[Drift(0.9), Drift(0.9)])
    single = run_policy(made_up(8, 2, 60), Always([0]), k=1, events=[Drift(0.9)])
    assert shifted.grades.std(0).mean() > single.grades.std(0).mean()


def test_every_event_at_once_and_an_event_used_twice():
    events = [Drift(0.99), Replace(0.25), Replace("most asked", 0.3, silent=True), Lazy(0.5, 0.2), Copies(0.5, 0.4), Noise(0.2, 2.0),
              Noise(outliers=0.1), Delay(9, lost=0.2)]
    one, other = (simulate(subnets, {"any": Recorder}, [4], steps=50, events=events).runs["any"][0] for _ in range(2))
    assert np.isfinite(one.grades).all() and ((one.grades >= 0) & (one.grades <= 1)).all()
    assert np.array_equal(one.grades, other.grades) and np.array_equal(one.told, other.told, equal_nan=True)
    lazy = Lazy([3], 20, share=0.0)
    for _ in range(2):
        run = run_policy(flat(), Always([3]), k=1, events=[lazy])
        assert (run.grades[:20, 3] == 0.3).all() and (run.grades[20:, 3] == 0).all(), "nothing is left from the run before"


def test_a_hotkey_is_never_given_twice():
    subnet = Subnet(flat(3, spare=1).grades, uids=3, names=["a", "b", "c", "a (2)"])
    policy = Recorder(subnet)
    run_policy(subnet, policy, k=2, events=[Replace(3, step) for step in range(5, 30)])
    seen = ["a", "b", "c"] + [key for before, now in policy.moves for key in now if key not in before]
    assert len(set(seen)) == len(seen) == 3 + 25 * 3


WRONG = {
    "rho": lambda: Drift(1.1), "rho nan": lambda: Drift(np.nan), "lazy share": lambda: Lazy(share=-0.1), "sd": lambda: Noise(-1.0),
    "freedom": lambda: Noise(freedom=0.0), "outliers": lambda: Noise(outliers=2.0), "most": lambda: Delay(-1),
    "lost": lambda: Delay(lost=1.5),
    "sd inf": lambda: Noise(np.inf), "name": lambda: Replace("best"), "mask": lambda: Replace([True, False, False, True]),
    "halves": lambda: Replace([0.5, 1.0]), "twice": lambda: Replace([1, 1]), "share": lambda: Replace(1.5), "nan": lambda: Replace(np.nan),
    "when": lambda: Replace(0.25, np.nan), "too many": lambda: Copies(5)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_events_are_named(name):
    with pytest.raises(InputError, match="event|must be a number|outside"):
        run_policy(flat(), Recorder(flat()), k=1, events=[WRONG[name]()])


def test_wrong_runs_and_tables_are_named():
    always = {"a": lambda *_: Always([0])}
    for wrong, text in ((dict(steps=0), "a step or more"), (dict(steps=-5), "a step or more"), (dict(seeds=[3, 3]), "come twice"),
                        (dict(seeds=[-1]), "from 0 on"), (dict(last=0.0), "share of the run"),
                        (dict(policies={"a": Always([0])}), "must be a function")):
        with pytest.raises(InputError, match=text):
            simulate(flat(), **({"policies": always, "seeds": 1, "k": 1} | wrong))
    for wrong, text in ((dict(topics=[0, -1]), "topics"), (dict(topics=[0.5, 1]), "topics"), (dict(embeddings=[[np.nan], [1]]), "finite")):
        with pytest.raises(InputError, match=text):
            Subnet([[0.1], [0.2]], **wrong)
    with pytest.raises(InputError, match="a prompt at least"):
        Subnet(np.zeros((0, 3)))
    with pytest.raises(InputError, match="two embeddings"):
        Subnet([[0.1], [0.2]], embeddings=np.eye(2), prompts=["x", "x"]).encoder()
    assert Subnet([[0.1], [0.2]], prompts=np.array(["x", "y"]), names=np.array(["z"])).prompts == ["x", "y"]
    unsure = Always([0])
    unsure.choose = lambda *_: Selection(torch.tensor([0]), torch.zeros(1))
    with pytest.raises(InputError, match="propensities"):
        run_policy(flat(), unsure, k=1)


def test_rewards_are_told_as_they_are_and_grades_are_cut():
    high = dict(rewards=[[1.2, 1.4, -0.3]] * 6)
    subnet = Subnet([[0.5, 1.6, -0.2]] * 6, **high)
    for events in ([], [Noise(0.0)], [Delay(0)]):
        run = run_policy(subnet, Always([0, 1, 2]), k=3, events=events)
        assert np.allclose(run.told, [1.2, 1.4, -0.3]) and np.allclose(run.grades, [0.5, 1, 0])
    assert run_policy(subnet, Always([0]), k=1, events=[Noise(0.0, cut=True)]).told.max() == 1
    for grades in (Subnet(subnet.grades), Subnet(subnet.grades, subnet.grades.copy())):
        run = run_policy(grades, Always([0, 1, 2]), k=3)
        assert np.allclose(run.told, [0.5, 1, 0]), "rewards that are grades are cut as these"
    drifted = run_policy(Subnet(subnet.grades, **high), Always([0, 1]), k=2, events=[Drift(0.9)])
    assert drifted.told.max() > 1 and drifted.grades.max() <= 1


class Last:
    "Scores alone: the last reward of each uid, in a tensor that learning changes."

    def __init__(self, n):
        self.w, self.calls = torch.zeros(n), 0

    def scores(self, prompt):
        self.calls += 1
        return self.w

    def learn(self, prompt, uids, rewards):
        self.w[uids] = rewards

    def resync(self, before, now):
        "Nothing moves here."


class Tries(Last):
    "The same with a choice of its own."

    def choose(self, prompt, k, available):
        return select(self.w, k, epsilon=0.0)


class Keeps(Tries):
    "The same with scores that it keeps."

    def __init__(self, n):
        self.w = self.scores = torch.zeros(n)


@pytest.mark.parametrize("kind, calls", [(Last, 1), (Tries, 1), (Keeps, 0)])
def test_the_log_holds_the_scores_of_the_choice(kind, calls):
    policy = kind(4)
    run = run_policy(flat(), policy, k=4)
    assert (run.scores[0] == 0).all() and np.allclose(run.scores[1:], np.arange(4) / 10), "as they were before it learned"
    assert getattr(policy, "calls", 0) == calls * 40


def test_randomized_scores_are_drawn_once():
    class Dice(Last):
        def scores(self, prompt):
            self.calls += 1
            return np.random.default_rng(self.calls).random(4)

    run = run_policy(flat(), Dice(4), k=2)
    best = run.scores.argsort(1)[:, ::-1][:, :2]
    assert (best == run.uids).all(1).mean() > 0.95, "what was chosen by is what is logged"
    assert run.scores[0].tolist() == np.random.default_rng(1).random(4).tolist()


def test_policies_of_the_package_log_what_they_choose_by():
    x = torch.eye(8).repeat(5, 1)
    subnet = Subnet(np.random.default_rng(0).random((40, 6)), embeddings=x.numpy())
    bandit = lambda kind, **more: kind(subnet.metagraph, subnet.encoder(), **more)
    made = {"fixed": BestFixed(subnet.metagraph, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), "nearest": bandit(NearestAnswers, steps=20),
            "mean": MeanPerUid(subnet.metagraph), "LinTS": LinTS(subnet.metagraph, subnet.encoder(), x)}
    for name, policy in made.items():
        run = run_policy(subnet, policy, k=2)
        assert np.isfinite(run.scores).all() and run.scores[-1].std() > 0.01, name
    with pytest.raises(InputError, match="one for each of 4 uids"):
        run_policy(flat(), type("Few", (Tries,), {"scores": lambda self, prompt: [0.5]})(4), k=1)


def test_a_gate_asks_for_distinct_answers():
    subnet = made_up(uids=12, topics=2, prompts=80)
    subnet.grades[:, :6] = 0.9
    given = dict(seeds=2, k=4, events=[Copies(range(6))])
    plain, apart = (lambda subnet, seed, d=d: GatePolicy(subnet, seed, Policy(distinct=d)) for d in (False, True))
    audited = lambda subnet, seed: AuditedPolicy(apart(subnet, seed), subnet)
    found = simulate(subnet, {"plain": plain, "apart": apart, "audited": audited}, **given)
    late = lambda name: np.mean([run.distinct[-30:].mean() for run in found.runs[name]])
    assert late("plain") < 2.5 and late("apart") == late("audited") == 4
    run = found.runs["apart"][0]
    copies = run.uids[-30:] < 6
    assert (copies.sum(1) <= 1).all() and (run.propensities[-30:][copies] <= 1 / 6 + 0.02).all(), "the log says that one was drawn"
    with pytest.raises(InputError, match="give copies and hotkeys"):
        Policy(distinct=True).choose(torch.zeros(4), torch.ones(4), range(4), [], 0, torch.Generator())


def test_a_gate_that_forgets_explores_less_widely(monkeypatch):
    "In the simulator, as in a validator: as wide as the benchmark measures it."
    from prompting_nb.validators import validator as module

    seen = []
    choose = module.thompson
    monkeypatch.setattr(module, "thompson", lambda *given, **more: seen.append(more["width"]) or choose(*given, **more))
    subnet = made_up(uids=4, topics=2, prompts=12)
    for half_life, wanted in ((0.0, (1.3, 0.65)), (1500.0, (1.0, 0.3))):
        policy = GatePolicy(subnet, config={"gating.half_life": half_life})
        policy.choose(subnet.prompts[0], 2, range(4))
        policy.steps = 10**9
        policy.choose(subnet.prompts[0], 2, range(4))
        assert tuple(seen[-2:]) == wanted
    given = GatePolicy(subnet, policy=Policy(width=2.0, least=0.9), config={"gating.half_life": 9.0})
    assert given.policy.widths(given.gate) == (2.0, 0.9), "what is given counts"


def test_a_time_is_a_whole_number_or_a_fraction():
    for at, step in ((np.float32(0.5), 20), (0.5, 20), (np.float64(0.25), 10), (np.int64(7), 7), (7, 7)):
        run = run_policy(flat(spare=1), Always([0]), k=1, events=[Replace([2], at, silent=True)])
        assert (run.grades[:step, 2] == 0.2).all() and (run.grades[step:, 2] == 0.4).all(), at
    for at in ("half", None, np.float32("nan")):
        with pytest.raises(InputError, match="an event"):
            run_policy(flat(spare=1), Always([0]), k=1, events=[Replace([2], at)])
    assert len(simulate(flat(), {"a": lambda *_: Always([0])}, np.int64(2), k=1).runs["a"]) == 2
