"""The operators that IPEX is better at; the others are the reference's, which torch runs with oneDNN."""

import torch

from zif.contract import NormOutput, RotatedHeads
from zif.reference.ops import ReferenceOps

_kernels = torch.ops.torch_ipex


class IpexOps(ReferenceOps):
    """Fused norms and rotations."""

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

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> RotatedHeads:
        num_tokens, num_pairs = cos.shape
        fits = cos.shape == sin.shape and len(query) == len(key) == num_tokens and 2 * num_pairs <= query.shape[-1]
        if interleaved or not fits or not num_tokens or cos.dtype != torch.float32:
            return super().rotate(query, key, cos, sin, interleaved)
        angles = torch.cat((sin, cos), dim=1)  # the kernel looks a token's angles up by its place
        places = torch.arange(num_tokens).unsqueeze(0)
        return RotatedHeads(_rotated(query, angles, places), _rotated(key, angles, places))


def _rotated(heads: torch.Tensor, angles: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + R). heads: [T, H, D]. angles: [T, 2R], float32, sines first. Returns [T, H, D]."""
    num_heads, head_dim = heads.shape[1:]
    size = angles.shape[1]
    rotated = _kernels.rotary_position_embedding(
        heads.contiguous().unsqueeze(0), angles, places, num_heads, head_dim, size // 2, size
    )[0]
    result: torch.Tensor = rotated.squeeze(0)
    return result
