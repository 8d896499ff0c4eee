"""What Prometheus reads: counts and times of requests as they are served, and the engine's own state when asked.

Names are those of vLLM's metrics with `dspark_` for `vllm:` where it has one. Labels are bounded: endpoints, statuses,
finish reasons and draft positions.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from dspark.engine.request import Commit, RequestStatistics
from dspark.server.engine_metrics import EngineState, engine_families

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
LAG = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
LAG_EVERY = 0.05  # s


class Tally:
    """A histogram that takes many equal samples at once, for what happens with every commit; one thread observes."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, whole: float, *, shares: int) -> None:
        """`shares` samples that add up to `whole`."""
        if shares:
            self.counts[bisect_left(self.bounds, whole / shares)] += shares
            self.sum += whole

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """As Prometheus reads it: a bucket counts all samples up to its bound."""
        bounds = [*map(str, self.bounds), "+Inf"]
        return HistogramMetricFamily(name, text, list(zip(bounds, accumulate(self.counts), strict=True)), self.sum)


class Metrics:
    """One server's metrics, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.state: EngineState | None = None
        self.failed_steps = 0
        self.step_age = 0.0  # s
        self._requests = Counter(
            "dspark_requests", "Answers by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self._finished = Counter(
            "dspark_request_success", "Texts finished, by reason.", ["finished_reason"], registry=registry
        )
        self._cancelled = Counter("dspark_requests_cancelled", "Requests whose client went away.", registry=registry)
        self._refused = Counter("dspark_requests_refused", "Requests answered 429.", registry=registry)
        self._prompt = Counter("dspark_prompt_tokens", "Prompt tokens of requests that began.", registry=registry)
        self.generated = 0  # tokens
        self._queries = Counter("dspark_prefix_cache_queries", "Prompt tokens looked up.", registry=registry)
        self._hits = Counter("dspark_prefix_cache_hits", "Prompt tokens found in the prefix cache.", registry=registry)
        self._preemptions = Counter("dspark_num_preemptions", "Times a text gave its pages back.", registry=registry)
        self._first = Histogram(
            "dspark_time_to_first_token_seconds", "Arrival to first token.", buckets=SLOW, registry=registry
        )
        self.between = Tally(FAST)
        self._whole = Histogram(
            "dspark_e2e_request_latency_seconds", "Arrival to last token.", buckets=SLOW, registry=registry
        )
        self.lag = Histogram(
            "dspark_event_loop_lag_seconds", "How late the loop wakes what has slept.", buckets=LAG, registry=registry
        )
        ProcessCollector(registry=registry)
        registry.register(self)

    def answered(self, endpoint: str, status: int) -> None:
        """An answer's headers went out."""
        self._requests.labels(endpoint, str(status)).inc()
        if status == 429:
            self._refused.inc()

    def cancelled(self) -> None:
        """A client went away before its answer was whole."""
        self._cancelled.inc()

    async def watch_lag(self) -> None:
        """Asks the event loop again and again how late it is; runs until it is cancelled."""
        while True:
            due = perf_counter() + LAG_EVERY
            await asyncio.sleep(LAG_EVERY)
            self.lag.observe(max(0.0, perf_counter() - due))

    def watch(self) -> TextWatch:
        """Follows one text."""
        return TextWatch(self)

    def collect(self) -> Iterator[Metric]:
        """What is counted with every commit, and the engine's state as it was last read."""
        yield CounterMetricFamily("dspark_generation_tokens", "Tokens generated.", self.generated)
        text = "Time since the tokens sent before, shared among those sent together; one observation a token."
        yield self.between.family("dspark_inter_token_latency_seconds", text)
        if self.state is not None:
            yield from engine_families(self.state, failed_steps=self.failed_steps, step_age=self.step_age)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)


class TextWatch:
    """One text's way from its arrival to its end."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._arrived = perf_counter()
        self._last: float | None = None

    def take(self, commits: Sequence[Commit], tokens: int) -> None:
        """Commits that reached the server together, at least one, and how many tokens they brought."""
        metrics, now, commit = self._metrics, perf_counter(), commits[-1]
        metrics.generated += tokens
        if self._last is None:
            metrics._first.observe(now - self._arrived)
            self._started(commit.statistics)
        else:
            metrics.between.observe(now - self._last, shares=tokens)
        self._last = now
        if commit.finish_reason:
            metrics._finished.labels(commit.finish_reason).inc()
            metrics._whole.observe(now - self._arrived)
            metrics._preemptions.inc(commit.statistics.preemptions)

    def _started(self, statistics: RequestStatistics) -> None:
        metrics = self._metrics
        metrics._prompt.inc(statistics.prompt_tokens)
        metrics._queries.inc(statistics.prompt_tokens)
        metrics._hits.inc(statistics.cached_tokens)
