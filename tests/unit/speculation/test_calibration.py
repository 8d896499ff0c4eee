"""Fits find what made the data, files survive a round trip, and what does not belong is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dspark.common.errors import UserError
from dspark.common.sampling_params import SamplingParams
from dspark.speculation.calibration import Calibration, Fit, bent, law_of, logit, sigmoid
from dspark.speculation.calibration_fit import (
    fit,
    never_falling_means,
    resaid,
    sequential_temperatures,
    signal,
    survival_scores,
    table,
)
from dspark.speculation.online import OnlineCalibration, Tracker
from dspark.speculation.reliability import RoundRecord
from dspark.speculation.round import Round

SLOTS = 3


def rounds(count, slope, shift, seed=0, plan=None):
    """Rounds whose true acceptance is σ(slope · z + shift) of confidences with logits z."""
    rng = np.random.default_rng(seed)
    z_NK = rng.normal(0.8, 1.2, (count, SLOTS))
    accepted_NK = rng.random((count, SLOTS)) < sigmoid(z_NK * slope + shift)
    accepted_N = np.cumprod(accepted_NK, axis=1).sum(1)
    confidences = sigmoid(z_NK)
    rows = zip(confidences.tolist(), accepted_N, strict=True)
    return [RoundRecord(i % 50, tuple(c), SLOTS, int(n)) for i, (c, n) in enumerate(rows)]


def test_the_fit_finds_slope_and_shift_and_mends_the_error():
    found = fit(rounds(8000, 0.5, -0.4), SLOTS, rounds(8000, 0.5, -0.4, seed=1))
    np.testing.assert_allclose(found.slope, 0.5, atol=0.08)
    np.testing.assert_allclose(found.shift, -0.4, atol=0.12)
    before, after = (found.scores[name]["ece"] for name in ("before", "after"))
    assert max(after) < 0.025 < 0.1 < before[0]
    assert found.scores["after"]["auroc"] == pytest.approx(found.scores["before"]["auroc"], abs=0.01)
    assert found.acceptance[0] == pytest.approx(float(np.mean([r.accepted > 0 for r in rounds(8000, 0.5, -0.4)])))


def together(count, seed):
    """Rounds that are accepted whole or not at all: each slot's confidence is fair given the one before it or not."""
    rng = np.random.default_rng(seed)
    easy_N1 = rng.random((count, 1)) < 0.5
    z_NK = rng.normal(0.0, 0.6, (count, SLOTS)) + np.where(easy_N1, 1.2, -0.2)
    accepted_N = np.where(easy_N1, rng.random((count, 1)) < 0.95, rng.random((count, 1)) < 0.1)[:, 0] * SLOTS
    rows = zip(sigmoid(z_NK).tolist(), accepted_N.tolist(), strict=True)
    return [RoundRecord(i % 50, tuple(c), SLOTS, int(n)) for i, (c, n) in enumerate(rows)]


def test_a_curve_mends_products_of_confidences_that_go_together():
    made, held_out = fit(together(6000, 0), SLOTS, together(6000, 1)), table(together(6000, 1), SLOTS)
    alone = survival_scores(held_out, replace(made, curve=()))["ece"]
    assert made.curve and max(made.scores["after"]["ece"]) < 0.04 < 0.05 < max(alone)
    assert not fit(rounds(4000, 0.5, -0.4), SLOTS, []).curve  # none where slots are fair by themselves


def test_what_chance_alone_would_show():
    scores = fit(rounds(3000, 1.0, 0.0), SLOTS, rounds(3000, 1.0, 0.0, seed=1)).scores
    assert scores["after"]["ece"] == pytest.approx(scores["floor"]["ece"], abs=0.015)
    assert scores["floor"]["ece"][0] > 0.005


def test_a_bent_product_follows_its_curve_and_never_rises():
    curve_KG = np.array([[0.0, 0.2, 1.0], [0.1, 0.5, 0.9]])
    survival_RK = np.cumprod(bent(np.array([[0.5, 1.0], [0.75, 0.0], [1.0, 1.0]]), curve_KG), axis=1)
    np.testing.assert_allclose(survival_RK, [[0.2, 0.2], [0.6, 0.1], [1.0, 0.9]])


def test_pooled_neighbours():
    assert never_falling_means(np.array([0.0, 1.0, 0.0, 1.0])).tolist() == [0.0, 0.5, 0.5, 1.0]


def test_a_signal_is_found_from_features():
    rng, truth = np.random.default_rng(0), np.array([-0.5, 0.8, 0.0, -0.6])
    feature_NKF = rng.normal(size=(6000, SLOTS, 3))
    passed_NK = rng.random((6000, SLOTS)) < sigmoid(feature_NKF @ truth[1:] + truth[0])
    columns = zip(feature_NKF.tolist(), np.cumprod(passed_NK, axis=1).sum(1).tolist(), strict=True)
    records = [RoundRecord(0, (0.5,) * SLOTS, SLOTS, n, tuple(map(tuple, f))) for f, n in columns]
    found = signal(records, [0.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(found, truth, atol=0.1)
    said = resaid(records[0], truth).confidence[0]
    assert said == pytest.approx(float(sigmoid(feature_NKF[0, 0] @ truth[1:] + truth[0])))
    assert signal(rounds(10, 1.0, 0.0), [0.0] * 4) is None


def test_online_says_what_the_offline_fit_says_until_it_has_heard():
    curve = tuple(map(tuple, np.linspace([0, 0.1, 0.2], [1, 0.9, 0.8], 5).T.tolist()))
    greedy = Fit((0.7,) * SLOTS, (0.2,) * SLOTS, (), curve=curve)
    online = OnlineCalibration(Calibration(SLOTS, {"greedy": greedy, "sampled": made().fits["sampled"]}))
    raw_RK, both = np.array([[0.9, 0.6, 0.8]] * 2), [SamplingParams(temperature=0), SamplingParams(temperature=1)]
    said_RK = online.confidence(Round([3, 3], [3, 3], [0, 1], [5, 5], both), raw_RK)
    np.testing.assert_allclose(said_RK[0], greedy.apply(raw_RK)[0], atol=1e-5)
    np.testing.assert_allclose(said_RK[1], made().fits["sampled"].apply(raw_RK)[1], atol=1e-5)


def test_sequential_temperatures_are_the_papers():
    temperatures = sequential_temperatures(table(rounds(6000, 0.5, 0.0), SLOTS))
    np.testing.assert_allclose(temperatures[:2], 2.0, rtol=0.35)


def test_too_few_rounds_are_refused():
    with pytest.raises(UserError, match="rounds reached slot 1 of 3"):
        fit(rounds(20, 1.0, 0.0), SLOTS, [])


def made():
    return Calibration(SLOTS, {"sampled": Fit((0.5,) * 3, (-0.4,) * 3, (0.6, 0.5, 0.5), 100)}, source={"prompts": "p"})


def test_files(tmp_path):
    path = tmp_path / "calibration.json"
    made().save(path)
    assert Calibration.load(path) == made()
    made().save_sglang(tmp_path / "sts.json")
    assert json.loads((tmp_path / "sts.json").read_text())["temperatures"] == [2.0] * 3
    with pytest.raises(UserError, match="block size of 3, the drafter's is 7"):
        made().check(7, path)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9}', '{"format": 1, "block_size": 3, "fits": {"sampled": {}}}'])
def test_damaged_files_are_refused(text, tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(UserError, match="dspark calibrate") as caught:
        Calibration.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        Calibration.load(tmp_path / "none.json")


def test_laws():
    assert law_of(SamplingParams(temperature=0)) == "greedy"
    assert law_of(SamplingParams(seed=1)) == "coupled"
    assert made().fit("coupled") == made().fit("sampled")
    assert Calibration(2, {}).fit("greedy") == Fit.identity(2)


def test_extreme_confidences_stay_numbers():
    values = np.array([[0.0, 1.0, np.nan]])
    assert np.isfinite(logit(values)).all()
    assert (made().fits["sampled"].apply(values) <= 1).all()


def serve(online, records, share=1.0, group="", law=None, seed=0):
    """Let the records pass as rounds of one request; some of each are verified."""
    rng, params = np.random.default_rng(seed), law or SamplingParams(speculation_group=group)
    for number, record in enumerate(records):
        raw_RK = np.array([record.confidence])
        online.confidence(Round([SLOTS], [SLOTS], [number], [5], [params]), raw_RK)
        plan = SLOTS if rng.random() < share else 1
        online.observe(raw_RK, [plan], [min(record.accepted, plan)])


def test_online_follows_a_change_and_only_verified_slots_teach():
    online = OnlineCalibration(made())
    serve(online, rounds(1200, 0.8, -1.2))
    assert np.abs(np.array(online.fit("sampled").shift) + 1.2).max() < 0.5
    censored = OnlineCalibration(made())
    serve(censored, rounds(400, 0.8, -1.2), share=0.0)
    assert abs(censored.fit("sampled").shift[0] + 1.2) < 0.5
    assert censored.fit("sampled").shift[1:] == pytest.approx((-0.4, -0.4), abs=1e-9)


def test_groups_start_from_everyones_fit():
    online = OnlineCalibration(made())
    serve(online, rounds(800, 0.8, -1.2), group="chat")
    fresh, chat = online.fit("sampled", "code").shift[0], online.fit("sampled", "chat").shift[0]
    assert fresh < -0.7 and chat < -0.7
    assert online.fit("greedy", "chat").shift == made().fits["sampled"].shift  # another law has heard nothing


def test_drift_is_noticed_and_a_true_fit_raises_no_alarm():
    online = OnlineCalibration(made())
    serve(online, rounds(1500, 0.5, -0.4))
    assert online.drifts == 0
    serve(online, rounds(300, 0.5, -2.0, seed=3))
    assert online.drifts > 0


def test_audits_are_kept_as_they_were_calibrated():
    online = OnlineCalibration(made())
    raw_RK = np.array([[0.9, 0.9, 0.9]])
    said = online.confidence(Round([3], [3], [0], [5], [SamplingParams()]), raw_RK)
    online.observe(raw_RK, [3], [2], [0])
    assert online.audited[0].full and online.audited[0].confidence == pytest.approx(said[0].tolist())


def test_confidence_order_never_turns():
    tracker = Tracker(np.array([[1.0, 0.0]]))
    z_KN = np.linspace(-2, 2, 400)[None]
    for _ in range(5):
        tracker.learn(z_KN, (z_KN < 0).astype(float), np.ones_like(z_KN))
    assert tracker.weight_K2[0, 0] > 0


def test_what_to_expect_lies_between_the_laws_by_temperature():
    fits = {
        "greedy": Fit((1.0,), (0.0,), (0.8,)),
        "sampled": Fit((1.0,), (0.0,), (0.5,)),
        "coupled": Fit((1.0,), (0.0,), (0.4,)),
    }
    made = Calibration(1, fits, source={"temperature": 1.0})
    assert made.expected("greedy", 0.0) == (0.8,) and made.expected("sampled", 1.0) == pytest.approx((0.5,))
    assert made.expected("sampled", 0.5) == pytest.approx((2 / 3,))  # odds of 4 and 1: half way in logits is 2
    assert made.expected("sampled", 9.0) == pytest.approx((0.2,))  # not beyond twice the temperature of the rounds
    assert made.expected("coupled", 1e-6)[0] == pytest.approx(0.8, abs=1e-3)
    assert Calibration(1, fits).expected("sampled", 0.5) == (0.5,)  # of an unknown temperature
    assert Calibration(1, {"greedy": fits["greedy"]}, source={"temperature": 1.0}).expected("sampled", 1.0) == (0.8,)
