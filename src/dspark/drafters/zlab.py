"""Drafters in the flat format of z-lab's DFlash and of SpecForge: a Qwen3 config with a `dflash_config`.

DFlash reads the mask slots, so its `block_size` is one more than it drafts; SpecForge's DSpark (`projector_type`)
drafts from the anchor. The files hold the body and the heads, never the target's embedding or LM head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.common.errors import UserError
from dspark.drafters.config import DrafterConfig, architecture, refuse_causal_windows, transformers_config

SECTION = "dflash_config"
HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
KNOWN = {*HEADS, "target_layer_ids", "mask_token_id", "block_size", "projector_type", "attention_mode"}
IGNORED = ("confidence_head_alpha",)  # of training
MODEL_TYPES = ("dspark", "dflash")  # SpecForge's names for what is a Qwen3 config
DROPPED = ("architectures", "auto_map", "model_type", SECTION)


def recognised(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this format."""
    return isinstance(raw.get(SECTION), dict)


def native(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The native config. Raises UserError for a variant that this package does not run."""
    section = {name: value for name, value in raw[SECTION].items() if name not in IGNORED}
    for name, value in section.items():
        if name not in KNOWN and value:
            raise UserError(f"{origin}: {SECTION} has {name} {value!r}, which is not supported; train without it")
    projector, attention = section.get("projector_type", "dflash"), section.get("attention_mode", "gqa")
    if projector not in MODEL_TYPES or attention not in ("gqa", "mha"):
        raise UserError(
            f"{origin}: projector_type {projector!r} with attention_mode {attention!r} is not supported; "
            "dflash and dspark with gqa are"
        )
    kind = raw.get("model_type", "qwen3")
    layer = {name: value for name, value in raw.items() if name not in DROPPED}
    flat = transformers_config({**layer, "model_type": "qwen3" if kind in MODEL_TYPES else kind}, origin).to_dict()
    if raw.get("is_causal") is not False:
        refuse_causal_windows(flat, origin)
    anchor = projector == "dspark"
    slots = raw.get("block_size", section.get("block_size"))
    if type(slots) is not int or slots < 2 - anchor:
        raise UserError(f"{origin}: block_size is {slots!r}; give a whole number of {2 - anchor} or more")
    if "target_layer_ids" not in section:
        raise UserError(f"{origin}: {SECTION} has no target_layer_ids; write the layers the drafter was trained on")
    heads = {name: section.get(name, raw.get(name)) for name in HEADS} if anchor else {}
    flat.pop("_name_or_path", None)
    return flat | {
        "architectures": [architecture(flat["model_type"], "DSpark")],
        "tie_word_embeddings": False,
        "block_size": slots if anchor else slots - 1,
        "mask_token_id": section.get("mask_token_id", raw.get("mask_token_id")),
        "target_layer_ids": section["target_layer_ids"],
        "sample_from_anchor": anchor,
        "markov_rank": heads.get("markov_rank") or 0,
        "markov_head_type": heads.get("markov_head_type") or "vanilla",
        "enable_confidence_head": bool(heads.get("enable_confidence_head")),
        "confidence_head_with_markov": bool(heads.get("confidence_head_with_markov")),
    }


def written(config: DrafterConfig) -> dict[str, Any]:
    """config.json in this format. Raises UserError for a drafter whose slots it reads in another way."""
    if config.kind not in MODEL_TYPES:
        raise UserError(f"a drafter of kind {config.kind} has no zlab format; {' and '.join(MODEL_TYPES)} have one")
    anchor = config.kind == "dspark"
    if config.sample_from_anchor != anchor:
        raise UserError(
            f"sample_from_anchor is {config.sample_from_anchor} and zlab reads a {config.kind} drafter as "
            f"{anchor}; use --format speculators"
        )
    own = {*HEADS, "architectures", "block_size", "mask_token_id", "target_layer_ids", "sample_from_anchor"}
    section: dict[str, Any] = {"target_layer_ids": list(config.taps), "mask_token_id": config.mask_token_id}
    if anchor:
        section |= {
            "projector_type": "dspark",
            "markov_rank": config.markov_rank,
            "markov_head_type": config.markov_head_type,
            "enable_confidence_head": config.enable_confidence_head,
            "confidence_head_with_markov": config.enable_confidence_head and config.confidence_rank > 0,
        }
    windows = {"is_causal": False} if any(config.backbone.windows) else {}
    return (
        {name: value for name, value in config.raw.items() if name not in own}
        | windows
        | {
            "architectures": ["DSparkDraftModel" if anchor else "DFlashDraftModel"],
            "block_size": config.block_size + (not anchor),
            SECTION: section,
        }
    )
