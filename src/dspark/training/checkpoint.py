"""The state of a training run on disk: whole or absent, and enough to continue with the very same losses."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dspark.common.errors import UserError
from dspark.common.files import replacing_file
from dspark.training.config import TrainConfig, as_plain
from dspark.training.optimizer import Optimizers

STATE, LOG, RUN = "state.pt", "log.jsonl", "run.json"


def trainable(drafter: nn.Module) -> dict[str, Tensor]:
    """What training changes: everything but the target's own tensors."""
    return {name: p.detach() for name, p in drafter.named_parameters() if p.requires_grad}


def save_state(out: Path, step: int, drafter: nn.Module, optimizers: Optimizers, config: TrainConfig) -> None:
    """Replace the state in one move; a kill at any moment leaves the old or the new one."""
    state = {"step": step, "drafter": trainable(drafter), "optimizers": optimizers.state_dict()}
    with replacing_file(out / STATE) as fresh:
        torch.save(state | {"config": as_plain(config)}, fresh)


def read_state(out: Path) -> dict[str, Any] | None:
    """The state of a run that was started before, or None. Raises UserError for a damaged one."""
    if not (out / STATE).is_file():
        return None
    try:
        return torch.load(out / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler meets
        reason = str(error).splitlines()[0]
        raise UserError(f"{out / STATE} is truncated or corrupted ({reason}); delete it to start over") from error


def restore(state: dict[str, Any], drafter: nn.Module, optimizers: Optimizers) -> int:
    """Load a state into drafter and optimizers; returns how many steps were done."""
    own = dict(drafter.named_parameters())
    with torch.no_grad():
        for name, tensor in state["drafter"].items():
            own[name].copy_(tensor)
    optimizers.load_state_dict(state["optimizers"])
    return int(state["step"])


def cut_log(out: Path, step: int) -> None:
    """Drop log lines of steps past the state's: the resumed run writes them again."""
    path = out / LOG
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line_step(line) <= step]
        with replacing_file(path) as fresh:
            fresh.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def line_step(line: str) -> float:
    """The step of a log line; a line that a kill cut short belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def write_run(out: Path, config: TrainConfig) -> None:
    """run.json: what was run, with which versions."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    record = {
        "arguments": sys.argv[1:],
        "config": as_plain(config),
        "versions": versions,
        "machine": platform.machine(),
    }
    with replacing_file(out / RUN) as fresh:
        fresh.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
