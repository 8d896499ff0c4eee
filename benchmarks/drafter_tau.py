"""τ and acceptance by position of the demo pair on Python files the target never saw, by temperature.

python benchmarks/drafter_tau.py [--target DIR] [--drafter DIR] [--domain code|prose] [--prompts 64] [--tokens 128]

Prompts are the 24..72 tokens before random lines of the held-out files (listed in the target's held_out.json, read back
by content) and the files' own beginnings, half and half; prose is described in `dspark.demo.domains`. τ counts
committed tokens per round, the bonus included; a position's acceptance is given that those before it were accepted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from dspark.common.sampling_params import SamplingParams
from dspark.demo.domains import DOMAINS
from dspark.demo.pair import demo_drafter_path, demo_target_path
from dspark.drafters.registry import load_drafter
from dspark.engine.llm import LLM
from dspark.models.loading import load_tokenizer
from dspark.models.target import Target
from dspark.speculation.statistics import total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=Path, default=None)
    parser.add_argument("--drafter", default=None)
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="code")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7, 1.0])
    parser.add_argument("--markov-top-k", type=int, default=None)
    options = parser.parse_args()
    directory = options.target or demo_target_path()
    target = Target.load(directory)
    drafter = load_drafter(options.drafter or demo_drafter_path(), target, markov_top_k=options.markov_top_k)
    llm = LLM(target, drafter=drafter, planner="full", compile=False)
    prompts = DOMAINS[options.domain](load_tokenizer(directory), directory, options.prompts, 0)
    for temperature in options.temperatures:
        results = llm.generate(prompts, SamplingParams(temperature=temperature, max_tokens=options.tokens))
        statistics = [result.statistics for result in results]
        whole = total(statistics)
        each = np.array([s.committed / s.rounds for s in statistics])
        line = {
            "temperature": temperature,
            "prompts": len(prompts),
            "tau": round(whole.tokens_per_round, 3),
            "tau_quartiles": np.quantile(each, [0.25, 0.5, 0.75]).round(2).tolist(),
            "acceptance": [share and round(share, 3) for share in whole.conditional_acceptance],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
