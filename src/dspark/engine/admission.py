"""Which requests run in a step: first come, first served, within the pages and the rows of one forward.

Requests are known by arrival: everything running came before everything waiting. When pages run out the youngest
running request gives its own back and waits in front; the oldest can always go on, so all of them finish.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from dspark.engine.config import EngineConfig
from dspark.engine.prefix import PagePool, extend_names
from dspark.engine.request import Request


@dataclass
class Schedule:
    """One step's share of work. A request's rows are its first `rows` uncached tokens, then its drafts."""

    sampled: list[Request] = field(default_factory=list)  # their rows end with the anchor: each commits a token
    limits: list[int] = field(default_factory=list)  # drafts that fit behind each anchor
    rows: list[int] = field(default_factory=list)
    partial: list[tuple[Request, int]] = field(default_factory=list)  # prefill that does not reach its anchor yet

    def add(self, request: Request, rows: int) -> None:
        """Put `rows` tokens of `request` into the step, without drafts."""
        if rows == request.uncached:
            self.sampled.append(request)
            self.limits.append(0)
            self.rows.append(rows)
        else:
            self.partial.append((request, rows))

    def drafting_first(self) -> list[int] | None:
        """Put the sampled requests whose limit is above 0 in front of the others, so that a draft covers a prefix.

        Returns where each was before; None if nothing moved.
        """
        if all(self.limits) or not any(self.limits):
            return None
        order = [index for index, limit in enumerate(self.limits) if limit]
        order += [index for index, limit in enumerate(self.limits) if not limit]
        self.sampled = [self.sampled[index] for index in order]
        self.limits = [self.limits[index] for index in order]
        self.rows = [self.rows[index] for index in order]
        return order


class Admission:
    """The waiting and the running requests, and the pages between them."""

    def __init__(self, pool: PagePool, config: EngineConfig, *, block_size: int):
        self.pool = pool
        self.config = config
        self.block_size = block_size
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def prefilling(self) -> bool:
        """Whether the next step may compute prompts, and so take longer than others."""
        free = len(self.running) < self.config.max_running
        return bool(self.waiting and free) or not all(request.decoding for request in self.running)

    def remove(self, request: Request) -> None:
        """Take a request out at any time; its pages go back."""
        if request in self.running:
            self.running.remove(request)
            self.pool.release(request.drop_pages())
        else:
            self.waiting.remove(request)

    def schedule(self) -> Schedule:
        """Fill one step: every anchor first, then prefill in order of arrival, then whoever can be admitted."""
        schedule = Schedule()
        ready = min(sum(request.decoding for request in self.running), self.config.max_step_tokens)
        drafts = self._drafts_each(ready)
        anchors, left = ready, self.config.max_step_tokens - ready * (1 + drafts)
        index = 0
        while index < len(self.running):
            request = self.running[index]
            index += 1
            want = 1 if request.decoding and anchors else 0 if request.decoding else min(request.uncached, left)
            rows = self._reserve(request, want)
            if rows:
                schedule.add(request, rows)
                anchors -= request.decoding
                left -= 0 if request.decoding else rows
        self._grow_for_drafts(schedule, drafts)
        self._admit(schedule, left)
        return schedule

    def keep(self, request: Request, cached: int) -> None:
        """The first `cached` tokens are committed and in the pages: full pages become findable."""
        request.cached = cached
        size = self.pool.page_size
        if not self.pool.remember or (request.published + 1) * size > cached:
            return
        extend_names(request.names, request.tokens, size)
        while (request.published + 1) * size <= cached:
            self.pool.publish(request.names[request.published], request.pages[request.published])
            request.published += 1

    def check_integrity(self) -> None:
        """Raises AssertionError where a page leaks or is used twice, or the order of arrival is broken."""
        self.pool.check_integrity(request.pages for request in self.running)
        ids = [request.id for request in [*self.running, *self.waiting]]
        assert ids == sorted(set(ids)), "requests are not in order of arrival"
        for request in self.waiting:
            assert not request.pages and not request.cached, f"request {request.id} waits with pages"
        for request in self.running:
            count = len(request.pages)
            assert request.page_row[:count].tolist() == request.pages and not request.page_row[count:].any()
            assert request.cached <= count * self.pool.page_size, f"request {request.id} has more tokens than room"
            assert request.cached < len(request.tokens) <= request.limit, f"request {request.id} has no anchor"

    def _drafts_each(self, ready: int) -> int:
        """Rows for drafts behind each anchor; half of what the anchors leave is for prefill while there is any."""
        if not ready:
            return 0
        left = self.config.max_step_tokens - ready
        if len(self.running) > ready or (self.waiting and ready < self.config.max_running):
            left //= 2
        return min(self.block_size, left // ready)

    def _reserve(self, request: Request, rows: int) -> int:
        """Pages for `rows` more tokens, taken from younger requests if need be; how many rows there is room for."""
        while rows and not self._grow(request, request.cached + rows):
            if self.running[-1] is request:
                return min(rows, len(request.pages) * self.pool.page_size - request.cached)
            self._preempt(self.running.pop())
        return rows

    def _grow(self, request: Request, tokens: int) -> bool:
        while len(request.pages) * self.pool.page_size < tokens:
            page = self.pool.take()
            if page is None:
                return False
            request.append_page(page)
        return True

    def preempt_all(self) -> None:
        """Every running request gives its pages back and waits, in its order."""
        while self.running:
            self._preempt(self.running.pop())

    def _preempt(self, request: Request) -> None:
        self.pool.release(request.drop_pages())
        request.statistics.preemptions += 1
        self.waiting.appendleft(request)

    def _grow_for_drafts(self, schedule: Schedule, drafts: int) -> None:
        """Drafts get pages nobody else needs: they shorten, rather than preempt anyone."""
        if not drafts:
            return
        for index, request in enumerate(schedule.sampled):
            if request.decoding:
                want = min(drafts, request.params.draft_cap, request.limit - len(request.tokens) - 1)
                self._grow(request, request.cached + 1 + want)
                room = len(request.pages) * self.pool.page_size - request.cached - 1
                schedule.limits[index] = min(want, room)

    def _find(self, request: Request) -> list[int]:
        """The cached pages a request can start with; its anchor is always computed."""
        if not self.pool.remember or request.scores is not None:  # a cached token has no logits
            return []
        extend_names(request.names, request.tokens, self.pool.page_size)
        return self.pool.find(request.names[: (len(request.tokens) - 1) // self.pool.page_size])

    def _admit(self, schedule: Schedule, left: int) -> None:
        """Start waiting requests whose tokens all fit now, one spare page for everyone already running."""
        size = self.pool.page_size
        while self.waiting and left > 0 and len(self.running) < self.config.max_running:
            request = self.waiting[0]
            pages = self._find(request)
            missing = -(-len(request.tokens) // size) - len(pages)
            if missing + len(self.running) > self.pool.available and self.running:
                self.pool.release(pages)
                return
            self.running.append(self.waiting.popleft())
            for page in pages:
                request.append_page(page)
            request.cached, request.published = len(pages) * size, len(pages)
            if not request.output_length:
                request.statistics.cached_tokens = request.cached
            if request.statistics.admitted is None:
                request.statistics.admitted = time.perf_counter()
            rows = min(request.uncached, left)
            assert self._grow(request, request.cached + rows), "pages counted as available could not be taken"
            schedule.add(request, rows)
            left -= rows
