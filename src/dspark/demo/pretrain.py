"""Train the demo's target from nothing: prepare the data once, then run the recipe's stages, resumable at any moment."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from dspark.common.errors import UserError
from dspark.demo import corpus
from dspark.demo.corpus import END_OF_TEXT
from dspark.demo.recipe import Architecture, Stage, TargetRecipe, load_recipe
from dspark.demo.tokenizer import save_tokenizer, train_tokenizer
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


def prepare(recipe: TargetRecipe, out: Path) -> None:
    """Write tokenizer, token streams and manifest under `out`; what is there already is kept."""
    if (out / "manifest.json").exists():
        return
    found = corpus.collect(recipe.packages, seed=recipe.seed, held_out=recipe.held_out)
    files = corpus.require(list(found))
    texts = corpus.documents([f for f in files if not f.held_out], recipe.packages, seed=recipe.seed)
    tokenizer = train_tokenizer(texts, vocab_size=recipe.architecture.vocab_size)
    save_tokenizer(tokenizer, out / "tokenizer", context=recipe.architecture.max_position_embeddings)
    held = [file.text for file in files if file.held_out]
    for name, part in (("train", texts), ("held_out", held)):
        encoded = [np.asarray(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch_fast(part)]
        np.save(out / f"{name}.npy", np.concatenate(encoded))
    sizes = np.array([token_bytes(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())], dtype=np.int64)
    np.save(out / "token_bytes.npy", sizes)
    _replace(out / "manifest.json", json.dumps(corpus.manifest(files), indent=1).encode())


def token_bytes(token: str) -> int:
    """How many bytes of text a byte-level token stands for: one per symbol, none for a special token."""
    return 0 if token.startswith("<|") and token.endswith("|>") else len(token)


def build_model(architecture: Architecture, layers: int, end_id: int) -> Qwen3ForCausalLM:
    """A fresh model whose layers begin as the identity: their output projections are zero."""
    config = Qwen3Config(
        **{k: v for k, v in asdict(architecture).items() if k != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": architecture.rope_theta},
        num_hidden_layers=layers,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def stacked(model: Qwen3ForCausalLM, architecture: Architecture, layers: int) -> Qwen3ForCausalLM:
    """A deeper model made of copies of a trained one's layers: 0123 becomes 01230123. (Du et al. 2024, G_stack)"""
    depth = model.config.num_hidden_layers
    if depth == layers:
        return model
    deep = build_model(architecture, layers, model.config.eos_token_id)
    deep.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(model.model.norm.state_dict())
    for i, layer in enumerate(deep.model.layers):
        layer.load_state_dict(model.model.layers[i % depth].state_dict())
    return deep


def lr_factor(stage: Stage, tokens: int, steps: int) -> float:
    """Linear between the stage's two ends, after a warm-up counted in steps."""
    start, end = stage.lr
    ramp = min(1.0, (steps + 1) / max(1, stage.warmup_steps))
    return ramp * (start + (end - start) * min(1.0, tokens / stage.tokens))


def rows(stream: np.ndarray, position: int, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, `count` rows of `length` tokens from `position` on; the stream's end joins its start."""
    index = np.arange(position, position + count * length + 1) % len(stream)
    ids = torch.from_numpy(stream[index].astype(np.int64))
    return ids[:-1].view(count, length), ids[1:].view(count, length)


class Trainer:
    """One run: model, optimizers, progress, and the folder they are kept in."""

    def __init__(self, recipe: TargetRecipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.stream = np.load(out / "train.npy", mmap_mode="r")
        self.held_out = np.load(out / "held_out.npy")
        self.sizes = torch.from_numpy(np.load(out / "token_bytes.npy"))
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
            self._use(stacked(self.model, self.recipe.architecture, stage.layers))
            self._run_stage(stage)
        self.save()

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
        starts = [(progress.position + i * micro) % len(self.stream) for i in range(count)]
        parts = self.pool.map(lambda start: self._gradients(start, micro // stage.length, stage.length), starts)
        for loss, gradients in parts:
            total += loss / count
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                gradient = gradient / count
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        progress.position = (starts[-1] + micro) % len(self.stream)
        self.optimizers.step()
        progress.tokens += stage.batch_tokens
        progress.stage_tokens += stage.batch_tokens
        progress.stage_steps += 1
        return total

    def _gradients(self, start: int, count: int, length: int) -> tuple[float, tuple[Tensor, ...]]:
        loss = self.loss(*rows(self.stream, start, count, length)).mean()
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
        for position in range(0, min(limit, len(self.held_out)) - count * length, count * length):
            input_BT, target_BT = rows(self.held_out, position, count, length)
            nats += self.loss(input_BT, target_BT).sum().item()
            size += int(self.sizes[target_BT].sum())
        return nats / math.log(2) / max(1, size), size

    def report(self, stage: Stage, losses: list[float], speed: float) -> None:
        """Save, measure, export, and log one line."""
        self.save()
        bits, size = self.bits_per_byte(stage.length, self.recipe.eval_tokens)
        line: dict[str, Any] = {"time": time.strftime("%H:%M:%S"), **asdict(self.progress), "layers": stage.layers}
        line |= {"loss": sum(losses) / len(losses), "held_out_bits_per_byte": bits, "held_out_bytes": size}
        line |= {"tokens_per_s": speed, "lr_factor": lr_factor(stage, self.progress.stage_tokens, self.progress.stage_steps)}
        text = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()})
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(text + "\n")
        print(text, flush=True)
        export(self.model, self.out / "tokenizer", self.out / "export")

    def save(self) -> None:
        """Replace the checkpoint in one move, so that a kill at any moment leaves a whole one."""
        state = {
            "progress": asdict(self.progress),
            "layers": self.model.config.num_hidden_layers,
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "rng": torch.get_rng_state(),
        }
        partial = self.out / "last.pt.tmp"
        torch.save(state, partial)
        os.replace(partial, self.out / "last.pt")

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


def export(model: Qwen3ForCausalLM, tokenizer: Path, target: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` load, put in place by renaming."""
    partial, old = target.with_name(target.name + ".tmp"), target.with_name(target.name + ".old")
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    copy = Qwen3ForCausalLM(model.config).to(dtype)
    copy.load_state_dict(model.state_dict())
    copy.config.dtype = dtype
    end = model.config.eos_token_id
    copy.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end, do_sample=False)
    copy.save_pretrained(partial, max_shard_size="15MB")
    for file in tokenizer.iterdir():
        shutil.copy(file, partial)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(data)
    os.replace(partial, path)


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
        _replace(arguments.out / "pid", str(os.getpid()).encode())
        prepare(recipe, arguments.out)
        Trainer(recipe, arguments.out).run()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
