"""The model runner: the one part that computes."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from zif.contract.kv import KVArena
from zif.contract.model import ModelDescription
from zif.contract.step import StepFuture, StepPlan
from zif.contract.structured import Grammars
from zif.contract.transfers import KVStore

Progress = Callable[[int, int], None]
"""Called with (bytes or units done, total) while something long runs."""


class ModelRunner(ABC):
    """Run steps of one model on one device. Core ships one for the torch tier; a vendor may bring its own.

    Order of calls: `load`, `start`, `warm_up` (which may be left out), any number of `submit`, `close`. Calls come from
    one thread.
    """

    @abstractmethod
    def load(self, model: ModelDescription, progress: Progress) -> None:
        """Read the weights to the device. Raises `ModelError` or `OutOfMemoryError`."""

    @abstractmethod
    def start(self, arena: KVArena) -> None:
        """Allocate the KV arena and make ready for steps."""

    def warm_up(self, progress: Progress) -> None:  # noqa: B027 - nothing to do is the default
        """Compile or capture what steps will need, so that none of them does; called once, after `start`.

        A part that cannot be made ready is a fault of the requests that need it later, not of the start.
        """

    @property
    def max_steps_in_flight(self) -> int:
        """Say how many steps may be submitted before the first of them is waited for; at least 1."""
        return 1

    @property
    def verifies_drafts(self) -> bool:
        """Say whether `StepPlan.drafts` is served."""
        return False

    @property
    def reports_hidden(self) -> bool:
        """Say whether `RequestStart.hidden` is served."""
        return False

    def attach_store(self, store: KVStore) -> bool:
        """Take the store that `StepPlan.transfers` refers to; called after `start`. False when no copies are served."""
        return False

    def attach_grammars(self, grammars: Grammars) -> bool:
        """Take what `SamplingParams.structured` is followed with; called after `start`. False when it is not served."""
        return False

    @abstractmethod
    def submit(self, step: StepPlan) -> StepFuture:
        """Begin a step. Steps complete in the order in which they were submitted."""

    @abstractmethod
    def close(self) -> None:
        """Give memory and device back. Idempotent."""
