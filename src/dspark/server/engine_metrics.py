"""The engine's side of the metrics: its state between two steps, and the families that Prometheus reads of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from dspark.engine.step import EngineCore
from dspark.speculation.ledger import BUDGETS, Ledger, Priced
from dspark.speculation.reliability import RoundRecord, pooled_error
from dspark.speculation.statistics import SpeculationStatistics, total

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
    ledger: Ledger
    priced: Priced | None  # None where no planner reads a cost
    audited: list[RoundRecord] | None  # None where nothing is calibrated
    drifts: int
    planner: str
    compiling: int

    @staticmethod
    def of(core: EngineCore) -> EngineState:
        """Reads `core`; call it where nothing steps it."""
        pool, planning = core.admission.pool, core.planning
        calibration, ledger = planning.calibration, copy(planning.ledger)
        ledger.budgets = list(ledger.budgets)
        return EngineState(
            running=len(core.admission.running),
            waiting=len(core.admission.waiting),
            pages_used=pool.capacity - pool.available,
            pages=pool.capacity,
            steps=core.timings.steps,
            step_seconds=core.timings.total,
            speculation=total([core.statistics, *(request.statistics for request in core.requests.values())]),
            ledger=ledger,
            priced=copy(planning.live.priced) if planning.live is not None else None,
            audited=list(calibration.audited) if calibration is not None else None,
            drifts=calibration.drifts if calibration is not None else 0,
            planner=type(planning.planner).__name__.lower(),
            compiling=sum(graph.status == "compiling" for graph in core.graphs),
        )


def engine_families(state: EngineState, *, failed_steps: int, step_age: float) -> Iterator[Metric]:
    """All families of an engine; `step_age` in seconds is how long its present step has been going."""
    yield InfoMetricFamily("dspark_planner", "Who decides how much is drafted.", value={"planner": state.planner})
    yield GaugeMetricFamily("dspark_num_requests_running", "Texts with pages.", state.running)
    yield GaugeMetricFamily("dspark_num_requests_waiting", "Texts that wait for pages.", state.waiting)
    usage = state.pages_used / state.pages
    yield GaugeMetricFamily("dspark_kv_cache_usage_perc", "Share of pages held by texts, 1 is all.", usage)
    yield GaugeMetricFamily("dspark_kv_cache_pages", "Pages for keys and values.", state.pages)
    yield GaugeMetricFamily("dspark_engine_step_age_seconds", "How long the present step has been going.", step_age)
    yield CounterMetricFamily("dspark_engine_steps", "Target forwards.", state.steps)
    yield CounterMetricFamily("dspark_engine_step_seconds", "Time in steps.", state.step_seconds)
    yield CounterMetricFamily(
        "dspark_engine_failed_steps", "Steps that failed, with the requests in them.", failed_steps
    )
    text = "Forwards not compiled yet: they run, slower."
    yield GaugeMetricFamily("dspark_engine_forwards_compiling", text, state.compiling)
    yield from speculation_families(state.speculation)
    yield from planning_families(state.ledger)
    if state.priced is not None:
        yield from price_families(state.priced)
    if state.audited is not None:
        yield CounterMetricFamily("dspark_spec_decode_drifts", "Times outcomes left the calibration.", state.drifts)
        error = pooled_error(state.audited)
        if error is not None:
            text = "Expected calibration error of survivals over the last audited rounds, 0 is best."
            yield GaugeMetricFamily("dspark_spec_decode_calibration_error", text, error)


def speculation_families(spec: SpeculationStatistics) -> Iterator[Metric]:
    """What was drafted and what became of it."""
    for name, text, value in (
        ("drafts", "Rounds of a text in which it could draft.", spec.rounds),
        ("draft_tokens", "Tokens drafted.", spec.drafted),
        ("verified_tokens", "Drafted tokens that the target checked.", spec.verified),
        ("trimmed_tokens", "Drafted tokens the plan left out.", spec.drafted - spec.verified),
        ("accepted_tokens", "Checked tokens that stood.", spec.accepted),
        ("rejected_tokens", "Checked tokens that fell.", spec.verified - spec.accepted),
        ("committed_tokens", "Tokens committed by rounds.", spec.committed),
        (
            "wasted_rows",
            "Rows of rounds from which no token was committed.",
            spec.rounds + spec.verified - spec.committed,
        ),
    ):
        yield CounterMetricFamily(f"dspark_spec_decode_num_{name}", text, value)
    for name, text, counts in (
        ("verified", "Rounds in which this position was checked.", spec.verified_at),
        ("reached", "... and all before it stood.", spec.reached_at),
        ("accepted", "... and itself stood.", spec.accepted_at),
    ):
        family = CounterMetricFamily(f"dspark_spec_decode_num_{name}_tokens_per_pos", text, labels=["position"])
        for position, count in enumerate(counts[:MOST_POSITIONS]):
            family.add_metric([str(position)], count)
        yield family


def planning_families(ledger: Ledger) -> Iterator[Metric]:
    """Budgets, expectations, and whether anybody drafts."""
    bounds = [str(float(2**bits - 1)) for bits in range(BUDGETS - 1)] + ["+Inf"]
    buckets = list(zip(bounds, itertools.accumulate(ledger.budgets), strict=True))
    text = "Drafted tokens verified in a step with a draft."
    yield HistogramMetricFamily("dspark_spec_decode_verify_budget_tokens", text, buckets, ledger.verified)
    steps = CounterMetricFamily(
        "dspark_spec_decode_steps", "Steps that could draft, by whether they did.", labels=["state"]
    )
    steps.add_metric(["drafting"], ledger.drafting_steps)
    steps.add_metric(["resting"], ledger.resting_steps)
    yield steps
    yield GaugeMetricFamily("dspark_spec_decode_resting", "1 while the planner lets nobody draft.", int(ledger.resting))
    for name, text, value in (
        ("expected_accepted_tokens", "Accepted tokens as confidences expected them.", ledger.expected),
        ("realised_accepted_tokens", "Accepted tokens of the same rounds.", ledger.realised),
        ("audited_rounds", "Rounds verified in full to learn from.", ledger.audited),
    ):
        yield CounterMetricFamily(f"dspark_spec_decode_{name}", text, value)


def price_families(priced: Priced) -> Iterator[Metric]:
    """Steps against their price, and speculation against none."""
    for name, text, value in (
        ("engine_priced_steps", "Steps held against their price.", priced.steps),
        ("engine_predicted_step_seconds", "What their price was.", priced.predicted),
        ("engine_measured_step_seconds", "What they took.", priced.measured),
        ("engine_step_error_seconds", "By how much each was off, without signs.", priced.error),
        ("spec_decode_spent_seconds", "Time of those without prefill.", priced.spent),
        ("spec_decode_plain_seconds", "What their tokens would have cost without speculation.", priced.plain),
    ):
        yield CounterMetricFamily(f"dspark_{name}", text, value)
    if priced.spent:
        text = "Estimated speed over that without speculation, since the start."
        yield GaugeMetricFamily("dspark_spec_decode_speedup", text, priced.plain / priced.spent)
