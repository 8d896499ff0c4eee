"""Key/value pools cut into pages, and the allocator that counts who uses which page.

S slots = pages · page_size, R requests, N positions, G key/value heads, d head size.
Page 0 is scratch: padding rows write there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.common.errors import UserError

SCRATCH_PAGE = 0


def slots_at(page_table_RP: Tensor, position_RN: Tensor, page_size: int) -> Tensor:
    """The slot of each position [R, N] in its row of a page table."""
    page_RN = page_table_RP.gather(1, position_RN // page_size).long()
    return page_RN * page_size + position_RN % page_size


@dataclass(frozen=True)
class KVPool:
    """Keys and values of every layer, flat by slot: `keys[layer]` and `values[layer]` are [S, G, d]."""

    keys: list[Tensor]
    values: list[Tensor]
    pages: int
    page_size: int

    @staticmethod
    def empty(
        shapes: Sequence[tuple[int, int, int]], pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVPool:
        """One pool a layer; `shapes` are (kv heads, key size, value size)."""
        slots = pages * page_size
        keys = [torch.zeros(slots, heads, key, dtype=dtype, device=device) for heads, key, _ in shapes]
        values = [torch.zeros(slots, heads, value, dtype=dtype, device=device) for heads, _, value in shapes]
        return KVPool(keys, values, pages, page_size)

    @property
    def bytes(self) -> int:
        """Memory of all layers."""
        return sum(pool.numel() * pool.element_size() for pool in [*self.keys, *self.values])


class PageAllocator:
    """Hands out page numbers and counts references; a page nobody holds is free, oldest first."""

    def __init__(self, pages: int):
        if pages < 2:
            raise UserError(f"{pages} pages leave none beside the scratch page; give the pool at least 2")
        self.pages = pages
        self._free: deque[int] = deque(range(1, pages))
        self._count = [0] * pages

    @property
    def free(self) -> int:
        """How many pages can be taken now."""
        return len(self._free)

    def references(self, page: int) -> int:
        """How many holders `page` has."""
        return self._count[page]

    def take(self) -> int | None:
        """A free page with one reference, or None when there is none."""
        if not self._free:
            return None
        page = self._free.popleft()
        self._count[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a page that is in use."""
        assert self._count[page] > 0, f"page {page} is free and cannot be shared"
        self._count[page] += 1

    def release(self, page: int) -> None:
        """One holder less; the last one frees the page."""
        assert self._count[page] > 0, f"page {page} released more often than taken"
        self._count[page] -= 1
        if self._count[page] == 0:
            self._free.append(page)

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Raises AssertionError unless the counts are exactly what `holders` hold and the rest is free."""
        count = [0] * self.pages
        for held in holders:
            for page in held:
                count[page] += 1
        assert count == self._count, (
            f"pages with wrong counts: {[p for p in range(self.pages) if count[p] != self._count[p]]}"
        )
        free = list(self._free)
        assert len(set(free)) == len(free), "a page is free twice"
        assert set(free) == {p for p in range(1, self.pages) if count[p] == 0}, "free list and counts disagree"
