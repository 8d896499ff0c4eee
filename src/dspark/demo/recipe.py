"""How the demo target is made: the fields of `recipes/demo_target.yaml`, checked name by name."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dspark.common.errors import UserError
from dspark.demo.corpus import Package


@dataclass(frozen=True)
class Architecture:
    """The Qwen3 configuration; the number of layers belongs to the stages, because it grows."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 2048


@dataclass(frozen=True)
class Stage:
    """Train `layers` layers on rows of `length` tokens; the learning rate moves in a line from `lr[0]` to `lr[1]`.

    Where `layers` is more than before, `grow` says how the new ones begin: see `network.deepened`.
    """

    layers: int
    length: int
    tokens: int
    batch_tokens: int
    lr: tuple[float, float] = (1.0, 1.0)
    warmup_steps: int = 20
    grow: str = "copy"


@dataclass(frozen=True)
class TargetRecipe:
    """Everything that decides the weights, apart from the machine's own Python files."""

    packages: tuple[Package, ...]
    stages: tuple[Stage, ...]
    architecture: Architecture = Architecture()
    seed: int = 1
    held_out: float = 0.02
    micro_tokens: int = 4096
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    weight_decay: float = 0.05
    threads: int = 2
    compile: bool = False
    report_minutes: float = 3.0
    eval_tokens: int = 65_536


def build(kind: type, raw: Any, where: str) -> Any:
    """A dataclass from a mapping; an unknown or missing key is an error that names the nearest valid one."""
    if not isinstance(raw, dict):
        raise UserError(f"{where} is {raw!r}; it must be a mapping with {', '.join(_names(kind))}")
    for key in raw:
        if key not in _names(kind):
            near = difflib.get_close_matches(str(key), _names(kind), n=1, cutoff=0.0)[0]
            raise UserError(f"{where} has an unknown key {key!r}; did you mean {near!r}?")
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    for name in required:
        if name not in raw:
            raise UserError(f"{where} lacks {name!r}; add it")
    return kind(**raw)


def load_recipe(path: Path) -> TargetRecipe:
    """Read and check a recipe."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path} is not a mapping; it needs {', '.join(_names(TargetRecipe))}")
    raw["packages"] = tuple(
        build(Package, {"name": p} if isinstance(p, str) else p, f"packages[{i}]")
        for i, p in enumerate(raw.get("packages") or [])
    )
    stages = [build(Stage, s, f"stages[{i}]") for i, s in enumerate(raw.get("stages") or [])]
    raw["stages"] = tuple(dataclasses.replace(s, lr=tuple(s.lr)) for s in stages)
    if "architecture" in raw:
        raw["architecture"] = build(Architecture, raw["architecture"], "architecture")
    recipe = build(TargetRecipe, raw, str(path))
    _check(recipe)
    return recipe


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _check(recipe: TargetRecipe) -> None:
    if not recipe.packages or not recipe.stages:
        raise UserError("a recipe needs at least one package and one stage")
    depth = 0
    for i, stage in enumerate(recipe.stages):
        if stage.grow not in ("copy", "identity"):
            raise UserError(f"stages[{i}].grow {stage.grow!r} is not known; use copy or identity")
        if depth and stage.grow == "copy" and stage.layers % depth:
            raise UserError(
                f"stages[{i}].layers {stage.layers} is no multiple of the {depth} layers before it; use grow: identity"
            )
        if stage.layers < depth:
            raise UserError(f"stages[{i}].layers {stage.layers} is less than the {depth} before it; depth only grows")
        if stage.length > recipe.architecture.max_position_embeddings:
            limit = recipe.architecture.max_position_embeddings
            raise UserError(f"stages[{i}].length {stage.length} exceeds max_position_embeddings {limit}; shorten it")
        if recipe.micro_tokens % stage.length or stage.batch_tokens % recipe.micro_tokens:
            raise UserError(
                f"stages[{i}]: length {stage.length} must divide micro_tokens {recipe.micro_tokens}, "
                f"which must divide batch_tokens {stage.batch_tokens}"
            )
        depth = stage.layers
