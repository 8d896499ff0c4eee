"""What a load test's rows say about policies."""

import pytest

from dspark.evaluation.load_compare import against_best, by_kind, frontier, matched, ratio_of_rounds


def row(users, policy, rounds, speed, kinds=None):
    total = sorted(rounds)[len(rounds) // 2]
    found = {"users": users, "policy": policy, "throughput": total, "throughput_rounds": rounds, "user_speed": speed}
    speeds = {kind: {"user_speed": s[0], "user_speed_rounds": s} for kind, s in (kinds or {}).items()}
    return found | {"kinds": speeds, "by_kind": dict.fromkeys(speeds, total / 2)}


ROWS = [
    row(1, "none", [100, 100, 100], 100, {"code": [50, 50], "noise": [40, None]}),
    row(1, "fixed:1", [150, 160, 150], 150),
    row(1, "joint", [180, 160, 150], 180, {"code": [100, 75], "noise": [39, 40]}),
    row(4, "none", [300, 300, 300], 80),
    row(4, "fixed:1", [290, 280, 290], 70),
    row(4, "joint", [330, 300, 270], 90),
]


def test_ratios_are_of_neighbours_in_time():
    assert ratio_of_rounds([2.0, 9.0, None], [1.0, 3.0, 1.0]) == 2.5
    assert ratio_of_rounds([None], [1.0]) is None


def test_a_policy_against_the_best_of_none_and_the_fixed_lengths():
    assert against_best(ROWS, "joint") == [
        {"users": 1, "best": "fixed:1", "ratio": 1.0},
        {"users": 4, "best": "none", "ratio": 1.0},
    ]


def test_kinds_are_held_against_no_speculation_beside_them():
    lines = {(line["kind"], line["policy"]): line for line in by_kind(ROWS)}
    assert lines["code", "joint"]["over_none"] == 1.75
    assert lines["noise", "joint"]["over_none"] == pytest.approx(39 / 40)
    assert lines["code", "none"]["over_none"] == 1.0


def test_speeds_are_compared_where_both_reach_a_throughput():
    assert frontier(ROWS, "joint") == [(160, 180), (300, 90)]
    found = matched(ROWS, "joint", "fixed:1")
    assert [line["throughput"] for line in found] == [160, 290]
    assert found[1]["baseline"] == 70 and found[1]["user_speed"] == pytest.approx(90 + 90 * 10 / 140)
    assert matched(ROWS, "joint", "fixed:9") == []


def test_a_point_that_another_beats_in_both_is_off_the_frontier():
    assert frontier([*ROWS, row(8, "joint", [250] * 3, 60)], "joint") == [(160, 180), (300, 90)]
