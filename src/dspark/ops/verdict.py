"""Both acceptance rules over one round, from logits to the last token, where knobs alone shape the laws.

R requests, K draft slots, V vocabulary, B = sum of (1 + plan) target rows, request-major.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.ops.acceptance import accepts, residual
from dspark.ops.cpu import has_kernel
from dspark.ops.races import exponentials
from dspark.ops.rows import argmax
from dspark.ops.sampling import draw
from dspark.ops.truncation import truncate_plain


def verdict(
    logits_BV: Tensor,
    plan: Sequence[int],
    token_RK: Tensor,
    q_RKV: Tensor,
    knobs_R4: Tensor,
    accept_RK: Tensor,
    final_R: Tensor,
    key_RK1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(accepted [R], the token committed after them [R]), int64; V where its row has a NaN or no finite maximum.

    The law of row b is softmax(logits / temperature), truncated as the request's knobs say, a one-hot at the first
    largest logit for temperature 0. Accept with probability min(1, p/q); at the first rejection draw from
    normalize(max(p - q, 0)), with none from p. Rows after the first rejection are not looked at. (DSpark, §2) Where a
    key is not 0 the coupled rule holds: the winner of p / exponential stands, and drafts pass while they are it.
    """
    run = torch.ops.dspark.verdict.default if has_kernel(logits_BV) else verdict_plain
    return run(logits_BV, plan, token_RK, q_RKV, knobs_R4, accept_RK, final_R, key_RK1)


def verdict_plain(
    logits_BV: Tensor,
    plan: Sequence[int],
    token_RK: Tensor,
    q_RKV: Tensor,
    knobs_R4: Tensor,
    accept_RK: Tensor,
    final_R: Tensor,
    key_RK1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification of the kernel, request by request."""
    accepted, last, start = [], [], 0
    wide = torch.promote_types(logits_BV.dtype, torch.float32)
    for r, length in enumerate(plan):
        x_LV = logits_BV[start : start + length + 1].to(wide)
        start += length + 1
        temperature, *_ = knobs_R4[r]
        if temperature > 0:
            p_LV = (x_LV / temperature.to(wide)).softmax(1)
            p_LV = truncate_plain(p_LV, knobs_R4[r : r + 1, 1:].expand(length + 1, 3))
        else:
            p_LV = torch.zeros_like(x_LV).scatter_(1, x_LV.argmax(1, keepdim=True), 1.0)
        slot = torch.arange(length, device=logits_BV.device)
        token = token_RK[r, :length]
        coupled = key_RK1 is not None and bool(key_RK1[r, 0] != 0) and bool(temperature > 0)
        if coupled:
            assert key_RK1 is not None
            winner_L = argmax(p_LV / exponentials(key_RK1[r, : length + 1], x_LV.shape[1]))
            passed = winner_L[:length] == token
        else:
            passed = accepts(p_LV[slot, token], q_RKV[r, slot, token], accept_RK[r, :length])
        count = int(passed.cumprod(0).sum())
        unsound = (~x_LV.amax(1).isfinite()).nonzero()[:1].flatten().tolist()  # the largest of a row with NaN is NaN
        if unsound and unsound[0] <= count:
            accepted.append(unsound[0])
            last.append(x_LV.shape[1])
            continue
        if coupled:
            accepted.append(count)
            last.append(int(winner_L[count]))
            continue
        law_1V = p_LV[count : count + 1]
        if count < length:
            law_1V = residual(law_1V, q_RKV[r, count : count + 1].to(wide))
        accepted.append(count)
        last.append(int(draw(law_1V, final_R[r : r + 1])))
    return torch.tensor(accepted, device=logits_BV.device), torch.tensor(last, device=logits_BV.device)
