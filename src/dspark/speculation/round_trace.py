"""Rounds of a real engine by kind of request, with everything drafted verified: what a simulator draws from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dspark.common.errors import UserError
from dspark.common.files import replacing_file

FORMAT = 1


@dataclass(frozen=True)
class RoundTrace:
    """Confidences [N, K] and accepted counts [N] of whole blocks of K tokens, by kind of request."""

    block: int
    confidence: dict[str, NDArray[np.float64]]
    accepted: dict[str, NDArray[np.int64]]

    @staticmethod
    def of(block: int, rounds: Mapping[str, Sequence[tuple[Sequence[float], int]]]) -> RoundTrace:
        """From (confidences, accepted) of rounds in which all `block` tokens were verified."""
        return RoundTrace(
            block,
            {kind: np.array([list(c) for c, _ in found], float).reshape(-1, block) for kind, found in rounds.items()},
            {kind: np.array([accepted for _, accepted in found], np.int64) for kind, found in rounds.items()},
        )

    @property
    def kinds(self) -> list[str]:
        """Kinds of request there are rounds of."""
        return sorted(self.confidence)

    @property
    def acceptance(self) -> list[float]:
        """Conditional acceptance by slot over all kinds, as a calibration of these rounds would have it."""
        accepted_N = np.concatenate([self.accepted[kind] for kind in self.kinds])
        reached_K = [int((accepted_N >= k).sum()) for k in range(self.block + 1)]
        return [passed / max(reached, 1) for reached, passed in itertools.pairwise(reached_K)]

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        kinds = {
            kind: {"confidence": self.confidence[kind].round(4).tolist(), "accepted": self.accepted[kind].tolist()}
            for kind in self.kinds
        }
        with replacing_file(path) as fresh:
            fresh.write_text(json.dumps({"format": FORMAT, "block": self.block, "kinds": kinds}), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> RoundTrace:
        """Read what `save` wrote. Raises UserError naming what is wrong."""
        way_out = "pass a file that dspark bench load --trace wrote"
        try:
            held = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; {way_out}") from error
        except ValueError as error:
            raise UserError(f"{path} is not JSON; {way_out}") from error
        if not isinstance(held, dict) or held.get("format") != FORMAT or not held.get("kinds"):
            raise UserError(f"{path} is no trace of rounds of format {FORMAT}; {way_out}")
        try:
            pairs = {k: list(zip(v["confidence"], v["accepted"], strict=True)) for k, v in held["kinds"].items()}
            trace = RoundTrace.of(int(held["block"]), pairs)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} has a damaged kind of request ({error}); {way_out}") from error
        for kind in trace.kinds:
            confidence, accepted = trace.confidence[kind], trace.accepted[kind]
            if not len(accepted) or not ((confidence >= 0) & (confidence <= 1)).all():
                raise UserError(f"{path}: {kind} has no rounds or a confidence outside 0 to 1; {way_out}")
            if not ((accepted >= 0) & (accepted <= trace.block)).all():
                raise UserError(f"{path}: {kind} has a round that accepted more than {trace.block}; {way_out}")
        return trace
