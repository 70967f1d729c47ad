"""Turn texts into embeddings: encoders, pooling, windows of long texts, batches, frozen weights."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .batches import evaluating, in_batches, in_threads, micro_batches, pad_rows
    from .encoder import Encoder, check_encoder
    from .pooling import last_token, last_window, mean_direction, mean_pooling
    from .weights import PRECISIONS

_HOMES = {
    ".batches": ("evaluating", "in_batches", "in_threads", "micro_batches", "pad_rows"),
    ".encoder": ("Encoder", "check_encoder"),
    ".pooling": ("last_token", "last_window", "mean_direction", "mean_pooling"),
    ".weights": ("PRECISIONS",),
}
__all__ = [
    "PRECISIONS", "Encoder", "check_encoder", "evaluating", "in_batches", "in_threads", "last_token", "last_window",
    "mean_direction", "mean_pooling", "micro_batches", "pad_rows",
]  # fmt: skip


def __getattr__(name: str):
    "Import a public name when it is first used: torch and transformers take seconds."
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
