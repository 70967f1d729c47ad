"A validator as a service: killed, without miners, without a chain, on a full disk; and the processes of a subnet."

import asyncio
import fcntl
import http.client
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bittensor as bt
import pytest
import torch

from conftest import alive
from prompting_nb.baseminer.miners import OpenAISettings, UpstreamError
from prompting_nb.baseminer.subnet import open_client
from prompting_nb.config import InputError
from prompting_nb.loop.ask import ask_parser, post_prompt, run_ask
from prompting_nb.loop.endpoint import Endpoint, status_of
from prompting_nb.loop.follow import Follower
from prompting_nb.loop import journal as journal_module
from prompting_nb.loop.journal import Journal
from prompting_nb.loop.judging import OwnJudge, server_judge
from prompting_nb.loop.network import Network, WorkerMiner
from prompting_nb.loop.processes import is_locked, lock_folder
from prompting_nb.loop.service import ChainWatch, NotReady, Service, ServiceSettings
from prompting_nb.loop.state import first_needed, read_about, resume
from prompting_nb.loop.tasks import Worker
from prompting_nb.network.chain_server import read_token
from prompting_nb.network.command import find_chain
from prompting_nb.network.wallets import local_wallet
from prompting_nb.reward.pairwise import PairwiseJudge
from prompting_nb.validators.audits import Audits
from prompting_nb.validators.copies import Copies
from prompting_nb.validators.event import Event
from prompting_nb.validators.judge import Judge, JudgeError, reward_answers
from prompting_nb.validators.pending import later
from prompting_nb.validators.validator import BatchError, FirstUids, Policy, Validator, default_gate
from prompting_nb.validators.watch import Watch

ANSWERS = {"brief": "No.", "wordy": "Well, " * 9 + "yes.", "polite": "Yes, please do.", "odd": "Perhaps, or not."}
PROMPTS = [f"Is {n} a number?" for n in range(7)]
SECONDS = 300.0  # that anything may take


def by_length(prompt, completions):
    return torch.tensor([min(len(text or "") / 60, 1.0) for text in completions])


def workers():
    return [Worker(name, lambda _, text=text: text) for name, text in ANSWERS.items()]


def until(done, what="it"):
    deadline = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < deadline, f"{what} did not happen within {SECONDS:g} s"
        time.sleep(0.02)


def events(folder):
    return list(Journal(folder).read())


@pytest.fixture
def network():
    with Network(workers()) as network:
        yield network


def service_of(network, folder, judge=by_length, k=2, prompts=PROMPTS, **settings):
    validator = Validator(network.wallet, network.client, judge, policy=Policy(k=k, timeout=30))
    settings = {"interval": 0, "poll_interval": 0.05, "save_every": 4, "no_set_weights": True} | settings
    return Service(validator, folder, prompts, ServiceSettings(**settings))


def test_a_service_goes_on_as_if_it_had_not_been_stopped(network, tmp_path):
    with service_of(network, tmp_path / "whole", steps=30) as whole:
        assert whole.join(SECONDS)
    for steps in (7, 8, 19, 30):
        with service_of(network, tmp_path / "parts", steps=steps) as part:
            assert part.join(SECONDS)
    one, other = events(tmp_path / "whole"), events(tmp_path / "parts")
    assert [e["step"] for e in other] == list(range(30))
    for key in ("prompt", "uids", "rewards", "scores", "propensities"):
        assert [e[key] for e in one] == [e[key] for e in other], key
    assert whole.validator.averages.values == part.validator.averages.values


def test_prompts_at_the_same_time(network, tmp_path):
    with service_of(network, tmp_path, concurrent=3, steps=24) as service:
        assert service.join(SECONDS)
    found = events(tmp_path)
    assert [e["step"] for e in found] == list(range(24))
    assert sorted(e["prompt"] for e in found) == sorted(PROMPTS[n % 7] for n in range(24))


def test_averages_equal_what_the_events_say(network, tmp_path):
    with service_of(network, tmp_path, steps=12) as service:
        assert service.join(SECONDS)
    assert averages_of(tmp_path) == service.validator.averages.values


def test_a_judge_that_gives_nan_costs_its_step_only(network, tmp_path, caplog):
    def judge(prompt, completions):
        return by_length(prompt, completions) * (float("nan") if "3" in prompt else 1.0)

    with service_of(network, tmp_path, judge, steps=12) as service:
        assert service.join(SECONDS)
    found = events(tmp_path)
    assert [e["step"] for e in found] == list(range(12)) and not any("3" in e["prompt"] for e in found)
    assert "a step failed and is left out" in caplog.text


class Panic(BaseException):
    "As that of Rust, which is no `Exception`."


RAISED = {"an error of the judge": ValueError("400: maximum context length"), "an error like one of the network": OSError("HTTP 400"),
          "no exception": Panic("index out of bounds")}


@pytest.mark.parametrize("error", RAISED.values(), ids=RAISED)
def test_an_answer_that_the_judge_refuses_fails_alone(tmp_path, caplog, error):
    """It earns nothing, the others of its round what they are worth, and no step is lost.

    Or one such answer would end all learning: a newcomer that was never rewarded is asked first for ever.
    """
    def judge(prompt, completions):
        if "BAD" in completions:
            raise error
        return by_length(prompt, completions)

    with Network([*workers(), Worker("bad", lambda _: "BAD")]) as network:
        with service_of(network, tmp_path, judge, k=3, steps=20) as service:
            assert service.join(SECONDS) and not service.problems()
        refused = sum("BAD" in e["completions"] for e in events(tmp_path))
        assert [e["step"] for e in events(tmp_path)] == list(range(20)) and service.validator.refused == refused > 0
    error.__traceback__ = None  # which holds the whole service
    for event in events(tmp_path):
        for text, reward in zip(event["completions"], event["rewards"]):
            assert reward == (0.0 if text == "BAD" else pytest.approx(min(len(text) / 60, 1.0), rel=1e-4))
    said = f"no reward for the answers of uids [5], which count as failed: the judge failed: {type(error).__name__}: {error}; "
    assert f"{said}so far the judge could not take 1 answer" in caplog.text


def comparing(bad):
    "Make a judge that has something to do for two answers and more only, as one that compares."
    def judge(prompt, completions):
        given = [text for text in completions if text]
        if len(given) > 1 and any(text in bad for text in given):
            raise RuntimeError("too long to compare")
        return [0.5 if text else 0.0 for text in completions]

    return judge


@pytest.mark.parametrize("answers", [["a", "X"], ["a", "X", "Y"], ["X", "Y"], ["X"], ["X", None, "a", "b", "Y"], ["a"] * 20 + ["X"]])
def test_all_answers_at_fault_are_found(answers):
    bad = {"X", "Y"}
    for judge in (comparing(bad), lambda prompt, texts: [float("nan") if text in bad else 0.5 * bool(text) for text in texts]):
        found = reward_answers(judge, "x", answers, ["5"] * len(answers))
        if len(answers) > 1 or judge("x", answers) != [0.5]:
            assert found.rewards == [0.5 if text and text not in bad else 0.0 for text in answers]
            assert found.refused == [i for i, text in enumerate(answers) if text in bad] and "the judge failed" in found.why


def with_a_limit(prompt, texts, most=100):
    "A judge that reads so much at once and no more, as any language model."
    if sum(len(text or "") for text in texts) > most:
        raise ValueError("context length exceeded")
    return [len(text or "") / most for text in texts]


@pytest.mark.parametrize("lengths, refused", [
    ([60, 61, 18], [1]), ([61, 60, 18], [0]), ([80, 31], [0]), ([80, 31, 32], [0]), ([70, 101, 80, 5], [1, 2]), ([200, 150], [0, 1]),
    ([40] * 5, [2, 3, 4]), ([50, 50, 0, 1], [1])])
def test_answers_that_fail_only_together_cost_no_step(lengths, refused):
    calls = []

    def judge(prompt, texts):
        calls.append(texts)
        return with_a_limit(prompt, texts)

    found = reward_answers(judge, "x", ["a" * n for n in lengths], ["5"] * len(lengths))
    assert found.rewards == [0 if i in refused else n / 100 for i, n in enumerate(lengths)] and found.refused == refused
    assert "context length exceeded" in found.why and len(calls) <= 4 * len(lengths) + 8


def test_an_answer_that_spoils_all_others_is_refused():
    "It passes beside the plain answers, and comes first, since it is short."
    def judge(prompt, texts):
        if "!" in texts and any(text not in (None, "!", "Yes.", "I do not know.") for text in texts):
            raise ValueError("no verdict")
        return [0.5 if text else 0.0 for text in texts]

    found = reward_answers(judge, "x", ["one", "!", "three", "four"], ["5"] * 4)
    assert found[:2] == ([0.5, 0.0, 0.5, 0.5], [1])


@pytest.mark.parametrize("answers, rewards", [(["a", "BAD"], [0.5, 0.0]), (["a", None], [0.5, 0.0]), ([None, None], [0.0, 0.0])])
def test_a_judge_that_takes_no_single_answer_judges_it_beside_a_plain_one(answers, rewards):
    def judge(prompt, texts):
        given = [text for text in texts if text]
        if len(given) < 2 or "BAD" in given:
            raise ValueError("nothing to compare")
        return [0.5 if text else 0.0 for text in texts]

    assert reward_answers(judge, "x", answers, ["5", "6"]).rewards == rewards


def test_an_error_whose_message_fails_is_an_error_of_the_judge():
    class Unspeakable(Exception):
        def __str__(self):
            raise self

    def judge(prompt, texts):
        raise Unspeakable

    with pytest.raises(JudgeError, match="^the judge failed: Unspeakable, whose message cannot be shown$"):
        reward_answers(judge, "x", ["a", "b"], ["5", "6"])


def test_a_judge_that_fails_for_a_moment_refuses_nobody():
    calls = []

    def judge(prompt, completions):
        calls.append(completions)
        if len(calls) == 1:
            raise TimeoutError
        return [1.0 for _ in completions]

    assert reward_answers(judge, "x", ["a", "b"], ["5", "6"]) == ([1.0, 1.0], [], "") and len(calls) == 2


def test_a_judge_that_goes_away_while_answers_are_tried_refuses_nobody():
    calls = []

    def judge(prompt, completions):
        calls.append(completions)
        if len(calls) != 3:  # it is there for the plain answers, and then no more
            raise ConnectionResetError("no server")
        return [1.0 for _ in completions]

    with pytest.raises(JudgeError, match="no server"):
        reward_answers(judge, "x", ["a", "b"], ["5", "6"])
    assert len(calls) == 7


def away_or_refusing(away, error=None):
    "Make the `ask` of a pairwise judge whose server takes no long question, and may be away."
    def ask(messages):
        if away():
            raise error or ConnectionResetError("gone")
        if len(messages[0]["content"]) > 5000:
            raise ValueError("400: too long")
        return "[[A]]"

    return ask


@pytest.mark.parametrize("error", [ConnectionRefusedError("gone"), ConnectionResetError("gone"), UpstreamError("gone", away=True)])
def test_a_judge_that_is_away_is_not_hidden_by_its_cache(error):
    "The plain answers were judged once, beside an answer that was too long."
    away = threading.Event()
    judge = Judge(PairwiseJudge(away_or_refusing(away.is_set, error)))
    given = "Is it?", ["Yes, it is.", "No.", "x" * 9000], ["5", "6", "7"]
    assert reward_answers(judge, *given) == ([0.5, 0.5, 0.0], [2], "the judge failed: ValueError: 400: too long")
    away.set()
    with pytest.raises(JudgeError, match="gone"):
        reward_answers(judge, "Is it?", ["Yes indeed.", "Nope.", "Maybe."], ["5", "6", "7"])


def test_a_judge_that_is_there_for_the_plain_answers_only_refuses_nobody():
    questions = []
    judge = Judge(PairwiseJudge(away_or_refusing(lambda: questions.append(1) or len(questions) not in (3, 4))))
    with pytest.raises(JudgeError, match="gone"):
        reward_answers(judge, "Is it?", ["Yes indeed.", "Nope.", "Maybe."], ["5", "6", "7"])
    assert len(questions) > 4


@pytest.mark.parametrize("left", [2, 19])
def test_a_budget_that_is_spent_refuses_nobody(left):
    judge = PairwiseJudge(away_or_refusing(lambda: False), budget=left)
    with pytest.raises(JudgeError, match="20 questions needed, "):
        reward_answers(Judge(judge), "Is it?", list("abcde"), list("56789"))
    assert judge.counts.questions == 0


def test_what_no_answer_can_bring_about_refuses_nobody():
    def wrapped(prompt, texts):
        calls.append(texts)
        try:
            raise ConnectionRefusedError("no server")
        except OSError as error:
            raise RuntimeError("cannot judge") from error

    calls = []
    with pytest.raises(JudgeError, match="cannot judge"):
        reward_answers(wrapped, "x", ["a", "b"], ["5", "6"])
    assert len(calls) == 2


@pytest.mark.parametrize("wrong", [lambda p, c: [1.0], lambda p, c: None, lambda p, c: [1e39] * len(c), lambda p, c: [2e6] * len(c),
                                   lambda p, c: ["x"] * len(c)])
def test_a_judge_that_cannot_judge_is_an_error_of_its_own(wrong):
    with pytest.raises(JudgeError, match="the judge failed: (InputError|TypeError|ValueError): "):
        reward_answers(wrong, "x", ["a", "b"], ["5", "6"])


def test_a_judge_that_is_away_is_a_problem_and_other_uids_are_asked(network, tmp_path, caplog):
    "The uids follow from the number of the step: were a step that is left out not counted, the same would be asked for ever."
    asked, away = [], threading.Event()

    def judge(prompt, completions):
        if away.is_set():
            asked.append((prompt, tuple(completions)))
            raise ConnectionRefusedError("no server")
        return by_length(prompt, completions)

    with service_of(network, tmp_path, judge, k=1, prompts=["Is it?", "Is it not?"]) as service:
        service.validator.policy = Policy(k=1, timeout=30, rule="epsilon", explore=1.0, explore_end=1.0, welcome=0)
        away.set()
        until(lambda: len(service.problems()) == 1)
        (problem,) = service.problems()
        assert re.fullmatch(r"\d\d+ steps in a row were left out: the judge failed: ConnectionRefusedError: no server", problem)
        answers = {texts for prompt, texts in asked if set(texts) <= set(ANSWERS.values())}
        assert len({prompt for prompt, _ in asked}) == 2 and len(answers) > 1
        assert service.metrics.registry.get_sample_value("validator_failed_steps_total", {"reason": "ConnectionRefusedError"}) >= 10
        away.clear()
        until(lambda: not service.problems())
    with service_of(network, tmp_path, judge, k=1) as again:
        assert again._left_out == service._left_out >= 10


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), NotReady("the subnet is closed")], ids=["no file", "not ready"])
def test_that_no_step_can_be_taken_is_a_problem(network, tmp_path, monkeypatch, error):
    "The same prompt is asked again for ever, which no number of left-out steps tells."
    with service_of(network, tmp_path) as service:
        ask, broken = service.validator.ask, threading.Event()

        def failing(round):
            if broken.is_set():
                raise error
            ask(round)

        monkeypatch.setattr(service.validator, "ask", failing)
        broken.set()
        until(service.problems)
        (problem,) = service.problems()
        assert re.fullmatch(rf"\d\d+ steps in a row could not be taken: (OSError: )?{re.escape(str(error))}", problem)
        assert service._left_out == 0
        broken.clear()
        until(lambda: not service.problems())
        error.__traceback__ = None  # which holds the whole service
    found = events(tmp_path)
    assert [e["prompt"] for e in found] == [PROMPTS[n % 7] for n in range(len(found))]


def test_a_step_that_hangs_is_a_problem_until_it_ends(network, tmp_path):
    hangs, held, over = threading.Event(), threading.Event(), threading.Event()

    def judge(prompt, completions):
        if hangs.is_set():
            held.set()
            over.wait(SECONDS)
        return by_length(prompt, completions)

    with service_of(network, tmp_path, judge) as service:
        service.validator.policy = Policy(k=2, timeout=0.5)
        service.settings.patience = 0.5
        hangs.set()
        assert held.wait(SECONDS)  # a step before it may have been slow, and over by now
        until(service.problems)
        (problem,) = service.problems()
        said = r"a step is under way for \d+ s, of which its miners have 0.5 s: the judge or the gate hangs, or takes too long"
        assert re.fullmatch(said, problem)
        hangs.clear()
        over.set()
        until(lambda: not service.problems())


def test_no_two_steps_draw_with_one_ticket(network, tmp_path, monkeypatch):
    "Chance follows from the number of steps that were taken, are under way or were left out: it must never stand still."
    tickets = []
    drawn = SimpleNamespace(Random=lambda ticket: tickets.append(ticket) or random.Random(ticket))
    monkeypatch.setattr("prompting_nb.loop.service.random", drawn)

    def judge(prompt, completions):
        if "3" in prompt:
            raise ValueError("odd")
        return by_length(prompt, completions)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with service_of(network, tmp_path, judge, concurrent=8, steps=60) as service:
            assert service.join(SECONDS)
    finally:
        sys.setswitchinterval(interval)
    assert len(tickets) == len(set(tickets)) >= 60


def test_a_ticket_that_was_given_back_is_drawn_again_and_no_other(network, tmp_path, monkeypatch):
    tickets, go = [], {prompt: threading.Event() for prompt in "ABCD"}
    drawn = SimpleNamespace(Random=lambda ticket: tickets.append(ticket) or random.Random(ticket))
    monkeypatch.setattr("prompting_nb.loop.service.random", drawn)
    service = service_of(network, tmp_path, prompts=None)
    ask = service.validator.ask

    def waiting(round):
        assert go[round.prompt].wait(SECONDS)
        if round.prompt == "B":
            raise OSError(24, "Too many open files")
        ask(round)

    def step(prompt):
        with suppress(OSError):
            service.step(prompt)

    monkeypatch.setattr(service.validator, "ask", waiting)
    steps = {prompt: threading.Thread(target=step, args=(prompt,), daemon=True) for prompt in "ABCD"}
    with service:
        for number, prompt in enumerate("ABC", 1):
            steps[prompt].start()
            until(lambda: len(tickets) == number)
        for prompt in ("B", "C"):  # C ends before A, and keeps its ticket to itself
            go[prompt].set()
            steps[prompt].join(SECONDS)
        steps["D"].start()
        until(lambda: len(tickets) == 4)
        service.route("E")  # which asks nobody, as D's would be asked after a stop
        for prompt in "AD":
            go[prompt].set()
            steps[prompt].join(SECONDS)
    assert tickets == ["0-0", "0-1", "0-2", "0-1", "0-3"]


def test_who_was_asked_in_vain_is_no_newcomer_until_the_judge_works_again(network):
    away = [True]

    def judge(prompt, completions):
        if away:
            raise ValueError("away")
        return by_length(prompt, completions)

    with Validator(network.wallet, network.client, judge, policy=Policy(k=2, timeout=30)) as validator:
        assert validator.newcomers() == [1, 2, 3, 4]
        round = validator.route("Is it?")
        with pytest.raises(JudgeError, match="the judge failed: ValueError: away"):
            validator.ask(round)
        assert sorted(validator.newcomers() + round.uids) == [1, 2, 3, 4] and validator.steps == 0
        away.clear()
        event = validator.step("Is it?")
        assert sorted(validator.newcomers() + event.uids) == [1, 2, 3, 4] and validator.steps == 1


def test_an_asking_thread_that_ended_is_a_problem(network, tmp_path, caplog):
    def prompts():
        yield "Is 1 a number?"
        raise Panic("out of memory")

    with service_of(network, tmp_path, prompts=prompts()) as service:
        assert service.join(SECONDS)
        assert service.problems() == ["the thread asking-0 has ended (Panic: out of memory)"]
    assert len(events(tmp_path)) == 1


@pytest.mark.parametrize("neurons", [None, [SimpleNamespace(uid=0, hotkey="5A"), SimpleNamespace(uid=1, hotkey="5B")]])
def test_a_metagraph_without_addresses_leaves_nobody_without_weight(network, neurons):
    with Validator(network.wallet, network.client, by_length) as validator:
        about = {} if neurons is None else {"neurons": neurons}
        validator.metagraph = SimpleNamespace(hotkeys=["5A", "5B"], **about)
        validator.averages.values = {"5A": 0.2, "5B": 0.6}
        assert validator.weights() == pytest.approx({0: 0.25, 1: 0.75}) and validator.away == 0


def test_a_batch_loses_only_what_failed(network):
    def judge(prompt, completions):
        if "bad" in prompt:
            raise RuntimeError("upstream failed")
        return by_length(prompt, completions)

    with Validator(network.wallet, network.client, judge, policy=Policy(k=2, timeout=30)) as validator:
        said = "2 of 4 prompts failed, the first with JudgeError: the judge failed: RuntimeError: upstream failed; see `events`"
        with pytest.raises(BatchError, match=said) as found:
            validator.batch(["one", "bad two", "three", "bad four"])
        events, errors = found.value.events, found.value.errors
        assert [event and event.prompt for event in events] == ["one", None, "three", None] and list(errors) == [1, 3]
        assert validator.steps == 2 and sum(validator.averages.counts.values()) == 4


def test_a_chain_that_is_away_for_a_moment_costs_no_step(network, caplog):
    "The answers are there, and only their events have a block."
    with Validator(network.wallet, network.client, by_length, policy=Policy(k=2, timeout=30)) as validator:
        network.chain.step(4)
        assert [event.block for event in validator.batch(PROMPTS[:2])] == [5, 5]
        network.chain.fail(times=10**6)
        found = [*validator.batch(PROMPTS[:4]), validator.step(PROMPTS[4])]
        assert [event.block for event in found] == [validator.metagraph.block] * 5 and validator.steps == 7
        network.chain.fail(times=0)
        assert validator.step(PROMPTS[5]).block == 5
    assert caplog.text.count("the chain is away") == 1


@pytest.mark.parametrize("bad", ["", 7, "\ud800", None], ids=repr)
def test_a_prompt_that_is_none_costs_a_batch_nothing_else(network, bad):
    with Validator(network.wallet, network.client, by_length, policy=Policy(k=2, timeout=30)) as validator:
        with pytest.raises(BatchError, match="1 of 3 prompts failed, the first with ") as found:
            validator.batch(["one", bad, "three"])
        assert [event and event.prompt for event in found.value.events] == ["one", None, "three"] and list(found.value.errors) == [1]
        validator.policy = Policy(k=9)
        with pytest.raises(InputError, match="more miners than there are"):
            validator.batch(["one", "two"])


@pytest.mark.parametrize("error, ends", [(Panic("index out of bounds"), False), (KeyboardInterrupt(), True), (GeneratorExit(), True)])
def test_a_batch_goes_on_after_any_error_of_its_own(network, monkeypatch, error, ends):
    with Validator(network.wallet, network.client, by_length, policy=Policy(k=2, timeout=30)) as validator:
        backward, errors = validator.gate.backward, [error]

        def fail_once(*given):
            if errors:
                raise errors.pop()
            return backward(*given)

        monkeypatch.setattr(validator.gate, "backward", fail_once)
        with pytest.raises(type(error) if ends else BatchError) as found:
            validator.batch(["one", "two", "three"])
        if not ends:
            assert [event and event.prompt for event in found.value.events] == [None, "two", "three"] and validator.steps == 2


def test_fewer_miners_than_it_asks_for(network, tmp_path, caplog):
    with service_of(network, tmp_path, k=9, steps=3) as service:
        assert service.join(SECONDS)
    assert all(len(e["uids"]) == 4 for e in events(tmp_path))
    assert caplog.text.count("only 4 miners to ask, instead of 9") == 1


def test_without_a_miner_it_waits_and_says_so(tmp_path, caplog):
    with Network([]) as empty, service_of(empty, tmp_path, steps=3) as service:
        until(lambda: "no miner of the subnet serves" in caplog.text)
        assert service.problems() == ["no miner of the subnet serves"]
        with pytest.raises(NotReady, match="no miner"):
            service.step("hello?")
    assert events(tmp_path) == []


@pytest.mark.parametrize("address", ["nonsense", "example.org:80", "8.8.8.8:80", "127.0.0.1", 7])
def test_a_question_goes_to_this_machine_only(tmp_path, address, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
    (tmp_path / "endpoint.json").write_text(json.dumps({"address": address}))
    with pytest.raises(InputError, match="holds no address of a validator on this machine: delete"):
        post_prompt(tmp_path, "x?")
    with Follower(tmp_path) as follower:  # who looks on asks there neither
        assert "holds no address of a validator on this machine: delete" in follower.state()


def interrupt_within(function):
    "Send SIGINT to the main thread as soon as it waits in a function."
    main = threading.main_thread().ident
    while True:
        here, called = sys._current_frames()[main], []
        while here:
            called.append(here.f_code)
            here = here.f_back
        if called[0].co_filename == threading.__file__ and function.__code__ in called:
            return signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.01)


def test_a_stop_by_a_signal_waits_for_the_step_under_way(tmp_path):
    "A join that a signal interrupts must not make Python think that the thread has ended."
    begun, over = threading.Event(), threading.Event()

    def slow(prompt):
        begun.set()
        over.wait(SECONDS)
        return "late"

    def answer_late():
        assert service._stopping.wait(SECONDS)  # or another prompt would be asked
        time.sleep(0.2)
        over.set()

    with Network([Worker("slow", slow)]) as network:
        service = service_of(network, tmp_path, k=1)
        service.start()
        try:
            assert begun.wait(SECONDS)
            threading.Thread(target=interrupt_within, args=(Service.join,), daemon=True).start()
            with pytest.raises(KeyboardInterrupt):
                service.join(SECONDS)
            assert not service.join(0.01)  # it works on
            threading.Thread(target=answer_late, daemon=True).start()
        finally:
            service.stop()
        assert service.join(0) and [e["completions"] for e in events(tmp_path)] == [["late"]]
        assert read_about(tmp_path)["step"] == 1


HANGING = """
import os, signal, sys, threading, time, urllib.request
from prompting_nb.files import on_sigterm
from prompting_nb.loop.endpoint import Endpoint
from prompting_nb.loop.network import Network
from prompting_nb.loop.service import Service, ServiceSettings
from prompting_nb.loop.tasks import Worker
from prompting_nb.reward.pairwise import PairwiseJudge
from prompting_nb.validators.judge import Judge
from prompting_nb.validators.validator import Policy, Validator

begun = threading.Event()

def hang(*given):
    begun.set()
    threading.Event().wait()

def interrupted(work):
    try:
        threading.Thread(target=lambda: begun.wait() and os.kill(os.getpid(), signal.SIGTERM), daemon=True).start()
        work()
    except KeyboardInterrupt:
        print("interrupted", flush=True)

how, folder = sys.argv[1:]
judge = Judge(PairwiseJudge(hang, threads=2)) if how == "pairs" else hang
with on_sigterm(), Network([Worker(name, lambda _, name=name: name) for name in "ab"]) as network:
    validator = Validator(network.wallet, network.client, judge, policy=Policy(k=2, timeout=30))
    if how == "batch":
        interrupted(lambda: validator.batch(["a", "b"]))
    elif how == "pairs":
        interrupted(lambda: validator.step("a"))
    else:
        service = Service(validator, folder, None, ServiceSettings(no_set_weights=True))
        service.start()
        with Endpoint(service) as endpoint:
            head = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"http://{endpoint.address}/prompt", b'{"prompt": "x"}', head)
            threading.Thread(target=lambda: urllib.request.urlopen(request), daemon=True).start()
            interrupted(lambda: time.sleep(10**6))
        service.stop(0.1)
"""


@pytest.mark.parametrize("how", ["batch", "pairs", "prompt"])
def test_a_process_ends_although_its_judge_hangs(tmp_path, how):
    done = subprocess.run([sys.executable, "-c", HANGING, how, str(tmp_path)], capture_output=True, text=True, timeout=SECONDS)
    assert done.stdout == "interrupted\n" and done.returncode == 0, done.stderr


def test_a_gate_that_hangs_is_a_problem_and_keeps_no_stop_waiting(network, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("prompting_nb.loop.service._LAST", 0.1)
    begun, over = threading.Event(), threading.Event()

    def hang(prompt):
        begun.set()
        over.wait()

    service = service_of(network, tmp_path, prompts=None, patience=0.5)
    service.validator.policy = Policy(k=2, timeout=0.5)
    service.start()
    monkeypatch.setattr(service.validator.gate, "posterior", hang)

    def late():
        with pytest.raises(TypeError):
            service.step("Is it?")

    step = threading.Thread(target=late, daemon=True)
    step.start()
    try:
        assert begun.wait(SECONDS)
        until(lambda: any("the judge or the gate hangs" in problem for problem in service.problems()))
        stop = threading.Thread(target=service.stop, args=(0.1,), daemon=True)
        stop.start()
        stop.join(SECONDS)
        assert not stop.is_alive() and service._ended.is_set()
        assert "the state could not be saved at the end: TimeoutError: the gate or the disk hangs" in caplog.text
    finally:
        over.set()
        step.join(SECONDS)


def test_a_prompt_that_is_late_at_the_stop_leaves_the_folder_to_the_next(tmp_path):
    "Were it learned and written after the end, the log would hold two steps of one number, and no validator would start."
    begun, over, found = threading.Event(), threading.Event(), []

    def slow(prompt):
        if prompt == "slow?":
            begun.set()
            over.wait(SECONDS)
        return "at last"

    def ask(service):
        try:
            found.append(service.step("slow?"))
        except NotReady as error:
            found.append(str(error))

    with Network([Worker("slow", slow)]) as network:
        with service_of(network, tmp_path, k=1, prompts=None, judge=later) as first:
            first.step("quick?")
            asking = threading.Thread(target=ask, args=(first,))
            asking.start()
            assert begun.wait(SECONDS)
        with service_of(network, tmp_path, k=1, prompts=None, judge=later) as second:
            second.step("first of the second")
            over.set()
            asking.join(SECONDS)
            first._try_to_save()
            with pytest.raises(NotReady, match="the validator has ended"):
                first.reward(0, {1: 0.5})
            assert found == ["the validator has ended"] and first.validator.steps == 1
            second.step("second of the second")
        assert [e["prompt"] for e in events(tmp_path)] == ["quick?", "first of the second", "second of the second"]
        killed_early(tmp_path)
        assert service_of(network, tmp_path, k=1, prompts=None, judge=later).validator.steps == 3 and not Journal(tmp_path).late()


def test_a_stop_that_is_interrupted_writes_nothing_later(network, tmp_path, monkeypatch):
    "As by a second Ctrl-C."
    service = service_of(network, tmp_path, steps=0)
    service.start()
    until(lambda: service.validator.steps > 2)

    def interrupted(timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(service, "_finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        service.stop()
    assert service.join(SECONDS) and len(events(tmp_path)) == service.validator.steps == read_about(tmp_path)["step"]
    until(lambda: not service.runner.is_running)


def test_a_service_that_cannot_start_its_threads_leaves_none_behind(network, tmp_path, monkeypatch):
    start = threading.Thread.start
    service = service_of(network, tmp_path, concurrent=3)

    def limited(self):
        if self.name == "asking-1":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        service.start()
    assert service.join(0) and not service.runner.is_running and len(events(tmp_path)) == service.validator.steps


def test_a_chain_that_is_away(network, tmp_path, caplog):
    with service_of(network, tmp_path, steps=0) as service:
        until(lambda: service.validator.steps > 2)
        network.chain.fail(times=10**6)
        service.chain.patience = 0.3
        until(lambda: "retry 3 of" in caplog.text)
        before = service.validator.steps
        until(lambda: service.validator.steps > before + 3)  # it goes on with what it knows
        until(lambda: any("no news of the chain" in problem for problem in service.problems()))
        network.chain.fail(times=0)
    assert "the chain failed" in caplog.text


def test_a_chain_that_goes_back(network, tmp_path, caplog):
    "As after it was restored from an older copy: the metagraph is read again."
    with service_of(network, tmp_path, steps=0, sync_every=10) as service:
        network.chain.step(500)
        until(lambda: service.chain.block > 500 and service._synced_at > 500)
        network.chain.subnet.block = 20
        network.chain.register("a newcomer")
        until(lambda: service.validator.left_out == 1)  # it was seen; the gate has five rows
    assert "the chain went back from block 501 to 20" in caplog.text


def test_two_nodes_a_few_blocks_apart_are_one_chain(network, tmp_path, caplog):
    client = network.client

    class Nodes:
        network, subnets, execute, turn = "local", client.subnets, client.execute, 0

        @property
        def block(self):
            self.turn += 1
            return client.block - 3 * (self.turn % 2)

    reads = []
    network.chain.step(100)
    validator = Validator(network.wallet, Nodes(), by_length, policy=Policy(k=2, timeout=30), allow_private=True)
    with Service(validator, tmp_path, None, ServiceSettings(no_set_weights=True)) as service:
        service.runner.stop()
        service._tried_at = service.chain.look()
        service._sync, tried = lambda block: reads.append(block) or setattr(service, "_synced_at", block), service._tried_at
        for _ in range(10):
            service._each_block()
    assert not reads and service._tried_at == tried and "went back" not in caplog.text


def test_a_metagraph_that_cannot_be_read_or_is_old_is_a_problem(network, tmp_path):
    client, failing, stale = network.client, threading.Event(), threading.Event()
    old = client.subnets.metagraph(1)

    class Subnets:
        def metagraph(self, netuid):
            if failing.is_set():
                raise ConnectionError("state already discarded")
            return old if stale.is_set() else client.subnets.metagraph(netuid)

    class Node:
        network, subnets, execute, block = "local", Subnets(), client.execute, property(lambda self: client.block)

    validator = Validator(network.wallet, Node(), by_length, policy=Policy(k=2, timeout=30), allow_private=True)
    settings = ServiceSettings(no_set_weights=True, sync_every=5, poll_interval=0.01)
    with Service(validator, tmp_path, None, settings) as service:
        assert service.runner.longest_look == 5 * service.validator.client.seconds
        service.runner.longest_pause = 0.05
        failing.set()
        network.chain.step(50)
        until(lambda: service.runner.failures >= 3)
        (problem,) = service.problems()
        assert re.fullmatch(r"the chain has failed \d+ times in a row, the metagraph is of block 1", problem)
        failing.clear()
        until(lambda: service.runner.failures == 0 and not service.problems())
        stale.set()
        network.chain.step(50)
        until(lambda: service.problems())
        assert service.problems() == ["the metagraph is of block 51, 50 blocks before the newest when it was read"]
        stale.clear()
        network.chain.step(5)
        until(lambda: not service.problems())
        assert service.runner.stop(SECONDS)  # the end of a look would say that it is over
        service.runner.overdue = True
        assert service.problems() == ["one look at the chain takes longer than 450 s, the metagraph is of block 106"]
        service.runner.overdue = False


def test_an_older_metagraph_makes_the_gate_forget_nothing(network, tmp_path, caplog):
    client, stale, reads = network.client, threading.Event(), []
    old = client.subnets.metagraph(1)

    class Subnets:
        def metagraph(self, netuid):
            reads.append(stale.is_set())
            return old if reads[-1] else client.subnets.metagraph(netuid)

    class Node:
        network, subnets, execute, block = "local", Subnets(), client.execute, property(lambda self: client.block)

    validator = Validator(network.wallet, Node(), by_length, policy=Policy(k=2, timeout=30), allow_private=True)
    settings = ServiceSettings(no_set_weights=True, sync_every=1, poll_interval=0.01)
    with Service(validator, tmp_path, None, settings) as service:
        network.replace(2, Worker("new", lambda _: "A new answer, which is long."))
        network.chain.step(30)
        hotkey = client.subnets.metagraph(1).hotkeys[2]
        until(lambda: service.validator.metagraph.hotkeys[2] == hotkey)
        for number in range(6):
            service.step(f"Is {number} a number?")
        known = validator.gate("Is 1 a number?").tolist()
        stale.set()
        for _ in range(2):
            before = len(reads)
            network.chain.step(1)
            until(lambda: len(reads) > before)
        stale.clear()
        network.chain.step(1)
        until(lambda: "metagraph: as usual again" in caplog.text or not reads[-1])
        until(lambda: service._synced_at == service.chain.block == client.block)
        assert validator.metagraph.hotkeys[2] == hotkey and validator.gate("Is 1 a number?").tolist() == known
    assert caplog.text.count("a node has one of before block") == 1


def test_a_node_that_shows_nobody_makes_the_gate_forget_nothing(network, monkeypatch):
    validator = Validator(network.wallet, network.client, by_length, policy=Policy(k=2, timeout=30))
    before, nobody = validator.gate(PROMPTS[0]).tolist(), SimpleNamespace(hotkeys=[], neurons=[])
    with pytest.raises(RuntimeError, match="shows nobody on subnet 1, where there were 5 uids"):
        validator.sync(nobody)
    validator.client = SimpleNamespace(subnets=SimpleNamespace(metagraph=lambda netuid: None))
    with pytest.raises(RuntimeError, match="shows nobody"):
        validator.sync()
    assert validator.gate(PROMPTS[0]).tolist() == before and len(validator.serving()) == 4


class Nobody(list):
    "A metagraph without a uid, which is false."

    hotkeys, neurons = [], []


@pytest.mark.parametrize("found", [None, Nobody()], ids=["nothing", "nobody"])
def test_a_node_that_shows_nobody_keeps_no_prompt_waiting(network, tmp_path, found):
    "Were the metagraph read once more, and under the lock of gate and journal, a node that hangs then would stop every prompt."
    client, bad, over, reads = network.client, threading.Event(), threading.Event(), []

    class Subnets:
        def metagraph(self, netuid):
            if not bad.is_set():
                return client.subnets.metagraph(netuid)
            reads.append(service._lock.locked())
            return found if len(reads) == 1 else over.wait(SECONDS) and found

    class Node:
        network, subnets, execute, block = "local", Subnets(), client.execute, property(lambda self: client.block)

    validator = Validator(network.wallet, Node(), by_length, policy=Policy(k=2, timeout=30), allow_private=True)
    settings = ServiceSettings(no_set_weights=True, sync_every=5, poll_interval=0.01)
    with Service(validator, tmp_path, None, settings) as service:
        bad.set()
        network.chain.step(50)
        until(lambda: len(reads) == 2)  # at the next attempt
        assert not service._lock.locked() and service.route("Is 1 a number?").uids
        assert service.runner.failures == 1 and len(service.validator.metagraph.hotkeys) == 5
        bad.clear()
        over.set()
        until(lambda: service.runner.failures == 0 and not service.problems())


def test_a_chain_that_stands_still_is_a_problem():
    now, client = [0.0], SimpleNamespace(block=7)
    watch = ChainWatch(client, clock=lambda: now[0])
    for now[0] in (1.0, 300.0, 302.0):
        watch.look()
    assert watch.problem() == "the chain has had no block after 7 for 301 s"
    client.block = 8
    watch.look()
    assert watch.problem() is None
    now[0] += 61
    assert watch.problem() == "no news of the chain for 61 s"
    by_hand = ChainWatch(SimpleNamespace(block=7, network="ws://embedded"), clock=lambda: now[0], patience=10_000.0)
    by_hand.look()
    now[0] += 1000
    by_hand.look()
    assert by_hand.problem() is None  # as on any embedded chain, whose blocks may be made by hand


def test_a_source_of_prompts_that_waits_keeps_nobody_else_waiting(network, tmp_path):
    "As a pipe that says nothing for hours: prompts come over HTTP meanwhile, the chain is followed, and a stop saves the state."
    waiting, more = threading.Event(), threading.Event()

    def prompts():
        yield "Is 1 a number?"
        waiting.set()
        more.wait(SECONDS)
        yield "Is 2 a number?"

    with service_of(network, tmp_path, prompts=prompts(), concurrent=2, sync_every=1) as service, Endpoint(service) as endpoint:
        assert waiting.wait(SECONDS)
        asked = [threading.Thread(target=post, args=(endpoint.address, {"prompt": f"{n}?"}), daemon=True) for n in range(3)]
        for thread in asked:
            thread.start()
        for thread in asked:
            thread.join(SECONDS)
        assert not any(thread.is_alive() for thread in asked) and service.validator.steps == 4
        network.chain.step(30)
        until(lambda: service._synced_at >= 30)
        assert not service.join(0.01) and not service.problems()
        stopping = threading.Thread(target=service.stop, args=(SECONDS,), daemon=True)
        stopping.start()
        stopping.join(SECONDS / 2)  # nothing is under way: there is nothing to wait for
        assert not stopping.is_alive() and read_about(tmp_path)["step"] == 4
        more.set()
        assert service.join(SECONDS)
    assert len(events(tmp_path)) == 4


def test_prompts_that_cannot_be_read_end_the_asking_and_are_reported(network, tmp_path, caplog):
    def prompts():
        yield "Is 1 a number?"
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    with service_of(network, tmp_path, prompts=prompts()) as service:
        assert service.join(SECONDS)
    assert len(events(tmp_path)) == 1 and "no more prompts can be read: UnicodeDecodeError" in caplog.text


def test_half_characters_are_written_and_read(tmp_path):
    "JSON can carry them, escaped: an event that holds one must not stop the log for good."
    event = Event(step=0, prompt="\ud83d?", uids=[1], hotkeys=["5"], scores=[0.5], propensities=[1.0], rewards=[1.0], statuses=[200],
                  completions=["half a character: \ud800"], loss=0.1, seconds=[0.1], block=1)
    with Journal(tmp_path) as journal:
        journal.append(event)
        journal.append(replace(event, step=1, prompt="größer", completions=["b"]))
    assert [e["prompt"] for e in events(tmp_path)] == ["\ud83d?", "größer"] and "größer" in (tmp_path / "events.jsonl").read_text()


def test_who_reads_the_log_of_a_living_validator_changes_nothing(tmp_path):
    "A reader may come while a line is being written: were it cut off as after a kill, the writer's next line would be garbled."
    event = Event(step=0, prompt="a", uids=[1], hotkeys=["5"], scores=[0.5], propensities=[1.0], rewards=[1.0], statuses=[200],
                  completions=["b" * 100], loss=0.1, seconds=[0.1], block=1)
    lines = [f"{replace(event, step=step).to_json()}\n".encode() for step in range(3)]
    late = [b'{"step": 0, "after": 1, "rewards": {"1": 0.5}}\n', b'{"step": 1, "after": 2, "rewards": {"1": 0.25}}\n']
    with open(tmp_path / "events.jsonl", "ab", buffering=0) as file, open(tmp_path / "rewards.jsonl", "ab", buffering=0) as rewards:
        file.write(lines[0])
        rewards.write(late[0])
        for line in lines[1:]:
            for cut in range(1, len(line), 37):
                reader = Journal(tmp_path)
                before = (tmp_path / "events.jsonl").read_bytes()
                file.write(line[len(before.rpartition(b"\n")[2]):cut])
                assert [e["step"] for e in Journal(tmp_path).read()] == [e["step"] for e in reader.read()]
                assert Journal(tmp_path).next_step == reader.next_step == before.count(b"\n")
            file.write(line[len((tmp_path / "events.jsonl").read_bytes().rpartition(b"\n")[2]):])
        rewards.write(late[1][:20])
        assert Journal(tmp_path).late_rewards == 1
        rewards.write(late[1][20:])
    assert (tmp_path / "events.jsonl").read_bytes() == b"".join(lines) and len(Journal(tmp_path).late()) == 2


def test_refused_weights_are_tried_again(network, tmp_path, monkeypatch, caplog):
    calls = []

    def set_weights(self, weights=None, version_key=0):
        calls.append(weights)
        if len(calls) == 1:
            raise RuntimeError("the chain refused the weights: too soon")
        return weights

    monkeypatch.setattr(Validator, "set_weights", set_weights)
    with service_of(network, tmp_path, no_set_weights=False, weights_every=1) as service:
        until(lambda: service.validator.steps > 2)
        network.chain.step(2)
        until(lambda: len(calls) >= 1)
        network.chain.step(1)
        until(lambda: len(calls) >= 2)
    assert "too soon; another attempt" in caplog.text and abs(sum(calls[-1].values()) - 1) < 1e-6


def test_refused_weights_wait_for_the_next_block(network, tmp_path, monkeypatch):
    blocks = []

    def refuse(*_):
        blocks.append(network.chain.block)
        raise RuntimeError("the chain refused the weights: too soon")

    with service_of(network, tmp_path, prompts=None, no_set_weights=False, weights_every=1, poll_interval=0.01) as service:
        monkeypatch.setattr(service.validator, "set_weights", refuse)
        service.step("Is 1 a number?")
        for block in range(network.chain.block + 2, network.chain.block + 5):
            network.chain.step()
            until(lambda: service.runner.block == network.chain.block)
            looks = service.chain.heard_at
            until(lambda: service.chain.heard_at > looks + 0.1)  # ten more looks
    assert len(blocks) == len(set(blocks)) >= 2


def test_that_no_weights_are_set_is_said(network, tmp_path, caplog):
    nothing = lambda prompt, completions: torch.zeros(len(completions))
    network.chain.step(20)
    with service_of(network, tmp_path, nothing, steps=3, no_set_weights=False, weights_every=1) as service:
        assert service.join(SECONDS)
        until(lambda: "none are set while no miner has earned anything" in caplog.text)
    assert network.chain.weights == {} and caplog.text.count("none are set") == 1


def test_a_uid_that_changed_hands_a_block_ago_inherits_no_weight(network, tmp_path):
    network.chain.step(20)
    settings = dict(prompts=None, no_set_weights=False, weights_every=1000, sync_every=10_000)
    with service_of(network, tmp_path, k=4, **settings) as service:
        service.step("Is 1 a number?")
        network.chain.replace(2, "a newcomer")
        network.chain.step(1000)
        until(lambda: network.chain.weights)
    assert 2 not in network.chain.weights[0] and len(network.chain.weights[0]) == 3


def test_weights_are_committed_and_revealed_and_carry_the_version_key(network, tmp_path, caplog):
    rules = network.chain.subnet.rules
    network.chain.subnet.tempo = 10
    network.chain.subnet.rules = replace(rules, commit_reveal=True, reveal_period=2, weights_version=7)
    with service_of(network, tmp_path, no_set_weights=False, weights_every=1, version_key=7) as service:
        until(lambda: service.validator.steps > 4)
        network.chain.step(2)
        until(lambda: service.weights)
        assert network.chain.weights == {}  # committed, and secret
        network.chain.step(30)
        shares = network.chain.weights[0]
        assert set(shares) == set(service.weights) and abs(sum(shares.values()) - 1) < 1e-6
    with service_of(network, tmp_path / "older", no_set_weights=False, weights_every=1) as service:
        until(lambda: service.validator.steps > 4)
        network.chain.step(2)
        network.chain.subnet.rules = replace(rules, weights_version=7)
        until(lambda: network.chain.step() and "the version key is 0; the subnet requires 7" in caplog.text)


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_that_jumps(network, tmp_path, monkeypatch, hours):
    "The wall clock is set back or ahead while miners and validator work: requests are still accepted, and blocks still followed."
    with service_of(network, tmp_path, steps=0) as service:
        until(lambda: service.validator.steps > 3)
        seconds, exact = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: seconds() + hours * 3600)
        late = [*network.miners.values(), service.validator]
        shifted = lambda: exact() + hours * 3600 * 10**9
        for part in late:
            for clocked in clocked_parts(part):
                monkeypatch.setattr(clocked, next(n for n in ("clock", "_clock") if hasattr(clocked, n)), shifted)
        before = service.validator.steps  # until now some clocks were set, and others not
        until(lambda: service.validator.steps > before + 12)
        network.chain.step(30)
        until(lambda: service.chain.block == network.chain.block)
        assert service.problems() == []
    last = events(tmp_path)[-6:]
    assert all(status == 200 for event in last for status in event["statuses"])
    assert [e["step"] for e in events(tmp_path)] == list(range(service.validator.steps))


def clocked_parts(root):
    "All objects within one that hold the wall clock."
    seen, todo, found = set(), [root], []
    while todo:
        one = todo.pop()
        if id(one) in seen or not type(one).__module__.startswith("prompting_nb."):
            continue
        seen.add(id(one))
        held = {name: getattr(one, name, None) for name in (*getattr(one, "__dict__", {}), *getattr(type(one), "__slots__", ()))}
        if any(held.get(name) is time.time_ns for name in ("clock", "_clock")):
            found.append(one)
        for value in held.values():
            todo += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    return found


def test_a_subnet_that_outgrows_the_gate(network, tmp_path, caplog):
    "While the validator runs, and while it is down: the uids that the gate has rows for are served, the others are counted."
    narrow = lambda: default_gate(FirstUids(network.client.subnets.metagraph(1), 6), config={"gating.num_uids": 6})

    def service(**more):
        parts = (network.wallet, network.client, by_length, narrow(), Policy(k=2, timeout=30))
        settings = ServiceSettings(interval=0, poll_interval=0.05, sync_every=1, no_set_weights=True, **more)
        return Service(Validator(*parts), tmp_path, PROMPTS, settings)

    with service() as one:
        until(lambda: one.validator.steps > 3)
        for number in range(3):
            network.chain.register(f"late-{number}")
        network.chain.step()
        until(lambda: one.validator.left_out == 2)
        before = one.validator.steps
        until(lambda: one.validator.steps > before + 3)
        assert status_of(one)["left_out"] == 2 and one.problems() == []
    assert "2 of 8 uids are left out, since the gate has rows for 6" in caplog.text
    network.chain.register("one more, while it is down")
    last = one.validator.steps + 16
    with service(steps=last) as two:
        assert two.join(SECONDS) and two.validator.left_out == 3
    assert [e["step"] for e in events(tmp_path)] == list(range(last))


def test_a_subnet_that_swapped_shrank_or_grew_while_the_validator_was_down(network, tmp_path):
    "What is known follows each hotkey to its uid; who left has no weight, and newcomers begin with nothing."
    def gate_of(metagraph):
        return default_gate(metagraph, config={"gating.num_uids": 8})

    first = Validator(network.wallet, network.client, by_length, gate_of(network.client.subnets.metagraph(1)), Policy(k=2, timeout=30))
    with Service(first, tmp_path, PROMPTS, ServiceSettings(interval=0, steps=10, no_set_weights=True, save_every=4)) as service:
        assert service.join(SECONDS)
    keys, scores = list(first.metagraph.hotkeys), first.gate(PROMPTS[3]).tolist()
    known = dict(zip(keys, scores))
    own, one, two, three, four = keys
    for hotkeys in ([own, two, one, three, four], [own, one, two], [*keys, "5New", "5Newer"], [own, four, "5New", one]):
        now = SimpleNamespace(hotkeys=hotkeys, neurons=[])
        client = SimpleNamespace(subnets=SimpleNamespace(metagraph=lambda _, now=now: now), block=1)
        again = Validator(network.wallet, client, by_length, gate_of(now), allow_private=True)
        with Journal(tmp_path) as journal:
            assert resume(again, tmp_path, journal).step == 10
        found = dict(zip(hotkeys, again.gate(PROMPTS[3]).tolist()))
        for hotkey in hotkeys:
            assert (found[hotkey] == pytest.approx(known[hotkey], abs=1e-6)) if hotkey in known else found[hotkey] not in scores[1:], hotkey
        assert again.averages.values == first.averages.values
        assert set(again.weights()) <= {uid for uid, hotkey in enumerate(hotkeys) if hotkey in known}
        assert again.metagraph.hotkeys == hotkeys


def test_corrections_of_the_judge_are_saved(network, tmp_path):
    class Length:
        def score(self, prompts, completions):
            return torch.tensor([[len(text) / 60] for text in completions])

    def judge():
        made = Judge(Length(), [0.0, 1.0], [0.0, 1.0])
        made.watch.low, made.watch.high = 0.1, 0.9
        return made

    first = judge()
    with service_of(network, tmp_path, first, steps=6) as service:
        first.offsets.add(service.validator.metagraph.hotkeys[2], -0.25)
        assert service.join(SECONDS)
    second = judge()
    with service_of(network, tmp_path, second, steps=12) as service:
        assert service.validator.judge.offsets.errors == first.offsets.errors
        assert second.watch.seen >= first.watch.seen > 0
        assert service.join(SECONDS)
    assert second.watch.seen == sum(len(e["uids"]) for e in events(tmp_path))


@pytest.mark.parametrize("audited", [False, True])
def test_what_speaks_against_the_judge_is_said_at_the_start_and_in_the_status(network, tmp_path, caplog, audited):
    judge = Judge(SimpleNamespace(score=lambda prompt, texts: torch.tensor([[float(len(text))] for text in texts])))
    judge.watch = Watch(-2, -1, by_text=0.7, by_who=0.8, seen=10, above=0)
    judge = Audits(judge, lambda prompt, text: None) if audited else judge
    with caplog.at_level(logging.WARNING):
        with service_of(network, tmp_path, judge, steps=3) as one:
            assert sum("the judge: who answered predicts 80.0%" in record.getMessage() for record in caplog.records) == 1
            assert one.join(SECONDS)
            found = status_of(one)["findings"]
    assert ["who answered" in text for text in found].count(True) == 1 and any("raw scores lie outside" in text for text in found)
    assert any("audits failed" in text for text in found) == audited
    assert json.loads(json.dumps(found)) == found
    assert next(iter(Journal(tmp_path).read()))["watched"][2] > 0


def test_the_status_shows_alarms_of_the_gate(network, tmp_path):
    with service_of(network, tmp_path, steps=2) as one:
        assert one.join(SECONDS)
        watch = one.validator.gate.watch
        watch.mean[1], watch.count[1], watch.mean[2], watch.count[2] = -2.0, 30.0, 2.0, 30.0
        rows = {row["uid"]: row["alarm"] for row in status_of(one)["uids"]}
    assert rows == {uid: {1: "less", 2: "more"}.get(uid) for uid in rows}


def test_a_full_disk_is_waited_out(network, tmp_path, caplog):
    with service_of(network, tmp_path, steps=0, save_every=1000) as service:
        until(lambda: service.validator.steps > 2)
        real, full = Journal.append, threading.Event()
        full.set()

        def append(self, event):
            if full.is_set():
                raise OSError(28, "No space left on device")
            real(self, event)

        Journal.append = append
        try:
            until(lambda: any("could not be written" in problem for problem in service.problems()))
            stood = service.validator.steps
            time.sleep(0.5)
            assert service.validator.steps <= stood + 1  # nothing is asked that could not be kept
            full.clear()
            until(lambda: service.validator.steps > stood + 3)
        finally:
            Journal.append = real
    found = [e["step"] for e in events(tmp_path)]
    assert found == list(range(len(found))) and len(found) == service.validator.steps
    assert "No space left" in caplog.text


def test_a_full_disk_is_over_without_another_prompt(network, tmp_path, monkeypatch):
    "Where prompts come over HTTP only, nobody sends one to a validator that is not ready."
    with service_of(network, tmp_path, prompts=None) as service:
        append, full = service.journal.append, threading.Event()

        def limited(event):
            if full.is_set():
                raise OSError(28, "No space left on device")
            append(event)

        monkeypatch.setattr(service.journal, "append", limited)
        full.set()
        service.step("Is 1 a number?")
        assert service.problems() == ["1 event could not be written"]
        full.clear()
        until(lambda: not service.problems())
        assert len(events(tmp_path)) == 1


class Watched:
    "A judge of one's own that has a `watch` of another kind."

    watch = "/var/log/judge"

    def __call__(self, prompt, completions):
        return by_length(prompt, completions)


def test_a_judge_may_have_a_watch_of_another_kind(network, tmp_path):
    with service_of(network, tmp_path, Watched(), prompts=None) as service:
        service.step("Is it?")
    assert [e["watched"] for e in events(tmp_path)] == [None]


def test_a_reward_that_no_gate_can_learn_from_costs_its_step_only(network, tmp_path):
    huge = 3e38
    with service_of(network, tmp_path, lambda p, texts: [huge] * len(texts), prompts=None) as service:
        for wrong in (3e38, -2e6):
            huge = wrong
            with pytest.raises(JudgeError, match="from -1000000 to 1000000: that of answer 0 is "):
                service.step("Is it?")
        huge = 0.5
        assert service.step("Is it?")[1].step == 0 and not service.problems()
    with service_of(network, tmp_path, later, prompts=None) as service:
        event = service.step("Is it?")[1]
        for wrong in (1e38, -2e6):
            with pytest.raises(InputError, match=rf"from -1000000 to 1000000: that of uid {event.uids[0]} is "):
                service.reward(event.step, {event.uids[0]: wrong})
        assert service.reward(event.step, {event.uids[0]: 1e6})["learned"] == 1
        assert all(map(math.isfinite, service.step("Is it?")[1].scores))
    with service_of(network, tmp_path, prompts=None) as service:
        assert service.step("Is it?")[1].step == 3


def test_an_interrupt_after_a_step_was_counted_loses_its_event_alone(network, tmp_path, monkeypatch, caplog):
    "As a Ctrl-C in the main thread, which may take a step."
    with service_of(network, tmp_path, prompts=None) as service:
        service.step("Is 1 a number?")
        observe = service.validator.observe

        def interrupted(*given, **more):
            observe(*given, **more)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(service.validator, "observe", interrupted)
            with pytest.raises(KeyboardInterrupt):
                service.step("Is 2 a number?")
        assert [service.step("Is 3 a number?")[1].step for _ in range(2)] == [2, 3] and not service.problems()
    assert [e["step"] for e in events(tmp_path)] == [0, 2, 3]
    assert "1 event before step 2: lost (the step was interrupted)" in caplog.text
    with service_of(network, tmp_path, prompts=None) as again:
        assert again.saved.step == 4 and again.step("Is 4 a number?")[1].step == 4


def test_an_event_that_is_written_when_an_interrupt_comes_is_written_once(network, tmp_path, monkeypatch):
    with service_of(network, tmp_path, prompts=None) as service:
        append = service.journal.append

        def interrupted(event):
            append(event)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(service.journal, "append", interrupted)
            with pytest.raises(KeyboardInterrupt):
                service.step("Is 1 a number?")
        service.step("Is 2 a number?")
    assert [e["step"] for e in events(tmp_path)] == [0, 1]


def test_an_event_that_no_line_can_hold_is_lost_and_the_steps_go_on(network, tmp_path, monkeypatch):
    with service_of(network, tmp_path, prompts=None) as service:
        with monkeypatch.context() as patch:
            patch.setattr(service.validator.gate, "backward", lambda scores, rewards: torch.tensor(math.inf))
            service.step("Is 1 a number?")
            (problem,) = service.problems()
            assert problem.startswith("1 event before step 1: lost (ValueError: Out of range float values")
        service.step("Is 2 a number?")
        assert not service.problems()
        with monkeypatch.context() as patch:  # before anything learns from it
            route = service.validator.route

            def odd(*given):
                round = route(*given)
                return replace(round, scores=round.scores * math.nan)

            patch.setattr(service.validator, "route", odd)
            with pytest.raises(ValueError, match="Out of range float values"):
                service.step("Is 3 a number?")
        assert service.validator.steps == 2
    assert [e["step"] for e in events(tmp_path)] == [1]
    with service_of(network, tmp_path, prompts=None) as again:
        assert again.saved.step == 2


def test_a_stop_ends_whatever_the_saving_raises(network, tmp_path, monkeypatch, caplog):
    with service_of(network, tmp_path, prompts=None) as service:
        monkeypatch.setattr(service.validator.gate, "save", lambda path: json.dumps(math.nan, allow_nan=False))
    assert service._ended.is_set() and "the state could not be saved at the end: ValueError: Out of range" in caplog.text


def test_the_log_is_cut_back_where_the_disk_is_full(tmp_path):
    "A real limit on the size of files, in a process of its own."
    code = f"""
        import resource, signal, dataclasses
        from prompting_nb.loop.journal import Journal
        from prompting_nb.validators.event import Event
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        event = Event(step=0, prompt="a" * 300, uids=[1], hotkeys=["5"], scores=[0.5], propensities=[1.0], rewards=[1.0],
                      statuses=[200], completions=["b"], loss=0.1, seconds=[0.1], block=1)
        journal = Journal({str(tmp_path)!r})
        try:
            for step in range(100):
                journal.append(dataclasses.replace(event, step=step))
        except OSError as error:
            print(step, type(error).__name__)
    """
    out = subprocess.run([sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines())], capture_output=True, text=True)
    failed, kind = out.stdout.split()
    assert kind == "OSError" and [e["step"] for e in events(tmp_path)] == list(range(int(failed)))


@pytest.mark.slow
def test_a_service_waits_while_files_may_not_grow(tmp_path):
    "A real limit on the size of files: events cannot be written for a while; nothing is lost, doubled or half-written."
    code = f"""
        import logging, resource, signal, sys
        logging.basicConfig()
        sys.path.insert(0, "tests")
        import test_service as t
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        with t.Network(t.workers()) as network, t.service_of(network, t.Path({str(tmp_path)!r}), save_every=1) as service:
            t.until(lambda: service.validator.steps > 7)
            resource.setrlimit(resource.RLIMIT_FSIZE, (service.journal.path.stat().st_size + 700, hard))
            t.until(lambda: any("could not be written" in problem for problem in service.problems()))
            stood = service.validator.steps
            t.time.sleep(0.5)
            assert service.validator.steps <= stood + 1
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            t.until(lambda: service.validator.steps > stood + 5)
        print(service.validator.steps)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert out.returncode == 0, out.stderr
    found = [e["step"] for e in events(tmp_path)]
    assert found == list(range(int(out.stdout))) and "an event waits to be written" in out.stderr
    assert read_about(tmp_path)["step"] == len(found) and not list(tmp_path.glob(".state-*"))


def test_an_event_that_is_being_written_is_no_problem(network, tmp_path, monkeypatch):
    with service_of(network, tmp_path, prompts=None) as service:
        append, seen = service.journal.append, []
        monkeypatch.setattr(service.journal, "append", lambda event: (seen.append(service.problems()), append(event)))
        service.step("Is 1 a number?")
    assert seen == [[]]


def test_a_log_on_a_full_device(network, tmp_path, caplog):
    "/dev/full takes no byte: the service starts, waits, and says so; it goes on when there is room."
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with service_of(network, tmp_path, steps=3) as service:
        until(lambda: any("could not be written" in problem for problem in service.problems()))
        with service._lock:  # no attempt is under way that has opened the device
            (tmp_path / "events.jsonl").unlink()
            service.journal.close()
        assert service.join(SECONDS)
    assert [e["step"] for e in events(tmp_path)] == [0, 1, 2] and "No space left" in caplog.text


def test_half_a_line_after_a_kill_costs_that_step_only(network, tmp_path, caplog):
    with service_of(network, tmp_path, steps=6) as service:
        assert service.join(SECONDS)
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"step": 6, "prom')
    with service_of(network, tmp_path, steps=8) as service:
        assert service.join(SECONDS)
    assert [e["step"] for e in events(tmp_path)] == list(range(8)) and "bytes were cut off" in caplog.text


def killed_early(folder):
    "Leave the state of the start and all events, as a kill before the first saving does; return the lines of events."
    for state in sorted(folder.glob("state-*"))[1:]:
        shutil.rmtree(state)
    return (folder / "events.jsonl").read_bytes().splitlines(True)


def test_who_gives_the_same_answers_is_learned_from_the_log(tmp_path):
    same = lambda _: "Yes, all of us."
    with Network([Worker(f"twin {i}", same) for i in range(3)] + workers()) as network:
        def run(steps):
            policy = Policy(k=3, timeout=30, distinct=True)
            validator = Validator(network.wallet, network.client, by_length, policy=policy)
            validator.copies = Copies(least=1)
            settings = dict(interval=0, poll_interval=0.05, save_every=100, no_set_weights=True, steps=steps)
            with Service(validator, tmp_path, PROMPTS, ServiceSettings(**settings)) as service:
                assert service.join(SECONDS)
            return validator.copies

        before = run(24)
        assert killed_early(tmp_path) and before.groups()
        again = run(24)
        assert again.met == before.met and again.groups() == before.groups()


def test_events_that_were_removed_are_counted_and_the_steps_go_on(network, tmp_path, caplog):
    with service_of(network, tmp_path, steps=7, save_every=100) as service:
        assert service.join(SECONDS)
    lines = killed_early(tmp_path)
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines[2:3] + lines[5:]))
    with service_of(network, tmp_path, steps=9) as service:
        assert service.join(SECONDS)
    assert [e["step"] for e in events(tmp_path)] == [2, 5, 6, 7, 8]
    assert "no events of steps 0 to 1" in caplog.text and "no events of steps 3 to 4" in caplog.text
    assert "failed" not in caplog.text


def test_a_line_that_cannot_be_learned_from_is_named(network, tmp_path):
    with service_of(network, tmp_path, judge=later, steps=4, save_every=100) as service:
        assert service.join(SECONDS)
        service.reward(1, {uid: 0.5 for uid in service.validator.pending.open[1][1]})
    lines = killed_early(tmp_path)
    event = json.loads(lines[-1])
    for odd in ({"rewards": [1.0]}, {"rewards": ["x", "y"]}, {"uids": None}, {"prompt": 7}, {"watched": [1]},
                {"rewards": [math.nan, 0.5]}, {"step": 3, "prompt": ""}):
        line = json.dumps(event | {"rewards": [0.5, 0.5]} | odd).encode()
        judge = Judge(SimpleNamespace(score=lambda prompts, texts: torch.ones(len(texts), 1)))
        (tmp_path / "events.jsonl").write_bytes(b"".join(lines[:-1]) + line + b"\n")
        with pytest.raises(InputError, match=r"events.jsonl: the line of step 3 cannot be learned from"):
            service_of(network, tmp_path, judge=judge)
    (tmp_path / "events.jsonl").write_bytes(b"".join([*lines, lines[2]]))
    with pytest.raises(InputError, match="step 2 stands twice"):
        service_of(network, tmp_path)
    for odd in (b'{"step": -1}', b"[" * 50_000):
        (tmp_path / "events.jsonl").write_bytes(b"".join([*lines, odd, b"\n"]))
        with pytest.raises(InputError, match="events.jsonl, last line: this is no event"):
            service_of(network, tmp_path)
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "rewards.jsonl").write_text('{"step": 1, "after": "x", "rewards": {}}\n')
    with pytest.raises(InputError, match="rewards.jsonl: the line of step 1 cannot be learned from"):
        service_of(network, tmp_path)


@pytest.mark.parametrize("name", ["steps_left_out", "prompts_taken", "late_rewards", "netuid", "price_weight", "step"])
def test_a_number_of_a_state_that_is_none_is_named(network, tmp_path, name):
    with service_of(network, tmp_path, prompts=None):
        pass
    (state,) = tmp_path.glob("state-*")
    content = json.loads((state / "validator.json").read_text())
    place = content if name in content else content["about"]
    for odd in ("x", -5, [1], True, 10**400, None, math.inf):
        if (name, odd) == ("price_weight", None) or (name != "price_weight" and odd == 10**400):
            continue  # no budget, and a count that may be as long as it likes
        place[name] = odd
        (state / "validator.json").write_text(json.dumps(content))
        said = rf"{state} is no state of a validator \(its {name} is .* remove it to go on from the state before"
        with pytest.raises(InputError, match=said):
            service_of(network, tmp_path, prompts=None)


def test_old_files_of_a_log_are_not_read_again(network, tmp_path, monkeypatch):
    with service_of(network, tmp_path, steps=12, log_size=0.004) as service:
        assert service.join(SECONDS)
    read, entries = [], journal_module._entries
    monkeypatch.setattr(journal_module, "_entries", lambda path: (read.append((path.name, line["step"])) or line for line in entries(path)))
    journal = Journal(tmp_path)
    files = [path.name for path in journal.files()]
    assert len(files) > 3
    assert [e["step"] for e in journal.read(start=11)] == [11]
    assert [step for name, step in read if name == files[0]] == []


def test_full_files_of_events_are_removed_when_no_state_needs_them(network, tmp_path, caplog):
    "Miners that send long answers would fill the disk, and a full disk ends all learning."
    caplog.set_level(logging.INFO)
    settings = {"log_size": 0.002, "log_files": 2, "save_every": 10}
    with service_of(network, tmp_path, steps=27, **settings) as service:
        assert service.join(SECONDS)
    left = events(tmp_path)
    assert first_needed(tmp_path) == 20 and 17 <= left[0]["step"] <= 20, [e["step"] for e in left]
    assert [e["step"] for e in left] == list(range(left[0]["step"], 27)) and len(Journal(tmp_path).files()) > 3
    assert "removed events.000001.jsonl" in caplog.text and "log_files is 2" in caplog.text
    assert [state.name for state in sorted(tmp_path.glob("state-*"))] == ["state-000000020", "state-000000027"]
    shutil.rmtree(tmp_path / "state-000000027")  # the state before it goes on as well
    with service_of(network, tmp_path, steps=40, **settings) as service:
        assert (service.saved.step, service.saved.replayed) == (20, 7) and service.join(SECONDS)
    assert "were removed" not in caplog.text and events(tmp_path)[-1]["step"] == 39
    assert len(Journal(tmp_path).files()) <= 12, "those since the state before the last, and at least two"


def test_all_files_of_events_are_kept_by_default(network, tmp_path):
    with service_of(network, tmp_path, steps=12, log_size=0.002) as service:
        assert service.join(SECONDS)
    assert len(Journal(tmp_path).files()) > 5 and [e["step"] for e in events(tmp_path)] == list(range(12))


def test_files_of_events_that_cannot_be_removed_cost_no_state(network, tmp_path, caplog, monkeypatch):
    def unlink(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.Path, "unlink", unlink)
        with service_of(network, tmp_path, steps=12, log_size=0.002, log_files=1) as service:
            assert service.join(SECONDS)
    assert read_about(tmp_path)["step"] == 12 and [e["step"] for e in events(tmp_path)] == list(range(12))
    assert caplog.text.count("old files of events could not be removed: PermissionError") == 1


def test_answers_above_the_bound_of_a_validator_are_not_kept(tmp_path):
    "A miner that sends as much as it may fills the log of events with it."
    long = Worker("long", lambda prompt: "x" * 50_000)
    short = [Worker(f"short-{n}", lambda prompt: "four") for n in range(3)]
    with Network([long, *short]) as network:
        validator = Validator(network.wallet, network.client, by_length, policy=Policy(k=4, timeout=30), max_answer=10_000)
        event = validator.step("What is 2 plus 2?")
        assert sorted(event.statuses) == [200, 200, 200, 413] and len(event.to_json()) < 10_000
        assert event.completions[event.statuses.index(413)] is None and event.rewards[event.statuses.index(413)] == 0


def test_the_endpoint_serves_while_the_service_asks(network, tmp_path):
    import urllib.request

    with service_of(network, tmp_path, steps=0, interval=0.05) as service, Endpoint(service) as endpoint:
        def post(n):
            data = json.dumps({"prompt": f"question {n}"}).encode()
            head = {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"http://{endpoint.address}/prompt", data, head), timeout=60) as got:
                return json.load(got)

        answers = [post(n) for n in range(8)]
        assert all(len(a["answers"]) == 2 and a["best"] is not None for a in answers)
    asked = [e["prompt"] for e in events(tmp_path)]
    assert {f"question {n}" for n in range(8)} <= set(asked)


def test_a_question_waits_for_a_subnet_that_starts_for_the_first_time(network, tmp_path):
    "Its chain runs, and the validator teaches its reward model still: there is no folder of it."
    ask = lambda *flags: run_ask(ask_parser().parse_args(["Is 1 a number?", "--dir", str(tmp_path), *flags]), lambda text: None)
    with pytest.raises(InputError, match="holds no validator yet"):
        ask()
    (tmp_path / "processes.json").write_text(json.dumps([{"name": "chain", "pid": os.getpid(), "address": ""}]))
    with pytest.raises(RuntimeError, match="it is being started, see .*validator.log"):
        ask("--timeout", "0.5")

    def start():
        time.sleep(0.5)
        endpoint.start()
        (tmp_path / "validator" / "endpoint.json").write_text(json.dumps({"address": endpoint.address}))

    with service_of(network, tmp_path / "validator", prompts=None) as service:
        for state in (tmp_path / "validator").glob("state-*"):
            shutil.rmtree(state)
        endpoint = Endpoint(service)
        starting = threading.Thread(target=start)
        starting.start()
        assert len(ask()["answers"]) == 2
        starting.join()
        endpoint.stop()


@pytest.mark.parametrize("subnet", [False, True])
def test_a_question_waits_longer_for_a_validator_that_lives_and_does_not_listen_yet(network, tmp_path, capsys, subnet):
    "At its first start it teaches a reward model, which takes longer than an answer may."
    place = tmp_path / "validator"
    given = ["Is 1 a number?", "--dir", str(tmp_path if subnet else place), "--timeout", "0.5"]
    ask = lambda *flags: run_ask(ask_parser().parse_args([*given, *flags]), lambda text: None)
    place.mkdir()
    if subnet:
        (tmp_path / "processes.json").write_text(json.dumps([{"name": "chain", "pid": os.getpid(), "address": ""}]))
    with lock_folder(place / "validator.lock"):
        with pytest.raises(RuntimeError, match="still being started after 0.7 s, see .*--start-timeout"):
            ask("--start-timeout", "0.7")
        said = capsys.readouterr().err
        assert said.count("it teaches its reward model, which takes a minute or two") == 1
        assert ("logs/validator.log" in said) == subnet
        with service_of(network, place, prompts=None) as service:
            for state in place.glob("state-*"):
                shutil.rmtree(state)
            with Endpoint(service) as endpoint:
                found = json.dumps({"address": endpoint.address})
                writes = threading.Timer(1.5, (place / "endpoint.json").write_text, [found])
                writes.start()
                assert len(ask("--timeout", "30")["answers"]) == 2
                writes.join()


def test_a_look_at_the_lock_of_a_folder_refuses_nobody(tmp_path):
    lock = tmp_path / "validator.lock"
    assert not is_locked(lock) and not lock.exists()
    with lock_folder(lock):
        assert is_locked(lock)
        with pytest.raises(InputError, match="another process works in"):
            lock_folder(lock)
    assert not is_locked(lock)


def test_who_looks_at_the_lock_and_is_held_up_refuses_nobody(tmp_path, monkeypatch):
    lock, pauses = tmp_path / "validator.lock", []
    with lock.open("w") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)

        def sleep(seconds):
            pauses.append(seconds)
            if len(pauses) == 9:
                fcntl.flock(looker, fcntl.LOCK_UN)

        monkeypatch.setattr("prompting_nb.loop.processes.time", SimpleNamespace(sleep=sleep))
        with lock_folder(lock):
            assert len(pauses) == 9 and is_locked(lock)
            with pytest.raises(InputError, match="another process works in"):
                lock_folder(lock)
        assert len(pauses) == 9  # who works there is not waited for


def post(address, body, path="/prompt"):
    request = urllib.request.Request(f"http://{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as got:
        return json.load(got)


def test_rewards_that_come_later_survive_a_stop_and_are_learned_in_the_same_order(network, tmp_path):
    def teach(service, steps):
        for step in steps:
            found = service.validator.pending.open[step][1]
            last = service.reward(step, {uid: 0.1 * uid + 0.01 * step for uid in found})
        return last

    given = dict(judge=later, steps=6)
    with service_of(network, tmp_path / "whole", **given) as whole:
        assert whole.join(SECONDS)
        assert teach(whole, (4, 0, 3))["waiting"] == sum(whole.validator.pending.waiting().values())
        with pytest.raises(InputError, match="no answer of step 4 waits"):
            whole.reward(4, {1: 0.5})
        with pytest.raises(InputError, match="finite"):
            whole.reward(5, {uid: math.nan for uid in whole.validator.pending.open[5][1]})
    first = service_of(network, tmp_path / "parts", **given)
    with first:
        assert first.join(SECONDS)
        teach(first, (4,))
        teach(first, (0,))
    shutil.copytree(tmp_path / "parts", tmp_path / "killed")
    for state in sorted((tmp_path / "killed").glob("state-*"))[1:]:  # as if killed before the last save
        shutil.rmtree(state)
    for folder in ("parts", "killed"):
        with service_of(network, tmp_path / folder, **given) as again:
            teach(again, (3,))
        one, other = whole.validator, again.validator
        assert one.pending.open == other.pending.open and one.averages.values == other.averages.values, folder
        torch.testing.assert_close(one.gate(PROMPTS[0]), other.gate(PROMPTS[0]))
    assert [e["step"] for e in Journal(tmp_path / "parts").late()] == [4, 0, 3]


def test_rewards_are_posted(network, tmp_path):
    with service_of(network, tmp_path, judge=later, prompts=None) as service, Endpoint(service) as endpoint:
        answer = post(endpoint.address, {"prompt": "Is 1 a number?"})
        rows = answer["answers"]
        assert answer["best"] is None and {row["because"] for row in rows} == {"new"} and rows[0]["sd"] > 0
        rewards = {str(row["uid"]): 0.5 for row in rows if row["reward"] is None}
        body = {"step": answer["step"], "rewards": rewards}
        assert post(endpoint.address, body, "/reward") == {"learned": len(rewards), "waiting": 0}
        for wrong, code in ((body, 409), ({"step": 1}, 400), ({"step": 0, "rewards": {"x": 1}}, 400), (body | {"step": 10**400}, 409),
                            ({"step": 0.5, "rewards": {"1": 1}}, 400), ({"step": 0, "rewards": {"1": 10**400}}, 400),
                            (body | {"k": 1}, 400)):
            with pytest.raises(urllib.error.HTTPError) as error:
                post(endpoint.address, wrong, "/reward")
            assert error.value.code == code
        for deep in (b"[" * 50_000, b"{"):  # nested deeper than Python reads, and half a body
            head = {"Content-Type": "application/json"}
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(urllib.request.Request(f"http://{endpoint.address}/reward", deep, head), timeout=60)
            assert error.value.code == 400


def test_rewards_are_taken_while_prompts_hang(network, tmp_path):
    hangs, over, waiting = threading.Event(), threading.Event(), []

    def judge(prompt, completions):
        if hangs.is_set():
            waiting.append(prompt)
            over.wait(SECONDS)
        return later(prompt, completions)

    with service_of(network, tmp_path, judge, prompts=None) as service, Endpoint(service) as endpoint:
        answer = post(endpoint.address, {"prompt": "Is 1 a number?"})
        hangs.set()
        asking = [threading.Thread(target=post, args=(endpoint.address, {"prompt": "Is it?"})) for _ in range(8)]
        for thread in asking:
            thread.start()
        until(lambda: len(waiting) == 8)
        rewards = {str(row["uid"]): 0.5 for row in answer["answers"]}
        assert post(endpoint.address, {"step": answer["step"], "rewards": rewards}, "/reward")["learned"] == 2
        over.set()
        for thread in asking:
            thread.join(SECONDS)


@pytest.mark.parametrize("error, code", [(ConnectionRefusedError("no server"), 503), (ValueError("no such model"), 500),
                                         (UpstreamError("busy", away=True), 503), (UpstreamError("no such model"), 500)])
def test_a_prompt_whose_judge_fails_says_so(network, tmp_path, error, code):
    def judge(prompt, completions):
        raise error

    with service_of(network, tmp_path, judge=judge, prompts=None) as service, Endpoint(service) as endpoint:
        with pytest.raises(urllib.error.HTTPError) as found:
            post(endpoint.address, {"prompt": "Is 1 a number?"})
        assert found.value.code == code and str(error) in json.load(found.value)["error"]
        assert (found.value.headers["Retry-After"] == "1") == (code == 503)  # it is away, not broken


@pytest.mark.parametrize("hangs", ["a prompt", "the server"])
def test_an_endpoint_ends_whatever_is_under_way(tmp_path, monkeypatch, caplog, hangs):
    "A miner that is silent for longer than a stop waits must neither hide a Ctrl-C nor leave a thread behind."
    if hangs == "the server":  # which must reach this limit; else it is far away, and only what aiohttp waits for a prompt is short
        monkeypatch.setattr("prompting_nb.loop.endpoint._END", 0.2)
    begun, over, ended = threading.Event(), threading.Event(), []

    def silent(prompt):
        begun.set()
        over.wait(SECONDS)
        return "late"

    async def never():
        await asyncio.Event().wait()

    def ask():
        with pytest.raises((urllib.error.URLError, OSError)):
            post(endpoint.address, {"prompt": "Is 1 a number?"})
        ended.append(True)

    with Network([Worker("silent", silent)]) as network:
        with service_of(network, tmp_path, k=1, prompts=None) as service, pytest.raises(KeyboardInterrupt):
            with Endpoint(service) as endpoint:
                asking = threading.Thread(target=ask)
                asking.start()
                assert begun.wait(SECONDS)
                endpoint._runner._shutdown_timeout = 0.1
                if hangs == "the server":
                    endpoint._runner = SimpleNamespace(cleanup=never)
                raise KeyboardInterrupt
        assert not endpoint._thread.is_alive() and ("in an orderly way" in caplog.text) == (hangs == "the server")
        over.set()
        asking.join(SECONDS)
    assert ended and "Exception" not in caplog.text


def test_a_prompt_whose_judge_has_a_model_server_that_is_away_is_told_to_come_back(network, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"  # where nobody listens any more
    judge = OwnJudge(server_judge(OpenAISettings(base_url=url, model="m"), timeout=SECONDS, tries=1)).fitted_to([])
    with service_of(network, tmp_path, judge, prompts=None) as service, Endpoint(service) as endpoint:
        with pytest.raises(urllib.error.HTTPError) as found:
            post(endpoint.address, {"prompt": "Is 1 a number?"})
        assert found.value.code == 503 and found.value.headers["Retry-After"] == "1"
        assert "the model server cannot be reached: ConnectError" in json.load(found.value)["error"]


def test_a_body_that_does_not_arrive_is_given_up(network, tmp_path, monkeypatch):
    monkeypatch.setattr("prompting_nb.loop.endpoint._BODY", 0.3)
    head = b"POST /prompt HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
    with service_of(network, tmp_path, steps=0) as service, Endpoint(service) as endpoint:
        with socket.create_connection((endpoint.host, endpoint.port), SECONDS) as line:
            line.sendall(head)
            answer = b""
            while b"within 0.3 s" not in answer and (more := line.recv(65536)):
                answer += more
            assert answer.startswith(b"HTTP/1.1 408") and b"within 0.3 s" in answer
    assert endpoint._loop is None  # a stop does not wait for it


# Real processes


def command(*arguments):
    return [sys.executable, "-c", "import sys; from prompting_nb.cli import main; main(sys.argv[1:])", *map(str, arguments)]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    "A small reward model that was taught once, with its calibration, to be copied into validators' folders."
    from prompting_nb.loop.validator import open_judge

    folder = tmp_path_factory.mktemp("judged")
    open_judge(folder)
    return folder


@pytest.fixture
def served(tmp_path):
    "A chain in a process of its own whose blocks are turned by hand, and miners in this process."
    folder = tmp_path / "chain"
    chain = subprocess.Popen(command("chain", "--dir", folder, "--block-time", "0"), stderr=subprocess.DEVNULL)
    miners, clients = [], []
    try:
        until(lambda: find_chain(folder), "the chain")
        remote = find_chain(folder)
        assert read_token(folder)
        remote.register(local_wallet(folder / "wallets", "validator"), stake=1000.0, validator_permit=True)
        for worker in workers():
            wallet = local_wallet(folder / "wallets", worker.name)
            remote.register(wallet)
            clients.append(open_client(remote.address))
            settings = {"miner.no_set_weights": True, "axon.nonces": "memory"}
            miners.append(WorkerMiner(worker, config=settings, wallet=wallet, subtensor=clients[-1]))
            miners[-1].__enter__()
        yield remote.address, folder / "wallets"
    finally:
        for miner in miners:
            miner.stop_run_thread()
        for client in clients:
            client.close()
        chain.kill()
        chain.wait()


def validator_process(place, folder, judged, steps, prompts):
    import shutil

    address, wallets = place
    folder.mkdir(exist_ok=True)
    for name in ("judge.json", "judged.json"):
        if not (folder / name).exists():
            shutil.copy(judged / name, folder / name)
    flags = ["--dir", folder, "--prompts", prompts, "--reward", judged / "reward", "--subtensor.network", address]
    flags += ["--wallet.path", wallets, "--wallet.name", "validator", "--top-k", 2, "--timeout", 60, "--distinct"]
    flags += ["--validator.interval", 0, "--validator.save_every", 7, "--validator.steps", steps]
    return subprocess.Popen(command("validator", *flags), stdout=subprocess.DEVNULL, stderr=open(folder / "log", "ab"))


def _kills(served, judged, tmp_path, kills, after):
    "Kill a validator `kills` times at random steps; compare its choices with those of one that was left alone."
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"What is {n} plus {n + 1}?" for n in range(23)))
    chance = random.Random(7)
    stops = [0]
    for _ in range(kills):
        stops.append(stops[-1] + chance.randint(1, 9))
    last = stops[-1] + after
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert validator_process(served, whole, judged, last, prompts).wait(timeout=600) == 0
    for stop in stops[1:]:
        process = validator_process(served, parts, judged, 0, prompts)
        until(lambda: (parts / "events.jsonl").exists() and (parts / "events.jsonl").read_bytes().count(b"\n") >= stop)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert validator_process(served, parts, judged, max(last, len(events(parts)) + 1), prompts).wait(timeout=600) == 0
    one, other = events(whole), events(parts)
    assert read_about(whole)["about"]["policy"]["distinct"] is True
    assert [e["step"] for e in other] == list(range(len(other)))
    for a, b in zip(one, other):
        assert (a["prompt"], a["uids"], a["rewards"]) == (b["prompt"], b["uids"], b["rewards"]), a["step"]


@pytest.mark.slow
def test_a_killed_validator_goes_on_with_the_same_choices(served, judged, tmp_path):
    _kills(served, judged, tmp_path, kills=2, after=10)


@pytest.mark.long
def test_a_validator_that_is_killed_twenty_times(served, judged, tmp_path):
    _kills(served, judged, tmp_path, kills=20, after=50)


class Asking(threading.Thread):
    "Posts a question every half second, and keeps what became of it; registers hotkeys on the chain, and keeps what was acknowledged."

    def __init__(self, run):
        super().__init__(daemon=True)
        self.run_folder, self.ended = run, threading.Event()
        self.answered, self.reported, self.registered = {}, [], {}

    def run(self):
        number = 0
        while not self.ended.wait(0.5):
            number += 1
            prompt = f"What is {number} plus {number}?"
            try:
                found = post_prompt(self.run_folder / "validator", prompt, timeout=30)
                if found is None:  # nobody listens: the validator is being started again
                    self.reported.append((prompt, "no validator"))
                else:
                    self.answered[prompt] = found
            except (RuntimeError, OSError, ValueError) as error:
                self.reported.append((prompt, error))
            if number % 10 == 0:
                wallet = local_wallet(self.run_folder / "chain" / "wallets", f"guest-{number}")
                try:
                    chain = find_chain(self.run_folder / "chain")
                    if chain:
                        self.registered[wallet.hotkey.ss58_address] = chain.register(wallet)
                except (bt.RpcConnectionError, OSError):
                    pass  # it was not acknowledged

    def stop(self):
        self.ended.set()
        self.join(SECONDS)


def averages_of(folder, steps=None):
    "The moving averages that the events of a validator lead to."
    said = {}
    for event in events(folder)[:steps]:
        for hotkey, reward in zip(event["hotkeys"], event["rewards"]):
            reward = min(max(reward, 0.0), 1.0)
            old = said.get(hotkey, reward)
            said[hotkey] = old + 0.1 * (reward - old)
    return said


def seen_to_end(log, step):
    "Whether who looks on has seen a step, and after it the end of the validator."
    *_, last = log.read_text().splitlines()
    number = re.search(r"; step (\d+), ", last)
    return ("no validator runs" in last or "it was killed" in last) and number and int(number[1]) >= step


def _subnet(tmp_path, judged, miners, seconds, every):
    "Kill a random process now and then; the subnet goes on, loses nothing, and its events have no gap."
    run = tmp_path / "run"
    flags = ["--miners", miners, "--dir", run, "--reward", judged / "reward", "--block-time", 1, "--tempo", 10]
    log = open(tmp_path / "log", "wb")
    shown = open(tmp_path / "watched", "wb")
    watching = subprocess.Popen(command("watch", "--dir", run, "--every", "0.2"), stdout=shown)
    until(lambda: (tmp_path / "watched").stat().st_size, "the first look")
    subnet = subprocess.Popen(command("subnet", *flags), stdout=log, stderr=log)
    told = lambda: f"; the log ends with\n{(tmp_path / 'log').read_text(errors='replace')[-5000:]}"
    listed = lambda: {e["name"]: e for e in json.loads((run / "processes.json").read_text())}
    steps = lambda: len(events(run / "validator")) if (run / "validator" / "events.jsonl").exists() else 0
    chance, healed, asking = random.Random(3), [], Asking(run)
    try:
        until(lambda: steps() >= 3, "the first steps")
        names = ["chain", "validator", *(f"miner-{n + 1}" for n in range(miners))]
        assert sorted(listed()) == sorted(names)
        end, killed = time.monotonic() + seconds, 0
        queue = ["chain", "validator", "miner-1"]
        asking.start()
        while time.monotonic() < end or killed < 3:  # a slow machine heals fewer in the time
            begun, name = time.monotonic(), queue.pop(0) if queue else chance.choice(names)
            pid = listed()[name]["pid"]
            os.kill(pid, signal.SIGKILL)
            killed += 1
            until(lambda: listed()[name]["pid"] != pid, f"a new {name}")
            before = steps()
            until(lambda: steps() >= before + 2, f"steps after {name} was killed")
            healed.append((name, round(time.monotonic() - begun, 1)))
            time.sleep(max(0.0, begun + every - time.monotonic()))
        until(lambda: asking.answered, "an answer")
        asking.stop()
        assert killed >= 3
        found = events(run / "validator")
        assert [e["step"] for e in found] == list(range(len(found)))
        # every question was answered or reported, and an answer is in the events as it was given
        said = {(e["step"], e["prompt"]): e for e in found}
        for prompt, answer in asking.answered.items():
            event = said[answer["step"], prompt]
            assert event["completions"] == [a["completion"] for a in answer["answers"]]
        # what the chain acknowledged is there
        with closing(find_chain(run / "chain").client()) as client:
            there = {n.hotkey: n.uid for n in client.subnets.metagraph(1).neurons}
        assert asking.registered.items() <= there.items()
        pids = [entry["pid"] for entry in listed().values()]
        subnet.send_signal(signal.SIGKILL)
        subnet.wait()
        died, deadline = time.monotonic(), time.monotonic() + 60  # five seconds on an idle machine
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        print(f"healed: {healed}; all had ended {time.monotonic() - died:.1f} s after the supervisor;", end=" ")
        print(f"{len(asking.answered)} answers, {len(asking.reported)} reports, {len(asking.registered)} guests, {len(found)} steps")
        assert not any(map(alive, pids))
        until(lambda: seen_to_end(tmp_path / "watched", found[-1]["step"]), "the end, to who looks on,")
        watching.send_signal(signal.SIGINT)
        status, seen = watching.wait(SECONDS), (tmp_path / "watched").read_text()  # what a process saw that only looks into the folder
        lines = seen.splitlines()
        assert status == 0 and (lines[0].startswith("waiting: ") or "no validator" in lines[0])
        assert any(line.startswith("the validator runs") for line in lines)
        assert "no validator runs" in lines[-1] or "it was killed" in lines[-1]
        assert int(re.search(r"; step (\d+), ", lines[-1])[1]) >= found[-1]["step"]
        assert "begun anew" not in seen and "no events" not in lines[-1]
        saved = read_about(run / "validator")
        assert saved["averages"] == averages_of(run / "validator", saved["step"]) and saved["step"] > 3
    except AssertionError as error:
        raise AssertionError(f"{error}{told()}") from None
    finally:
        asking.ended.set()
        for process in (subnet, watching):
            process.kill()
            process.wait()
        shown.close()
        log.close()
    return run


@pytest.mark.slow
def test_a_subnet_heals(judged, tmp_path):
    run = _subnet(tmp_path, judged, miners=3, seconds=15, every=0)
    # the saved gate answers where no validator runs
    out = subprocess.run(command("route", "What is 6 times 7?", "--dir", run, "--json"), capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert len(json.loads(out.stdout)["answers"]) == 3


@pytest.mark.long
def test_a_subnet_heals_for_ten_minutes(judged, tmp_path):
    _subnet(tmp_path, judged, miners=8, seconds=600, every=20)


@pytest.mark.long
def test_a_chain_and_then_all_miners_hang_for_minutes(judged, tmp_path):
    "Processes that are stopped, and not ended: connections are accepted, and nothing is answered."
    run, log = tmp_path / "run", open(tmp_path / "log", "wb")
    flags = ["--miners", 3, "--dir", run, "--reward", judged / "reward", "--block-time", 1, "--tempo", 10]
    subnet = subprocess.Popen(command("subnet", *flags), stdout=log, stderr=log)
    steps = lambda: len(events(run / "validator")) if (run / "validator" / "events.jsonl").exists() else 0
    pids = lambda: {e["name"]: e["pid"] for e in json.loads((run / "processes.json").read_text())}

    def ready():
        address = json.loads((run / "validator" / "endpoint.json").read_text())["address"]
        connection = http.client.HTTPConnection(address, timeout=30)
        try:
            connection.request("GET", "/ready")
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    try:
        until(lambda: steps() >= 3, "the first steps")
        started = pids()
        os.kill(started["chain"], signal.SIGSTOP)
        before, end = steps(), time.monotonic() + 150
        until(lambda: ready()[0] == 503 and "no news of the chain" in ready()[1], "a word of the chain at /ready")
        while time.monotonic() < end:
            time.sleep(1)
        assert steps() > before + 60  # it goes on with what it knows
        os.kill(started["chain"], signal.SIGCONT)
        until(lambda: ready()[0] == 200, "readiness")
        written = (run / "logs" / "validator.log").read_text().count("weights of")
        until(lambda: (run / "logs" / "validator.log").read_text().count("weights of") > written, "weights")
        miners = [pid for name, pid in started.items() if name.startswith("miner")]
        for pid in miners:
            os.kill(pid, signal.SIGSTOP)
        before, end = steps(), time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(1)
        assert steps() > before
        assert all(status in (408, 503) for event in events(run / "validator")[before + 2:] for status in event["statuses"])
        for pid in miners:
            os.kill(pid, signal.SIGCONT)
        until(lambda: 200 in events(run / "validator")[-1]["statuses"], "an answer")
        found = events(run / "validator")
        assert [e["step"] for e in found] == list(range(len(found)))
        assert pids() == started  # nobody died of it
    except AssertionError as error:
        raise AssertionError(f"{error}; {(run / 'logs' / 'validator.log').read_text()[-3000:]}") from None
    finally:
        for pid in pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        subnet.terminate()
        subnet.wait(SECONDS)
        log.close()
