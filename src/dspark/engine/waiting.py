"""Compiles an engine's forward, and waits for it where a person can see that."""

from __future__ import annotations

from rich.console import Console

from dspark.engine.step import EngineCore
from dspark.models.compiled import SwappableGraph


def start_compile(core: EngineCore) -> SwappableGraph:
    """Load the target's forward for this engine from the cache, or begin to compile it in the background."""
    return core.target.compile(core.drafter.taps, core.config.page_size)


def wait_for_compile(console: Console, core: EngineCore) -> None:
    """Returns when the target's forward for this engine is compiled, or will stay eager; says so meanwhile."""
    graph = start_compile(core)
    with console.status("") as status:
        graph.wait(lambda seconds: status.update(f"compiling the forward for this machine, once: {seconds:.0f} s"))
