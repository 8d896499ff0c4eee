"""Tokens from the backend are those of the tokenizer, whatever was asked of it before."""

import pytest
from byte_tokenizer import byte_tokenizer
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from dspark.engine.encode import encoder_of

TEXTS = ["", "a", "say 😀é <s>(a, b):", "abc " * 40]


def made(**options):
    backend = byte_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", **options)
    tokenizer.add_tokens([AddedToken("(a", normalized=False)])
    start = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    return tokenizer


@pytest.mark.parametrize("split", [False, True])
def test_the_same_tokens(split):
    tokenizer = made(split_special_tokens=split)
    encode = encoder_of(tokenizer)
    assert [encode(text) for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert encode("a")[0] == tokenizer.bos_token_id


def test_a_call_that_cut_or_padded_leaves_nothing_behind():
    tokenizer = made(pad_token="<s>")
    encode, text = encoder_of(tokenizer), TEXTS[-1]
    whole = encode(text)
    tokenizer(text, truncation=True, max_length=4)
    assert encode(text) == whole
    tokenizer(text, padding="max_length", max_length=500)
    assert encode(text) == whole


def test_a_tokenizer_with_a_way_of_its_own_is_asked():
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **options):
            return {"input_ids": [7]}

    assert encoder_of(Own(tokenizer_object=byte_tokenizer().backend_tokenizer))("abc") == [7]
