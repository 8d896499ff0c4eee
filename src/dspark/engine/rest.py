"""Steps for which no planner is asked, because nobody drafts in them; and what may be spent beside the steps.

R requests of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from dspark.engine.admission import Schedule
from dspark.speculation.choice import Choice
from dspark.speculation.round import Outcome, Round

FIRST = 64  # times before a share of the time is kept to


@dataclass
class Rest:
    """How long nobody drafts, from which round on, and the steps since."""

    left: int = 0
    round: Round | None = None  # the last that the planner was asked about; None without a rest
    newest: int = -1  # the youngest request it has seen
    choice: Choice | None = None  # what tells of younger ones
    steps: int = 0
    seconds: float = 0.0
    bare_steps: int = 0  # that took in no prompt
    bare_seconds: float = 0.0

    @staticmethod
    def of(steps: int, round: Round, choice: Choice | None = None) -> Rest:
        """The next `steps` steps of requests like those of `round`, and of younger ones for whom `choice` has none."""
        return Rest(steps, round, max(round.request_ids, default=-1), choice) if steps > 0 else Rest()

    def holds(self, schedule: Schedule) -> bool:
        """Whether this step, too, needs no question; counts it. Arrival is the order of `sampled`."""
        if self.left <= 0 or self.round is None or not schedule.sampled:
            return False
        sampled = schedule.sampled
        if len(sampled).bit_length() != self.round.requests.bit_length():
            return False
        if sampled[-1].id > self.newest:
            younger = [request for request in sampled if request.id > self.newest]
            if self.choice is None or any(self.choice.slots_of(one.id, one.params) != 0 for one in younger):
                return False
            self.newest = sampled[-1].id
        self.left -= 1
        return True

    def observe(self, schedule: Schedule, seconds: float) -> None:
        """A step at rest took so long."""
        self.steps += 1
        self.seconds += seconds
        if not prefill_rows(schedule):
            self.bare_steps += 1
            self.bare_seconds += seconds

    def outcome(self) -> Outcome | None:
        """All steps since, as the planner hears of them."""
        if self.round is None or not self.steps:
            return None
        nothing = [0] * self.round.requests
        return Outcome(
            self.round,
            nothing,
            nothing,
            self.seconds,
            rest_steps=self.steps,
            bare_seconds=self.bare_seconds,
            bare_steps=self.bare_steps,
        )


class Share:
    """Something that may take a share of the time, once it was done `FIRST` times."""

    def __init__(self, share: float):
        self.share = share
        self._times = 0
        self._allowance = 0.0

    def pass_by(self, seconds: float) -> None:
        """Time has passed; what is not spent in a second is gone."""
        self._allowance = min(self._allowance + self.share * seconds, self.share)

    @property
    def due(self) -> bool:
        """Whether it may be done now."""
        return self._times < FIRST or self._allowance > 0.0

    def spend(self, seconds: float) -> None:
        """It was done, and took so long."""
        self._times += 1
        self._allowance -= seconds


def prefill_rows(schedule: Schedule) -> int:
    """Rows of the step's forward that are neither anchors nor drafts."""
    rows = sum(schedule.rows) - len(schedule.sampled)
    return rows + sum(rows for _, rows in schedule.partial) if schedule.partial else rows
