"""What choosing would have won goes by outcomes."""

import numpy as np
import pytest

from dspark.speculation.looks import REMEMBERED, Looks
from dspark.speculation.round import Outcome, Round


def look(survival_RK, accepted_R):
    limit_R = [len(row) for row in survival_RK]
    return Outcome(Round(limit_R, limit_R), limit_R, accepted_R, 1.0, np.array(survival_RK))


def test_options_are_tokens_won_less_rows_paid():
    looks = Looks()
    assert looks.options(3, 0.2).tolist() == [0, 0, 0]
    # the first is chosen whole; of the second the first slot is, and the second slot would have stood as well
    looks.remember([look([[0.9, 0.8, 0.7], [0.9, 0.1, 0.05]], [3, 2])])
    won = np.array([[0.0, 0.0, 0.0], [0.0, 0.2 - 1, 0.4 - 1]])  # over drafts of as many slots, which were best
    assert looks.options(3, 0.2).tolist() == pytest.approx((won.mean(0) - won.std(0) / np.sqrt(2)).tolist())
    assert looks.options(2, 0.2).tolist() == pytest.approx([0.0, -0.4 - 0.4 / np.sqrt(2)])


def test_luck_that_a_fixed_number_of_rows_has_too_wins_nothing():
    """All drafts look alike, and none of a few brought more than two tokens: so does verifying two."""
    looks = Looks()
    looks.remember([look([[0.75, 0.55, 0.1]] * 6, [2, 1, 2, 0, 2, 2])])
    assert looks.options(3, 0.2).tolist() == [0, 0, 0]
    looks.remember([look([[0.9, 0.8, 0.7]] * 40 + [[0.2, 0.1, 0.05]] * 40, [3] * 40 + [0] * 40)])
    assert looks.options(3, 0.2)[2] > 0.15


def test_only_the_widest_rounds_count_and_only_the_newest():
    looks = Looks()
    looks.remember([look([[0.5, 0.5]], [0]), look([[0.5]], [1])])
    assert looks.accepted_N.tolist() == [0]
    looks.remember([look([[0.9, 0.9]], [2])] * (REMEMBERED + 3))
    assert looks.accepted_N.tolist() == [2] * REMEMBERED
    looks.remember([look([[0.9, 0.9, 0.9]], [1])])  # longer drafts are another matter
    assert looks.survival_NK.tolist() == [[0.9, 0.9, 0.9]]
