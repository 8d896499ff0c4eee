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
    wide = np.array(token + position + slot + wanted, dtype=np.int64)
    narrow = np.array(bounds + context, dtype=np.int32)
    token_T, position_T, slot_T, wanted_B = _to(device, wide, (T, 2 * T, 3 * T))
    bounds_R1, context_R = _to(device, narrow, (R + 1,))
    if any(plan):
        assert draft is not None, "a plan above 0 needs a draft"
        _put_drafts(token_T, draft, plan, first_draft[: len(plan)])
    (table_RP,) = _to(device, page_table([request for request, _, _ in parts], furthest, page_size))
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
    if token_T.device.type == "cpu":  # numpy takes a slice in a third of the time
        rows, drafted = token_T.numpy(), draft.token_RK.numpy()
        for r, (at, length) in enumerate(zip(first, plan, strict=True)):
            rows[at : at + length] = drafted[r, :length]
        return
    slots = draft.token_RK.shape[1]
    row = [at + k for at, length in zip(first, plan, strict=True) for k in range(length)]
    source = [r * slots + k for r, length in enumerate(plan) for k in range(length)]
    row_D, source_D = _to(token_T.device, np.array(row + source), (len(row),))
    token_T[row_D] = draft.token_RK.reshape(-1)[source_D]


def _to(device: torch.device, array: np.ndarray, cuts: Sequence[int] = ()) -> Sequence[Tensor]:
    """The parts of an array between `cuts` as tensors: on a device views of one copy."""
    edges = zip((0, *cuts), (*cuts, len(array)), strict=True)
    if device.type == "cpu":  # numpy's slices and this cost half of a split
        return [torch.from_numpy(array[start:stop]) for start, stop in edges]
    whole = torch.from_numpy(array).to(device, non_blocking=True)
    return [whole[start:stop] for start, stop in edges]
