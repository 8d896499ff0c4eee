"""Turns a prompt and sampling parameters into a request, or says in one line why it cannot be served."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np
from transformers import PreTrainedTokenizerBase

from dspark.common.errors import UserError
from dspark.common.sampling_params import MAX_SEED, SamplingParams
from dspark.engine.config import EngineConfig
from dspark.engine.detokenize import Detokenizer, decoder_of
from dspark.engine.encode import encoder_of
from dspark.engine.grammars import Grammars, LibraryGrammars
from dspark.engine.request import Request, RequestStatistics
from dspark.models.target import Target

MAX_LOGPROBS = 20
MAX_STOPS = 64


class Intake:
    """Numbers, checks and seeds the requests of one engine."""

    def __init__(
        self,
        target: Target,
        tokenizer: PreTrainedTokenizerBase | None,
        config: EngineConfig,
        *,
        capacity: int,
        eos_token_ids: Iterable[int],
        headroom: int,
    ):
        """`capacity` in pages; `headroom` is how far past its last token a request's page table may be read."""
        self.vocab_size = target.vocab_size
        self.context_limit = target.context_limit
        self.tokenizer = tokenizer
        self.page_size = config.page_size
        self.capacity = capacity
        longest = min(self.context_limit, capacity * config.page_size + 1) + headroom
        self.row_width = -(-longest // config.page_size)  # the same for all, so that rows stack
        self.eos_token_ids = frozenset(eos_token_ids)
        self.grammars: Grammars = LibraryGrammars(tokenizer, target.vocab_size, self.eos_token_ids)
        self._encode = encoder_of(tokenizer) if tokenizer is not None else None
        self._decode = decoder_of(tokenizer) if tokenizer is not None else None
        self._ids = count()
        self._seeds = np.random.default_rng(config.seed)

    def request(self, prompt: str | Sequence[int], params: SamplingParams) -> Request:
        """A request in its initial state."""
        tokens = self.tokenize(prompt)
        params.check_vocabulary(self.vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            if (asked := getattr(params, name) or 0) > MAX_LOGPROBS:
                raise UserError(f"{name} {asked} is above {MAX_LOGPROBS}; ask for {MAX_LOGPROBS} or fewer")
        if len(params.stop) > MAX_STOPS:
            raise UserError(f"{len(params.stop)} stop strings are too many; pass {MAX_STOPS} or fewer")
        if params.stop and self._decode is None:
            raise UserError(f"stop {params.stop[0]!r} needs a tokenizer; give the engine one or pass stop_token_ids")
        limit = self._limit(len(tokens), params.max_tokens)
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        return Request(
            id=next(self._ids),
            params=params,
            tokens=tokens,
            prompt_length=len(tokens),
            limit=limit,
            seed=int(self._seeds.integers(MAX_SEED)) if params.seed is None else params.seed,
            stop_ids=eos.union(params.stop_token_ids),
            page_row=np.zeros(self.row_width, dtype=np.int32),
            detokenizer=self._detokenizer(tokens, params),
            matcher=self.grammars.matcher(params.grammar) if params.grammar is not None else None,
            scores=None if params.prompt_logprobs is None else [],
            statistics=RequestStatistics(prompt_tokens=len(tokens)),
        )

    def _detokenizer(self, tokens: list[int], params: SamplingParams) -> Detokenizer | None:
        if self._decode is None:
            return None
        decode = self._decode if params.skip_special_tokens else decoder_of(self.tokenizer, skip_special=False)
        return Detokenizer(decode, tokens, params.stop)

    def tokenize(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt. Reads nothing that a step writes, so any thread may call it."""
        if isinstance(prompt, str):
            if self._encode is None:
                raise UserError("a prompt of text needs a tokenizer; give the engine one or pass token ids")
            tokens = self._encode(prompt)
        else:
            tokens = [int(token) for token in prompt]
        if not tokens:
            raise UserError("the prompt is empty; pass at least one token")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            token = next(token for token in tokens if not 0 <= token < self.vocab_size)
            raise UserError(f"prompt token {token} is outside the model's vocabulary of {self.vocab_size} tokens")
        return tokens

    def _limit(self, prompt: int, max_tokens: int | None) -> int:
        """Tokens the request may reach: as asked, within the context and the pages."""
        if prompt >= self.context_limit:
            raise UserError(
                f"the prompt has {prompt} tokens, the model's context {self.context_limit}; "
                f"pass {self.context_limit - 1} tokens or fewer"
            )
        room = self.capacity * self.page_size + 1  # the last token is never in the pages
        limit = self.context_limit if max_tokens is None else min(prompt + max_tokens, self.context_limit)
        least = prompt + 1 if max_tokens is None else limit
        if least > room:
            raise UserError(
                f"{prompt} prompt tokens and {least - prompt} more need {-(-(least - 1) // self.page_size)} pages, "
                f"the pool has {self.capacity}; shorten the request or give the engine more pages"
            )
        return min(limit, room)
