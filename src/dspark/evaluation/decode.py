"""Decoding speed of several ways to write the same text, interleaved in one run: the engine's and the library's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from dspark.common.sampling_params import SamplingParams
from dspark.engine.step import EngineCore
from dspark.speculation.statistics import SpeculationStatistics

Texts = list[list[int]]  # token ids of each prompt of a batch


class Written(NamedTuple):
    """What follows a batch of prompts, and how it came."""

    texts: Texts
    statistics: SpeculationStatistics
    prefilled: float | None = None  # the clock when every prompt had its first token; None where nobody can tell


Write = Callable[[Texts], Written]


@dataclass
class Contender:
    """One way to decode a batch of token prompts, and what it took."""

    name: str
    write: Write
    statistics: SpeculationStatistics = field(default_factory=SpeculationStatistics)
    seconds: dict[int, list[float]] = field(default_factory=dict)  # by batch
    prefill_seconds: dict[int, list[float]] = field(default_factory=dict)
    texts: dict[int, Texts] = field(default_factory=dict)  # the last round's, by batch

    def run(self, index: int, prompts: Texts) -> None:
        """Write one batch against the clock."""
        started = time.perf_counter()
        written = self.write(prompts)
        self.seconds.setdefault(index, []).append(time.perf_counter() - started)
        if written.prefilled is not None:
            self.prefill_seconds.setdefault(index, []).append(written.prefilled - started)
        self.texts[index] = written.texts
        self.statistics.merge(written.statistics)

    @property
    def tokens(self) -> int:
        """New tokens in one round."""
        return sum(len(text) for texts in self.texts.values() for text in texts)

    @property
    def speed(self) -> float:
        """Tokens per second: one round's tokens over the sum of the batches' median times."""
        return self.tokens / sum(median(times) for times in self.seconds.values())

    @property
    def decode_speed(self) -> float | None:
        """The same from the first token of a batch's last prompt on; None where that moment is not known."""
        if not self.prefill_seconds:
            return None
        pairs = ((median(self.seconds[index]), median(times)) for index, times in self.prefill_seconds.items())
        return (self.tokens - sum(map(len, self.texts.values()))) / sum(whole - prefill for whole, prefill in pairs)


def write_texts(core: EngineCore, prompts: Texts, params: SamplingParams) -> Written:
    """What an idle engine writes after all prompts at once, and how it came."""
    counted, prefilled = SpeculationStatistics(), time.perf_counter()
    ids = [core.add(prompt, params) for prompt in prompts]
    texts: dict[int, list[int]] = {request: [] for request in ids}
    while not core.idle:
        for commit in core.step():
            texts[commit.request_id] += commit.token_ids
            if commit.finish_reason:
                counted.merge(commit.statistics)
                prefilled = max(prefilled, commit.statistics.first_token or prefilled)
    return Written([texts[request] for request in ids], counted, prefilled)


def engine_contender(name: str, core: EngineCore, params: SamplingParams) -> Contender:
    """The engine, all prompts of a batch at once."""
    return Contender(name, lambda prompts: write_texts(core, prompts, params))


def library_contender(name: str, model: PreTrainedModel, params: SamplingParams, **options: Any) -> Contender:
    """`transformers` generate with `options`; prompts of a batch are padded on the left."""

    def write(prompts: Texts) -> Written:
        longest = max(len(prompt) for prompt in prompts)
        token_BT = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
        mask_BT = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if params.temperature > 0:
            sampling = {"do_sample": True, "temperature": params.temperature, "top_k": 0, "top_p": params.top_p}
        with torch.inference_mode():
            out_BT = model.generate(
                token_BT,
                attention_mask=mask_BT,
                max_new_tokens=params.max_tokens,
                pad_token_id=0,
                **sampling,
                **options,
            )
        return Written(out_BT[:, longest:].tolist(), SpeculationStatistics())

    return Contender(name, write)


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """The model with generation settings that never end a text and ask for nothing else; counts stay comparable."""
    settings = type(model.generation_config)(pad_token_id=0)
    settings.eos_token_id = None
    model.generation_config = settings
    return model


def interleave(contenders: Sequence[Contender], prompts: Texts, *, batch: int, rounds: int) -> Iterator[None]:
    """One warm-up and `rounds` timed rounds; in each, every batch is written by all contenders in turn."""
    batches = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    for contender in contenders:
        contender.write(batches[0])
        yield
    for _ in range(rounds):
        for index, texts in enumerate(batches):
            for contender in contenders:
                contender.run(index, texts)
                yield


def same_texts(one: Contender, other: Contender) -> int:
    """How many prompts both wrote the same tokens for."""
    pairs = zip(_flat(one), _flat(other), strict=True)
    return sum(a == b for a, b in pairs)


def _flat(contender: Contender) -> Texts:
    return [text for index in sorted(contender.texts) for text in contender.texts[index]]
