"""One-row plain decoding reads its weights at >= 80 % of the machine's read bandwidth; 8 rows cost <= 1.5 times one.

python benchmarks/memory_speed.py [--dtype f32 bf16] [--rounds 40] [--context 128] [--json FILE]

155 M random Qwen3, the compiled forward alone. The yardstick is torch's sum over 512 MiB on all threads, in turns with
the forwards. Bytes are those of every weight a step must read: all linears and the LM head, not the embedding table.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from workload import DTYPES, LAYERS, clocked, interleaved, prompts, random_target, ratios, report

from dspark.models.batch import Ragged
from dspark.models.pages import KVPool
from dspark.models.target import Target
from dspark.ops.linear import PackedLinear

PAGE_SIZE = 16
YARD = 512 << 20


def weight_bytes(target: Target) -> int:
    """Bytes of all matrices a decoding step reads."""
    packed = [m.packed for m in target.model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 7 * LAYERS + 1, "a matrix is not packed"
    return sum(weight.numel() * weight.element_size() for weight in packed)


def step_of(rows: int, context: int) -> tuple[Ragged, torch.Tensor]:
    """One sequence with `context` tokens in the pages and `rows` query tokens, every one with logits."""
    table = torch.arange(1, 2 + (context + rows) // PAGE_SIZE, dtype=torch.int32)[None]
    position = torch.arange(context, context + rows)
    slot = table[0][position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
    bounds, contexts = torch.tensor([0, rows]).int(), torch.tensor([context]).int()
    return Ragged(torch.tensor(prompts(1, rows)[0]), position, slot, table, bounds, contexts), torch.arange(rows)


def measure(dtype: str, context: int, rounds: int) -> list[dict[str, object]]:
    """The table's rows for one dtype."""
    target = random_target(dtype)
    graph = target.compile((), PAGE_SIZE)
    graph.wait()
    assert graph.status == "compiled", f"the forward was not compiled: {graph.status}"
    pool: KVPool = target.allocate(128, PAGE_SIZE)
    buffer = torch.randn(YARD // 4)
    steps = {rows: step_of(rows, context) for rows in (1, 8)}
    cases = {
        "sum": clocked(buffer.sum),
        "1": clocked(lambda: target.forward(steps[1][0], pool, steps[1][1])),
        "8": clocked(lambda: target.forward(steps[8][0], pool, steps[8][1])),
    }
    interleaved(cases, 3)
    seconds = interleaved(cases, rounds)
    size = weight_bytes(target)
    bandwidth, low, high = ratios([size * s / YARD for s in seconds["sum"]], seconds["1"])
    cost, cost_low, cost_high = ratios(seconds["8"], seconds["1"])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "dtype": dtype,
            "MB": size / 1e6,
            "sum GB/s": YARD / 1e9 / medians["sum"],
            "1 row ms": 1e3 * medians["1"],
            "1 row GB/s": size / 1e9 / medians["1"],
            "share": bandwidth,
            "share q1..q3": f"{low:.2f}..{high:.2f}",
            "8 rows ms": 1e3 * medians["8"],
            "8 / 1": cost,
            "8 / 1 q1..q3": f"{cost_low:.2f}..{cost_high:.2f}",
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rows = [row for dtype in arguments.dtype for row in measure(dtype, arguments.context, arguments.rounds)]
    report(rows, arguments.json)


if __name__ == "__main__":
    main()
