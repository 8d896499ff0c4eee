"""With a drafter that is always right the 155 M model runs >= 4 x plain at one stream, >= 1.5 x in total at 8.

python benchmarks/ceiling.py [--dtype bf16] [--layers 1] [--streams 1 8] [--tokens 128] [--rounds 5] [--json FILE]

The drafter is a DSpark of the real size (target's width, 7 slots, rank 256) and pays its whole forward and its
sequential head; then its tokens are replaced by the known greedy continuation. Temperature 0, through EngineCore, plain
and speculative in turns, time after the prefill. The texts are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence

import torch
import workload
from torch import Tensor

from dspark.drafters.base import Draft, DraftContext, Drafter
from dspark.engine.step import EngineCore
from dspark.models.batch import Ragged
from dspark.models.compiled import SwappableGraph


class Oracle:
    """Pays for `drafter`'s block and answers with what the target will say."""

    def __init__(self, drafter: Drafter, vocabulary: int):
        self.drafter, self.vocabulary = drafter, vocabulary
        self.block_size, self.taps = drafter.block_size, drafter.taps
        self.truth: dict[tuple[int, ...], list[int]] = {}  # whole texts by their first tokens

    def know(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
        """Learn what follows each prompt; prompts differ in their first tokens."""
        padding = [0] * self.block_size
        self.truth = {tuple(p[:8]): [*p, *a, *padding] for p, a in zip(prompts, answers, strict=True)}
        assert len(self.truth) == len(prompts), "two prompts begin alike"

    def allocate(self, pages: int, page_size: int) -> None:
        self.drafter.allocate(pages, page_size)

    def compile_forwards(self) -> Sequence[SwappableGraph]:
        return self.drafter.compile_forwards()

    def extend(self, batch: Ragged, taps_TD: Tensor | None) -> None:
        self.drafter.extend(batch, taps_TD)

    @torch.inference_mode()
    def propose(self, context: DraftContext) -> Draft:
        draft = self.drafter.propose(context)
        slots = draft.token_RK.shape[1]
        true = [self.truth[tuple(tokens[:8])][len(tokens) : len(tokens) + slots] for tokens in context.history]
        token_RK = torch.tensor(true)
        law_RKV = draft.probability_RKV.zero_().scatter_(2, token_RK[..., None], 1.0)
        return dataclasses.replace(draft, token_RK=token_RK, probability_RKV=law_RKV)


def totals(core: EngineCore) -> tuple[float, ...]:
    """Steps, seconds in target, drafter and outside both, tokens and rounds so far."""
    t, s = core.timings, core.statistics
    return t.steps, t.target, t.drafter, t.outside, s.committed, s.rounds


def measure(plain: EngineCore, spec: EngineCore, oracle: Oracle, streams: int, tokens: int, rounds: int) -> dict:
    """One row of the table."""
    prompts = workload.prompts(streams)
    _, answers = workload.decode(plain, prompts, tokens)
    oracle.know(prompts, answers)
    _, first = workload.decode(spec, prompts, tokens)  # warms up
    before = totals(spec)
    seconds = workload.interleaved(
        {
            "plain": lambda: workload.decode(plain, prompts, tokens)[0],
            "dspark": lambda: workload.decode(spec, prompts, tokens)[0],
        },
        rounds,
    )
    steps, target, drafter, outside, committed, turns = (b - a for a, b in zip(before, totals(spec), strict=True))
    ratio, low, high = workload.ratios(seconds["plain"], seconds["dspark"])
    made = streams * tokens
    return {
        "streams": streams,
        "plain tok/s": made / statistics.median(seconds["plain"]),
        "dspark tok/s": made / statistics.median(seconds["dspark"]),
        "ratio": ratio,
        "q1..q3": f"{low:.2f}..{high:.2f}",
        "tau": committed / turns,
        "same text": "yes" if first == answers else "no",
        "target ms": 1e3 * target / steps,
        "drafter ms": 1e3 * drafter / steps,
        "outside ms": 1e3 * outside / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=list(workload.DTYPES), default="bf16")
    parser.add_argument("--layers", type=int, default=1, help="of the drafter")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    target = workload.random_target(arguments.dtype)
    oracle = Oracle(workload.random_drafter(target, arguments.layers), target.vocab_size)
    plain, spec = workload.engine(target, pages=600), workload.engine(target, oracle, pages=600)
    rows = [measure(plain, spec, oracle, n, arguments.tokens, arguments.rounds) for n in arguments.streams]
    workload.report([{"layers": arguments.layers, **row} for row in rows], arguments.json)


if __name__ == "__main__":
    main()
