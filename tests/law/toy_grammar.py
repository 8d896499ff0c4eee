"""A grammar small enough to enumerate: an automaton over token ids, in the library's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dspark.common.grammar import Grammar

State = str
Table = Mapping[State, Mapping[int, State]]
WORDS: Table = {  # over four tokens, of which 3 ends the text; after "link" the grammar leaves one token
    "start": {0: "link", 1: "word"},
    "link": {2: "start"},
    "word": {0: "word", 2: "start", 3: "end"},
    "end": {3: "end"},
}


class Automaton:
    """A Matcher of a transition table."""

    trouble = None

    def __init__(self, table: Table, output: Sequence[int] = (), vocabulary: int = 4) -> None:
        self.table, self.vocabulary = table, vocabulary
        self.states = ["start"]
        for token in output:
            self.advance(token)

    @property
    def complete(self) -> bool:
        return set(self.table[self.states[-1]].values()) == {"end"}

    def allowed(self):
        mask = np.zeros(self.vocabulary, dtype=bool)
        mask[list(self.table[self.states[-1]])] = True
        return mask

    def advance(self, token: int) -> None:
        self.states.append(self.table[self.states[-1]][token])  # a token that is not allowed is a KeyError

    def rollback(self, tokens: int) -> None:
        assert tokens < len(self.states), "rolled back past the start"
        del self.states[len(self.states) - tokens :]


class Automata:
    """An engine's Grammars: whatever is asked for, the same automaton."""

    def __init__(self, table: Table = WORDS, vocabulary: int = 4) -> None:
        self.table, self.vocabulary, self.made = table, vocabulary, []

    def matcher(self, grammar: Grammar) -> Automaton:
        self.made.append(Automaton(self.table, vocabulary=self.vocabulary))
        return self.made[-1]
