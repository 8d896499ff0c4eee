"""The depth of JSON, found without reading it."""

import json

import pytest

from dspark.server.errors import ApiError
from dspark.server.limits import check_depth

SHALLOW = [b"", b"{}" * 5, b'"' + b"[" * 90 + b'"', rb'["\"[[[[[[[[", "[[[[", "\\", "[["]', b"[1],[2]," * 90, b"]" * 90]
DEEP = [b"[" * 9, b'{"a":' * 9, rb'"\\' + b'"' + b"[" * 9, b"\xff" + b"[" * 9]


@pytest.mark.parametrize("body", SHALLOW)
def test_brackets_in_strings_and_side_by_side_do_not_count(body):
    check_depth(body, 8)


@pytest.mark.parametrize("body", DEEP)
def test_deep_ones_are_found(body):
    with pytest.raises(ApiError, match="more than 8 deep"):
        check_depth(body, 8)


def test_it_agrees_with_a_parser():
    value, text = 0, {}
    for level in range(8):
        value = [value, {"k[": ']\\"'}] if level % 2 else {"a": value, '"{': [1]}
    text = json.dumps(value).encode()
    check_depth(text, 9)
    with pytest.raises(ApiError):
        check_depth(text, 7)


@pytest.mark.parametrize("unit", [b'\\"', b'"', b"[]", b'"\\', b"{"])
def test_time_is_linear(unit):
    """Two megabytes of the worst; a quadratic scan would take hours."""
    check_depth(b'"' + unit * (2**21 // len(unit)), 2**22)
    check_depth(b"{[" * 99 + b'"' + unit * (2**21 // len(unit)), 2**22)
