"""That the look at addresses sees what it is for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from bounds import OutOfBounds

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about the interpreter")


@triton.jit
def _copy(source, target, read, written, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < read, other=0.0), mask=at < written)


@pytest.mark.parametrize(
    ("read", "written", "text"),
    [(9, 8, "_copy reads 1 of 9 numbers"), (8, 10, "_copy writes 2 of 10 numbers")],
)
def test_a_kernel_that_leaves_its_tensors_is_found(read, written, text):
    source, target = torch.zeros(8), torch.zeros(8)
    with pytest.raises(Exception, match=text) as raised:
        _copy[(1,)](source, target, read, written, BLOCK=16)
    assert OutOfBounds.__name__ in repr(raised.value)


def test_one_that_does_not_is_left_alone():
    source, target = torch.arange(8.0), torch.zeros(8)
    _copy[(1,)](source, target, 8, 8, BLOCK=16)
    assert torch.equal(source, target)
