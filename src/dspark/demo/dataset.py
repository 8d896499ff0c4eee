"""The demo's data on disk: made once from this machine's files, then read as rows of tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dspark.common.files import replacing_file
from dspark.demo import corpus
from dspark.demo.recipe import TargetRecipe
from dspark.demo.tokenizer import save_tokenizer, token_bytes, train_tokenizer


@dataclass(frozen=True)
class Data:
    """Token streams of the two splits, and how many bytes of text each token id stands for."""

    train: np.ndarray
    held_out: np.ndarray
    bytes_of: Tensor


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
    symbols = {index: symbol for symbol, index in tokenizer.get_vocab().items()}
    sizes = np.array([token_bytes(symbols[i]) for i in range(len(symbols))], dtype=np.int64)
    np.save(out / "token_bytes.npy", sizes)
    listing = corpus.manifest(files)
    (out / "held_out.json").write_text(json.dumps(listing["held_out"], indent=1) + "\n", encoding="utf-8")
    with replacing_file(out / "manifest.json") as partial:
        partial.write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")


def load_data(out: Path) -> Data:
    """What `prepare` wrote."""
    sizes = torch.from_numpy(np.load(out / "token_bytes.npy"))
    return Data(np.load(out / "train.npy", mmap_mode="r"), np.load(out / "held_out.npy"), sizes)


def rows(stream: np.ndarray, position: int, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, `count` rows of `length` tokens from `position` on; the stream's end joins its start."""
    index = np.arange(position, position + count * length + 1) % len(stream)
    ids = torch.from_numpy(stream[index].astype(np.int64))
    return ids[:-1].view(count, length), ids[1:].view(count, length)
