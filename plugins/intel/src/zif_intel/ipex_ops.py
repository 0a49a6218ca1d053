"""The operators that IPEX is better at; the others are the reference's, which torch runs with oneDNN."""

import torch

from zif.contract import NormOutput
from zif.reference.ops import ReferenceOps

_kernels = torch.ops.torch_ipex


class IpexOps(ReferenceOps):
    """Fused norms."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
        if weight_offset or weight.dtype != x.dtype:
            return super().rms_norm(x, weight, eps, weight_offset)
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, x {tuple(x.shape)}")
        normed: torch.Tensor = _kernels.rmsnorm(x.contiguous(), weight, eps)
        return normed

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
    ) -> NormOutput:
        total = residual + x
        return NormOutput(self.rms_norm(total, weight, eps, weight_offset), total)
