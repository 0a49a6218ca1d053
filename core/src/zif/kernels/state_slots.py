"""Where the states of a batch's requests are, and which tokens belong to which request; shared by recurrent kernels.

States of one layer are an array [num_slots, *shape], whose slots may lie apart: `zif.reference.state` views an arena
so.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StateSlots:
    """The slots of R requests' states before and after a step; both [R], int32 or int64, device.

    `read` is -1 for a request without an earlier state, which begins with zeros; `write` is -1 where the new state is
    not kept. What one request writes, no other request of the batch reads or writes.
    """

    read: torch.Tensor
    write: torch.Tensor

    @property
    def num_requests(self) -> int:
        """Return R."""
        return self.read.shape[0]


def check_state(name: str, state: torch.Tensor, shape: tuple[int, ...], slots: StateSlots, num_requests: int) -> None:
    """Raise `ValueError` unless slots are those of `num_requests` requests and each slot of `state` has `shape`."""
    if state.shape[1:] != shape or (state.numel() and not state[0].is_contiguous()):
        raise ValueError(f"{name}: state of shape {tuple(state.shape)}, strides {state.stride()}; "
                         f"each slot must be dense, of shape {shape}")  # fmt: skip
    if slots.read.shape != (num_requests,) or slots.write.shape != (num_requests,):
        shapes = tuple(slots.read.shape), tuple(slots.write.shape)
        raise ValueError(f"{name}: slots of shapes {shapes} for {num_requests} requests; both must be [R]")


def check_rows(name: str, rows: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless `rows` has `shape` and only its first axis is strided."""
    if tuple(rows.shape) != shape or (rows.numel() and not rows[0].is_contiguous()):
        found = f"{tuple(rows.shape)} with strides {rows.stride()}"
        raise ValueError(f"{name} is {found}; it must be {shape}, dense but for the first axis")


def token_requests(query_start: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the request of each token, [T], int32; R for tokens behind the last request. query_start: [R + 1]."""
    tokens = torch.arange(num_tokens, dtype=query_start.dtype, device=query_start.device)
    return torch.searchsorted(query_start[1:].contiguous(), tokens, right=True, out_int32=True)
