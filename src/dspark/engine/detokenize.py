"""Text from tokens as they are committed: never half a character, nothing of a stop string, nothing past it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

HALF = "�"  # what a decoder prints for bytes that are not (yet) a character
CONTEXT_TOKENS = 5  # of the prompt: some decoders print a token differently at the start of a text
WINDOW = 16  # tokens decoded again with each commit, about
Decode = Callable[[list[int]], str]


def decoder_of(tokenizer: object, *, skip_special: bool = True) -> Decode:
    """The cheapest faithful decode of a tokenizer, special tokens left out unless `skip_special` is False."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if skip_special and backend is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return backend.decode
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=skip_special)  # type: ignore[attr-defined]


@dataclass
class StopStrings:
    """Finds the first stop string to be completed in a text that arrives in pieces."""

    stops: Sequence[str]
    held: str = ""  # the end of the text so far, as long as it may be the start of a stop string

    def feed(self, piece: str) -> tuple[str, bool]:
        """(text that can be shown, whether a stop string was completed). Pieces may be cut anywhere."""
        text = self.held + piece
        ends = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.held = ""
            return text[: min(ends)[1]], True
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper start of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@dataclass
class Detokenizer:
    """One request's text. The window of tokens decoded again starts at a character's boundary and moves along."""

    decode: Decode
    tokens: list[int]  # starts with the end of the prompt
    stops: Sequence[str] = ()
    _start: int = 0  # of the window
    _boundary: int = 0  # the last place in `tokens` where a character ended
    _shown: int = 0  # characters of the window's text that were given out, or belong to the prompt
    _stop: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens[-CONTEXT_TOKENS:])
        self._boundary = len(self.tokens)
        self._shown = len(self.decode(self.tokens).rstrip(HALF)) if self.tokens else 0
        self._stop = StopStrings(self.stops)

    def feed(self, tokens: Sequence[int]) -> tuple[str, int | None]:
        """(new text, None), or at a stop string (the text before it, how many of `tokens` it took to complete it)."""
        if not self.stops:
            return self._advance(tokens), None
        before = replace(self._stop)
        saved = (self.tokens.copy(), self._start, self._boundary, self._shown)
        text, hit = self._stop.feed(self._advance(tokens))
        if not hit:
            return text, None
        self.tokens, self._start, self._boundary, self._shown = saved
        for count in range(1, len(tokens) + 1):
            _, hit = before.feed(self._advance(tokens[count - 1 : count]))
            if hit:
                return text, count
        raise AssertionError("a stop string seen in a block was not seen token by token")

    def finish(self) -> str:
        """What was held back for a stop string that did not come. Half a character at the very end is dropped."""
        rest, self._stop.held = self._stop.held, ""
        return rest

    def _advance(self, tokens: Sequence[int]) -> str:
        self.tokens.extend(tokens)
        text = self.decode(self.tokens[self._start :])
        whole = text.rstrip(HALF)
        piece = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        if len(whole) == len(text) or len(self.tokens) - self._start > 8 * WINDOW:
            if len(self.tokens) - self._start > WINDOW:
                del self.tokens[: self._boundary]
                self._start = 0
                self._shown = len(self.decode(self.tokens).rstrip(HALF)) if self.tokens else 0
            self._boundary = len(self.tokens)
        return piece
