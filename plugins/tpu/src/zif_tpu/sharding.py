"""Tensor parallel: which axis of which array is cut, so that XLA's partitioner puts collectives where they are needed.

One process drives all devices; programs stay as they are. Marks decide where arrays lie, never what is computed: the
partitioner keeps the meaning of the program whatever is cut (Xu et al., "GSPMD", 2021).
"""

import numpy as np
import torch
import torch_xla.distributed.spmd as spmd
import torch_xla.runtime as xr

_AXIS = "model"

# By the last part of a weight's name: the axis that is cut, for matrices and for those of experts, [E, ...].
_CUT_AXES = {
    "qkv": (0, 0),
    "gate_up": (0, 0),
    "output": (1, 1),
    "down": (1, 0),
    "embedding": (0, 0),
    "lm_head": (0, 0),
}


class Sharding:
    """Where arrays lie on `size` devices. With one device nothing is marked.

    Switches the process to programs over several devices, which cannot be undone.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._mesh: spmd.Mesh | None = None
        if size > 1:
            if not xr.is_spmd():
                xr.use_spmd()
            self._mesh = spmd.Mesh(np.arange(size), (size,), (_AXIS,))

    def weight(self, name: str, array: torch.Tensor) -> torch.Tensor:
        """Mark a weight, in place, and return it. Those that do not divide evenly lie on every device."""
        axes = _CUT_AXES.get(name.rpartition(".")[2])
        return array if axes is None or array.ndim < 2 else self._cut(array, axes[array.ndim - 2])

    def cache(self, array: torch.Tensor) -> torch.Tensor:
        """Mark the KV cache, [tokens, 2 * K, D], in place, and return it: each device has some heads."""
        return self._cut(array, 1)

    def _cut(self, array: torch.Tensor, axis: int) -> torch.Tensor:
        if self._mesh is not None and array.shape[axis] % self._size == 0:
            spmd.mark_sharding(array, self._mesh, tuple(_AXIS if i == axis else None for i in range(array.ndim)))
        return array
