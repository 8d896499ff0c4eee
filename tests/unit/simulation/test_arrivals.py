"""Arrivals: their rates, their burstiness, and traces that are malformed."""

import numpy as np
import pytest

from dspark.common.errors import UserError
from dspark.simulation.arrivals import arrivals_of, bursty, day_rates, gamma, poisson, read_trace


def dispersion(times, seconds):
    """Variance over mean of counts in windows of five seconds: 1 for a Poisson process."""
    counts = np.histogram(times, bins=int(seconds / 5), range=(0, seconds))[0]
    return counts.var() / counts.mean()


def test_rates_and_bursts():
    even, uneven = (kind(20.0, 4000.0, np.random.default_rng(0)) for kind in (poisson, bursty))
    assert len(even) == pytest.approx(80_000, rel=0.02) and dispersion(even, 4000) == pytest.approx(1, abs=0.2)
    assert len(uneven) == pytest.approx(80_000, rel=0.15) and dispersion(uneven, 4000) > 5
    for times in (even, uneven):
        assert (np.diff(times) >= 0).all() and times[0] >= 0 and times[-1] <= 4000


def test_gaps_of_a_gamma_law_by_burstiness():
    for burstiness in (0.25, 1.0, 4.0):
        times = gamma(20.0, 20_000, burstiness, np.random.default_rng(0))
        gaps = np.diff(times)
        assert times[-1] == pytest.approx(1000.0) and (gaps >= 0).all()
        assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(1 / burstiness, rel=0.1)
    assert gamma(np.inf, 3, 1.0, np.random.default_rng(0)).tolist() == [0, 0, 0]
    for rate, burstiness in ((0.0, 1.0), (np.nan, 1.0), (1.0, 0.0), (1.0, np.inf)):
        with pytest.raises(UserError):
            gamma(rate, 3, burstiness, np.random.default_rng(0))


def test_a_day_peaks_in_the_afternoon():
    rates = day_rates(100.0, 24)
    assert rates.argmax() in (14, 15) and rates.max() == pytest.approx(100, rel=0.01)
    assert rates.min() == pytest.approx(25, rel=0.02)


def test_a_trace_is_replayed_at_the_rate_that_is_asked_for(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("time,prompt_tokens,new_tokens\n0,10,20\n1.5,11,21\n4,12,22\n")
    trace = read_trace(path)
    assert trace.seconds == 4 and trace.prompt_N.tolist() == [10, 11, 12] and trace.new_N.tolist() == [20, 21, 22]
    assert arrivals_of(str(path), rate=1.5, seconds=100) == pytest.approx([0, 0.75, 2])
    assert arrivals_of(str(path), rate=1.5, seconds=1) == pytest.approx([0, 0.75])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "line 1 has no column `time`"),
        ("when\n1\n", "line 1 has no column `time`"),
        ("time\n", "holds no requests"),
        ("time\n1\nx\n", "line 3: time 'x'"),
        ("time\n-1\n", "line 2: time '-1'"),
        ("time\n2\n1\n", "line 3: time 1 is before"),
        ("time,new_tokens\n1,0\n", "line 2: new_tokens '0'"),
        ("time,new_tokens\n1\n", "line 2: new_tokens None"),
        (b"time\n\xff\n", "not UTF-8"),
        (None, "cannot read"),
    ],
)
def test_a_malformed_trace_is_refused(tmp_path, content, says):
    path = tmp_path / "trace.csv"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=says):
        read_trace(path)
