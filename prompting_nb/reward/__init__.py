"""Reward models: learn from preferences what a good answer is."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import PairwiseLoss, RankingLoss, RewardModel

__all__ = ["PairwiseLoss", "RankingLoss", "RewardModel"]


def __getattr__(name: str):
    "Import a public name when it is first used: torch and transformers take seconds."
    if name in __all__:
        return getattr(import_module(".model", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
