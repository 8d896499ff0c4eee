"""What a drafter's proposals were worth: τ, acceptance, and the records that reliability is judged by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dspark.common.sampling_params import SamplingParams
from dspark.engine.step import EngineCore
from dspark.evaluation.decode import Texts, write_texts
from dspark.speculation.reliability import RoundRecord
from dspark.speculation.statistics import SpeculationStatistics


@dataclass
class Measured:
    """Everything observed while some texts were written."""

    texts: Texts = field(default_factory=list)
    statistics: SpeculationStatistics = field(default_factory=SpeculationStatistics)
    records: list[RoundRecord] = field(default_factory=list)

    @property
    def undrafted(self) -> int:
        """Rounds in which there was nothing to verify."""
        return self.statistics.rounds - len(self.records)


def measure(core: EngineCore, prompts: Texts, params: SamplingParams) -> Measured:
    """Continue all prompts at once and watch every round."""
    measured = Measured()
    before, core.observer = core.observer, measured.records.extend
    try:
        measured.texts, measured.statistics, _ = write_texts(core, prompts, params)
    finally:
        core.observer = before
    return measured


def acceptance(statistics: SpeculationStatistics) -> dict[str, Any]:
    """The numbers of a table's row; None where nothing was drafted."""
    drafting = statistics.verified > 0
    return {
        "rounds": statistics.rounds,
        "tau": statistics.tokens_per_round if drafting else None,
        "acceptance_rate": statistics.accepted / statistics.verified if drafting else None,
        "verified_per_round": statistics.verified / statistics.rounds if statistics.rounds else None,
        "conditional_acceptance": statistics.conditional_acceptance,
        "reached_at": list(statistics.reached_at),  # samples behind each of these
    }
