"""Answers from a model in this process: for whoever has prompts and a target, but no server."""

from __future__ import annotations

import asyncio
from typing import Any

from dspark.common.chat import render_chat
from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.engine.engine import Engine
from dspark.training.answers import Answer, Question, Refused


class LocalAnswers:
    """Asks an engine of its own. Use it as a context: leaving it ends the engine."""

    def __init__(self, target: str, drafter: str, **options: Any) -> None:
        self.engine = Engine.load(target, drafter, **options)

    async def __aenter__(self) -> LocalAnswers:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.engine.close)

    async def chat(self, question: Question, params: SamplingParams) -> Answer:
        """The assistant's next message."""
        options = {**question.template, **({"tools": question.tools} if question.tools else {})}
        return await self.answer(render_chat(self.engine.core.tokenizer, question.messages, **options), params)

    async def complete(self, text: str, params: SamplingParams) -> Answer:
        """What follows a text."""
        return await self.answer(text, params)

    async def answer(self, prompt: str | list[int], params: SamplingParams) -> Answer:
        """One answer of the engine. Raises Refused for a prompt it does not take, such as one past the context."""
        try:
            result = await self.engine.generate(prompt, params)
        except UserError as error:
            raise Refused(str(error)) from error
        message = {"role": "assistant", "content": result.text}
        return Answer(message, str(result.finish_reason), len(result.token_ids))
