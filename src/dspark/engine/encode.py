"""Tokens from text, without what the tokenizer's wrapper does around it for every prompt."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Encode = Callable[[str], list[int]]


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """The tokens that `tokenizer(text)` has, special ones included, by its backend alone where that is the same."""

    def wrapped(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    kind = type(tokenizer)
    if kind.__call__ is not PreTrainedTokenizerBase.__call__:
        return wrapped
    if (
        getattr(kind, "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus
        or tokenizer.split_special_tokens
    ):
        return wrapped
    backend = tokenizer.backend_tokenizer

    def direct(text: str) -> list[int]:
        if backend.truncation or backend.padding or backend.encode_special_tokens:  # left from somebody's call
            return wrapped(text)
        ids: list[int] = backend.encode_batch_fast([text])[0].ids  # fast: without offsets
        return ids

    return direct
