"""What faulty steps leave behind: nonsense in the blocks of a request, plans that were carried out in part.

Whoever reads nonsense says other words than it must. Blocks that several requests hold stay as they are: what those see
of a fault, a runner would report of them too.
"""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from zif.contract import Request, StepPlan
from zif.simulation.runner import SimulatedRunner


def spoil(request: Request, holders: Iterable[Request], runner: SimulatedRunner, chance: random.Random) -> None:
    """Overwrite the blocks that only `request`, one of the `holders`, has in its table."""
    hands = Counter(hand for holder in holders for hand in _hands(holder))
    for group, block in _hands(request):
        if hands[group, block] == 1:
            runner.write_block(group, block, chance.randbytes(len(runner.read_block(group, block))))


def without_rows(plan: StepPlan) -> StepPlan:
    """Return what a runner has carried out of a plan when its computation raises at once."""
    return replace(plan, request_ids=[], num_computed=[], num_tokens=[], samples=[], drafts={}, total_tokens=0)


def _hands(request: Request) -> list[tuple[int, int]]:
    """Return the (group, block) pairs of a request's table."""
    return [(group, block) for group, table in enumerate(request.block_ids) for block in table if block]
