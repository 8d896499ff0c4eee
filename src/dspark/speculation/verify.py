"""Decides which drafted tokens are committed, and what comes after them, so that the text follows the target's law.

R requests, K draft slots, L longest plan, V vocabulary, B = sum of (1 + plan) target rows, request-major.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.drafters.base import Draft
from dspark.ops.acceptance import accepts, residual
from dspark.ops.sampling import draw, race, row_starts
from dspark.speculation.noise import RoundNoise


@dataclass(frozen=True)
class Verdict:
    """What one round commits. All on the host."""

    accepted_R: list[int]  # how many drafted tokens were accepted, 0..plan[r]
    tokens: list[list[int]]  # per request the accepted ones, then the correction or bonus token: accepted + 1
    plan: list[int]  # how many drafted tokens were verified


def verify(draft: Draft | None, plan: Sequence[int], target_BV: Tensor, noise: RoundNoise) -> Verdict:
    """Commit tokens distributed exactly as the target's own, whatever the draft and the plan. (DSpark, §2 and alg. 1)

    `target_BV` is the shaped target law: row k of request r is the law after its first k drafted tokens. A plan of 0
    is plain decoding; without any draft pass None. Rejection rule: accept x with probability min(1, p(x)/q(x)), at the
    first rejection draw from normalize(max(p - q, 0)), with none draw from p. Coupled rule: commit
    argmax(log p + g) at every position for as long as the draft agrees. The host reads from the device once.
    Raises FloatingPointError if a law that is drawn from is not made of numbers.
    """
    plan, vocabulary = list(plan), target_BV.shape[1]
    start = row_starts([1 + length for length in plan])
    assert len(target_BV) == sum(plan) + len(plan), "the target's rows must be 1 + plan per request"
    longest = max(plan)
    start_R = torch.tensor(start, device=target_BV.device)
    choice_B = _coupled_choices(target_BV, plan, start, noise)
    if longest == 0:
        accepted_R, law_RV, columns = None, target_BV, []
    else:
        assert draft is not None, "a plan above 0 needs a draft"
        plan_R = torch.tensor(plan, device=target_BV.device)
        token_RL = draft.token_RK[:, :longest]
        accept_RL = _accepted_slots(draft, token_RL, plan_R, start_R, target_BV, choice_B, noise)
        accepted_R = accept_RL.cumprod(1).sum(1)
        law_RV = _final_law(draft, accepted_R, plan_R, start_R, target_BV)
        columns = [token_RL, accepted_R.unsqueeze(1)]
    final_R = draw(law_RV, noise.final_R)
    if choice_B is not None:
        row_R = start_R if accepted_R is None else start_R + accepted_R
        chosen_R = choice_B[row_R]
        final_R = torch.where(chosen_R >= 0, chosen_R, final_R)
    table = torch.cat([*columns, final_R.unsqueeze(1)], 1).tolist()  # the one host read
    accepted = [row[-2] for row in table] if longest else [0] * len(plan)
    if any(row[-1] >= vocabulary for row in table):
        raise FloatingPointError("the target's probabilities are not numbers; run the target in float32 or bfloat16")
    return Verdict(accepted, [[*row[:n], row[-1]] for row, n in zip(table, accepted, strict=True)], plan)


def _accepted_slots(
    draft: Draft,
    token_RL: Tensor,
    plan_R: Tensor,
    start_R: Tensor,
    target_BV: Tensor,
    choice_B: Tensor | None,
    noise: RoundNoise,
) -> Tensor:
    """Whether each drafted token passes, on its own, bool [R, L]; slots past the plan do not."""
    longest = token_RL.shape[1]
    slot_L = torch.arange(longest, device=token_RL.device)
    in_plan_RL = slot_L < plan_R.unsqueeze(1)
    row_RL = (start_R.unsqueeze(1) + slot_L).clamp(max=len(target_BV) - 1)
    p_RL = target_BV[row_RL, token_RL]
    q_RL = draft.probability_RKV[:, :longest].gather(2, token_RL.unsqueeze(2)).squeeze(2)
    accept_RL = accepts(p_RL, q_RL, noise.accept_RK[:, :longest])
    if choice_B is not None:
        chosen_RL = choice_B[row_RL]
        accept_RL = torch.where(chosen_RL >= 0, chosen_RL == token_RL, accept_RL)
    return accept_RL & in_plan_RL


def _final_law(draft: Draft, accepted_R: Tensor, plan_R: Tensor, start_R: Tensor, target_BV: Tensor) -> Tensor:
    """The rejection rule's law of the last committed token: the residual, or p itself after a full acceptance."""
    p_RV = target_BV[start_R + accepted_R]
    slot_R = accepted_R.clamp(max=draft.probability_RKV.shape[1] - 1)
    q_RV = draft.probability_RKV[torch.arange(len(slot_R), device=slot_R.device), slot_R]
    return residual(p_RV, q_RV * (accepted_R < plan_R).unsqueeze(1))


def _coupled_choices(target_BV: Tensor, plan: list[int], start: list[int], noise: RoundNoise) -> Tensor | None:
    """The token the coupled rule commits at each row, int64 [B], -1 on other requests' rows; None without any."""
    if not noise.coupled:
        return None
    exponential_CKV = noise.exponential(target_BV.shape[1])
    row = [start[r] + k for r in noise.coupled for k in range(1 + plan[r])]
    index = [c for c, r in enumerate(noise.coupled) for _ in range(1 + plan[r])]
    slot = [k for r in noise.coupled for k in range(1 + plan[r])]
    if len(row) == exponential_CKV.shape[0] * exponential_CKV.shape[1] == len(target_BV):
        return race(target_BV, exponential_CKV.flatten(0, 1))
    rows = torch.tensor(row, device=target_BV.device)
    choice_B = torch.full((len(target_BV),), -1, device=target_BV.device)
    choice_B[rows] = race(target_BV[rows], exponential_CKV[index, slot])
    return choice_B
