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
OWN_FIELDS = {
    "dspark": BLOCK_FIELDS,
    "dflash": BLOCK_FIELDS,
    "eagle3": ("target_layer_ids", "ttt_length"),
    "mtp": ("target_layer_ids", "num_nextn_predict_layers"),
    "medusa": ("target_layer_ids", "medusa_num_heads", "medusa_num_layers", "medusa_own_heads"),
    "layer_skip": ("target_layer_ids", "block_size"),
}
LENGTH_FIELD = {"eagle3": "ttt_length", "mtp": "num_nextn_predict_layers", "medusa": "medusa_num_heads"}
ONE_TAP = ("mtp", "medusa", "layer_skip")
OPTIONAL_FIELDS = (
    "confidence_head_with_markov",
    "markov_head_type",
    "sample_from_anchor",
    "draft_vocab_size",
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

    kind: str  # one of OWN_FIELDS
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
    draft_vocab_size: int | None = None  # Eagle-3: the drafter's own head covers so many of the target's tokens
    medusa_layers: int = 1
    medusa_own_heads: bool = False
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def confidence_rank(self) -> int:
        """How much of W1[x_{k-1}] the confidence head sees: all of it or nothing."""
        return self.markov_rank if self.confidence_head_with_markov in (None, True) else 0


def kind_of(raw: Mapping[str, Any]) -> str | None:
    """The kind of drafter by `architectures`; None for a config that is no drafter's of ours.

    DeepSpec's DFlash carries DSpark's architecture string and neither head.
    """
    names = " ".join(raw.get("architectures") or ())
    for part, kind in (("Eagle3", "eagle3"), ("MTPModel", "mtp"), ("Medusa", "medusa"), ("LayerSkip", "layer_skip")):
        if part in names:
            return kind
    if "DSpark" not in names and "DFlash" not in names:
        return None
    return "dspark" if raw.get("markov_rank") or raw.get("enable_confidence_head") else "dflash"


def architecture(model_type: str, name: str) -> str:
    """DeepSpec's string for a drafter of one family: name is DSpark, which DFlash shares, or Eagle3, and so on."""
    return f"{'Gemma4' if model_type.startswith('gemma4') else 'Qwen3'}{name}Model"


def parse(raw: Mapping[str, Any], origin: str) -> DrafterConfig:
    """Check and read a drafter's config. Raises UserError naming the field, its value and the way out."""
    kind = kind_of(raw)
    if kind is None:
        known = ", ".join(f"Qwen3{name}Model" for name in ("DSpark", "Eagle3", "MTP", "Medusa", "LayerSkip"))
        raise UserError(f"{origin}: architectures {raw.get('architectures')!r} is no drafter; known are {known}")
    activation = "hidden_activation" if "hidden_activation" in raw else "hidden_act"
    check_fields(raw, (*SHAPE_FIELDS, activation, *OWN_FIELDS[kind]), origin)
    if raw["model_type"] not in FAMILIES and kind not in ("medusa", "layer_skip"):  # these two have no block
        raise UserError(
            f"{origin}: model_type {raw['model_type']!r} has no drafter block here; known are {', '.join(FAMILIES)}"
        )
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        positive(raw, name, origin)
    taps = raw["target_layer_ids"]
    if not isinstance(taps, list) or not taps or not all(type(tap) is int and tap >= -1 for tap in taps):
        raise UserError(f"{origin}: target_layer_ids is {taps!r}; give a list of layer numbers, -1 or more")
    if kind in ONE_TAP and len(taps) != 1:
        raise UserError(f"{origin}: target_layer_ids names {len(taps)} layers, a drafter of kind {kind} reads 1")
    own = {"eagle3": eagle3_fields, "mtp": mtp_fields, "medusa": medusa_fields, "layer_skip": layer_skip_fields}
    return DrafterConfig(
        kind=kind,
        backbone=BackboneConfig.of(transformers_config(raw, origin), len(taps)),
        vocab_size=raw["vocab_size"],
        block_size=positive(raw, LENGTH_FIELD.get(kind, "block_size"), origin),
        taps=tuple(taps),
        num_target_layers=raw.get("num_target_layers"),
        raw=dict(raw),
        **own.get(kind, block_fields)(raw, origin),
    )


def block_fields(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """What DSpark and DFlash have of their own."""
    if type(raw["mask_token_id"]) is not int or not 0 <= raw["mask_token_id"] < raw["vocab_size"]:
        raise UserError(
            f"{origin}: mask_token_id {raw['mask_token_id']!r} is outside the vocabulary of {raw['vocab_size']}"
        )
    head, rank = raw.get("markov_head_type", "vanilla"), raw["markov_rank"]
    if head not in MARKOV_HEADS:
        raise UserError(f"{origin}: markov_head_type {head!r} is not known; use one of {', '.join(MARKOV_HEADS)}")
    if type(rank) is not int or rank < 0:
        raise UserError(f"{origin}: markov_rank is {rank!r}; give 0 (no head) or more")
    return {
        "mask_token_id": raw["mask_token_id"],
        "markov_rank": rank,
        "markov_head_type": head,
        "enable_confidence_head": bool(raw["enable_confidence_head"]),
        "confidence_head_with_markov": raw.get("confidence_head_with_markov"),
        "sample_from_anchor": bool(raw.get("sample_from_anchor", True)),
    }


def eagle3_fields(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The draft vocabulary, where the LM head is the drafter's own."""
    vocabulary, drafted = raw["vocab_size"], raw.get("draft_vocab_size")
    if drafted is None:
        return {}
    if positive(raw, "draft_vocab_size", origin) > vocabulary:
        raise UserError(f"{origin}: draft_vocab_size {drafted} exceeds the vocabulary of {vocabulary}; make it smaller")
    return {"draft_vocab_size": drafted}


def mtp_fields(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """One module is one layer."""
    layers, modules = raw["num_hidden_layers"], raw["num_nextn_predict_layers"]
    if layers != modules:
        raise UserError(
            f"{origin}: num_hidden_layers is {layers}, num_nextn_predict_layers {modules}; an MTP module is one layer, "
            "make them agree"
        )
    return {}


def medusa_fields(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The residual blocks of a head, and whose LM head it ends in."""
    return {
        "medusa_layers": positive(raw, "medusa_num_layers", origin),
        "medusa_own_heads": bool(raw["medusa_own_heads"]),
    }


def layer_skip_fields(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The tap is the last of the target's layers that is run."""
    if raw["target_layer_ids"][0] < 0:
        raise UserError(
            f"{origin}: target_layer_ids is {raw['target_layer_ids']}; a layer-skip drafter runs layer 0 at least"
        )
    return {}


def refuse_causal_windows(raw: Mapping[str, Any], origin: str) -> None:
    """Raises UserError for layers with a sliding window, where the format makes those causal inside a block."""
    types = list(raw.get("layer_types") or ())
    if "sliding_attention" in types:
        raise UserError(
            f"{origin}: layer {types.index('sliding_attention')} has a sliding window and is causal inside the block; "
            "a backbone here sees its whole block, use full_attention layers"
        )


def check_fields(raw: Mapping[str, Any], required: tuple[str, ...], origin: str) -> None:
    """Raises UserError for a missing field, naming the misspelt one where there is a likely candidate."""
    known = {*required, *OPTIONAL_FIELDS, *SHAPE_FIELDS, *(name for own in OWN_FIELDS.values() for name in own)}
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
