"""The host's searches equal torch's in value, ties and all."""

import pytest
import torch

from dspark.ops.rows import argmax, largest, rising


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 1000])
def test_as_torch(dtype, width):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1)).mul(4).round().to(dtype)  # many ties
    assert torch.equal(argmax(x), x.argmax(-1))
    assert torch.equal(rising(x), x.sort(-1).values)
    for count in {1, (width + 1) // 2, width}:
        assert torch.equal(largest(x, count), x.topk(count).values.flip(-1))
    assert torch.equal(argmax(x.T), x.T.argmax(-1))


def test_other_types_take_the_torch_path():
    x = torch.tensor([[1.0, 3.0, 3.0]], dtype=torch.bfloat16)
    assert argmax(x).tolist() == [1]
    assert rising(x).tolist() == [[1.0, 3.0, 3.0]]
    assert largest(x, 2).tolist() == [[3.0, 3.0]]
