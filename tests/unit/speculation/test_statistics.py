"""Counts of rounds add up, per position and in sum."""

from dspark.speculation.statistics import SpeculationStatistics, total


def test_observe_and_merge():
    one, other = SpeculationStatistics(), SpeculationStatistics()
    one.observe(drafted=7, verified=3, accepted=3)
    one.observe(drafted=7, verified=3, accepted=1)
    other.observe(drafted=7, verified=5, accepted=4, committed=2)  # a stop cut the rest
    other.observe(drafted=0, verified=0, accepted=0)
    both = total([one, other])
    assert (both.rounds, both.drafted, both.verified, both.accepted, both.committed) == (4, 21, 11, 8, 9)
    assert both.verified_at == [3, 3, 3, 1, 1]
    assert both.reached_at == [3, 3, 2, 1, 1]
    assert both.accepted_at == [3, 2, 2, 1, 0]
    assert both.conditional_acceptance == [1.0, 2 / 3, 1.0, 1.0, 0.0]
    assert both.tokens_per_round == 9 / 4
    assert one.verified_at == [2, 2, 2]


def test_nothing_yet():
    assert SpeculationStatistics().tokens_per_round == 0.0
    assert SpeculationStatistics().conditional_acceptance == []
