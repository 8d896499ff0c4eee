"""Train the demo's target from nothing: the data once, then the recipe's stages, resumable at any moment."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3ForCausalLM

from dspark.common.errors import UserError
from dspark.common.files import replacing_file
from dspark.demo.dataset import load_data, prepare, rows
from dspark.demo.network import build_model, deepened, export
from dspark.demo.recipe import Stage, TargetRecipe, load_recipe
from dspark.training.optimizer import Optimizers, build_optimizers


@dataclass
class Progress:
    """Where a run is; with the weights and the optimizers' state, all that a restart needs."""

    stage: int = 0
    stage_tokens: int = 0
    stage_steps: int = 0
    position: int = 0
    tokens: int = 0
    seconds: float = 0.0


def lr_factor(stage: Stage, tokens: int, steps: int) -> float:
    """Linear between the stage's two ends, after a warm-up counted in steps."""
    start, end = stage.lr
    ramp = min(1.0, (steps + 1) / max(1, stage.warmup_steps))
    return ramp * (start + (end - start) * min(1.0, tokens / stage.tokens))


class Trainer:
    """One run: model, optimizers, progress, and the folder they are kept in."""

    def __init__(self, recipe: TargetRecipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.data = load_data(out)
        self.progress = Progress()
        self.stopping = False
        # One micro-batch per core, each on one thread: no barrier inside an operation, so a neighbour that takes
        # a core delays one micro-batch and not every matrix product.
        self.pool = ThreadPoolExecutor(recipe.threads, initializer=torch.set_num_threads, initargs=(1,))
        torch.manual_seed(recipe.seed)
        self._use(build_model(recipe.architecture, recipe.stages[0].layers, 0))
        if (out / "last.pt").exists():
            self._resume()

    def run(self) -> None:
        """All stages; a file `NEXT` in the run's folder ends the present one early, SIGTERM saves and leaves."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        while self.progress.stage < len(self.recipe.stages) and not self.stopping:
            stage = self.recipe.stages[self.progress.stage]
            self._use(deepened(self.model, self.recipe.architecture, stage.layers, stage.grow))
            self._run_stage(stage)
        self.save()
        if not self.stopping:
            self._conclude()

    def _run_stage(self, stage: Stage) -> None:
        progress, losses, mark, begun = self.progress, [], time.monotonic(), 0
        while progress.stage_tokens < stage.tokens and not (self.out / "NEXT").exists():
            started = time.monotonic()
            losses.append(self.step(stage))
            progress.seconds += time.monotonic() - started
            begun += stage.batch_tokens
            if time.monotonic() - mark > 60 * self.recipe.report_minutes or len(losses) == 10 == progress.stage_steps:
                self.report(stage, losses, begun / (time.monotonic() - mark))
                losses, mark, begun = [], time.monotonic(), 0
            if self.stopping:
                return
        (self.out / "NEXT").unlink(missing_ok=True)
        if losses:
            self.report(stage, losses, begun / (time.monotonic() - mark))
        progress.stage, progress.stage_tokens, progress.stage_steps = progress.stage + 1, 0, 0
        self.save()

    def step(self, stage: Stage) -> float:
        """One optimizer step over `batch_tokens` tokens; returns the mean loss in nats per token."""
        progress, total = self.progress, 0.0
        micro, count = self.recipe.micro_tokens, stage.batch_tokens // self.recipe.micro_tokens
        self.optimizers.set_factor(lr_factor(stage, progress.stage_tokens, progress.stage_steps))
        starts = [(progress.position + i * micro) % len(self.data.train) for i in range(count)]
        parts = self.pool.map(lambda start: self._gradients(start, micro // stage.length, stage.length), starts)
        for loss, gradients in parts:
            total += loss / count
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                gradient = gradient / count
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        progress.position = (starts[-1] + micro) % len(self.data.train)
        self.optimizers.step()
        progress.tokens += stage.batch_tokens
        progress.stage_tokens += stage.batch_tokens
        progress.stage_steps += 1
        return total

    def _gradients(self, start: int, count: int, length: int) -> tuple[float, tuple[Tensor, ...]]:
        loss = self.loss(*rows(self.data.train, start, count, length)).mean()
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def _loss(self, input_BT: Tensor, target_BT: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = self.model(input_ids=input_BT, use_cache=False).logits
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), target_BT.flatten(), reduction="none")

    @torch.no_grad()
    def bits_per_byte(self, length: int, limit: int) -> tuple[float, int]:
        """Held-out bits per byte over the first `limit` tokens in rows of `length`, and the number of bytes."""
        count = max(1, self.recipe.micro_tokens // length)
        nats, size = 0.0, 0
        for position in range(0, min(limit, len(self.data.held_out)) - count * length, count * length):
            input_BT, target_BT = rows(self.data.held_out, position, count, length)
            nats += self.loss(input_BT, target_BT).sum().item()
            size += int(self.data.bytes_of[target_BT].sum())
        return nats / math.log(2) / max(1, size), size

    def report(self, stage: Stage, losses: list[float], speed: float) -> None:
        """Save, measure, export, and log one line."""
        self.save()
        bits, size = self.bits_per_byte(stage.length, self.recipe.eval_tokens)
        line: dict[str, Any] = {"time": time.strftime("%H:%M:%S"), **asdict(self.progress), "layers": stage.layers}
        line |= {"loss": sum(losses) / len(losses), "held_out_bits_per_byte": bits, "held_out_bytes": size}
        line |= {"tokens_per_s": speed, "muon_lr": self.optimizers.parts["muon"].param_groups[0]["lr"]}
        text = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(text + "\n")
        print(text, flush=True)
        self._export()

    def _conclude(self) -> None:
        """The result on every held-out token, in the longest rows that were trained."""
        bits, size = self.bits_per_byte(max(stage.length for stage in self.recipe.stages), len(self.data.held_out))
        result = {**asdict(self.progress), "held_out_bits_per_byte": bits, "held_out_bytes": size}
        with replacing_file(self.out / "result.json") as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        self._export()

    def _export(self) -> None:
        extras = [*(self.out / "tokenizer").iterdir(), self.out / "held_out.json"]
        export(self.model, extras, self.out / "export")

    def save(self) -> None:
        """Replace the checkpoint in one move, so that a kill at any moment leaves a whole one."""
        state = {
            "progress": asdict(self.progress),
            "layers": self.model.config.num_hidden_layers,
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "rng": torch.get_rng_state(),
        }
        with replacing_file(self.out / "last.pt") as partial:
            torch.save(state, partial)

    def _resume(self) -> None:
        state = torch.load(self.out / "last.pt", weights_only=True)
        self._use(build_model(self.recipe.architecture, state["layers"], 0))
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])

    def _use(self, model: Qwen3ForCausalLM) -> None:
        if getattr(self, "model", None) is model:
            return
        self.model = model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.loss = torch.compile(self._loss) if self.recipe.compile else self._loss
        recipe = self.recipe
        self.optimizers: Optimizers = build_optimizers(
            model, muon_lr=recipe.muon_lr, adam_lr=recipe.adam_lr, weight_decay=recipe.weight_decay
        )


def main(argv: list[str] | None = None) -> None:
    """Run or continue a recipe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        recipe = load_recipe(arguments.recipe)
        arguments.out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(recipe.threads)
        (arguments.out / "pid").write_text(str(os.getpid()), encoding="utf-8")
        prepare(recipe, arguments.out)
        Trainer(recipe, arguments.out).run()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
