"""Calls of tools in what a model writes, found as the text arrives, in the formats that chat templates teach."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallFormat:
    """How calls are written, and by which words a template's text gives that away."""

    name: str
    signs: tuple[str, ...]
    opening: str
    closing: str = ""  # nothing: a call ends with the text
    others: tuple[str, ...] = ()  # words of formats that begin alike and are not known here
    most: int | None = None  # calls of one text that are told; what stands behind them is dropped


HERMES = CallFormat("Hermes", ("<tool_call>",), "<tool_call>", "</tool_call>", others=("<function=", "<arg_key>"))
MISTRAL = CallFormat("Mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS]", others=("[ARGS]", "[CALL_ID]"))
LLAMA = CallFormat("Llama 3", ('{"name": function name', "<|python_tag|>"), "{")
FORMATS = (HERMES, MISTRAL, LLAMA)
PYTHON_TAG = "<|python_tag|>"  # Llama's, which may stand before a call
HEAD = re.compile(  # of a call as models write it, up to its arguments
    r'\s*(?P<list>\[\s*)?\{\s*"name"\s*:\s*"(?P<name>[^"\\]*+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)',
    re.DOTALL,
)


@dataclass
class CallPiece:
    """A call the model asks for, or more of its arguments; joined, these are the JSON that the model wrote."""

    index: int  # of the call in its text
    arguments: str
    name: str | None = None  # with a call's first piece, as its id
    id: str | None = None

    def json(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        if self.name is None:
            return {"function": {"arguments": self.arguments}}
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallReader:
    """One text, piece by piece: content is given out at once, a call's name when its arguments begin, then these.

    What begins like a call and is none stays content. A call that is cut off has the arguments that came.
    """

    def __init__(self, kind: CallFormat):
        self.kind, self.most = kind, kind.most
        self.calls = 0  # begun
        self._held = ""
        self._step: Callable[[bool], bool] = self._outside
        self._content, self._pieces = "", list[CallPiece]()  # of this feed
        self._begun = False  # some content was given out
        self._blank = ""  # behind a call: content if some follows, nothing if another call does
        self._scan = Scan()
        self._listed = False  # this call stands in a list

    def feed(self, text: str, *, final: bool) -> tuple[str, list[CallPiece]]:
        """The content and the calls that `text` adds, one piece a call; with `final` nothing is held back."""
        self._held += text
        self._content, self._pieces = "", []
        while self._step(final):
            pass
        self._begun = self._begun or bool(self._content.strip())
        return self._content, self._pieces

    # Each step takes from what is held and says whether there may be another.

    def _outside(self, final: bool) -> bool:
        if self._full:
            self._held = ""
            return False
        self._blank += self._before(final)
        if self._blank.strip() or not self.calls:
            self._content += self._blank
            self._blank = ""
        return self._step != self._outside

    def _opened(self, final: bool) -> bool:
        """A mark is at the front: a call whose arguments begin is on its way; any other is awaited whole."""
        mark = PYTHON_TAG if self.kind.name == LLAMA.name else self.kind.opening
        found = HEAD.match(self._held, self._held.find(mark) + len(mark) if self._held.lstrip().startswith(mark) else 0)
        if found:
            self._listed = found["list"] is not None
            return self._begin(found)
        whole = self._whole(final)
        if whole is None:
            return False
        calls = _calls(whole.strip().removeprefix(mark).removesuffix(self.kind.closing))
        self._content += whole if calls is None else ""
        for name, arguments in calls or ():
            self._call(name, arguments)
        self._step = self._outside
        return True

    def _begin(self, head: re.Match[str]) -> bool:
        self._held = self._held[head.end() :]
        self._call(head["name"], "")
        self._scan, self._step = Scan(self.kind.closing[:1]), self._arguments
        return True

    def _arguments(self, final: bool) -> bool:
        end = self._scan.feed(self._held)
        given, self._held = self._held[:end], self._held[end:]
        if given:
            self._more(given)
        if not self._scan.over:
            return False
        self._scan, self._step = Scan(self.kind.closing[:1], depth=1), self._object
        return True

    def _object(self, final: bool) -> bool:
        """What else is in the call's object is not told."""
        self._held = self._held[self._scan.feed(self._held) :]
        if self._scan.over:
            self._step = self._listing if self._listed else self._closing
        return self._scan.over

    def _listing(self, final: bool) -> bool:
        """Behind a call in a list: the next one, or the list's end."""
        rest = self._held.lstrip()
        if not rest or self._full:
            self._held = ""
            return False
        if rest[0] != ",":
            self._held, self._step = rest.removeprefix("]"), self._closing
            return True
        found = HEAD.match(rest, 1)
        if found:
            self._held = rest
            return self._begin(found)
        scan = Scan()
        end = 1 + scan.feed(rest[1:])
        if not scan.over:
            return False
        self._held = rest[end:]
        for name, arguments in _calls(rest[1:end]) or ():
            self._call(name, arguments)
        return True

    def _closing(self, final: bool) -> bool:
        """The mark behind a call, if it is there; anything else is content again."""
        rest, mark = self._held.lstrip(), self.kind.closing
        if mark.startswith(rest) and rest != mark and not final:
            return False
        self._held = rest[len(mark) :] if mark and rest.startswith(mark) else self._held
        self._step = self._outside
        return True

    @property
    def _full(self) -> bool:
        return self.most is not None and self.calls >= self.most

    def _call(self, name: str, arguments: str) -> None:
        if not self._full:
            self._pieces.append(CallPiece(self.calls, arguments, name, f"call_{secrets.token_hex(12)}"))
            self.calls += 1
            self._blank = ""

    def _more(self, arguments: str) -> None:
        if self._pieces:
            self._pieces[-1].arguments += arguments
        else:
            self._pieces.append(CallPiece(self.calls - 1, arguments))

    def _before(self, final: bool) -> str:
        """Content up to where a call begins, or may."""
        if self.kind.name == LLAMA.name:  # a call is the whole text
            start = self._held.lstrip()
            undecided = not start or PYTHON_TAG.startswith(start)
            if not self._begun and undecided and not final:
                return ""
            if not self._begun and start.startswith(("{", PYTHON_TAG)):
                self._step = self._opened
                return ""
            given, self._held = self._held, ""
            return given
        at = self._held.find(self.kind.opening)
        if at >= 0:
            given, self._held, self._step = self._held[:at], self._held[at:], self._opened
            return given
        keep = 0 if final else _overlap(self._held, self.kind.opening)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def _whole(self, final: bool) -> str | None:
        """The call at the front of what is held, with its marks; None while its end is not there."""
        end = self._held.find(self.kind.closing) if self.kind.closing else -1
        if end < 0 and not final:
            return None
        end = len(self._held) if end < 0 else end + len(self.kind.closing)
        whole, self._held = self._held[:end], self._held[end:]
        return whole


class Scan:
    """Looks for the end of a JSON object or list that arrives in pieces."""

    def __init__(self, broken: str = "", depth: int = 0):
        """It ends as well before the character `broken` outside of a string; `depth` brackets were opened already."""
        self._broken, self._depth = broken, depth
        self._string = self._escaped = False
        self.over = False

    def feed(self, text: str) -> int:
        """How much of `text` belongs to it."""
        for place, character in enumerate(text):
            if self._string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._string = False
            elif character == '"':
                self._string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.over = True
                    return place + 1
            elif character == self._broken:
                self.over = True
                return place
        return len(text)


def _calls(text: str) -> list[tuple[str, str]] | None:
    """The names and arguments that JSON makes, one call or a list of them; None for anything else."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    made = []
    for one in said if isinstance(said, list) else [said]:
        arguments = one.get("arguments", one.get("parameters", {})) if isinstance(one, dict) else None
        if not isinstance(arguments, dict) or not isinstance(one.get("name"), str):
            return None
        made.append((one["name"], json.dumps(arguments, ensure_ascii=False)))
    return made or None


def _overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` that is a proper start of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
