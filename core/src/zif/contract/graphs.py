"""How a step function becomes what the device runs: as it is, captured, or compiled."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class GraphRunner(ABC):
    """Wrap functions whose arguments are arrays of a bounded number of shapes."""

    @abstractmethod
    def wrap(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return a callable with the meaning of `function`, which may capture or compile on first use of a shape."""


class EagerGraphs(GraphRunner):
    """Run functions as they are."""

    def wrap(self, function: Callable[P, R]) -> Callable[P, R]:
        return function
