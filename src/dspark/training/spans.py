"""Which tokens of a conversation the target wrote: spans of characters found in the chat template's text, then tokens.

The law: what comes before a supervised span is, character for character, the prompt the target answered, and the span
decodes to the answer. A conversation whose template rewrites earlier turns (dropping their thoughts, as Qwen3's does)
becomes several documents, each turn supervised in the one that shows it as it was asked.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dspark.common.chat import chat_text
from dspark.common.errors import UserError
from dspark.training.samples import Message, Sample

SHOWN = 60  # characters of a text around the place an error is about


@dataclass(frozen=True)
class Page:
    """A text and its supervised spans (first character, end); `plain` text gets the tokenizer's special tokens."""

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool = False
    ended: bool = False  # the target ended it with its end-of-text token, which a plain text does not spell


@dataclass(frozen=True)
class Turn:
    """One answer: the text from the beginning to its end, and where the answer begins."""

    text: str
    start: int
    shown: str  # as far as the template wrote it


class Speller:
    """Spells samples as pages, and pages as (token ids, loss mask), for one tokenizer and its template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, ends: Iterable[int] = (), options: Mapping[str, Any] | None = None
    ) -> None:
        """`ends` are the tokens at which generation stops, `options` go to the template."""
        if not tokenizer.is_fast:
            raise UserError("the tokenizer gives no offsets (it is not a fast one); save it with a tokenizer.json")
        self.tokenizer, self.options = tokenizer, dict(options or {})
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self.ends = {*tokenizer.convert_ids_to_tokens(list(ends)), tokenizer.eos_token} & special
        either = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or r"(?!)"
        self.special = re.compile(either)
        self.tail = re.compile(rf"(?:\s*(?:{either}))*\s*\Z")

    def pages(self, sample: Sample) -> list[Page]:
        """The pages of a sample, none where nothing is supervised. Raises UserError for a template that misleads."""
        if sample.messages is None:
            return self.plain_pages(sample)
        written = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
        turns = [self.turn(sample, i, cut=sample.cut and i == written[-1]) for i in written]
        pages = []
        while turns:
            whole = turns[-1]
            shared = [turn for turn in turns if whole.shown.startswith(turn.text)]
            spans = tuple((turn.start, len(turn.text)) for turn in shared)
            pages.append(Page(whole.text, spans))
            turns = [turn for turn in turns if turn not in shared]
        return pages[::-1]

    def plain_pages(self, sample: Sample) -> list[Page]:
        """Raw text: all of it supervised, or what the target wrote after it."""
        text = sample.text or ""
        if sample.completion is None:
            return [Page(text, ((0, len(text)),), plain=True)]
        whole = text + sample.completion
        return [Page(whole, ((len(text), len(whole)),), plain=True, ended=sample.endings == ["stop"])]

    def turn(self, sample: Sample, index: int, *, cut: bool) -> Turn:
        """The answer at message `index`: what the template writes past the prompt, up to the token that ends a turn."""
        assert sample.messages is not None
        prompt = self.render(sample, sample.messages[:index], add_generation_prompt=True)
        shown = self.render(sample, sample.messages[: index + 1], add_generation_prompt=False)
        if not shown.startswith(prompt):
            place = next((i for i, (a, b) in enumerate(zip(shown, prompt, strict=False)) if a != b), len(shown))
            raise UserError(
                f"the chat template cannot be spanned: it shows turn {index + 1} after {near(shown, place)}, but asks "
                f"for it after {near(prompt, place)}; pass --template with the options the answers were written under"
            )
        tail = self.tail.search(shown, len(prompt))
        assert tail is not None, "the pattern matches the empty end"
        ends = list(self.special.finditer(shown, tail.start()))
        last = next((match for match in ends if match[0] in self.ends), ends[0] if ends else None)
        end = tail.start() if last is None else last.start() if cut else last.end()
        return Turn(shown[:end], len(prompt), shown)

    def render(self, sample: Sample, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The template's text."""
        options = {**self.options, **({"tools": sample.tools} if sample.tools else {})}
        return chat_text(self.tokenizer, messages, add_generation_prompt=add_generation_prompt, **options)

    def documents(self, pages: Sequence[Page]) -> list[tuple[list[int], list[int]]]:
        """(token ids, loss mask) of every page. Raises UserError where a span does not decode to its text."""
        documents: list[Any] = [None] * len(pages)
        for plain in (False, True):
            chosen = [number for number, page in enumerate(pages) if page.plain == plain]
            if chosen:
                texts = [pages[number].text for number in chosen]
                found = self.tokenizer(
                    texts, add_special_tokens=plain, return_offsets_mapping=True, return_attention_mask=False
                )
                for number, ids, offsets in zip(chosen, found["input_ids"], found["offset_mapping"], strict=True):
                    documents[number] = self.document(pages[number], ids, np.asarray(offsets).reshape(-1, 2))
        return documents

    def document(self, page: Page, ids: list[int], offset_T2: np.ndarray[Any, Any]) -> tuple[list[int], list[int]]:
        """Token ids and mask of a page, every span checked by decoding it."""
        mask_T = np.zeros(len(ids), dtype=np.uint8)
        for span in page.spans:
            inside_T = self.inside(page.text, span, ids, offset_T2)
            mask_T |= inside_T
        if page.ended and self.tokenizer.eos_token_id is not None:
            eos = self.tokenizer.eos_token_id
            ids = ids if ids and ids[-1] == eos else [*ids, eos]
            mask_T = np.append(mask_T, np.uint8(1))[: len(ids)]
            mask_T[-1] = 1
        return ids, mask_T.tolist()

    def inside(
        self, text: str, span: tuple[int, int], ids: list[int], offset_T2: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """The tokens inside a span, bool [T]. A token that an edge of the span splits is not the target's own.

        Raises UserError where they do not decode to the span's text, less what such tokens cover.
        """
        start, end = span
        first_T, end_T = offset_T2[:, 0], offset_T2[:, 1]
        inside_T = (first_T >= start) & (end_T <= end) & (end_T > first_T)
        low = int(end_T[(first_T < start) & (end_T > start)].max(initial=start))
        high = max(low, int(first_T[(first_T < end) & (end_T > end)].min(initial=end)))
        own = [token for token, within in zip(ids, inside_T, strict=True) if within]
        said = self.tokenizer.decode(own, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if plainly(said) != plainly(text[low:high]):
            raise UserError(
                f"the tokens of an answer decode to {said!r:.{SHOWN}}, its text is {text[low:high]!r:.{SHOWN}}; "
                "this tokenizer's offsets cannot be trusted, use the tokenizer that came with the model"
            )
        return inside_T


def plainly(text: str) -> str:
    """Text without what tokenizers normalise: Unicode forms and the blanks around it."""
    return unicodedata.normalize("NFKC", text).strip()


def near(text: str, place: int) -> str:
    """The text around a place, as an error shows it."""
    return repr(text[max(0, place - SHOWN) : place + SHOWN // 2])
