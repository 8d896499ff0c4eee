"""Bytes a token of kept features, and what rounding them costs: τ of drafters trained on each, and of one that is read.

python benchmarks/feature_bytes.py --out DIR --train DATA --held-out DATA [--steps 150] [--seeds 1 2]
    [--formats online bfloat16 float8] [--report]

The demo target and the demo drafter's shape, by the demo's recipe, `--steps` long, from the same start and in the same
order for every format; τ on held-out text with the target's own features, as the engine will meet them. `published` is
bfloat16 for every tap and the last hidden state at every token. A run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from dspark.demo.pair import demo_drafter_path, demo_target_path
from dspark.drafters import checkpoint
from dspark.drafters.vocab import TargetParts
from dspark.models.loading import load_causal_lm
from dspark.training.config import TrainConfig, load_config
from dspark.training.data import Documents
from dspark.training.features import CachedFeatures, OnlineTarget
from dspark.training.features.encoding import Encoding
from dspark.training.features.modes import piece_bytes
from dspark.training.features.store import MemoryStore, read_index
from dspark.training.forward import goal
from dspark.training.loop import Trainer
from dspark.training.metrics import combine, measure, readable

RECIPE = Path(__file__).parents[1] / "recipes" / "demo_drafter.yaml"


def config_of(args: argparse.Namespace, kind: str, seed: int) -> TrainConfig:
    """The demo's recipe with these features."""
    kept = {"mode": "hybrid", "directory": str(args.out / kind), "format": kind}
    places = {"target": str(demo_target_path()), "train": str(args.train), "held_out": str(args.held_out)}
    often = {"log_every": 10, "save_every": 50, "evaluate_every": args.steps, "threads": args.threads}
    return load_config(
        RECIPE, features={} if kind == "online" else kept, steps=args.steps, seed=seed, **places, **often
    )


def train(args: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    """The last evaluation of a run, which is trained first where that was not done."""
    out = args.out / f"{kind}-{seed}"
    log = out / "log.jsonl"
    if not args.report:
        trainer = Trainer(config_of(args, kind, seed), out)
        if not trainer.finished:
            trainer.run()
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return next(line for line in reversed(lines) if line.get("evaluation"))


@torch.no_grad()
def read_by_the_demo(args: argparse.Namespace, kind: str) -> float:
    """Expected τ of the embedded drafter over held-out blocks when it reads features of this format."""
    model = load_causal_lm(demo_target_path(), dtype="bfloat16", device="cpu")
    drafter, _ = checkpoint.load(demo_drafter_path(), TargetParts.of(model), dtype=torch.float32)
    target, data = OnlineTarget(model, drafter.taps), Documents(args.held_out, 256)
    source: OnlineTarget | CachedFeatures = target
    if kind != "online":
        source = CachedFeatures(target, MemoryStore(), encoding_of(target, kind))
    config = config_of(args, kind, 1)
    options: dict[str, Any] = {"weights": config.loss, "precision": "bfloat16", "anchors": 64}
    parts = [measure([goal(drafter, source, data.batch([row]), **options)]) for row in data.spread(64)]  # type: ignore[arg-type]
    return readable(combine(parts))["tau"]


def encoding_of(target: OnlineTarget, kind: str) -> Encoding:
    return Encoding(kind, len(target.taps) * target.hidden, target.hidden)


def bytes_per_token(args: argparse.Namespace, kind: str) -> float:
    """What the training text takes, kept whole, with its index on disk where there is one."""
    if kind == "online":
        return 0.0
    shards = list((args.out / kind).glob("*.shard"))
    data = Documents(args.train, 256)
    tokens = sum(end - start for start, end in data.pieces)
    model = load_causal_lm(demo_target_path(), dtype="bfloat16", device="cpu")
    encoding = encoding_of(OnlineTarget(model, config_of(args, kind, 1).drafter.taps), kind)
    whole, index = float(piece_bytes(data, encoding).sum()), 0
    if shards:
        index = sum(len(path.read_bytes()) for path in shards) - kept_bytes(shards)
    return (whole + index) / tokens


def kept_bytes(shards: list[Path]) -> int:
    """Bytes of pieces alone."""
    return sum(place.end - place.begin for path in shards for place in read_index(path).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--formats", nargs="+", default=["online", "float8"])
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    hidden, taps = 256, len(load_config(RECIPE).drafter.taps)
    print(json.dumps({"published_bytes": (taps + 1) * hidden * 2}))
    for seed in args.seeds:
        for kind in args.formats:
            found = train(args, kind, seed)
            line = {"format": kind, "seed": seed, "tau": found["tau"], "loss": found["loss"], "steps": found["step"]}
            print(json.dumps(line), flush=True)
    for kind in args.formats:
        line = {"format": kind, "bytes_per_token": round(bytes_per_token(args, kind), 1)}
        print(json.dumps(line | {"tau_of_the_demo_drafter": round(read_by_the_demo(args, kind), 4)}), flush=True)


if __name__ == "__main__":
    main()
