"""For every test of the integrations."""

from __future__ import annotations

import pytest
import torch

from greenmim_kernels.integrations import attention


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was said or compiled: what is compiled often enough is not compiled again."""
    monkeypatch.setattr(attention, "_said", set())
    torch.compiler.reset()
    torch.manual_seed(0)
