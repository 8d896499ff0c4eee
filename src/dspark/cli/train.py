"""`dspark train`: a drafter for a frozen target, from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file as in recipes/.")],
    out: Annotated[Path, typer.Option(help="The run's directory; a run found there is continued.")],
    target: Annotated[str | None, typer.Option(help="Replaces the recipe's target.")] = None,
    data: Annotated[str | None, typer.Option("--train", help="Replaces the recipe's training data.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Replaces the recipe's held-out data.")] = None,
    init: Annotated[str | None, typer.Option(help="Start from this drafter.")] = None,
    steps: Annotated[int | None, typer.Option(help="Replaces the recipe's steps.")] = None,
    device: Annotated[str | None, typer.Option(help="Replaces the recipe's device.")] = None,
) -> None:
    """Train a drafter; the same command continues a run that was stopped."""
    from dspark.common.log import quiet_libraries
    from dspark.training.config import load_config
    from dspark.training.loop import train as run

    quiet_libraries()
    changes = {"target": target, "train": data, "held_out": held_out, "init": init, "steps": steps, "device": device}
    run(load_config(recipe, **changes), out)
