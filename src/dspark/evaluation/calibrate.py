"""Collects rounds that were verified in full, fits a drafter's calibration on some prompts, scores it on the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from dspark.common.errors import UserError
from dspark.common.plots import Panel, draw
from dspark.common.provenance import provenance
from dspark.common.sampling_params import SamplingParams
from dspark.drafters.signal import Signal
from dspark.engine.step import EngineCore
from dspark.speculation.calibration import LAWS, Calibration, Fit
from dspark.speculation.calibration_fit import fit, resaid, signal
from dspark.speculation.reliability import RoundRecord

HELD_OUT = 3  # every third prompt scores the fit that the others made
SHOWN = 30  # rounds behind a point of a diagram, at least
TOGETHER = 64  # prompts asked for at once, so that progress can be shown


class Collected(NamedTuple):
    """Rounds by law; which are for fitting and which for scoring, by prompt."""

    fitting: dict[str, list[RoundRecord]]
    scoring: dict[str, list[RoundRecord]]


def collect(
    core: EngineCore,
    prompts: Sequence[str | list[int]],
    *,
    laws: Sequence[str],
    temperature: float,
    max_tokens: int,
    tick: Callable[[int], object] = lambda done: None,
) -> Collected:
    """Let the engine, whose planner must be `full`, continue every prompt under every law; `tick` gets prompts done."""
    found = Collected({law: [] for law in laws}, {law: [] for law in laws})
    done = 0
    for law in laws:
        for start in range(0, len(prompts), TOGETHER):
            some = prompts[start : start + TOGETHER]
            split: dict[int, list[RoundRecord]] = {}
            for number, prompt in enumerate(some, start):
                side = found.scoring if number % HELD_OUT == HELD_OUT - 1 else found.fitting
                split[core.add(prompt, params_of(law, temperature, max_tokens, number))] = side[law]

            def take(records: Sequence[RoundRecord], split: dict[int, list[RoundRecord]] = split) -> None:
                for record in records:
                    split[record.request_id].append(record)

            core.observer = take
            while not core.idle:
                core.step()
            core.observer = None
            done += len(some)
            tick(done)
    return found


def params_of(law: str, temperature: float, max_tokens: int, number: int) -> SamplingParams:
    """How a prompt is continued under a law."""
    if law not in LAWS:
        raise UserError(f"law {law!r} is unknown; pass some of {', '.join(LAWS)}")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if law == "greedy" else temperature,
        acceptance="coupled" if law == "coupled" else "rejection",
        seed=number,
        ignore_eos=True,
    )


def calibrate(core: EngineCore, rounds: Collected, source: dict[str, Any]) -> Calibration:
    """The calibration of the engine's drafter. Raises UserError where too few rounds reached a slot."""
    slots, weights = core.drafter.block_size, None
    before: Signal | None = getattr(core.drafter, "signal", None)
    if before is not None:
        weights = signal([one for records in rounds.fitting.values() for one in records], before.as_list())
    if weights is not None:
        rounds = Collected(
            *({law: [resaid(r, weights) for r in found] for law, found in side.items()} for side in rounds)
        )
    fits = {law: fit(rounds.fitting[law], slots, rounds.scoring[law]) for law in rounds.fitting}
    return Calibration(slots, fits, weights, source=source | {"where": provenance(core.target.device)})


def table(law: str, made: Fit) -> Table:
    """Scores of the cumulative survival by position, before and after, on the prompts that were held out."""
    before, paper, after = (made.scores[name] for name in ("before", "temperature_only_after", "after"))
    held_out = before["samples"][0]
    curve = ", with a curve on their product" if made.curve else ""
    shown = Table(title=f"{law}: {made.rounds} rounds fitted{curve}, {held_out} held out", title_justify="left")
    names = (
        "ECE before",
        "temperature alone",
        "after",
        "chance alone",
        "AUROC before",
        "after",
        "Brier before",
        "after",
        "slope",
        "shift",
    )
    for name in ("position", *names):
        shown.add_column(name, justify="right")
    for k, (slope, shift) in enumerate(zip(made.slope, made.shift, strict=True)):
        errors = [f"{100 * scores['ece'][k]:.1f} %" for scores in (before, paper, after, made.scores["floor"])]
        ranks = ["-" if scores["auroc"][k] is None else f"{scores['auroc'][k]:.3f}" for scores in (before, after)]
        briers = [f"{scores['brier'][k]:.4f}" for scores in (before, after)]
        shown.add_row(str(k + 1), *errors, *ranks, *briers, f"{slope:.2f}", f"{shift:+.2f}")
    return shown


def drawn(bins: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """The points of a curve, said and accepted, of bins [said, accepted, rounds]."""
    return [(said, accepted) for said, accepted, rounds in bins if rounds >= SHOWN]


def diagram(made: Calibration, path: Path) -> None:
    """Reliability diagrams, before and after, as a PNG: what was said against what was accepted, a curve a position.

    Points of fewer than `SHOWN` rounds are left out: one that has three is at 0, a third, two thirds or 1.
    """
    panels = []
    for law, one in made.fits.items():
        for when in ("before", "after"):
            bins = one.scores[when]["bins"]
            curves = {f"position {k + 1}": drawn(points) for k, points in enumerate(bins)}
            axes = ("survival said", "prefixes accepted")
            panels.append(Panel(f"{law}, {when}", *axes, curves, whole_x=False, diagonal=True, low=0, high=1))
    draw(path, panels)
