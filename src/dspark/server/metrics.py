"""What Prometheus reads: counts and times of requests as they are served, and the engine's own state when asked.

Names are those of vLLM's metrics with `dspark_` for `vllm:` where it has one. Labels are bounded: endpoints, statuses,
finish reasons and draft positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dspark.engine.request import Commit, RequestStatistics
from dspark.engine.step import EngineCore
from dspark.speculation.statistics import SpeculationStatistics, total

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
MOST_POSITIONS = 64


@dataclass(frozen=True)
class EngineState:
    """An engine between two steps."""

    running: int
    waiting: int
    pages_used: int  # held by requests; a page only the prefix cache holds can be had at once
    pages: int
    steps: int
    step_seconds: float
    speculation: SpeculationStatistics  # of all requests, finished or not

    @staticmethod
    def of(core: EngineCore) -> EngineState:
        """Reads `core`; call it where nothing steps it."""
        pool = core.admission.pool
        return EngineState(
            running=len(core.admission.running),
            waiting=len(core.admission.waiting),
            pages_used=pool.capacity - pool.available,
            pages=pool.capacity,
            steps=core.timings.steps,
            step_seconds=core.timings.total,
            speculation=total([core.statistics, *(request.statistics for request in core.requests.values())]),
        )


class Metrics:
    """One server's metrics, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.state: EngineState | None = None
        self.failed_steps = 0
        self._requests = Counter(
            "dspark_requests", "Answers by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self._finished = Counter(
            "dspark_request_success", "Texts finished, by reason.", ["finished_reason"], registry=registry
        )
        self._cancelled = Counter("dspark_requests_cancelled", "Requests whose client went away.", registry=registry)
        self._refused = Counter("dspark_requests_refused", "Requests answered 429.", registry=registry)
        self._prompt = Counter("dspark_prompt_tokens", "Prompt tokens of requests that began.", registry=registry)
        self._generated = Counter("dspark_generation_tokens", "Tokens generated.", registry=registry)
        self._queries = Counter("dspark_prefix_cache_queries", "Prompt tokens looked up.", registry=registry)
        self._hits = Counter("dspark_prefix_cache_hits", "Prompt tokens found in the prefix cache.", registry=registry)
        self._preemptions = Counter("dspark_num_preemptions", "Times a text gave its pages back.", registry=registry)
        self._first = Histogram(
            "dspark_time_to_first_token_seconds", "Arrival to first token.", buckets=SLOW, registry=registry
        )
        self._between = Histogram(
            "dspark_inter_token_latency_seconds",
            "Time since the commit before, shared among a commit's tokens; one observation a token.",
            buckets=FAST,
            registry=registry,
        )
        self._whole = Histogram(
            "dspark_e2e_request_latency_seconds", "Arrival to last token.", buckets=SLOW, registry=registry
        )
        registry.register(self)

    def answered(self, endpoint: str, status: int) -> None:
        """An answer's headers went out."""
        self._requests.labels(endpoint, str(status)).inc()
        if status == 429:
            self._refused.inc()

    def cancelled(self) -> None:
        """A client went away before its answer was whole."""
        self._cancelled.inc()

    def watch(self) -> TextWatch:
        """Follows one text."""
        return TextWatch(self)

    def collect(self) -> Iterator[Metric]:
        """The engine's state as it was last read."""
        state = self.state
        if state is None:
            return
        spec = state.speculation
        yield GaugeMetricFamily("dspark_num_requests_running", "Texts with pages.", state.running)
        yield GaugeMetricFamily("dspark_num_requests_waiting", "Texts that wait for pages.", state.waiting)
        usage = state.pages_used / state.pages
        yield GaugeMetricFamily("dspark_kv_cache_usage_perc", "Share of pages held by texts, 1 is all.", usage)
        yield GaugeMetricFamily("dspark_kv_cache_pages", "Pages for keys and values.", state.pages)
        for name, text, value in (
            ("dspark_engine_steps", "Target forwards.", state.steps),
            ("dspark_engine_step_seconds", "Time in steps.", state.step_seconds),
            ("dspark_engine_failed_steps", "Steps that failed, with the requests in them.", self.failed_steps),
            ("dspark_spec_decode_num_drafts", "Rounds of a text in which it could draft.", spec.rounds),
            ("dspark_spec_decode_num_draft_tokens", "Tokens drafted.", spec.drafted),
            ("dspark_spec_decode_num_verified_tokens", "Drafted tokens that the target checked.", spec.verified),
            (
                "dspark_spec_decode_num_trimmed_tokens",
                "Drafted tokens the plan left out.",
                spec.drafted - spec.verified,
            ),
            ("dspark_spec_decode_num_accepted_tokens", "Checked tokens that stood.", spec.accepted),
            ("dspark_spec_decode_num_rejected_tokens", "Checked tokens that fell.", spec.verified - spec.accepted),
            ("dspark_spec_decode_num_committed_tokens", "Tokens committed by rounds.", spec.committed),
        ):
            yield CounterMetricFamily(name, text, value)
        for name, text, counts in (
            ("verified", "Rounds in which this position was checked.", spec.verified_at),
            ("reached", "... and all before it stood.", spec.reached_at),
            ("accepted", "... and itself stood.", spec.accepted_at),
        ):
            family = CounterMetricFamily(f"dspark_spec_decode_num_{name}_tokens_per_pos", text, labels=["position"])
            for position, count in enumerate(counts[:MOST_POSITIONS]):
                family.add_metric([str(position)], count)
            yield family

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)


class TextWatch:
    """One text's way from its arrival to its end."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._arrived = perf_counter()
        self._last: float | None = None

    def take(self, commit: Commit) -> None:
        """A commit that reached the server."""
        metrics, now = self._metrics, perf_counter()
        tokens = len(commit.token_ids)
        metrics._generated.inc(tokens)
        if self._last is None:
            metrics._first.observe(now - self._arrived)
            self._started(commit.statistics)
        else:
            each = (now - self._last) / max(tokens, 1)
            for _ in range(tokens):
                metrics._between.observe(each)
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
