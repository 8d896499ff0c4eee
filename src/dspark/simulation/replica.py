"""One replica of the engine on paper: its own admission and planner, a measured step cost and drawn acceptance.

R requests of a step, K draft slots.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft
from dspark.engine.admission import Admission, Schedule
from dspark.engine.config import EngineConfig
from dspark.engine.planning import Planning
from dspark.engine.prefix import PagePool
from dspark.engine.request import Request
from dspark.speculation.cost import StepCost, StepTime
from dspark.speculation.planner import parse_planner
from dspark.speculation.round_trace import RoundTrace
from dspark.speculation.verify import Verdict

CONTEXT = 1 << 15  # tokens that a simulated request may reach


@dataclass(frozen=True)
class Sizes:
    """Lengths of requests in tokens, drawn evenly from ranges, and how many are of which kind."""

    prompt_tokens: tuple[int, int] = (32, 96)
    new_tokens: tuple[int, int] = (32, 96)
    kinds: dict[str, float] = field(default_factory=lambda: {"code": 1.0})  # share of each

    def draw(self, random: np.random.Generator) -> tuple[str, int, int]:
        """Kind, prompt and new tokens of one request."""
        names = list(self.kinds)
        kind = names[int(random.choice(len(names), p=list(self.kinds.values())))] if len(names) > 1 else names[0]
        prompt = int(random.integers(self.prompt_tokens[0], self.prompt_tokens[1] + 1))
        return kind, prompt, int(random.integers(self.new_tokens[0], self.new_tokens[1] + 1))

    @property
    def mean_new(self) -> float:
        """Tokens a request writes, on average."""
        return sum(self.new_tokens) / 2


@dataclass
class Served:
    """One request from its arrival to its end, in simulated seconds."""

    kind: str
    arrived: float
    new_tokens: int
    first: float = 0.0
    ended: float = 0.0
    rounds: int = 0
    verified: int = 0

    @property
    def speed(self) -> float:
        """Tokens per second after the first."""
        return (self.new_tokens - 1) / max(self.ended - self.first, 1e-12)


class Replica:
    """Steps as the engine does; time is what the steps cost."""

    def __init__(
        self,
        cost: StepCost,
        trace: RoundTrace,
        planner: str,
        *,
        config: EngineConfig | None = None,
        seed: int = 0,
        planning_time: bool = True,
    ):
        """`planning_time`: the planner's own time, as it runs here, is part of a step; without it runs repeat."""
        config = config or EngineConfig(pages=1 << 14, prefix_caching=False)
        assert config.pages is not None and not config.prefix_caching
        self.cost, self.trace = cost, trace
        self.random = np.random.default_rng(seed)
        self.page_size = config.page_size
        pool = PagePool(config.pages, config.page_size, remember=False)
        self.admission = Admission(pool, config, block_size=trace.block)
        # an engine knows as much of acceptance from its calibration
        self.planning = Planning(parse_planner(planner, cost, lambda kind: trace.acceptance))
        self.clock = time.thread_time if planning_time else lambda: 0.0
        self.now = 0.0
        self.tokens = 0
        self.known: dict[int, Served] = {}
        self._next = 0
        self._observing = 0.0  # what the planner took to learn from the last step

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.known

    def add(self, kind: str, prompt: int, new: int, arrived: float | None = None) -> None:
        """A request that arrived at `arrived`, or now."""
        room = -(-(prompt + new + self.trace.block + 2) // self.page_size)
        self.admission.waiting.append(
            Request(
                id=self._next,
                params=SamplingParams(max_tokens=new, speculation_group=kind),
                tokens=[0] * prompt,
                prompt_length=prompt,
                limit=prompt + new,
                seed=0,
                stop_ids=frozenset(),
                page_row=np.zeros(room, dtype=np.int32),
            )
        )
        self.known[self._next] = Served(kind, self.now if arrived is None else arrived, new)
        self._next += 1

    def step(self) -> list[Served]:
        """One step; returns the requests that ended with it."""
        schedule = self.admission.schedule()
        if not (schedule.sampled or schedule.partial):
            return []
        planning = -self.clock()
        slots = self.planning.slots(schedule) if schedule.sampled else 0
        planning += self.clock()
        draft, could_R = self._draft(schedule, slots)
        planning -= self.clock()
        plan = self.planning.plan(schedule, draft)
        planning += self.clock() + self._observing
        accepted_R = [min(pair) for pair in zip(could_R, plan, strict=True)]
        seconds = self._seconds(sum(self.cost.of_step(self._load(schedule, slots, plan))) + planning)
        self.now += seconds / (1.0 - self.cost.outside)
        ended = self._commit(schedule, plan, accepted_R)
        self._observing = -self.clock()
        self.planning.observe(schedule, Verdict(accepted_R, [], plan), seconds)
        self._observing += self.clock()
        return ended

    def _draft(self, schedule: Schedule, slots: int) -> tuple[Draft | None, list[int]]:
        """Blocks drawn from the trace, and how much of each the target would accept."""
        could_R = [0] * len(schedule.sampled)
        if not slots:
            return None, could_R
        confidence_RK = np.zeros((len(could_R), slots))
        for index, request in enumerate(schedule.sampled):
            if schedule.limits[index]:
                kind = self.known[request.id].kind
                row = int(self.random.integers(len(self.trace.accepted[kind])))
                confidence_RK[index] = self.trace.confidence[kind][row, :slots]
                could_R[index] = int(self.trace.accepted[kind][row])
        none = torch.empty(0)
        draft = Draft(none, none, torch.from_numpy(confidence_RK), [slots] * len(could_R))
        return draft, could_R

    def _seconds(self, undisturbed: float) -> float:
        """What the step takes with the stalls that happen to interrupt it."""
        every, each = self.cost.stalls
        return undisturbed + each * int(self.random.poisson(every * undisturbed)) if every else undisturbed

    def _load(self, schedule: Schedule, slots: int, plan: list[int]) -> StepTime:
        everyone = [*schedule.sampled, *(request for request, _ in schedule.partial)]
        return StepTime(
            rows=len(plan) + sum(plan),
            requests=len(schedule.sampled),
            context=sum(request.cached for request in everyone),
            prefill=sum(schedule.rows) - len(plan) + sum(rows for _, rows in schedule.partial),
            drafting=sum(limit > 0 for limit in schedule.limits) if slots else 0,
            slots=slots,
            draft_seconds=0.0,
            seconds=0.0,
        )

    def _commit(self, schedule: Schedule, plan: list[int], accepted_R: list[int]) -> list[Served]:
        ended = []
        for index, request in enumerate(schedule.sampled):
            served = self.known[request.id]
            if request.decoding:
                served.rounds += 1
                served.verified += plan[index]
            kept, _ = request.commit([0] * (accepted_R[index] + 1))
            self.tokens += len(kept)
            request.decoding = True
            cached = request.cached + schedule.rows[index] + accepted_R[index]
            self.admission.keep(request, min(cached, len(request.tokens)))
            served.first = served.first or self.now
            if request.finish_reason:
                served.ended = self.now
                ended.append(served)
                self.admission.remove(request)
                del self.known[request.id]
        for request, rows in schedule.partial:
            self.admission.keep(request, request.cached + rows)
        return ended


@dataclass(frozen=True)
class Outcome:
    """What a replica did in a stretch of simulated time."""

    seconds: float
    tokens: int
    served: list[Served]

    @property
    def throughput(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def budget(self) -> float:
        """Rows of the target that a request gets in a step."""
        return 1 + sum(one.verified for one in self.served) / max(sum(one.rounds for one in self.served), 1)


def closed_loop(replica: Replica, sizes: Sizes, users: int, requests: int) -> Outcome:
    """`users` at a time until `requests` have ended, after a first wave with cut lengths, as `bench load` has it."""
    random = np.random.default_rng(users)
    for _ in range(users):
        kind, prompt, new = sizes.draw(random)
        replica.add(kind, prompt, max(1, int(new * random.uniform(0.1, 1.0))))
    while any(not served.first for served in list(replica.known.values())[:users]):
        for _ in replica.step():
            replica.add(*sizes.draw(random))
    began, tokens = replica.now, replica.tokens
    served: list[Served] = []
    while len(served) < requests:
        for one in replica.step():
            if one.arrived >= began:
                served.append(one)
            replica.add(*sizes.draw(random))
    return Outcome(replica.now - began, replica.tokens - tokens, served)


def open_loop(replica: Replica, sizes: Sizes, arrivals: Iterator[float]) -> Outcome:
    """Requests at `arrivals`, which rise, until all have ended."""
    random = np.random.default_rng(0)
    served: list[Served] = []
    due = next(arrivals, None)
    while due is not None or not replica.idle:
        if replica.idle and due is not None:
            replica.now = max(replica.now, due)
        while due is not None and due <= replica.now:
            replica.add(*sizes.draw(random), arrived=due)
            due = next(arrivals, None)
        served += replica.step()
    return Outcome(replica.now, replica.tokens, served)
