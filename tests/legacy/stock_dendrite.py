"""A stock Dendrite of bittensor 10.5.0 asks our miner: `make test-legacy` makes its environment and runs this in it.

Nothing of this project is imported here. The miner is the command `prompting-nb miner`, run by the python in
`MINER_PYTHON` in a process of its own; between the two there is only HTTP.
"""

import asyncio
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from reference import Prompting, StreamPrompting, bt, keypair

VALIDATOR, STRANGER = keypair("validator"), keypair("stranger")
ANSWER = "The meaning of life is 42 — für alle.\nEven on\n\ntwo lines 😀."
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def miner():
    "A running miner that serves one validator, as what a metagraph says about it."
    command = [os.environ["MINER_PYTHON"], "-c", "from prompting_nb.cli import main; main()", "miner",
               "--template.completion", ANSWER,
               "--miner.blacklist.whitelist", VALIDATOR.ss58_address]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        hotkey, port = re.search(r"Miner (\w+) is uid .* 127\.0\.0\.1:(\d+)", process.stdout.readline()).groups()
        yield bt.AxonInfo(version=0, ip="127.0.0.1", port=int(port), ip_type=4, hotkey=hotkey, coldkey=hotkey)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()


def conversation(kind=Prompting):
    return kind(roles=["system", "user"], messages=["Be brief.", "What is the meaning of life? 😀"])


class Tampering(bt.Dendrite):
    "A Dendrite whose request is changed after it was signed."

    def __init__(self, wallet, change):
        super().__init__(wallet)
        self.change = change

    def preprocess_synapse_for_request(self, target, synapse, timeout=12.0):
        return self.change(super().preprocess_synapse_for_request(target, synapse, timeout))


def ask(target, synapse=None, dendrite=None, times=1):
    "The synapses that come back."
    async def asking():
        async with dendrite or bt.Dendrite(VALIDATOR) as client:
            return [await client(target, synapse or conversation(), timeout=10.0, deserialize=False)
                    for _ in range(times)]

    return asyncio.run(asking())


def ask_streaming(target, dendrite=None):
    "The pieces as they came, and the synapse at their end."
    async def asking():
        async with dendrite or bt.Dendrite(VALIDATOR) as client:
            stream = client.call_stream(target, conversation(StreamPrompting), timeout=10.0, deserialize=False)
            return [piece async for piece in stream]

    *pieces, synapse = asyncio.run(asking())
    return pieces, synapse


def test_this_is_the_stock_library():
    assert bt.__version__ == "10.5.0"
    assert "prompting_nb" not in __import__("sys").modules


def test_a_question_is_answered(miner):
    answer, = ask(miner)
    assert answer.completion == ANSWER
    assert (answer.dendrite.status_code, answer.dendrite.status_message) == (200, "Success")
    assert answer.axon.status_code == 200 and answer.is_success
    assert answer.axon.hotkey == miner.hotkey
    assert 0 < answer.dendrite.process_time < 10 and 0 <= answer.axon.process_time <= answer.dendrite.process_time
    assert answer.roles == ["system", "user"] and answer.messages[1].endswith("😀")


def test_one_client_asks_again_and_again(miner):
    assert [answer.completion for answer in ask(miner, times=20)] == [ANSWER] * 20


def test_many_clients_at_once(miner):
    async def asking():
        async with bt.Dendrite(VALIDATOR) as one, bt.Dendrite(VALIDATOR) as other:
            asked = [client(miner, conversation(), timeout=10.0, deserialize=False) for client in (one, other) * 16]
            return await asyncio.gather(*asked)

    assert [answer.completion for answer in asyncio.run(asking())] == [ANSWER] * 32


def test_an_answer_comes_in_pieces(miner):
    pieces, answer = ask_streaming(miner)
    assert "".join(pieces) == ANSWER == answer.completion
    assert answer.dendrite.status_code == 200 and answer.dendrite.process_time > 0


def change(**fields):
    "Change what is asked, after it was signed."
    def changed(synapse):
        other = synapse.model_copy()
        object.__setattr__(other, "__dict__", {**synapse.__dict__, **fields})
        return other

    return changed


def change_end(end, **fields):
    "Change what a request says about the caller or the receiver, after it was signed."
    def changed(synapse):
        vars(getattr(synapse, end)).update(fields)
        return synapse

    return changed


def flip(synapse):
    "Change one bit of the signature."
    signature = bytearray.fromhex(synapse.dendrite.signature[2:])
    signature[5] ^= 1
    synapse.dendrite.signature = "0x" + signature.hex()
    return synapse


TAMPERED = {
    "message": change(messages=["Be brief.", "Send me your keys."]),
    "role": change(roles=["user", "user"]),
    "caller": change_end("dendrite", hotkey=STRANGER.ss58_address),
    "receiver": change_end("axon", hotkey=STRANGER.ss58_address),
    "nonce": change_end("dendrite", nonce=1),
    "uuid": change_end("dendrite", uuid="another"),
    "no signature": change_end("dendrite", signature=None),
    "signature": flip,
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_changed_request_is_refused(miner, what):
    answer, = ask(miner, dendrite=Tampering(VALIDATOR, TAMPERED[what]))
    assert answer.completion is None
    assert answer.dendrite.status_code == 401, answer.dendrite.status_message
    assert answer.dendrite.status_message


def test_a_changed_request_for_pieces_is_refused(miner):
    _, answer = ask_streaming(miner, Tampering(VALIDATOR, TAMPERED["message"]))
    assert answer.dendrite.status_code == 401


def test_fields_that_the_signature_does_not_cover_are_refused(miner):
    class Uncovered(Prompting):
        required_hash_fields = ("messages",)

    Uncovered.__name__ = "Prompting"
    answer, = ask(miner, conversation(Uncovered))
    assert answer.dendrite.status_code == 401


def test_a_replay_is_refused(miner):
    seen = []

    def first_again(synapse):
        seen.append((synapse.dendrite.nonce, synapse.dendrite.signature))
        vars(synapse.dendrite).update(nonce=seen[0][0], signature=seen[0][1])
        return synapse

    first, second = ask(miner, dendrite=Tampering(VALIDATOR, first_again), times=2)
    assert (first.completion, first.dendrite.status_code) == (ANSWER, 200)
    assert second.dendrite.status_code == 401


def test_a_stranger_is_told_why(miner):
    answer, = ask(miner, dendrite=bt.Dendrite(STRANGER))
    assert answer.dendrite.status_code == 403
    assert "not registered" in answer.dendrite.status_message
