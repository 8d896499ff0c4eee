"""`dspark train`: a drafter for a frozen target, from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dspark.common.errors import UserError

if TYPE_CHECKING:
    from dspark.training.config import TrainConfig


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file as in recipes/.")],
    out: Annotated[Path | None, typer.Option(help="The run's directory; a run found there is continued.")] = None,
    target: Annotated[str | None, typer.Option(help="Replaces the recipe's target.")] = None,
    data: Annotated[str | None, typer.Option("--train", help="Replaces the recipe's training data.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Replaces the recipe's held-out data.")] = None,
    init: Annotated[str | None, typer.Option(help="Start from this drafter.")] = None,
    steps: Annotated[int | None, typer.Option(help="Replaces the recipe's steps or epochs.")] = None,
    device: Annotated[str | None, typer.Option(help="Replaces the recipe's device.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe on a tiny model; print its cost.")
    ] = False,
    samples: Annotated[int, typer.Option(help="With --dry-run: sequences of data that is not there yet.")] = 1_300_000,
) -> None:
    """Train a drafter; the same command continues a run that was stopped.

    On several devices or machines start it with torchrun: `torchrun --nproc-per-node 8 $(which dspark) train ...`.
    """
    from dspark.common.log import quiet_libraries
    from dspark.training.config import load_config
    from dspark.training.loop import train as run

    quiet_libraries()
    changes = {"target": target, "train": data, "held_out": held_out, "init": init, "steps": steps, "device": device}
    config = load_config(recipe, **changes)
    if dry_run:
        show(config, recipe, samples)
    elif out is None:
        raise UserError("--out is missing; name the run's directory, or pass --dry-run")
    else:
        run(config, out)


def show(config: TrainConfig, recipe: Path, samples: int) -> None:
    """Print what a run of the recipe would take."""
    from dspark.training.preview import preview, rehearse

    found = preview(config, samples=samples)
    first, last = rehearse(config)

    def size(count: int) -> str:
        return f"{count / 1e9:.1f} GB"

    rows = {
        "recipe": f"{recipe}",
        "target": f"{config.target}, {found.target_parameters:,} parameters ({found.source})",
        "drafter": f"{found.trained_parameters:,} trained, {found.frozen_parameters:,} shared with the target",
        "memory": f"{size(found.memory)} a rank: target {size(found.target)}, weights with gradients and AdamW "
        f"{size(found.state)}, activations about {size(found.activations)}",
        "steps": f"{found.steps:,} of {config.batch} sequences ({found.counted})",
        "disk": f"{size(found.disk)}: checkpoints {size(found.checkpoint)}, exports {size(found.export)}",
        "checked": f"two steps on a tiny model of the family, loss {first:.2f} and {last:.2f}; saved and read back",
    }
    for name, text in rows.items():
        print(f"{name:<8} {text}")
