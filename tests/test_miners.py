"""The miners that are ready to run: language models of several families, a local server with OpenAI's API, the command."""

import argparse
import asyncio
import inspect
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from prompting_nb.baseminer.command import make_miner, miner_parser
from prompting_nb.baseminer.miners import (
    MINERS, LanguageModel, OpenAICompatibleMiner, ReplayMiner, TransformersMiner, UpstreamError, _Request, tokenize,
)
from prompting_nb.baseminer.programs import ProcessSettings, Program, ProgramFailed
from prompting_nb.baseminer.batching import Batcher
from prompting_nb.baseminer.miner import Miner
from prompting_nb.config import InputError
from prompting_nb.network.chain import EmbeddedChain, make_wallet
from prompting_nb.network.dendrite import Dendrite
from prompting_nb.pretrained import word_tokenizer
from prompting_nb.protocol import Prompting

SECONDS = 60
PROGRAM = "from prompting_nb.cli import main; main()"
MINER, VALIDATOR = make_wallet("miner"), make_wallet("validator")


@pytest.fixture
def place():
    chain = EmbeddedChain()
    chain.register(MINER)
    chain.register(VALIDATOR, stake=10.0, validator_permit=True)
    with chain.client() as client:
        yield dict(wallet=MINER, subtensor=client)


@pytest.mark.parametrize("kind", MINERS.values())
def test_a_miner_can_be_read_in_one_go(kind):
    assert len(inspect.getsource(kind).splitlines()) < 60
    assert kind.__mro__[1:] == Miner.__mro__


def test_the_command_knows_every_flag_of_every_miner():
    known = miner_parser()._option_string_actions
    for name, kind in MINERS.items():
        parser = argparse.ArgumentParser(add_help=False)
        kind.add_args(parser)
        flags = set(parser._option_string_actions)
        assert flags and flags <= set(known), name
        assert {flag.split(".")[0] for flag in flags} == {f"--{name}"}


# Language models


def make_model(family, folder):
    "A random model of a family with a byte-level tokenizer, which knows every character."
    import transformers as hf
    from toys import byte_tokenizer, save_model

    tokenizer = byte_tokenizer()
    size = dict(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, initializer_range=0.5)
    configs = {
        "gpt2": lambda: hf.GPT2Config(**size, n_positions=128, n_embd=32, n_layer=2, n_head=2),
        "gpt_neo": lambda: hf.GPTNeoConfig(**size, max_position_embeddings=128, hidden_size=32, num_layers=2, num_heads=2,
                                           attention_types=[[["global", "local"], 1]], window_size=16),
        "llama": lambda: hf.LlamaConfig(**size, max_position_embeddings=128, hidden_size=32, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=1, intermediate_size=64),
    }
    save_model(folder, configs[family](), tokenizer, kind=hf.AutoModelForCausalLM)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("gpt2", "gpt_neo", "llama"):
        make_model(family, folder / family)
    return folder


def transformers_miner(models, family, place, **settings):
    settings = {"model_name": str(models / family), "max_new_tokens": 24, **settings}
    return TransformersMiner({"transformers": settings, "miner.no_set_weights": True}, **place)


TEXTS = ["Hi", "What is the meaning of life?", "Wie heißt du? 😀", "a" * 300]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama"])
def test_an_answer_does_not_depend_on_who_else_is_in_the_batch(models, family, place):
    miner = transformers_miner(models, family, place)
    alone = [miner.language_model.generate([_Request(Prompting.ask(text))])[0] for text in TEXTS]
    assert miner.language_model.generate([_Request(Prompting.ask(text)) for text in TEXTS]) == alone
    assert len(set(alone)) > 1 and all(alone)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_pieces_are_the_answer(models, family, place):
    "A random model over bytes writes nonsense that cuts through characters; the pieces must not show it."
    miner = transformers_miner(models, family, place, max_new_tokens=60)

    async def pieces(text):
        return [piece async for piece in miner.prompt(Prompting.ask(text))]

    for text in TEXTS:
        said = asyncio.run(pieces(text))
        assert "".join(said) == miner._prompt(Prompting.ask(text)).completion and len(said) > 1


def test_requests_that_wait_become_one_batch(models, place):
    miner, sizes, go, begun = transformers_miner(models, "gpt2", place), [], threading.Event(), threading.Event()

    def work(requests):
        sizes.append(len(requests))
        begun.set()
        go.wait(SECONDS)
        return LanguageModel.generate(miner.language_model, requests)

    miner.language_model.batcher = Batcher(work, 8)
    with miner, Dendrite(VALIDATOR, allow_private=True) as dendrite, ThreadPoolExecutor(8) as callers:
        ask = lambda number: dendrite.query([miner.axon], Prompting.ask(f"Question {number}", timeout=SECONDS))[0]
        asked = [callers.submit(ask, 0)]
        assert begun.wait(SECONDS)
        asked += [callers.submit(ask, number) for number in range(1, 7)]
        while len(miner.language_model.batcher._waiting) < 6:
            pass
        go.set()
        assert [future.result().dendrite.status_code for future in asked] == [200] * 7
    assert sizes == [1, 6]


def test_a_caller_who_leaves_frees_the_model(models, place):
    miner = transformers_miner(models, "gpt2", place, max_new_tokens=100)
    lengths, done = [], threading.Event()

    def work(requests):
        texts = LanguageModel.generate(miner.language_model, requests)
        lengths.extend(len(text) for text in texts)
        done.set()
        return texts

    async def asking():
        stream = miner.prompt(Prompting.ask("Hi"))
        await anext(stream)
        await stream.aclose()

    full = len(miner._prompt(Prompting.ask("Hi")).completion)
    miner.language_model.batcher = Batcher(work)
    asyncio.run(asking())
    assert done.wait(SECONDS) and lengths[0] < full


# A server with OpenAI's API


@contextmanager
def served(handle):
    "A server whose only path is answered by `handle(request)`, as its base url."
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import Route

    app = Starlette(routes=[Route("/v1/chat/completions", handle, methods=["POST"])])
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=0))
    server.install_signal_handlers = lambda: None
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(SECONDS)


def remote_miner(url, place, **settings):
    return OpenAICompatibleMiner({"openai": {"base_url": url, "model": "m", **settings}}, **place)


def streaming(*chunks):
    from starlette.responses import StreamingResponse

    async def body():
        for chunk in chunks:
            yield chunk
            await asyncio.sleep(0)

    async def handle(request):
        return StreamingResponse(body(), media_type="text/event-stream")

    return handle


def event(text):
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}}]}, ensure_ascii=False)}\n\n".encode()


async def collect(miner, timeout=10.0):
    return [piece async for piece in miner.prompt(Prompting.ask("Hi", timeout=timeout))]


def test_events_may_be_cut_anywhere(place):
    whole = event("für\n\n") + b": a comment\r\n\r\n" + event(None) + event("5 😀") + b"data: [DONE]\n\n"
    with served(streaming(*(whole[i : i + 1] for i in range(len(whole))))) as url:
        assert asyncio.run(collect(remote_miner(url, place))) == ["für\n\n", "5 😀"]


def test_a_stream_that_turns_into_an_error_says_so(place):
    with served(streaming(event("Once"), b'data: {"error": {"message": "out of memory"}}\n\n')) as url:
        with pytest.raises(UpstreamError):
            asyncio.run(collect(remote_miner(url, place)))


@pytest.mark.parametrize("end", [b"", b'data: {"choices": [], "usage": {"total_tokens": 7}}\n\n'])
def test_a_stream_that_stops_in_the_middle_is_no_answer(place, end):
    with served(streaming(event("Once upon"), end)) as url:
        with pytest.raises(UpstreamError, match="before it was complete"):
            asyncio.run(collect(remote_miner(url, place)))


def test_answers_as_other_servers_write_them(place):
    from starlette.responses import JSONResponse

    last = {"choices": [{"delta": {"content": " end"}, "finish_reason": "stop"}], "error": None}
    with served(streaming(event("The"), f"data: {json.dumps(last)}\n\n".encode())) as url:  # without [DONE]
        assert asyncio.run(collect(remote_miner(url, place))) == ["The", " end"]
    parts = [{"type": "text", "text": "four"}, {"type": "image"}, {"type": "text", "text": "ty-two"}]
    for status, body, expected in (
        (200, {"choices": [{"message": {"content": parts}}], "error": None}, "fourty-two"),
        (200, {"choices": [{"message": {"content": 42}}]}, "without a choice"),
        (404, {"error": "model 'm' not found"}, "404: model 'm' not found"),
        (400, {"object": "error", "message": "too long"}, "400: too long"),
        (422, {"detail": "no messages"}, "422: no messages"),
        (422, {"detail": [1]}, "422: the answer is not the JSON"),
        (500, ["no"], "500: the answer is not the JSON"),
    ):

        async def handle(request, status=status, body=body):
            return JSONResponse(body, status)

        with served(handle) as url:
            if status == 200 and "choice" not in expected:
                assert asyncio.run(collect(remote_miner(url, place))) == [expected]
            else:
                with pytest.raises(UpstreamError, match=expected):
                    asyncio.run(collect(remote_miner(url, place)))


def test_an_answer_without_end_is_given_up(place):
    from starlette.responses import StreamingResponse

    async def handle(request):
        async def body():
            while True:
                yield b" " * 65536
                await asyncio.sleep(0)

        return StreamingResponse(body(), media_type="application/json")

    with served(handle) as url:
        miner = remote_miner(url, place)
        with pytest.raises(UpstreamError, match="answered more than 4000000 bytes"):
            asyncio.run(collect(miner))
        with pytest.raises(UpstreamError, match="answered more than 4000000 bytes"):
            miner.chat.complete([], timeout=SECONDS)


def test_a_key_that_no_header_can_carry_is_refused_at_once_and_not_shown(place):
    for key in ("sk-\u201cquoted\u201d", "sk-one\nsk-two"):
        with pytest.raises(InputError, match="copy it again") as raised:
            remote_miner("http://127.0.0.1:9/v1", place, api_key=key)
        assert "sk-" not in str(raised.value)
    assert remote_miner("http://127.0.0.1:9/v1", place, api_key=" sk-1\n").chat.headers == {"Authorization": "Bearer sk-1"}


def test_what_the_settings_say_is_what_is_asked(place):
    heard = []

    async def handle(request):
        from starlette.responses import JSONResponse

        heard.append((dict(request.headers), await request.json()))
        return JSONResponse({"choices": [{"message": {"content": "ok"}}]})

    with served(handle) as url:
        miner = remote_miner(url, place, api_key="key", max_tokens=7, temperature=0.25)
        assert miner._prompt(Prompting(roles=["system", "user"], messages=["s", "u"])).completion == "ok"
    headers, asked = heard[0]
    assert headers["authorization"] == "Bearer key"
    assert asked == {"model": "m", "max_tokens": 7, "temperature": 0.25, "stream": True,
                     "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}


def test_a_slow_server_does_not_block_others_and_hears_when_the_caller_leaves(place):
    left, arrived = threading.Event(), threading.Event()

    async def handle(request):
        from starlette.responses import JSONResponse

        word = (await request.json())["messages"][-1]["content"]
        if word == "slow":
            arrived.set()
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
            left.set()
        return JSONResponse({"choices": [{"message": {"content": word}}]})

    with served(handle) as url, remote_miner(url, place) as miner, Dendrite(VALIDATOR, allow_private=True) as dendrite:
        with ThreadPoolExecutor(1) as other, Dendrite(VALIDATOR, allow_private=True) as leaving:
            slow = other.submit(leaving.query, [miner.axon], Prompting.ask("slow", timeout=SECONDS))
            assert arrived.wait(SECONDS)
            quick = [dendrite.query([miner.axon], Prompting.ask(f"quick {i}"))[0].completion for i in range(12)]
            assert not slow.done() and quick == [f"quick {i}" for i in range(12)]
            assert not left.is_set()
            leaving.close()
            assert isinstance(slow.exception(SECONDS), RuntimeError)
        assert left.wait(SECONDS)


@pytest.mark.parametrize("first", [True, False], ids=["a kept connection", "a new one, each time"])
def test_a_connection_that_the_model_server_closed_costs_no_answer(place, first):
    "It answers one request on each connection, or none, and hangs up when the next one comes."
    body = json.dumps({"choices": [{"message": {"content": "ok"}}]}).encode()
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    seen = []

    def read(line):
        "Read a request as a whole: closed with unread bytes, a connection would be reset."
        found = b""
        while not found.endswith(b"}") and (more := line.recv(65536)):
            found += more
        return found

    def serve(line):
        with line:
            if first and read(line):
                line.sendall(answer)
            read(line)

    def accept():
        with suppress(OSError):
            while True:
                line, _ = server.accept()
                seen.append(line)
                threading.Thread(target=serve, args=(line,), daemon=True).start()

    async def three(miner):
        return [await collect(miner) for _ in range(3)]

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        miner = remote_miner(f"http://127.0.0.1:{server.getsockname()[1]}/v1", place)
        if first:
            assert asyncio.run(three(miner)) == [["ok"]] * 3 and len(seen) == 3
        else:
            with pytest.raises(UpstreamError, match="RemoteProtocolError"):
                asyncio.run(three(miner))
            assert len(seen) == 2


def test_the_key_is_in_no_message(place):
    async def handle(request):
        from starlette.responses import JSONResponse

        return JSONResponse({"error": {"message": "wrong key"}}, 401)

    with served(handle) as url, remote_miner(url, place, api_key="sk-very-secret") as miner:
        with Dendrite(VALIDATOR, allow_private=True) as dendrite:
            answer, = dendrite.query([miner.axon], Prompting.ask("Hi"))
    assert answer.dendrite.status_code == 500 and "secret" not in str(answer)


# The command


def start(*flags):
    "The command in a process of its own, and the port on which it listens."
    command = [sys.executable, "-c", PROGRAM, "miner", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    match = re.search(r"listens on 127\.0\.0\.1:(\d+)", line)
    assert match, line + process.communicate(timeout=SECONDS)[1]
    return process, int(match[1])


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_orderly(end):
    # a shell's background jobs ignore Ctrl-C, and so would their children
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process, port = start("--miner.kind", "template")
    signal.signal(signal.SIGINT, before)
    try:
        target = type("Target", (), {"hotkey": make_wallet("default").hotkey.ss58_address, "axon": f"127.0.0.1:{port}"})
        with Dendrite(VALIDATOR, allow_private=True) as dendrite:
            answer, = dendrite.query([target], Prompting.ask("Hi"))
        assert answer.completion == "The meaning of life is 42.", answer.dendrite
        process.send_signal(end)
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "stopped\n"), err
    assert "Traceback" not in err
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-c", PROGRAM, "miner", "--axon.port", str(taken.getsockname()[1])]
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "the port is in use" in run.stderr, run.stderr


def test_the_environment_counts():
    command = [sys.executable, "-c", PROGRAM, "miner", "--ask", "Hi"]
    environment = {**os.environ, "PROMPTING_NB_TEMPLATE__COMPLETION": "Good day."}
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    assert run.stdout.splitlines()[-1] == "Good day." and run.returncode == 0, run.stderr


@pytest.mark.parametrize("written", ["flag", "file"])
def test_an_unknown_setting_ends_the_command_with_status_2(written, tmp_path):
    (tmp_path / "my.yaml").write_text("miner:\n  blacklist:\n    quotaa: 5\n")
    flags = {"flag": ["--miner.blacklist.quotaa", "5"], "file": ["--config", str(tmp_path / "my.yaml")]}[written]
    command = [sys.executable, "-c", PROGRAM, "miner", "--ask", "Hi", *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "miner.blacklist.quotaa" in run.stderr and "nearest is miner.blacklist.quota" in run.stderr
    assert "Traceback" not in run.stderr


def test_the_help_is_grouped_with_choices_and_defaults():
    shown = miner_parser().format_help()
    for heading in ("Settings that every miner has:", "The chain:", "The wallet on disk:", "The server:",
                    "Whom to serve, and how often:", "Whom to serve first:", *(f"--miner.kind {name}:" for name in MINERS)):
        assert f"\n{heading}\n" in shown, heading
    words = " ".join(shown.split())
    assert "{template,replay,retrieval,transformers,openai,process}" in words and "default: 7200" in words
    for flag in ("--miner.blacklist.quota", "--axon.port", "--netuid", "--transformers.batch"):
        assert f"{flag} " in shown, flag


def test_settings_of_other_kinds_are_not_handed_to_a_miner():
    settings = miner_parser().parse_args(["--miner.kind", "template", "--wallet.name", "me"])
    config = make_miner(settings).config
    assert set(vars(config)) == {"netuid", "subtensor", "wallet", "axon", "miner", "template"}
    assert "kind" not in config.miner


def test_a_setting_of_another_kind_is_said_to_have_no_effect(caplog):
    make_miner(miner_parser().parse_args(["--replay.file", "recorded.jsonl", "--transformers.batch", "2"]))
    assert [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()] == [
        "--replay.file has no effect: it is for --miner.kind replay, and the kind is template",
        "--transformers.batch has no effect: it is for --miner.kind transformers, and the kind is template",
    ]
    caplog.clear()
    make_miner(miner_parser().parse_args(["--template.completion", "Good day."]))
    assert "no effect" not in caplog.text


def test_recordings_of_one_prompt_are_counted(place, tmp_path, caplog):
    rows = [{"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2"}, {"prompt": "a", "completion": "3"}]
    (tmp_path / "recorded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    miner = ReplayMiner({"replay.file": str(tmp_path / "recorded.jsonl")}, **place)
    assert miner.recordings == {"a": "3", "b": "2"}
    assert "1 of 3 recordings in" in caplog.text and "are left out" in caplog.text


def test_conversations_that_are_cut_are_counted(caplog):
    tokenizer = word_tokenizer(["[PAD]", "a", "b"], pad_token="[PAD]")
    assert tokenize(["a b a b a b", "a"], tokenizer, 4)["input_ids"].tolist() == [[1, 2, 1, 2], [0, 0, 0, 1]]
    assert "1 of 2 conversations lose their beginning: the model reads 4 tokens" in caplog.text
    caplog.clear()
    tokenize(["a b a b", "a"], tokenizer, 4)
    assert "lose" not in caplog.text


KEPT = """
import json, sys, time
print("%s", flush=True)
for line in sys.stdin:
    time.sleep(0.2)
    for _ in range(%d):
        print(json.dumps({"completion": json.loads(line)["prompt"][::-1]}), flush=True)
"""


def test_a_late_line_of_a_kept_program_answers_no_other_prompt(caplog):
    "A banner, or an answer too many, would move every answer to the prompt after it."
    said = []
    for banner, times in (("loading", 1), ('{\\"completion\\": \\"ready\\"}', 2)):
        command = shlex.join([sys.executable, "-c", KEPT % (banner, times)])
        program = Program(ProcessSettings(command=command, keep=True))
        for prompt in ("ab", "cd"):
            try:
                said.append(program.answer(Prompting.ask(prompt, timeout=30)))
            except ProgramFailed as error:
                said.append(str(error))
            end = time.monotonic() + SECONDS
            while prompt == "ab" and program._kept and program._kept.lines.qsize() < 2:  # what is too many has yet to come
                assert time.monotonic() < end
                time.sleep(0.01)
        program.close()
    assert said[:2] == ['the program did not write {"completion": text}: loading'] * 2
    assert said[3] == "dc" and "lines more than it was asked for" in caplog.text


@pytest.mark.parametrize("command, keep, says", [
    ("yes", False, "the program wrote more than 1000000 bytes"),
    ("cat /dev/zero", True, "the program did not write"),
    ("yes", True, "the program did not write"),
    ("true", False, "the program gave no answer"),  # although the prompt is longer than a pipe
    ("sh -c 'setsid sleep 20 & echo hi'", False, "the program took too long"),  # the pipe stays open
])  # fmt: skip
def test_a_program_that_writes_too_much_or_reads_nothing(command, keep, says):
    program, began = Program(ProcessSettings(command=command, keep=keep)), time.monotonic()
    with pytest.raises(ProgramFailed, match=says):
        program.answer(Prompting.ask("word " * 40_000, timeout=2.0 if "sleep" in command else 30.0))
    program.close()
    assert time.monotonic() - began < 15
