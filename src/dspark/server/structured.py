"""The fields that say what a text must look like: OpenAI's `response_format`, and `guided_*` as vLLM names them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dspark.common.errors import UserError
from dspark.common.grammar import Grammar
from dspark.server.errors import ApiError

MOST_CHOICES = 1024


class Strict(BaseModel):
    """Refuses fields that it does not have."""

    model_config = ConfigDict(extra="forbid")


class JsonSchema(Strict):
    """A named schema."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # the schema is kept in any case


class ResponseFormat(Strict):
    """OpenAI's: free text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema stands with type json_schema, and only there; pass both or neither")
        return self


class Structured(Strict):
    """At most one of these may constrain the text."""

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _one_at_most(self) -> Structured:
        named = self._constraints()
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} both say what the text must look like; pass one of them")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What the text must look like. Raises ApiError 400 for what cannot be a grammar at all."""
        for name, make in self._constraints().items():
            try:
                return make()
            except UserError as error:
                raise ApiError(400, f"{name}: {error}", param=name) from error
        return None

    def _constraints(self) -> dict[str, Any]:
        """Makers of what was asked for, by field."""
        made: dict[str, Any] = {}
        if self.response_format is not None and self.response_format.type != "text":
            schema = self.response_format.json_schema
            made["response_format"] = lambda: (
                Grammar.json_schema(schema.schema_) if schema is not None else Grammar.json_object()
            )
        for name, make in (
            ("guided_json", Grammar.json_schema),
            ("guided_regex", Grammar.regex),
            ("guided_choice", Grammar.choice),
            ("guided_grammar", Grammar.grammar),
        ):
            value = getattr(self, name)
            if value is not None:
                made[name] = lambda make=make, value=value: make(value)
        return made
