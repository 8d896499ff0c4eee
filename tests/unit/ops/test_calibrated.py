"""The calibration's kernel beside its plain twin."""

import numpy as np
import pytest

from dspark.ops.calibrated import calibrated, calibrated_plain
from dspark.ops.cpu import load_kernels

needs_kernels = pytest.mark.skipif(not load_kernels(), reason="no C++ compiler")


@needs_kernels
@pytest.mark.parametrize("slots", [1, 4, 7])
def test_the_kernel_is_its_plain_twin(slots):
    random = np.random.default_rng(slots)
    raw_RK = random.uniform(0.0, 1.0, (20, slots))
    raw_RK[0], raw_RK[1], raw_RK[2, 0], raw_RK[3, -1] = 0.0, 1.0, np.nan, np.nan
    first_C2K, then_C2K = random.uniform(0.3, 1.5, (2, 3, 2, 7))
    curves = [np.sort(random.uniform(0.0, 1.0, (7, points)), axis=1) for points in (2, 41)]
    given = (raw_RK, random.integers(0, 3, 20).tolist(), first_C2K, then_C2K, [1, -1, 0], curves)
    for found, wanted in zip(calibrated(*given), calibrated_plain(*given), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_without_lines_and_curves_nothing_changes():
    raw_RK = np.array([[0.2, 0.9], [0.5, 0.4]])
    none_C2K = np.array([[[1.0, 1.0], [0.0, 0.0]]])
    np.testing.assert_allclose(calibrated(raw_RK, [0, 0], none_C2K, none_C2K, [-1], [])[1], raw_RK)
