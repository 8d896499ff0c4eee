"""Where a law ends: top-k, then top-p on what that left, then min-p. Row by row, whoever the neighbours are.

B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.ops.cpu import load_kernels
from dspark.ops.rows import largest, rising


def truncate(p_BV: Tensor, cuts_PB1: Tensor, *, top_k: int, top_p: bool, min_p: bool) -> Tensor:
    """The law [B, V] that `cuts_PB1`, float64 top-k, top-p and min-p of each row, leaves of `p_BV`, renormalised.

    A top-k above the vocabulary, a top-p and a min-p of 0 cut nothing. The flags are for the host: the largest top-k
    that cuts (0: none does), and whether any row has a top-p or a min-p. Tokens as likely as the last one kept stay.
    """
    top_k_B1, top_p_B1, min_p_B1 = cuts_PB1
    if top_k:
        width = min(p_BV.shape[1], top_k)
        index_B1 = width - top_k_B1.clamp(max=width).long()
        p_BV = _keep(p_BV, largest(p_BV, width).gather(1, index_B1) * (top_k_B1 <= p_BV.shape[1]))
    if top_p:
        p_BV = _keep(p_BV, nucleus(p_BV, top_p_B1))
    if min_p:
        p_BV = _keep(p_BV, p_BV.amax(-1, keepdim=True) * min_p_B1.to(p_BV.dtype))
    return p_BV


def truncate_plain(p_BV: Tensor, cuts_B3: Tensor) -> Tensor:
    """What the round kernels do with knobs [B, 3]: `truncate`, its flags read from the device."""
    cutting_B = cuts_B3[:, 0] <= p_BV.shape[1]
    return truncate(
        p_BV,
        cuts_B3.T.unsqueeze(2),
        top_k=int((cuts_B3[:, 0] * cutting_B).max()),
        top_p=bool(cuts_B3[:, 1].any()),
        min_p=bool(cuts_B3[:, 2].any()),
    )


def _keep(p_BV: Tensor, threshold_B1: Tensor) -> Tensor:
    """Drop every token less likely than the row's threshold and renormalise; to the bit unchanged at threshold 0."""
    kept_BV = p_BV * (p_BV >= threshold_B1)
    return kept_BV / torch.where(threshold_B1 > 0, kept_BV.sum(-1, keepdim=True), 1.0)


def nucleus(p_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    """The probability of the last of the fewest tokens whose mass reaches top-p, [B, 1]; 0 if there is none."""
    if p_BV.device.type == "cpu" and p_BV.dtype == torch.float32 and load_kernels():
        return torch.ops.dspark.nucleus.default(p_BV, top_p_B1)
    return nucleus_plain(p_BV, top_p_B1)


def nucleus_plain(p_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    """The specification of the kernel: every row sorted, masses summed in float64 from the likeliest token down."""
    falling_BV = rising(p_BV).flip(-1)
    short_B1 = (falling_BV.cumsum(-1, dtype=torch.float64) < top_p_B1).sum(-1, keepdim=True)
    reached_B1 = (short_B1 < p_BV.shape[1]) & (top_p_B1 > 0)
    return falling_BV.gather(1, short_B1.clamp_(max=p_BV.shape[1] - 1)) * reached_B1
