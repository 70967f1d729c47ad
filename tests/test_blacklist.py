"""Rules about callers: what each refuses, with which words, and what a rule that fails or answers nonsense leads to."""

import asyncio
from types import SimpleNamespace

import pytest
from bittensor.sp_core import ss58_decode, ss58_encode

from prompting_nb.baseminer.blacklist import (
    Caller,
    RateLimiter,
    RequestLog,
    TooOften,
    Verdict,
    as_verdict,
    blacklist,
    find_caller,
    index_callers,
    judge,
    minimum_stake,
    rate_limit,
    registration,
    standard_rules,
    validator_permit,
    whitelist,
)
from prompting_nb.baseminer.flags import BlacklistSettings
from prompting_nb.baseminer.priority import StakePriority
from prompting_nb.config import InputError
from prompting_nb.network.chain import make_wallet

KEYS = {name: make_wallet(name).hotkey.ss58_address for name in ("stranger", "member", "white", "black")}
STRANGER, MEMBER = Caller(KEYS["stranger"]), Caller(KEYS["member"], 3, 10.0, True)
ELSEWHERE = ss58_encode(ss58_decode(MEMBER.hotkey), 0)  # the same key on another network


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def exactly(verdict, blacklisted, reason):
    assert verdict.blacklisted is blacklisted and verdict.reason == reason and bool(verdict) is blacklisted


def test_each_rule_refuses_in_its_own_words():
    exactly(whitelist([MEMBER.hotkey])(MEMBER), False, "hotkey is whitelisted")
    exactly(blacklist([MEMBER.hotkey])(MEMBER), True, "hotkey is blacklisted")
    exactly(registration()(STRANGER), True, "hotkey is not registered")
    exactly(validator_permit()(STRANGER), True, "hotkey has no validator permit")
    exactly(minimum_stake(10.5)(MEMBER), True, "stake 10 is below the required 10.5")
    admitted = [whitelist([STRANGER.hotkey]), blacklist(STRANGER.hotkey), registration(), registration(True), validator_permit(),
                validator_permit(False), minimum_stake(10.0), whitelist(None)]  # fmt: skip
    assert [rule(MEMBER) for rule in admitted] == [None] * len(admitted)
    assert registration(True)(STRANGER) is None and validator_permit(False)(STRANGER) is None
    assert whitelist(MEMBER.hotkey)(Caller(MEMBER.hotkey[:-1])) is None  # a string is one hotkey and no set of letters


def test_a_rule_may_be_a_coroutine_function_and_those_after_it_are_asked(caplog):
    asked = []

    def opinion(result, name="plain"):
        def rule(caller):
            asked.append(name)
            if isinstance(result, Exception):
                raise result
            return result

        return rule

    def later(result, name="later"):
        async def rule(caller):
            await asyncio.sleep(0)
            return opinion(result, name)(caller)

        return rule

    refused, fails = Verdict(True, "no"), ValueError("why")
    for rules, blacklisted, reason, names in (
        ([later(None), opinion(refused)], True, "no", ["later", "plain"]),
        ([later(None), later(None), opinion(None)], False, "admitted", ["later", "later", "plain"]),
        ([opinion(None), later(refused), opinion(None)], True, "no", ["plain", "later"]),
        ([later(False), opinion(refused)], False, "admitted", ["later"]),
        ([later((True, 7))], True, "7", ["later"]),
        ([later(1)], True, "a rule of this miner returned int instead of a decision", ["later"]),
        ([later(fails), opinion(None)], True, "a rule of this miner failed", ["later"]),
        ([later(None), opinion(fails)], True, "a rule of this miner failed", ["later", "plain"]),
        ([later(None), later(fails)], True, "a rule of this miner failed", ["later", "later"]),
    ):
        asked.clear(), caplog.clear()
        exactly(asyncio.run(judge(iter(rules), MEMBER)), blacklisted, reason)
        assert asked == names and len(caplog.records) == (reason == "a rule of this miner failed")
    exactly(judge([opinion(refused), later(None)], MEMBER), True, "no")  # nothing to wait for


def test_a_key_is_the_same_whatever_its_prefix():
    for rule in (whitelist, blacklist):
        for listed in (MEMBER.hotkey, ELSEWHERE, f"\t{MEMBER.hotkey}\n"):
            heard = [rule([listed])(MEMBER), rule(listed)(Caller(ELSEWHERE)), rule(listed)(STRANGER)]
            assert [verdict is not None for verdict in heard] == [True, True, False]
    limiter = RateLimiter(1, 10.0, Clock())
    assert limiter.admit(MEMBER.hotkey) and not limiter.admit(ELSEWHERE) and limiter.retry_after(ELSEWHERE) == 10.0
    rule = rate_limit(RateLimiter(2, 10.0, Clock()))
    assert [rule(Caller(key)) is None for key in (MEMBER.hotkey, ELSEWHERE, MEMBER.hotkey)] == [True, True, False]
    callers = index_callers(SimpleNamespace(hotkeys=[ELSEWHERE]))
    found = find_caller(SimpleNamespace(dendrite=SimpleNamespace(hotkey=MEMBER.hotkey)), callers)
    assert callers == {MEMBER.hotkey: Caller(MEMBER.hotkey, 0)} and found.uid == 0
    assert find_caller(SimpleNamespace(dendrite=SimpleNamespace(hotkey=ELSEWHERE)), {MEMBER.hotkey: MEMBER}) is MEMBER
    clock = Clock()
    priority = StakePriority(clock=clock)
    priority(MEMBER)
    clock.now += 30
    assert priority(Caller(ELSEWHERE, 3, 10.0)) > 10.0  # it was heard before


@pytest.mark.parametrize("wrong", ["", " ", "member", KEYS["member"][:-1], KEYS["member"].lower(), f"0x{'00' * 32}",
                                   f"{KEYS['member']} {KEYS['white']}", f"{KEYS['member']},{KEYS['white']}", "\ud800"])  # fmt: skip
def test_an_entry_that_is_no_address_is_refused(wrong):
    for make in (lambda: whitelist([KEYS["white"], wrong]), lambda: blacklist(wrong)):
        with pytest.raises(InputError, match="the (white|black)list: .* is no ss58 address: .*; give whole ss58 addresses"):
            make()
    for name in ("whitelist", "blacklist"):
        with pytest.raises(InputError, match=f"--miner.blacklist.{name}: "):
            BlacklistSettings(**{name: [wrong]})
    for entry in (7, None, b"x", make_wallet("member").hotkey):
        with pytest.raises(InputError):
            blacklist([entry])


def test_settings_hold_the_hotkeys_as_the_metagraph_writes_them():
    settings = BlacklistSettings(whitelist=[f" {ELSEWHERE} "], blacklist=[])
    assert settings.whitelist == [MEMBER.hotkey] and settings.blacklist == []


def test_the_rate_limit_counts_each_hotkey_and_says_when_to_come_back():
    clock = Clock()
    rule = rate_limit(RateLimiter(2, 10.0, clock))
    other = Caller("other", 1)
    assert rule(MEMBER) is None and rule(other) is None
    clock.now += 4
    assert rule(MEMBER) is None
    clock.now += 5.75
    refused = rule(MEMBER)
    assert isinstance(refused, TooOften) and refused.retry_after == 0.25
    exactly(refused, True, "more than 2 requests within 10 seconds")
    assert rule(other) is None and rule(other).retry_after == 0.25
    clock.now += 0.25
    assert rule(MEMBER) is None


def test_when_to_come_back():
    clock = Clock()
    limiter = RateLimiter(1, 0.5, clock)
    assert limiter.retry_after("a") == 0.0
    assert limiter.admit("a") and limiter.retry_after("a") == 0.5
    clock.now += 2
    assert limiter.retry_after("a") == 0.0
    for quota, window in ((0, 1.0), (1, 0.0), (1, -1.0), (1, float("nan"))):
        with pytest.raises(ValueError, match="quota >= 1 and window > 0, not"):
            RateLimiter(quota, window)


def test_memory_is_bounded_for_each_caller_and_overall():
    log = RequestLog(2, max_callers=3)
    for now in range(5):
        log.add("a", now)
    assert list(log.times("a")) == [3, 4] and log.times("b") == ()
    for name in ("b", "c"):
        log.add(name, 5)
    log.add("a", 6)
    log.add("d", 7)  # too many: the one that was quiet for longest is dropped
    assert len(log) == 3 and log.times("b") == () and list(log.times("a")) == [4, 6]
    assert RequestLog(1).max_callers == RateLimiter(1, 1.0).log.max_callers == 8192
    assert RateLimiter(7, 1.0, max_callers=5).log.length == 7
    with pytest.raises(TypeError):
        RequestLog(2.5)


def test_a_caller_that_is_refused_is_not_silent():
    limiter = RateLimiter(1, 60.0, Clock(), max_callers=2)
    assert limiter.admit("busy") and limiter.admit("b") and not limiter.admit("busy")
    assert limiter.admit("c") and not limiter.admit("busy") and limiter.admit("b")  # it was "b" that was forgotten


@pytest.mark.parametrize("result, blacklisted, reason", [
    (True, True, "refused by a rule of this miner"), (False, False, "admitted"), ((True, "too loud"), True, "too loud"),
    ((False, 7), False, "7"), (Verdict(True, "as it is"), True, "as it is"),
    (None, True, "a rule of this miner returned NoneType instead of a decision"),
    (1, True, "a rule of this miner returned int instead of a decision"),
    ((1, "x"), True, "a rule of this miner returned tuple instead of a decision"),
    ((True, "a", "b"), True, "a rule of this miner returned tuple instead of a decision"),
])  # fmt: skip
def test_what_a_rule_may_return(result, blacklisted, reason):
    exactly(as_verdict(result), blacklisted, reason)
    if result is not None:
        exactly(judge([lambda caller: None, lambda caller: result], MEMBER), blacklisted, reason)


def test_the_first_rule_with_a_verdict_decides():
    exactly(judge([], MEMBER), False, "admitted")
    exactly(judge([blacklist([MEMBER.hotkey])], None), True, "the request names no hotkey")
    exactly(judge([whitelist([MEMBER.hotkey]), blacklist([MEMBER.hotkey])], MEMBER), False, "hotkey is whitelisted")
    exactly(judge([blacklist([MEMBER.hotkey]), whitelist([MEMBER.hotkey])], MEMBER), True, "hotkey is blacklisted")


def test_a_rule_that_fails_refuses_and_is_logged(caplog):
    exactly(judge([lambda caller: 1 / 0], MEMBER), True, "a rule of this miner failed")
    record, = caplog.records
    assert record.getMessage() == f"a blacklist rule failed for {MEMBER.hotkey}, which is therefore refused"
    assert record.exc_info[0] is ZeroDivisionError
    with pytest.raises(KeyboardInterrupt):
        judge([lambda caller: (_ for _ in ()).throw(KeyboardInterrupt)], MEMBER)


def test_who_sent_a_request():
    callers = {"member": MEMBER}
    of = lambda hotkey: find_caller(SimpleNamespace(dendrite=SimpleNamespace(hotkey=hotkey)), callers)
    assert of("member") is MEMBER and of("stranger") == Caller("stranger") and not of("stranger").registered
    assert [of(nobody) for nobody in (None, "", 7, b"member")] == [None] * 4
    assert find_caller(SimpleNamespace(), callers) is find_caller(SimpleNamespace(dendrite=None), callers) is None


def test_callers_of_either_kind_of_metagraph():
    neuron = SimpleNamespace(hotkey="a", uid=5, total_stake=SimpleNamespace(amount=2.5), validator_permit=1)
    assert index_callers(SimpleNamespace(neurons=[neuron])) == {"a": Caller("a", 5, 2.5, True)}
    assert index_callers(SimpleNamespace(hotkeys=["a", "b"])) == {"a": Caller("a", 0), "b": Caller("b", 1)}
    full = SimpleNamespace(hotkeys=["a", "b"], uids=[4, 7], S=[1, 2], validator_permit=[0, 1])
    assert index_callers(full) == {"a": Caller("a", 4, 1.0, False), "b": Caller("b", 7, 2.0, True)}


def test_the_standard_rules_stand_in_the_documented_order():
    clock = Clock()
    settings = SimpleNamespace(whitelist=[KEYS["white"]], blacklist=[KEYS["white"], KEYS["black"]], allow_non_registered=False,
                               force_validator_permit=True, minimum_stake_requirement=5.0, quota=1, window=9.0)  # fmt: skip
    rules = standard_rules(settings, clock)
    said = lambda caller: judge(rules, caller).reason
    assert said(Caller(KEYS["white"])) == "hotkey is whitelisted"
    assert said(Caller(KEYS["black"])) == "hotkey is blacklisted"
    assert said(Caller("x")) == "hotkey is not registered"
    assert said(Caller("x", 1)) == "hotkey has no validator permit"
    assert said(Caller("x", 1, 4.0, True)) == "stake 4 is below the required 5"
    assert [said(Caller("x", 1, 5.0, True)) for _ in range(2)] == ["admitted", "more than 1 request within 9 seconds"]
    clock.now += 9
    assert said(Caller("x", 1, 5.0, True)) == "admitted"
    settings.quota = 0
    assert len(standard_rules(settings)) == 5
