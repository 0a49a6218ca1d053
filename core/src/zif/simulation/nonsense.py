"""What faulty steps leave behind: nonsense in the blocks of a request, plans that were carried out in part.

Whoever reads nonsense says other words than it must. Blocks that several requests hold stay as they are: what those see
of a fault, a runner would report of them too.
"""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum, auto

from zif.contract import Request, StepPlan
from zif.simulation.runner import SimulatedRunner
from zif.simulation.store import SimulatedStore


class _Extent(Enum):
    """How much of a plan is carried out when its step raises."""

    ALL = auto()
    NO_ROWS = auto()
    NO_COPIES = auto()
    NOTHING = auto()


def spoil(request: Request, holders: Iterable[Request], runner: SimulatedRunner, chance: random.Random) -> None:
    """Overwrite the blocks that only `request`, one of the `holders`, has in its table."""
    hands = Counter(hand for holder in holders for hand in _hands(holder))
    for group, block in _hands(request):
        if hands[group, block] == 1:
            runner.write_block(group, block, chance.randbytes(len(runner.read_block(group, block))))


def carry_out_in_part(plan: StepPlan, runner: SimulatedRunner, store: SimulatedStore, chance: random.Random) -> None:
    """Let a runner do with a plan what it does before it raises: all of it, all but the rows, no copies, or nothing."""
    extent = chance.choice([*_Extent])
    if extent is not _Extent.ALL:
        plan = replace(plan, request_ids=[], num_computed=[], num_tokens=[], samples=[], drafts={}, total_tokens=0)
    if extent in (_Extent.NO_COPIES, _Extent.NOTHING) and plan.transfers is not None:
        store.lose(save.handle for save in plan.transfers.saves)
        plan = replace(plan, transfers=None)
    if extent is not _Extent.NOTHING:
        runner.submit(plan).result()


def _hands(request: Request) -> list[tuple[int, int]]:
    """Return the (group, block) pairs of a request's table."""
    return [(group, block) for group, table in enumerate(request.block_ids) for block in table if block]
