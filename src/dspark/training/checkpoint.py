"""The state of a training run on disk: whole or absent, checked by sums, and enough to continue with the same losses.

    out/checkpoints/step-00000200/   state.json  SHA256SUMS  .metadata  __0_0.distcp …

Tensors are written by torch.distributed.checkpoint, each rank its own, and read back by any number of ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as distributed
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from dspark.common.errors import UserError
from dspark.common.files import replacing_file, sha256_of
from dspark.training.optimizer import Optimizers
from dspark.training.sharding import Ranks

LOG, STATE, SUMS = "log.jsonl", "state.json", "SHA256SUMS"


def trainable(drafter: nn.Module) -> dict[str, Tensor]:
    """What training changes: everything but the target's own tensors."""
    return {name: p.detach() for name, p in drafter.named_parameters() if p.requires_grad}


class Checkpoints:
    """The checkpoints of one run: the newest `keep`."""

    def __init__(self, out: Path, ranks: Ranks, keep: int) -> None:
        self.out, self.root, self.ranks, self.keep = out, out / "checkpoints", ranks, keep

    def finished(self) -> list[Path]:
        """The whole ones, oldest first."""
        return sorted(path for path in self.root.glob("step-*") if re.fullmatch(r"step-\d+", path.name))

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write one, then drop those past `keep`. Raises UserError and leaves the others alone where that fails."""
        final = self.root / f"step-{step:08d}"
        fresh = self.root / f".{final.name}.partial"
        try:
            with self.together(f"cannot write {final}"):
                if self.ranks.first:
                    shutil.rmtree(fresh, ignore_errors=True)
                    fresh.mkdir(parents=True)
            with self.together(f"cannot write {final}"):
                distributed.save(tensors, checkpoint_id=fresh, no_dist=self.ranks.size == 1)
            with self.together(f"cannot write {final}"):
                mine = {path.name: settled(path) for path in sorted(fresh.glob(f"__{self.ranks.rank}_*"))}
            sums = {name: value for part in self.ranks.share(mine) for name, value in part.items()}
            with self.together(f"cannot write {final}"):
                if self.ranks.first:
                    finish(fresh, final, {"step": step, **state}, sums)
        finally:
            if self.ranks.first:
                shutil.rmtree(fresh, ignore_errors=True)
        if self.ranks.first:
            for old in self.finished()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def tidy(self) -> None:
        """Remove what processes that were killed had begun to write."""
        for path in (*self.root.glob(".step-*.partial"), *self.out.glob(".export.*"), *self.out.glob(".best.*")):
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The last checkpoint and its state, or None for a new run. Raises UserError for a damaged one."""
        if not self.finished():
            return None
        path = self.finished()[-1]
        with self.together(f"{path} is damaged", way_out="delete it to continue from the one before it"):
            names = check_sums(path, self.ranks)
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if names < {STATE, ".metadata"}:
                raise UserError(f"{SUMS} names no {STATE}")
        return path, state

    def load(self, path: Path, tensors: dict[str, Any]) -> None:
        """Fill `tensors`, as `tensors_of` gives them, from a checkpoint."""
        with self.together(f"{path} does not fit the recipe", way_out="pass another --out"):
            distributed.load(tensors, checkpoint_id=path, no_dist=self.ranks.size == 1)

    @contextmanager
    def together(self, what: str, *, way_out: str = "") -> Iterator[None]:
        """Where a rank fails all raise the same UserError: none is left waiting for the others."""
        problem = None
        try:
            with warnings.catch_warnings():  # torch's, that one process writes alone
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                yield
        except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
            problem = reason_of(error)
        found = [problem for problem in self.ranks.share(problem) if problem]
        if found:
            raise UserError(f"{what}: {found[0]}; {way_out or self.last_good()}")

    def last_good(self) -> str:
        """What a person who ran out of disk should know."""
        kept = self.finished()
        last = f"{kept[-1]} is whole" if kept else "nothing was saved yet"
        return f"{last}, make room and run the same command again"


def tensors_of(drafter: nn.Module, optimizers: Optimizers, average: dict[str, Tensor]) -> dict[str, Any]:
    """All tensors of a run, those of the optimizers too (created where no step was taken yet)."""
    parts = tuple(optimizers.parts.values())
    found = {"drafter": trainable(drafter), "optimizers": get_optimizer_state_dict(drafter, parts)}
    return found | ({"average": average} if average else {})


def restore(tensors: dict[str, Any], drafter: nn.Module, optimizers: Optimizers) -> None:
    """Hand loaded optimizer state back; the drafter's own tensors were filled in place."""
    set_optimizer_state_dict(drafter, tuple(optimizers.parts.values()), optim_state_dict=tensors["optimizers"])


def settled(path: Path) -> str:
    """The sum of a file, once it is on the disk and not only in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def finish(fresh: Path, final: Path, state: dict[str, Any], sums: dict[str, str]) -> None:
    """Add state and sums, and give the checkpoint its name."""
    (fresh / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    sums |= {name: settled(fresh / name) for name in (STATE, ".metadata")}
    text = "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))
    (fresh / SUMS).write_text(text, encoding="utf-8")
    settled(fresh / SUMS)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(fresh, final)


def check_sums(path: Path, ranks: Ranks) -> set[str]:
    """The names of a checkpoint's files, each read by one rank. Raises UserError for one that differs from its sum."""
    lines = [line.split("  ", 1) for line in (path / SUMS).read_text(encoding="utf-8").splitlines()]
    for value, name in lines[ranks.rank :: ranks.size]:
        if sha256_of(path / name) != value:
            raise UserError(f"{name} is not what was written")
    return {name for _, name in lines}


def reason_of(error: Exception | CheckpointException) -> str:
    """One line of whatever went wrong, on whichever rank."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]  # type: ignore[assignment]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
