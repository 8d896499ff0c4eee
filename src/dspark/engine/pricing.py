"""Gives an engine its planner by name, and to those that weigh costs a price that follows the engine's own steps."""

from __future__ import annotations

from pathlib import Path

from dspark.engine.config import WORTH_COMPILING
from dspark.engine.profile import Profile, cached_profile, ensure_profile, measure
from dspark.engine.step import EngineCore
from dspark.speculation.calibration import Calibration
from dspark.speculation.live_cost import LiveCost
from dspark.speculation.online import OnlineCalibration
from dspark.speculation.planner import AUTO, needs_cost, parse_planner

METERING = 0.01  # share of the time that following the engine's steps may take
BRIEF = 3.0  # s of measuring an engine that will be another one when its forwards are compiled


def plan_with(
    core: EngineCore,
    planner: str,
    profile: Profile | str | Path | None = None,
    calibration: Calibration | None = None,
) -> LiveCost | None:
    """Make `planner` the engine's; returns the live cost it reads, None if it reads none.

    "auto" is the joint planner, but "full" for a target too small to be worth measuring, and "none" without a drafter.
    Without a profile the one kept for this engine is used, else one is measured, for which the engine must be idle; an
    engine whose forwards are still being compiled is measured again when `wait_compiled` has seen them ready.
    Raises UserError for a planner nobody knows and for a profile of another engine.
    """
    if planner == AUTO:
        small = sum(p.numel() for p in core.target.model.state_dict().values()) < WORTH_COMPILING
        planner = "none" if not core.admission.block_size else "full" if small and profile is None else "joint"
    core.planning.live = None
    if not needs_cost(planner):
        core.planning.planner = parse_planner(planner)
        if planner.startswith("threshold") and calibration is not None:
            core.planning.calibration = OnlineCalibration(calibration)
        return None
    if profile is None:
        profile = _profile(core)
        if _pending(core):
            core.once_compiled = lambda: core.idle and plan_with(core, planner, None, calibration)
    elif not isinstance(profile, Profile):
        path, profile = profile, Profile.load(profile)
        profile.check(core, path)
    live = LiveCost(profile.cost, split=core.target.device.type == "cpu")
    known = calibration or Calibration(core.drafter.block_size, {})
    core.planning.planner = parse_planner(planner, live, lambda kind: known.expected(*kind))
    core.planning.calibration = OnlineCalibration(known)
    core.planning.live = live
    core.meter, core.metering = live.observe, METERING
    return live


def _profile(core: EngineCore) -> Profile:
    """What is known of this engine's cost, or will be true of it soon, else a measurement."""
    if not _pending(core):
        return ensure_profile(core)
    return cached_profile(core, compiled=True) or measure(core, seconds=BRIEF)


def _pending(core: EngineCore) -> bool:
    return any(graph.status == "compiling" for graph in core.graphs)
