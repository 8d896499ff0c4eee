"""Text in pieces: whole characters only, stop strings found wherever the pieces are cut, nothing past them."""

import random

import pytest
from byte_tokenizer import byte_tokenizer

from dspark.engine.detokenize import HALF, Detokenizer, StopStrings, decoder_of

TOKENIZER = byte_tokenizer()
DECODE = decoder_of(TOKENIZER)


def ids(text):
    return TOKENIZER(text)["input_ids"]


def blocks(tokens, rng):
    while tokens:
        count = rng.randrange(1, 6)
        yield tokens[:count]
        tokens = tokens[count:]


def test_an_emoji_comes_whole():
    detokenizer = Detokenizer(DECODE, ids("say "))
    tokens = ids("😀é")
    assert len(tokens) == 6
    assert [detokenizer.feed([token])[0] for token in tokens] == ["", "", "", "😀", "", "é"]


def test_half_a_character_at_the_end_is_never_shown():
    detokenizer = Detokenizer(DECODE, ids("say "))
    assert detokenizer.feed(ids("ok😀")[:-1]) == ("ok", None)
    assert detokenizer.finish() == ""


def test_a_character_begun_by_the_prompt():
    tokens = ids("€")
    detokenizer = Detokenizer(DECODE, tokens[:1])
    assert detokenizer.feed(tokens[1:2])[0] == ""
    assert detokenizer.feed(tokens[2:])[0] == "€"


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_the_tokenizers_own_text(seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(61) for _ in range(90)] if seed % 2 else ids("aé😀€ b" * 12)
    detokenizer = Detokenizer(DECODE, ids("ab"))
    text = ""
    for block in blocks(tokens, rng):
        piece, _ = detokenizer.feed(block)
        text += piece
        assert not piece.endswith(HALF)
    assert text + detokenizer.finish() == TOKENIZER.decode(tokens).rstrip(HALF)


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_at_any_cut(seed):
    """Against the definition: the shortest prefix of the text that contains a stop string, cut where that begins."""
    rng = random.Random(seed)
    text = "".join(rng.choice("abé😀") for _ in range(40))
    stops = ["".join(rng.choice("abé😀") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
    tokens = ids(text)
    wanted, used = None, len(tokens)
    for count in range(len(tokens) + 1):
        so_far = DECODE(tokens[:count]).rstrip(HALF)
        starts = [so_far.index(stop) for stop in stops if stop in so_far]
        if starts:
            wanted, used = so_far[: min(starts)], count
            break
    detokenizer = Detokenizer(DECODE, ids("a"), stops)
    out, fed, cut = "", 0, None
    for block in blocks(tokens, rng):
        piece, cut = detokenizer.feed(block)
        out += piece
        assert wanted is None or wanted.startswith(out)
        if cut is not None:
            break
        fed += len(block)
    if wanted is None:
        assert cut is None and out + detokenizer.finish() == text
    else:
        assert out == wanted and fed + cut == used


def test_a_possible_stop_is_held_back_and_released():
    stop = StopStrings(["\n\ndef"])
    assert stop.feed("x\n") == ("x", False)
    assert stop.feed("\n\nde") == ("\n", False)
    assert stop.feed("g") == ("\n\ndeg", False)
    assert stop.feed("\n\ndefz") == ("", True)
