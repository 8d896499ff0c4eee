"""Trains a drafter for a frozen target: anchors, losses, one resumable loop.

    python -m dspark.training.loop recipes/demo_drafter.yaml --out DIR
    torchrun --nproc_per_node 8 -m dspark.training.loop recipes/dspark_qwen3_4b.yaml --out DIR

The same command continues a run that was killed, on any number of ranks. All randomness is a function of (seed, step),
so nothing but the weights, the optimizer, the step number and what evaluations found has to survive.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dspark.common.errors import UserError
from dspark.common.files import sha256_of
from dspark.drafters.checkpoint import save
from dspark.drafters.lesson import Trainable
from dspark.training.checkpoint import Checkpoints, cut_log, restore, tensors_of, trainable
from dspark.training.config import TrainConfig, as_plain, check_resumable, load_config
from dspark.training.data import Documents
from dspark.training.drafter import create
from dspark.training.features import OnlineTarget, open_features
from dspark.training.forward import goal
from dspark.training.gradients import Gradients, Replicated, Sharded
from dspark.training.metrics import Sums, combine, measure, predicted, readable, walk
from dspark.training.objectives import Objective
from dspark.training.optimizer import learning_rate, optimizers_of, whole
from dspark.training.packing import Row
from dspark.training.report import Report, reporting, write_run
from dspark.training.sharding import Ranks, SplitTarget, check_share, joined, load_target, shard_drafter, shard_target

Job = Sequence[Row]
"""The rows of a micro-batch."""


class Trainer:
    """One run: target, drafter, data, optimizers, and the directory they are kept in."""

    def __init__(self, config: TrainConfig, out: Path, ranks: Ranks | None = None) -> None:
        self.config, self.out, self.step_number = config, out, 0
        self.ranks = ranks or Ranks.alone(config.device)
        self.best: dict[str, float] = {}  # step and τ of the best evaluation
        self.stale = 0  # evaluations since then
        self.train_data, self.held_out = (
            Documents(path, config.length, config.row_tokens) for path in (config.train, config.held_out)
        )
        passes = config.epochs * len(self.train_data) / config.batch
        self.steps = math.ceil(passes) if config.epochs else config.steps
        check_share(config, self.ranks)
        self.build()
        sums = {name: sha256_of(getattr(config, name)) for name in ("train", "held_out")} if self.ranks.first else {}
        self.data_sums = self.ranks.share(sums)[0]
        self.checkpoints = Checkpoints(out, self.ranks, config.keep)
        self.resume()
        write_run(out, config, self.ranks, data=self.data_sums, begin=self.step_number)

    def build(self) -> None:
        """Target, drafter, what makes gradients, and the optimizers."""
        config, ranks = self.config, self.ranks
        model = load_target(config.target, config.precision, ranks)
        self.drafter, self.drafter_config = create(
            model,
            config.drafter,
            anchors=config.anchors,
            seed=config.seed,
            init=config.init,
            start=config.start,
            data=config.train,
        )
        if config.tensor_parallel > 1:
            mesh = ranks.mesh(config.tensor_parallel)["target"]
            self.target: OnlineTarget = SplitTarget(model, self.drafter.taps, mesh)
        else:
            self.target = OnlineTarget(model, self.drafter.taps)
        divided = config.tensor_parallel > 1 or (config.shard_target and ranks.size > 1)
        if divided and config.tensor_parallel == 1:
            shard_target(model, ranks)
        place, share = self.out / "features", (ranks.rank, ranks.size)
        self.features = open_features(config.features, self.target, self.train_data, place, share=share)
        sharded = config.shard_drafter and ranks.size > 1
        if sharded:
            shard_drafter(self.drafter, ranks)
        self.parameters = [p for p in self.drafter.parameters() if p.requires_grad]
        one_by_one = divided or ranks.device.type != "cpu"  # ranks that divide a target meet in every layer of it
        self.gradients: Gradients = (
            Sharded(self.drafter, self.parameters, ranks)
            if sharded
            else Replicated(self.parameters, ranks, 1 if one_by_one else config.threads)
        )
        self.optimizers = optimizers_of(self.drafter, config)
        self.average = {n: t.clone() for n, t in trainable(self.drafter).items()} if config.ema else {}

    def resume(self) -> None:
        """Continue from the newest checkpoint, where there is one; what a kill left half done is cleared away."""
        found = self.checkpoints.newest()
        if self.ranks.first:
            self.checkpoints.tidy()
            cut_log(self.out, found[1]["step"] if found else 0)
        if found is None:
            return
        path, state = found
        check_resumable(self.config, state["config"])
        for name, value in self.data_sums.items():
            if state["data"][name] != value:
                raise UserError(
                    f"the {name} data is not what the run was started with; restore it, or pass another --out"
                )
        tensors = tensors_of(self.drafter, self.optimizers, self.average)
        self.checkpoints.load(path, tensors)
        restore(tensors, self.drafter, self.optimizers)
        self.step_number, self.best, self.stale = state["step"], state["best"], state["stale"]
        if self.finished:  # killed after its last checkpoint, it may lack what comes of it
            self.export_average()

    @property
    def finished(self) -> bool:
        """After the last step, or where evaluations stopped getting better."""
        patience = self.config.patience
        return self.step_number >= self.steps or (patience > 0 and self.stale >= patience)

    def run(self) -> None:
        """Train to the end. A loss that is no number ends the run and keeps the last good state."""
        with reporting(self.config, self.out, self.ranks, begin=self.step_number, steps=self.steps) as report:
            window: list[Sums] = []
            seconds = 0.0
            while not self.finished:
                started = time.monotonic()
                window.append(self.step())
                seconds += time.monotonic() - started
                report.advance(self.step_number)
                if self.due(self.config.log_every):
                    self.log_window(report, window, seconds)
                    window, seconds = [], 0.0
                if self.due(self.config.evaluate_every):
                    report.line(self.step_number, {"evaluation": True, **self.judge()})
                if self.due(self.config.save_every) or self.finished:
                    self.save()

    def due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is done now."""
        return self.step_number % every == 0 or self.step_number == self.steps

    def log_window(self, report: Report, window: list[Sums], seconds: float) -> None:
        """One line over the steps since the last one."""
        sums = combine(window)
        norm = float(sums.pop("gradient_norm")) / len(window)
        factor = learning_rate(self.step_number - 1, self.steps, self.config.warmup)
        extra = {"gradient_norm": norm, "lr_factor": factor, "tokens_per_s": round(float(sums["tokens"]) / seconds)}
        report.line(self.step_number, {**readable(sums), **extra})

    def step(self) -> Sums:
        """One optimizer step; returns what it measured over all ranks, still on the device."""
        config = self.config
        rows = self.train_data.rows(self.step_number, config.batch, config.seed)
        goals = self.gradients(self.goal_of(self.train_data, self.step_number), self.share(rows))
        sums = measure(goals)
        self.ranks.sum_(sums.values())
        weight = sums["weight"].clamp(min=1e-8)
        for parameter in self.parameters:
            parameter.grad.div_(weight)  # type: ignore[union-attr]
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, config.clip))
        self.check_finite("loss", sums["total"] / weight)
        self.check_finite("gradient's norm", norm)
        self.optimizers.set_factor(learning_rate(self.step_number, self.steps, config.warmup))
        self.optimizers.step()
        for name, tensor in self.average.items():
            tensor.lerp_(trainable(self.drafter)[name], 1 - config.ema)
        self.step_number += 1
        tokens = sum(self.train_data.size(row) for row in rows)
        return sums | {"tokens": torch.tensor(tokens), "gradient_norm": norm.detach()}

    def check_finite(self, what: str, value: Tensor) -> None:
        """Raises UserError, on every rank, for what is no number."""
        if not math.isfinite(float(value)):
            raise UserError(
                f"the {what} is {float(value)} at step {self.step_number + 1}; {self.out} keeps the last good state, "
                "restart with a lower lr and another --out"
            )

    def share(self, rows: Sequence[Row]) -> list[Job]:
        """This rank's micro-batches."""
        size = self.config.micro_batch
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return parts[self.ranks.rank :: self.ranks.size]

    def goal_of(self, data: Documents, step: int, *, everywhere: bool = False) -> Callable[[Job], Objective]:
        """The objective of a micro-batch as a function of its rows; anchors are drawn from (seed, step, piece)."""
        config = self.config
        source = self.features if data is self.train_data else self.target

        def objective_of(job: Job) -> Objective:
            batch = data.batch(job).to(self.ranks.device)
            drafter, seed = cast(Trainable, self.drafter), config.seed + step * 1_000_003
            options: dict[str, Any] = {"weights": config.loss, "precision": config.precision}
            return goal(drafter, source, batch, anchors=None if everywhere else config.anchors, seed=seed, **options)

        return objective_of

    def judge(self) -> dict[str, Any]:
        """Evaluate, and keep the drafter apart where it is the best so far."""
        with self.averaged():
            found = self.evaluate()
            if found["tau"] > self.best.get("tau", 0.0):
                self.best, self.stale = {"step": self.step_number, "tau": found["tau"]}, 0
                self.export(self.out / "best")
            else:
                self.stale += 1
        return found

    def evaluate(self) -> dict[str, Any]:
        """Losses on held-out text, and the τ and acceptance by position that the engine would measure (`walk`)."""
        spread = self.held_out.spread(self.config.evaluate_sequences)
        size, ranks = self.config.micro_batch, self.ranks
        jobs = [spread[i : i + size] for i in range(0, len(spread), size)]
        places = range(ranks.rank, len(jobs) + -len(jobs) % ranks.size, ranks.size)  # as many on every rank
        objective_of = self.goal_of(self.held_out, 0, everywhere=True)

        def both(job: Job) -> Sums:
            found = objective_of(job)
            steps = walk(self.held_out.batch(job), found.taken_BAK.cpu())
            return measure([found]) | {f"walk_{name}": x.to(ranks.device) for name, x in steps.items()}

        self.drafter.eval()
        parts = self.gradients.values(both, [jobs[place % len(jobs)] for place in places])
        self.drafter.train()
        counted = [
            {name: x * (place < len(jobs)) for name, x in part.items()}
            for part, place in zip(parts, places, strict=True)
        ]
        sums = combine(counted)
        ranks.sum_(sums.values())
        walked = {name.removeprefix("walk_"): sums.pop(name) for name in list(sums) if name.startswith("walk_")}
        return {**readable(sums), **predicted(walked)}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While the context is open the drafter has its weights' moving average, where there is one."""
        own = {name: tensor.clone() for name, tensor in trainable(self.drafter).items()} if self.average else {}
        for name, tensor in self.average.items():
            trainable(self.drafter)[name].copy_(tensor)
        try:
            yield
        finally:
            for name, tensor in own.items():
                trainable(self.drafter)[name].copy_(tensor)

    def save(self) -> None:
        """Checkpoint and export, each replaced whole."""
        for name, tensor in trainable(self.drafter).items():
            self.check_finite(f"sum of {name}", whole(tensor.sum()))
        state = {"best": self.best, "stale": self.stale, "data": self.data_sums, "config": as_plain(self.config)}
        tensors = tensors_of(self.drafter, self.optimizers, self.average)
        self.features.flush()
        self.checkpoints.save(self.step_number, tensors, state)
        self.export_average()

    def export_average(self) -> None:
        """The drafter as it is now, smoothed where the recipe says so."""
        with self.averaged():
            self.export(self.out / "export")

    def export(self, directory: Path) -> None:
        """The drafter as the engine loads it."""
        config = self.config
        kind = getattr(torch, config.export_dtype)
        state = {name: whole(tensor) for name, tensor in self.drafter.state_dict().items()}
        with self.checkpoints.together(f"cannot write {directory}"):
            if self.ranks.first:
                options: dict[str, Any] = {"dtype": kind, "frozen": config.export_frozen, "state": state}
                save(self.drafter, self.drafter_config, directory, **options)


def main(argv: list[str] | None = None) -> int:
    """Start or continue the run of a recipe."""
    parser = argparse.ArgumentParser(description="Train a drafter; the same command continues a run that was stopped.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the run's directory")
    for name in ("target", "train", "held-out", "init", "device"):
        parser.add_argument(f"--{name}", help=f"replaces the recipe's {name.replace('-', '_')}")
    parser.add_argument("--steps", type=int, help="replaces the recipe's steps")
    arguments = vars(parser.parse_args(argv))
    recipe, out = arguments.pop("recipe"), arguments.pop("out")
    try:
        train(load_config(recipe, **arguments), out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(config: TrainConfig, out: Path) -> None:
    """Train as one rank of as many as `torchrun` started, or alone."""
    with joined(config.device) as ranks:
        Trainer(config, out, ranks).run()


if __name__ == "__main__":
    sys.exit(main())
