"""Speculative decoding for `transformers` users: `model.generate(..., custom_generate=Speculative("path/to/drafter"))`.

B sequences, S tokens.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Drafter
from dspark.engine.build import build_engine
from dspark.engine.step import EngineCore
from dspark.models.target import ATTENTION, Target
from dspark.speculation.planner import DEFAULT, Planner

PROCESSORS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
)
CRITERIA = (MaxLengthCriteria, EosTokenCriteria)
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


class Speculative:
    """A decoding method for `generate`: greedy and sampling, batches with left padding, seeded by torch's generator.

    `generate` hands no streamer on to a callable: for text as it comes use `LLM.stream`.
    It keeps its engine, pages and prefix cache included, for as long as it is called with the same model and weights.
    """

    def __init__(
        self, drafter: str | Path | Drafter | None = "auto", planner: str | Planner = DEFAULT, **options: object
    ):
        """Drafter, planner and options as for `LLM`."""
        self.drafter, self.planner, self.options = drafter, planner, options
        self._core: EngineCore | None = None
        self._state: object = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What `generate` calls once its arguments are prepared; returns what `generate` returns."""
        refuse_unsupported(logits_processor, stopping_criteria, generation_config)
        padding_BS = model_kwargs.get("attention_mask")
        prompts = [
            row.tolist() if padding_BS is None else row[padding_BS[index].bool()].tolist()
            for index, row in enumerate(input_ids)
        ]
        end = eos_of(generation_config)
        room = int(generation_config.max_length) - input_ids.shape[1]
        core = self._engine(model)
        found = [core.add(prompt, sampling_params(generation_config, room, end)) for prompt in prompts]
        rows: dict[int, list[int]] = {request_id: [] for request_id in found}
        try:
            while not core.idle:
                for commit in core.step():
                    rows[commit.request_id] += commit.token_ids
        finally:
            for request_id in found:
                core.cancel(request_id)
        sequences_BS = padded(input_ids, [rows[i] for i in found], pad_of(generation_config, end))
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences_BS)
        return sequences_BS

    def _engine(self, model: PreTrainedModel) -> EngineCore:
        """The engine of the last call, or a new one if the model or its weights are others."""
        state = (id(model), tuple((p.data_ptr(), p._version) for p in model.parameters()))
        if self._core is None or self._state != state:
            self._core = None  # its pages are free before the next one's are taken
            target = Target(paged_twin(model))
            self._core = build_engine(target, self.drafter, self.planner, **self.options)  # type: ignore[arg-type]
            self._state = state
        return self._core


def paged_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model over the same tensors, on our attention function; the caller's model stays as it is."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: PreTrainedModel = copy.deepcopy(model, memo=dict(shared))
    twin.set_attn_implementation(ATTENTION)
    return twin.eval()


def sampling_params(config: GenerationConfig, max_tokens: int, end: list[int]) -> SamplingParams:
    """The generation config's sampling in our words, with a seed from torch's generator."""
    common: dict[str, Any] = {
        "max_tokens": max_tokens,
        "repetition_penalty": config.repetition_penalty or 1.0,
        "stop_token_ids": end,
        "ignore_eos": True,  # the generation config alone says what ends a text
    }
    if not config.do_sample:
        return SamplingParams(temperature=0.0, **common)
    return SamplingParams(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
        seed=int(torch.randint(1 << 62, ())),
        acceptance="rejection",
        **common,
    )


def refuse_unsupported(
    processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
) -> None:
    """Raises UserError for anything that would make the text differ from the model's own `generate`."""
    for item in processors:
        if not isinstance(item, PROCESSORS):
            raise UserError(f"{type(item).__name__} is not supported by speculative generate; call generate without it")
    for item in criteria:
        if not isinstance(item, CRITERIA):
            raise UserError(f"{type(item).__name__} is not supported by speculative generate; call generate without it")
    if (config.num_beams or 1) > 1:
        raise UserError(f"num_beams {config.num_beams} is not supported by speculative generate; pass num_beams=1")
    for name in OUTPUTS:
        if getattr(config, name, False):
            raise UserError(f"{name} is not supported by speculative generate; leave it out")


def eos_of(config: GenerationConfig) -> list[int]:
    """The tokens that end a sequence."""
    if config.eos_token_id is None:
        return []
    return config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]


def pad_of(config: GenerationConfig, end: list[int]) -> int:
    """What fills a finished sequence up, as `generate` does it."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    return end[0] if end else 0


def padded(input_BS: Tensor, rows: list[list[int]], pad: int) -> Tensor:
    """Inputs and outputs in one tensor, the shorter outputs filled up."""
    width = max(len(row) for row in rows)
    output_BS = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=input_BS.device)
    return torch.cat([input_BS, output_BS], dim=1)
