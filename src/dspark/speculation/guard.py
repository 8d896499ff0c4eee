"""The guard: what steps really take beside their prices, and an account of what drafting has won over not drafting.

A planner that compares speculating with not speculating compares two prices; an error of a fifth in either makes it
lose. So each side is held against its own steps, by number of requests; and whatever a planner believes, it may not go
on drafting at a size where its drafts have cost more tokens than they brought.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dspark.speculation.prices import Prices
from dspark.speculation.round import Outcome

PRICE = 2  # steps that the price counts for at first
RATE = 0.05  # of a step, once there were many
CLIP = 0.5  # a step further off than this, in logarithms, counts as this far off
WORST = 3.0  # tokens a request that one step may be booked to have lost: what is worse was an interruption
CREDIT = 6.0  # tokens a request that drafting may lose before it is forbidden, at first and after luck at most thrice
BAN = 256  # steps for which it is; twice as many each time until drafting has won CREDIT
LONGEST_BAN = 8192
SETTLED = 2  # drafting steps on end before one that tells what they take
PLAIN = 2  # plain steps on end that say what one takes; the first finds the draft's weights in the caches
PLAIN_EVERY = 512  # drafting steps between two looks at plain ones


@dataclass
class _Account:
    """What is known of steps of one size."""

    credit: float = CREDIT  # tokens a request won by drafting, within -CREDIT and 2 * CREDIT
    banned: int = 0  # steps left
    ban: int = BAN
    drafted: int = 0  # drafting steps since the last plain one
    plain: int = 0  # plain steps still to take


class Guard:
    """Factors on the seconds of plain and of drafting steps, and where drafting is forbidden, from outcomes alone."""

    def __init__(self) -> None:
        self._log: dict[tuple[int, bool], tuple[float, int]] = {}  # (size, drafting) -> logarithm, steps
        self._accounts: dict[int, _Account] = {}
        self._drafted = False  # in the step before
        self._alike = 0  # steps on end before it that were of its kind

    def allows(self, requests: int) -> bool:
        """Whether a step of so many requests may draft; asked once a step by a planner that would."""
        account = self._account(requests)
        if account.banned > 0:
            account.banned -= 1
            return False
        if account.plain <= 0 and (not self.knows(requests, drafting=False) or account.drafted >= PLAIN_EVERY):
            account.plain, account.drafted = PLAIN, 0
        if account.plain > 0:
            account.plain -= 1
            return False
        account.drafted += 1
        return True

    def rest(self, requests: int) -> int:
        """Steps of such a size for which nobody may draft."""
        return self._account(requests).banned

    def pass_by(self, requests: int, steps: int) -> None:
        """So many drafting steps on end, which nobody asked about."""
        self._account(requests).drafted += steps
        self._alike = self._alike + steps if self._drafted else steps - 1
        self._drafted = True

    def observe(self, outcome: Outcome, prices: Prices, *, booked: bool = True) -> None:
        """Hold a finished step, and the plain ones that passed unasked before it, against their prices.

        A step that was only a trial is not `booked`: it says little of one in which everybody drafts.
        """
        round, drafting = outcome.round, outcome.drafting
        planned = sum(outcome.plan)
        bare = round.without_prefill()
        seconds_N1 = prices.verifying(bare, planned)
        plain = float(seconds_N1[0])
        price = float(seconds_N1[planned])
        if drafting:
            asked = round.asked_R or round.limit_R
            price += prices.drafting(round, max(round.limit_R), len(asked) - asked.count(0))
        ratio = self._ratio(outcome, price, planned, prices)
        if ratio is None:
            return
        # the first steps of a kind find other weights in the caches, and the first draft a context to catch up with
        self._alike = self._alike + 1 if drafting == self._drafted else 0
        self._drafted = drafting
        settled = self._alike >= (SETTLED if drafting else 1)
        if (settled and (booked or not drafting)) or not (drafting or self.knows(round.requests, drafting=False)):
            self._learn(round.requests, drafting, ratio)
        if drafting and booked:
            won = sum(outcome.accepted_R) - self._lost(round.requests, ratio * price / plain)
            self._book(round.requests, won / round.requests)

    def _ratio(self, outcome: Outcome, price: float, planned: int, prices: Prices) -> float | None:
        """Seconds over price; None for a rest in which every step took in a prompt."""
        round = outcome.round
        if outcome.rest_steps:
            account = self._account(round.requests)
            account.banned = max(account.banned - outcome.rest_steps, 0)
            return outcome.bare_seconds / outcome.bare_steps / price if outcome.bare_steps else None
        if not round.prefill_rows:
            return outcome.seconds / price
        bare = prices.verifying(round.without_prefill(), planned)[planned]
        return outcome.seconds / (price + float(prices.verifying(round, planned)[planned] - bare))

    def factor(self, requests: int, *, drafting: bool) -> float:
        """What to multiply the seconds of such a step by; that of the other side while this one was never seen."""
        size = size_of(requests)
        for key in ((size, drafting), (size, not drafting)):
            if key in self._log:
                return math.exp(self._log[key][0])
        return 1.0

    def knows(self, requests: int, *, drafting: bool) -> bool:
        """Whether such a step was seen."""
        return (size_of(requests), drafting) in self._log

    def _lost(self, requests: int, plain_steps: float) -> float:
        """The tokens that plain steps would have brought beside one each, in the time of so many priced ones."""
        return requests * (plain_steps / self.factor(requests, drafting=False) - 1.0)

    def _book(self, requests: int, won: float) -> None:
        account = self._account(requests)
        account.credit = min(account.credit + max(won, -WORST), 2 * CREDIT)
        if account.credit >= 2 * CREDIT:
            account.ban = BAN
        if account.credit < -CREDIT:
            account.banned, account.ban = account.ban, min(2 * account.ban, LONGEST_BAN)
            account.credit = -CREDIT / 2  # it has shown what it is: less is risked on it the next time

    def _account(self, requests: int) -> _Account:
        return self._accounts.setdefault(size_of(requests), _Account())

    def _learn(self, requests: int, drafting: bool, ratio: float) -> None:
        key = (size_of(requests), drafting)
        known, steps = self._log.get(key, (self._start(key), 0))
        error = min(max(math.log(ratio) - known, -CLIP), CLIP)
        self._log[key] = known + max(RATE, 1.0 / (1 + PRICE + steps)) * error, steps + 1

    def _start(self, key: tuple[int, bool]) -> float:
        """What is known of the other side, which was priced by the same profile; else that the price is right."""
        return self._log.get((key[0], not key[1]), (0.0, 0))[0]


def size_of(requests: int) -> int:
    """Steps of 1, 2, 3, 4..5, 6..7, 8..11 requests are alike, and so on in halves of a doubling."""
    bits = requests.bit_length()
    return 2 * bits + (requests >> max(bits - 2, 0) & 1)
