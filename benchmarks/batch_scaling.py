"""Batch 16 decodes >= 6 x the tokens/s of batch 1; host time <= 15 % of a step at 1, <= 10 % at 16; memory is bounded.

python benchmarks/batch_scaling.py [--dtype f32 bf16] [--tokens 64] [--rounds 3] [--json FILE]
python benchmarks/batch_scaling.py --target DIR [--drafter DIR] …

The 155 M random Qwen3 with a random one-layer DSpark drafter, or the models of directories. Plain and speculative
engines, batches in turns, temperature 0, after the prefill. "outside" is the share of a step's time that is in neither
the target's nor the drafter's forward. Memory is that of a fresh process that loaded the models from a directory, ran
16 requests and touched its whole KV pool, against weights + pool + 500 MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import workload
from torch import nn

from dspark.drafters.base import Drafter
from dspark.drafters.registry import load_drafter
from dspark.engine.step import EngineCore
from dspark.models.target import Target

BATCHES = (1, 16)
PAGES = 16 * 24 + 1  # room for 16 requests of 384 tokens
ALLOWED = 500e6  # bytes beside weights and pool


def load(arguments: argparse.Namespace, dtype: str) -> tuple[Target, Drafter | None]:
    """The models to measure."""
    if arguments.target is None:
        target = workload.random_target(dtype)
        return target, workload.random_drafter(target)
    target = Target.load(arguments.target)
    return target, load_drafter(arguments.drafter, target) if arguments.drafter else None


def speed(name: str, kind: str, core: EngineCore, tokens: int, rounds: int) -> list[dict[str, object]]:
    """Tokens/s and host share of one engine by batch size."""
    prompts = workload.prompts(max(BATCHES), vocabulary=core.target.vocab_size)
    shares: dict[int, list[float]] = {batch: [] for batch in BATCHES}

    def run(batch: int) -> float:
        before = core.timings.outside, core.timings.total
        seconds, _ = workload.decode(core, prompts[:batch], tokens)
        shares[batch].append((core.timings.outside - before[0]) / (core.timings.total - before[1]))
        return batch * tokens / seconds

    speeds = workload.interleaved({str(batch): lambda batch=batch: run(batch) for batch in (BATCHES)}, rounds + 1)
    speeds = {batch: values[1:] for batch, values in speeds.items()}  # the first round warms up
    ratio, low, high = workload.ratios(speeds["16"], speeds["1"])
    return [
        {
            "model": name,
            "engine": kind,
            "batch": batch,
            "tok/s": statistics.median(speeds[str(batch)]),
            "of batch 1": f"{ratio:.2f} ({low:.2f}..{high:.2f})" if batch > 1 else "",
            "outside %": 100 * statistics.median(shares[batch][1:]),
        }
        for batch in BATCHES
    ]


def weights_of(core: EngineCore) -> int:
    """Bytes of both models' tensors, each counted once."""
    modules = [part for part in (core.target.model, core.drafter) if isinstance(part, nn.Module)]
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def resident() -> dict[str, float]:
    """This process's memory in bytes: now and at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    sizes = {line.split(":")[0]: 1024 * float(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": sizes["VmRSS"], "peak": sizes["VmHWM"]}


def memory_here(arguments: argparse.Namespace) -> None:
    """Runs in a fresh process: prints bytes as JSON."""
    base = resident()["now"]
    target, drafter = load(arguments, "")
    core = workload.engine(target, drafter, pages=PAGES)
    pools = [*core.runner.pool.keys, *core.runner.pool.values]
    pools += [x for pair in getattr(getattr(drafter, "body", None), "pools", ()) for x in pair]
    for pool in pools:
        pool.zero_()
    workload.decode(core, workload.prompts(16, vocabulary=target.vocab_size), 32)
    pool_bytes = sum(pool.numel() * pool.element_size() for pool in pools)
    print(json.dumps({"base": base, "weights": weights_of(core), "pool": pool_bytes, **resident()}))


def memory(name: str, target: str, drafter: str | None) -> dict[str, object]:
    """The table's row for a pair of directories."""
    command = [sys.executable, __file__, "--memory-here", "--target", target]
    command += ["--drafter", drafter] if drafter else []
    sizes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    beside = sizes["now"] - sizes["weights"] - sizes["pool"]
    return {
        "model": name,
        **{f"{key} MB": round(value / 1e6) for key, value in sizes.items()},
        "beside MB": round(beside / 1e6),
        "within": "yes" if beside <= ALLOWED else "no",
    }


def memory_of_random(dtype: str) -> dict[str, object]:
    """The same for the random model, by way of a directory."""
    with tempfile.TemporaryDirectory() as scratch:
        workload.random_model(dtype).save_pretrained(scratch)
        return memory(f"155 M {dtype}", scratch, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="a model's directory instead of the random one")
    parser.add_argument("--drafter", help="a drafter's directory, beside --target")
    parser.add_argument("--dtype", nargs="+", choices=list(workload.DTYPES), default=["bf16"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--memory-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.memory_here:
        return memory_here(arguments)
    rows, sizes = [], []
    for dtype in ["given"] if arguments.target else arguments.dtype:
        name = Path(arguments.target).name if arguments.target else f"155 M {dtype}"
        target, drafter = load(arguments, dtype)
        for kind, own in {"plain": None, "dspark": drafter}.items():
            if kind == "plain" or own is not None:
                core = workload.engine(target, own, pages=PAGES)
                rows += speed(name, kind, core, arguments.tokens, arguments.rounds)
        if not arguments.skip_memory:
            given = arguments.target is not None
            sizes.append(memory(name, arguments.target, arguments.drafter) if given else memory_of_random(dtype))
    workload.report(rows)
    if sizes:
        workload.report(sizes)
    if arguments.json:
        Path(arguments.json).write_text("".join(json.dumps(row) + "\n" for row in [*rows, *sizes]), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
