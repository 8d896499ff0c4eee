"""Measures what an engine's steps cost, with its own runner and host work, and keeps that on disk between starts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.common.errors import UserError
from dspark.common.files import replacing_file
from dspark.common.provenance import device_name, provenance
from dspark.engine.measuring import glance, most_requests, sweep
from dspark.engine.step import EngineCore
from dspark.ops.cpu import cache_directory, machine_key
from dspark.speculation.cost import StepCost, StepTime
from dspark.speculation.cost_fit import fit_cost

FORMAT = 1
SECONDS = 10.0  # spent on measuring, about
SKEWED = 1.5  # times as much that one part of a step takes, beside another, than a kept profile says
OFF = 4.0  # times what it says, or a share of it, that every part may take: prices follow a machine that slows down


@dataclass(frozen=True)
class Profile:
    """A measured cost, and everything it depends on: read by people and compared key by key."""

    cost: StepCost
    identity: dict[str, str]
    seconds: float = 0.0  # that measuring took
    steps: int = 0  # measured
    requests: int = 0  # the most that were to be measured; an engine of more asks for another profile

    def check(self, core: EngineCore, source: str | Path = "the profile") -> None:
        """Raises UserError, saying what differs, if it was measured for another engine."""
        want = identity(core)
        for name in {**want, **self.identity}:
            got, here = self.identity.get(name, "nothing"), want.get(name, "nothing")
            if got != here:
                raise UserError(
                    f"{source} was measured with {name} {got}, here it is {here}; measure this one with dspark profile"
                )

    def holds(self, steps: Iterable[StepTime]) -> bool:
        """Whether these steps and their drafts took about what it says, beside each other."""
        over = []  # what it says
        for step in steps:
            target, draft = self.cost.of_step(step)
            if draft:
                over += [(step.seconds - step.draft_seconds) / target, step.draft_seconds / draft]
            else:  # one that is free has no price: what it takes is part of the step
                over.append(step.seconds / target)
        return not over or (max(over) < SKEWED * min(over) and min(over) > 1 / OFF and max(over) < OFF)

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        held: dict[str, Any] = {"format": FORMAT, "identity": self.identity}
        held |= {
            "seconds": round(self.seconds, 3),
            "steps": self.steps,
            "requests": self.requests,
            "cost": self.cost.as_dict(),
        }
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
        seconds, counts = float(held.get("seconds", 0)), (int(held.get(name, 0)) for name in ("steps", "requests"))
        return Profile(cost, held["identity"], seconds, *counts)


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
    """The profile kept for an engine like this, or as it will be; None where there is none, or a damaged one.

    One that was measured with fewer requests than this engine may run knows too little.
    """
    wanted = identity(core, compiled=compiled)
    path = _kept_at(wanted)
    if not path.is_file():
        return None
    try:
        found = Profile.load(path)
    except UserError:
        return None
    return found if found.identity == wanted and found.requests >= most_requests(core) else None


def keep(profile: Profile) -> Path:
    """Keep a profile for the next engine like its own; returns where."""
    path = _kept_at(profile.identity)
    profile.save(path)
    return path


def ensure_profile(core: EngineCore, *, seconds: float = SECONDS) -> Profile:
    """The kept profile of this engine, else one measured now, which is then kept; for that the engine must be idle.

    One measured while the machine was busy would mislead every later engine, so a kept one is first held against a few
    steps of today.
    """
    found = cached_profile(core)
    if found is None or (core.idle and not found.holds(glance(core))):
        found = measure(core, seconds=seconds)
        keep(found)
    return found


def measure(core: EngineCore, *, seconds: float = SECONDS, tick: Callable[[float], None] | None = None) -> Profile:
    """Run steps of many sizes for about `seconds` and fit their cost. The engine must be idle, and is left as it was.

    `tick` gets the seconds spent so far. Raises UserError for an engine that has requests.
    """
    started = time.perf_counter()
    steps = sweep(core, seconds, tick)
    return Profile(fit_cost(steps), identity(core), time.perf_counter() - started, len(steps), most_requests(core))


def _shapes(model: object) -> str:
    """The class of a model and a fingerprint of the shapes of its weights."""
    holder = model if hasattr(model, "state_dict") else getattr(getattr(model, "model", None), "model", None)
    weights = holder.state_dict() if hasattr(holder, "state_dict") else {}
    lines = [f"{name} {tuple(weight.shape)} {weight.dtype}" for name, weight in sorted(weights.items())]
    return f"{type(model).__name__} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:12]}"


def _kept_at(known: dict[str, str]) -> Path:
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]
    return cache_directory() / f"profile-{key}.json"
