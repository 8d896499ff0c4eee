"""A byte-level tokenizer of 61 tokens whose emoji and accents take several of them."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ.,:()012345678_" + "é😀€"


@functools.cache
def byte_tokenizer():
    """Token ids 0.. are the distinct bytes of TEXT in order of appearance."""
    table = dict(zip(range(256), _byte_characters(), strict=True))
    seen = list(dict.fromkeys(TEXT.encode()))
    vocabulary = {table[byte]: i for i, byte in enumerate(seen)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def _byte_characters():
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(extra)) for byte in range(256)]
