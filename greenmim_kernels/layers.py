"""Layers for `kernels`, the library of the Hugging Face Hub: its ``kernelize`` replaces the
``forward`` of a model's modules by theirs.

As it requires, they have no state and no other method. They have the names of what they replace.
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

    Calls that the kernels cannot run, such as for attention maps, go to transformers' own code.
    """

    has_backward = True
    can_torch_compile = True

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention in windows.

        Args:
            hidden_states: floating point [B * windows, M^2, C], the windows of an image together.
            attention_mask: [windows, M^2, M^2], 0 where a pair attends and -100 where not; or None.
            kwargs: transformers' other arguments.

        Returns:
            [B * windows, M^2, C], and None in place of attention maps.
        """
        # A layer fused by another version of this package passes that version's partition.
        is_known = attention_mask is None or isinstance(attention_mask, torch.Tensor)
        if is_known and not wants_more(self, wants_maps(self, kwargs)):
            out = attend(self, hidden_states, attention_mask)
            if out is not None:
                return out, None
        # `kernelize` sets this function on the module; its class still has the library's.
        return type(self).forward(self, hidden_states, attention_mask, **kwargs)
