"""A judge that compares: both orders, cache, budget and cost; behind a server on loopback that is busy, slow, broken or gone."""

import json
import shelve
import threading
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from prompting_nb.baseminer import miners
from prompting_nb.baseminer.miners import ChatClient, OpenAISettings, UpstreamError
from prompting_nb.config import InputError
from prompting_nb.loop.judging import server_judge
from prompting_nb.reward import pairwise
from prompting_nb.reward.evaluation import evaluate
from prompting_nb.reward.pairwise import PairwiseJudge, read_verdict
from prompting_nb.reward.preferences import Ranking
from prompting_nb.validators.judge import reward_answers

ANSWERS = ["bb", "dddd", "a", "ccc"]
RANKING = Ranking("which?", ANSWERS, [2.0, 4.0, 1.0, 3.0])


def longer(messages):
    text = messages[-1]["content"]
    first, second = (text.split(f"[Answer {name}]\n")[1].split("\n[")[0] for name in "AB")
    return "[[A]]" if len(first) > len(second) else "[[B]]"


def test_a_judge_orders_answers_and_can_be_evaluated():
    judge = PairwiseJudge(longer)
    assert judge.score("which?", ANSWERS).flatten().tolist() == pytest.approx([1 / 3, 1, 0, 2 / 3])
    assert judge.report()["questions"] == 12 and judge.report()["pairs"] == 6
    assert evaluate(judge, [RANKING]).accuracy == 1.0
    assert judge.report()["questions"] == 12 and judge.report()["cached"] == 12


@pytest.mark.parametrize("answer", ["[[A]]", "[[B]]", "I cannot say."])
def test_what_does_not_depend_on_the_answers_decides_nothing(answer):
    judge = PairwiseJudge(lambda messages: answer)
    assert judge.score("which?", ANSWERS).flatten().tolist() == [0.5] * 4
    assert judge.report()["by_order"] + judge.report()["unread"] / 2 == 6


def test_a_budget_is_kept_and_nothing_is_lost():
    judge = PairwiseJudge(longer, budget=3)
    judge.score("which?", ANSWERS[:2])
    with pytest.raises(InputError, match="4 questions needed, 1 left of"):
        judge.score("which?", ANSWERS[:3])
    assert judge.report()["questions"] == 2  # none of the four was asked
    judge.budget = None
    judge.score("which?", ANSWERS[:3])
    assert judge.report()["questions"] == 6


def test_what_is_kept_has_an_end(monkeypatch):
    "Neither the texts that were compared stay, nor the answers of last month."
    monkeypatch.setattr(pairwise, "_KEPT", 1000)
    judge = PairwiseJudge(longer)
    for n in range(20):
        assert judge.score(f"{n}?", ["x" * 5000, "y" * 50, "z"]).flatten().tolist() == [1.0, 0.5, 0.0]
        assert judge.score(f"{n}?", ["x" * 5000, "z"]).flatten().tolist() == [1.0, 0.0]
    assert judge.report()["questions"] >= 120 and 1 <= len(judge.cache) <= 4
    assert sum(map(len, judge.cache)) + sum(map(len, judge.cache.values())) < 1000
    talkative = PairwiseJudge(lambda messages: "well, " * 1000 + longer(messages))
    assert talkative.score("which?", ANSWERS).flatten().tolist() == PairwiseJudge(longer).score("which?", ANSWERS).flatten().tolist()


def test_a_cache_of_ones_own_is_used(tmp_path):
    with shelve.open(str(tmp_path / "answers")) as cache:
        PairwiseJudge(longer, cache=cache).score("which?", ANSWERS)
        again = PairwiseJudge(longer, cache=cache)
        again.score("which?", ANSWERS)
        assert again.report()["questions"] == 0 and len(cache) == again.report()["cached"] == 12


def test_an_error_keeps_the_answers_before_it():
    calls = []

    def ask(messages):
        calls.append(messages)
        if len(calls) == 3:
            raise UpstreamError("busy")
        return longer(messages)
    judge = PairwiseJudge(ask)
    with pytest.raises(UpstreamError):
        judge.score("which?", ANSWERS[:3])
    judge.score("which?", ANSWERS[:3])
    assert len(calls) == 7 and judge.report()["questions"] == 6


def test_the_last_verdict_counts():
    assert [read_verdict(text) for text in ("[[A]] ... [[B]]", "A", "A and B", "", "[[ C ]]")] == [0.0, 1.0, None, None, 0.5]


@pytest.fixture
def server():
    "A server whose answers are taken from a list: (status, body, seconds for each byte, perhaps headers)."
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((asked, self.headers.get("Authorization")))
            status, body, pause, *head = answers.pop(0) if answers else (200, says(longer(asked["messages"])), 0)
            self.send_response(status)
            for name, value in (head[0] if head else {}).items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for byte in body.encode() if pause else [None]:
                    self.wfile.write(bytes([byte]) if pause else body.encode())
                    self.wfile.flush()
                    time.sleep(pause)
            except OSError:
                pass

        def log_message(self, *args):
            pass
    seen, answers = [], []
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}/v1", answers, seen
    made.shutdown()
    made.server_close()


def says(text):
    return json.dumps({"choices": [{"message": {"content": text}}]})


def test_a_server_judges(server):
    address, answers, seen = server
    answers += [(503, '{"error": {"message": "busy"}}', 0), (429, "slow down", 0)]
    judge = server_judge(OpenAISettings(base_url=address, model="m", api_key="key"), threads=3, pause=0.01)
    assert evaluate(judge, [RANKING]).accuracy == 1.0
    assert len(seen) == 14 and {key for _, key in seen} == {"Bearer key"} and not any(asked["stream"] for asked, _ in seen)


@pytest.mark.parametrize("answer, reason, tries", [
    ((401, '{"error": {"message": "no key"}}', 0), "401: no key", 1),
    ((200, "{", 0), "not the JSON", 1), ((200, "{}", 0), "without a choice", 1),
    ((500, "x", 0), "500", 3), ((200, says("much too slow"), 0.05), "ReadTimeout", 3)])
def test_a_server_that_fails(server, answer, reason, tries):
    address, answers, seen = server
    answers += [answer] * 3
    with pytest.raises(UpstreamError, match=reason) as found:
        timeout = 0.3 if reason == "ReadTimeout" else 20.0
        ChatClient(OpenAISettings(base_url=address, model="m")).complete([], timeout=timeout, tries=3, pause=0.01)
    deadline = time.monotonic() + 60
    while len(seen) < tries and time.monotonic() < deadline:
        time.sleep(0.01)  # the server may read a request after the client has given it up
    assert len(seen) == tries and found.value.away == (tries > 1)


@pytest.mark.parametrize("wish, waited", [
    ("7", 7), ("999", 20), ("", 1), ("soon", 1), ("-3", 1), ("Wed, 21 Oct 2015 07:28:00 GMT", 1)])
def test_a_busy_server_is_asked_when_it_wishes(server, monkeypatch, wish, waited):
    address, answers, seen = server
    answers += [(429, "slow down", 0, {"Retry-After": wish}), (200, says("ok"), 0)]
    slept = []
    monkeypatch.setattr(miners, "time", SimpleNamespace(sleep=slept.append, monotonic=time.monotonic, time=time.time))
    chat = ChatClient(OpenAISettings(base_url=address, model="m"))
    assert chat.complete([], timeout=20.0) == "ok" and len(seen) == 2 and slept == [waited]


def test_a_wish_may_be_a_date():
    assert 30 < miners._wait(format_datetime(datetime.now(timezone.utc) + timedelta(seconds=90), usegmt=True)) <= 90


def test_a_server_that_is_gone():
    chat = ChatClient(OpenAISettings(base_url="http://127.0.0.1:9/v1", model="m"))
    with pytest.raises(UpstreamError, match="cannot be reached: ConnectError"):
        chat.complete([], tries=2, pause=0.01)


def test_answers_of_a_prompt_are_compared_wherever_they_stand():
    together = PairwiseJudge(longer).score("which?", ANSWERS).flatten().tolist()
    asked = [prompt for _ in ANSWERS for prompt in ("which?", "who?")]
    apart = PairwiseJudge(longer).score(asked, [text for one in ANSWERS for text in (one, one + "x")]).flatten().tolist()
    assert apart[::2] == apart[1::2] == together


def test_prompts_and_answers_may_be_messages():
    messages, said = [{"role": "user", "content": "which?"}], [{"role": "assistant", "content": "dddd"}]
    judge = PairwiseJudge(longer)
    assert judge.score([messages, "which?"], [said, "a"]).flatten().tolist() == [1.0, 0.0]
    assert judge.compare([(messages, said, "a")]) == [1.0] and judge.report()["questions"] == 2
    for wrong in (["a", None], ["a", 3], ["a", [{"role": "assistant"}]]):
        with pytest.raises(InputError, match="a completion cannot be judged"):
            judge.score("which?", wrong)


def test_a_miner_that_is_silent_earns_nothing_and_is_not_asked_about():
    for answers, rewards in ((["bb", None, "dddd"], [0.0, 0.0, 1.0]), (["bb", None], [0.5, 0.0]), ([None, None], [0.0, 0.0])):
        judge = PairwiseJudge(longer)
        assert reward_answers(judge, "which?", answers, ["5"] * len(answers)) == (rewards, [], "")
        assert judge(["which?"] * len(answers), answers).flatten().tolist() == rewards
        assert judge.report()["questions"] == 2 * (len(answers) == 3)


def test_as_many_questions_wait_as_there_are_threads():
    barrier = threading.Barrier(6, timeout=120)  # however few cores torch may use

    def ask(messages):
        barrier.wait()
        return longer(messages)
    assert PairwiseJudge(ask, threads=6).score("which?", ANSWERS[:3]).flatten().tolist() == [0.5, 1.0, 0.0]
    with pytest.raises(InputError, match="threads is 0"):
        PairwiseJudge(ask, threads=0)
