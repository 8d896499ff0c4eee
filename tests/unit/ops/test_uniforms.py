"""Uniform numbers by the kernel are those of the plain twin, bit for bit."""

import pytest
import torch

from dspark.ops.cpu import load_kernels
from dspark.ops.uniforms import uniforms, uniforms_plain

EDGES = [0, 1, 7, 2**62, -1, -(2**63), 2**63 - 1]


@pytest.mark.skipif(not load_kernels(), reason="no C++ compiler")
def test_kernel_equals_plain():
    arguments = (EDGES, [i << 12 for i in range(len(EDGES))], [0, 1, 2, 4095, 0], [1, 1, 2, 2, 3])
    found = uniforms(*arguments)
    assert torch.equal(found, uniforms_plain(*arguments))
    assert found.shape == (len(EDGES), 5) and found.min() > 0 and found.max() < 1
    assert len(found.unique()) == found.numel()
