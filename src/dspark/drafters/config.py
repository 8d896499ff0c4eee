"""A drafter's config.json in DeepSpec's format: the target's text config, flat, plus the drafter's own fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from dspark.common.errors import UserError
from dspark.drafters.heads import MARKOV_HEADS
from dspark.drafters.layers import FAMILIES, BackboneConfig

SHAPE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
)
BLOCK_FIELDS = ("block_size", "mask_token_id", "target_layer_ids", "markov_rank", "enable_confidence_head")
EAGLE_FIELDS = ("target_layer_ids", "ttt_length")
OPTIONAL_FIELDS = (
    "confidence_head_with_markov",
    "markov_head_type",
    "sample_from_anchor",
    "num_target_layers",
    "num_anchors",
    "head_dim",
    "rope_parameters",
    "attention_bias",
    "layer_types",
    "step_loss_decay",
    "draft_num_hidden_layers",
    "target_model_name_or_path",
)


@dataclass(frozen=True)
class DrafterConfig:
    """What a drafter checkpoint says about itself. `raw` is the file as read, and what is written back."""

    kind: str  # dspark, dflash, eagle3
    backbone: BackboneConfig
    vocab_size: int
    block_size: int
    taps: tuple[int, ...]
    mask_token_id: int = -1
    num_target_layers: int | None = None
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool | None = None  # None: the head's width in the checkpoint tells
    sample_from_anchor: bool = True
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def confidence_rank(self) -> int:
        """How much of W1[x_{k-1}] the confidence head sees: all of it or nothing."""
        return self.markov_rank if self.confidence_head_with_markov in (None, True) else 0


def kind_of(raw: Mapping[str, Any]) -> str | None:
    """dspark, dflash or eagle3 by `architectures`; None for a config that is no drafter's of ours.

    DeepSpec's DFlash carries DSpark's architecture string and neither head.
    """
    names = " ".join(raw.get("architectures") or ())
    if "Eagle3" in names:
        return "eagle3"
    if "DSpark" not in names and "DFlash" not in names:
        return None
    return "dspark" if raw.get("markov_rank") or raw.get("enable_confidence_head") else "dflash"


def parse(raw: Mapping[str, Any], origin: str) -> DrafterConfig:
    """Check and read a drafter's config. Raises UserError naming the field, its value and the way out."""
    kind = kind_of(raw)
    if kind is None:
        known = "Qwen3DSparkModel, Qwen3Eagle3Model"
        raise UserError(f"{origin}: architectures {raw.get('architectures')!r} is no drafter; known are {known}")
    own = EAGLE_FIELDS if kind == "eagle3" else BLOCK_FIELDS
    activation = "hidden_activation" if "hidden_activation" in raw else "hidden_act"
    check_fields(raw, (*SHAPE_FIELDS, activation, *own), origin)
    if raw["model_type"] not in FAMILIES:
        raise UserError(
            f"{origin}: model_type {raw['model_type']!r} has no drafter block here; known are {', '.join(FAMILIES)}"
        )
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        positive(raw, name, origin)
    taps = raw["target_layer_ids"]
    if not isinstance(taps, list) or not taps or not all(type(tap) is int and tap >= -1 for tap in taps):
        raise UserError(f"{origin}: target_layer_ids is {taps!r}; give a list of layer numbers, -1 or more")
    shared = {
        "kind": kind,
        "backbone": BackboneConfig.of(transformers_config(raw, origin), len(taps)),
        "vocab_size": raw["vocab_size"],
        "taps": tuple(taps),
        "num_target_layers": raw.get("num_target_layers"),
        "raw": dict(raw),
    }
    if kind == "eagle3":
        return DrafterConfig(block_size=positive(raw, "ttt_length", origin), **shared)
    if not 0 <= raw["mask_token_id"] < raw["vocab_size"]:
        raise UserError(
            f"{origin}: mask_token_id {raw['mask_token_id']} is outside the vocabulary of {raw['vocab_size']}"
        )
    head, rank = raw.get("markov_head_type", "vanilla"), raw["markov_rank"]
    if head not in MARKOV_HEADS:
        raise UserError(f"{origin}: markov_head_type {head!r} is not known; use one of {', '.join(MARKOV_HEADS)}")
    if type(rank) is not int or rank < 0:
        raise UserError(f"{origin}: markov_rank is {rank!r}; give 0 (no head) or more")
    return DrafterConfig(
        block_size=positive(raw, "block_size", origin),
        mask_token_id=raw["mask_token_id"],
        markov_rank=rank,
        markov_head_type=head,
        enable_confidence_head=bool(raw["enable_confidence_head"]),
        confidence_head_with_markov=raw.get("confidence_head_with_markov"),
        sample_from_anchor=bool(raw.get("sample_from_anchor", True)),
        **shared,
    )


def check_fields(raw: Mapping[str, Any], required: tuple[str, ...], origin: str) -> None:
    """Raises UserError for a missing field, naming the misspelt one where there is a likely candidate."""
    known = {*required, *OPTIONAL_FIELDS, *SHAPE_FIELDS, *BLOCK_FIELDS, *EAGLE_FIELDS}
    strangers = [key for key in raw if key not in known]
    for name in required:
        if name not in raw:
            near = get_close_matches(name, strangers, n=1, cutoff=0.8)
            hint = f"rename {near[0]!r}" if near else "add it, or export the drafter again"
            raise UserError(f"{origin}: field {name!r} is missing; {hint}")
    for name in OPTIONAL_FIELDS:
        near = [] if name in raw else get_close_matches(name, strangers, n=1, cutoff=0.9)
        if near:
            raise UserError(f"{origin}: field {near[0]!r} is not known; did you mean {name!r}?")


def positive(raw: Mapping[str, Any], name: str, origin: str) -> int:
    """The field as a whole number ≥ 1."""
    value = raw[name]
    if type(value) is not int or value < 1:
        raise UserError(f"{origin}: {name} is {value!r}; give a whole number of 1 or more")
    return value


def transformers_config(raw: Mapping[str, Any], origin: str) -> PreTrainedConfig:
    """The flat config as the library's own class, which fills in rope and layer types."""
    fields = {key: value for key, value in raw.items() if key not in ("architectures", "model_type")}
    try:
        return AutoConfig.for_model(raw["model_type"], **fields)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{origin}: {str(error).strip().splitlines()[0]}") from error
    except Exception as error:  # transformers' strict dataclasses raise classes of their own
        raise UserError(f"{origin}: cannot be read ({' '.join(str(error).split())})") from error
