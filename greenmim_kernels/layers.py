"""Layers for `kernels`, the Hugging Face Hub's library: its ``kernelize`` puts their ``forward`` in
the place of that of a model's own modules.

As it asks, they have no state and no other method. Their names are those of what they replace.
"""

from __future__ import annotations

import torch
from torch import nn

from . import modules
from .integrations.attention import attend, wants_maps, wants_more


class GroupWindowAttention(nn.Module):
    """``greenmim_kernels.GroupWindowAttention`` of any version of this package."""

    has_backward = True
    can_torch_compile = True

    forward = modules.GroupWindowAttention.forward


class SwinAttention(nn.Module):
    """``SwinAttention`` of transformers 5 and newer: windows, mask and bias in one operator.

    What the kernels do not do, such as attention maps, runs the code of transformers.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention in windows.

        Args:
            hidden_states: floating point [B windows, M^2, C], the windows of an image together.
            attention_mask: [windows, M^2, M^2], 0 where a pair attends and -100 where not; or None.
            kwargs: those of transformers.

        Returns:
            [B windows, M^2, C], and None in the place of attention maps.
        """
        # Another version of this package may have fused the layer, and gives what it made.
        is_known = attention_mask is None or isinstance(attention_mask, torch.Tensor)
        if is_known and not wants_more(self, wants_maps(self, kwargs)):
            out = attend(self, hidden_states, attention_mask)
            if out is not None:
                return out, None
        return type(self).forward(self, hidden_states, attention_mask, **kwargs)
