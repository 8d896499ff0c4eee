"""Calls of tools in what a model writes, found as the text arrives, in the formats that chat templates teach."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class ToolCall:
    """A call the model asks for; `arguments` is JSON."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def json(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallReader:
    """One text, piece by piece: what is content is given out at once, a call when it is whole.

    What begins like a call and is none stays content.
    """

    def __init__(self, kind: CallFormat):
        self.kind, self.most = kind, kind.most
        self.calls = 0
        self._held = ""
        self._inside = False
        self._begun = False  # some content was given out

    def feed(self, text: str, *, final: bool) -> tuple[str, list[ToolCall]]:
        """The content and the calls that `text` adds; with `final` nothing is held back."""
        self._held += text
        content, calls = "", []
        while True:
            if self.most is not None and self.calls >= self.most:
                self._held = ""
                break
            if not self._inside:
                more = self._outside(final)
                content += more if more.strip() or not self.calls else ""  # no line breaks between calls
            if not self._inside:
                break
            whole = self._whole(final)
            if whole is None:
                break
            found = _calls(self._bare(whole))
            if found is None:
                content += whole
            else:
                calls += found if self.most is None else found[: self.most - self.calls]
                self.calls += len(found)
            self._inside = False
        self._begun = self._begun or bool(content.strip())
        return content, calls

    def _outside(self, final: bool) -> str:
        """Content up to where a call begins, or may."""
        if self.kind.name == LLAMA.name:  # a call is the whole text
            start = self._held.lstrip()
            undecided = not start or PYTHON_TAG.startswith(start)
            if not self._begun and undecided and not final:
                return ""
            if not self._begun and start.startswith(("{", PYTHON_TAG)):
                self._inside = True
                return ""
            given, self._held = self._held, ""
            return given
        at = self._held.find(self.kind.opening)
        if at >= 0:
            given, self._held, self._inside = self._held[:at], self._held[at:], True
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

    def _bare(self, whole: str) -> str:
        mark = PYTHON_TAG if self.kind.name == LLAMA.name else self.kind.opening
        return whole.strip().removeprefix(mark).removesuffix(self.kind.closing)


def _calls(text: str) -> list[ToolCall] | None:
    """The calls that JSON makes, one or a list of them; None for anything else."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    made = []
    for one in said if isinstance(said, list) else [said]:
        arguments = one.get("arguments", one.get("parameters", {})) if isinstance(one, dict) else None
        if not isinstance(arguments, dict) or not isinstance(one.get("name"), str):
            return None
        made.append(ToolCall(one["name"], json.dumps(arguments, ensure_ascii=False)))
    return made or None


def _overlap(text: str, mark: str) -> int:
    """The length of the longest end of `text` that is a proper start of `mark`."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
