"""Pages with memory: a full, committed page is kept under the hash of all tokens up to its end until it is needed.

The cache is one more holder of each page it knows; a page that only the cache holds can be evicted, least recently
used first. Names are chained hashes, so a lookup is a walk from the first page; a request's last page is released
first, so a child is evicted before its parent.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from dspark.models.pages import PageAllocator

ROOT = b"dspark"


def extend_names(names: list[bytes], tokens: Sequence[int], page_size: int) -> None:
    """Append the names of the full pages of `tokens` that `names` does not reach yet: hash(parent's name, tokens)."""
    while (len(names) + 1) * page_size <= len(tokens):
        start = len(names) * page_size
        text = array("q", tokens[start : start + page_size]).tobytes()
        names.append(blake2b((names[-1] if names else ROOT) + text, digest_size=16).digest())


class PagePool:
    """Takes, shares and releases pages, remembering the contents of those that are worth it."""

    def __init__(self, pages: int, page_size: int, *, remember: bool = True):
        self.page_size = page_size
        self.remember = remember
        self._allocator = PageAllocator(pages)
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # pages only the cache holds, oldest first

    @property
    def capacity(self) -> int:
        """How many pages requests could have together."""
        return self._allocator.pages - 1

    @property
    def available(self) -> int:
        """How many pages can be taken now, by evicting what nobody uses."""
        return self._allocator.free + len(self._idle)

    def take(self) -> int | None:
        """A page for one holder, evicting the longest unused cached page if none is free; None when all are in use."""
        if not self._allocator.free:
            if not self._idle:
                return None
            self._forget(next(iter(self._idle)))
        return self._allocator.take()

    def find(self, names: Sequence[bytes]) -> list[int]:
        """Share the longest cached chain of pages that `names` starts with."""
        pages: list[int] = []
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            self._allocator.share(page)
            self._idle.pop(page, None)
            pages.append(page)
        return pages

    def publish(self, name: bytes, page: int) -> None:
        """Let others find a full page of committed tokens. The same text computed twice keeps its first copy."""
        if self.remember and name not in self._page_of:
            self._page_of[name] = page
            self._name_of[page] = name
            self._allocator.share(page)

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each page; what the cache knows stays until evicted, the last pages going first."""
        for page in reversed(pages):
            self._allocator.release(page)
            if page in self._name_of and self._allocator.references(page) == 1:
                self._idle[page] = None

    def forget_all(self) -> None:
        """Forget every cached page that nobody uses."""
        while self._idle:
            self._forget(next(iter(self._idle)))

    def _forget(self, page: int) -> None:
        del self._idle[page]
        del self._page_of[self._name_of.pop(page)]
        self._allocator.release(page)

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Raises AssertionError unless every page is held exactly as `holders` and the cache say."""
        held = [list(holder) for holder in holders]
        self._allocator.check_integrity([*held, list(self._name_of)])
        assert {page: name for name, page in self._page_of.items()} == self._name_of, "the cache's two maps disagree"
        used = {page for holder in held for page in holder}
        assert set(self._idle) == set(self._name_of) - used, "the evictable pages are not those only the cache holds"
