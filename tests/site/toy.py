"""A module with one of everything, for the tests of the site."""

import abc
from dataclasses import dataclass

from torchtyping import TensorType

__all__ = ["Model", "Linear", "Settings", "halve"]


class Model(abc.ABC):
    """What every model here can do.

    Subclasses say how. Raises TypeError when it is instantiated.
    """

    @classmethod
    @abc.abstractmethod
    def add_args(cls, parser) -> None:
        "Add the flags `--toy.size` (default: 4) and `--toy.name` (default: 'x') to a parser."

    @abc.abstractmethod
    def forward(self, inputs: TensorType["batch_size", "seq_len"]) -> TensorType["batch_size", 1]:
        "One number a row."


class Linear(Model):
    "A weighted sum: $y = \\sum_i w_i x_i$."

    def __init__(
        self,
        size: int = 4,  # how many weights; raises ValueError below 1
        *,
        name: str = "x",  # what to call it
    ):
        self.size, self.name = size, name

    @classmethod
    def add_args(cls, parser) -> None:
        "Add the flags."

    def forward(
        self,
        inputs: TensorType["batch_size", "seq_len"],  # the rows
        mask: TensorType["batch_size", "seq_len"] = None,  # nonzero where an entry counts; `None`: all do
    ) -> TensorType["batch_size", 1]:  # one number a row; raises ValueError for other shapes
        """The sum of each row.

        Notes:
            - Entries that do not count are left out.
            - The weights are clamped to 1e-9.

        Example:
            model = Linear(size=3)
            model.forward(rows)
        """

    def _hidden(self):
        "Not documented."

    def __enter__(self):
        "Begin; returns the model."

    @property
    def width(self) -> int:
        "The number of weights."
        return self.size


@dataclass
class Settings:
    "What can be set."

    rate: float = 0.5  # per step
    names: tuple[str, ...] = ()  # in order


def halve(
    value: float,  # any number
    times: int = 1,  # how often
) -> float:
    """Half of a value, more than once if asked.

    Raises:
        ValueError: for negative `times`.
    """
    return value / 2**times
