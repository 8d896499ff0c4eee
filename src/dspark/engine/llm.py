"""The blocking Python interface: load a model once, then ask it for text, many prompts at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dspark.common.chat import Message, render_chat
from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Drafter
from dspark.engine.build import build_engine
from dspark.engine.profile import Profile
from dspark.engine.request import Commit, FinishReason, RequestStatistics, TokenLogprob, TokenTrace
from dspark.engine.step import EngineCore
from dspark.models.target import Target
from dspark.speculation.planner import DEFAULT, Planner

Prompt = str | list[int]


@dataclass
class Result:
    """What became of one prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None  # of the prompt but its first token
    trace: list[TokenTrace] | None = None
    statistics: RequestStatistics = field(default_factory=RequestStatistics)
    error: str | None = None  # why this one failed, where the reason to finish is "error"

    def take(self, commit: Commit) -> None:
        """Append what a step committed."""
        self.text += commit.text
        self.token_ids += commit.token_ids
        self.finish_reason = commit.finish_reason
        self.statistics = commit.statistics
        self.error = commit.error
        if commit.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *commit.logprobs]
        if commit.prompt_logprobs is not None:
            self.prompt_logprobs = commit.prompt_logprobs
        if commit.trace is not None:
            self.trace = [*(self.trace or []), *commit.trace]


class LLM:
    """A target with its drafter. The text is the target's own, whatever the drafter: speculation only saves time."""

    def __init__(
        self,
        target: str | Path | Target,
        drafter: str | Path | Drafter | None = "auto",
        planner: str | Planner = DEFAULT,
        *,
        device: str = "auto",
        dtype: str = "auto",
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        profile: Profile | str | Path | None = None,
        **options: Any,
    ):
        """`target` is a model directory, a hub id or a Target; `options` are those of `EngineConfig`.

        `drafter` names a drafter's directory or hub id, a smaller model's, "ngram" or None; "auto" takes what lies
        in the target's directory under `drafter`. `profile` is for planners that weigh costs: one made by
        `dspark profile`, else the one kept for this engine, else one measured now.
        """
        self.core: EngineCore = build_engine(
            target, drafter, planner, device=device, dtype=dtype, tokenizer=tokenizer, profile=profile, **options
        )
        self._mail: dict[int, deque[Commit]] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The target's tokenizer, None where it has none."""
        return self.core.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Result]:
        """One result per prompt, in order; a prompt is text or token ids. One `params` serves all, or one each."""
        asked = _as_list(prompts)
        each = [params] * len(asked) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(asked):
            raise UserError(f"{len(asked)} prompts but {len(each)} sampling parameters; pass one, or one for each")
        ids: list[int] = []
        try:
            for prompt, own in zip(asked, each, strict=True):
                ids.append(self._open(prompt, own))
            results = [Result() for _ in ids]
            for request_id, result in zip(ids, results, strict=True):
                for commit in self._commits(request_id):
                    result.take(commit)
            return results
        finally:  # an interrupt too leaves nothing behind
            for request_id in ids:
                self._close(request_id)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Commit]:
        """The commits of one prompt as they happen; leaving the loop early cancels the request."""
        request_id = self._open(prompt, params)
        try:
            yield from self._commits(request_id)
        finally:
            self._close(request_id)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_options: Any,
    ) -> list[Result]:
        """The assistant's next message in one conversation or in each of several."""
        several = bool(messages) and not isinstance(messages[0], dict)
        conversations: Sequence[Any] = messages if several else [messages]
        return self.generate([render_chat(self.tokenizer, one, **template_options) for one in conversations], params)

    def _open(self, prompt: Prompt, params: SamplingParams | None) -> int:
        request_id = self.core.add(prompt, params)
        self._mail[request_id] = deque()
        return request_id

    def _commits(self, request_id: int) -> Iterator[Commit]:
        """Step until this request is finished; what the steps commit to others waits in their mail."""
        mail = self._mail[request_id]
        while mail or request_id in self.core.requests:
            if mail:
                yield mail.popleft()
                continue
            for commit in self.core.step():
                if commit.request_id in self._mail:
                    self._mail[commit.request_id].append(commit)

    def _close(self, request_id: int) -> None:
        self.core.cancel(request_id)
        del self._mail[request_id]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise UserError(f"prompts {prompts!r:.60} are not text, token ids or a list of either")
    if prompts and all(isinstance(token, int) for token in prompts):
        return [list(prompts)]  # type: ignore[arg-type]
    return list(prompts)  # type: ignore[arg-type]
