"""Makes a drafter's confidences probabilities: the fit that lies beside a drafter, and how it is applied.

R requests, K draft slots. A calibrated confidence is σ(slope_k · z_k + shift_k) of the drafter's own logit z_k, where
1 / slope is the temperature. It is a function of the drafter's confidence, so it sees what that sees: x_{<k}.
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
from dspark.speculation.round import Array

FILE = "calibration.json"  # beside a drafter's config.json
SGLANG_FILE = "calibration_sglang.json"
FORMAT = 1
LEAST = 6e-6  # a confidence nearer to 0 or 1 counts as this
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
    scores: Mapping[str, Any] = field(default_factory=dict)  # {"before" or "after": {"ece": [...], ...}}

    @staticmethod
    def identity(slots: int) -> Fit:
        """Confidences as they are."""
        return Fit((1.0,) * slots, (0.0,) * slots, ())

    def apply(self, confidence_RK: Array) -> Array:
        """Calibrated confidences of the first K slots, [R, K]."""
        slots = confidence_RK.shape[1]
        return sigmoid(logit(confidence_RK) * np.array(self.slope[:slots]) + np.array(self.shift[:slots]))


@dataclass(frozen=True)
class Calibration:
    """The fits of one drafter at one block size. `signal` weighs bias, entropy and margin where it has no head."""

    block_size: int
    fits: Mapping[str, Fit]
    signal: tuple[float, float, float] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)  # of the rounds: target, prompts, temperature, version

    def fit(self, law: str) -> Fit:
        """The law's fit, else the nearest law's."""
        near = {"greedy": ("sampled", "coupled"), "sampled": ("coupled", "greedy"), "coupled": ("sampled", "greedy")}
        for name in (law, *near[law]):
            if name in self.fits:
                return self.fits[name]
        return Fit.identity(self.block_size)

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
            signal = None if held.get("signal") is None else tuple(map(float, held["signal"]))
            assert signal is None or len(signal) == 3
            return Calibration(size, fits, signal, dict(held.get("source", {})))
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise UserError(f"{path} is a damaged calibration ({error!r}); {way_out}") from error


def logit(confidence: Array) -> Array:
    """log(c / (1 - c)), within about ±12; what is not a number counts as never."""
    c = np.fmin(np.fmax(confidence, LEAST), 1.0 - LEAST)  # fmax takes the number where the other is none
    return np.log(c / (1.0 - c))


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + np.exp(-z))


def _fit_of(values: dict[str, Any], slots: int) -> Fit:
    slope, shift, acceptance = (tuple(map(float, values[name])) for name in ("slope", "shift", "acceptance"))
    if not len(slope) == len(shift) == slots or not np.isfinite([*slope, *shift, *acceptance]).all():
        raise ValueError(f"slope and shift need {slots} numbers each")
    return Fit(slope, shift, acceptance, int(values.get("rounds", 0)), dict(values.get("scores", {})))
