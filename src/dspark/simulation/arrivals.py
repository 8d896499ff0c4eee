"""When requests arrive: by chance, in bursts, over a day, or as a trace says.

N requests.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dspark.common.errors import UserError

Array = NDArray[np.float64]
BURST = 4.0  # a burst's rate over the mean
BURST_SHARE = 0.15  # of the time
BURST_SECONDS = 5.0  # mean length of a burst
LENGTHS = ("prompt_tokens", "new_tokens")
NIGHT = 0.25  # a day's lowest rate over its highest


@dataclass(frozen=True)
class Trace:
    """Requests by time of arrival, with their lengths in tokens where the trace has them."""

    times_N: Array  # seconds from the start, rising
    prompt_N: NDArray[np.int64] | None = None
    new_N: NDArray[np.int64] | None = None

    @property
    def seconds(self) -> float:
        """Time of the last arrival."""
        return float(self.times_N[-1])


def arrivals_of(kind: str, *, rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Times of arrival up to `seconds`: "poisson", "bursty", or a trace file replayed at a mean of `rate` a second."""
    random = np.random.default_rng(seed)
    if kind == "poisson":
        return poisson(rate, seconds, random).tolist()
    if kind == "bursty":
        return bursty(rate, seconds, random).tolist()
    times_N = read_trace(Path(kind)).times_N
    mean = len(times_N) / max(float(times_N[-1]), 1e-9)
    scaled_N = times_N * mean / rate
    return scaled_N[scaled_N <= seconds].tolist()


def poisson(rate: float, seconds: float, random: np.random.Generator) -> Array:
    """Arrivals that know nothing of each other."""
    return np.sort(random.uniform(0, seconds, random.poisson(rate * seconds)))


def gamma(rate: float, count: int, burstiness: float, random: np.random.Generator) -> Array:
    """`count` arrivals whose gaps follow a gamma law of shape `burstiness`: 1 is Poisson, less comes in bursts.

    Scaled so that the last is due at `count / rate` s, as `vllm bench serve` does; all at once at an infinite rate.
    """
    if not 0 < burstiness < math.inf:
        raise UserError(f"burstiness {burstiness} is not above 0; pass 1 for Poisson arrivals, less for bursts")
    if not rate > 0:
        raise UserError(f"request rate {rate} is not above 0; pass inf to send everything at once")
    if math.isinf(rate):
        return np.zeros(count)
    times = np.cumsum(random.gamma(burstiness, 1.0 / (rate * burstiness), count))
    return np.asarray(times * (count / rate / times[-1]))


def bursty(rate: float, seconds: float, random: np.random.Generator) -> Array:
    """A Poisson process that switches between calm and bursts of `BURST` times the mean rate."""
    calm = (1 - BURST * BURST_SHARE) / (1 - BURST_SHARE)
    times, now, burst = [], 0.0, False
    while now < seconds:
        length = float(random.exponential(BURST_SECONDS if burst else BURST_SECONDS * (1 / BURST_SHARE - 1)))
        times.append(now + poisson(rate * (BURST if burst else calm), length, random))
        now, burst = now + length, not burst
    joined = np.concatenate(times)
    return joined[joined <= seconds]


def day_rates(peak: float, bins: int, *, seconds: float = 86400.0) -> Array:
    """A day's rate in each of `bins` equal stretches: a cosine from night to the peak in the afternoon."""
    hour = (np.arange(bins) + 0.5) / bins * seconds / 3600.0
    low = peak * NIGHT
    return low + (peak - low) * 0.5 * (1 + np.cos((hour - 15.0) / 24.0 * 2 * math.pi))


def read_trace(path: Path) -> Trace:
    """CSV with a header and a column `time` in seconds; `prompt_tokens` and `new_tokens` if there are any.

    Raises UserError naming the line that is wrong.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; pass poisson, bursty or a CSV trace") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte offset {error.start}); convert it to UTF-8") from error
    reader = csv.DictReader(text.splitlines())
    names = [name for name in ("time", *LENGTHS) if name in (reader.fieldnames or ())]
    if "time" not in names:
        raise UserError(f"{path} line 1 has no column `time`; give it a header such as time,prompt_tokens,new_tokens")
    columns: dict[str, list[float]] = {name: [] for name in names}
    for row in reader:
        for name in names:
            columns[name].append(_value(path, reader.line_num, name, row[name]))
        times = columns["time"]
        if len(times) > 1 and times[-1] < times[-2]:
            raise UserError(
                f"{path} line {reader.line_num}: time {times[-1]:g} is before the line above; sort the trace"
            )
    if not columns["time"]:
        raise UserError(f"{path} holds no requests; give it a line for each")
    lengths = [np.array(columns[name], dtype=np.int64) if name in columns else None for name in LENGTHS]
    return Trace(np.array(columns["time"]), *lengths)


def _value(path: Path, line: int, name: str, text: str | None) -> float:
    least = 0 if name == "time" else 1
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise UserError(f"{path} line {line}: {name} {text!r} is no number of {least} or more; mend or remove the line")
    return value
