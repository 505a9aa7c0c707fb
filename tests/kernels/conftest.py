"""Fixtures of the kernels' tests."""

import pytest
from kernel_backends import INTERPRETED


@pytest.fixture(params=["triton"] if INTERPRETED else ["cuda", "triton"])
def backend(request) -> str:
    """The backend for a GPU under test."""
    return request.param
