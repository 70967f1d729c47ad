"""Reward models: learn from preferences what a good answer is."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loss import PairwiseLoss, RankingLoss
    from .model import RewardModel

__all__ = ["PairwiseLoss", "RankingLoss", "RewardModel"]

_HOMES = {"PairwiseLoss": ".loss", "RankingLoss": ".loss", "RewardModel": ".model"}


def __getattr__(name: str):
    "Import a public name when it is first used: torch and transformers take seconds."
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
