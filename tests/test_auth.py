"""Authentication: what a request must prove, how long its nonce is known, and which answers count as the miner's."""

import logging
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bittensor import http_auth

from prompting_nb.network import auth
from prompting_nb.network.auth import (
    SIGNATURE,
    FileNonces,
    Gatekeeper,
    MemoryNonces,
    Refusal,
    answer_fits,
    sign_answer,
    sign_request,
)
from prompting_nb.network.chain import make_wallet
from prompting_nb.protocol import Terminal

MINER, VALIDATOR = make_wallet("miner"), make_wallet("validator")
ME, CALLER = MINER.hotkey.ss58_address, VALIDATOR.hotkey.ss58_address
SECOND = 10**9
START = 1_700_000_000 * SECOND
EARLY = "StaleRequest: signed before this miner began to remember what it accepted"
BODY = b'{"roles": ["user"], "messages": ["hello"]}'


class Clock:
    def __init__(self, now=START):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["memory", "file"])
def nonces(request, clock, tmp_path):
    store = MemoryNonces(clock) if request.param == "memory" else FileNonces(tmp_path / "state" / "nonces", clock)
    yield store
    store.close()


def refused(function, *args):
    with pytest.raises(Refusal) as refusal:
        function(*args)
    return refusal.value


# Nonces ---------------------------------------------------------------------------------------------------------------


def test_a_nonce_is_good_once_for_each_caller(nonces):
    assert [nonces.check_and_store(who, START + n) for who, n in
            [("a", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 0)]] == [True, False, True, True, True, False]  # fmt: skip
    assert len(nonces) == 4


def test_nothing_from_before_the_store_is_accepted(nonces):
    refusal = refused(nonces.check_and_store, "a", START - 1)
    assert (refusal.status, refusal.reason, refusal.kind, refusal.headers) == (401, EARLY, "StaleRequest", ())
    assert len(nonces) == 0 and nonces.check_and_store("a", START)


def test_a_nonce_is_known_as_long_as_it_is_fresh(nonces, clock):
    assert nonces.check_and_store("a", START)
    clock.now += 10 * SECOND
    assert not nonces.check_and_store("a", START)  # ten seconds old, still fresh, still known
    clock.now += SECOND
    assert refused(nonces.check_and_store, "a", START).reason == EARLY
    clock.now -= 60 * SECOND  # somebody sets the clock back
    assert refused(nonces.check_and_store, "a", START).reason == EARLY
    assert nonces.floor == START + SECOND


def test_nonces_that_are_no_longer_fresh_are_dropped(nonces, clock):
    for second in range(40):
        clock.now = START + second * SECOND
        assert nonces.check_and_store("a", clock.now) and nonces.check_and_store("a", clock.now + 2 * SECOND - 1)
        assert len(nonces) <= 2 * 13
    clock.now += 11 * SECOND
    assert nonces.check_and_store("b", clock.now)
    assert len(nonces) <= 2 * 2 + 1


def test_of_many_threads_one_stores_a_nonce(nonces, clock):
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(lambda i: nonces.check_and_store("a", START + i // 8), range(400)))
    assert sum(stored) == 50


def test_files_are_shared_and_outlive_their_process(tmp_path, clock):
    path = tmp_path / "deep" / "folder" / "nonces"
    one, other = FileNonces(str(path), clock), FileNonces(path, clock)
    assert one.path == path and path.parent.stat().st_mode & 0o777 == 0o700
    assert one.check_and_store("a", START) and not other.check_and_store("a", START)
    one.close()
    with pytest.raises(sqlite3.ProgrammingError):
        len(one)
    clock.now += 3 * SECOND
    again = FileNonces(path, clock)
    assert again.floor == START  # it knows everything since
    assert not again.check_and_store("a", START) and again.check_and_store("a", START + 1)
    other.close(), again.close()


def test_another_process_may_raise_the_floor(tmp_path, clock):
    one = FileNonces(tmp_path / "nonces", clock)
    assert one.check_and_store("a", START)
    ahead = FileNonces(tmp_path / "nonces", Clock(START + 30 * SECOND))
    assert ahead.floor == START + 20 * SECOND and len(ahead) == 0
    clock.now += SECOND  # the floor is read again once a second
    assert refused(one.check_and_store, "a", START + 20 * SECOND - 1).reason == EARLY
    assert one.check_and_store("a", START + 20 * SECOND)
    one.close(), ahead.close()


def test_the_floor_is_read_once_a_second_and_no_oftener(tmp_path, clock):
    one = FileNonces(tmp_path / "nonces", clock)
    FileNonces(tmp_path / "nonces", Clock(START + 30 * SECOND)).close()
    clock.now += SECOND - 1
    assert one.check_and_store("a", START) and one.floor == START
    clock.now += 1
    assert refused(one.check_and_store, "a", START + 1).kind == "StaleRequest"
    one.close()


def test_a_damaged_file_is_replaced_and_what_it_could_hold_is_refused(tmp_path, clock, caplog):
    path = tmp_path / "nonces"
    path.write_bytes(b"x" * 5000)
    for end in ("-wal", "-shm"):
        Path(f"{path}{end}").write_bytes(b"x")
    store = FileNonces(path, clock)
    assert store.floor == START + 2 * SECOND
    assert refused(store.check_and_store, "a", START + 2 * SECOND - 1).reason == EARLY
    assert store.check_and_store("a", START + 2 * SECOND)
    record, = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"{path} is damaged (file is not a database) and replaced"
    store.close()


def test_a_file_that_cannot_be_opened_is_an_error_and_stays(tmp_path, clock):
    path = tmp_path / "nonces"
    path.mkdir()
    with pytest.raises(sqlite3.OperationalError):
        FileNonces(path, clock)
    assert path.is_dir()


def test_what_cannot_be_stored_is_not_accepted(tmp_path, clock, caplog):
    store = FileNonces(tmp_path / "nonces", clock)
    store._db.execute("PRAGMA query_only = on")  # as good as a full disk
    refusal = refused(store.check_and_store, "a", START)
    assert (refusal.status, refusal.kind) == (503, "nonces")
    assert refusal.reason == "this miner cannot write down what it accepts"
    assert refusal.__suppress_context__
    record, = caplog.records
    assert record.getMessage().startswith(f"{store.path} cannot be used, requests are refused: attempt to write")
    store.close()


def test_stores_follow_the_clock_of_the_machine_by_default(tmp_path):
    for store in (MemoryNonces(), FileNonces(tmp_path / "nonces")):
        assert abs(store.clock() - time.time_ns()) < 60 * SECOND
        assert store.check_and_store("a", time.time_ns())
        store.close()


# Requests -------------------------------------------------------------------------------------------------------------


def signed(nonce=START, receiver=ME, path="/Prompting", **more):
    return sign_request(VALIDATOR.hotkey, BODY, path=path, receiver=receiver, nonce=nonce) | more


def raw(headers):
    return [(key.lower().encode(), value.encode("latin-1")) for key, value in headers.items()]


def test_a_request_is_signed_as_bittensor_signs_it():
    ours, theirs = signed(), http_auth.sign(
        VALIDATOR, method="POST", path="/Prompting", body=BODY, receiver_ss58=ME, nonce_ns=START)  # fmt: skip
    signature = ours.pop("X-Bittensor-Signature")
    del theirs["X-Bittensor-Signature"]
    assert ours == {**theirs, "X-Bittensor-Crypto": "sr25519"}
    assert signature.startswith("0x") and len(bytes.fromhex(signature[2:])) == 64


@pytest.fixture
def gate(clock):
    return Gatekeeper(ME, clock=clock)


def test_a_caller_is_who_signed(gate):
    caller = gate.verify(raw(signed()), BODY, "POST", "/Prompting")
    assert caller == Terminal(hotkey=CALLER, nonce=START, version="btauth/1")


def test_the_store_that_is_given_is_used(clock):
    nonces = MemoryNonces(clock)
    for expected in (None, "ReplayedRequest"):
        gate = Gatekeeper(ME, nonces, clock)
        if expected:
            assert refused(gate.verify, raw(signed()), BODY, "POST", "/Prompting").kind == expected
        else:
            gate.verify(raw(signed()), BODY, "POST", "/Prompting")


@pytest.mark.parametrize("headers, call, reason", [
    (signed(), {"method": "GET"}, "BadSignature: "), (signed(), {"path": "/Other"}, "BadSignature: "),
    (signed(), {"body": BODY + b" "}, "BadSignature: "), (signed(receiver=CALLER), {}, "WrongReceiver: "),
    (signed(START + 3 * SECOND), {}, "StaleRequest: "), ({}, {}, "MalformedAuth: missing"),
    (signed() | {"X-Bittensor-Nonce": "9" * 5000}, {}, "MalformedAuth: X-Bittensor-Nonce is not"),
    (signed() | {"X-Bittensor-Hotkey": "\xe4"}, {}, "MalformedAuth: "),
])  # fmt: skip
def test_a_request_that_does_not_prove_its_sender_is_refused(gate, headers, call, reason):
    call = {"body": BODY, "method": "POST", "path": "/Prompting"} | call
    with pytest.raises(Refusal) as refusal:
        gate.verify(raw(headers), **call)
    value = refusal.value
    assert (value.status, value.reason.startswith(reason)) == (401, True), value.reason
    assert value.kind == reason.split(":")[0] and value.__suppress_context__


@pytest.mark.parametrize("error", [ValueError("not a number"), OverflowError("not a number")])
def test_what_the_store_cannot_hold_is_malformed(clock, error):
    class Store:
        def check_and_store(self, hotkey_ss58, nonce_ns):
            raise error

    refusal = refused(Gatekeeper(ME, Store(), clock).verify, raw(signed()), BODY, "POST", "/Prompting")
    assert (refusal.status, refusal.kind, refusal.reason) == (401, "MalformedAuth", "MalformedAuth: not a number")


@pytest.mark.parametrize("name", ["hotkey", "nonce", "signature", "receiver", "version", "crypto", "anything"])
def test_a_header_that_appears_twice_is_refused(gate, name):
    twice = [*raw(signed()), *[(f"x-bittensor-{name}".encode(), b"x")] * (2 if name == "anything" else 1)]
    refusal = refused(gate.verify, twice, BODY, "POST", "/Prompting")
    assert (refusal.kind, refusal.reason) == ("MalformedAuth", "MalformedAuth: an X-Bittensor header appears twice")


def test_other_headers_may_appear_twice(gate):
    assert gate.verify([*raw(signed()), (b"accept", b"a"), (b"accept", b"b")], BODY, "POST", "/Prompting").hotkey == CALLER


def test_a_refusal_says_what_it_was_given():
    plain, full = Refusal(500, "broken"), Refusal(429, "too many", "quota", ((b"retry-after", b"1"),))
    assert (plain.status, plain.reason, plain.kind, plain.headers, str(plain)) == (500, "broken", "other", (), "broken")
    assert (full.status, full.reason, full.kind, full.headers) == (429, "too many", "quota", ((b"retry-after", b"1"),))


# Answers --------------------------------------------------------------------------------------------------------------

ANSWER = b'{"completion": "Lima."}'
QUESTION = {"caller": CALLER, "path": "/Prompting", "nonce": START}


def test_an_answer_is_signed_for_one_question():
    signature = sign_answer(MINER.hotkey, ANSWER, **QUESTION)
    assert SIGNATURE == "x-prompting-signature" and signature.startswith("sr25519 0x")
    assert answer_fits(signature, ANSWER, miner=ME, **QUESTION)
    assert answer_fits(signature.replace("0x", ""), ANSWER, miner=ME, **QUESTION)
    for other in ({"caller": ME}, {"path": "/Other"}, {"nonce": START + 1}, {"miner": CALLER}):
        assert answer_fits(signature, ANSWER, **{"miner": ME, **QUESTION, **other}) is False
    assert answer_fits(signature, ANSWER + b" ", miner=ME, **QUESTION) is False


def test_the_signed_line_of_an_answer():
    payload = http_auth.build_payload(scheme="sr25519", method="ANSWER", path="/Prompting", body=ANSWER, nonce_ns=START,
                                      sender_ss58=ME, receiver_ss58=CALLER)  # fmt: skip
    by_hand = f"sr25519 0x{MINER.hotkey.sign(payload).hex()}"
    assert answer_fits(by_hand, ANSWER, miner=ME, **QUESTION)


@pytest.mark.parametrize("signature", ["", " ", "sr25519", "sr25519 0x", "none 0x00", "sr25519 0x" + "00" * 64,
                                       "sr25519 0xgg", "ed25519 0x" + "00" * 64, "sr25519  0x00", "\ud800"])  # fmt: skip
def test_what_is_no_signature_does_not_fit(signature):
    assert answer_fits(signature, ANSWER, miner=ME, **QUESTION) is False


def test_freshness_is_that_of_the_protocol():
    assert (auth.MAX_AGE, auth.MAX_SKEW) == (10, 2)
