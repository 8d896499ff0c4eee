"""How long a step spends outside the target's and the drafter's forwards, on a small random model.

Run: python benchmarks/engine_overhead.py [--batch 1 16] [--vocabulary 4096] [--cpu-time] [--profile]
The model's forwards are shorter than any real one's, so the milliseconds count here, not the share.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from itertools import pairwise

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.checkpoint import build
from dspark.drafters.config import parse
from dspark.engine.config import EngineConfig
from dspark.engine.step import EngineCore
from dspark.models.target import ATTENTION, Target

CASES = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
    "seeded": {"temperature": 1.0, "seed": 7},
}


def make_config(vocabulary: int, *, layers: int = 2) -> Qwen3Config:
    """The smallest model whose host work is that of a real one: only its forwards are too short."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )


def make_engine(vocabulary: int, block: int) -> EngineCore:
    """A random target with a random DSpark drafter, or none for a block of 0."""
    config = make_config(vocabulary)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM._from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
    model.lm_head.weight.data.mul_(40)  # a trained model's laws are peaked, and top-p costs less for it
    target = Target(model.eval().requires_grad_(False))
    if not block:
        return EngineCore(target, config=EngineConfig(seed=0))
    fields = make_config(vocabulary, layers=1).to_dict() | {
        "architectures": ["Qwen3DSparkModel"],
        "num_target_layers": 2,
        "block_size": block,
        "mask_token_id": vocabulary - 1,
        "target_layer_ids": [0, 1],
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "markov_rank": 64,
        "markov_head_type": "vanilla",
    }
    drafter = build(parse(fields, "config.json"), target.embedding_VD, target.head).eval()
    return EngineCore(target, drafter, config=EngineConfig(seed=0))


def measure(core: EngineCore, batch: int, params: dict[str, float], steps: int) -> tuple[float, float]:
    """Median milliseconds of a step outside the forwards, and of the whole step, with all requests decoding."""
    prompts = torch.randint(0, core.target.vocab_size - 1, (batch, 100)).tolist()
    ids = [core.add(prompt, SamplingParams(max_tokens=800, ignore_eos=True, **params)) for prompt in prompts]  # type: ignore[arg-type]
    for _ in range(8):
        core.step()
    marks = [(core.timings.outside, core.timings.total)]
    for _ in range(steps):
        core.step()
        marks.append((core.timings.outside, core.timings.total))
    for request_id in ids:
        core.cancel(request_id)
    outside = [b[0] - a[0] for a, b in pairwise(marks)]
    total = [b[1] - a[1] for a, b in pairwise(marks)]
    return 1e3 * statistics.median(outside), 1e3 * statistics.median(total)


def main() -> None:
    """Prints a line of JSON per batch size and kind of sampling."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--block", type=int, default=7, help="0 for plain decoding")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--case", choices=list(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine: time of the thread, not the wall")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    args = parser.parse_args()
    core = make_engine(args.vocabulary, args.block)
    core.runner.clock = time.thread_time if args.cpu_time else time.perf_counter
    for batch in args.batch:
        for case in args.case:
            profile = cProfile.Profile()
            if args.profile:
                profile.enable()
            outside, total = measure(core, batch, CASES[case], args.steps)
            profile.disable()
            line = {"batch": batch, "case": case, "outside_ms": round(outside, 3), "step_ms": round(total, 3)}
            print(json.dumps(line), flush=True)
            if args.profile:
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
