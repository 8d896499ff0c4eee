"""Conversations through the engine, all at once: the model's own answer goes into its next turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from dspark.common.chat import render_chat
from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.engine.step import EngineCore
from dspark.evaluation.acceptance import Measured, measure
from dspark.evaluation.decode import Texts
from dspark.evaluation.prompts import Turns
from dspark.speculation.statistics import total


@dataclass
class Transcript:
    """One conversation so far: what the user says next, and what was said."""

    turns: Turns
    answers: list[str] = field(default_factory=list)

    def prompt(self, tokenizer: PreTrainedTokenizerBase, thinking: bool = False) -> list[int]:
        """Everything up to where the model speaks: by its chat template, or as plain text where it has none."""
        said = zip(self.turns[: len(self.answers) + 1], [*self.answers, None], strict=True)
        if not tokenizer.chat_template:
            text = "\n\n".join(user if answer is None else user + answer for user, answer in said)
            return list(tokenizer(text)["input_ids"])
        messages = []
        for user, answer in said:
            messages.append({"role": "user", "content": user})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return render_chat(tokenizer, messages, enable_thinking=thinking)


def converse(
    core: EngineCore, conversations: Sequence[Turns], params: SamplingParams, *, thinking: bool = False
) -> tuple[Measured, int]:
    """Turn 1 of all conversations in one batch, then turn 2 of those that have one, and so on.

    Returns what was observed, and how many turns were left out because they no longer fit the context.
    """
    tokenizer = core.tokenizer
    if tokenizer is None:
        raise UserError("the target has no tokenizer, so nobody can talk to it; pass a directory that has one")
    transcripts = [Transcript(turns) for turns in conversations]
    parts, left_out = [], 0
    while transcripts:
        prompts: Texts = [transcript.prompt(tokenizer, thinking) for transcript in transcripts]
        fits = [len(prompt) < core.target.context_limit for prompt in prompts]
        pairs = list(zip(transcripts, prompts, fits, strict=True))
        left_out += sum(len(one.turns) - len(one.answers) for one, _, fit in pairs if not fit)
        transcripts = [one for one, _, fit in pairs if fit]
        parts.append(measure(core, [prompt for _, prompt, fit in pairs if fit], params))
        for transcript, tokens in zip(transcripts, parts[-1].texts, strict=True):
            transcript.answers.append(tokenizer.decode(tokens, skip_special_tokens=True))
        transcripts = [one for one in transcripts if len(one.answers) < len(one.turns)]
    return joined(parts), left_out


def joined(parts: Sequence[Measured]) -> Measured:
    """Several observations as one."""
    return Measured(
        texts=[text for part in parts for text in part.texts],
        statistics=total(part.statistics for part in parts),
        records=[record for part in parts for record in part.records],
    )
