"""Reads drafter directories of any known format, and writes them in DeepSpec's (`config.json`, `model.safetensors`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dspark.common.errors import UserError
from dspark.common.files import replacing_directory
from dspark.drafters import formats
from dspark.drafters.backbone import Backbone
from dspark.drafters.body import Body
from dspark.drafters.config import DrafterConfig, parse
from dspark.drafters.dflash import DFlash
from dspark.drafters.dspark import DSpark
from dspark.drafters.eagle3 import Eagle3
from dspark.drafters.heads import MARKOV_HEADS, ConfidenceHead
from dspark.drafters.layer_skip import ExitHead
from dspark.drafters.layers import RotaryEmbedding
from dspark.drafters.medusa import Medusa
from dspark.drafters.mtp import MTP
from dspark.drafters.pruned import whole_vocabulary
from dspark.drafters.student import Student
from dspark.drafters.vocab import TargetParts, check_fit

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
PREFIXES = ("body.backbone.", "body.")  # our joined parts; the file's names are flat
DrafterModule = DSpark | DFlash | Eagle3 | MTP | Medusa | ExitHead
TrainableModule = DrafterModule | Student


def borrowed(config: DrafterConfig) -> tuple[str, ...]:
    """The file's names of the target's own tensors in a drafter: shared with the target, and frozen."""
    if config.kind == "draft_model":
        return ()
    if config.kind == "medusa":
        return () if config.medusa_own_heads else (HEAD,)
    if config.kind == "layer_skip":
        return (HEAD,)
    return (EMBEDDING,) if config.draft_vocab_size else (EMBEDDING, HEAD)


def is_borrowed(name: str, config: DrafterConfig) -> bool:
    """Whether a parameter or buffer of a drafter is the target's; a head packed for a kernel has other names."""
    return flat_name(name).startswith(tuple(owned.removesuffix("weight") for owned in borrowed(config)))


def flat_name(name: str) -> str:
    """A parameter's name in the file."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def flat_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a drafter's state under the file's names."""
    return {flat_name(name): tensor for name, tensor in state.items()}


def head_of(head_VD: Tensor) -> nn.Linear:
    """A frozen LM head around a weight that is shared, not copied."""
    with torch.device("meta"):
        head = nn.Linear(head_VD.shape[1], head_VD.shape[0], bias=False)
    head.weight = nn.Parameter(head_VD, requires_grad=False)
    return head


def build(config: DrafterConfig, embedding_VD: Tensor, lm_head: nn.Module, *, markov_top_k: int = 0) -> DrafterModule:
    """An untrained drafter around the target's embedding and LM head, which are shared and frozen."""
    shape, taps, slots = config.backbone, config.taps, config.block_size
    if config.kind == "medusa":
        own = config.vocab_size if config.medusa_own_heads else 0
        return Medusa(shape, lm_head, taps=taps, block_size=slots, layers=config.medusa_layers, own_heads=own)
    if config.kind == "layer_skip":
        return ExitHead(shape, lm_head, taps=taps, block_size=slots)
    embed_tokens = nn.Embedding.from_pretrained(embedding_VD, freeze=True)
    if config.kind == "mtp":
        return MTP(shape, embed_tokens, lm_head, taps=taps)
    if config.kind == "eagle3":
        own = config.draft_vocab_size or 0
        if own:
            lm_head = nn.Linear(shape.hidden_size, own, bias=False)
        return Eagle3(shape, embed_tokens, lm_head, taps=taps, block_size=slots, draft_vocabulary=own)
    body = Body(
        Backbone(shape),
        embed_tokens,
        lm_head,
        mask_token_id=config.mask_token_id,
        sample_from_anchor=config.sample_from_anchor,
    )
    if config.kind == "dflash":
        return DFlash(body, taps=taps, block_size=slots)
    if not config.markov_rank:
        raise UserError("markov_rank is 0 with enable_confidence_head true; give the drafter a Markov head or neither")
    hidden, rank = shape.hidden_size, config.markov_rank
    return DSpark(
        body,
        MARKOV_HEADS[config.markov_head_type](config.vocab_size, rank, hidden),
        ConfidenceHead(hidden, config.confidence_rank) if config.enable_confidence_head else None,
        taps=taps,
        block_size=slots,
        markov_top_k=markov_top_k,
    )


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json in the native format, whatever it is stored in. Raises UserError where it cannot be read."""
    return formats.native(read_json(directory), f"{directory}/config.json")


def read_drafter(directory: str | Path) -> tuple[DrafterConfig, dict[str, Tensor]]:
    """Config and tensors of a drafter's directory, of any format, as the native format has them.

    Raises UserError for a damaged one, and for a drafter that cannot be run as it was meant.
    """
    stored = read_json(directory)
    config = parse(formats.native(stored, f"{directory}/config.json"), f"{directory}/config.json")
    tensors = formats.FORMATS[formats.format_of(stored)].tensors(read_tensors(directory), config)
    if config.kind == "eagle3" and config.draft_vocab_size == config.vocab_size:
        tensors = whole_vocabulary(config.vocab_size) | tensors
    return resolve_confidence(config, tensors), tensors


def read_json(directory: str | Path) -> dict[str, Any]:
    """config.json as it stands. Raises UserError where there is none or it is no JSON object."""
    path = Path(directory, "config.json")
    if not path.is_file():
        raise UserError(f"{directory} has no config.json; pass a directory in DeepSpec's format")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); export the drafter again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a {type(raw).__name__}, not an object; export the drafter again")
    return raw


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards its index names. Raises UserError for a damaged file."""
    index = Path(directory, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors.update(read_file(Path(directory, name)))
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises UserError for a missing or damaged one."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}; the checkpoint is incomplete, copy it again")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or corrupted ({error}); copy it again") from error


def load(
    directory: str | Path,
    target: TargetParts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    markov_top_k: int = 0,
) -> tuple[DrafterModule, DrafterConfig]:
    """The drafter of a directory, in eval mode.

    Beside a target it shares the target's embedding and LM head (and takes its device and dtype); the file's copies
    are only checked for their shape and may be absent. Without one they come from the file.
    """
    config, tensors = read_drafter(directory)
    shared = borrowed(config)
    if target is not None:
        check_fit(config, target, str(directory))
        for name in shared:
            check_shape(name, tensors.pop(name, target.embedding_VD), target.embedding_VD, directory)
        embedding_VD, head = target.embedding_VD, target.head
    else:
        missing = [name for name in shared if name not in tensors]
        if missing:
            raise UserError(f"{directory} has no {missing[0]}; load the drafter beside its target")
        own = {name: tensors.pop(name).to(device=device, dtype=dtype) for name in shared}
        like = next(iter((own or tensors).values()))
        embedding_VD, head = own.get(EMBEDDING, like), head_of(own[HEAD]) if HEAD in own else nn.Identity()
    with torch.device("meta"):
        drafter = build(config, embedding_VD, head, markov_top_k=markov_top_k)
    names = [name for name in drafter.state_dict() if not is_borrowed(name, config)]
    fill(drafter, names, tensors, directory, dtype or embedding_VD.dtype, device or embedding_VD.device)
    return drafter.eval(), config


def fill(
    drafter: nn.Module,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    directory: str | Path,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give every tensor of `names` its value. Raises UserError for a missing, surplus or wrongly shaped one."""
    everything = drafter.state_dict()
    wanted = {name: everything[name] for name in names}
    surplus = sorted(set(tensors) - {flat_name(name) for name in wanted})
    if surplus:
        raise UserError(
            f"{directory} holds {surplus[0]}, which its config.json does not account for; correct the config"
        )
    state = {}
    for name, like in wanted.items():
        if flat_name(name) not in tensors:
            raise UserError(f"{directory} lacks {flat_name(name)} {list(like.shape)}; the checkpoint is incomplete")
        check_shape(flat_name(name), tensors[flat_name(name)], like, directory)
        state[name] = tensors[flat_name(name)].to(dtype=number_type(like, dtype), device=device)
    drafter.load_state_dict(state, strict=False, assign=True)
    for module in drafter.modules():
        if isinstance(module, RotaryEmbedding):
            module.to(device)


def check_shape(name: str, tensor: Tensor, like: Tensor, directory: str | Path) -> None:
    """Raises UserError unless the shapes agree."""
    if tensor.shape != like.shape:
        raise UserError(
            f"{directory} has {name} of shape {list(tensor.shape)} where {list(like.shape)} belongs; "
            "the weights and the config, or the target, do not fit together"
        )


def resolve_confidence(config: DrafterConfig, tensors: Mapping[str, Tensor]) -> DrafterConfig:
    """Where the config leaves `confidence_head_with_markov` out, the head's width tells."""
    weight = tensors.get("confidence_head.proj.weight")
    if config.confidence_head_with_markov is not None or weight is None:
        return config
    sees_markov = weight.shape[-1] != config.backbone.hidden_size
    return DrafterConfig(**{**config.__dict__, "confidence_head_with_markov": sees_markov})


def save(
    drafter: TrainableModule,
    config: DrafterConfig,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    frozen: bool = True,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the drafter whole or not at all. `frozen=False` leaves out the target's embedding and LM head.

    A draft model becomes a directory like any causal LM's.
    `state` stands for the drafter's own, where that is in pieces on several ranks.
    """
    state = {
        name: tensor.detach().to(device="cpu", dtype=number_type(tensor, dtype), copy=True).contiguous()
        for name, tensor in flat_state(drafter.state_dict() if state is None else state).items()
        if frozen or name not in borrowed(config)
    }
    if config.kind == "draft_model":
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        if config.raw["tie_word_embeddings"]:
            state.pop(HEAD)
    numbers = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    raw = {**config.raw, "dtype": str(numbers).removeprefix("torch.")}
    with replacing_directory(directory) as fresh:
        save_file(state, fresh / "model.safetensors", metadata={"format": "pt"})
        (fresh / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        (fresh / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def number_type(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype` for weights; ids and masks keep their own."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
