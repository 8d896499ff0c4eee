"""Steps done as a planner's standing choice says, unasked: a question costs as much as a tenth of a short step.

R requests of a step.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from dspark.engine.admission import Schedule
from dspark.engine.rest import prefill_rows
from dspark.speculation.choice import Choice
from dspark.speculation.circles import circle_of
from dspark.speculation.finished import HEARD, Finished, Followed, enough
from dspark.speculation.guard import size_of
from dspark.speculation.round import Outcome, Round

LAST = 4  # steps that are kept with their time


class _Step(NamedTuple):
    schedule: Schedule
    plan: list[int]
    accepted_R: list[int]
    seconds: float


class Following:
    """A choice, for how many steps it stands, and what came of those that followed it."""

    def __init__(self) -> None:
        self.choice: Choice | None = None
        self.left = 0
        self._steps = 0
        self._seconds = 0.0
        self._newest: deque[_Step] = deque(maxlen=HEARD[0])

    def take(self, standing: tuple[Choice, int] | None) -> None:
        """What the planner says from now on; None: ask it."""
        self.choice, self.left = standing or (None, 0)

    def holds(self, schedule: Schedule) -> bool:
        """Whether this step can be done by the choice; then its requests draft as that says, those that do in front."""
        choice = self.choice
        if choice is None or self.left <= 0 or size_of(len(schedule.sampled)) != choice.size:
            return False
        slots_R = []
        for request, limit in zip(schedule.sampled, schedule.limits, strict=True):
            slots = choice.slots_of(request.id, request.params)
            if slots is None:
                return False
            slots_R.append(slots if slots < limit else limit)
        if not any(slots_R):
            return False
        schedule.limits = slots_R
        schedule.drafting_first()
        self.left -= 1
        return True

    def observe(self, schedule: Schedule, plan: list[int], accepted_R: list[int], seconds: float) -> None:
        """A step that `holds` let through has ended."""
        self._steps += 1
        self._seconds += seconds
        self._newest.append(_Step(schedule, plan, accepted_R, seconds))

    def report(self) -> Followed | None:
        """The steps since the last report, as the planner hears of them; None without any."""
        if not self._steps:
            return None
        requests = len(self._newest[-1].plan)
        newest = list(self._newest)[-enough(requests) :]
        finished = Finished()
        for step in newest:
            sampled = step.schedule.sampled
            circles = [circle_of(request.params) for request in sampled]
            finished.add_whole([request.id for request in sampled], circles, step.plan, step.accepted_R)
        last = [_outcome(step) for step in newest[-LAST:]]
        made = Followed(self._steps, self._seconds, requests, finished, last)
        self._steps, self._seconds = 0, 0.0
        self._newest.clear()
        return made


def round_of(schedule: Schedule) -> Round:
    """What a planner is told of a step."""
    requests = schedule.sampled
    return Round(
        limit_R=schedule.limits,
        request_ids=[request.id for request in requests],
        context_R=[request.cached for request in requests],
        params_R=[request.params for request in requests],
        prefill_rows=prefill_rows(schedule),
    )


def _outcome(step: _Step) -> Outcome:
    round = round_of(step.schedule)  # its context is today's: a few tokens more than it was
    return Outcome(
        round.drafted(step.plan, step.schedule.limits), step.plan, step.accepted_R, step.seconds, unread=True
    )
