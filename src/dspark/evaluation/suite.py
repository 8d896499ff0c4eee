"""Evaluates any number of drafters on any number of sets: every way of decoding takes its turn on every batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, median
from time import perf_counter
from typing import Any

from dspark.common.errors import UserError
from dspark.common.provenance import provenance
from dspark.common.sampling_params import SamplingParams
from dspark.drafters import checkpoint
from dspark.drafters.config import kind_of
from dspark.drafters.registry import fetch, load_drafter
from dspark.engine.build import build_engine
from dspark.engine.step import EngineCore
from dspark.evaluation.acceptance import Measured, acceptance
from dspark.evaluation.conversations import Transcript, converse, joined
from dspark.evaluation.prompts import Turns
from dspark.evaluation.reliability import by_position, threshold_sweep
from dspark.evaluation.tasks import Conversations
from dspark.models.target import Target

PLAIN = "plain"
PAGE = 16


@dataclass(frozen=True)
class EvaluationSettings:
    """What is compared, and how. A drafter is `source` or `label=source`."""

    target: str
    drafters: tuple[str, ...]
    planner: str = "full"
    gammas: tuple[int, ...] = ()  # (): each drafter's own block size
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    batch: int = 8
    rounds: int = 3
    thinking: bool = False
    compile: bool = True
    dtype: str = "auto"
    device: str = "auto"


@dataclass
class Contestant:
    """One way to decode, and what it did on the task at hand."""

    name: str
    core: EngineCore
    about: dict[str, Any]
    parts: list[Measured] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # by round
    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    step_seconds: float = 0.0

    def clear(self, rounds: int) -> None:
        """Before another task."""
        self.parts, self.tokens, self.seconds = [], [0] * rounds, [0.0] * rounds
        self.steps, self.step_seconds = 0, 0.0

    def run(self, number: int, batch: Sequence[Turns], params: SamplingParams, thinking: bool) -> int:
        """One batch in round `number`, against the clock; returns how many turns were left out."""
        self.core.forget_prefixes()
        timings, before = self.core.timings, (self.core.timings.steps, self.core.timings.total)
        started = perf_counter()
        measured, left_out = converse(self.core, batch, params, thinking=thinking)
        self.seconds[number] += perf_counter() - started
        self.tokens[number] += sum(map(len, measured.texts))
        self.steps += timings.steps - before[0]
        self.step_seconds += timings.total - before[1]
        self.parts.append(measured)
        return left_out

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of every round."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]


def sources(settings: EvaluationSettings) -> dict[str, str]:
    """Label to source. A source without a label is called by as much of its path as tells it from the others."""
    pairs = [text.partition("=") for text in settings.drafters]
    bare = [source if equals else label for label, equals, source in pairs]
    labels = []
    for (label, equals, _), source in zip(pairs, bare, strict=True):
        parts = source.rstrip("/").split("/")
        sizes = range(1, len(parts) + 1)
        ends = ("/".join(parts[-size:]) for size in sizes)
        own = next((end for end in ends if sum(one.rstrip("/").endswith(end) for one in bare) == 1), source)
        labels.append(label if equals else own)
    for label in labels:
        if labels.count(label) > 1 or label in ("", PLAIN):
            raise UserError(
                f"drafter label {label!r} is empty or taken; pass --drafter OTHER={bare[labels.index(label)]}"
            )
    return dict(zip(labels, bare, strict=True))


def contestants(settings: EvaluationSettings, target: Target, pages: int) -> list[Contestant]:
    """Plain decoding first, then every drafter at every γ, each with an engine of its own around one target."""

    def engine(drafter: Any, planner: str) -> EngineCore:
        return build_engine(
            target, drafter, planner, max_running=settings.batch, pages=pages, page_size=PAGE, compile=settings.compile
        )

    made = [Contestant(PLAIN, engine(None, "none"), {"name": PLAIN})]
    for label, source in sources(settings).items():
        for gamma in settings.gammas or (None,):
            drafter = load_drafter(source, target, block_size=gamma)
            name = label if gamma is None else f"{label} γ={gamma}"
            about = {"name": name, "label": label, "source": source, "gamma": drafter.block_size} | shape_of(source)
            made.append(Contestant(name, engine(drafter, settings.planner), about))
    return made


def shape_of(source: str) -> dict[str, Any]:
    """Kind and depth of a drafter, as its config.json says."""
    if source == "ngram":
        return {"kind": "ngram", "layers": None}
    raw = checkpoint.read_config(fetch(source))
    kind = kind_of(raw)
    layers = raw.get("draft_num_hidden_layers", 1) if kind == "eagle3" else raw.get("num_hidden_layers")
    return {"kind": kind or "draft_model", "layers": layers}


def pages_for(target: Target, tasks: Sequence[Conversations], settings: EvaluationSettings, tokenizer: Any) -> int:
    """Pages that a batch of the longest conversation fills: engines side by side must not each take all memory.

    Raises UserError for a task of which nothing fits the context.
    """
    longest = 0
    for task in tasks:
        sizes = []
        for turns in task.turns:
            said = Transcript(turns, [""] * (len(turns) - 1)).prompt(tokenizer, settings.thinking)
            longest = max(longest, len(said) + len(turns) * settings.max_tokens)
            sizes.append(len(Transcript(turns).prompt(tokenizer, settings.thinking)))
        if min(sizes) >= target.context_limit:
            raise UserError(f"no turn of {task.name} fits the context of {target.context_limit}; leave the task out")
    return 1 + settings.batch * (1 + -(-min(longest, target.context_limit) // PAGE))


def evaluate(
    settings: EvaluationSettings, target: Target, tasks: Sequence[Conversations], made: Sequence[Contestant]
) -> Iterator[dict[str, Any] | None]:
    """Yields None after every batch, and at last everything that was measured."""
    params = SamplingParams(
        max_tokens=settings.max_tokens, temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed
    )
    results = {}
    for task in tasks:
        batches = [task.turns[i : i + settings.batch] for i in range(0, len(task.turns), settings.batch)]
        left_out = {one.name: 0 for one in made}
        for one in made:  # a warm-up, and the rest of the task's rounds start even
            converse(one.core, batches[0], params, thinking=settings.thinking)
            one.clear(settings.rounds)
            yield None
        for number in range(settings.rounds):
            for batch in batches:
                for one in made:
                    left_out[one.name] += one.run(number, batch, params, settings.thinking)
                    yield None
        results[task.name] = {
            "conversations": len(task.turns),
            "turns": sum(map(len, task.turns)),
            "ways": {one.name: numbers(one, made[0]) | {"turns_left_out": left_out[one.name]} for one in made},
        }
    yield {
        "settings": asdict(settings),
        "where": provenance(target.device),
        "drafters": [one.about for one in made[1:]],
        "tasks": results,
        "average": {one.name: average(one.name, results) for one in made},
    }


def numbers(one: Contestant, plain: Contestant) -> dict[str, Any]:
    """What one way of decoding did on one task; speeds are medians over rounds, the speed-up of pairs of one round."""
    measured = joined(one.parts)
    ratios = [own / other for own, other in zip(one.speeds, plain.speeds, strict=True)]
    found = {
        "tokens": sum(one.tokens),
        "tokens_per_second": median(one.speeds),
        "speed_up": median(ratios),
        "speed_ups": ratios,
        "step_ms": 1e3 * one.step_seconds / one.steps,
    }
    found |= acceptance(measured.statistics)
    if measured.records:
        found |= {
            "reliability": by_position(measured.records),
            "thresholds": threshold_sweep(measured.records, undrafted=measured.undrafted),
        }
    return found


def average(name: str, results: dict[str, Any]) -> dict[str, float | None]:
    """Means over the tasks, each counted alike."""
    rows = [task["ways"][name] for task in results.values()]
    return {
        field: mean(row[field] for row in rows) if all(row[field] is not None for row in rows) else None
        for field in ("tau", "acceptance_rate", "tokens_per_second", "speed_up")
    }
