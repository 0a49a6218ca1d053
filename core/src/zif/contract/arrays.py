"""What the contract calls an array.

The contract imports no array library. To a type checker `Array` is a torch tensor, because the interfaces that use it
serve the torch tier; a platform without torch replaces the model runner as a whole and never meets one.
`HostArray` is a numpy array in host memory.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array: TypeAlias = torch.Tensor
    HostArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]
else:
    Array = Any
    HostArray = Any
