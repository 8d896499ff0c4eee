"""What a recipe would do and cost, before it does: checked by two steps of a tiny random model of the same family."""

from __future__ import annotations

import io
import json
import math
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.drafters.config import DrafterConfig, parse
from dspark.models.taps import check_taps
from dspark.training.checkpoint import trainable
from dspark.training.config import TrainConfig
from dspark.training.data import Documents, write_documents
from dspark.training.drafter import drafter_fields
from dspark.training.loop import Trainer
from dspark.training.published import shrunk, text_config
from dspark.training.student import create_student

VOCABULARY, LENGTH = 256, 32  # of the tiny run
STATE_BYTES = 16  # of a trained parameter: weight, gradient, and AdamW's two moments, float32


@dataclass(frozen=True)
class Preview:
    """Sizes in bytes, of one rank."""

    target_parameters: int
    trained_parameters: int
    frozen_parameters: int
    target: int
    state: int
    activations: int
    checkpoint: int
    export: int
    steps: int
    source: str  # where the target's shape is from
    counted: str  # where the number of sequences is from

    @property
    def memory(self) -> int:
        return self.target + self.state + self.activations

    @property
    def disk(self) -> int:
        return self.checkpoint + self.export


def preview(config: TrainConfig, *, samples: int) -> Preview:
    """Sizes of the run at full scale, on the meta device; `samples` stands for data that is not there yet."""
    text, source = text_config(config.target)
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(text)
    drafter, parsed = drafter_of(config, text, target)
    trained = sum(tensor.numel() for tensor in trainable(drafter).values())
    frozen = sum(p.numel() for p in drafter.parameters() if not p.requires_grad)
    width = torch.bfloat16.itemsize if config.precision == "bfloat16" else torch.float32.itemsize
    size = sum(p.numel() for p in target.parameters())
    sequences, counted = sequences_of(config, samples)
    steps = math.ceil(config.epochs * sequences / config.batch) if config.epochs else config.steps
    written = trained + (frozen if config.export_frozen else 0)
    state = trained * (STATE_BYTES + (4 if config.ema else 0))
    return Preview(
        target_parameters=size,
        trained_parameters=trained,
        frozen_parameters=frozen,
        target=size * width,
        state=state,
        activations=activations_of(config, parsed, width),
        checkpoint=(config.keep + 1) * (state - 4 * trained),  # one more while the next is written; no gradients
        export=2 * written * getattr(torch, config.export_dtype).itemsize,
        steps=steps,
        source=source,
        counted=counted,
    )


def drafter_of(config: TrainConfig, text: PreTrainedConfig, target: Any) -> tuple[nn.Module, DrafterConfig]:
    """The recipe's drafter without memory, and its config. Raises UserError for taps that the target lacks."""
    if config.drafter.kind == "draft_model":
        with torch.device("meta"):
            return create_student(target, config.drafter, seed=config.seed, init=config.init, start="random")
    parsed = parse(drafter_fields(text, config.drafter, config.anchors), "the recipe's drafter")
    check_taps(parsed.taps, text.num_hidden_layers)
    with torch.device("meta"):
        drafter = checkpoint.build(parsed, target.get_input_embeddings().weight, target.get_output_embeddings())
    for name, parameter in drafter.named_parameters():
        parameter.requires_grad_(not checkpoint.is_borrowed(name, parsed))
    return drafter, parsed


def activations_of(config: TrainConfig, parsed: DrafterConfig, width: int) -> int:
    """Roughly what one micro-batch keeps: the target's states at the taps, and per draft layer 6·D + 3·I a slot."""
    backbone = parsed.backbone
    tokens = config.micro_batch * config.length
    places = config.length if config.drafter.every_position else min(config.anchors, config.length)
    rows = config.micro_batch * places * parsed.block_size
    states = tokens * (len(parsed.taps) + 1) * backbone.hidden_size
    kept = 6 * backbone.hidden_size + 3 * backbone.intermediate_size
    return width * (states + rows * backbone.num_hidden_layers * kept)


def sequences_of(config: TrainConfig, samples: int) -> tuple[int, str]:
    """How many sequences an epoch has, and how that is known."""
    if Path(config.train).exists():
        return len(Documents(config.train, config.length, config.row_tokens)), config.train
    return samples, f"{samples} samples, {config.train} is not there yet"


def rehearse(config: TrainConfig) -> tuple[float, float]:
    """Run two steps, an evaluation, a checkpoint and an export of the recipe on a tiny model; the two losses."""
    text, _ = text_config(config.target)
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory(prefix="dspark-dry-run-") as directory:
        root = Path(directory)
        AutoModelForCausalLM.from_config(shrunk(text, vocabulary=VOCABULARY)).save_pretrained(root / "target")
        token_NS = torch.randint(1, VOCABULARY - 1, (4, LENGTH)).tolist()
        write_documents(root / "data", ((row, [1] * LENGTH) for row in token_NS), vocabulary=VOCABULARY)
        tiny = small(config, root)
        with redirect_stdout(io.StringIO()):
            Trainer(tiny, root / "run").run()
        checkpoint.load(root / "run" / "export")
        lines = [json.loads(line) for line in (root / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if not line.get("evaluation")]
    return losses[0], losses[-1]


def small(config: TrainConfig, root: Path) -> TrainConfig:
    """The recipe at the size of the rehearsal: the same drafter, losses and schedule."""
    shape = config.drafter
    if shape.block_size + 1 > LENGTH:
        raise UserError(f"block_size {shape.block_size} is too long for a rehearsal of {LENGTH} tokens; shorten it")
    changes: dict[str, Any] = {name: str(root / "data") for name in ("train", "held_out")}
    changes |= {"target": str(root / "target"), "init": "", "length": LENGTH, "anchors": 4, "threads": 1}
    changes |= {"steps": 2, "epochs": 0.0, "batch": 4, "micro_batch": 2, "tensor_parallel": 1, "device": "cpu"}
    changes |= {"log_every": 1, "save_every": 2, "evaluate_every": 2, "evaluate_sequences": 2, "patience": 0}
    changes |= {"export_frozen": True, "tensorboard": False, "wandb": ""}
    pruned = min(shape.draft_vocabulary, VOCABULARY // 2)
    changes["drafter"] = replace(shape, mask_token_id=-1, intermediate_size=0, draft_vocabulary=pruned)
    changes["features"] = replace(config.features, directory="")  # the user's own cache stays out of it
    return replace(config, **changes)
