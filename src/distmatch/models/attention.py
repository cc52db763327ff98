"""Attention among positions, in the way that is fast on the device."""

import torch
from torch import Tensor
from torch.nn import functional as F

SHORT = 256
"""Positions up to which the weights of attention fit into a CPU's caches."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return `softmax(q k^T / sqrt(D)) v`, f[*,N,D], for `q`, `k`, `v` f[*,N,D]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= SHORT:
        # On a CPU the fused kernel's backward pass in bf16 is seven times slower than in fp32.
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)
