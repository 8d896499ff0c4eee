"""Grammars by llguidance: compiled for the engine's tokenizer, remembered, and followed token by token."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from dspark.common.errors import UserError
from dspark.common.extras import require
from dspark.common.grammar import Grammar
from dspark.speculation.grammar import Mask, Matcher

REMEMBERED = 256  # compiled grammars
WHITESPACE = r"[ \t\r\n]{1,32}"  # most between two parts of JSON: without a bound a model can idle there for ever
LIMITS = {  # within these one mask takes some 50 ms at the very worst that was found, and a second once
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class Grammars(Protocol):
    """Makes the matchers of an engine's requests."""

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of a text. Raises UserError for a grammar that cannot be compiled."""
        ...


class LibraryGrammars:
    """Any thread may ask; the first to ask makes the tokenizer's trie, a grammar is compiled once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, ends: Iterable[int]):
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, sorted(ends)
        self._trie: Any = None
        self._known: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> LibraryMatcher:
        """See `Grammars`."""
        with self._lock:
            found = self._known.get(grammar)
            if found is not None:
                self._known.move_to_end(grammar)
        if found is None:
            found = self._compile(grammar)
            with self._lock:
                self._known[grammar] = found
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
        return LibraryMatcher(found.deep_copy(), self.vocabulary, self.ends)

    def _compile(self, grammar: Grammar) -> Any:
        """The library's matcher, tried on its first token: some grammars are too complex only then."""
        library = require("llguidance", "structured")
        trie = self._tokens(library)
        try:
            rules = _rules(library, grammar)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the {grammar.kind} is not valid: {_line(error)}") from error
        made = library.LLMatcher(trie, rules, limits=library.LLParserLimits(**LIMITS), log_level=0)
        if not made.is_error():
            trial = LibraryMatcher(made.deep_copy(), self.vocabulary, self.ends)
            trial.advance(int(np.flatnonzero(trial.allowed())[0]))
            if trial.trouble is None:
                return made
            raise UserError(f"the {grammar.kind} is too complex: {trial.trouble}; simplify it")
        raise UserError(f"the {grammar.kind} is not valid: {_line(made.get_error())}")

    def _tokens(self, library: Any) -> Any:
        with self._lock:
            if self._trie is None:
                backend = getattr(self.tokenizer, "backend_tokenizer", None)
                if backend is None:
                    raise UserError("grammars need a tokenizer of the tokenizers library, which this model has not")
                if not self.ends:
                    raise UserError("grammars need a token that ends a text, which this model has not")
                from llguidance.hf import from_tokenizer

                assert self.tokenizer is not None
                self._trie = from_tokenizer(self.tokenizer, n_vocab=self.vocabulary, eos_token=self.ends)
            return self._trie


class LibraryMatcher:
    """llguidance's matcher, with the end of the text kept apart: the library does not roll back every end."""

    def __init__(self, inner: Any, vocabulary: int, ends: list[int]):
        self._inner, self._vocabulary, self._ends = inner, vocabulary, ends
        self._past_end = 0
        self._wrong: str | None = None

    @property
    def trouble(self) -> str | None:
        if self._wrong is None and self._inner.is_error():
            self._wrong = _line(self._inner.get_error())
        return self._wrong

    @property
    def complete(self) -> bool:
        return bool(self._past_end or (self._inner.is_stopped() and self.trouble is None))

    def allowed(self) -> Mask:
        if not self._past_end and self.trouble is None:
            packed = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
            mask = np.unpackbits(packed, count=self._vocabulary, bitorder="little").view(np.bool_)
            if self.trouble is None and mask.any():
                return mask
            self._wrong = self._wrong or "no token can follow"
        mask = np.zeros(self._vocabulary, np.bool_)
        mask[self._ends] = True
        return mask

    def advance(self, token: int) -> None:
        if token in self._ends:
            if not self._past_end and not self._inner.is_accepting():
                self._wrong = self.trouble or "the text ended too early"
            self._past_end += 1
        elif self._past_end or not self._inner.consume_token(token):
            self._wrong = self.trouble or f"token {token} is not allowed"

    def rollback(self, tokens: int) -> None:
        back = min(tokens, self._past_end)
        self._past_end -= back
        if tokens > back and not self._inner.rollback(tokens - back):
            self._wrong = self.trouble or "the library could not go back"


def _rules(library: Any, grammar: Grammar) -> str:
    """The grammar in the library's own notation."""
    if grammar.kind == "json_schema":
        overrides = {"whitespace_pattern": WHITESPACE}
        return str(library.LLMatcher.grammar_from_json_schema(grammar.text, overrides=overrides))
    return str(library.grammar_from(grammar.kind, grammar.text))


def _line(error: object) -> str:
    """What the library says, in one line."""
    return " ".join(str(error).split())[:300] or "no reason given"
