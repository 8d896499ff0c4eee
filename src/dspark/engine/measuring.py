"""Steps of known sizes, run on an idle engine and timed; the engine is left as it was."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft, DraftContext
from dspark.engine.runner import Timings
from dspark.engine.step import EngineCore
from dspark.speculation.cost import StepTime
from dspark.speculation.round import Array, Outcome, Round
from dspark.speculation.statistics import SpeculationStatistics

PASSES = 2  # over every kind of step, if the seconds allow
FEW, TIMES = 2, 6  # so few requests are measured at every length, over and over: whether to draft hangs by a tenth
STRETCH = 3  # steps of one kind on end that are measured
PROMPT = 32  # tokens of each request whose steps are measured
LONG_PROMPT = 512  # ... of the few whose context is to show
LONG_REQUESTS = 4
GLANCE = 0.5  # s of a glance, where one pass takes no longer
GLANCES = 6  # passes of one at most


def sweep(core: EngineCore, seconds: float, tick: Callable[[float], None] | None = None) -> list[StepTime]:
    """Steps of many sizes, for about so many seconds. `tick` gets the seconds spent so far.

    Raises UserError for an engine that has requests.
    """
    started = time.perf_counter()
    steps: list[StepTime] = []
    script = _Script()
    with _measuring(core, script, steps.append):
        _Bench(core, script, lambda: tick and tick(time.perf_counter() - started)).sweep(started + seconds)
    return steps


def most_requests(core: EngineCore) -> int:
    """The most requests that `sweep` measures, if its time allows."""
    return _Bench(core, _Script(), lambda: None).most


def glance(core: EngineCore) -> list[StepTime]:
    """One request's fastest step without a draft and with a whole block: what an undisturbed machine takes today.

    Raises UserError for an engine that has requests.
    """
    steps: list[StepTime] = []
    script = _Script()
    with _measuring(core, script, steps.append):
        _Bench(core, script, lambda: None).glance(time.perf_counter() + GLANCE)
    kinds = {step.rows: step for step in sorted(steps, key=lambda step: -step.seconds) if not step.prefill}
    return list(kinds.values())


class _Script:
    """A planner that does as it is told."""

    def __init__(self) -> None:
        self.draft = 0
        self.verify = 0

    def slots(self, round: Round) -> list[int]:
        return [min(self.draft, limit) for limit in round.limit_R]

    def plan(self, round: Round, survival_RK: Array | None) -> list[int]:
        return [min(self.verify, limit) for limit in round.limit_R]

    def observe(self, outcome: Outcome) -> None:
        pass


@contextmanager
def _measuring(core: EngineCore, script: _Script, meter: Callable[[StepTime], None]) -> Iterator[None]:
    """The engine with a scripted planner and a meter; everything it counted, cached and held is put back after."""
    if not core.idle:
        raise UserError(f"the engine has {len(core.requests)} requests; measure a profile before it serves")
    runner = core.runner
    planner, kept, observer, statistics = core.planning.planner, core.meter, core.observer, core.statistics
    timings, clock, propose = runner.timings, runner.clock, runner.propose

    def whole(context: DraftContext) -> Draft:
        """A drafter that found too little, as n-gram lookup may, is taken to have found everything."""
        draft = propose(context)
        return replace(draft, length_R=[context.slots] * len(draft.token_RK))

    def finished() -> float:
        torch.cuda.synchronize(core.target.device)
        return clock()

    core.planning.planner, core.meter, core.observer, core.statistics = script, meter, None, SpeculationStatistics()
    runner.timings, runner.propose = Timings(), whole  # type: ignore[method-assign]
    metering, core.metering = core.metering, math.inf  # every step counts here
    calibration, core.planning.calibration = core.planning.calibration, None  # random prompts would teach it nonsense
    if core.target.device.type == "cuda":
        runner.clock = finished
    try:
        yield
    finally:
        for request in list(core.requests):
            core.cancel(request)
        core.forget_prefixes()
        core.metering, core.planning.calibration = metering, calibration
        core.planning.planner, core.meter, core.observer, core.statistics = planner, kept, observer, statistics
        runner.timings, runner.clock, runner.propose = timings, clock, propose  # type: ignore[method-assign]


class _Bench:
    """Adds requests, a power of two at a time, and steps them through every length of draft and plan."""

    def __init__(self, core: EngineCore, script: _Script, tick: Callable[[], object]):
        self.core, self.script, self.tick = core, script, tick
        self.random = np.random.default_rng(0)
        self.block = core.admission.block_size
        # a context that leaves every request room for the steps it will be measured in
        room = core.intake.context_limit - self.reach
        self.prompt = max(1, min(PROMPT, room))
        self.long_prompt = max(1, min(LONG_PROMPT, room))

    @property
    def reach(self) -> int:
        """Tokens that one request may grow by while it is measured."""
        return (1 + STRETCH) * max(PASSES * len(self.lengths(1)), 2 * GLANCES) * (self.block + 1)

    @property
    def most(self) -> int:
        """The most requests that fit the engine while they are measured."""
        config = self.core.config
        each = -(-(self.prompt + self.reach) // config.page_size)
        return max(1, min(config.max_running, self.core.intake.capacity // each, config.max_step_tokens))

    def lengths(self, requests: int) -> list[int]:
        """The lengths that are drafted and verified with so many requests."""
        if requests <= FEW:
            return list(range(self.block + 1))
        return sorted({0, 1, 2, 3, 5, self.block} & set(range(self.block + 1)))

    def sweep(self, deadline: float) -> None:
        """Few requests first, so that a slow machine has measured those when its time is up."""
        capacity, config = self.core.intake.capacity, self.core.config
        counts = [2**i for i in range(self.most.bit_length())]
        share = (deadline - time.perf_counter()) / (len(counts) + 1)
        for number, requests in enumerate(counts):
            if number > 1 and time.perf_counter() > deadline:
                return
            until = time.perf_counter() + share
            for _ in range(TIMES if requests <= FEW else 1):
                self.passes(requests, self.prompt, self.lengths(requests), until)
                if time.perf_counter() > until:
                    break
        long = min(LONG_REQUESTS, capacity // -(-(self.long_prompt + self.reach) // config.page_size))
        if long >= 1 and self.long_prompt > 2 * self.prompt and time.perf_counter() < deadline:
            self.passes(long, self.long_prompt, self.lengths(long), min(deadline, time.perf_counter() + share))

    def glance(self, deadline: float) -> None:
        """One request without a draft and with a whole one."""
        self.passes(1, self.prompt, sorted({0, self.block}), deadline, GLANCES)

    def passes(self, requests: int, prompt: int, lengths: list[int], until: float, most: int = PASSES) -> None:
        """Every length for a few steps on end, in passes.

        A step that follows one of its own kind finds its own weights in the caches, as it will when serving; the
        first of each stretch follows another kind, and is not counted.
        """
        core, script = self.core, self.script
        params = SamplingParams(max_tokens=None, temperature=0.0, seed=0, acceptance="rejection", ignore_eos=True)
        for _ in range(requests):
            core.add(self.random.integers(core.target.vocab_size, size=prompt).tolist(), params)
        script.draft = script.verify = 0
        while core.admission.waiting or not all(request.decoding for request in core.admission.running):
            core.step()
            self.tick()
        meter = core.meter
        for _ in range(most):
            for length in lengths:
                script.draft = script.verify = length
                for number in range(1 + STRETCH):
                    core.meter = meter if number else None
                    core.step()
            core.meter = meter
            self.tick()
            if time.perf_counter() > until:
                break
        for request in list(core.requests):
            core.cancel(request)
