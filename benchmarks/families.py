"""DSpark, DFlash and Eagle-3 trained alike for the demo target, and what each is worth on text nobody was trained on.

python benchmarks/families.py --out DIR [--target DIR] [--train DIR --held-out DIR | --corpus train.npy] [--steps N]

One command, one thread, resumable at any moment: it writes training text with the target where none is given, at
temperature 1 as it is measured, trains every run of `RUNS` by recipe with the same data, steps, batches and taps, lets
the engine write both domains of `dspark.demo.domains` at temperature 1, and reports what is there so far in
DIR/report.md, DIR/*.png and DIR/families.json. `--only NAME...` trains those runs alone, `--report` none. Two of them
at once with different NAMEs share the features and use two cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families_report import write_report
from transformers import AutoConfig

from dspark.common.files import replacing_file
from dspark.common.log import quiet_libraries
from dspark.common.provenance import provenance
from dspark.common.sampling_params import SamplingParams
from dspark.demo import selfplay
from dspark.demo.corpus import held_out_texts
from dspark.demo.domains import DOMAINS, listing
from dspark.demo.pair import demo_target_path
from dspark.drafters.registry import load_drafter
from dspark.engine.build import build_engine
from dspark.evaluation.acceptance import acceptance, measure
from dspark.evaluation.reliability import by_position, threshold_sweep
from dspark.models.loading import load_tokenizer
from dspark.models.target import Target
from dspark.training.config import TrainConfig, build
from dspark.training.loop import Trainer

TRAINED, RESULT = "trained.json", "result.json"
SEEDS = (1, 2, 3)
SHAPES: dict[str, dict[str, Any]] = {  # the losses are each kind's own, as published
    "dspark": {"drafter": {"kind": "dspark", "markov_rank": 128}},
    "dflash": {"drafter": {"kind": "dflash"}},
    "eagle3": {"drafter": {"kind": "eagle3", "every_position": True}},  # as published: more labels than the others
    # DFlash with DSpark's loss: what of the gain is the loss, what the sequential head
    "dflash_l1": {
        "drafter": {"kind": "dflash"},
        "loss": {"cross_entropy": 0.1, "l1": 0.9, "confidence": 0.0},
    },
}


@dataclass(frozen=True)
class Run:
    """One drafter to train."""

    family: str
    layers: int = 2
    gamma: int = 7
    seed: int = 1
    long: bool = False  # LONG times the steps of the others

    @property
    def name(self) -> str:
        return f"{self.family}-{self.layers}layers-gamma{self.gamma}-seed{self.seed}" + "-long" * self.long


LONG = 4
PAIR = ("dspark", "dflash")
RUNS = (  # in the order in which a report gains most
    *(Run(family, long=True) for family in PAIR),
    Run("eagle3", layers=1, long=True),
    Run("dflash", layers=5, long=True),
    *(Run(family, gamma=gamma, long=True) for gamma in (16, 4) for family in PAIR),
    *(Run(family, seed=seed, long=True) for seed in SEEDS[1:] for family in PAIR),
    *(Run("eagle3", layers=1, seed=seed, long=True) for seed in SEEDS[1:]),
    *(Run("dflash", layers=5, seed=seed, long=True) for seed in SEEDS[1:]),
    *(Run(family) for family in PAIR),  # a quarter of the steps: where the curves go
    Run("eagle3", layers=1),
    Run("dflash", layers=5),
    Run("dspark", layers=5, long=True),
    Run("dflash_l1", long=True),
    *(Run(family, layers=1, long=True) for family in PAIR),
    *(Run(family, gamma=10, long=True) for family in PAIR),
)


def recipe(run: Run, options: argparse.Namespace, taps: list[int]) -> TrainConfig:
    """The same for every run but for what the family is."""
    own = SHAPES[run.family]
    shape = {"block_size": run.gamma, "taps": taps} | own["drafter"]
    if run.family != "eagle3":
        shape |= {"layers": run.layers, "mask_token_id": 1}
    fields = {
        "target": str(options.target),
        "train": str(options.train),
        "held_out": str(options.held_out),
        "drafter": shape,
        "loss": own.get("loss", {}),
        "start": options.start,
        "steps": options.steps * (LONG if run.long else 1),
        "batch": 8,
        "micro_batch": 4,
        "length": 256,
        "anchors": 32,
        "optimizer": "muon",
        "lr": 2.0e-3,
        "muon_lr": 0.01,
        "precision": "float32",  # 0.66 s of processor a step of DSpark against 1.08 in bfloat16, on AVX512-BF16
        "device": "cpu",
        "threads": 1,
        "seed": run.seed,
        "features": {"mode": "hybrid", "directory": str(options.out / "features")},  # the same for every run
        "log_every": 20,
        "save_every": 100,
        "evaluate_every": 10**9,  # at the end alone
        "evaluate_sequences": 32,
    }
    return build(TrainConfig, fields, run.name)


def write_text(options: argparse.Namespace) -> None:
    """Training and held-out text by the target itself, where it is not there yet."""
    for name, tokens, seed in (("train", options.tokens, 1), ("held_out", 24_000, 2)):
        where = getattr(options, name)
        if (where / "tokens.npy").is_file():
            continue
        corpus = options.corpus if name == "train" else held_out_stream(options)
        arguments = {"--target": options.target, "--corpus": corpus, "--out": where, "--tokens": tokens, "--seed": seed}
        arguments["--temperature"] = 1
        if selfplay.main([str(word) for pair in arguments.items() for word in pair]):
            raise SystemExit(2)


def held_out_stream(options: argparse.Namespace) -> Path:
    """The target's held-out files as one stream of tokens, each behind an end token."""
    tokenizer, path = load_tokenizer(options.target), options.out / "held_out.npy"
    end = tokenizer.eos_token_id
    texts = [text for _, text in held_out_texts(listing(options.target))]
    ids = [token for text in texts for token in (end, *(t for t in tokenizer(text)["input_ids"] if t != end))]
    np.save(path, np.asarray(ids, dtype=np.uint16))
    return path


def prompts_of(options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """The domains' prompts, drawn once: packages installed later must not change a run half way."""
    path, tokenizer = options.out / "prompts.json", load_tokenizer(options.target)
    if not path.is_file():
        drawn = {name: make(tokenizer, options.target, options.prompts, 0) for name, make in DOMAINS.items()}
        write_json(path, drawn)
    return json.loads(path.read_text(encoding="utf-8"))


def evaluate(run: Run, options: argparse.Namespace, target: Target, export: Path) -> dict[str, Any]:
    """τ, acceptance and reliability in each domain, and seconds of processor time a round costs."""
    drafter = load_drafter(export, target)
    results = {}
    for domain, prompts in prompts_of(options).items():
        core = build_engine(target, drafter, "full", max_running=16, prefix_caching=False, compile=False, seed=run.seed)
        core.runner.clock = time.thread_time  # one thread: what it costs, however busy the machine is
        measured = measure(core, prompts, SamplingParams(max_tokens=options.new_tokens, ignore_eos=True))
        times = {"target": core.timings.target, "drafter": core.timings.drafter, "total": core.timings.total}
        results[domain] = acceptance(measured.statistics) | {
            "tokens": sum(map(len, measured.texts)),
            "steps": core.timings.steps,
            "seconds": times,
            "reliability": by_position(measured.records),
            "thresholds": threshold_sweep(measured.records, undrafted=measured.undrafted),
        }
    return results


def train(run: Run, options: argparse.Namespace, taps: list[int]) -> None:
    """Train, or go on; trained.json comes last."""
    out = options.out / "runs" / run.name
    if (out / TRAINED).is_file():
        return
    started = time.process_time()
    trainer = Trainer(recipe(run, options, taps), out)
    resumed = trainer.step_number
    trainer.run()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = {
        "family": run.family,
        "layers": run.layers,
        "gamma": run.gamma,
        "seed": run.seed,
        "steps": trainer.steps,
        "long": run.long,
        "parameters": sum(p.numel() for p in trainer.parameters),
        "training": {"cpu_seconds": time.process_time() - started, "resumed_at": resumed, "ended": time.ctime()},
        "predicted": next(line for line in reversed(log) if line.get("evaluation")),
        "where": provenance(torch.device("cpu")),
    }
    write_json(out / TRAINED, facts)
    for name in ("checkpoints", "best"):  # one evaluation, so the last is the best
        shutil.rmtree(out / name, ignore_errors=True)


def judge(run: Run, options: argparse.Namespace, target: Target) -> None:
    """Evaluate a trained run; result.json comes last, and a run that has it is finished."""
    out = options.out / "runs" / run.name
    if not (out / RESULT).is_file():
        facts = json.loads((out / TRAINED).read_text(encoding="utf-8"))
        domains = evaluate(run, options, target, out / "export")
        write_json(out / RESULT, facts | {"domains": domains})
        print(run.name, {name: round(found["tau"], 3) for name, found in domains.items()}, flush=True)


def write_json(path: Path, value: object) -> None:
    with replacing_file(path) as fresh:
        fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", type=Path, default=demo_target_path())
    parser.add_argument("--train", type=Path, help="text the target wrote; default: DIR/data/train, written first")
    parser.add_argument("--held-out", type=Path, help="as --train, for the held-out prediction")
    parser.add_argument("--corpus", type=Path, help=".npy of the target's corpus, to write the training text from")
    parser.add_argument("--tokens", type=int, default=500_000, help="of training text to write")
    parser.add_argument("--steps", type=int, default=100, help="of a run; LONG times as many of a long one")
    parser.add_argument("--start", default="target", help="target: from copies of its layers; random")
    parser.add_argument("--prompts", type=int, default=48, help="in each domain")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--only", nargs="+", help="names of runs, or beginnings of names")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    options.train = options.train or options.out / "data" / "train"
    options.held_out = options.held_out or options.out / "data" / "held_out"
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    quiet_libraries()
    if not options.report:
        target = Target.load(options.target, device="cpu")
        write_text(options)
        layers = AutoConfig.from_pretrained(options.target).num_hidden_layers
        taps = [layers * (i + 1) // 4 - 1 for i in range(4)]  # 12 layers: 2, 5, 8, 11, as the demo's drafter
        for run in RUNS:
            if options.only is None or any(run.name.startswith(name) for name in options.only):
                train(run, options, taps)
                judge(run, options, target)
                gc.collect()
    write_report(options.out)


if __name__ == "__main__":
    main()
