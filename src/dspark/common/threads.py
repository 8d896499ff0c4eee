"""Keeps OpenMP to one team of threads, which is all that a machine has cores for."""

from __future__ import annotations

import contextlib
import ctypes

SOFT = 1  # omp_pause_soft: what threads have set for themselves stays


def release_team() -> None:
    """End the OpenMP threads that wait for the calling thread's next parallel region; one makes them anew.

    libgomp gives every thread with parallel regions a team of its own. With two teams it counts more threads than
    cores and lets all of them sleep between regions instead of spinning: hundreds of wake-ups in a step, which then
    takes a third longer. Call it where another thread is about to take over the work; without OpenMP it does nothing.
    """
    with contextlib.suppress(AttributeError, OSError):  # torch loads its OpenMP for everyone to see
        ctypes.CDLL(None).omp_pause_resource_all(SOFT)
