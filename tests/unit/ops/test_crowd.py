"""Kernels work alone while other threads are not worth waiting for, and try them again."""

import ctypes
import threading

import pytest
import torch

from dspark.ops import cpu
from dspark.ops.linear import pack

pytestmark = pytest.mark.skipif(not cpu.load_kernels(), reason="no C++ compiler")
CALM = 256  # crowd.h
MOST = 8192


@pytest.fixture
def crowd():
    """`tell(took, waited)` and `alone()` of a thread that has lived through nothing; two threads a region."""
    library = cpu._library[0]
    library.dspark_crowd_tell.argtypes = [ctypes.c_int64] * 3
    library.dspark_crowd_alone.restype = ctypes.c_int64
    return lambda took, waited: library.dspark_crowd_tell(2, took, waited), library.dspark_crowd_alone


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def spend(alone):
    """Regions until several threads are tried again."""
    x, w = torch.ones(2, 256), pack(torch.ones(256, 256))
    before, regions = torch.get_num_threads(), 0
    torch.set_num_threads(2)
    try:
        while alone():
            torch.ops.dspark.linear.default(x, w, None, 256)
            regions += 1
    finally:
        torch.set_num_threads(before)
    return regions


def test_waiting_for_most_of_the_time_is_not_worth_it_and_less_is(crowd):
    tell, alone = crowd

    def live(waited):
        for _ in range(64):
            tell(1_000_000, waited)
            if alone():
                return alone()
        return 0

    assert in_a_thread(lambda: live(100_000)) == 0
    assert in_a_thread(lambda: live(450_000)) == 0
    assert in_a_thread(lambda: live(700_000)) == 64


def test_others_are_tried_again_ever_more_rarely_until_it_is_calm(crowd):
    tell, alone = crowd

    def live():
        spans = []
        for _ in range(12):
            while not alone():
                tell(1_000_000, 900_000)
            spans.append(spend(alone))
        for _ in range(CALM):
            tell(1_000_000, 0)
        while not alone():
            tell(1_000_000, 900_000)
        return spans, alone()

    spans, after = in_a_thread(live)
    assert spans == [min(64 << i, MOST) for i in range(12)] and after == 64


def test_results_are_the_same_alone(crowd):
    tell, alone = crowd
    x, w = torch.randn(5, 512), torch.randn(512, 512)
    packed = pack(w)

    def live():
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            together = torch.ops.dspark.linear.default(x, packed, None, 512)
            while not alone():
                tell(1_000_000, 900_000)
            return together, torch.ops.dspark.linear.default(x, packed, None, 512), alone()
        finally:
            torch.set_num_threads(before)

    together, single, left = in_a_thread(live)
    assert torch.equal(together, single) and left == 63
