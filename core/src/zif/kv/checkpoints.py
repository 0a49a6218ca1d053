"""Where recurrent states are kept for reuse: at prompt ends, at junctions of shared prefixes, at turn ends.

A state is large, so not every one that could be reused is kept. While a prompt is computed, steps are made to end at
its targets. While a request generates, each new checkpoint takes the place of its previous one, so that the last, the
turn's end, remains. `manager.py` is the only caller.
"""

from dataclasses import dataclass, field

from zif.contract import Request
from zif.kv.pool import BlockPool


@dataclass(slots=True)
class _Plan:
    targets: tuple[int, ...]
    newest: dict[int, bytes] = field(default_factory=dict)


class CheckpointKeeper:
    """The checkpoints that live requests aim at and have made."""

    def __init__(self, alignment: int) -> None:
        self._alignment = alignment
        self._plans: dict[int, _Plan] = {}

    def aim(self, request: Request, junction: int | None) -> None:
        """Choose where this request's steps should end while its prompt is computed."""
        prompt_end = (request.num_prompt_tokens - 1) // self._alignment * self._alignment
        targets = {prompt_end, junction or prompt_end}
        self._plans[request.request_id] = _Plan(tuple(sorted(targets)))

    def step_end(self, request: Request, num_tokens: int) -> int:
        """Return the next target before `num_tokens`, or `num_tokens`."""
        plan = self._plans.get(request.request_id)
        start = max(request.num_computed_tokens, request.num_planned_tokens)
        ahead = [t for t in plan.targets if start < t < num_tokens] if plan else []
        return ahead[0] if ahead else num_tokens

    def wants(self, request: Request) -> bool:
        """Say whether a state after the tokens computed now is worth keeping."""
        plan = self._plans[request.request_id]
        return request.num_computed_tokens in plan.targets or request.num_computed_tokens > plan.targets[-1]

    def made(self, request: Request, group: int, pool: BlockPool, digest: bytes) -> None:
        """Note a checkpoint; one made while generating replaces the one before."""
        plan = self._plans[request.request_id]
        if request.num_computed_tokens <= plan.targets[-1]:
            return
        previous = plan.newest.get(group)
        if previous is not None:
            pool.forget(previous)
        plan.newest[group] = digest

    def drop(self, request: Request) -> None:
        """Forget a request; what it made stays findable."""
        self._plans.pop(request.request_id, None)
