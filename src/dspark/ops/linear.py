"""Matrix product with weights packed for the CPU kernel; the plain twin is torch's own linear.

N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark.ops.cpu import load_kernels

STEP = {torch.float32: 1, torch.bfloat16: 2}  # inputs that a kernel takes at once


def pack(weight_NK: Tensor) -> Tensor:
    """The kernels' layout of a weight matrix, [N/16, values of a tile] in its dtype: bits for them alone (packed.h)."""
    load_kernels()
    return torch.ops.dspark.pack(weight_NK)


def packable(weight_NK: Tensor) -> bool:
    """Whether the CPU kernel takes this matrix."""
    return (
        weight_NK.device.type == "cpu"
        and weight_NK.dtype in STEP
        and weight_NK.shape[1] % STEP[weight_NK.dtype] == 0
        and load_kernels()
    )


class PackedLinear(nn.Module):
    """`nn.Linear` at the speed of memory for a few rows: a row's bits do not depend on the rows beside it."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        self.register_buffer("packed", pack(weight_NK.detach()))
        self.register_buffer("bias", None if bias_N is None else bias_N.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x[…, K] → […, N]."""
        return torch.ops.dspark.linear(x, self.packed, self.bias, self.out_features)


def pack_linears(module: nn.Module) -> int:
    """Swap every packable `nn.Linear` below `module`, in place; the plain weights are dropped. Returns how many."""
    swapped = 0
    for name, child in module.named_children():
        if type(child) is nn.Linear and packable(child.weight):
            setattr(module, name, PackedLinear(child.weight, child.bias))
            swapped += 1
        else:
            swapped += pack_linears(child)
    return swapped
