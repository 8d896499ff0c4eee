"""The share of row tokens that is padding, packed and not, over micro-batches as training reads them.

python benchmarks/packing_waste.py DATA... [--length 256] [--row-tokens 1024 2048 4096] [--micro-batch 4]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dspark.training.data import Documents


def waste(data: Documents, micro_batch: int) -> float:
    """Over one shuffled epoch, every micro-batch as wide as its widest row."""
    rows = data.rows(0, len(data), seed=0)
    parts = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
    tokens = sum(data.size(row) for row in rows)
    return 1 - tokens / sum(len(part) * max(data.size(row) for row in part) for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--row-tokens", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--micro-batch", type=int, default=4)
    args = parser.parse_args()
    for directory in args.data:
        line = {
            "data": directory.name,
            "one a row": round(waste(Documents(directory, args.length), args.micro_batch), 4),
        }
        for budget in args.row_tokens:
            line[str(budget)] = round(waste(Documents(directory, args.length, budget), args.micro_batch), 4)
        print(json.dumps(line))


if __name__ == "__main__":
    main()
