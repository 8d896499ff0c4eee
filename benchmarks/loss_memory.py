"""Peak memory of a block drafter's loss and backward over a large vocabulary, heads included.

python benchmarks/loss_memory.py [--way chunked plain] [--slots 3584] [--vocabulary 151936] [--hidden 2560] [--rank 256]
    [--dtype bfloat16] [--threads 2] [--json FILE]

Hidden rows → target's and drafter's logits → cross-entropy, l1, acceptance → gradients of hidden rows, latents and W2.
On the CPU the peak is the process's resident memory, each way in a process of its own; on CUDA the allocator's.
`plain` makes all logits at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import torch

from dspark.ops.chunked_loss import Rows, Scale, weighted_loss
from dspark.ops.losses import slot_losses


def run(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """One loss and its gradients."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device, kind = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, args.dtype)
    N, V, D, r = args.slots, args.vocabulary, args.hidden, args.rank
    head_VD = torch.empty(V, D, dtype=kind, device=device).normal_(std=D**-0.5)
    w2_Vr = torch.empty(V, r, dtype=kind, device=device).normal_(std=0.02).requires_grad_()
    hidden_ND, last_ND = (torch.randn(N, D, dtype=kind, device=device) for _ in range(2))
    latent_Nr = torch.randn(N, r, dtype=kind, device=device).requires_grad_()
    hidden_ND.requires_grad_()
    rows = Rows(
        draft=lambda h, z: h @ head_VD.T + z @ w2_Vr.T,
        target=lambda places: last_ND[places] @ head_VD.T,
        place_N=torch.arange(N, device=device),  # no two slots share one: the worst case
        label_N=torch.randint(V, (N,), device=device),
        weight_N=torch.full((N,), 1 / N, device=device),
        scale=Scale(0.1, 0.9),
    )
    before, started = peak_gb(device), time.perf_counter()
    if way == "plain":
        losses = slot_losses(rows.draft(hidden_ND, latent_Nr), rows.target(slice(None)), rows.label_N)
        loss = (rows.weight_N * (0.1 * losses.cross_entropy + 0.9 * losses.l1)).sum()
    else:
        loss, _ = weighted_loss(rows, hidden_ND, latent_Nr, [w2_Vr])
    loss.backward()
    norm = sum(float(x.grad.float().norm()) for x in (hidden_ND, latent_Nr, w2_Vr) if x.grad is not None)
    return {
        "way": way,
        "device": device.type,
        "peak_gb": round(peak_gb(device), 2),
        "inputs_gb": round(before, 2),
        "seconds": round(time.perf_counter() - started, 1),
        "loss": round(loss.item(), 5),
        "gradient_norm": round(norm, 6),
    }


def peak_gb(device: torch.device) -> float:
    """The most memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", nargs="+", default=["chunked"], choices=["chunked", "plain"])
    for name, value in {"slots": 3584, "vocabulary": 151_936, "hidden": 2560, "rank": 256, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
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
