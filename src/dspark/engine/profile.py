"""Measures what an engine's steps cost, with its own runner and host work, and keeps that on disk between starts."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark.common.errors import UserError
from dspark.common.files import replacing_file
from dspark.common.provenance import device_name, provenance
from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Draft, DraftContext
from dspark.engine.runner import Timings
from dspark.engine.step import EngineCore
from dspark.ops.cpu import cache_directory, machine_key
from dspark.speculation.cost import StepCost, StepTime
from dspark.speculation.cost_fit import fit_cost
from dspark.speculation.round import Array, Outcome, Round
from dspark.speculation.statistics import SpeculationStatistics

FORMAT = 1
SECONDS = 10.0  # spent on measuring, about
PASSES = 2  # over every kind of step, if the seconds allow
STRETCH = 3  # steps of one kind on end that are measured
PROMPT = 32  # tokens of each request whose steps are measured
LONG_PROMPT = 512  # ... of the few whose context is to show
LONG_REQUESTS = 4


@dataclass(frozen=True)
class Profile:
    """A measured cost, and everything it depends on: read by people and compared key by key."""

    cost: StepCost
    identity: dict[str, str]
    seconds: float = 0.0  # that measuring took
    steps: int = 0  # measured

    def check(self, core: EngineCore, source: str | Path = "the profile") -> None:
        """Raises UserError, saying what differs, if it was measured for another engine."""
        want = identity(core)
        for name in {**want, **self.identity}:
            got, here = self.identity.get(name, "nothing"), want.get(name, "nothing")
            if got != here:
                raise UserError(
                    f"{source} was measured with {name} {got}, here it is {here}; measure this one with dspark profile"
                )

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        held: dict[str, Any] = {"format": FORMAT, "identity": self.identity}
        held |= {"seconds": round(self.seconds, 3), "steps": self.steps, "cost": self.cost.as_dict()}
        with replacing_file(path) as fresh:
            fresh.write_text(json.dumps(held, indent=1), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Profile:
        """Read what `save` wrote. Raises UserError where it is something else."""
        way_out = "pass a file that dspark profile wrote"
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; {way_out}") from error
        except ValueError as error:
            raise UserError(f"{path} is not JSON; {way_out}") from error
        if not isinstance(held, dict) or held.get("format") != FORMAT or not isinstance(held.get("identity"), dict):
            raise UserError(f"{path} is no profile of format {FORMAT}; {way_out}")
        cost = StepCost.of_dict(held.get("cost"), path)
        return Profile(cost, held["identity"], float(held.get("seconds", 0)), int(held.get("steps", 0)))


def identity(core: EngineCore, *, compiled: bool | None = None) -> dict[str, str]:
    """What a step's time depends on; `compiled` None asks the engine. Weights do not count, their shapes do."""
    target, drafter = core.target, core.drafter
    versions = provenance(target.device)
    if compiled is None:
        compiled = bool(core.graphs) and all(graph.status == "compiled" for graph in core.graphs)
    return {
        "machine": f"{device_name(target.device)} ({machine_key()})",
        "target": _shapes(target.model),
        "drafter": f"{_shapes(drafter)}, block {core.admission.block_size}",
        "dtype": str(target.dtype).removeprefix("torch."),
        "graphs": "compiled" if compiled else "eager",
        "version": f"dspark {versions['dspark']} ({versions['commit'] or 'released'}), torch {versions['torch']}",
    }


def cached_profile(core: EngineCore, *, compiled: bool | None = None) -> Profile | None:
    """The profile kept for an engine like this, or as it will be; None where there is none, or a damaged one."""
    wanted = identity(core, compiled=compiled)
    path = _kept_at(wanted)
    if not path.is_file():
        return None
    try:
        found = Profile.load(path)
    except UserError:
        return None
    return found if found.identity == wanted else None


def keep(profile: Profile) -> Path:
    """Keep a profile for the next engine like its own; returns where."""
    path = _kept_at(profile.identity)
    profile.save(path)
    return path


def ensure_profile(core: EngineCore, *, seconds: float = SECONDS) -> Profile:
    """The kept profile of this engine, else one measured now, which is then kept. The engine must be idle."""
    found = cached_profile(core)
    if found is None:
        found = measure(core, seconds=seconds)
        keep(found)
    return found


def measure(core: EngineCore, *, seconds: float = SECONDS, tick: Callable[[float], None] | None = None) -> Profile:
    """Run steps of many sizes for about `seconds` and fit their cost. The engine must be idle, and is left as it was.

    `tick` gets the seconds spent so far. Raises UserError for an engine that has requests.
    """
    if not core.idle:
        raise UserError(f"the engine has {len(core.requests)} requests; measure a profile before it serves")
    started = time.perf_counter()
    steps: list[StepTime] = []
    script = _Script()
    with _measuring(core, script, steps.append):
        _Bench(core, script, started + seconds, lambda: tick and tick(time.perf_counter() - started)).run()
    return Profile(fit_cost(steps), identity(core), time.perf_counter() - started, len(steps))


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

    def __init__(self, core: EngineCore, script: _Script, deadline: float, tick: Callable[[], object]):
        self.core, self.script, self.deadline, self.tick = core, script, deadline, tick
        self.random = np.random.default_rng(0)
        self.block = core.admission.block_size
        # a context that leaves every request room for the steps it will be measured in
        room = core.intake.context_limit - self.reach
        self.prompt = max(1, min(PROMPT, room))
        self.long_prompt = max(1, min(LONG_PROMPT, room))

    @property
    def reach(self) -> int:
        """Tokens that one request may grow by while it is measured."""
        return (1 + STRETCH) * PASSES * len(self.lengths(1)) * (self.block + 1)

    def lengths(self, requests: int) -> list[int]:
        """The lengths that are drafted and verified with so many requests."""
        if requests <= 2:
            return list(range(self.block + 1))
        return sorted({0, 1, 2, 3, 5, self.block} & set(range(self.block + 1)))

    def run(self) -> None:
        """Measure: few requests first, so that a slow machine has measured those when its time is up."""
        config = self.core.config
        capacity = self.core.intake.capacity
        each = -(-(self.prompt + self.reach) // config.page_size)
        most = max(1, min(config.max_running, capacity // each, config.max_step_tokens))
        counts = [2**i for i in range(most.bit_length()) if 2**i <= most]
        share = (self.deadline - time.perf_counter()) / (len(counts) + 1)
        for number, requests in enumerate(counts):
            if number > 1 and time.perf_counter() > self.deadline:
                return
            self.sweep(requests, self.prompt, time.perf_counter() + share)
        long = min(LONG_REQUESTS, capacity // -(-(self.long_prompt + self.reach) // config.page_size))
        if long >= 1 and self.long_prompt > 2 * self.prompt and time.perf_counter() < self.deadline:
            self.sweep(long, self.long_prompt, min(self.deadline, time.perf_counter() + share))

    def sweep(self, requests: int, prompt: int, until: float) -> None:
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
        for _ in range(PASSES):
            for length in self.lengths(requests):
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


def _shapes(model: object) -> str:
    """The class of a model and a fingerprint of the shapes of its weights."""
    holder = model if hasattr(model, "state_dict") else getattr(getattr(model, "model", None), "model", None)
    weights = holder.state_dict() if hasattr(holder, "state_dict") else {}
    lines = [f"{name} {tuple(weight.shape)} {weight.dtype}" for name, weight in sorted(weights.items())]
    return f"{type(model).__name__} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:12]}"


def _kept_at(known: dict[str, str]) -> Path:
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]
    return cache_directory() / f"profile-{key}.json"
