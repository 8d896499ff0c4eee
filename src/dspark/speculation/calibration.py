"""Makes a drafter's confidences probabilities: the fit that lies beside a drafter, and how it is applied.

R requests, K draft slots, G points of a curve. A calibrated confidence is σ(slope_k · z_k + shift_k) of the drafter's
own logit z_k, where 1 / slope is the temperature. Where confidences of a block go together, their product is off though
each is fair: a curve then maps the product at each slot to the share of prefixes that was accepted. Both are functions
of the drafter's confidences up to k, so they see what those see: x_{<k}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dspark.common.errors import UserError
from dspark.common.files import replacing_file
from dspark.common.sampling_params import SamplingParams
from dspark.ops.calibrated import bent, logit, sigmoid
from dspark.speculation.round import Array

FILE = "calibration.json"  # beside a drafter's config.json
SGLANG_FILE = "calibration_sglang.json"
FORMAT = 1
HOTTEST = 2.0  # times the temperature of the rounds that acceptance is carried on to
LAWS = ("greedy", "sampled", "coupled")
"""How a request samples decides how often drafts are accepted: at temperature 0, above it, by the coupled rule."""


def law_of(params: SamplingParams) -> str:
    """Which of LAWS a request is under."""
    return "greedy" if params.temperature == 0 else "coupled" if params.coupled else "sampled"


@dataclass(frozen=True)
class Fit:
    """One law's calibration by slot, and its scores on rounds that the fit did not see."""

    slope: tuple[float, ...]  # 1 / temperature
    shift: tuple[float, ...]
    acceptance: tuple[float, ...]  # conditional, of held-out rounds: what to expect of a request nothing is known of
    rounds: int = 0
    curve: tuple[tuple[float, ...], ...] = ()  # by slot, survival at even steps of the product from 0 to 1; () for none
    scores: Mapping[str, Any] = field(default_factory=dict)  # {"before" or "after": {"ece": [...], ...}}

    @staticmethod
    def identity(slots: int) -> Fit:
        """Confidences as they are."""
        return Fit((1.0,) * slots, (0.0,) * slots, ())

    def apply(self, confidence_RK: Array) -> Array:
        """Calibrated confidences of the first K slots, [R, K]."""
        slots = confidence_RK.shape[1]
        fair_RK = sigmoid(logit(confidence_RK) * np.array(self.slope[:slots]) + np.array(self.shift[:slots]))
        return bent(fair_RK, np.array(self.curve)) if self.curve else fair_RK


@dataclass(frozen=True)
class Calibration:
    """The fits of one drafter at one block size. `signal` is `Signal`'s, where it has no head."""

    block_size: int
    fits: Mapping[str, Fit]
    signal: tuple[float, float, float, float] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)  # of the rounds: target, prompts, temperature, version

    def fit(self, law: str) -> Fit:
        """The law's fit, else the nearest law's."""
        near = {"greedy": ("sampled", "coupled"), "sampled": ("coupled", "greedy"), "coupled": ("sampled", "greedy")}
        for name in (law, *near[law]):
            if name in self.fits:
                return self.fits[name]
        return Fit.identity(self.block_size)

    def expected(self, law: str, temperature: float) -> tuple[float, ...]:
        """The conditional acceptance by slot to expect of a request nothing is known of; () without rounds.

        Between temperature 0 and that of the rounds it moves evenly in logits, and so a little beyond.
        """
        own, cold, known = self.fit(law).acceptance, self.fits.get("greedy"), float(self.source.get("temperature", 0.0))
        if law == "greedy" or law not in self.fits or cold is None or not known > 0.0:
            return own
        if len(cold.acceptance) != len(own):
            return own
        low_K, high_K = logit(np.array(cold.acceptance)), logit(np.array(own))
        share = min(temperature / known, HOTTEST)
        return tuple(sigmoid(low_K + share * (high_K - low_K)).tolist())

    def check(self, block_size: int, source: str | Path = "the calibration") -> None:
        """Raises UserError for a drafter of another block size: its confidences mean something else."""
        if block_size != self.block_size:
            raise UserError(
                f"{source} is for a block size of {self.block_size}, the drafter's is {block_size}; "
                "fit this one with dspark calibrate, or remove the file"
            )

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        held = {"format": FORMAT} | asdict(self)
        with replacing_file(path) as fresh:
            fresh.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")

    def save_sglang(self, path: str | Path, law: str = "sampled") -> None:
        """Write what SGLang's `--speculative-dspark-confidence-sts-path` reads: the temperatures of one law.

        It knows temperatures alone, so they are those of the fit without shifts.
        """
        fit = self.fit(law)
        held = {
            "temperatures": list(fit.scores.get("temperature_only", [1.0 / slope for slope in fit.slope])),
            "dataset": str(self.source.get("prompts", "")),
            "num_samples": fit.rounds,
            "ece_before": list(fit.scores.get("before", {}).get("ece", [])),
            "ece_after": list(fit.scores.get("after", {}).get("ece", [])),
        }
        with replacing_file(path) as fresh:
            fresh.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Read what `save` wrote. Raises UserError where it is something else."""
        way_out = "pass a file that dspark calibrate wrote"
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; {way_out}") from error
        except ValueError as error:
            raise UserError(f"{path} is not JSON; {way_out}") from error
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            raise UserError(f"{path} is no calibration of format {FORMAT}; {way_out}")
        try:
            size = int(held["block_size"])
            fits = {law: _fit_of(values, size) for law, values in held["fits"].items() if law in LAWS}
            signal = None
            if held.get("signal") is not None:
                bias, odds, margin, entropy = map(float, held["signal"])
                signal = bias, odds, margin, entropy
            return Calibration(size, fits, signal, dict(held.get("source", {})))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is a damaged calibration ({error!r}); {way_out}") from error


def _fit_of(values: dict[str, Any], slots: int) -> Fit:
    slope, shift, acceptance = (tuple(map(float, values[name])) for name in ("slope", "shift", "acceptance"))
    if not len(slope) == len(shift) == slots or not np.isfinite([*slope, *shift, *acceptance]).all():
        raise ValueError(f"slope and shift need {slots} numbers each")
    curve = tuple(tuple(map(float, points)) for points in values.get("curve", ()))
    if curve and (len(curve) != slots or len({len(points) for points in curve}) != 1 or len(curve[0]) < 2):
        raise ValueError(f"curve needs {slots} rows of the same number of points")
    return Fit(slope, shift, acceptance, int(values.get("rounds", 0)), curve, dict(values.get("scores", {})))
