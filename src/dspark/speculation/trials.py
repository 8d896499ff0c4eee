"""What may be spent on drafts that are not expected to pay, so that a request that turns predictable is found again."""

from __future__ import annotations

from collections.abc import Sequence

EXPLORE = 0.006  # share of the time
STEPS = 3  # of one trial on end: the first finds the caches full of other weights and a context to catch up with
PATIENCE = 8  # how much rarer trials become at most, while none of them pays
PAID = 1.0  # share of a trial's extra time that its tokens must win back to go on at once
HALF = 0.5  # ... or there will be fewer
REMEMBERED = 4096
LONGEST = 2048  # steps without one


class Trials:
    """An allowance in seconds, and who was tried longest ago."""

    def __init__(self) -> None:
        self.allowance = 0.0
        self.patience = 1
        self.started = 0
        self.running: dict[int, float] = {}  # by request under trial, seconds that its draft is to cost beyond others'
        self._clock = 0
        self._refused = 0.0  # s that the trial refused last would have lost
        self._last: dict[int, int] = {}  # when a request last drafted

    def earn(self, seconds: float, step: float) -> None:
        """Time has passed; what is not spent does not pile up beyond some steps of `step` seconds, or one trial.

        However dear a trial seems, it is saved for: else a price that is far too high would never be found out.
        """
        self._clock += 1
        most = max(4 * STEPS * step, self._refused)
        self.allowance = min(self.allowance + EXPLORE / self.patience * seconds, most)

    def drafted(self, requests: Sequence[int]) -> None:
        """These drafted now, so that others are tried first."""
        for request in requests:
            self._last[request] = self._clock
        if len(self._last) > REMEMBERED:
            self._last = dict(sorted(self._last.items(), key=lambda pair: pair[1])[REMEMBERED // 2 :])

    def oldest(self, idle: Sequence[int], most: int) -> list[int]:
        """The `most` requests that have not drafted for longest."""
        return sorted(idle, key=lambda request: self._last.get(request, -1))[:most]

    def start(self, requests: Sequence[int], seconds: float, expected: float = 0.0) -> bool:
        """Whether these may be tried, for `seconds` more a step; then it is paid for.

        What matters is what the trial is expected to lose: its tokens are worth `expected` seconds a step.
        """
        if STEPS * (seconds - expected) > self.allowance:
            self._refused = STEPS * (seconds - expected)
            return False
        self._refused = 0.0
        self.allowance -= STEPS * seconds
        self.running = {request: seconds / max(len(requests), 1) for request in requests}
        self.started += 1
        return True

    def settle(self, tokens: int, rate: float, took: float = 0.0) -> bool:
        """A trial ended and brought so many tokens, whose time comes back; one that paid for itself cost nothing.

        It took `took` seconds more than steps without it; if it was priced at less, the rest is paid now.
        """
        cost = STEPS * sum(self.running.values())
        self.allowance -= max(took - cost, 0.0)
        cost = max(cost, took)
        won = tokens / rate if rate else 0.0
        paid = won >= PAID * cost
        if paid:
            self.patience = 1
        elif won < HALF * cost:
            self.patience = min(2 * self.patience, PATIENCE)
        self.allowance += min(won, cost)
        self.running = {}
        return paid

    def steps_until(self, seconds: float, step: float) -> int:
        """Steps of `step` seconds until a trial that loses `seconds` a step can be paid."""
        short = STEPS * seconds - self.allowance
        return min(max(int(short * self.patience / (EXPLORE * step)), 0), LONGEST) if step > 0 else 0
