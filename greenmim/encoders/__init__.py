"""Hierarchical encoders that compute visible tokens only."""

from .swin import SwinEncoder

__all__ = ["SwinEncoder"]
