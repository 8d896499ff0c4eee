"""Trains a block drafter for a frozen target: anchors, three losses, one resumable loop.

    python -m dspark.training.loop recipes/demo_drafter.yaml --out DIR

The same command continues a run that was killed. All randomness is a function of (seed, step), so nothing but the
weights, the optimizer and the step number has to survive. B sequences, S tokens, A anchors, K block slots.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dspark.common.errors import UserError
from dspark.drafters.checkpoint import save
from dspark.drafters.lesson import Trainable
from dspark.models.loading import load_causal_lm, resolve_device
from dspark.training.checkpoint import LOG, cut_log, read_state, restore, save_state, trainable, write_run
from dspark.training.config import TrainConfig, check_resumable, load_config
from dspark.training.data import Documents
from dspark.training.drafter import create
from dspark.training.features import OnlineTarget, Remembered
from dspark.training.forward import goal
from dspark.training.metrics import Sums, combine, measure, readable
from dspark.training.objectives import Objective
from dspark.training.optimizer import Optimizers, build_optimizers

EVALUATION_SEED = 1 << 40  # far from any training step's


class Part(NamedTuple):
    """One micro-batch's share of a step."""

    gradients: tuple[Tensor, ...]
    goal: Objective


class Trainer:
    """One run: target, drafter, data, optimizers, and the directory they are kept in."""

    def __init__(self, config: TrainConfig, out: Path) -> None:
        self.config, self.out, self.step_number = config, out, 0
        self.device = resolve_device(config.device)
        model = load_causal_lm(config.target, dtype=config.precision, device=str(self.device))
        self.drafter, self.drafter_config = create(
            model, config.drafter, anchors=config.anchors, seed=config.seed, init=config.init, start=config.start
        )
        self.target = OnlineTarget(model, self.drafter.taps)
        self.remembered = Remembered(self.target) if config.remember_features else None
        self.train_data = Documents(config.train, config.length)
        self.held_out = Documents(config.held_out, config.length)
        self.parameters = [p for p in self.drafter.parameters() if p.requires_grad]
        self.optimizers = optimizers_of(self.drafter, config)
        # On the CPU one micro-batch runs per thread: no barrier inside an operation, so that a busy neighbour
        # delays one micro-batch and not every matrix product.
        workers = config.threads if self.device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        out.mkdir(parents=True, exist_ok=True)
        state = read_state(out)
        if state is not None:
            check_resumable(config, state["config"])
            self.step_number = restore(state, self.drafter, self.optimizers)
            cut_log(out, self.step_number)
        write_run(out, config)

    def run(self) -> None:
        """Train to the last step. A loss that is no number ends the run and keeps the last good state."""
        config, steps, seconds = self.config, [], 0.0
        while self.step_number < config.steps:
            started = time.monotonic()
            steps.append(self.step())
            seconds += time.monotonic() - started
            if self.due(config.log_every):
                speed = float(sum(step["tokens"] for step in steps)) / seconds
                factor = self.factor(self.step_number - 1)
                self.log({**readable(combine(steps)), "lr_factor": factor, "tokens_per_s": round(speed)})
                steps, seconds = [], 0.0
            if self.due(config.save_every):
                self.save()
            if self.due(config.evaluate_every):
                self.log({"evaluation": True, **self.evaluate()})

    def due(self, every: int) -> bool:
        """Whether something done every so many steps, and at the end, is done now."""
        return self.step_number % every == 0 or self.step_number == self.config.steps

    def step(self) -> Sums:
        """One optimizer step; returns what it measured, still on the device."""
        config = self.config
        numbers = self.train_data.numbers(self.step_number, config.batch, config.seed)
        parts = list(self.parts(self.train_data, numbers, self.step_number, self.part))
        loss = float(torch.stack([part.goal.total.detach() for part in parts]).mean())
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.step_number + 1}; {self.out} keeps the last good state, "
                "restart with a lower lr and another --out"
            )
        for parameter, *gradients in zip(self.parameters, *(part.gradients for part in parts), strict=True):
            parameter.grad = torch.stack(gradients).mean(0)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        self.optimizers.set_factor(self.factor(self.step_number))
        self.optimizers.step()
        self.step_number += 1
        tokens = sum(self.train_data.size(number) for number in numbers)
        return measure([part.goal for part in parts]) | {"tokens": torch.tensor(tokens), "gradient_norm": norm}

    def parts(self, data: Documents, numbers: list[int], seed: int, work: Any) -> Iterator[Any]:
        """`work` on every micro-batch, in order; anchors are drawn from (seed, place in the step)."""
        size = self.config.micro_batch
        jobs = [
            (data, numbers[i : i + size], torch.Generator().manual_seed(self.config.seed + seed * 1009 + i))
            for i in range(0, len(numbers), size)
        ]
        return self.pool.map(lambda job: work(*job), jobs)

    def part(self, data: Documents, numbers: list[int], generator: torch.Generator) -> Part:
        """Loss and gradients of one micro-batch."""
        goal = self.goal(data, numbers, generator)
        return Part(torch.autograd.grad(goal.total, self.parameters), goal)

    def goal(self, data: Documents, numbers: list[int], generator: torch.Generator) -> Objective:
        """The objective of one micro-batch."""
        config = self.config
        source = self.remembered if self.remembered and data is self.train_data else self.target
        return goal(
            cast(Trainable, self.drafter),
            source,
            data.batch(numbers).to(self.device),
            weights=config.loss,
            anchors=config.anchors,
            generator=generator,
            precision=config.precision,
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Predicted acceptance by position on held-out text, Σ min(p, q), and the τ it implies.

        The prefix of a slot is the target's own text, as after acceptance; a block's τ is 1 + Σ_k Π_{j≤k} c*_j.
        """
        count = min(self.config.evaluate_sequences, len(self.held_out))
        spread = [i * len(self.held_out) // count for i in range(count)]
        self.drafter.eval()
        goals = list(self.parts(self.held_out, spread, EVALUATION_SEED, self.goal))
        self.drafter.train()
        return readable(measure(goals))

    def factor(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        warm = max(1, round(self.config.warmup * self.config.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.config.steps - warm)))

    def log(self, line: dict[str, Any]) -> None:
        """One line of JSON, on disk and on the screen."""
        line = {"step": self.step_number, "time": time.strftime("%H:%M:%S"), **line}
        text = json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()})
        with (self.out / LOG).open("a", encoding="utf-8") as log:
            log.write(text + "\n")
        print(text, flush=True)

    def save(self) -> None:
        """State and export, each replaced whole."""
        if not all(bool(tensor.isfinite().all()) for tensor in trainable(self.drafter).values()):
            raise UserError(f"a weight is no number at step {self.step_number}; {self.out} keeps the last good state")
        save_state(self.out, self.step_number, self.drafter, self.optimizers, self.config)
        kind = getattr(torch, self.config.export_dtype)
        save(self.drafter, self.drafter_config, self.out / "export", dtype=kind, frozen=self.config.export_frozen)


def optimizers_of(drafter: torch.nn.Module, config: TrainConfig) -> Optimizers:
    """AdamW for all, or Muon for the backbone's matrices and AdamW for heads, embeddings and vectors."""
    if config.optimizer == "muon":
        heads = ("markov_w2", "confidence_head")
        decay = config.weight_decay
        return build_optimizers(drafter, muon_lr=config.muon_lr, adam_lr=config.lr, weight_decay=decay, exclude=heads)
    parameters = [p for p in drafter.parameters() if p.requires_grad]
    return Optimizers(None, torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay))


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
        Trainer(load_config(recipe, **arguments), out).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
