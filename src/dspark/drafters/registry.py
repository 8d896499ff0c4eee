"""Every kind of drafter, and the one function that makes a drafter for a target out of a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from dspark.common.errors import UserError
from dspark.drafters import checkpoint
from dspark.drafters.base import Drafter
from dspark.drafters.config import kind_of
from dspark.drafters.dflash import DFlash
from dspark.drafters.draft_model import DraftModel
from dspark.drafters.dspark import DSpark
from dspark.drafters.eagle3 import Eagle3
from dspark.drafters.layer_skip import ExitHead, LayerSkip
from dspark.drafters.medusa import Medusa
from dspark.drafters.mtp import MTP
from dspark.drafters.ngram import NGram, NoDraft
from dspark.drafters.vocab import TargetParts, check_tokenizers
from dspark.models.loading import load_tokenizer
from dspark.models.target import Target
from dspark.ops.linear import pack_linears

# The head's bias moves tokens from far below in the base logits to the top: on the demo pair (V 4096) the 64 largest
# give τ 2.8 / 1.6 at temperature 0 / 1, 1024 give 3.5 / 2.1, all give 3.7 / 2.3, for 0.3 ms a block. So only
# vocabularies whose W2 costs more than that are restricted.
CANDIDATES, LARGE_VOCABULARY = 1024, 32_768
DRAFTERS = {
    "dspark": DSpark,
    "dflash": DFlash,
    "eagle3": Eagle3,
    "mtp": MTP,
    "medusa": Medusa,
    "layer_skip": LayerSkip,
    "draft_model": DraftModel,
    "ngram": NGram,
    "none": NoDraft,
}


def load_drafter(
    source: str | Path, target: Target, *, block_size: int | None = None, markov_top_k: int | None = None
) -> Drafter:
    """The drafter `source` names: "none", "ngram", a drafter's directory or hub id, or a smaller causal LM's.

    The kind comes from config.json. `block_size` shortens the drafter's own. Raises UserError when the drafter does
    not fit the target. `markov_top_k` None restricts the sequential head to CANDIDATES in a large vocabulary.
    """
    parts = TargetParts.of(target)
    vocabulary = len(parts.embedding_VD)
    if markov_top_k is None:
        markov_top_k = CANDIDATES if vocabulary > LARGE_VOCABULARY else 0
    if str(source) == "none":
        return NoDraft(vocabulary)
    if block_size is not None and block_size < 1:
        raise UserError(f"block_size is {block_size}; pass 1 or more, or the drafter none for plain decoding")
    if markov_top_k < 0:
        raise UserError(f"markov_top_k is {markov_top_k}; pass 0 for no restriction, or more")
    if str(source) == "ngram":
        return NGram(vocabulary, block_size=block_size or 7)
    directory = fetch(source)
    raw = checkpoint.read_config(directory)
    if kind_of(raw) is None:
        return located(load_draft_model(directory, target, parts, block_size or 5), directory)
    drafter, _ = checkpoint.load(directory, parts, markov_top_k=markov_top_k)
    if block_size is not None:
        if block_size > drafter.block_size:
            raise UserError(
                f"block_size {block_size} exceeds the drafter's {drafter.block_size}; "
                f"pass --block-size {drafter.block_size} or less"
            )
        drafter.block_size = block_size
    if isinstance(drafter, ExitHead):
        return located(LayerSkip(target, drafter), directory)
    if isinstance(drafter, DSpark):
        drafter.pack()
    else:
        pack_linears(drafter.body if isinstance(drafter, DFlash) else drafter)
    return located(drafter, directory if block_size is None else None)


def located(drafter: Any, directory: Path | None) -> Any:
    """The drafter, knowing where it came from: its calibration lies there. None where that is not its own any more."""
    drafter.directory = directory
    return drafter


def load_draft_model(directory: Path, target: Target, parts: TargetParts, block_size: int) -> DraftModel:
    """A causal LM as drafter. Its tokenizer must be the target's, where both directories have one."""
    if has_tokenizer(directory) and has_tokenizer(Path(parts.name)):
        check_tokenizers(load_tokenizer(directory), load_tokenizer(parts.name), str(directory))
    dtype = str(target.dtype).removeprefix("torch.")
    model = Target.load(directory, dtype=dtype, device=str(target.device))
    vocabulary = len(parts.embedding_VD)
    if not has_tokenizer(directory) and model.vocab_size != vocabulary:
        raise UserError(
            f"{directory} has a vocabulary of {model.vocab_size}, the target {parts.name} has {vocabulary}; "
            "use a draft model with the target's tokenizer"
        )
    return DraftModel(model, vocabulary, block_size=block_size)


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer was saved beside the model."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def fetch(source: str | Path) -> Path:
    """A directory as it is, or a hub id's snapshot. Raises UserError for what is neither."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise UserError(f"{source} is no directory; pass none, ngram, a drafter's directory or a hub id owner/name")
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot fetch {source} from the hub ({reason}); pass a drafter's directory") from error
