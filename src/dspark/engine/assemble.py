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
    """A step's batch, and which of its rows need logits: every sampled request's anchor row and draft rows.

    The last `scored` of them are rows of prompts whose own tokens' log-probabilities are asked for.
    """

    batch: Ragged
    rows_B: Tensor
    scored: int


def page_table(requests: Sequence[Request], tokens: int, page_size: int) -> np.ndarray:
    """Pages by request, int32 [R, P], wide enough for `tokens` tokens a request where it has them, zeros behind."""
    width = -(-tokens // page_size)
    if len(requests) == 1:  # its own row, which nobody changes before the step is over
        return requests[0].page_row[None, :width]
    return np.stack([request.page_row[:width] for request in requests])


def assemble(
    schedule: Schedule, draft: Draft | None, plan: Sequence[int], *, page_size: int, device: torch.device
) -> Assembled:
    """Sampled requests first, each with its uncached tokens and plan[r] drafts; then partial prefills.

    Lists are built on the host and sent in two pieces: for the few rows of a decoding step that is the least work.
    """
    parts = [*zip(schedule.sampled, schedule.rows, plan, strict=True)]
    parts += [(request, rows, -1) for request, rows in schedule.partial]  # -1: not even the last row has logits
    token: list[int] = []
    position: list[int] = []
    slot: list[int] = []
    wanted: list[int] = []
    scored: list[int] = []
    first_draft: list[int] = []
    context: list[int] = []
    bounds, furthest = [0], 0
    for request, rows, drafts in parts:
        start, stop = request.cached, request.cached + rows + max(drafts, 0)
        scored += [len(token) - start + position for position in request.unscored(rows)]
        token += request.tokens[start : start + rows]
        first_draft.append(len(token))
        token += [0] * max(drafts, 0)
        position += range(start, stop)
        pages = request.pages
        slot += [pages[p // page_size] * page_size + p % page_size for p in range(start, stop)]
        wanted += range(len(token) - drafts - 1, len(token))
        bounds.append(len(token))
        context.append(start)
        furthest = max(furthest, stop)
    T, R = len(token), len(parts)
    wanted += scored
    wide = _to(np.array(token + position + slot + wanted, dtype=np.int64), device)
    narrow = _to(np.array(bounds + context, dtype=np.int32), device)
    if any(plan):
        assert draft is not None, "a plan above 0 needs a draft"
        _put_drafts(wide, draft, plan, first_draft[: len(plan)])
    table_RP = _to(page_table([request for request, _, _ in parts], furthest, page_size), device)
    token_T, position_T, slot_T, wanted_B = wide.split([T, T, T, len(wanted)])
    bounds_R1, context_R = narrow.split([R + 1, R])
    return Assembled(Ragged(token_T, position_T, slot_T, table_RP, bounds_R1, context_R), wanted_B, len(scored))


def committed_rows(rows: Sequence[int], plan: Sequence[int], accepted: Sequence[int], total: int) -> list[int] | None:
    """The rows of a step that are not rejected drafts, of `total`; None if all of them."""
    if list(plan) == list(accepted):
        return None
    kept: list[int] = []
    start = 0
    for own, planned, passed in zip(rows, plan, accepted, strict=True):
        kept += range(start, start + own + passed)
        start += own + planned
    return [*kept, *range(start, total)]


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
