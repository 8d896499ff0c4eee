"""What decides a training run: the fields of a recipe's YAML, checked name by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from dspark.common.errors import UserError
from dspark.training.features.modes import FeatureConfig
from dspark.training.objectives import Weights
from dspark.training.shape import DEFAULT_LOSS, DrafterShape


@dataclass(frozen=True)
class TrainConfig:
    """A run. Paths are relative to where the command is run."""

    target: str
    train: str  # a directory in the format of dspark.training.data
    held_out: str
    drafter: DrafterShape = field(default_factory=DrafterShape)
    init: str = ""  # a drafter's directory to start from, of the same shape
    start: str = "target"  # without init: the target's own layers, or random ones
    steps: int = 1000
    epochs: float = 0.0  # above 0: as many steps as these passes over the data take
    batch: int = 16  # rows in a step, over all ranks
    micro_batch: int = 4  # rows in one forward; on the CPU each of `threads` workers runs one at a time
    length: int = 512  # tokens in a sequence, at most
    row_tokens: int = 0  # above 0: whole sequences are packed into rows of up to so many tokens
    anchors: int = 64  # blocks in a sequence, where the drafter does not draft from every position
    optimizer: str = "adamw"  # or muon
    lr: float = 6e-4
    muon_lr: float = 0.02  # of matrices, with optimizer: muon
    weight_decay: float = 0.0
    warmup: float = 0.04  # share of the steps
    clip: float = 1.0
    ema: float = 0.0  # above 0: what is evaluated and exported is the weights' moving average of this decay
    loss: Weights = field(default_factory=Weights)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    precision: str = "float32"  # or bfloat16: autocast over float32 weights
    device: str = "auto"
    threads: int = 2
    seed: int = 42
    log_every: int = 10
    save_every: int = 100
    evaluate_every: int = 100
    evaluate_sequences: int = 64
    patience: int = 0  # above 0: stop after this many evaluations in a row without a better τ
    keep: int = 2  # checkpoints kept, newest first
    shard_drafter: bool = False  # FSDP2: every rank keeps its part of the drafter, its gradients and its optimizer
    shard_target: bool = False  # FSDP2 over the target's layers
    tensor_parallel: int = 1  # ranks that split each target layer by transformers' tp_plan
    tensorboard: bool = False
    wandb: str = ""  # a project's name: log there too
    export_dtype: str = "bfloat16"
    export_frozen: bool = True  # write the target's embedding and LM head beside the drafter's weights

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema is {self.ema}; give a decay from 0 (none) to below 1, such as 0.999")
        if self.epochs < 0 or self.patience < 0:
            name = "epochs" if self.epochs < 0 else "patience"
            raise UserError(f"{name} is {getattr(self, name)}; give 0 (none) or more")
        if self.shard_target and self.tensor_parallel > 1:
            raise UserError(f"shard_target and tensor_parallel {self.tensor_parallel} both split the target; use one")
        if self.features.mode != "online" and (self.shard_target or self.tensor_parallel > 1):
            raise UserError(
                f"features: mode {self.features.mode} needs the whole target on every rank; "
                "drop shard_target and tensor_parallel, or use mode online"
            )
        if self.batch % self.micro_batch:
            raise UserError(f"batch {self.batch} is no multiple of micro_batch {self.micro_batch}; make it one")
        if self.save_every % self.log_every:
            raise UserError(f"save_every {self.save_every} is no multiple of log_every {self.log_every}; make it one")
        if self.length < self.drafter.block_size + 1:
            raise UserError(f"length {self.length} has no room for a block of {self.drafter.block_size}; lengthen it")
        if self.row_tokens and self.row_tokens < self.length:
            raise UserError(f"row_tokens {self.row_tokens} is less than length {self.length}; give 0 or no less")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} {getattr(self, name)!r} is not known; use {' or '.join(choices)}")


POSITIVE = (
    *("steps", "batch", "micro_batch", "length", "anchors", "threads", "log_every", "save_every", "evaluate_every"),
    *("evaluate_sequences", "keep", "tensor_parallel"),
)
CHOICES = {"optimizer": ("adamw", "muon"), "precision": ("float32", "bfloat16"), "start": ("target", "random")}
SECTIONS: dict[str, type] = {"drafter": DrafterShape, "loss": Weights, "features": FeatureConfig}
CAN_CHANGE = (
    *("target", "train", "held_out", "device", "threads", "micro_batch", "shard_drafter", "shard_target"),
    *("tensor_parallel", "log_every", "save_every", "evaluate_every", "patience", "keep", "tensorboard", "wandb"),
)
"""Fields a resumed run may give differently: they do not change what is learnt (paths may have moved)."""
INSTEAD = {"steps": "epochs", "epochs": "steps"}
"""A recipe that says the one no longer means what its base says of the other."""


def build(kind: type, raw: Any, where: str) -> Any:
    """A config from a mapping. Raises UserError for an unknown key, naming the nearest valid one."""
    known = {f.name: f for f in fields(kind)}
    if not isinstance(raw, dict):
        raise UserError(f"{where} is {raw!r}; give a mapping with {', '.join(known)}")
    values = {}
    raw = raw | {"loss": published_loss(raw)} if kind is TrainConfig else raw
    for key, value in raw.items():
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise UserError(f"{where}: unknown key {key!r}; did you mean {near!r}?")
        values[key] = (
            build(SECTIONS[key], value, f"{where}: {key}") if key in SECTIONS else typed(known[key], value, where)
        )
    missing = [
        f.name for f in known.values() if f.default is f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise UserError(f"{where} lacks {missing[0]!r}; add it")
    made = kind(**values)
    if isinstance(made, DrafterShape):
        made.check_fields(values)
    return made


def published_loss(raw: dict[str, Any]) -> Any:
    """A recipe's `loss` section laid over the loss its kind of drafter was published with."""
    drafter, given = raw.get("drafter", {}), raw.get("loss", {})
    kind = drafter.get("kind", "dspark") if isinstance(drafter, dict) else "dspark"
    default = DEFAULT_LOSS.get(kind) if isinstance(kind, str) else None
    return dataclasses.asdict(default) | given if default is not None and isinstance(given, dict) else given


def typed(field_: dataclasses.Field[Any], value: Any, where: str) -> Any:
    """The value as the field's type. Raises UserError where it is another."""
    kind = str(field_.type)
    if kind.startswith("tuple") and isinstance(value, list) and all(type(v) is int for v in value):
        return tuple(value)
    if kind == "float" and type(value) in (int, float):
        return float(value)
    accepted = {"int": int, "str": str, "bool": bool}.get(kind)
    if accepted is None or type(value) is not accepted:
        raise UserError(f"{where}: {field_.name} is {value!r}; give a {kind} (write 1.0e-3, not 1e-3)")
    return value


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's mapping, laid over those it names in `base` (one path or several, later ones over earlier)."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is {raw!r}; give a mapping with {', '.join(f.name for f in fields(TrainConfig))}")
    bases = raw.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = overlaid(merged, read_recipe(path.parent / base))
    return overlaid(merged, raw)


def overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`; sections are merged key by key."""
    result = {name: value for name, value in below.items() if INSTEAD.get(name) not in above}
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = overlaid(result[name], value) if both else value
    return result


def load_config(path: str | Path, **overrides: Any) -> TrainConfig:
    """Read a recipe; `overrides` that are not None replace its fields. Raises UserError for a bad one."""
    given = {name: value for name, value in overrides.items() if value is not None}
    return build(TrainConfig, overlaid(read_recipe(Path(path)), given), str(path))


def check_resumable(config: TrainConfig, saved: dict[str, Any]) -> None:
    """Raises UserError where a run was started with another recipe."""
    for name, value in as_plain(config).items():
        if name not in CAN_CHANGE and saved.get(name) != value:
            raise UserError(
                f"the run was started with {name} {saved.get(name)!r}, the recipe now says {value!r}; "
                "restore it, or pass another --out"
            )


def as_plain(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON-like values."""
    plain = dataclasses.asdict(config)
    return plain | {"drafter": config.drafter.as_plain()}
