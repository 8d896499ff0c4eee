"""How soon confidences are true again after the workload turns from code to prose: bar 2.5 % within 500 rounds.

python benchmarks/online_switch.py [--prompts 800] [--tokens 48] [--temperature 1] [--replays 12] [--rounds rounds.npz]

Rounds of the demo pair on both kinds of prompts, verified in full, are recorded once (`--rounds` keeps them) and then
replayed in other orders: an online calibration that starts from the fit on code hears 1000 rounds of code, then prose.
After each count of prose rounds its weights are held against the prose prompts it never hears: ECE of the cumulative
survival, the worst position, median over replays. Beside it what chance alone would show on as many rounds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from dspark.common.provenance import provenance
from dspark.common.sampling_params import SamplingParams
from dspark.demo.domains import DOMAINS
from dspark.demo.pair import demo_drafter_path, demo_target_path
from dspark.engine.build import build_engine
from dspark.evaluation.calibrate import collect
from dspark.models.loading import load_tokenizer
from dspark.speculation.calibration import Calibration, Fit, law_of
from dspark.speculation.calibration_fit import Rounds, fit, floor, survival_scores, table
from dspark.speculation.online import OnlineCalibration
from dspark.speculation.reliability import RoundRecord
from dspark.speculation.round import Round

CODE_ROUNDS, CHECKS = 1000, (0, 50, 100, 200, 300, 500, 1000)
STREAMS = 8  # requests of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=800, help="of each kind")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--replays", type=int, default=12)
    parser.add_argument("--rounds", type=Path, help="read the rounds from here, or keep them here")
    options = parser.parse_args()
    if options.rounds is None or not options.rounds.exists():
        held = recorded(options.prompts, options.tokens, options.temperature)
        if options.rounds is not None:
            np.savez(options.rounds, **held)
    else:
        held = dict(np.load(options.rounds))
    params = SamplingParams(temperature=options.temperature, acceptance="rejection")
    code, prose = (Rounds(*(held[f"{kind}_{name}"] for name in Rounds._fields)) for kind in DOMAINS)
    sides = [code.of(code.text_N % 3 == 0), code.of(code.text_N % 3 != 0)]
    slots = code.confidence_NK.shape[1]
    offline = fit(records_of(sides[0]), slots, records_of(sides[1]))
    print(json.dumps(provenance(torch.device("cpu"))))
    runs = [replay(offline, sides[1], prose, params, seed) for seed in range(options.replays)]
    for index, check in enumerate(CHECKS):
        worst = [max(run[index][0]) for run in runs]
        row = {"prose_rounds": check, "worst_ece": round(float(np.median(worst)), 4)}
        row["ece"] = np.median([run[index][0] for run in runs], 0).round(4).tolist()
        row["chance_alone"] = np.median([run[index][1] for run in runs], 0).round(4).tolist()
        print(json.dumps(row), flush=True)
    print(json.dumps({"drifts_found": [run[-1][2] for run in runs]}))


def recorded(prompts: int, tokens: int, temperature: float) -> dict[str, np.ndarray]:
    """Rounds of both kinds as arrays, by name."""
    target = demo_target_path()
    core = build_engine(target, str(demo_drafter_path()), "full", seed=0)
    core.wait_compiled()
    tokenizer, held, law = load_tokenizer(target), {}, "sampled" if temperature else "greedy"
    for kind, make in DOMAINS.items():
        texts = make(tokenizer, target, prompts, 1)
        found = collect(core, texts, laws=[law], temperature=temperature, max_tokens=tokens)
        both = table(found.fitting[law] + found.scoring[law], core.drafter.block_size)
        held |= {f"{kind}_{name}": column for name, column in zip(Rounds._fields, both, strict=True)}
    return held


def records_of(rounds: Rounds) -> list[RoundRecord]:
    """Rounds one by one."""
    columns = zip(*(column.tolist() for column in rounds), strict=True)
    return [RoundRecord(text, tuple(c[: int(n)]), int(n), int(a)) for c, a, n, text in columns]


def replay(
    offline: Fit, code: Rounds, prose: Rounds, params: SamplingParams, seed: int
) -> list[tuple[list[float], list[float], int]]:
    """(ECE by position on unheard prose, what chance would show, drifts found) after each count of prose rounds."""
    random = np.random.default_rng(seed)
    texts = np.unique(prose.text_N)
    heard_T = random.random(len(texts)) < 0.5
    heard = np.isin(prose.text_N, texts[heard_T])
    unheard = prose.of(~heard)
    slots, law = prose.confidence_NK.shape[1], law_of(params)
    online = OnlineCalibration(Calibration(slots, {law: offline}))

    def hear(rounds: Rounds, count: int) -> None:
        order = random.permutation(len(rounds.accepted_N))[: count - count % STREAMS or STREAMS]
        for some in order.reshape(-1, STREAMS):
            drafted = rounds.drafted_N[some].astype(int).tolist()
            raw_RK = np.nan_to_num(rounds.confidence_NK[some])
            online.confidence(Round(drafted, drafted, list(range(STREAMS)), [9] * STREAMS, [params] * STREAMS), raw_RK)
            online.observe(raw_RK, drafted, rounds.accepted_N[some].astype(int).tolist())

    hear(code, CODE_ROUNDS)
    found, before = [], 0
    for check in CHECKS:
        if check > before:
            hear(prose.of(heard), check - before)
        before = check
        now = online.fit(law)
        scores = survival_scores(unheard, now)["ece"]
        found.append((scores, floor(unheard, now), online.drifts))
    return found


if __name__ == "__main__":
    main()
