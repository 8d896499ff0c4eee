"""How much memory a target takes on a machine whose ranks share it, by rank count and dtype.

    python benchmarks/ranks_memory.py [--ranks 2] [--hidden 1024] [--layers 12]

A random Qwen3 is saved in bfloat16. Ranks load it as the trainer does, read every weight, and add up what each grew by:
the proportional set size, in which a page that two processes map counts half for each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.common.log import quiet_libraries
from dspark.training.sharding import joined, load_target


def proportional() -> int:
    """This process's proportional set size in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def rank(directory: str, dtype: str) -> None:
    """One of the ranks; the first prints the sum."""
    quiet_libraries()
    with joined("cpu") as ranks:
        before = proportional()
        model = load_target(directory, dtype, ranks)
        torch.stack([parameter.amax() for parameter in model.parameters()])  # no copies
        ranks.share(None)
        grown = ranks.share(proportional() - before)
        if ranks.first:
            size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
            line = {"ranks": ranks.size, "dtype": dtype, "weights_mb": size >> 20}
            line |= {"grown_mb": [x >> 20 for x in grown], "times_the_weights": round(sum(grown) / size, 2)}
            print(json.dumps(line), flush=True)
        ranks.share(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        rank(*options.rank_of)
        return
    with tempfile.TemporaryDirectory() as directory:
        shape = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
        config = Qwen3Config(
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            vocab_size=4096,
            **shape,
        )
        Qwen3ForCausalLM(config).bfloat16().save_pretrained(directory)
        for count in (1, options.ranks):
            for dtype in ("bfloat16", "float32"):
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
                command = [*torchrun, __file__, "--rank-of", directory, dtype]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                print(done.stdout.strip() or done.stderr[-2000:], flush=True)


if __name__ == "__main__":
    main()
