"""What a validator of the older generation sends: the two messages of the reference on bittensor 10.5.0.

Runs in the environment that `make test-legacy` makes, and imports nothing of this project.
"""

import hashlib
import os
import tempfile
from typing import ClassVar, List, Optional

os.environ.setdefault("BT_LOGGING_LOGGING_DIR", tempfile.gettempdir())
os.environ.setdefault("NO_PROXY", "127.0.0.1")

import bittensor as bt
from bittensor.utils import networking
from bittensor_wallet import Keypair
from pydantic import Field

networking.get_external_ip = lambda: "127.0.0.1"  # the stock one asks servers on the internet
bt.logging.set_trace(False)


class Prompting(bt.Synapse):
    "A conversation and its completion."

    roles: List[str] = Field(..., frozen=True)
    messages: List[str] = Field(..., frozen=True)
    completion: Optional[str] = None
    required_hash_fields: ClassVar[tuple] = ("roles", "messages")

    def deserialize(self):
        return self


class StreamPrompting(bt.StreamingSynapse):
    "The same, with a completion that arrives in pieces."

    roles: List[str] = Field(..., frozen=True)
    messages: List[str] = Field(..., frozen=True)
    completion: str = ""
    required_hash_fields: ClassVar[tuple] = ("roles", "messages")

    async def process_streaming_response(self, response):
        async for chunk in response.content.iter_any():
            text = chunk.decode("utf-8")
            self.completion += text
            yield text

    def deserialize(self):
        return self

    def extract_response_json(self, response):
        headers = {key.decode(): value.decode() for key, value in response.raw_headers}
        terminal = lambda end: {key[len(f"bt_header_{end}_"):]: value for key, value in headers.items()
                                if key.startswith(f"bt_header_{end}_")}
        return {"name": headers.get("name", ""), "timeout": float(headers.get("timeout", 0)),
                "dendrite": terminal("dendrite"), "axon": terminal("axon"),
                "roles": self.roles, "messages": self.messages, "completion": self.completion}


def keypair(name: str) -> Keypair:
    "A key for tests, the same for every run."
    return Keypair.create_from_seed("0x" + hashlib.sha256(name.encode()).hexdigest())
