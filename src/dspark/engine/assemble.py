"""Builds the one ragged batch of a step, and the part of it that became committed text.

T tokens, R sequences, B rows with logits, P pages per sequence, K draft slots, k taps, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark.drafters.base import Draft
from dspark.engine.admission import Schedule
from dspark.engine.request import Request
from dspark.models.batch import Ragged


@dataclass(frozen=True)
class Assembled:
    """A step's batch, with the numbers on the host that its parts are found by."""

    batch: Ragged
    rows_B: Tensor  # every sampled request's anchor row and draft rows
    count_R: np.ndarray  # rows of each sequence
    start_R: np.ndarray  # of each sequence's rows
    position_T: np.ndarray
    slot_T: np.ndarray


def page_table(requests: Sequence[Request], tokens: int, page_size: int) -> np.ndarray:
    """Pages by request, int32 [R, P], wide enough for `tokens` tokens a request where it has them, zeros behind."""
    width = -(-tokens // page_size)
    return np.stack([request.page_row[:width] for request in requests])


def assemble(
    schedule: Schedule, draft: Draft | None, plan: Sequence[int], *, page_size: int, device: torch.device
) -> Assembled:
    """Sampled requests first, each with its uncached tokens and plan[r] drafts; then partial prefills."""
    sampled = len(schedule.sampled)
    requests = [*schedule.sampled, *(request for request, _ in schedule.partial)]
    own = [*schedule.rows, *(rows for _, rows in schedule.partial)]
    context_R = np.array([request.cached for request in requests], dtype=np.int64)
    count_R = np.array(own, dtype=np.int64)
    count_R[:sampled] += np.array(plan, dtype=np.int64)
    end_R = count_R.cumsum()
    start_R = end_R - count_R
    total = int(end_R[-1])
    table_RP = page_table(requests, int((context_R + count_R).max()), page_size)
    request_T = np.arange(len(requests)).repeat(count_R)
    row_T = np.arange(total)
    position_T = row_T + (context_R - start_R)[request_T]
    slot_T = table_RP[request_T, position_T // page_size] * np.int64(page_size) + position_T % page_size
    host_T = np.zeros(total, dtype=np.int64)
    for request, start, rows in zip(requests, start_R.tolist(), own, strict=True):
        host_T[start : start + rows] = request.tokens[request.cached : request.cached + rows]
    token_T = _to(host_T, device)
    if any(plan):
        assert draft is not None, "a plan above 0 needs a draft"
        _put_drafts(token_T, draft, plan, (end_R[:sampled] - plan).tolist())
    wanted_R = end_R.copy()  # where each sequence's rows with logits start; a partial prefill has none
    wanted_R[:sampled] -= np.array(plan, dtype=np.int64) + 1
    batch = Ragged(
        token_T,
        _to(position_T, device),
        _to(slot_T, device),
        _to(table_RP, device),
        _to(_bounds(count_R), device),
        _to(context_R.astype(np.int32), device),
    )
    return Assembled(batch, _to(row_T[row_T >= wanted_R[request_T]], device), count_R, start_R, position_T, slot_T)


def committed(step: Assembled, taps_TkD: Tensor | None, rejected_R: Sequence[int]) -> tuple[Ragged, Tensor | None]:
    """The batch without each sequence's last `rejected_R` rows, for the drafter's context."""
    batch, device = step.batch, step.batch.token_T.device
    if not any(rejected_R):
        return batch, taps_TkD
    kept_R = step.count_R.copy()
    kept_R[: len(rejected_R)] -= np.array(rejected_R, dtype=np.int64)
    bounds = _to(_bounds(kept_R), device)
    if len(kept_R) == 1:  # a slice is a view
        end = int(kept_R[0])
        token_T, position_T, slot_T = batch.token_T[:end], batch.position_T[:end], batch.slot_T[:end]
        taps_TkD = taps_TkD[:end] if taps_TkD is not None else None
    else:
        request_T = np.arange(len(kept_R)).repeat(step.count_R)
        row_T = np.arange(len(request_T))
        kept_T = row_T[row_T < (step.start_R + kept_R)[request_T]]
        index_T = _to(kept_T, device)
        token_T, taps_TkD = batch.token_T[index_T], taps_TkD[index_T] if taps_TkD is not None else None
        position_T, slot_T = _to(step.position_T[kept_T], device), _to(step.slot_T[kept_T], device)
    return Ragged(token_T, position_T, slot_T, batch.page_table_RP, bounds, batch.context_R), taps_TkD


def _bounds(count_R: np.ndarray) -> np.ndarray:
    bounds = np.zeros(len(count_R) + 1, dtype=np.int32)
    count_R.cumsum(out=bounds[1:])
    return bounds


def _put_drafts(token_T: Tensor, draft: Draft, plan: Sequence[int], first: Sequence[int]) -> None:
    """Write plan[r] drafted tokens of each request from row first[r] on; they never leave the device."""
    if len(plan) == 1:
        token_T[first[0] : first[0] + plan[0]] = draft.token_RK[0, : plan[0]]
        return
    slots = draft.token_RK.shape[1]
    row = [at + k for at, length in zip(first, plan, strict=True) for k in range(length)]
    source = [r * slots + k for r, length in enumerate(plan) for k in range(length)]
    index_2D = _to(np.array([row, source]), token_T.device)
    token_T[index_2D[0]] = draft.token_RK.reshape(-1)[index_2D[1]]


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)
