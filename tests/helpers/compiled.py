"""The mark of tests that need compiled kernels."""

import pytest

from trainer import kernels

compiled_kernels = pytest.mark.skipif(
    not kernels.available(), reason="kernels are not compiled for this CPU: make setup"
)
