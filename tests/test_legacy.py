"""The older wire format: what a request must prove, in which order, and what an answer looks like, field by field."""

import hashlib
import json
import re
import time
import uuid
from types import SimpleNamespace

import pytest
from bittensor.sp_core import ss58_decode, ss58_encode, verify

from prompting_nb.network.auth import Gatekeeper, Refusal
from prompting_nb.network.chain import make_wallet
from prompting_nb.network.legacy import (
    body_hash,
    is_legacy,
    legacy_answer_headers,
    legacy_headers,
    read_legacy,
    verify_legacy,
    write_legacy,
)
from prompting_nb.protocol import Prompting, StreamPrompting, Terminal

MINER, VALIDATOR, FORGER = (make_wallet(name) for name in ("miner", "validator", "forger"))
ME, CALLER = MINER.hotkey.ss58_address, VALIDATOR.hotkey.ss58_address
QUESTION = Prompting.ask("What is the capital of Peru?", timeout=5)
SECOND = 10**9
START = 1_700_000_000 * SECOND
AGE = "10 s back and 2 s ahead are allowed"
HERE = "bt_header_dendrite_"


def raw(headers):
    return [(key.lower().encode(), str(value).encode()) for key, value in headers.items()]


def signed(receiver=ME, nonce=START, **more):
    return legacy_headers(VALIDATOR.hotkey, QUESTION, receiver, nonce) | {HERE + key: value for key, value in more.items()}


class Clock:
    def __init__(self):
        self.now = START - 60 * SECOND  # when the miner starts: nothing from before is accepted

    def __call__(self):
        return self.now


@pytest.fixture
def gate():
    clock = Clock()
    gate = Gatekeeper(ME, clock=clock)
    clock.now = START
    return gate


def refusal(gate, headers):
    with pytest.raises(Refusal) as refused:
        verify_legacy(gate, headers if isinstance(headers, list) else raw(headers))
    assert refused.value.reason.startswith(f"{refused.value.kind}: ")
    return refused.value.status, refused.value.reason


def test_a_caller_is_what_the_signed_line_says(gate):
    headers = signed()
    caller, covered = verify_legacy(gate, raw(headers))
    assert caller == Terminal(hotkey=CALLER, nonce=START, uuid=headers[HERE + "uuid"], version="bittensor 10005000")
    assert covered == headers["computed_body_hash"]


def test_a_forged_request_does_not_use_up_the_nonce_of_its_victim(gate):
    honest = signed()
    forged = honest | {HERE + "signature": "0x" + FORGER.hotkey.sign(b"anything").hex()}
    assert refusal(gate, forged) == (401, "BadSignature: the signature does not fit the claimed hotkey")
    assert verify_legacy(gate, raw(honest))[0].hotkey == CALLER
    assert refusal(gate, honest) == (401, "ReplayedRequest: this nonce was already accepted from this hotkey")


def test_a_nonce_belongs_to_its_caller(gate):
    verify_legacy(gate, raw(signed()))
    other = legacy_headers(FORGER.hotkey, QUESTION, ME, START)
    assert verify_legacy(gate, raw(other))[0].hotkey == FORGER.hotkey.ss58_address


@pytest.mark.parametrize("headers, reason", [
    (signed(receiver=CALLER), "WrongReceiver: the request was made for another hotkey"),
    ({k: v for k, v in signed().items() if k != "bt_header_axon_hotkey"},
     "WrongReceiver: the request was made for another hotkey"),
    (signed(hotkey=""), "MalformedAuth: missing bt_header_dendrite_hotkey"),
    (signed() | {HERE + "nonce": ""}, "MalformedAuth: missing bt_header_dendrite_nonce"),
    (signed(uuid=""), "MalformedAuth: missing bt_header_dendrite_uuid"),
    (signed(signature=""), "MalformedAuth: missing bt_header_dendrite_signature"),
    (signed() | {HERE + "nonce": "1_0"}, "MalformedAuth: bt_header_dendrite_nonce is not a decimal integer"),
    (signed() | {HERE + "nonce": "\xb2"}, "MalformedAuth: bt_header_dendrite_nonce is not a decimal integer"),
    (signed() | {HERE + "nonce": "9" * 20}, "MalformedAuth: bt_header_dendrite_nonce is not a decimal integer"),
    (signed() | {HERE + "nonce": "9" * 19}, f"StaleRequest: the nonce is 8300000000 s ahead; {AGE}"),
    (signed(signature="0xgg"), "MalformedAuth: bt_header_dendrite_signature is not hex"),
    (signed(signature="0x00"), "MalformedAuth: invalid hotkey address or signature encoding"),
    (signed(hotkey="null"), "MalformedAuth: invalid hotkey address or signature encoding"),
    (signed(hotkey=ME), "BadSignature: the signature does not fit the claimed hotkey"),
    (signed(uuid="another"), "BadSignature: the signature does not fit the claimed hotkey"),
    (signed() | {HERE + "nonce": START - 1}, "BadSignature: the signature does not fit the claimed hotkey"),
    (signed() | {"computed_body_hash": "0"}, "BadSignature: the signature does not fit the claimed hotkey"),
    ([*raw(signed()), (b"bt_header_axon_hotkey", b"x")], "MalformedAuth: a bt_header header appears twice"),
    ([*raw(signed()), (b"computed_body_hash", b"x")], "MalformedAuth: a bt_header header appears twice"),
])  # fmt: skip
def test_a_request_that_does_not_prove_its_sender_is_refused(gate, headers, reason):
    assert refusal(gate, headers) == (401, reason)


def test_a_hotkey_that_is_too_long_is_refused_before_it_is_read(gate, monkeypatch):
    monkeypatch.setattr("prompting_nb.network.legacy.verify_signature", None)
    reason = "MalformedAuth: invalid hotkey address or signature encoding"
    assert refusal(gate, signed(hotkey="5" * 65)) == (401, reason)


@pytest.mark.parametrize("age, reason", [
    (10 * SECOND, None), (10 * SECOND + 1, f"StaleRequest: the nonce is 10 s old; {AGE}"),
    (-2 * SECOND, None), (-2 * SECOND - 1, f"StaleRequest: the nonce is 2 s ahead; {AGE}"),
    (59 * SECOND, f"StaleRequest: the nonce is 59 s old; {AGE}"),
])  # fmt: skip
def test_a_request_is_fresh_for_ten_seconds_back_and_two_ahead(gate, age, reason):
    headers = signed(nonce=START - age)
    if reason is None:
        assert verify_legacy(gate, raw(headers))[0].nonce == START - age
    else:
        assert refusal(gate, headers) == (401, reason)


def test_a_missing_hash_counts_as_empty(gate):
    line = f"{START}.{CALLER}.{ME}.u.".encode()
    headers = signed(uuid="u", signature="0x" + VALIDATOR.hotkey.sign(line).hex(), version="7.2.0-and-a-long-tail")
    del headers["computed_body_hash"]
    caller, covered = verify_legacy(gate, raw(headers))
    assert (covered, caller.version) == ("", "bittensor 7.2.0-and-a-")
    with pytest.raises(Refusal) as refused:
        read_legacy(b'{"roles": ["user"], "messages": ["x"]}', covered, 120.0)
    assert (refused.value.status, refused.value.kind) == (401, "BadSignature")
    assert refused.value.reason == ("BadSignature: the signed hash is not that of the body; "
                                    'required_hash_fields must be ("roles", "messages"), in this order')


def test_a_request_without_version_is_accepted(gate):
    headers = signed()
    del headers[HERE + "version"]
    assert verify_legacy(gate, raw(headers))[0].version == "bittensor "


def test_the_hash_covers_roles_and_then_messages():
    sha = lambda text: hashlib.sha3_256(text.encode("utf-8", "surrogatepass")).hexdigest()
    roles, messages = ("user",), ("\ud800 ä",)  # of a surrogate alone only its name is hashed
    one, other = sha("['user']"), sha(str(list(messages)))
    assert body_hash(roles, messages) == sha(one + other)
    assert signed()["computed_body_hash"] == body_hash(QUESTION.roles, QUESTION.messages)


def test_a_question_is_read_with_its_class_and_bounded_time_limit():
    body = b'{"roles": ["user"], "messages": ["x"], "timeout": 500.0}'
    read = read_legacy(body, body_hash(("user",), ("x",)), 120.0, StreamPrompting)
    assert (type(read), read.timeout, read.prompt) == (StreamPrompting, 120.0, "x")


@pytest.mark.parametrize("roles, messages", [
    (["user"], ["system"]), (["user", "assistant"], ["assistant", "user"]), (["user"], ["What is 6 times 7?"]),
])  # fmt: skip
def test_roles_and_messages_do_not_change_places(roles, messages):
    read = lambda *lists: read_legacy(json.dumps(dict(zip(("roles", "messages"), lists))).encode(), covered, 120.0)
    covered = body_hash(tuple(roles), tuple(messages))
    assert read(roles, messages).prompt
    with pytest.raises(Refusal, match="BadSignature"):
        read(messages, roles)
    covered = body_hash(tuple(messages), tuple(roles))  # by a class that lists the messages first
    with pytest.raises(Refusal, match="in this order"):
        read(roles, messages)


@pytest.mark.parametrize("role", ["User", "user ", "", "tool", "What is 6 times 7?", "x" * 1000, "\u00fcser"])
def test_a_role_is_one_of_three(role):
    body = json.dumps({"roles": ["user", role], "messages": ["x", "y"]}).encode()
    with pytest.raises(ValueError, match="is none of system, user, assistant") as refused:
        read_legacy(body, body_hash(("user", role), ("x", "y")), 120.0)
    assert len(str(refused.value)) < 100


def test_the_same_key_under_another_prefix_is_the_same_caller(gate):
    key, elsewhere = VALIDATOR.hotkey, ss58_encode(ss58_decode(CALLER), 0)
    here = ss58_encode(ss58_decode(ME), 2)
    signer = SimpleNamespace(ss58_address=elsewhere, sign=key.sign)
    caller, _ = verify_legacy(gate, raw(legacy_headers(signer, QUESTION, here, START)))
    assert caller.hotkey == CALLER
    assert refusal(gate, signed())[1].startswith("ReplayedRequest")  # one nonce, whatever the address


@pytest.mark.parametrize("headers, old", [
    ({}, False), ({"x": 1}, False), ({HERE + "nonce": 1}, True), ({"bt_header_axon_hotkey": 1}, False),
    ({HERE + "nonce": 1, "x-bittensor-version": 1}, False), ({"x-bittensor-version": 1, HERE + "nonce": 1}, False),
])  # fmt: skip
def test_which_format_a_request_has(headers, old):
    assert is_legacy(raw(headers)) is old


def test_headers_of_a_question():
    before = time.time_ns()
    headers = legacy_headers(VALIDATOR.hotkey, QUESTION, ME)
    nonce, unique = int(headers[HERE + "nonce"]), headers[HERE + "uuid"]
    assert before <= nonce <= time.time_ns() and str(uuid.UUID(unique)) == unique
    covered = body_hash(QUESTION.roles, QUESTION.messages)
    signature = headers.pop(HERE + "signature")
    assert headers == {
        "name": "Prompting", "timeout": "5.0", "computed_body_hash": covered, "bt_header_axon_hotkey": ME,
        HERE + "version": "10005000", HERE + "nonce": str(nonce), HERE + "uuid": unique, HERE + "hotkey": CALLER,
    }  # fmt: skip
    line = f"{nonce}.{CALLER}.{ME}.{unique}.{covered}".encode()
    assert verify(line, bytes.fromhex(signature.removeprefix("0x")), CALLER, 1)


def test_json_of_an_answer():
    answer = Prompting(roles=("user",), messages=("Wo?",), timeout=5, completion="Überall 😀")
    written = write_legacy(answer)
    assert "Überall 😀".encode() in written
    assert json.loads(written) == {
        "name": "Prompting", "timeout": 5.0, "roles": ["user"], "messages": ["Wo?"], "completion": "Überall 😀",
    }  # fmt: skip


def test_headers_of_an_answer():
    before, caller = time.time_ns(), Terminal(hotkey=CALLER, nonce=7, uuid="u")
    pairs = legacy_answer_headers(MINER.hotkey, StreamPrompting, caller, 403, "no\r\nvalidator: 1  permit ä😀", 0.25)
    headers = {key.decode(): value.decode("latin-1") for key, value in pairs}
    assert len(headers) == len(pairs)
    nonce, signature = headers.pop("bt_header_axon_nonce"), headers.pop("bt_header_axon_signature")
    assert before <= int(nonce) <= time.time_ns()
    assert headers == {
        "bt_header_axon_status_code": "403", "bt_header_axon_status_message": "no validator: 1 permit ä?",
        "bt_header_axon_process_time": "0.250000", "bt_header_axon_hotkey": ME, "bt_header_axon_uuid": "u",
        "bt_header_axon_version": "10005000", HERE + "hotkey": CALLER, HERE + "nonce": "7", HERE + "uuid": "u",
        "name": "StreamPrompting", "timeout": "0", "total_size": "0", "header_size": "0",
    }  # fmt: skip
    assert verify(f"{nonce}.{CALLER}.{ME}.u".encode(), bytes.fromhex(signature.removeprefix("0x")), ME, 1)


def test_nothing_is_signed_for_a_stranger():
    headers = dict(legacy_answer_headers(MINER.hotkey, Prompting, Terminal(), 401, "who?", 0.0))
    assert headers[b"bt_header_axon_uuid"] == b""
    assert not [key for key in headers if key == b"bt_header_axon_signature" or re.match(b"bt_header_dendrite", key)]
