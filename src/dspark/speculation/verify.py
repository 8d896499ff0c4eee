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
from dspark.ops.rows import argmax
from dspark.ops.sampling import draw, race, row_starts
from dspark.ops.verdict import verdict
from dspark.speculation.noise import RoundNoise

NO_NUMBERS = "the target's probabilities are not numbers; run the target in float32 or bfloat16"


class NoNumbers(FloatingPointError):
    """The law of some requests is not made of numbers: `places` are theirs in the round."""

    def __init__(self, places: Sequence[int]):
        super().__init__(NO_NUMBERS)
        self.places = list(places)


@dataclass(frozen=True)
class Verdict:
    """What one round commits. All on the host."""

    accepted_R: list[int]  # how many drafted tokens were accepted, 0..plan[r]
    tokens: list[list[int]]  # per request the accepted ones, then the correction or bonus token: accepted + 1
    plan: list[int]  # how many drafted tokens were verified


def verify(
    draft: Draft | None, plan: Sequence[int], target_BV: Tensor, noise: RoundNoise, sound_B: Tensor | None = None
) -> Verdict:
    """Commit tokens distributed exactly as the target's own, whatever the draft and the plan. (DSpark, §2 and alg. 1)

    `target_BV` is the shaped target law: row k of request r is the law after its first k drafted tokens. A plan of 0
    is plain decoding; without any draft pass None. Rejection rule: accept x with probability min(1, p(x)/q(x)), at the
    first rejection draw from normalize(max(p - q, 0)), with none draw from p. Coupled rule: commit
    argmax(log p + g) at every position for as long as the draft agrees. The host reads from the device once.
    `sound_B` is false at rows whose law came from what are no numbers, which a one-hot does not show.
    Raises NoNumbers if a law that decides, or is drawn from, is not made of numbers.
    """
    plan, longest = list(plan), max(plan)
    start = row_starts([1 + length for length in plan])
    assert len(target_BV) == sum(plan) + len(plan), "the target's rows must be 1 + plan per request"
    start_R = torch.tensor(start, device=target_BV.device)
    choice_B = _coupled_choices(target_BV, plan, start, noise)
    if longest == 0:
        last_R, columns = start_R, []
    else:
        assert draft is not None, "a plan above 0 needs a draft"
        token_RL = draft.token_RK[:, :longest]
        accepted_R = _accepted(draft, token_RL, plan, start, target_BV, choice_B, noise)
        last_R, columns = start_R + accepted_R, [token_RL, accepted_R.unsqueeze(1)]
    if choice_B is not None and noise.chosen:
        final_R = choice_B[last_R]
    else:
        law_RV = target_BV[last_R]
        if draft is not None and longest:
            law_RV = _after_rejection(law_RV, draft, accepted_R, plan)
        final_R = draw(law_RV, noise.final_R)
        if choice_B is not None:
            final_R = torch.where(choice_B[last_R] >= 0, choice_B[last_R], final_R)
    if sound_B is not None and not (sound_B.device.type == "cpu" and sound_B.all()):  # elsewhere asking is a host read
        failed_B = (~sound_B).cumsum(0)  # rows after the last decide nothing
        failed_R = failed_B[last_R] - failed_B[start_R] + ~sound_B[start_R]
        final_R = torch.where(failed_R > 0, target_BV.shape[1], final_R)
    table = torch.cat([*columns, final_R.unsqueeze(1)], 1).tolist()  # the one host read
    _check([row[-1] for row in table], target_BV.shape[1])
    accepted = [row[-2] for row in table] if longest else [0] * len(plan)
    return Verdict(accepted, [[*row[:n], row[-1]] for row, n in zip(table, accepted, strict=True)], plan)


def verify_logits(
    draft: Draft | None, plan: Sequence[int], logits_BV: Tensor, knobs_R4: Tensor, noise: RoundNoise
) -> Verdict:
    """`verify` of softmax(logits / temperature), truncated, for requests with no other shaping: one kernel call."""
    if draft is None:
        token_RK, law_RKV = noise.no_draft(logits_BV.shape[1])
    else:
        token_RK, law_RKV = draft.token_RK, draft.probability_RKV
    accept_RK, keys, drawn = noise.accept_RK, noise.keys, token_RK.shape[1]
    if accept_RK.shape[1] > drawn:  # a block may have ended early
        accept_RK = accept_RK[:, :drawn]
    columns = verdict(logits_BV, plan, token_RK, law_RKV, knobs_R4, accept_RK, noise.final_R, keys)
    accepted, final = columns[0].tolist(), columns[1].tolist()
    _check(final, logits_BV.shape[1])
    drafted = token_RK.tolist()
    tokens = [[*row[:n], last] for row, n, last in zip(drafted, accepted, final, strict=True)]
    return Verdict(accepted, tokens, list(plan))


def _check(final: Sequence[int], vocabulary: int) -> None:
    if max(final) >= vocabulary:
        raise NoNumbers([place for place, token in enumerate(final) if token >= vocabulary])


def sound(logits_BV: Tensor) -> Tensor:
    """Which rows hold neither NaN nor +infinity, bool [B]: their sum is below infinity, in one pass."""
    return logits_BV.sum(1) < torch.inf


def _accepted(
    draft: Draft,
    token_RL: Tensor,
    plan: list[int],
    start: list[int],
    target_BV: Tensor,
    choice_B: Tensor | None,
    noise: RoundNoise,
) -> Tensor:
    """How many drafted tokens of each request pass before the first that does not, int64 [R]."""
    longest, device = token_RL.shape[1], token_RL.device
    row_RL = torch.tensor([[s + min(k, n) for k in range(longest)] for s, n in zip(start, plan, strict=True)])
    row_RL = row_RL.to(device)
    if choice_B is not None and noise.chosen:
        accept_RL = choice_B[row_RL] == token_RL
    else:
        p_RL = target_BV[row_RL, token_RL]
        q_RL = draft.probability_RKV[:, :longest].gather(2, token_RL.unsqueeze(2)).squeeze(2)
        accept_RL = accepts(p_RL, q_RL, noise.accept_RK[:, :longest])
        if choice_B is not None:
            chosen_RL = choice_B[row_RL]
            accept_RL = torch.where(chosen_RL >= 0, chosen_RL == token_RL, accept_RL)
    if min(plan) < longest:
        accept_RL = accept_RL & torch.tensor([[k < n for k in range(longest)] for n in plan]).to(device)
    return accept_RL.cumprod(1).sum(1)


def _after_rejection(p_RV: Tensor, draft: Draft, accepted_R: Tensor, plan: list[int]) -> Tensor:
    """The rejection rule's law of the last committed token: the residual, or p itself after a full acceptance."""
    plan_R, request_R = torch.tensor([plan, range(len(plan))], device=p_RV.device)
    q_RV = draft.probability_RKV[request_R, accepted_R.clamp(max=draft.probability_RKV.shape[1] - 1)]
    return residual(p_RV, q_RV * (accepted_R < plan_R).unsqueeze(1))


def _coupled_choices(target_BV: Tensor, plan: list[int], start: list[int], noise: RoundNoise) -> Tensor | None:
    """The token the coupled rule commits at each row, int64 [B], -1 on other requests' rows; None without any.

    When every law is a one-hot both rules commit its token, and the coupled one finds it with less work.
    """
    if noise.still:
        return argmax(target_BV)
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
