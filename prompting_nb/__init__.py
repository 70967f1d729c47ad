"""The loop behind a decentralised network of language models: reward model, gate, miner, validator."""

import logging as _logging
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from .baseminer.miner import Miner as Miner
    from .reward import PairwiseLoss as PairwiseLoss, RewardModel as RewardModel
    from .validators.gating import GatingModel as GatingModel, SentenceEmbedGatingModel as SentenceEmbedGatingModel
    from .validators.validator import Validator as Validator

__version__ = "0.1.0"

_PLACES = {
    "RewardModel": "reward",
    "PairwiseLoss": "reward",
    "GatingModel": "validators.gating",
    "SentenceEmbedGatingModel": "validators.gating",
    "Miner": "baseminer.miner",
    "Validator": "validators.validator",
}

# A library is silent until its application asks for its log: logging.basicConfig() shows it.
_logging.getLogger(__name__).addHandler(_logging.NullHandler())


def __getattr__(name: str):
    "Import a main object when it is first used: torch, transformers and bittensor take seconds."
    if name in _PLACES:
        value = globals()[name] = getattr(_import_module(f".{_PLACES[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
