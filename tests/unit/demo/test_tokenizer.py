"""The tokenizer: exact round trips, fixed special ids, and pieces that end where people stop typing."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dspark.demo.tokenizer import SPECIALS, save_tokenizer, token_bytes, train_tokenizer

TEXT = 'def area(width, height):\n    if width:\n        return width * height\n\n    return "é"\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([TEXT] * 50, vocab_size=280), folder, context=64)
    return AutoTokenizer.from_pretrained(folder)


def test_the_vocabulary_has_the_size_asked_for(tokenizer) -> None:
    assert len(tokenizer) == 280
    assert tokenizer.convert_tokens_to_ids(list(SPECIALS)) == list(range(8))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 0, 1)


@pytest.mark.parametrize("text", [TEXT, "", "  \n\t\n x", "日本語 🙂", "a\r\nb", "\n\n\n    def"])
def test_round_trip(tokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert sum(token_bytes(token) for token in tokenizer.convert_ids_to_tokens(ids)) == len(text.encode())


def test_text_cut_at_a_line_or_an_indentation_is_cut_between_tokens(tokenizer) -> None:
    whole = tokenizer(TEXT)["input_ids"]
    for end in (TEXT.index("    if"), TEXT.index("if"), TEXT.index("        return"), TEXT.index("return")):
        part = tokenizer(TEXT[:end])["input_ids"]
        assert whole[: len(part)] == part
