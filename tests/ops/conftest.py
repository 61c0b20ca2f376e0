"""Operators' tests: what they launch in Triton's interpreter stays within its tensors."""

import importlib.util

import pytest
from bounds import bounds_checked


@pytest.fixture(autouse=importlib.util.find_spec("triton") is not None)
def _within_bounds():
    with bounds_checked():
        yield
