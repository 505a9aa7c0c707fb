"""For every test of the integrations."""

from __future__ import annotations

import pytest
import torch

from greenmim_kernels.integrations import attention


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was said or compiled: what is compiled often enough is not compiled again."""
    monkeypatch.setattr(attention, "_warned", set())
    torch.compiler.reset()
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each call of the kernels."""
    made: list[str] = []
    real = attention.group_window_attention

    def count(*arguments):
        made.append("call")
        return real(*arguments)

    monkeypatch.setattr(attention, "group_window_attention", count)
    return made
