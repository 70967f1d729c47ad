"""The loop behind a decentralised network of language models: reward model, gate, miner, validator."""

import logging as _logging

__version__ = "0.1.0"

# A library is silent until its application asks for its log: logging.basicConfig() shows it.
_logging.getLogger(__name__).addHandler(_logging.NullHandler())
