"""Prompts of both domains come from texts the demo target never saw, and are the same every time."""

import pytest

from dspark.common.errors import UserError
from dspark.demo import domains
from dspark.demo.corpus import held_out_texts
from dspark.demo.pair import demo_target_path
from dspark.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(demo_target_path())


@pytest.fixture(scope="module")
def held_out():
    texts = [text for _, text in held_out_texts(domains.listing(demo_target_path()))]
    return texts or pytest.skip("another Python than the one the demo was made from")


def test_docstrings_are_of_held_out_files(held_out):
    found = domains.docstrings(demo_target_path())
    assert len(found) > 20 and all(len(text) >= domains.SHORTEST for text in found)
    squeezed = ["".join(text.split()) for text in held_out]
    plain = [doc for doc in found if "\\" not in doc]  # escapes read differently in the file
    assert all(any("".join(doc.split()) in text for text in squeezed) for doc in plain[:20])


def test_prose_takes_its_kinds_in_turn(tokenizer, monkeypatch):
    kinds = {"docstrings": "d", "descriptions": "r", "licences": "l"}
    for name, letter in kinds.items():
        texts = [f"{letter} text {i}\n" * 40 for i in range(3)]
        monkeypatch.setattr(domains, name, lambda *_, texts=texts: texts)
    prompts = domains.prose_prompts(tokenizer, demo_target_path(), 7, seed=0)
    starts = [tokenizer.decode(prompt, skip_special_tokens=True)[0] for prompt in prompts]
    assert starts == ["d", "r", "l", "d", "r", "l", "d"]
    assert all(24 <= len(prompt) <= 72 for prompt in prompts)
    assert prompts == domains.prose_prompts(tokenizer, demo_target_path(), 7, seed=0)
    assert prompts != domains.prose_prompts(tokenizer, demo_target_path(), 7, seed=9)


def test_every_licence_once():
    found = domains.licences()
    assert found == domains.licences() and len({"".join(text.split()) for text in found}) == len(found) > 0


def test_no_text_no_prompts(tokenizer):
    with pytest.raises(UserError, match="none of the held-out texts"):
        domains.cut(tokenizer, [], 3, seed=0)
