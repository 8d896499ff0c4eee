"""The target, the drafter and their pools: every forward of an engine is one of these three calls, and is timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dspark.drafters.base import Draft, DraftContext, Drafter, SharesPages
from dspark.engine.assemble import Assembled
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph
from dspark.models.target import Target

MOST_DEFERRED = 128  # rows


@dataclass
class Timings:
    """Seconds by phase since the start. On CUDA a phase is the time to launch it; waiting falls to `total`."""

    steps: int = 0
    target: float = 0.0
    drafter: float = 0.0
    total: float = 0.0

    @property
    def outside(self) -> float:
        """Seconds that neither forward accounts for: scheduling, assembling, verifying, text."""
        return self.total - self.target - self.drafter

    @property
    def outside_share(self) -> float:
        """`outside` as a share of all step time; 0 before the first step."""
        return self.outside / self.total if self.total else 0.0


class Runner:
    """Runs batches over one set of pages; the drafter's pools lie parallel to the target's."""

    def __init__(self, target: Target, drafter: Drafter, *, pages: int, page_size: int):
        self.target = target
        self.drafter = drafter
        self.pool = target.allocate(pages, page_size)
        self.timings = Timings()
        self.clock = time.perf_counter  # or `time.thread_time`, to measure on a busy machine
        self._compiled = False
        self._later = Deferred() if getattr(drafter, "rows_apart", False) else None
        if isinstance(drafter, SharesPages):
            drafter.share(self.pool)
        else:
            drafter.allocate(pages, page_size)

    def clear(self) -> None:
        """Zero every page of the target and make the drafter's context anew; nobody may be using a page."""
        for pool in [*self.pool.keys, *self.pool.values]:
            pool.zero_()
        if self._later is not None:
            self._later = Deferred()
        if not isinstance(self.drafter, SharesPages):
            self.drafter.allocate(self.pool.pages, self.pool.page_size)
            if self._compiled:
                self.drafter.compile_forwards()

    def compile(self) -> list[SwappableGraph]:
        """Start compiling every forward, or load it from the cache; each is used as soon as it is ready."""
        self._compiled = True
        return [self.target.compile(self.drafter.taps, self.pool.page_size), *self.drafter.compile_forwards()]

    def forward(self, step: Assembled) -> tuple[Tensor, Tensor | None]:
        """(logits_BV of the wanted rows, taps_TkD if the drafter reads any)."""
        before = self.clock()
        out = self.target.forward(step.batch, self.pool, step.rows_B, self.drafter.taps)
        self.timings.target += self.clock() - before
        return out

    def propose(self, context: DraftContext) -> Draft:
        """The drafter's block behind each anchor."""
        before = self.clock()
        if self._later is not None and self._later.rows:
            self.drafter.extend(*self._later.take())
        draft = self.drafter.propose(context)
        self.timings.drafter += self.clock() - before
        return draft

    def extend(
        self, batch: Ragged, taps_TkD: Tensor | None, kept: list[int] | None = None, *, drafting: bool = True
    ) -> None:
        """Take a step's rows into the drafter's context; rejected ones lie past the text and get overwritten there.

        Drafters that take rows apart are spared those not in `kept`. Rows of steps that draft nothing wait for the next
        draft where the drafter allows it, or until there are many.
        """
        before = self.clock()
        if self._later is not None and taps_TkD is not None and kept is not None:
            batch, taps_TkD = _only(kept, batch, taps_TkD)
        if self._later is not None and taps_TkD is not None and (self._later.rows or not drafting):
            self._later.put(batch, taps_TkD)
            if self._later.rows >= MOST_DEFERRED:
                self.drafter.extend(*self._later.take())
        else:
            self.drafter.extend(batch, taps_TkD)
        self.timings.drafter += self.clock() - before


class Deferred:
    """Rows and taps that the drafter has not taken yet, as one batch of rows when it does."""

    def __init__(self) -> None:
        self.rows = 0
        self._parts: list[tuple[Ragged, Tensor]] = []

    def put(self, batch: Ragged, taps_TkD: Tensor) -> None:
        """Keep a step's."""
        self.rows += len(batch.slot_T)
        self._parts.append((batch, taps_TkD))

    def take(self) -> tuple[Ragged, Tensor]:
        """All that was kept; of rows for the same slot only the newest, for the older would have been overwritten."""
        parts, self._parts, self.rows = self._parts, [], 0
        if len(parts) == 1:
            return parts[0]
        position_T = torch.cat([batch.position_T for batch, _ in parts])
        slot_T = torch.cat([batch.slot_T for batch, _ in parts])
        taps_TkD = torch.cat([taps for _, taps in parts])
        newest = {slot: row for row, slot in enumerate(slot_T.tolist())}
        if len(newest) < len(slot_T):
            return _only(list(newest.values()), replace(parts[-1][0], position_T=position_T, slot_T=slot_T), taps_TkD)
        return replace(parts[-1][0], position_T=position_T, slot_T=slot_T), taps_TkD


def _only(rows: list[int], batch: Ragged, taps_TkD: Tensor) -> tuple[Ragged, Tensor]:
    """Some rows' positions, slots and taps."""
    count = len(rows)
    if rows[-1] == count - 1 and rows[0] == 0:  # the first ones, as always with one request
        position_T, slot_T, taps_TkD = batch.position_T[:count], batch.slot_T[:count], taps_TkD[:count]
    else:
        index = torch.from_numpy(np.array(rows)).to(batch.slot_T.device)
        position_T, slot_T, taps_TkD = batch.position_T[index], batch.slot_T[index], taps_TkD[index]
    # not `dataclasses.replace`, which takes as long as the slices
    part = Ragged(batch.token_T, position_T, slot_T, batch.page_table_RP, batch.cu_query_R1, batch.context_R)
    return part, taps_TkD
