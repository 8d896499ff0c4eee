"""τ as training predicts it against τ as the engine measures it, on text the target writes at temperature 1.

python benchmarks/predicted_tau.py RECIPE RUN [--sequences 32]

RUN is the directory of a finished run of RECIPE. The supervised part of every held-out document is written again by the
target, plainly, at temperature 1; training's own evaluation predicts τ on that text, and the engine answers the same
prompts with the exported drafter and other seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from dspark.common.sampling_params import SamplingParams
from dspark.drafters.registry import load_drafter
from dspark.engine.llm import LLM
from dspark.models.target import Target
from dspark.training.config import load_config
from dspark.training.data import Documents, write_documents
from dspark.training.loop import Trainer


def prompts_of(data: Documents, rows: int) -> tuple[list[list[int]], list[int]]:
    """What precedes the first supervised token of each document, and how many tokens follow."""
    prompts, lengths = [], []
    for row in data.spread(rows):
        batch = data.batch([row])
        token_S, mask_S, start_S = batch.token_BS[0], batch.mask_BS[0], batch.start_BS[0]
        for begin in start_S.unique().tolist():
            tokens, mask = token_S[start_S == begin], mask_S[start_S == begin]
            if mask.any():
                first = max(int(mask.nonzero()[0]), 1)
                prompts.append(tokens[:first].tolist())
                lengths.append(int(mask[first:].sum()))
    return prompts, lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--sequences", type=int, default=32)
    options = parser.parse_args()
    config = dataclasses.replace(load_config(options.recipe), precision="float32")
    prompts, lengths = prompts_of(Documents(config.held_out, config.length), options.sequences)
    params = [SamplingParams(max_tokens=n, temperature=1.0) for n in lengths]
    target = Target.load(config.target, dtype="float32")
    plain = LLM(target, None, "none", compile=False, seed=7).generate(prompts, params)
    texts = [
        ([*prompt, *result.token_ids], [0] * len(prompt) + [1] * len(result.token_ids))
        for prompt, result in zip(prompts, plain, strict=True)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        own, export = str(Path(scratch, "text")), str(options.run / "export")
        write_documents(own, texts, vocabulary=target.vocab_size)
        told = {"init": export, "train": own, "held_out": own, "evaluate_sequences": len(texts)}
        predicted = Trainer(dataclasses.replace(config, **told), Path(scratch, "run")).evaluate()["tau"]
        drafter = load_drafter(export, target, block_size=config.drafter.block_size)
        results = LLM(target, drafter, "full", compile=False, seed=1).generate(prompts, params)
    committed, rounds = (sum(getattr(r.statistics, name) for r in results) for name in ("committed", "rounds"))
    line = {"kind": config.drafter.kind, "predicted": predicted, "measured": committed / rounds, "rounds": rounds}
    print(json.dumps({**line, "ratio": line["measured"] / predicted}))


if __name__ == "__main__":
    main()
