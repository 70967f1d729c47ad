"""The older wire format: what a request must prove, and in which order."""

import pytest

from prompting_nb.network.auth import Gatekeeper, Refusal
from prompting_nb.network.chain import make_wallet
from prompting_nb.network.legacy import legacy_headers, verify_legacy
from prompting_nb.protocol import Prompting

MINER, VALIDATOR, FORGER = (make_wallet(name) for name in ("miner", "validator", "forger"))
ME = MINER.hotkey.ss58_address
QUESTION = Prompting.ask("What is the capital of Peru?", timeout=5)


def raw(headers):
    return [(key.lower().encode(), str(value).encode()) for key, value in headers.items()]


def signed(**more):
    return legacy_headers(VALIDATOR.hotkey, QUESTION, ME, **more)


@pytest.fixture
def gate():
    return Gatekeeper(ME)


def test_a_forged_request_does_not_use_up_the_nonce_of_its_victim(gate):
    honest = signed()
    forged = honest | {"bt_header_dendrite_signature": "0x" + FORGER.hotkey.sign(b"anything").hex()}
    with pytest.raises(Refusal, match="BadSignature"):
        verify_legacy(gate, raw(forged))
    assert verify_legacy(gate, raw(honest))[0].hotkey == VALIDATOR.hotkey.ss58_address
    with pytest.raises(Refusal, match="ReplayedRequest"):
        verify_legacy(gate, raw(honest))
