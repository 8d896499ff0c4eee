"""What a text must look like, as a frozen record: a JSON schema, a regular expression, a choice or a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dspark.common.errors import UserError

Kind = Literal["json_schema", "regex", "choice", "grammar", "lark"]
MOST_BYTES = 128 << 10  # a grammar this long takes about a second to compile


@dataclass(frozen=True)
class Grammar:
    """Every text this request may get is one of the grammar's. Raises UserError for one too long; see the makers."""

    kind: Kind
    text: str  # of a schema or a choice its JSON; of a grammar Lark's notation or GBNF

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"grammar kind {self.kind!r} is not known; pass one of {', '.join(get_args(Kind))}")
        if not isinstance(self.text, str):
            raise UserError(f"grammar {self.text!r:.60} is not text; make it with Grammar.{self.kind}(...)")
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise UserError("the grammar is not valid Unicode; pass UTF-8") from error
        if size > MOST_BYTES:
            raise UserError(f"the grammar has {size} bytes, at most {MOST_BYTES} are compiled; shorten it")

    @staticmethod
    def json_schema(schema: Mapping[str, Any] | bool | str) -> Grammar:
        """JSON that fits a schema, given as a mapping or as its JSON."""
        return Grammar("json_schema", schema if isinstance(schema, str) else _dumped(schema, "schema"))

    @staticmethod
    def json_object() -> Grammar:
        """Any JSON object."""
        return Grammar.json_schema({"type": "object"})

    @staticmethod
    def regex(pattern: str) -> Grammar:
        """Text that a regular expression matches from end to end."""
        return Grammar("regex", pattern)

    @staticmethod
    def choice(texts: Sequence[str]) -> Grammar:
        """One of these texts."""
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"choice {texts!r:.60} is not a list of texts; pass at least one, none of them empty")
        return Grammar("choice", _dumped(list(texts), "choice"))

    @staticmethod
    def grammar(rules: str) -> Grammar:
        """Text that a context-free grammar derives, in Lark's notation or llama.cpp's GBNF."""
        return Grammar("grammar", rules)

    @staticmethod
    def lark(rules: str) -> Grammar:
        """The same in Lark's notation with llguidance's extensions, such as `%json`."""
        return Grammar("lark", rules)


def _dumped(value: object, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the {name} is not JSON: {error}; pass what json.dumps takes") from error
