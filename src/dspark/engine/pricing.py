"""Gives an engine its planner by name, and to those that weigh costs a price that follows the engine's own steps."""

from __future__ import annotations

from pathlib import Path

from dspark.engine.profile import Profile, ensure_profile
from dspark.engine.step import EngineCore
from dspark.speculation.live_cost import LiveCost
from dspark.speculation.planner import needs_cost, parse_planner


def plan_with(core: EngineCore, planner: str, profile: Profile | str | Path | None = None) -> LiveCost | None:
    """Make `planner` the engine's; returns the live cost it reads, None if it reads none.

    Without a profile the one kept for this engine is used, else one is measured, for which the engine must be idle.
    Raises UserError for a planner nobody knows and for a profile of another engine.
    """
    if not needs_cost(planner):
        core.planning.planner = parse_planner(planner)
        return None
    if profile is None:
        profile = ensure_profile(core)
    elif not isinstance(profile, Profile):
        path, profile = profile, Profile.load(profile)
        profile.check(core, path)
    live = LiveCost(profile.cost, split=core.target.device.type == "cpu")
    core.planning.planner = parse_planner(planner, live)
    core.meter = live.observe
    return live
