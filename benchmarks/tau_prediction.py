"""The τ that an evaluation in training predicts, beside the τ that the engine measures, on the demo pair.

    python benchmarks/tau_prediction.py [--prompts 64] [--tokens 192]

The engine continues held-out prompts at temperature 1, rejection rule, full plan. The evaluation of
`dspark.training.loop` then reads text the target wrote alone, without a drafter, from other prompts: what a run's
held-out data is. `--same` lets it read the very text the engine committed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from drafter_tau import prompts_of

from dspark.common.sampling_params import SamplingParams
from dspark.demo.pair import demo_drafter_path, demo_target_path
from dspark.drafters import checkpoint
from dspark.drafters.registry import load_drafter
from dspark.engine.llm import LLM
from dspark.models.target import Target
from dspark.training.config import DrafterShape, TrainConfig
from dspark.training.data import write_documents
from dspark.training.loop import Trainer


def shape_of(directory: Path) -> DrafterShape:
    """What a recipe would say of a drafter that is there."""
    raw = checkpoint.read_config(directory)
    return DrafterShape(
        layers=raw["num_hidden_layers"],
        block_size=raw["block_size"],
        taps=tuple(raw["target_layer_ids"]),
        mask_token_id=raw["mask_token_id"],
        markov_rank=raw["markov_rank"],
        markov_head_type=raw["markov_head_type"],
        intermediate_size=raw["intermediate_size"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--same", action="store_true")
    options = parser.parse_args()
    target = Target.load(demo_target_path())
    params = SamplingParams(temperature=1.0, max_tokens=options.tokens, ignore_eos=True)

    def texts(drafter: object, seed: int) -> tuple[list, list]:
        llm = LLM(target, drafter, "full", compile=False)
        prompts = prompts_of(demo_target_path(), options.prompts, seed=seed)
        return prompts, llm.generate(prompts, params)

    prompts, results = texts(load_drafter(demo_drafter_path(), target), options.seed)
    statistics = [result.statistics for result in results]
    tau = sum(s.committed for s in statistics) / sum(s.rounds for s in statistics)
    reached, accepted = (
        np.array([getattr(s, name) for s in statistics]).sum(0) for name in ("reached_at", "accepted_at")
    )
    if not options.same:
        prompts, results = texts(None, options.seed + 1)
    documents = [
        ([*prompt, *result.token_ids], [0] * len(prompt) + [1] * len(result.token_ids))
        for prompt, result in zip(prompts, results, strict=True)
    ]
    with tempfile.TemporaryDirectory() as directory:
        write_documents(Path(directory, "held_out"), documents, vocabulary=target.vocab_size)
        data = str(Path(directory, "held_out"))
        config = TrainConfig(
            target=str(demo_target_path()),
            train=data,
            held_out=data,
            drafter=shape_of(demo_drafter_path()),
            init=str(demo_drafter_path()),
            length=1024,
            precision="bfloat16",
            evaluate_sequences=len(documents),
            device="cpu",
        )
        found = Trainer(config, Path(directory, "run")).evaluate()
    line = {"engine": round(tau, 3), "predicted": round(found["tau"], 3), "ratio": round(found["tau"] / tau, 4)}
    line |= {"engine_acceptance": (accepted / np.maximum(reached, 1)).round(3).tolist()}
    print(json.dumps(line | {"predicted_acceptance": found["acceptance"]}))


if __name__ == "__main__":
    main()
