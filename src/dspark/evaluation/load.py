"""Puts an engine under load: so many users who each wait for an answer, or arrivals that wait for no one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dspark.engine.planning import Planning
from dspark.engine.pricing import METERING, plan_with
from dspark.engine.profile import Profile
from dspark.engine.request import Commit, RequestStatistics
from dspark.engine.step import EngineCore
from dspark.evaluation.workload import NOISE, Blinded, LoadRequest, Workload
from dspark.speculation.calibration import Calibration
from dspark.speculation.cost import StepTime
from dspark.speculation.live_cost import LiveCost
from dspark.speculation.planner import Fixed, Full
from dspark.speculation.reliability import RoundRecord
from dspark.speculation.round_trace import RoundTrace

RECORDING_USERS = 8


@dataclass
class Policy:
    """A planner by the name a person gave it, with what it has learnt; policies take turns on one engine."""

    name: str
    planning: Planning
    live: LiveCost | None = None

    @staticmethod
    def of(
        core: EngineCore, name: str, profile: Profile | None = None, calibration: Calibration | None = None
    ) -> Policy:
        """The policy of this name, as an engine has it that was started with it."""
        core.planning = Planning(Fixed(0), seed=core.config.seed)
        live = plan_with(core, name, profile, calibration)
        return Policy(name, core.planning, live)

    def enter(self, core: EngineCore, also: Callable[[StepTime], None] | None = None) -> None:
        """Make it the engine's; `also` gets the steps that are metered, of every policy alike a share of the time."""
        own = self.live.observe if self.live is not None else None
        core.planning, core.meter, core.metering = self.planning, own or also, METERING
        if own is not None and also is not None:
            core.meter = lambda step: (own(step), also(step))[0]


@dataclass(frozen=True)
class Finished:
    """One request that was served to its end, with the engine's own counts."""

    kind: str
    tokens: int
    statistics: RequestStatistics

    @property
    def waited(self) -> float:
        """Seconds to the first token."""
        assert self.statistics.first_token is not None
        return self.statistics.first_token - self.statistics.arrived

    @property
    def speed(self) -> float | None:
        """Tokens per second after the first; None for a single token."""
        assert self.statistics.finished is not None and self.statistics.first_token is not None
        seconds = self.statistics.finished - self.statistics.first_token
        return (self.tokens - 1) / seconds if self.tokens > 1 and seconds > 0 else None


@dataclass
class Slice:
    """What one policy did in one stretch of time."""

    seconds: float
    tokens: int  # committed within it, of all requests
    steps: int
    finished: list[Finished]
    tokens_by_kind: dict[str, int] = field(default_factory=dict)
    left: int = 0  # requests that were still waiting or running at the end
    inside: float = 0.0  # s of the engine's steps


class Driver:
    """Feeds requests to one engine and keeps account of them."""

    def __init__(self, core: EngineCore, *, blind: bool = False):
        """`blind`: no drafter can guess what requests of kind noise get."""
        self.core = core
        self.blinded = Blinded(core.drafter) if blind else None
        core.runner.drafter = self.blinded or core.drafter
        self.kinds: dict[int, str] = {}
        self.tokens: dict[int, int] = {}
        self.finished: list[Finished] = []
        self.committed: dict[str, int] = {}

    def add(self, request: LoadRequest, arrived: float | None = None) -> int:
        """Give the engine a request that arrived at `arrived` on the performance counter, or now."""
        number = self.core.add(request.prompt, request.params)
        if arrived is not None:
            self.core.requests[number].statistics.arrived = arrived
        self.kinds[number], self.tokens[number] = request.kind, 0
        if self.blinded is not None and request.kind == NOISE:
            self.blinded.requests.add(number)
        return number

    def step(self) -> list[Commit]:
        """One step of the engine, counted."""
        commits = self.core.step()
        for commit in commits:
            kind = self.kinds[commit.request_id]
            self.tokens[commit.request_id] += len(commit.token_ids)
            self.committed[kind] = self.committed.get(kind, 0) + len(commit.token_ids)
            if commit.finish_reason:
                self._leave(commit.request_id)
                self.finished.append(Finished(kind, self.tokens.pop(commit.request_id), commit.statistics))
        return commits

    def clear(self) -> int:
        """Cancel what is left and forget all counts; returns how many requests that were."""
        left = list(self.core.requests)
        for number in left:
            self.core.cancel(number)
            self._leave(number)
        self.core.forget_prefixes()
        self.tokens.clear()
        self.finished, self.committed = [], {}
        return len(left)

    def _leave(self, number: int) -> None:
        self.kinds.pop(number, None)
        if self.blinded is not None:
            self.blinded.requests.discard(number)

    def start_count(self) -> tuple[float, int, float]:
        """Count from here: the time, the step and the seconds of all steps."""
        self.finished, self.committed = [], {}
        timings = self.core.timings
        return time.perf_counter(), timings.steps, timings.total

    def counted(self, began: tuple[float, int, float]) -> Slice:
        """What happened since `start_count`."""
        seconds, timings = time.perf_counter() - began[0], self.core.timings
        return Slice(
            seconds,
            sum(self.committed.values()),
            timings.steps - began[1],
            self.finished,
            dict(self.committed),
            inside=timings.total - began[2],
        )


class Users:
    """So many users who each wait for an answer and ask again at once."""

    def __init__(self, driver: Driver, requests: Sequence[Iterator[LoadRequest]]):
        """`requests` are each user's own. The first ones are cut to random shares, so that they do not end together."""
        self.driver, self.requests = driver, requests
        random = np.random.default_rng(len(requests))
        self.asking: dict[int, int] = {}  # user by request
        for user, own in enumerate(requests):
            request = next(own)
            tokens = max(1, int((request.params.max_tokens or 1) * random.uniform(0.1, 1.0)))
            self.asking[driver.add(replace(request, params=replace(request.params, max_tokens=tokens)))] = user

    def step(self) -> None:
        """One step of the engine; who has got an answer asks again."""
        for commit in self.driver.step():
            if commit.finish_reason:
                user = self.asking.pop(commit.request_id)
                self.asking[self.driver.add(next(self.requests[user]))] = user


def closed_loop(driver: Driver, requests: Sequence[Iterator[LoadRequest]], seconds: float) -> Slice:
    """As many users as there are streams of requests, for about `seconds`.

    Counting starts when all of the first requests have a token; they themselves do not count as finished.
    """
    users = Users(driver, requests)
    first = list(users.asking)
    while any(driver.tokens.get(number) == 0 for number in first):
        users.step()
    began = driver.start_count()
    while time.perf_counter() - began[0] < seconds or not driver.finished:
        users.step()
    found = driver.counted(began)
    found.finished = [one for one in found.finished if one.statistics.arrived >= began[0]] or found.finished
    driver.clear()
    return found


def open_loop(driver: Driver, requests: Iterator[LoadRequest], arrivals: Sequence[float], seconds: float) -> Slice:
    """Requests at `arrivals` (seconds from the start) whether or not the engine keeps up, for `seconds`."""
    began = driver.start_count()
    due = 0
    while (now := time.perf_counter() - began[0]) < seconds:
        while due < len(arrivals) and arrivals[due] <= now:
            driver.add(next(requests), began[0] + arrivals[due])
            due += 1
        if not driver.core.idle:
            driver.step()
        elif due < len(arrivals):
            time.sleep(max(0.0, min(arrivals[due], seconds) - now))
        else:
            break
    found = driver.counted(began)
    found.left = driver.clear()
    return found


def record_rounds(driver: Driver, workload: Workload, rounds: int = 2000) -> RoundTrace:
    """Rounds of `RECORDING_USERS` users with everything verified, at least `rounds`: what a simulator draws from."""
    core = driver.core
    block = core.admission.block_size
    found: dict[str, list[tuple[Sequence[float], int]]] = {}

    def observe(records: Sequence[RoundRecord]) -> None:
        for record in records:
            if record.full and record.verified == block:  # the last rounds of a request have room for fewer
                found.setdefault(driver.kinds[record.request_id], []).append((record.confidence, record.accepted))

    planning, meter, observer = core.planning, core.meter, core.observer
    core.planning, core.meter, core.observer = Planning(Full()), None, observe
    try:
        users = Users(driver, workload.users(RECORDING_USERS))
        while sum(map(len, found.values())) < rounds:
            users.step()
    finally:
        driver.clear()
        core.planning, core.meter, core.observer = planning, meter, observer
    return RoundTrace.of(block, found)
