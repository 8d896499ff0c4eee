"""What a JSON schema costs: tokens a second with a grammar and without, drafts on and off, all ways taking turns.

    python benchmarks/structured_output.py --users 1

A schema changes the text, and with it what is accepted; τ is told beside the speed.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from dspark.common.collector import freeze_startup
from dspark.common.grammar import Grammar
from dspark.common.sampling_params import SamplingParams
from dspark.demo.pair import demo_drafter_path, demo_target_path
from dspark.engine.llm import LLM

PROMPT = "# What a function is called, and its code, as JSON.\nanswer = "
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "code": {"type": "string", "minLength": 2000}},
    "required": ["code", "name"],
    "additionalProperties": False,
}  # the code outlasts every text, so that all are equally long


def main() -> None:
    """Median tokens a second and τ of each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1, help="texts at once")
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--planner", default="full", help="full drafts always")
    parser.add_argument("--temperature", type=float, default=0.0)
    asked = parser.parse_args()
    llm = LLM(demo_target_path(), demo_drafter_path(), asked.planner, max_running=asked.users)
    llm.core.wait_compiled()
    ways = {
        f"{form}, drafts {drafts}": SamplingParams(
            max_tokens=asked.tokens,
            temperature=asked.temperature,
            ignore_eos=form == "free",
            grammar=Grammar.json_schema(SCHEMA) if form == "schema" else None,
            speculation=None if drafts == "on" else "off",
        )
        for drafts in ("on", "off")
        for form in ("free", "schema")
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    taus: dict[str, list[float]] = {name: [] for name in ways}
    freeze_startup()
    for number in range(asked.rounds + 1):  # the first is to warm up
        for name, params in ways.items():
            began = time.perf_counter()
            results = llm.generate([PROMPT] * asked.users, params)
            seconds = time.perf_counter() - began
            if number:
                speeds[name].append(sum(len(one.token_ids) for one in results) / seconds)
                taus[name].append(sum(one.statistics.tokens_per_round for one in results) / asked.users)
    for name in ways:
        print(f"{name:<20}{median(speeds[name]):8.0f} tokens/s   τ {median(taus[name]):.2f}")
    for drafts in ("on", "off"):
        pairs = zip(speeds[f"schema, drafts {drafts}"], speeds[f"free, drafts {drafts}"], strict=True)
        print(f"schema over free, drafts {drafts}: {median(mine / own for mine, own in pairs):.3f}")


if __name__ == "__main__":
    main()
