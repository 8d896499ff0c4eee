"""Draws a block left to right under a vanilla Markov head, as requests sample.

R requests, K block slots, C candidates, V vocabulary, r Markov rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark.ops.cpu import has_kernel
from dspark.ops.draws import Draws
from dspark.ops.races import exponentials
from dspark.ops.rows import argmax
from dspark.ops.truncation import truncate_plain


def draft_chain(
    base_RKV: Tensor,
    w1_Vr: Tensor,
    w2_Vr: Tensor,
    anchor_R: Tensor,
    draws: Draws,
    top: int,
    confidence_RK: Tensor,
    confidence_r: Tensor,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [R, K], the laws they were drawn from [R, K, V] in float32, confidence logits [R, K].

    Slot k draws from softmax((U_k + W2 W1[x_{k-1}]) / temperature), restricted to the `top` largest of U_k if top > 0
    (DSpark, eqs. 4–5) and truncated, by inverse CDF in token order, or where a key is given takes the winner of
    law / exponential. Confidence logits are `confidence_RK` + W1[x_{k-1}]·confidence_r (eq. 7); an empty
    `confidence_r` leaves them as they are. `packed` is `ops.linear.pack(w2_Vr)`, five times as fast without a
    restriction. Penalties and biases are the caller's: `base_RKV` has them.
    """
    arguments = (base_RKV, w1_Vr, w2_Vr, anchor_R, draws.knobs_R4, draws.uniform_RK, draws.key_RK, top)
    if has_kernel(base_RKV):
        return torch.ops.dspark.draft_chain(*arguments, confidence_RK, confidence_r, packed)
    return draft_chain_plain(*arguments, confidence_RK, confidence_r)


def draft_chain_plain(
    base_RKV: Tensor,
    w1_Vr: Tensor,
    w2_Vr: Tensor,
    anchor_R: Tensor,
    knobs_R4: Tensor,
    uniform_RK: Tensor,
    key_RK: Tensor | None,
    top: int,
    confidence_RK: Tensor,
    confidence_r: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of the kernel, slot by slot."""
    wide = torch.promote_types(base_RKV.dtype, torch.float32)
    temperature_R = knobs_R4[:, 0]
    previous_R, tokens, laws, confidences = anchor_R, [], [], []
    for slot in range(base_RKV.shape[1]):
        base_RV = base_RKV[:, slot].to(wide)
        embedding_Rr = w1_Vr[previous_R].to(wide)
        logits_RV = base_RV + embedding_Rr @ w2_Vr.to(wide).T
        if 0 < top < base_RV.shape[1]:
            order_RC = base_RV.argsort(dim=1, descending=True, stable=True)[:, :top]
            kept_RV = torch.zeros_like(base_RV, dtype=torch.bool).scatter_(1, order_RC, True)
            logits_RV = logits_RV.masked_fill(~kept_RV, float("-inf"))
        largest_R = logits_RV.argmax(1)
        one_hot_RV = torch.zeros_like(logits_RV).scatter_(1, largest_R[:, None], 1.0)
        safe_R1 = torch.where(temperature_R > 0, temperature_R, 1.0)[:, None]
        drawn_RV = truncate_plain((logits_RV / safe_R1).softmax(1), knobs_R4[:, 1:])
        law_RV = torch.where(temperature_R[:, None] > 0, drawn_RV, one_hot_RV.double())
        cumulative_RV = law_RV.double().cumsum(1)
        aim_R1 = cumulative_RV[:, -1:] * uniform_RK[:, slot, None]
        previous_R = torch.searchsorted(cumulative_RV, aim_R1).squeeze(1).clamp_(max=base_RV.shape[1] - 1)
        if key_RK is not None:
            winner_R = argmax(law_RV / exponentials(key_RK[:, slot], base_RV.shape[1]))
            raced_R = (key_RK[:, slot] != 0) & (temperature_R > 0)
            previous_R = torch.where(raced_R, winner_R.clamp_(max=base_RV.shape[1] - 1), previous_R)
        tokens.append(previous_R)
        laws.append(law_RV.float())
        seen_R = embedding_Rr @ confidence_r.to(wide) if len(confidence_r) else 0.0
        confidences.append((confidence_RK[:, slot].to(wide) + seen_R).float())
    return torch.stack(tokens, 1), torch.stack(laws, 1), torch.stack(confidences, 1)
