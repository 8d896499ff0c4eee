"""Conversations as token ids, through the chat template that came with the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dspark.common.errors import UserError

Message = Mapping[str, Any]


def chat_text(
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **options: Any,
) -> str:
    """A conversation as the template writes it, up to where the assistant speaks next; `options` go to the template."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise UserError("the model has no chat template; pass a prompt of text instead of messages")
    if not messages:
        raise UserError("the conversation has no messages; pass at least one")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise UserError(f"message {index} is not a mapping with role and content: {message!r:.80}")
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except Exception as error:  # templates raise whatever their authors chose
        raise UserError(
            f"the chat template refuses the messages: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error


def render_chat(tokenizer: PreTrainedTokenizerBase | None, messages: Sequence[Message], **options: Any) -> list[int]:
    """The token ids of `chat_text`."""
    text = chat_text(tokenizer, messages, **options)
    assert tokenizer is not None, "chat_text refuses a missing one"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
