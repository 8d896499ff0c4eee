"""What several benchmarks share: the 155 M random Qwen3, its drafter, prompts, and how runs are timed and printed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.base import Drafter
from dspark.drafters.checkpoint import build
from dspark.drafters.config import parse
from dspark.engine.config import EngineConfig
from dspark.engine.step import EngineCore
from dspark.models.target import ATTENTION, Target
from dspark.ops.linear import pack_linears

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
HIDDEN, LAYERS, VOCABULARY, BLOCK, RANK = 1024, 12, 4096, 7, 256


def config_of(layers: int = LAYERS) -> Qwen3Config:
    """155 M parameters beside the embedding: 12 layers of 1024 with 16 query and 8 key/value heads of 64."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )


def random_model(dtype: str) -> Qwen3ForCausalLM:
    """The same weights for every script and dtype (up to rounding)."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM._from_config(config_of(), dtype=torch.float32, attn_implementation=ATTENTION)
    return model.to(DTYPES[dtype]).eval().requires_grad_(False)


def random_target(dtype: str) -> Target:
    """The model as a target, weights packed."""
    return Target(random_model(dtype))


def random_drafter(target: Target, layers: int = 1) -> Drafter:
    """A DSpark drafter of the real shape: the target's width, 7 slots, a vanilla head of rank 256, confidence."""
    fields = config_of(layers).to_dict() | {
        "architectures": ["Qwen3DSparkModel"],
        "num_target_layers": LAYERS,
        "block_size": BLOCK,
        "mask_token_id": VOCABULARY - 1,
        "target_layer_ids": [1, 4, 7, 10],
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "markov_rank": RANK,
        "markov_head_type": "vanilla",
    }
    drafter = build(parse(fields, "config.json"), target.embedding_VD, target.head)
    drafter = drafter.to(target.dtype).eval().requires_grad_(False)
    pack_linears(drafter.body)
    return drafter


def engine(target: Target, drafter: Drafter | None = None, **options: object) -> EngineCore:
    """An engine whose forwards are compiled when it is returned."""
    core = EngineCore(target, drafter, config=EngineConfig.of(seed=0, prefix_caching=False, **options))
    assert core.wait_compiled(), f"a forward was not compiled: {[graph.status for graph in core.graphs]}"
    return core


def prompts(count: int, length: int = 128, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Random token ids, the same for every caller."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary - 1, (count, length), generator=generator).tolist()


def decode(
    core: EngineCore, requests: Sequence[Sequence[int]], tokens: int
) -> tuple[float, list[list[int]], list[int]]:
    """Greedy decoding of all prompts at once: (seconds after the prefill, the new tokens of each)."""
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    ids = [core.add(prompt, greedy) for prompt in requests]
    made: dict[int, list[int]] = {request_id: [] for request_id in ids}
    while not all(made.values()):
        for commit in core.step():
            made[commit.request_id] += commit.token_ids
    prefilled = sum(map(len, made.values()))
    started = time.perf_counter()
    while not core.idle:
        for commit in core.step():
            made[commit.request_id] += commit.token_ids
    seconds = time.perf_counter() - started
    share = (sum(map(len, made.values())) - prefilled) / (tokens * len(ids))
    return seconds / share, [made[request_id] for request_id in ids]


def interleaved(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Results of every case, measured in turns so that a busy machine slows all of them alike."""
    results: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            results[name].append(run())
    return results


def ratios(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """(median, first quartile, third quartile) of the ratios of neighbours in time."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
    return middle, low, high


def clocked(run: Callable[[], object]) -> Callable[[], float]:
    """`run` as a function that returns its seconds."""

    def timed() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return timed


def report(rows: Sequence[Mapping[str, object]], path: str | None = None) -> None:
    """Rows as a table, and as JSON lines in a file if one is named."""
    columns = list(rows[0])
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    for line in [columns, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if path:
        Path(path).write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
