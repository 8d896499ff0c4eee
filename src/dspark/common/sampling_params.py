"""How a user asks for text: one frozen record of sampling parameters, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dspark.common.errors import UserError
from dspark.common.grammar import Grammar

MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1  # more than any vocabulary


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request, with the names people know. Raises UserError on an impossible value.

    `temperature` 0 takes the most likely token. `acceptance` None means "coupled" for a request that gives a seed
    (its text is then a function of seed and prompt, whatever the drafter and the load), else "rejection".
    """

    max_tokens: int | None = 128  # None: up to the context limit; 0, to read a prompt only, needs prompt_logprobs
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as in Hugging Face
    presence_penalty: float = 0.0  # over output only, as in the OpenAI API
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    acceptance: Literal["rejection", "coupled"] | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # of the prompt's tokens but the first; the prompt is then always computed anew
    skip_special_tokens: bool = True  # of the text; a chat with tools needs to see them
    trace: bool = False  # tell of every token whether it was drafted, and how sure of it the drafter was
    grammar: Grammar | None = None  # what the text must look like; masks the logits before everything else here
    speculation: int | Literal["off"] | None = None  # most tokens drafted a round; "off" is 0, None leaves it to plans
    speculation_group: str = ""  # a workload whose acceptance is tracked on its own, such as "code" or "chat"
    priority: float = 1.0  # what a token of this request is worth to a planner, beside other requests' tokens
    min_tokens_per_second: float | None = None  # a speed that planners keep for this request, where they can

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        _whole("max_tokens", self.max_tokens, least, None, "or None for as many as the context holds", optional=True)
        _number("temperature", self.temperature, 0.0, math.inf, "pass 0 for the most likely token, 1 for the model's")
        _whole("top_k", self.top_k, 0, MAX_TOP_K, "pass 0 to keep every token")
        _number("top_p", self.top_p, 0.0, 1.0, "pass 1 to keep every token", open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0, "pass 0 to keep every token")
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "pass 1 for none", open_low=True)
        _number("presence_penalty", self.presence_penalty, -math.inf, math.inf, "pass 0 for none")
        _number("frequency_penalty", self.frequency_penalty, -math.inf, math.inf, "pass 0 for none")
        _whole("seed", self.seed, 0, MAX_SEED, "or None for a fresh one", optional=True)
        _whole("logprobs", self.logprobs, 0, None, "or None for none", optional=True)
        _whole("prompt_logprobs", self.prompt_logprobs, 0, None, "or None for none", optional=True)
        if self.speculation != "off":
            _whole("speculation", self.speculation, 0, None, '"off", or None to let the planner decide', optional=True)
        _number("priority", self.priority, 0.0, math.inf, "pass 1 for the same as others", open_low=True)
        if self.min_tokens_per_second is not None:
            way_out = "pass None for no such floor"
            _number("min_tokens_per_second", self.min_tokens_per_second, 0.0, math.inf, way_out, open_low=True)
        if not isinstance(self.speculation_group, str):
            raise UserError(f"speculation_group {self.speculation_group!r} is not a name; pass text, such as 'code'")
        if self.acceptance not in (None, "rejection", "coupled"):
            raise UserError(f"acceptance {self.acceptance!r} is not a rule; pass 'rejection', 'coupled' or None")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise UserError(f"grammar {self.grammar!r:.60} is not a Grammar; make one, such as Grammar.json_object()")
        if self.grammar is not None and self.ignore_eos:
            raise UserError("ignore_eos and a grammar disagree: the grammar says where the text ends; pass one of them")
        if isinstance(self.stop, str):  # a lone string is what people write
            object.__setattr__(self, "stop", (self.stop,))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UserError(f"stop {text!r} is not a non-empty string; leave it out")
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, None, "pass token ids")
        for token, bias in (self.logit_bias or {}).items():
            _whole("logit_bias token", token, 0, None, "pass token ids as keys")
            _number(f"logit_bias of token {token}", bias, -math.inf, math.inf, "pass -100 to ban a token in practice")

    @property
    def coupled(self) -> bool:
        """Whether this request is verified by the coupled rule."""
        return self.acceptance == "coupled" or (self.acceptance is None and self.seed is not None)

    @property
    def draft_cap(self) -> int:
        """The most tokens a round of this request may draft."""
        return 0 if self.speculation == "off" else MAX_SEED if self.speculation is None else self.speculation

    @property
    def penalized(self) -> bool:
        """Whether shaping needs this request's token counts."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raise UserError if a token id named here is not one of the model's `vocabulary` tokens."""
        for name, tokens in (("logit_bias", self.logit_bias or {}), ("stop_token_ids", self.stop_token_ids)):
            for token in tokens:
                if token >= vocabulary:
                    raise UserError(f"{name} token {token} is not below the model's vocabulary of {vocabulary} tokens")


def _whole(name: str, value: object, low: int, high: int | None, way_out: str, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    bound = f"{low} or more" if high is None else f"{low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{name} {value!r} is not a whole number; pass {bound}, {way_out}")
    if value < low or (high is not None and value > high):
        raise UserError(f"{name} {value} is out of range; pass {bound}, {way_out}")


def _number(name: str, value: object, low: float, high: float, way_out: str, *, open_low: bool = False) -> None:
    """Check a finite number in [low, high], or (low, high] with `open_low`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{name} {value!r} is not a number; {way_out}")
    fits = math.isfinite(value) and low <= value <= high and not (open_low and value == low)
    if not fits:
        least = f"more than {low:g}" if open_low else f"{low:g} or more"
        bounds = (
            [least] * (low > -math.inf) + [f"at most {high:g}"] * (high < math.inf) + ["finite"] * (high == math.inf)
        )
        raise UserError(f"{name} {value} is out of range: must be {' and '.join(bounds)}; {way_out}")
