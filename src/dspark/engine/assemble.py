"""Builds the one ragged batch of a step, and the part of it that became committed text.

T tokens, R sequences, B rows with logits, P pages per sequence, K draft slots, k taps, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark.drafters.base import Draft
from dspark.engine.admission import Schedule
from dspark.engine.request import Request
from dspark.models.batch import Ragged


class Assembled(NamedTuple):
    """A step's batch, and which of its rows need logits: every sampled request's anchor row and draft rows."""

    batch: Ragged
    rows_B: Tensor


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
        _to(np.concatenate([[0], end_R]).astype(np.int32), device),
        _to(context_R.astype(np.int32), device),
    )
    return Assembled(batch, _to(row_T[row_T >= wanted_R[request_T]], device))


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
