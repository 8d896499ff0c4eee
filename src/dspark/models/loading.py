"""Loads a Hugging Face causal LM and its tokenizer from a directory or hub id, or says in one line why it cannot."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dspark.common.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not one torch knows; pass auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device {name!r} asked for, but torch {torch.__version__} sees no CUDA device; pass --device cpu"
        )
    return device


def resolve_dtype(name: str, config: PreTrainedConfig) -> torch.dtype:
    """`auto` is the dtype the checkpoint was saved in."""
    if name == "auto":
        return getattr(config, "dtype", None) or torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not known; pass one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_config(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The text config of a model directory or hub id."""
    if Path(source).exists() and not Path(source, "config.json").is_file():
        raise UserError(f"{source} has no config.json; pass a model directory saved with save_pretrained")
    if not Path(source).exists() and (str(source).count("/") > 1 or str(source).startswith((".", "/", "~"))):
        raise UserError(f"{source} is no directory; pass a model's directory or a hub id owner/name")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the config of {source}: {_first_line(error)}") from error
    refuse_misspelt_fields(source, config)
    return config.get_text_config()


def refuse_misspelt_fields(source: str | Path, config: PreTrainedConfig) -> None:
    """Raises UserError for a field that is nearly, but not, one the config's class has and the file lacks.

    `transformers` would keep the stranger and take the default of the field that was meant.
    """
    path = Path(source, "config.json")
    if not path.is_file():
        return
    given = json.loads(path.read_text(encoding="utf-8"))
    known = set(type(config)().to_dict())
    for name in given:
        near = [] if name in known else get_close_matches(name, known - set(given), n=1, cutoff=0.9)
        if near:
            raise UserError(f"{path}: field {name!r} is not known; rename it to {near[0]!r}")


def load_causal_lm(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A frozen causal LM in eval mode. Raises UserError for a missing, truncated or ill-fitting checkpoint."""
    config = load_config(source, trust_remote_code=trust_remote_code)
    place, number = resolve_device(device), resolve_dtype(dtype, config)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=number,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the shapes
        )
    except SafetensorError as error:
        raise UserError(f"the weights of {source} are truncated or corrupted ({error}); copy them again") from error
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"cannot load the weights of {source}: {_first_line(error)}") from error
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"{source} has {name} of shape {list(found)} where its config.json asks for {list(wanted)}; "
            "correct the config or copy the weights again"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} tensors, the first is {missing[0]}; the checkpoint is incomplete"
        )
    return model.to(place).eval().requires_grad_(False)


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside a model."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the tokenizer of {source}: {_first_line(error)}") from error


def load_generation_config(source: str | Path) -> GenerationConfig | None:
    """What the model's makers say about generating, None where they say nothing."""
    try:
        return GenerationConfig.from_pretrained(source)
    except (OSError, ValueError):
        return None


def eos_token_ids(*holders: object) -> list[int]:
    """What ends a text, from the first that says it: generation config, config, tokenizer, in `generate`'s order."""
    for holder in holders:
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            return list(found) if isinstance(found, list | tuple) else [found]
    return []


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
