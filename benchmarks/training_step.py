"""One training step of a DSpark drafter with the target's features given: seconds and resident memory.

python benchmarks/training_step.py [--way tiled plain] [--layers 5] [--anchors 512] [--tokens 2048] [--hidden 128]
    [--vocabulary 1000] [--precision float32] [--steps 5] [--profile] [--json FILE]

Drafter forward, losses, backward, clipping and AdamW. `plain` is the same step the published code's way: every score
of [context; all blocks] with a dense mask through torch's fused attention, and all logits at once. Each way runs in
a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dspark.drafters import checkpoint
from dspark.drafters.config import parse
from dspark.ops import chunked_loss
from dspark.ops.block_attention import Layout
from dspark.training import drafter as drafters
from dspark.training.data import Batch
from dspark.training.forward import goal
from dspark.training.objectives import Weights

TAPS, MASK_TOKEN = 5, 0


class Given:
    """Features from nowhere: random taps and last hidden states, a random frozen head."""

    def __init__(self, taps_BSD: Tensor, last_BSD: Tensor, head: torch.nn.Module) -> None:
        self.pair, self.head = (taps_BSD, last_BSD), head

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.pair

    @torch.no_grad()
    def logits(self, last_ND: Tensor) -> Tensor:
        return self.head(last_ND)


def random_drafter(args: argparse.Namespace) -> torch.nn.Module:
    """A drafter of the shape asked for, its embedding and head frozen."""
    heads = max(1, args.hidden // 32)
    raw = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "vocab_size": args.vocabulary,
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 1 << 15,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "block_size": 7,
        "mask_token_id": MASK_TOKEN,
        "target_layer_ids": list(range(TAPS)),
        "markov_rank": 256,
        "enable_confidence_head": True,
    }
    config = parse(raw, "benchmark")
    table_VD = torch.randn(args.vocabulary, args.hidden)
    drafter = checkpoint.build(config, table_VD, checkpoint.head_of(torch.randn_like(table_VD)))
    drafters.initialise(drafter, torch.Generator().manual_seed(0))
    return drafter.train()


def dense_attention(
    q_BAKHd: Tensor, k_BAKGd: Tensor, v_BAKGd: Tensor, ck: Tensor, cv: Tensor, layout: Layout, scale: float, **_: int
) -> Tensor:
    """All queries of a row against all keys, one mask for all layers."""
    B, A, K, H, d = q_BAKHd.shape
    n = H // k_BAKGd.shape[3]
    keys, values = (
        torch.cat((far, near.flatten(1, 2)), 1).repeat_interleave(n, 2).transpose(1, 2)
        for far, near in ((ck, k_BAKGd), (cv, v_BAKGd))
    )
    if "dense" not in layout._masks:
        row, query, key = torch.arange(B)[:, None, None], torch.arange(A * K)[:, None], torch.arange(keys.shape[2])
        layout._masks["dense"] = layout.rule(0)(row, query, key)[:, None]
    query = q_BAKHd.flatten(1, 2).transpose(1, 2)
    out = scaled_dot_product_attention(query, keys, values, layout._masks["dense"], scale=scale)
    return out.transpose(1, 2).reshape(B, A, K, H, d)


def all_at_once(rows: chunked_loss.Rows, vocabulary: int) -> list[tuple[slice, slice]]:
    """One chunk."""
    return [(slice(0, len(rows.place_N)), slice(0, int(rows.place_N[-1]) + 1))]


def run(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """Medians of the steps' seconds, and the process's peak."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    drafter = random_drafter(args)
    S, D = args.tokens, args.hidden
    token_BS = torch.randint(1, args.vocabulary, (1, S))
    batch = Batch(token_BS, torch.ones_like(token_BS).bool(), torch.zeros_like(token_BS), ((0,),))
    features = Given(torch.randn(1, S, TAPS * D), torch.randn(1, S, D), drafter.body.lm_head)
    trained = [p for p in drafter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=6e-4, fused=True)

    def step() -> None:
        found = goal(
            drafter,
            features,
            batch,
            weights=Weights(),
            anchors=args.anchors,
            precision=args.precision,
        )
        found.total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    plain = [
        mock.patch("dspark.drafters.backbone.block_attention", dense_attention),
        mock.patch.object(chunked_loss.Rows, "chunks", all_at_once),
    ]
    for patch in plain if way == "plain" else []:
        patch.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(args.steps + 1):  # the first allocates
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    if args.profile:
        with torch.profiler.profile() as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
    return {
        "way": way,
        "seconds": round(statistics.median(seconds[1:]), 3),
        "fastest": round(min(seconds[1:]), 3),
        "resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
        "before_gb": round(before / 1e6, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", nargs="+", default=["tiled", "plain"], choices=["tiled", "plain"])
    numbers = {"layers": 5, "anchors": 512, "tokens": 2048, "hidden": 128, "vocabulary": 1000, "steps": 5, "threads": 2}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for way in args.way:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(run, (args, way)))
        print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
